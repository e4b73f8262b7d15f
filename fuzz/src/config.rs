//! Settings: YAML that people write, and variables that hold some.

use std::{cell::RefCell, fs, path::Path};

use infrar::config::{self, Effective, Faults, ProxyFile, Source, effective_yaml};
use tempfile::TempDir;

/// `project.yaml`.
pub const PROJECTS: &[&[u8]] = &[
    b"project: shop\nmulti_cloud: { connections: [{ from: aws_us_east_1, to: azure_eastus, type: vpn, bandwidth: 1gbps, fallback: public }] }\nservices:\n  data-intelligence:\n    endpoints:\n      - { url: 'https://data.example', provider: azure, region: eastus, internal_url: 10.1.1.10, weight: 3 }\n      - url: https://other.example:8443\n        provider: aws\n        region: us-east-1\n        private_url: '[fd00::1]:443'\n        state: standby\n    scopes: [read:data, write:query]\n    routing: { policy: latency, sticky: { header: x-session } }\n    timeouts: { connect: 5s, attempt: null, request: 30s }\n    hedge: { after: p95, budget: 2% }\npermissions:\n  web: { data-intelligence: [read:data] }\nidentities:\n  web: { client_secret_file: secret }\nmode: enforce\n",
    b"project: shop\nservices: {}\n",
    b"a: &x 1\nb: *x\n",
    b"project: \"shop\"\n? [a]\n: 1\n",
];

/// `proxy.yaml`.
pub const SETTINGS: &[&[u8]] = &[
    b"role: sidecar\nservice: web\nplace: aws_us_east_1\ncontrol:\n  url: https://control.example:7070\n  credential: { client_secret_file: secret }\n  state_dir: state\noutbound:\n  listen: 127.0.0.1:15001\n  ports: { data: 127.0.0.1:15101 }\n  unknown_hosts: allow\ninbound:\n  - listen: 127.0.0.1:15006\n    app: h2c://127.0.0.1:8080\n    tls: off\n    rules:\n      - { path: /healthz, public: true }\n      - { methods: [POST], path: /v1/*, scopes: [write:query] }\nlimits: { header_bytes: 60KiB, idle_timeout: 1h }\nshutdown: { grace: 5s, deadline: 25s }\nlog: { format: json, access: false }\nworkers: 2\n",
    b"role: dev\nservice: web\nproject: project.yaml\n",
    b"role: edge\nservice: edge\nplace: gcp/us-central1\nproject: project.yaml\ninbound: { listen: 127.0.0.1:1, tls: off }\n",
];

/// The first byte says which variable.
pub const VARIABLES: &[&[u8]] = &[
    b"\0{ listen: 127.0.0.1:15001, ports: { data: 127.0.0.1:15101 }, unknown_hosts: allow }",
    b"\x01{ listen: 127.0.0.1:15006, app: http://127.0.0.1:8080, tls: off, rules: [{ path: /a/*, scopes: [] }] }",
    b"\x02{ header_bytes: 60KiB, headers: 100, body_bytes: null }",
    b"\x03{ grace: 5s, deadline: 1m 30s }",
    b"\x04[ { listen: 127.0.0.1:1, app: 'http://a', tls: off } ]",
    b"\x0530s",
];

const NAMES: &[(&str, &str)] = &[
    ("INFRAR_OUTBOUND", "outbound: "),
    ("INFRAR_INBOUND", "inbound: "),
    ("INFRAR_LIMITS", "limits: "),
    ("INFRAR_SHUTDOWN", "shutdown: "),
    ("INFRAR_INBOUND", "inbound: "),
    ("INFRAR_LIMITS_IDLE_TIMEOUT", "limits:\n  idle_timeout: "),
];

thread_local! {
    /// A folder with what settings point at; absolute paths are below it.
    static FOLDER: RefCell<TempDir> = RefCell::new(folder());
}

fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, content) in [("secret", "s"), ("project.yaml", "project: shop\nservices: {}\n")] {
        fs::write(folder.path().join(name), content).expect("a writable folder");
    }
    folder
}

/// Writes `text` into a file of its own and loads it.
fn load<T>(text: &[u8], how: impl FnOnce(&Path, &Path) -> Result<T, Faults>) -> Result<T, Faults> {
    FOLDER.with_borrow(|folder| {
        let file = folder.path().join("under-test.yaml");
        fs::write(&file, text).expect("a writable folder");
        let loaded = how(folder.path(), &file);
        // A file that is overwritten instead may have to reach the disk first.
        fs::remove_file(&file).expect("our own file");
        loaded
    })
}

/// Faults say where they are, and that place exists.
fn told(faults: &Faults, text: &[u8]) {
    assert!(!faults.0.is_empty());
    // YAML knows three ways to end a line.
    let lines = 2 + text.iter().filter(|byte| matches!(byte, b'\n' | b'\r')).count();
    for fault in &faults.0 {
        assert!(!fault.found.is_empty() && !fault.advice.is_empty(), "{fault:?}");
        if let Source::File(file) = &fault.at.source
            && file.ends_with("under-test.yaml")
        {
            assert!(fault.at.line <= lines, "{fault}");
        }
    }
}

/// A project that is accepted is the same project when all its defaults are written out.
pub fn project(data: &[u8]) {
    match load(data, config::load_project_under) {
        Ok(file) => {
            let shown = effective_yaml(&file);
            let again = load(shown.as_bytes(), |_root, file| config::load_project(file));
            let again = again.map_err(|faults| faults.to_string()).expect(&shown);
            assert_eq!(file.project, again.project, "{shown}");
            assert_eq!(shown, effective_yaml(&again));
        }
        Err(faults) => told(&faults, data),
    }
}

fn proxy(root: &Path, file: &Path) -> Result<ProxyFile, Faults> {
    config::load_proxy_under(root, Some(file), std::iter::empty(), &[])
}

/// A proxy's settings that are accepted are the same when all their defaults are written out.
pub fn settings(data: &[u8]) {
    match load(data, proxy) {
        Ok(file) => {
            let shown = file.effective_yaml();
            let again = load(shown.as_bytes(), |_root, file| proxy(Path::new("/"), file));
            let again = again.map_err(|faults| faults.to_string()).expect(&shown);
            assert_eq!(file, again, "{shown}");
        }
        Err(faults) => told(&faults, data),
    }
}

/// A variable means what the same text means in the file.
pub fn variables(data: &[u8]) {
    let Some((which, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let Some((name, key)) = NAMES.get(usize::from(*which) % NAMES.len()) else { return };
    let base =
        "role: dev\nservice: web\nproject: project.yaml\noutbound: { listen: 127.0.0.1:1 }\n";
    let pair = ((*name).to_owned(), text.to_owned());
    let variable = load(base.as_bytes(), |root, file| {
        config::load_proxy_under(root, Some(file), std::iter::once(pair), &[])
    });
    // Relative paths begin elsewhere, and a file's text may go on behind the value.
    let alike = !text.is_empty() && !text.contains(['\n', '\r', '#']) && !text.contains("_file");
    match variable {
        Ok(variable) if alike => {
            let base = base.replace("outbound: { listen: 127.0.0.1:1 }\n", "");
            let without = if *name == "INFRAR_OUTBOUND" {
                &base
            } else {
                &format!("{base}outbound: {{ listen: 127.0.0.1:1 }}\n")
            };
            let file = load(format!("{without}{key}{text}\n").as_bytes(), proxy);
            match file {
                Ok(file) => assert_eq!(file, variable, "{name}={text}"),
                Err(faults) => assert!(!text.starts_with(['{', '[']), "{name}={text}: {faults}"),
            }
        }
        Ok(_) => {}
        Err(faults) => told(&faults, base.as_bytes()),
    }
}
