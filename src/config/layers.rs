//! Flags beat environment beats file: variables and flags are put into the tree that was read from the file,
//! each with its own name as the place where it was written.
//!
//! A variable's name is `INFRAR_` and the path of its key in upper case; what lists and maps hold is YAML flow
//! text. A higher layer replaces a whole value, and of keys that exclude each other it replaces the other.

use std::sync::Arc;

use super::{
    fault::{Fault, Position, Source, nearest, quoted},
    node::{Entry, Node, Value, parse},
    shape::Shape,
};

const PREFIX: &str = "INFRAR_";

/// Variables that other commands and the application's side use: a shared environment may hold them all.
const FOREIGN: [&str; 10] = [
    "INFRAR_ADMIN_URL",
    "INFRAR_CERT_FILE",
    "INFRAR_CONFIG",
    "INFRAR_DATA_DIR",
    "INFRAR_KEY_FILE",
    "INFRAR_LISTEN",
    "INFRAR_LOG_LEVEL",
    "INFRAR_OUTBOUND_URL",
    "INFRAR_PUBLIC_URL",
    "INFRAR_TOKEN",
];

/// A key with its path from the top.
#[derive(Clone)]
struct Setting {
    path: Vec<&'static str>,
    shape: &'static Shape,
}

impl Setting {
    fn variable(&self) -> String {
        format!("{PREFIX}{}", self.path.join("_").to_ascii_uppercase())
    }

    fn dotted(&self) -> String {
        self.path.join(".")
    }
}

/// Every key below `shape` that has a fixed path.
fn settings(shape: &'static Shape) -> Vec<Setting> {
    let mut found = Vec::new();
    let mut open = vec![Setting { path: Vec::new(), shape }];
    while let Some(setting) = open.pop() {
        for key in setting.shape.keys() {
            let mut path = setting.path.clone();
            path.push(key.name);
            let below = Setting { path, shape: key.shape };
            open.push(below.clone());
            found.push(below);
        }
    }
    // A whole section comes before its parts, so that a part that is set as well has its way.
    found.sort_by(|a, b| (a.path.len(), &a.path).cmp(&(b.path.len(), &b.path)));
    found
}

/// Puts environment and flags over what the file says.
pub(super) fn overlay(
    root: &mut Node,
    shape: &'static Shape,
    environment: impl Iterator<Item = (String, String)>,
    flags: &[(String, String)],
    faults: &mut Vec<Fault>,
) {
    let settings = settings(shape);
    let mut variables: Vec<(String, String)> =
        environment.filter(|(name, text)| is_setting(name, text)).collect();
    variables.sort();
    for setting in &settings {
        let name = setting.variable();
        let written = variables.iter().find(|(written, _)| *written == name);
        if let Some((_, text)) = written {
            put_text(root, shape, setting, &Source::Variable(name.into()), text, faults);
        }
    }
    for (name, _) in &variables {
        if !settings.iter().any(|setting| setting.variable() == *name) {
            faults.push(unknown_variable(name, &settings));
        }
    }
    for setting in &settings {
        let dotted = setting.dotted();
        // Of a flag that is given twice the last one counts, as people expect of flags.
        if let Some((_, text)) = flags.iter().rev().find(|(path, _)| *path == dotted) {
            put_text(root, shape, setting, &Source::Flag(dotted.into()), text, faults);
        }
    }
    for (path, _) in flags {
        if !settings.iter().any(|setting| setting.dotted() == *path) {
            faults.push(unknown_flag(path, &settings));
        }
    }
    root.name_paths();
}

/// Whether a variable is there to set something of a proxy.
pub(super) fn is_setting(name: &str, text: &str) -> bool {
    // An empty variable is one that somebody meant to unset.
    let ours = name.starts_with(PREFIX) && !text.is_empty();
    ours && !FOREIGN.contains(&name) && !is_service_link(name, text)
}

/// Kubernetes and Docker describe a service named `infrar-…` to every container by variables such as
/// `INFRAR_CONTROL_SERVICE_HOST` and `INFRAR_CONTROL_PORT_7070_TCP`. They are no settings.
fn is_service_link(name: &str, text: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || (name.ends_with("_PORT") && text.contains("://"))
        || ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| {
            let part = format!("{protocol}_");
            name.contains("_PORT_") && (name.ends_with(protocol) || name.contains(&part))
        })
}

