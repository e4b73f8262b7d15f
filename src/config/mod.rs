//! Files and environment become validated settings; every fault is found before any is reported.
//!
//! Text becomes a tree that knows its lines (`node`), variables and flags are put over it (`layers`), one
//! description of the keys checks it (`shape`, `kinds`, `*_keys`), and what depends on several values or on
//! other files is judged last (`project`, `proxy`). Nothing is taken from a configuration with a fault.
//!
//! This room reads files and the environment; it neither watches them nor opens a socket. What of another file can take
//! effect without a restart is said here too (`reload`).

pub mod defaults;
mod effective;
mod fault;
mod files;
mod kinds;
mod layers;
mod node;
mod project;
mod project_keys;
mod proxy;
mod proxy_keys;
mod reload;
mod settings;
mod shape;
mod show;

use std::path::{Path, PathBuf};

pub use fault::{Fault, Faults, Position, Source};
pub use project::{ProjectFile, is_loopback};
pub use settings::{
    Access, Admin, App, AppProtocol, Control, Credential, Inbound, Log, LogFormat, Outbound,
    ProxyFile, ProxyLimits, Registry, Role, Rule, RulePath, ShutdownTimes, Tls, TlsVersion,
    UnknownHosts, Workers,
};

use files::{Files, read_bounded, unreadable};
use node::{MAX_TEXT_BYTES, Node, Value};
use project::Secrets;
use project_keys::PROJECT;
use proxy_keys::PROXY;

use crate::model::Project;

/// Where absolute paths begin.
const ROOT: &str = "/";

/// Reads a `project.yaml` with its secrets, for the control plane.
///
/// # Errors
/// Every fault of the file and of the files it points at.
pub fn load_project(file: &Path) -> Result<ProjectFile, Faults> {
    load_project_under(Path::new(ROOT), file)
}

/// As [`load_project`], with `root` in the place of `/` for the paths that the file names: an image's or a
/// machine's file system that is mounted elsewhere.
///
/// # Errors
/// Every fault of the file and of the files it points at.
pub fn load_project_under(root: &Path, file: &Path) -> Result<ProjectFile, Faults> {
    let mut faults = Vec::new();
    let files = Files::under(root);
    let project = read_project(&files, file, Secrets::Read, &mut faults);
    finish(project, faults, file, &files)
}

/// Reads the registry of a `project.yaml`, for a proxy without a control plane: identities are not looked at, so it has
/// none.
///
/// # Errors
/// Every fault of the file, and of the key sets it points at.
pub fn load_registry(file: &Path) -> Result<ProjectFile, Faults> {
    let mut faults = Vec::new();
    let files = Files::under(Path::new(ROOT));
    let project = read_project(&files, file, Secrets::Leave, &mut faults);
    finish(project, faults, file, &files)
}

/// Reads the settings of one proxy: `flags` (path and value, such as `outbound.listen`) beat `environment`
/// (`INFRAR_…`, all others are passed over) beats `file`.
///
/// # Errors
/// Every fault of all three, and of the files they point at.
pub fn load_proxy(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    flags: &[(String, String)],
) -> Result<ProxyFile, Faults> {
    load_proxy_under(Path::new(ROOT), file, environment, flags)
}

/// As [`load_proxy`], with `root` in the place of `/` for the paths that the settings name.
///
/// # Errors
/// Every fault of file, environment and flags, and of the files they point at.
pub fn load_proxy_under(
    root: &Path,
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    flags: &[(String, String)],
) -> Result<ProxyFile, Faults> {
    let mut faults = Vec::new();
    let files = Files::under(root);
    let mut tree = tree(file, &mut faults);
    let settings = tree.as_mut().and_then(|tree| {
        layers::overlay(tree, &PROXY, environment, flags, &mut faults);
        PROXY.check(tree, &mut faults);
        proxy::read(tree, &files, &mut faults, |path, node, faults| {
            referred_project(&files, &path, node, faults)
        })
    });
    finish(settings, faults, file.unwrap_or_else(|| Path::new("settings")), &files)
}

/// The form of log lines that [`load_proxy`] would find, wherever it is written, without a look at anything else: what
/// a log must know before it can say what is wrong with the rest.
#[must_use]
pub fn log_format(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    flags: &[(String, String)],
) -> LogFormat {
    let faults = &mut Vec::new();
    let mut tree = tree(file, faults);
    if let Some(tree) = &mut tree {
        layers::overlay(tree, &PROXY, environment, flags, faults);
    }
    tree.map_or(LogFormat::Auto, |tree| proxy::log(tree.here().key("log")).format)
}

