//! What commands say and how they end: what is wrong with a command line or a port is told at once, with exit code 2.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a story may fail"
)]

use std::{
    net::TcpListener,
    path::Path,
    process::{Command, Output, Stdio},
};

/// A command that ends by itself.
fn infrar(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infrar"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("INFRAR_") {
            command.env_remove(name);
        }
    }
    let Output { status, stderr, .. } = command
        .args(arguments)
        .envs(variables.iter().copied())
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .expect("the binary starts");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

/// Ports that are taken as long as these live.
fn taken<const N: usize>() -> ([TcpListener; N], [String; N]) {
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = [0; N].map(|_| String::new());
    let mut addresses = addresses;
    for (address, held) in addresses.iter_mut().zip(&held) {
        *address = held.local_addr().unwrap().to_string();
    }
    (held, addresses)
}

#[test]
fn up_names_every_port_that_is_taken_and_the_flag_for_each() {
    let folder = tempfile::tempdir().unwrap();
    let (_held, [control, outbound, admin]) = taken();
    let flags = ["--control-listen", "--outbound-listen", "--admin-listen"];
    let arguments = ["up", flags[0], &control, flags[1], &outbound, flags[2], &admin];
    let (code, said) = infrar(folder.path(), &[], &arguments);
    assert_eq!(code, Some(2), "{said}");
    for (flag, address) in flags.iter().zip([control, outbound, admin]) {
        let line = said.lines().find(|line| line.contains(&address));
        assert!(line.is_some_and(|line| line.contains(flag)), "{flag}: {said}");
    }
}

#[test]
fn a_proxy_names_every_port_that_is_taken_and_the_setting_for_each() {
    let folder = tempfile::tempdir().unwrap();
    let (_held, [admin, outbound, port, inbound]) = taken();
    std::fs::write(
        folder.path().join("project.yaml"),
        "project: shop\nservices: { reports: {} }\n",
    )
    .unwrap();
    let yaml = format!(
        "service: web\nplace: local_laptop\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
         outbound: {{ listen: '{outbound}', ports: {{ reports: '{port}' }} }}\n\
         inbound: {{ listen: '{inbound}', app: 'http://127.0.0.1:1' }}\n"
    );
    std::fs::write(folder.path().join("proxy.yaml"), yaml).unwrap();
    let (code, said) = infrar(folder.path(), &[], &["proxy", "--config", "proxy.yaml"]);
    assert_eq!(code, Some(2), "{said}");
    let keys = ["admin.listen", "outbound.listen", "outbound.ports.reports", "inbound.listen"];
    for (key, address) in keys.iter().zip([admin, outbound, port, inbound]) {
        let line = said.lines().find(|line| line.contains(&address));
        assert!(line.is_some_and(|line| line.contains(key)), "{key}: {said}");
    }
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_to_write() {
    let folder = tempfile::tempdir().unwrap();
    for (variables, arguments, advice) in [
        (
            &[("INFRAR_LOG_LEVEL", "loud")][..],
            &["man"][..],
            "INFRAR_LOG_LEVEL: \"loud\" is no log level",
        ),
        (&[], &["services", "list"], "infrar token get"),
        (
            &[("INFRAR_CONTROL_URL", "http://control.example:7070")],
            &["services", "list"],
            "write https://",
        ),
        (&[("INFRAR_ADMIN_URL", "https://127.0.0.1:15000")], &["health"], "write http://HOST:PORT"),
    ] {
        let (code, said) = infrar(folder.path(), variables, arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(advice), "{arguments:?}: {said}");
    }
}
