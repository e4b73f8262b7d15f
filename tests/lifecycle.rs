//! How processes come, change and go: outages, restarts, new keys, new settings, signals, and settings that are wrong.
#![allow(
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use support::{
    Folder, Infrar, Line, Origin, Pair, Said, Visit, free_ports, get, readyz, talk, until,
};
use tokio::{
    io::AsyncWriteExt,
    time::{Duration, Instant, interval},
};

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

#[tokio::test]
async fn an_issuer_that_is_down_takes_no_callee_down() {
    let app = Origin::plain("ok").await;
    let mut pair = Pair::open(app.at, "", "").await;
    let [nobody] = free_ports();
    let issuers = format!(
        "issuers: [{{ issuer: 'https://dead.example', jwks_uri: 'http://{nobody}/keys', audiences: [shop] }}]\n"
    );
    pair.folder.write("project.yaml", &(Pair::project(pair.inbound, "") + &issuers));
    let line = "infrar_jwks_keys{issuer=\"https://dead.example\"} 0\n";
    until("the callee knows of the issuer", async || {
        let metrics = get(pair.callee_admin, &pair.callee_admin.to_string(), "/metrics").await;
        metrics.body.contains(line)
    })
    .await;
    assert_eq!(readyz(pair.callee_admin).await, Some(200), "{}", pair.logs());
    // Nor does it keep one from starting.
    pair.processes.callee.kill().await;
    pair.processes.callee = Pair::start_proxy(&pair.folder, "callee");
    pair.processes.callee.ready(pair.callee_admin).await;
    until("it is called", async || get(pair.out, "data", "/").await.body == "ok").await;
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
    let told = || pair.processes.caller.log().matches("web has no grant at data").count();
    // Its first call may have been granted by the snapshot of before.
    until("and the caller's", async || {
        assert_eq!(get(pair.out, "data", "/").await.body, "ok", "{}", pair.logs());
        told() > 0
    })
    .await;
    for admin in [pair.caller_admin, pair.callee_admin] {
        let metrics = get(admin, &admin.to_string(), "/metrics").await.body;
        let counted = metrics.lines().any(|line| line.starts_with("infrar_learned_grants_total{"));
        assert!(counted, "{metrics}");
    }
    pair.folder.write("project.yaml", &enforcing);
    until("it enforces", async || get(pair.out, "data", "/").await.code() == "not-permitted").await;
}

#[tokio::test]
async fn a_new_key_signs_under_load_and_no_valid_token_is_refused() {
    let app = Origin::plain("ok").await;
    let mut pair = Pair::open(app.at, "", "").await;
    // A new key signs long before the callee would fetch keys on its own: the first of its tokens must make it.
    pair.processes.control.kill().await;
    let at = pair.control.to_string();
    let arguments = ["control", "--project", "project.yaml", "--listen", &at, "--data-dir"];
    let arguments = [&arguments[..], &["control", "--key-lead", "1s"]].concat();
    pair.processes.control = Infrar::start(&pair.folder, "control", &arguments);
    pair.processes.control.ready(pair.control).await;

    let load = Arc::new(Load::new(token(&pair, "data").await));
    let callers: Vec<_> =
        (0..8).map(|_| tokio::spawn(Arc::clone(&load).call(pair.inbound))).collect();
    let through: Vec<_> =
        (0..2).map(|_| tokio::spawn(Arc::clone(&load).call_through(pair.out))).collect();
    until("load is on", async || load.old.load(Ordering::Relaxed) > 1000).await;

    let begun = (Instant::now(), load.served());
    rotate(&pair).await;
    // Callers ask for tokens all the while: each is another one, and from some moment on the new key's.
    let asked_at = AtomicUsize::new(0);
    until("the new key has signed for a while", async || {
        if load.served() > asked_at.load(Ordering::Relaxed) + 100 {
            asked_at.store(load.served(), Ordering::Relaxed);
            let fresh = token(&pair, "data").await;
            *load.token.lock().expect("no caller has failed") = fresh;
        }
        load.new.load(Ordering::Relaxed) > 2000
    })
    .await;
    let (calls, time) = (load.served() - begun.1, begun.0.elapsed());
    let rate = calls as f64 / time.as_secs_f64();
    eprintln!("{calls} calls in {time:?}");
    assert!(rate >= 1000.0, "only {rate:.0} calls a second");
    load.stop.store(true, Ordering::Relaxed);
    for caller in callers.into_iter().chain(through) {
        assert!(caller.await.is_ok(), "a call was refused; {calls} in {time:?}\n{}", pair.logs());
    }
    assert_eq!(key_ids(&pair).await.len(), 2);
}

/// How many calls each caller has in one burst, and how often. Ten callers that keep to it make 1,200 calls a second,
/// whether answers are fast or slow: a burst that is late is made up for.
const BURST: usize = 12;
const PACE: Duration = Duration::from_millis(100);

/// Calls that go on until they are told to stop, and what came of them.
struct Load {
    /// The token of the next call.
    token: Mutex<String>,
    /// The key that signs at first.
    first: String,
    old: AtomicUsize,
    new: AtomicUsize,
    through: AtomicUsize,
    stop: AtomicBool,
}

impl Load {
    fn new(token: String) -> Self {
        let first = key_of(&token);
        let (old, new, through) = Default::default();
        Self { token: Mutex::new(token), first, old, new, through, stop: AtomicBool::new(false) }
    }

    fn served(&self) -> usize {
        [&self.old, &self.new, &self.through].iter().map(|it| it.load(Ordering::Relaxed)).sum()
    }

