//! How processes come, change and go: outages, restarts, new keys, new settings, signals, and settings that are wrong.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use base64::Engine;
use support::{Folder, Infrar, Line, Origin, Pair, Visit, free_ports, get, readyz, talk, until};
use tokio::time::{Duration, Instant};

#[tokio::test]
async fn a_proxy_that_was_killed_calls_within_a_second_without_the_control_plane() {
    let app = Origin::plain("ok").await;
    let mut pair = Pair::open(app.at, "", "").await;
    assert_eq!(get(pair.out, "data", "/").await.body, "ok", "{}", pair.logs());
    until("what must survive is kept", async || {
        [("caller", "tokens"), ("caller", "snapshot"), ("callee", "jwks"), ("callee", "snapshot")]
            .iter()
            .all(|(who, what)| kept(&pair.folder, who, what))
    })
    .await;
    pair.processes.control.kill().await;
    assert_eq!(get(pair.out, "data", "/").await.body, "ok", "{}", pair.logs());

    pair.processes.caller.kill().await;
    pair.processes.callee.kill().await;
    let started = Instant::now();
    pair.processes.callee = Pair::start_proxy(&pair.folder, "callee");
    pair.processes.caller = Pair::start_proxy(&pair.folder, "caller");
    pair.processes.callee.ready(pair.callee_admin).await;
    pair.processes.caller.ready(pair.caller_admin).await;
    assert_eq!(get(pair.out, "data", "/").await.body, "ok", "{}", pair.logs());
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

/// Whether the state folder of `who` has a file for `what`.
fn kept(folder: &Folder, who: &str, what: &str) -> bool {
    let Ok(files) = std::fs::read_dir(folder.path(who)) else { return false };
    files.flatten().any(|file| {
        let name = file.file_name().to_string_lossy().into_owned();
        name == what || name == format!("{what}.json")
    })
}

#[tokio::test]
async fn a_project_that_is_edited_is_followed_and_a_broken_edit_is_not() {
    let app = Origin::plain("ok").await;
    let reports = Origin::plain("reports").await;
    let pair = Pair::open(app.at, "", "").await;
    assert_eq!(get(pair.out, "reports", "/").await.status(), 404);
    pair.folder.write("project.yaml", "project: shop\nservices: { data: { endpoint: [] } }\n");
    until("the fault is said", async || pair.processes.control.log().contains("the old one stays"))
        .await;
    let log = pair.processes.control.log();
    assert!(log.contains("endpoints") && log.contains("project.yaml:2"), "{log}");
    assert_eq!(get(pair.out, "data", "/").await.body, "ok");

    let service = format!(
        "  reports:\n    scopes: [use]\n    endpoints: [{{ url: 'http://{}', provider: aws, region: us-east-1, auth_method: none }}]\n",
        reports.at
    );
    let project = Pair::project(pair.inbound, &service)
        .replace("data: [use],", "data: [use], reports: [use],");
    pair.folder.write("project.yaml", &project);
    until("the new service is known", async || {
        get(pair.out, "reports", "/").await.body == "reports"
    })
    .await;
    // A grant that is taken away is gone, at the caller and at the callee.
    pair.folder.write("project.yaml", &project.replace("{ data: [use], reports", "{ reports"));
    until("the grant is gone", async || get(pair.out, "data", "/").await.status() == 403).await;
}

#[tokio::test]
async fn a_new_grant_is_in_force_without_waiting_for_a_token_to_age() {
    let app = Origin::plain("ok").await;
    let pair = Pair::open(app.at, "", "").await;
    let callee = pair.folder.read("callee.yaml");
    let rule = "tls: off, rules: [{ path: /*, scopes: [write] }] }";
    pair.folder.write("callee.yaml", &callee.replace("tls: off }", rule));
    // The caller has a token from here on, without the scope.
    until("the rule is in force", async || {
        get(pair.out, "data", "/").await.code() == "scope-missing"
    })
    .await;
    let project = Pair::project(pair.inbound, "").replace("[use]", "[use, write]");
    pair.folder.write("project.yaml", &project);
    until("the grant is in force", async || get(pair.out, "data", "/").await.body == "ok").await;
}

#[tokio::test]
async fn a_project_that_learns_lets_a_call_through_and_tells_which_grant_it_would_need() {
    let app = Origin::plain("ok").await;
    let pair = Pair::open(app.at, "", "").await;
    let enforcing = Pair::project(pair.inbound, "").replace("data: [use],", "");
    let until_then = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
    let learning = format!("{enforcing}mode: learn\nlearn_until: {until_then}\n");
    pair.folder.write("project.yaml", &learning);
    until("both proxies learn", async || {
        for admin in [pair.caller_admin, pair.callee_admin] {
            let snapshot = get(admin, &admin.to_string(), "/v1/snapshot").await;
            if !snapshot.body.contains("learn_until") {
                return false;
            }
        }
        true
    })
    .await;
    assert_eq!(get(pair.out, "data", "/").await.body, "ok", "{}", pair.logs());
    until("the control plane says what is missing", async || {
        let log = pair.processes.control.log();
        log.lines().any(|line| {
            line.contains("would refuse") && line.contains("permissions grant web nothing at")
        })
    })
    .await;
    let told = || pair.processes.callee.log().matches("web has no grant here").count();
    until("so does the callee's proxy", async || told() > 0).await;
    pair.folder.write("project.yaml", &enforcing);
    until("it enforces", async || get(pair.out, "data", "/").await.code() == "not-permitted").await;
}

#[tokio::test]
async fn keys_change_under_load_and_no_call_is_refused() {
    let app = Origin::plain("ok").await;
    let pair = Pair::open(app.at, "", "").await;
    let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let out = pair.out;
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
            tokio::spawn(async move {
                let mut line = Line::to(out).await;
                while !stop.load(Ordering::Relaxed) {
                    line.say("GET / HTTP/1.1\r\nhost: data\r\n\r\n").await;
                    let said = line.answer().await;
                    assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    until("load is on", async || served.load(Ordering::Relaxed) > 200).await;
    let before = key_ids(&pair).await;
    rotate(&pair).await;
    let mark = served.load(Ordering::Relaxed);
    until("there are new keys", async || key_ids(&pair).await.len() > before.len()).await;
    until("load went on", async || served.load(Ordering::Relaxed) > mark + 500).await;
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        assert!(caller.await.is_ok(), "{}", pair.logs());
    }
}

/// Asks for a new key, as somebody who may.
async fn rotate(pair: &Pair) {
    let secret = base64::engine::general_purpose::STANDARD.encode("web:the caller's secret");
    let form = "grant_type=client_credentials&audience=infrar-control";
    let said = talk(
        pair.control,
        format!(
            "POST /oauth2/token HTTP/1.1\r\nhost: control\r\nauthorization: Basic {secret}\r\nconnection: close\r\n\
             content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\n\r\n{form}",
            form.len()
        ),
    )
    .await;
    let token =
        said.body.split("\"access_token\":\"").nth(1).and_then(|rest| rest.split('"').next());
    let token = token.unwrap_or_else(|| panic!("no token: {said:?}"));
    let said = talk(
        pair.control,
        format!("POST /v1/keys/rotate HTTP/1.1\r\nhost: control\r\nauthorization: Bearer {token}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"),
    )
    .await;
    assert_eq!(said.status(), 200, "{said:?}");
}

async fn key_ids(pair: &Pair) -> Vec<String> {
    let said = get(pair.control, &pair.control.to_string(), "/.well-known/jwks.json").await;
    said.body
        .split("\"kid\":\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn told_to_end_it_is_not_ready_at_once_and_finishes_what_it_has() {
    let app = Origin::scripted(|mut visit: Visit| async move {
        while visit.head().await.is_some() {
            visit.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n").await;
            // The rest comes when the story says so, which is when a second connection is opened.
            if visit.number == 0 {
                std::future::pending::<()>().await;
            }
        }
    })
    .await;
    let folder = Folder::new();
    let (mut infrar, inbound, admin) = alone(&folder, app.at).await;
    let mut line = Line::to(inbound).await;
    line.say("GET / HTTP/1.1\r\nhost: data\r\n\r\n").await;
    line.hear("first").await;
    infrar.signal("TERM");
    until("it is not ready", async || readyz(admin).await == Some(503)).await;
    // Within the grace it still takes calls, for whoever has not heard yet.
    let mut late = Line::to(inbound).await;
    late.say("GET / HTTP/1.1\r\nhost: data\r\n\r\n").await;
    late.hear("first").await;
    let told = Instant::now();
    infrar.signal("TERM");
    infrar.ended().await;
    assert!(told.elapsed() < Duration::from_secs(3), "{:?}", told.elapsed());
}

/// A callee's sidecar without a control plane, whose one path is public.
async fn alone(
    folder: &Folder,
    app: std::net::SocketAddr,
) -> (Infrar, std::net::SocketAddr, std::net::SocketAddr) {
    let [inbound, admin] = free_ports();
    folder.write("project.yaml", &format!("project: shop\nservices: {{ data: {{ scopes: [use], endpoints: [{{ url: 'http://{inbound}', provider: aws, region: us-east-1 }}] }} }}\n"));
    folder.write(
        "proxy.yaml",
        &format!(
            "service: data\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             inbound: {{ listen: '{inbound}', app: 'http://{app}', tls: off, rules: [{{ path: /*, public: true }}] }}\n\
             shutdown: {{ grace: 20s, deadline: 60s }}\n"
        ),
    );
    let mut infrar = Infrar::start(folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
    infrar.ready(admin).await;
    (infrar, inbound, admin)
}

#[tokio::test]
async fn a_port_in_use_ends_the_start_and_is_named() {
    let app = Origin::plain("ok").await;
    let folder = Folder::new();
    let (_first, inbound, _admin) = alone(&folder, app.at).await;
    let [admin] = free_ports();
    let yaml =
        folder.read("proxy.yaml").replace("admin: { listen: '", "admin: { probes: null, listen: '");
    let yaml = yaml.lines().map(|line| {
        if line.starts_with("admin:") {
            format!("admin: {{ listen: '{admin}' }}")
        } else {
            line.to_owned()
        }
    });
    folder.write("proxy.yaml", &(yaml.collect::<Vec<_>>().join("\n") + "\n"));
    let mut second = Infrar::start(&folder, "second", &["proxy", "--config", "proxy.yaml"]);
    assert_eq!(second.ended().await.code(), Some(2), "{}", second.log());
    assert!(
        second.log().contains("inbound.listen") && second.log().contains(&inbound.to_string()),
        "{}",
        second.log()
    );
}

#[tokio::test]
async fn settings_that_are_wrong_end_the_start_with_all_their_faults() {
    let folder = Folder::new();
    folder.write("proxy.yaml", "service: Web_App\nplace: nowhere\ncontrol: { url: 'ftp://x', credential: {} }\noutbound: { lisen: 1 }\n");
    let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
    assert_eq!(infrar.ended().await.code(), Some(2));
    let log = infrar.log();
    for fault in [
        "proxy.yaml:1:",
        "service",
        "proxy.yaml:2:",
        "place",
        "proxy.yaml:3:",
        "control.url",
        "proxy.yaml:4:",
        "listen",
    ] {
        assert!(log.contains(fault), "{fault}: {log}");
    }
}