fn put_text(
    root: &mut Node,
    shape: &'static Shape,
    setting: &Setting,
    source: &Source,
    text: &str,
    faults: &mut Vec<Fault>,
) {
    let at = Position::whole(source.clone());
    let value = if setting.shape.takes_yaml(text) {
        let before = faults.len();
        let node = parse(text, source, faults);
        let path = setting.dotted();
        for fault in faults.iter_mut().skip(before) {
            let inner = std::mem::take(&mut fault.path);
            fault.path = if inner.is_empty() { path.clone() } else { format!("{path}.{inner}") };
        }
        let Some(node) = node else { return };
        node
    } else {
        Node::text(at.clone(), text)
    };
    if let Err(listeners) = put(root, shape, &setting.path, value) {
        faults.push(Fault {
            at,
            path: setting.dotted(),
            found: format!("a part of one of {listeners} listeners"),
            advice: "set the whole list, or change it in the file".to_owned(),
        });
    }
}

/// Puts `value` at `path` below `node`; `Err` with the number of items if a list of several is in the way.
fn put(
    node: &mut Node,
    shape: &'static Shape,
    path: &[&'static str],
    value: Node,
) -> Result<(), usize> {
    let Some((key, rest)) = path.split_first() else {
        *node = value;
        return Ok(());
    };
    if let Value::List(items) = &mut node.value {
        return match items.as_mut_slice() {
            [only] => put(only, shape, path, value),
            several => Err(several.len()),
        };
    }
    let at = value.at.clone();
    if !matches!(node.value, Value::Map(_)) {
        *node = Node::new(at.clone(), Value::Map(Vec::new()));
    }
    let Value::Map(entries) = &mut node.value else { return Ok(()) };
    if shape.is_one_of() {
        entries.retain(|entry| entry.key == *key);
    }
    let below = shape.keys().iter().find(|known| known.name == *key);
    let Some(below) = below.map(|known| known.shape) else { return Ok(()) };
    if let Some(entry) = entries.iter_mut().find(|entry| entry.key == *key) {
        return put(&mut entry.value, below, rest, value);
    }
    let mut fresh = Node::new(at.clone(), Value::Map(Vec::new()));
    put(&mut fresh, below, rest, value)?;
    entries.push(Entry { key: (*key).to_owned(), at, value: fresh });
    Ok(())
}

fn unknown_variable(name: &str, settings: &[Setting]) -> Fault {
    // Compared without what all of them begin with: it would make any two look alike.
    let bare = |name: &str| name.strip_prefix(PREFIX).unwrap_or(name).to_owned();
    let known: Vec<String> = settings.iter().map(|setting| bare(&setting.variable())).collect();
    let foreign = FOREIGN.map(bare);
    let names = known.iter().chain(&foreign).map(String::as_str);
    let advice = nearest(&bare(name), names).map_or_else(
        || "unset it; `infrar check` lists the settings".to_owned(),
        |near| format!("write {PREFIX}{near}"),
    );
    Fault {
        at: Position::whole(Source::Variable(name.into())),
        path: String::new(),
        found: "an unknown variable".to_owned(),
        advice,
    }
}

fn unknown_flag(path: &str, settings: &[Setting]) -> Fault {
    let known: Vec<String> = settings.iter().map(Setting::dotted).collect();
    let advice = nearest(path, known.iter().map(String::as_str)).map_or_else(
        || "leave it out; `infrar check` lists the settings".to_owned(),
        |near| format!("write {near}"),
    );
    Fault {
        at: Position::whole(Source::Flag(Arc::from(path))),
        path: String::new(),
        found: format!("the unknown setting {}", quoted(path)),
        advice,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::proxy_keys::PROXY, *};

    #[test]
    fn every_variable_names_one_setting() {
        let mut names: Vec<String> = settings(&PROXY).iter().map(Setting::variable).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(all > 50, "{names:?}");
        assert!(FOREIGN.iter().all(|name| !names.iter().any(|known| known == name)));
        // None of them looks like what Kubernetes says about a service.
        assert!(names.iter().all(|name| !is_service_link(name, "x")));
    }
}