    /// Calls the callee's sidecar with the token of the moment.
    async fn call(self: Arc<Self>, at: SocketAddr) {
        let (mut line, mut pace) = (Line::to(at).await, interval(PACE));
        while !self.stop.load(Ordering::Relaxed) {
            pace.tick().await;
            let token = self.token.lock().expect("no caller has failed").clone();
            let count = if key_of(&token) == self.first { &self.old } else { &self.new };
            let request =
                format!("GET / HTTP/1.1\r\nhost: data\r\nauthorization: Bearer {token}\r\n\r\n");
            Self::batch(&mut line, &request, count).await;
        }
    }

    /// Calls by name, with whatever token the caller's sidecar has.
    async fn call_through(self: Arc<Self>, at: SocketAddr) {
        let (mut line, mut pace) = (Line::to(at).await, interval(PACE));
        while !self.stop.load(Ordering::Relaxed) {
            pace.tick().await;
            let request = "GET / HTTP/1.1\r\nhost: data\r\n\r\n";
            Self::batch(&mut line, request, &self.through).await;
        }
    }

    async fn batch(line: &mut Line, request: &str, count: &AtomicUsize) {
        line.say(request.repeat(BURST)).await;
        for _ in 0..BURST {
            let said = line.answer().await;
            assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The `kid` of a token.
fn key_of(token: &str) -> String {
    let head = token.split('.').next().expect("a head");
    let head = URL_SAFE_NO_PAD.decode(head).expect("base64url");
    let head: serde_json::Value = serde_json::from_slice(&head).expect("JSON");
    head["kid"].as_str().expect("a key id").to_owned()
}

/// Asks for a new key, as somebody who may.
async fn rotate(pair: &Pair) {
    let token = token(pair, "infrar-control").await;
    let said = talk(
        pair.control,
        format!("POST /v1/keys/rotate HTTP/1.1\r\nhost: control\r\nauthorization: Bearer {token}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"),
    )
    .await;
    assert_eq!(said.status(), 200, "{said:?}");
}

/// A token of the caller's for `audience`.
async fn token(pair: &Pair, audience: &str) -> String {
    let said = ask_token(pair, audience, "the caller's secret").await;
    let token =
        said.body.split("\"access_token\":\"").nth(1).and_then(|rest| rest.split('"').next());
    token.unwrap_or_else(|| panic!("no token: {said:?}")).to_owned()
}

async fn ask_token(pair: &Pair, audience: &str, secret: &str) -> Said {
    let secret = STANDARD.encode(format!("web:{secret}"));
    let form = format!("grant_type=client_credentials&audience={audience}");
    talk(
        pair.control,
        format!(
            "POST /oauth2/token HTTP/1.1\r\nhost: control\r\nauthorization: Basic {secret}\r\nconnection: close\r\n\
             content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\n\r\n{form}",
            form.len()
        ),
    )
    .await
}

#[tokio::test]
async fn a_secret_that_is_exchanged_is_in_force_without_a_restart() {
    let app = Origin::plain("ok").await;
    let pair = Pair::open(app.at, "", "").await;
    pair.folder.write("secrets/web", "another secret\n");
    until("it is read", async || pair.processes.control.log().contains("the project is in force"))
        .await;
    let said = ask_token(&pair, "data", "another secret").await;
    assert_eq!(said.status(), 200, "{said:?}");
    assert_eq!(ask_token(&pair, "data", "the caller's secret").await.status(), 401);
    assert_eq!(get(pair.out, "data", "/").await.body, "ok", "{}", pair.logs());
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

#[tokio::test]
async fn an_application_that_is_down_is_told_apart_from_its_proxy() {
    let folder = Folder::new();
    let [nobody] = free_ports();
    let (infrar, inbound, _admin) = alone(&folder, nobody).await;
    let said = get(inbound, "data", "/").await;
    assert_eq!((said.status(), said.code()), (502, "connect-failed"), "{said:?}");
    assert!(said.body.contains("the application of data does not accept connections"), "{said:?}");
    until("the log says where", async || {
        let log = infrar.log();
        let line = log.lines().find(|line| line.contains("no connection to an endpoint"));
        line.is_some_and(|line| line.contains(&format!("http://{nobody}")))
    })
    .await;
}

/// A callee's sidecar without a control plane, whose one path is public.
async fn alone(folder: &Folder, app: SocketAddr) -> (Infrar, SocketAddr, SocketAddr) {
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

#[tokio::test]
async fn a_connection_that_the_app_has_closed_is_closed_here_too() {
    let (closed, mut told) = tokio::sync::mpsc::channel(8);
    let app = Origin::scripted(move |mut visit: Visit| {
        let closed = closed.clone();
        async move {
            visit.head().await;
            visit
                .say("HTTP/1.1 200 OK\r\nkeep-alive: timeout=2\r\ncontent-length: 2\r\n\r\nok")
                .await;
            // It has had enough of a connection that is kept, and waits for the other side to see that.
            drop(visit.line.stream.shutdown().await);
            while visit.head().await.is_some() {}
            closed.send(()).await.expect("the story waits");
        }
    })
    .await;
    let folder = Folder::new();
    let (infrar, inbound, _admin) = alone(&folder, app.at).await;
    for _ in 0..4 {
        assert_eq!(get(inbound, "data", "/").await.body, "ok", "{}", infrar.log());
    }
    for _ in 0..4 {
        let seen = tokio::time::timeout(support::PATIENCE, told.recv()).await;
        assert!(seen.is_ok_and(|it| it.is_some()), "it stays half open");
    }
}