/// Whether a file is a `proxy.yaml`: it has `role` at its top. Any other is a `project.yaml`; one that cannot be
/// read is told so by whoever reads it as that.
#[must_use]
pub fn is_proxy(file: &Path) -> bool {
    read_tree(file, &mut Vec::new()).is_some_and(|tree| tree.has("role"))
}

/// The `INFRAR_…` variables of this process, for [`load_proxy`].
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    std::env::vars_os()
        .map(|(name, value)| (text(name), text(value)))
        .filter(|(name, _)| name.starts_with("INFRAR_"))
        .collect()
}

/// Settings that can be printed as YAML, with their defaults and without secrets.
pub trait Effective {
    /// The settings as a file that says everything.
    fn effective_yaml(&self) -> String;
}

/// The settings as YAML with every default written out; the paths of secrets are shown, secrets never.
#[must_use]
pub fn effective_yaml(settings: &impl Effective) -> String {
    settings.effective_yaml()
}

/// The published JSON schema of `project.yaml`.
#[must_use]
pub fn schema_project() -> serde_json::Value {
    published(&PROJECT, "project.yaml", "What is true for a whole infrar project.")
}

/// The published JSON schema of `proxy.yaml`.
#[must_use]
pub fn schema_proxy() -> serde_json::Value {
    published(&PROXY, "proxy.yaml", "One infrar proxy.")
}

fn published(shape: &shape::Shape, title: &str, about: &str) -> serde_json::Value {
    let mut schema = shape.schema();
    if let serde_json::Value::Object(fields) = &mut schema {
        let dialect = "https://json-schema.org/draft/2020-12/schema";
        fields.insert("$schema".to_owned(), dialect.into());
        fields.insert("title".to_owned(), title.into());
        fields.insert("description".to_owned(), about.into());
    }
    schema
}

/// What was read, unless a fault was found. A reader that gives up without a fault is itself at fault.
fn finish<T>(read: Option<T>, faults: Vec<Fault>, file: &Path, files: &Files) -> Result<T, Faults> {
    Faults::unless_none(faults, files.named())?;
    read.ok_or_else(|| {
        let unread = Fault {
            at: Position::whole(Source::File(file.into())),
            path: String::new(),
            found: "something that could not be read".to_owned(),
            advice: "please report this file as a bug".to_owned(),
        };
        Faults(vec![unread], files.named())
    })
}

/// What the file says; without one, nothing.
fn tree(file: Option<&Path>, faults: &mut Vec<Fault>) -> Option<Node> {
    let nowhere = || Position::whole(Source::Variable("the environment".into()));
    match file {
        Some(file) => read_tree(file, faults),
        None => Some(Node::new(nowhere(), Value::Map(Vec::new()))),
    }
}

fn read_tree(file: &Path, faults: &mut Vec<Fault>) -> Option<Node> {
    let source = Source::File(file.into());
    let limit = u64::try_from(MAX_TEXT_BYTES).unwrap_or(u64::MAX);
    let content = read_bounded(file, limit).map_err(|error| unreadable(&error));
    let text = content.and_then(|content| {
        String::from_utf8(content).map_err(|_source| "which is no UTF-8 text".to_owned())
    });
    match text {
        Ok(text) => node::parse(&text, &source, faults),
        Err(why) => {
            faults.push(Fault {
                at: Position::whole(source),
                path: String::new(),
                found: format!("a file {why}"),
                advice: "name a YAML file this user may read".to_owned(),
            });
            None
        }
    }
}

fn read_project(
    files: &Files,
    file: &Path,
    secrets: Secrets,
    faults: &mut Vec<Fault>,
) -> Option<ProjectFile> {
    let tree = read_tree(file, faults)?;
    PROJECT.check(&tree, faults);
    project::read(&tree, files, secrets, faults)
}

/// The project that a proxy's `project` names; a missing one is a fault of that setting.
fn referred_project(
    files: &Files,
    path: &PathBuf,
    node: &Node,
    faults: &mut Vec<Fault>,
) -> Option<Project> {
    if let Err(error) = std::fs::metadata(path) {
        let found = format!("{}, {}", node.found(), unreadable(&error));
        faults.push(node.fault_found(found, "write the path of a project.yaml"));
        return None;
    }
    read_project(files, path, Secrets::Leave, faults).map(|file| file.project)
}
