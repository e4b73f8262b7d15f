//! What commands say and how they end: what is wrong with a command line or a port is told at once, with exit code 2; and
//! what they print works when it is pasted.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a story may fail"
)]

mod support;

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use support::{Folder, Infrar, Origin, Visit, free_ports, until};

/// A command that ends by itself: its exit code, and what it says to people.
fn infrar(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> (Option<i32>, String) {
    let (code, _out, said) = whole(folder, variables, arguments);
    (code, said)
}

/// The same with its standard output in the middle.
fn whole(
    folder: &Path,
    variables: &[(&str, &str)],
    arguments: &[&str],
) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infrar"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("INFRAR_") {
            command.env_remove(name);
        }
    }
    let Output { status, stdout, stderr } = command
        .args(arguments)
        .envs(variables.iter().copied())
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .expect("the binary starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (status.code(), text(&stdout), text(&stderr))
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

#[test]
fn wrong_addresses_and_files_are_answered_with_an_example() {
    let folder = tempfile::tempdir().unwrap();
    let web = &["--client-id", "web", "--client-secret-file", "nowhere"][..];
    for (arguments, advice) in [
        (&["control", "--listen", "33070"][..], "such as 127.0.0.1:7070"),
        (&["control", "--public-url", "foo"], "such as https://control.example:7070"),
        (&["up", "--admin-listen", "15000"], "such as 127.0.0.1:7070"),
        (&["up", "--control-listen", "0.0.0.0:0"], "--control-listen 0.0.0.0:0 is open to others"),
        (&[&["token", "get"], web].concat(), "--client-secret-file: nowhere cannot be read"),
    ] {
        let (code, said) = infrar(folder.path(), &[], arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(advice), "{arguments:?}: {said}");
    }
}

#[test]
fn a_sidecar_that_lives_by_its_environment_alone_is_checked_too() {
    let folder = tempfile::tempdir().unwrap();
    let mut variables = vec![
        ("INFRAR_SERVICE", "web"),
        ("INFRAR_PLACE", "aws_us_east_1"),
        ("INFRAR_CONTROL_URL", "https://control.example:7070"),
        ("INFRAR_CONTROL_CREDENTIAL_CLIENT_SECRET_FILE", "/run/secrets/infrar"),
    ];
    let (code, settings, said) = whole(folder.path(), &variables, &["check", "--skip-files"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(settings.contains("control.example:7070"), "{settings}");
    variables.push(("INFRAR_OUTBOUND_LISTEN", "zzz"));
    let (code, said) = infrar(folder.path(), &variables, &["check", "--skip-files"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.starts_with("INFRAR_OUTBOUND_LISTEN: outbound.listen: found \"zzz\""), "{said}");
}

#[test]
fn the_examples_are_checked_without_the_files_they_name() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    for file in ["sidecar.yaml", "edge.yaml", "dev.yaml", "project.example.yaml"] {
        let (code, said) = infrar(&examples, &[], &["check", "--skip-files", file]);
        assert_eq!(code, Some(0), "{file}: {said}");
    }
}

#[test]
fn shells_and_manuals_are_told_of_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, said) = whole(folder.path(), &[], &["completions", shell]);
        assert_eq!(code, Some(0), "{said}");
        assert!(script.contains("services") && script.contains("demo"), "{shell}: {script}");
    }
    let (code, page, said) = whole(folder.path(), &[], &["man"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(page.contains("EXIT STATUS") && page.contains("ENVIRONMENT"), "{page}");
    let (code, said) = infrar(folder.path(), &[], &["man", "--dir", "new/man1"]);
    assert_eq!(code, Some(0), "{said}");
    for page in ["infrar.1", "infrar-token-get.1", "infrar-services-list.1"] {
        assert!(folder.path().join("new/man1").join(page).exists(), "{page}");
    }
}

#[tokio::test]
async fn up_is_asked_by_the_commands_that_it_is_there_for() {
    let folder = Folder::new();
    let [control, out, admin] = free_ports::<3>().map(|at| at.to_string());
    let arguments =
        ["up", "--control-listen", &control, "--outbound-listen", &out, "--admin-listen", &admin];
    let mut up = Infrar::start(&folder, "up", &arguments);
    up.ready(admin.parse().unwrap()).await;
    let here = folder.path("");
    let health = ["health", "--admin", &format!("http://{admin}")];
    assert_eq!(infrar(&here, &[], &health), (Some(0), String::new()));

    let reach = ("INFRAR_CONTROL_URL", &*format!("http://{control}"));
    let get = ["token", "get", "--client-id", "web-application", "--client-secret-file"];
    let get = [&get[..], &[".infrar/secret"]].concat();
    let (code, token, said) = whole(&here, &[reach], &get);
    assert_eq!(code, Some(0), "{said}");
    let token = ("INFRAR_TOKEN", token.trim());

    let (code, listed, said) = whole(&here, &[reach, token], &["services", "list"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(listed.lines().any(|line| line.starts_with("hello  ")), "{listed}");
    let (_, listed, _) = whole(&here, &[reach, token], &["services", "list", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["services"][0]["name"], "hello");
    let (code, shown, said) = whole(&here, &[reach, token], &["services", "show", "hello"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(shown.contains("http://127.0.0.1:8080") && shown.contains("read:hello"), "{shown}");
    let (_, shown, _) = whole(&here, &[reach, token], &["services", "show", "hello", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["name"], "hello");

    // A token that is none, and a server that is no control plane, are told with what to do.
    let (code, said) = infrar(&here, &[reach, ("INFRAR_TOKEN", "a.b.c")], &["services", "list"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("INFRAR_TOKEN is not accepted") && said.contains("token get"), "{said}");
    let wrong = ("INFRAR_CONTROL_URL", &*format!("http://{admin}"));
    let (code, said) = infrar(&here, &[wrong, token], &["services", "list"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&format!("no infrar control plane answers at http://{admin}")), "{said}");
    let wrong = ("INFRAR_CONTROL_URL", &*format!("https://{control}"));
    let (code, said) = infrar(&here, &[wrong, token], &["services", "list"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("it does not speak TLS: write http://"), "{said}");

    up.signal("INT");
    assert_eq!(up.ended().await.code(), Some(0), "{}", up.log());
}

#[tokio::test]
async fn what_is_not_infrar_is_unhealthy_in_one_line() {
    let other = Origin::scripted(|mut visit: Visit| async move {
        let _asked = visit.head().await;
        let page = format!("<html>{}</html>", "x".repeat(2000));
        let head = format!("HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n", page.len());
        visit.say(head + &page).await;
    })
    .await;
    let folder = Folder::new();
    let (here, at) = (folder.path(""), format!("http://{}", other.at));
    let asked =
        tokio::task::spawn_blocking(move || infrar(&here, &[], &["health", "--admin", &at]));
    let (code, said) = asked.await.unwrap();
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("no infrar proxy answers at"), "{said}");
}

/// The lines of the demonstration that are there to be pasted.
fn commands(welcome: &str) -> Vec<String> {
    let lines = welcome.lines().map(str::trim);
    lines.filter(|line| line.starts_with("curl ")).map(str::to_owned).collect()
}

#[tokio::test]
async fn every_line_that_the_demonstration_prints_works_and_nothing_of_it_is_left() {
    if Command::new("curl").arg("--version").output().is_err() {
        assert_ne!(std::env::var_os("CI").as_deref(), Some("true".as_ref()), "curl is missing");
        eprintln!("skipped: curl is missing");
        return;
    }
    let folder = Folder::new();
    let mut demo = Infrar::start(&folder, "demo", &["demo"]);
    until("it is on", async || demo.log().contains("Live traffic")).await;
    let printed = commands(&demo.log());
    assert!(printed.len() > 6, "{}", demo.log());
    let mut files = None;
    for line in &printed {
        let status = "\\n%{http_code}";
        let run = line.replacen("curl ", &format!("curl -sS --max-time 20 -w '{status}' "), 1);
        let ran =
            tokio::task::spawn_blocking(move || Command::new("sh").args(["-c", &run]).output());
        let Output { status, stdout, stderr } = ran.await.unwrap().unwrap();
        let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert!(status.success(), "{line}: {err}\n{}", demo.log());
        // Which refusal a line is there to show stands above it: "403 scope-missing: …".
        let shows = shown_by(&demo.log(), line);
        let expected = shows.split(' ').next().filter(|word| word.parse::<u16>().is_ok());
        assert_eq!(out.lines().last(), Some(expected.unwrap_or("200")), "{line}: {out}");
        if let Some(code) = shows.split([' ', ':']).nth(1).filter(|_| expected.is_some()) {
            assert!(out.contains(code), "{line}: {out}");
        }
        files = files.or_else(|| {
            line.split(' ').find(|word| word.ends_with("/tls/ca.pem")).map(PathBuf::from)
        });
    }
    let files = files.expect("a line names the CA");
    assert!(files.exists());
    demo.signal("INT");
    assert_eq!(demo.ended().await.code(), Some(0), "{}", demo.log());
    assert!(!files.parent().and_then(Path::parent).unwrap().exists(), "{}", demo.log());
}

/// What the line above a command says of it.
fn shown_by(welcome: &str, command: &str) -> String {
    let lines: Vec<_> = welcome.lines().map(str::trim).collect();
    let at = lines.iter().position(|line| *line == command).unwrap_or_default();
    lines[..at].last().copied().unwrap_or_default().trim_start_matches("# ").to_owned()
}

/// Writes down the first admin's secret, which is told once.
async fn keep_admin_secret(folder: &Folder, control: &Infrar) {
    let mark = "client_secret  ";
    until("it is told", async || control.log().contains(mark)).await;
    let log = control.log();
    let secret = log.lines().find_map(|line| line.trim().strip_prefix(mark));
    folder.write("secrets/admin", secret.expect("it was told"));
}

/// A control plane with a project of its own, and whoever may change it.
struct Plane {
    folder: Folder,
    control: Infrar,
    url: String,
    token: String,
}

const PROJECT: &str = "project: shop\nservices:\n  data:\n    scopes: [use]\n    endpoints: [{ id: home, url: \
                       'https://data.example', provider: azure, region: eastus }]\n  reports: { scopes: [use] }\n\
                       permissions: { web: { data: [use] } }\nidentities: { web: { client_secret_file: secrets/web } }\n";

impl Plane {
    async fn start() -> Self {
        let folder = Folder::new();
        folder.write("secrets/web", "the caller's secret\n");
        folder.write("shop.yaml", PROJECT);
        let [at] = free_ports().map(|at| at.to_string());
        let mut control = Self::control(&folder, &at, &["--project", "shop.yaml"]);
        control.ready(at.parse().unwrap()).await;
        keep_admin_secret(&folder, &control).await;
        let mut plane = Self { folder, control, url: format!("http://{at}"), token: String::new() };
        plane.token = plane.new_token();
        plane
    }

    fn control(folder: &Folder, at: &str, more: &[&str]) -> Infrar {
        let usual = ["control", "--listen", at, "--data-dir", "kept"];
        Infrar::start(folder, "control", &[&usual[..], more].concat())
    }

    fn new_token(&self) -> String {
        let get = [
            "token",
            "get",
            "--client-id",
            "infrar-admin",
            "--client-secret-file",
            "secrets/admin",
        ];
        let (code, token, said) = self.run(&get);
        assert_eq!(code, Some(0), "{said}");
        token.trim().to_owned()
    }

    fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let variables = [("INFRAR_CONTROL_URL", &*self.url), ("INFRAR_TOKEN", &*self.token)];
        let known = if self.token.is_empty() { &variables[..1] } else { &variables };
        whole(&self.folder.path(""), known, arguments)
    }

    /// What a command prints that succeeds.
    fn says(&self, arguments: &[&str]) -> String {
        let (code, out, said) = self.run(arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {said}");
        out
    }

    async fn kill(&mut self) {
        self.control.kill().await;
    }
}

#[tokio::test]
async fn a_project_goes_out_and_in_and_a_difference_is_told_before_it_is_made() {
    let plane = Plane::start().await;
    let exported = plane.says(&["project", "export"]);
    plane.folder.write("exported.yaml", &exported);
    assert_eq!(
        plane.says(&["project", "diff", "exported.yaml"]),
        "nothing changes\n",
        "{exported}"
    );
    let before = plane.says(&["services", "list", "--json"]);
    assert!(plane.says(&["project", "import", "exported.yaml"]).starts_with("nothing changes"));
    assert_eq!(plane.says(&["services", "list", "--json"]), before, "the same revision");

    plane.folder.write("new.yaml", &PROJECT.replace("data.example", "data2.example"));
    let difference = plane.says(&["project", "diff", "new.yaml"]);
    let line = "~ services.data.endpoints.home.url: \"https://data.example\" -> \"https://data2.example\"\n";
    assert_eq!(difference, line);
    assert_eq!(
        plane.says(&["services", "list", "--json"]),
        before,
        "nothing was changed by asking"
    );
    let imported = plane.says(&["project", "import", "new.yaml"]);
    assert!(
        imported.starts_with(line) && imported.contains("in force since revision"),
        "{imported}"
    );
    assert!(plane.says(&["services", "show", "data"]).contains("data2.example"));

    plane.folder.write("other.yaml", &PROJECT.replace("project: shop", "project: bank"));
    let (code, _, said) = plane.run(&["project", "import", "other.yaml"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("project-renamed"), "{said}");
    plane.folder.write("broken.yaml", "project: shop\nservises: {}\n");
    let (code, _, said) = plane.run(&["project", "import", "broken.yaml"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("services"), "{said}");
}

#[tokio::test]
async fn an_endpoint_is_registered_kept_drained_and_removed_by_hand_and_each_step_is_printed() {
    let plane = Plane::start().await;
    let watching = ["services", "watch", "--control", &plane.url, "--token", &plane.token];
    let watch = Infrar::start(&plane.folder, "watch", &watching);
    let register = |more: &[&'static str]| {
        let east = [
            "services",
            "register",
            "data",
            "east",
            "--url",
            "https://east.data.example",
            "--place",
            "aws_us_east_1",
        ];
        [&east[..], more].concat()
    };
    // The watch begins at the revision of its first question: it is asked until it has told of something.
    until("the watch tells of it", async || {
        let said = plane.says(&register(&[]));
        assert!(
            said.contains("east of data: active at https://east.data.example, for 30 s"),
            "{said}"
        );
        if watch.log().contains("east of data is active at https://east.data.example") {
            return true;
        }
        plane.says(&["services", "remove", "data", "east"]);
        false
    })
    .await;
    let said = plane.says(&["services", "drain", "data", "east"]);
    assert!(said.contains("draining"), "{said}");
    until("the watch tells of it", async || watch.log().contains("east of data is draining")).await;
    assert_eq!(plane.says(&["services", "remove", "data", "east"]), "east of data is removed\n");
    until("the watch tells of it", async || watch.log().contains("east of data is gone")).await;
    let (code, _, said) = plane.run(&["services", "remove", "data", "east"]);
    assert_eq!(code, Some(1), "{said}");
    let (code, _, said) = plane.run(&["services", "remove", "data", "home"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("owned-by-project"), "{said}");

    let reach = ["--control", &plane.url, "--token", &plane.token];
    let keep = [&register(&["--keep", "--ttl", "5s"])[..], &reach].concat();
    let mut keep = Infrar::start(&plane.folder, "keep", &keep);
    let is_there = || plane.says(&["services", "show", "data"]).contains("east.data.example");
    until("it is there", async || is_there()).await;
    let begun = tokio::time::Instant::now();
    while begun.elapsed() < std::time::Duration::from_secs(7) {
        assert!(is_there(), "{}", keep.log());
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    keep.signal("INT");
    assert_eq!(keep.ended().await.code(), Some(0), "{}", keep.log());
    assert!(!is_there());
}

#[tokio::test]
async fn a_backup_of_a_running_control_plane_is_restored_with_its_keys_and_its_endpoints() {
    use std::os::unix::fs::PermissionsExt;
    let mut plane = Plane::start().await;
    let east = ["services", "register", "data", "east", "--url", "https://east.data.example"];
    plane.says(&[&east[..], &["--place", "aws_us_east_1", "--ttl", "1h"]].concat());
    let said = plane.says(&["backup", "copy.db", "--data-dir", "kept"]);
    assert!(said.contains("private keys") && said.contains("0600"), "{said}");
    let mode = std::fs::metadata(plane.folder.path("copy.db")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // What is there is never overwritten, and what is not there is no store.
    let (code, _, said) = plane.run(&["backup", "copy.db", "--data-dir", "kept"]);
    assert_eq!(
        (code, said.contains("copy.db exists already; choose another name")),
        (Some(2), true),
        "{said}"
    );
    let (code, _, said) = plane.run(&["backup", "other.db", "--data-dir", "nowhere"]);
    assert_eq!((code, said.contains("--data-dir")), (Some(2), true), "{said}");
    assert!(!plane.folder.path("nowhere").exists() && !plane.folder.path("other.db").exists());
    let (code, _, said) = plane.run(&["restore", "copy.db", "--data-dir", "kept"]);
    assert_eq!((code, said.contains("stop the control plane")), (Some(2), true), "{said}");
    let (code, _, said) = plane.run(&["restore", "missing.db", "--data-dir", "new"]);
    assert_eq!((code, said.contains("missing.db")), (Some(2), true), "{said}");
    plane.folder.write("torn.db", "SQLite format 3\0 and then nothing of the kind");
    let (code, _, said) = plane.run(&["restore", "torn.db", "--data-dir", "new"]);
    assert_eq!((code, said.contains("restore a backup")), (Some(2), true), "{said}");

    // The disk is lost; the backup is put in its place, in an empty directory.
    plane.kill().await;
    let (code, _, said) = plane.run(&["restore", "copy.db", "--data-dir", "kept"]);
    assert_eq!((code, said.contains("is not empty")), (Some(2), true), "{said}");
    std::fs::rename(plane.folder.path("kept"), plane.folder.path("lost")).unwrap();
    let said = plane.says(&["restore", "copy.db", "--data-dir", "kept"]);
    assert!(said.contains("Start `infrar control`"), "{said}");
    let mode =
        std::fs::metadata(plane.folder.path("kept/registry.db")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let at = plane.url.trim_start_matches("http://").to_owned();
    plane.control = Plane::control(&plane.folder, &at, &[]);
    plane.control.ready(at.parse().unwrap()).await;
    // A token from before is good, for the keys are the same ones and no other has come; so is the admin's secret.
    let shown = plane.says(&["services", "show", "data"]);
    assert!(shown.contains("east.data.example") && shown.contains("data.example"), "{shown}");
    let keys = support::get(at.parse().unwrap(), &at, "/.well-known/jwks.json").await;
    assert_eq!(keys.body.matches("\"kid\"").count(), 1, "{keys:?}");
    let before = plane.token.clone();
    plane.token = String::new();
    plane.token = plane.new_token();
    assert_ne!(plane.token, before);
    let listed: serde_json::Value =
        serde_json::from_str(&plane.says(&["services", "list", "--json"])).unwrap();
    assert!(listed["revision"].as_u64().unwrap() > 1_000_000, "{listed}");
}

#[tokio::test]
async fn proxies_are_listed_with_the_revision_they_serve() {
    let app = Origin::plain("here").await;
    let pair = support::Pair::open(app.at, "", "").await;
    let folder = &pair.folder;
    keep_admin_secret(folder, &pair.processes.control).await;
    let url = format!("http://{}", pair.control);
    let here = folder.path("");
    let ask = |token: &str, arguments: &[&str]| {
        let (code, out, said) =
            whole(&here, &[("INFRAR_CONTROL_URL", &url), ("INFRAR_TOKEN", token)], arguments);
        assert_eq!(code, Some(0), "{said}");
        out
    };
    let token = ask(
        "",
        &["token", "get", "--client-id", "infrar-admin", "--client-secret-file", "secrets/admin"],
    );
    let both = |revision: &str| {
        let listed = ask(token.trim(), &["proxies"]);
        let row = |who: &str| {
            let row = listed.lines().find(|line| line.starts_with(who));
            row.is_some_and(|row| {
                row.contains(&format!("  {revision}  ")) && row.contains("current")
            })
        };
        row("web ") && row("data ")
    };
    until("both are listed", async || both("1")).await;
    let project = folder.read("project.yaml");
    folder.write("project.yaml", &project.replace("scopes: [use]", "scopes: [use, more]"));
    until("both serve the next one", async || both("2")).await;
}
