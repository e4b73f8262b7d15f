//! What a configuration may look like: one description per file, from which everything else follows.
//!
//! The same table checks a file (unknown keys, wrong types, bad values), names the environment variables and
//! prints the JSON schema, so the three cannot differ. It knows single values only; what depends on several
//! values, or on other files, is judged where the settings are put together.

use serde_json::{Map, Value as Json, json};

use super::{
    fault::{Fault, nearest},
    node::{Node, Value},
};

/// What may stand at one place.
pub(super) enum Shape {
    /// `true` or `false`.
    Flag,
    /// A whole number within bounds.
    Number { least: u64, most: u64 },
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Text of a kind.
    Text(&'static Kind),
    /// One of these words, or something else.
    ChoiceOr(&'static [&'static str], &'static Self),
    /// Something, or null for not at all.
    Nullable(&'static Self),
    /// Something, or a list of it.
    OneOrMany(&'static Self),
    /// A list.
    List(&'static Self),
    /// Names of a kind, each with something.
    Map { name: &'static Kind, value: &'static Self },
    /// These keys.
    Table(&'static [Key]),
    /// Exactly one of these keys.
    OneOf(&'static [Key]),
    /// Anything, read elsewhere.
    Any,
}

/// A key of a table.
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) shape: &'static Shape,
    pub(super) required: bool,
    /// What it is for; in the published schema.
    pub(super) about: &'static str,
}

impl Key {
    pub(super) const fn new(
        name: &'static str,
        shape: &'static Shape,
        about: &'static str,
    ) -> Self {
        Self { name, shape, required: false, about }
    }

    pub(super) const fn required(
        name: &'static str,
        shape: &'static Shape,
        about: &'static str,
    ) -> Self {
        Self { name, shape, required: true, about }
    }
}

/// A kind of text.
pub(super) struct Kind {
    /// What it is, in the schema.
    pub(super) what: &'static str,
    /// What to write, for a value that is missing or of another type.
    pub(super) advice: &'static str,
    /// What to write instead of this text, if it is none of the kind.
    pub(super) check: fn(&str) -> Result<(), String>,
    /// A regular expression for the schema, where a short one says something.
    pub(super) pattern: Option<&'static str>,
}

impl Shape {
    /// Gathers the faults of `node` and of everything below it.
    pub(super) fn check(&self, node: &Node, faults: &mut Vec<Fault>) {
        match self {
            Self::Any => {}
            Self::Nullable(inner) => {
                if !node.is_null() {
                    inner.check(node, faults);
                }
            }
            Self::Flag => check_flag(node, faults),
            Self::Number { least, most } => {
                let number = node.plain().and_then(|text| text.parse::<u64>().ok());
                if !number.is_some_and(|number| (*least..=*most).contains(&number)) {
                    faults.push(node.fault(self.advice()));
                }
            }
            Self::Choice(words) => {
                if !node.scalar().is_some_and(|text| words.contains(&text)) {
                    faults.push(node.fault(choice_advice(node, words, "")));
                }
            }
            Self::Text(kind) => match node.scalar().map(kind.check) {
                Some(Ok(())) => {}
                Some(Err(advice)) => faults.push(node.fault(advice)),
                None => faults.push(node.fault(kind.advice)),
            },
            Self::ChoiceOr(words, inner) => match node.scalar() {
                Some(text) if words.contains(&text) => {}
                Some(_) if inner.is_collection() => {
                    faults.push(node.fault(choice_advice(node, words, inner.noun())));
                }
                Some(_) | None => inner.check(node, faults),
            },
            Self::OneOrMany(inner) => match &node.value {
                Value::List(items) => items.iter().for_each(|item| inner.check(item, faults)),
                Value::Scalar { .. } | Value::Map(_) => inner.check(node, faults),
            },
            Self::List(inner) => match &node.value {
                Value::List(items) => items.iter().for_each(|item| inner.check(item, faults)),
                Value::Scalar { .. } | Value::Map(_) => {
                    faults.push(node.fault("write a list: [first, second]"));
                }
            },
            Self::Map { name, value } => check_map(node, name, value, faults),
            Self::Table(keys) => check_table(node, keys, faults),
            Self::OneOf(keys) => check_one_of(node, keys, faults),
        }
    }

    /// What to write here when nothing fitting is there.
    pub(super) fn advice(&self) -> String {
        match self {
            Self::Flag => "write true or false".to_owned(),
            Self::Number { least, most: u64::MAX } => {
                format!("write a whole number from {least} on")
            }
            Self::Number { least, most } => {
                format!("write a whole number from {least} to {most}")
            }
            Self::Choice(words) => format!("write {}", alternatives(words)),
            Self::Text(kind) => kind.advice.to_owned(),
            Self::ChoiceOr(words, inner) => {
                format!("write {}, or {}", words.join(", "), inner.noun())
            }
            Self::Nullable(inner) | Self::OneOrMany(inner) => inner.advice(),
            Self::OneOf(keys) => {
                let names: Vec<_> = keys.iter().map(|key| key.name).collect();
                format!("write exactly one of {}", names.join(", "))
            }
            Self::List(_) | Self::Map { .. } | Self::Table(_) | Self::Any => {
                format!("write {}", self.noun())
            }
        }
    }

    /// The shape as the end of a sentence.
    fn noun(&self) -> &'static str {
        match self {
            Self::Flag => "true or false",
            Self::Number { .. } => "a whole number",
            Self::Choice(_) => "one of its words",
            Self::Text(kind) => kind.what,
            Self::ChoiceOr(_, inner) | Self::Nullable(inner) | Self::OneOrMany(inner) => {
                inner.noun()
            }
            Self::List(_) => "a list",
            Self::Map { .. } => "a map of names",
            Self::Table(_) | Self::OneOf(_) => "a map of its keys",
            Self::Any => "a value",
        }
    }

    fn is_collection(&self) -> bool {
        match self {
            Self::List(_) | Self::Map { .. } | Self::Table(_) | Self::OneOf(_) => true,
            Self::ChoiceOr(_, inner) | Self::Nullable(inner) | Self::OneOrMany(inner) => {
                inner.is_collection()
            }
            Self::Flag | Self::Number { .. } | Self::Choice(_) | Self::Text(_) | Self::Any => false,
        }
    }

    /// The keys that may stand directly here.
    pub(super) fn keys(&self) -> &'static [Key] {
        match self {
            Self::Table(keys) | Self::OneOf(keys) => keys,
            Self::ChoiceOr(_, inner) | Self::Nullable(inner) | Self::OneOrMany(inner) => {
                inner.keys()
            }
            Self::Flag
            | Self::Number { .. }
            | Self::Choice(_)
            | Self::Text(_)
            | Self::List(_)
            | Self::Map { .. }
            | Self::Any => &[],
        }
    }

    /// Whether setting one key here unsets the others.
    pub(super) fn is_one_of(&self) -> bool {
        match self {
            Self::OneOf(_) => true,
            Self::ChoiceOr(_, inner) | Self::Nullable(inner) | Self::OneOrMany(inner) => {
                inner.is_one_of()
            }
            Self::Flag
            | Self::Number { .. }
            | Self::Choice(_)
            | Self::Text(_)
            | Self::List(_)
            | Self::Map { .. }
            | Self::Table(_)
            | Self::Any => false,
        }
    }

    /// Whether a variable's value for this is YAML flow text rather than the text itself.
    pub(super) fn takes_yaml(&self, text: &str) -> bool {
        match self {
            Self::List(_) | Self::Map { .. } | Self::Table(_) | Self::OneOf(_) | Self::Any => true,
            Self::Nullable(inner) => inner.takes_yaml(text),
            Self::ChoiceOr(..) | Self::OneOrMany(_) => text.trim_start().starts_with(['[', '{']),
            Self::Flag | Self::Number { .. } | Self::Choice(_) | Self::Text(_) => false,
        }
    }

    /// This shape as a JSON schema (draft 2020-12).
    pub(super) fn schema(&self) -> Json {
        match self {
            Self::Any => json!({}),
            Self::Flag => json!({ "type": "boolean" }),
            Self::Number { least, most: u64::MAX } => {
                json!({ "type": "integer", "minimum": least })
            }
            Self::Number { least, most } => {
                json!({ "type": "integer", "minimum": least, "maximum": most })
            }
            Self::Choice(words) => json!({ "enum": words }),
            Self::Text(kind) => kind.schema(),
            Self::ChoiceOr(words, inner) => {
                json!({ "anyOf": [{ "enum": words }, inner.schema()] })
            }
            Self::Nullable(inner) => json!({ "anyOf": [{ "type": "null" }, inner.schema()] }),
            Self::OneOrMany(inner) => {
                let one = inner.schema();
                json!({ "anyOf": [one, { "type": "array", "items": one }] })
            }
            Self::List(inner) => json!({ "type": "array", "items": inner.schema() }),
            Self::Map { name, value } => {
                let mut names = Map::new();
                if let Some(pattern) = name.pattern {
                    names.insert("pattern".to_owned(), pattern.into());
                }
                json!({
                    "type": ["object", "null"],
                    "propertyNames": names,
                    "additionalProperties": value.schema(),
                })
            }
            Self::Table(keys) => table_schema(keys, json!({ "type": ["object", "null"] })),
            Self::OneOf(keys) => table_schema(
                keys,
                json!({ "type": "object", "minProperties": 1, "maxProperties": 1 }),
            ),
        }
    }
}

impl Kind {
    fn schema(&self) -> Json {
        // A number such as 1.3 or 8080 is good text in YAML.
        let mut schema = json!({ "type": ["string", "number"], "description": self.what });
        if let (Some(pattern), Json::Object(fields)) = (self.pattern, &mut schema) {
            fields.insert("pattern".to_owned(), pattern.into());
        }
        schema
    }
}

fn table_schema(keys: &[Key], mut schema: Json) -> Json {
    let properties: Map<String, Json> = keys
        .iter()
        .map(|key| {
            let mut property = key.shape.schema();
            if let Json::Object(fields) = &mut property {
                fields.insert("description".to_owned(), key.about.into());
            }
            (key.name.to_owned(), property)
        })
        .collect();
    let required: Vec<_> = keys.iter().filter(|key| key.required).map(|key| key.name).collect();
    if let Json::Object(fields) = &mut schema {
        fields.insert("properties".to_owned(), properties.into());
        fields.insert("additionalProperties".to_owned(), false.into());
        if !required.is_empty() {
            fields.insert("required".to_owned(), required.into());
            // A table that needs a key cannot be null.
            fields.insert("type".to_owned(), "object".into());
        }
    }
    schema
}

fn check_flag(node: &Node, faults: &mut Vec<Fault>) {
    // YAML 1.2 core schema, §10.3.2.
    let truth = |text| matches!(text, "true" | "True" | "TRUE" | "false" | "False" | "FALSE");
    if node.plain().is_some_and(truth) {
        return;
    }
    let advice = match node.scalar().map(str::to_ascii_lowercase).as_deref() {
        Some("yes" | "on" | "y" | "true") => "write true",
        Some("no" | "off" | "n" | "false") => "write false",
        Some(_) | None => "write true or false",
    };
    faults.push(node.fault(advice));
}

fn check_map(node: &Node, name: &Kind, value: &Shape, faults: &mut Vec<Fault>) {
    let Value::Map(entries) = &node.value else {
        if !node.is_null() {
            faults.push(node.fault(format!("write a map: {{ name: {} }}", value.noun())));
        }
        return;
    };
    for entry in entries {
        if let Err(advice) = (name.check)(&entry.key) {
            faults.push(Fault {
                at: entry.at.clone(),
                path: entry.value.path.clone(),
                found: super::fault::quoted(&entry.key),
                advice,
            });
        }
        value.check(&entry.value, faults);
    }
}

fn check_table(node: &Node, keys: &'static [Key], faults: &mut Vec<Fault>) {
    let Value::Map(entries) = &node.value else {
        // A table without anything in it: everything keeps its default.
        if !node.is_null() {
            let names: Vec<_> = keys.iter().map(|key| key.name).collect();
            let advice = format!("write a map; its keys are {}", names.join(", "));
            // The value may be a secret that was put in the place of its file.
            faults.push(node.fault_found("a single value or list", advice));
            return;
        }
        report_missing(node, keys, faults);
        return;
    };
    for entry in entries {
        match keys.iter().find(|key| key.name == entry.key) {
            Some(key) if entry.value.is_null() && !key.shape.takes_null() => {
                if !key.required {
                    continue; // as if it were not there
                }
            }
            Some(key) => key.shape.check(&entry.value, faults),
            None => faults.push(unknown_key(entry, keys)),
        }
    }
    report_missing(node, keys, faults);
}

impl Shape {
    /// Whether null is looked at by the shape itself.
    fn takes_null(&self) -> bool {
        match self {
            Self::Nullable(_) | Self::Table(_) | Self::Map { .. } | Self::Any => true,
            Self::OneOrMany(inner) => inner.takes_null(),
            Self::Flag
            | Self::Number { .. }
            | Self::Choice(_)
            | Self::Text(_)
            | Self::ChoiceOr(..)
            | Self::List(_)
            | Self::OneOf(_) => false,
        }
    }
}

fn report_missing(node: &Node, keys: &[Key], faults: &mut Vec<Fault>) {
    for key in keys.iter().filter(|key| key.required && node.get(key.name).is_none()) {
        // An optional part of a required table has been said by the table itself.
        faults.push(node.missing(key.name, key.shape.advice()));
    }
}

fn check_one_of(node: &Node, keys: &'static [Key], faults: &mut Vec<Fault>) {
    check_table(node, keys, faults);
    let Value::Map(entries) = &node.value else { return };
    let known = |name: &str| keys.iter().any(|key| key.name == name);
    let set: Vec<_> = entries
        .iter()
        .filter(|entry| known(&entry.key) && !entry.value.is_null())
        .map(|entry| entry.key.as_str())
        .collect();
    // An unknown key is most likely the misspelt one that is missing.
    if set.is_empty() && entries.iter().any(|entry| !known(&entry.key)) {
        return;
    }
    if set.len() != 1 {
        let found = if set.is_empty() { "none of them".to_owned() } else { set.join(" and ") };
        faults.push(node.fault_found(found, Shape::OneOf(keys).advice()));
    }
}

fn unknown_key(entry: &super::node::Entry, keys: &[Key]) -> Fault {
    let names = keys.iter().map(|key| key.name);
    let advice = match nearest(&entry.key, names.clone()) {
        Some(name) => format!("write {name}"),
        None => format!("the keys here are {}", names.collect::<Vec<_>>().join(", ")),
    };
    Fault {
        at: entry.at.clone(),
        path: entry.value.path.clone(),
        found: "an unknown key".to_owned(),
        advice,
    }
}

fn choice_advice(node: &Node, words: &[&str], or: &str) -> String {
    if let Some(word) = node.scalar().and_then(|text| nearest(text, words.iter().copied())) {
        return format!("write {word}");
    }
    if or.is_empty() {
        format!("write {}", alternatives(words))
    } else {
        format!("write {}, or {or}", words.join(", "))
    }
}

/// `a, b or c`.
fn alternatives(words: &[&str]) -> String {
    match words.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}
