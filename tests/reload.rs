//! Settings change while a proxy runs: an edited file or SIGHUP puts others in force, and nothing in flight notices.
#![allow(
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
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use support::{Folder, Infrar, Line, Origin, Visit, free_ports, get, header, talk, until};
use tokio::net::TcpStream;

/// A proxy between two origins and no control plane: `data` and `reports` may be called, `app` is behind it.
struct Proxy {
    infrar: Infrar,
    folder: Folder,
    out: SocketAddr,
    inbound: SocketAddr,
    admin: SocketAddr,
    app: SocketAddr,
}

/// What a file says besides where things are.
#[derive(Clone, Copy)]
struct Said<'a> {
    outbound: &'a str,
    inbound: &'a str,
    more: &'a str,
}

const OPEN: Said<'_> =
    Said { outbound: "", inbound: "rules: [{ path: /*, public: true }]", more: "" };

impl Proxy {
    async fn open(app: &Origin, services: &[(&str, SocketAddr)], said: Said<'_>) -> Self {
        let folder = Folder::new();
        let [out, inbound, admin] = free_ports();
        let mut project = "project: shop\nservices:\n".to_owned();
        for (name, at) in services {
            project.push_str(&format!(
                "  {name}: {{ scopes: [use], endpoints: [{{ url: 'http://{at}', provider: gcp, region: us-central1 }}] }}\n"
            ));
        }
        let names: Vec<_> = services.iter().map(|(name, _)| format!("{name}: [use]")).collect();
        project.push_str(&format!("permissions: {{ web: {{ {} }} }}\n", names.join(", ")));
        folder.write("project.yaml", &project);
        folder.write("tokens/one", "the-first-token\n");
        folder.write("tokens/two", "the-second-token\n");
        let at = Self::file(out, inbound, admin, app.at, said);
        folder.write("proxy.yaml", &at);
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, folder, out, inbound, admin, app: app.at }
    }

    fn file(
        out: SocketAddr,
        inbound: SocketAddr,
        admin: SocketAddr,
        app: SocketAddr,
        said: Said<'_>,
    ) -> String {
        let Said { outbound, inbound: keys, more } = said;
        format!(
            "service: web\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             outbound: {{ listen: '{out}', {outbound} }}\n\
             inbound: {{ listen: '{inbound}', app: 'http://{app}', tls: off, {keys} }}\n{more}"
        )
    }

    /// Edits the file.
    fn says(&self, said: Said<'_>) {
        self.folder
            .write("proxy.yaml", &Self::file(self.out, self.inbound, self.admin, self.app, said));
    }

    /// Edits the file and waits until that was noticed `times` times in all.
    async fn follows(&self, said: Said<'_>, times: u32) {
        self.says(said);
        self.noticed("applied", times).await;
    }

    async fn noticed(&self, outcome: &str, times: u32) {
        let line = format!("infrar_settings_reloads_total{{outcome=\"{outcome}\"}} {times}");
        until(&line, async || self.metrics().await.lines().any(|it| it == line)).await;
    }

    async fn metrics(&self) -> String {
        get(self.admin, &self.admin.to_string(), "/metrics").await.body
    }
}

#[tokio::test]
async fn an_edited_rule_is_asked_from_the_next_request_on_also_on_a_kept_connection() {
    let app = Origin::plain("app").await;
    let proxy = Proxy::open(&app, &[], OPEN).await;
    let mut line = Line::to(proxy.inbound).await;
    line.say("GET /query HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert_eq!(line.answer().await.status(), 200, "{}", proxy.infrar.log());

    let closed = Said { inbound: "rules: [{ path: /healthz, public: true }]", ..OPEN };
    proxy.follows(closed, 1).await;
    line.say("GET /query HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert_eq!(line.answer().await.status(), 401, "{}", proxy.infrar.log());
    line.say("GET /healthz HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert_eq!(line.answer().await.status(), 200);

    // Limits and networks are those of new connections.
    let nobody =
        Said { inbound: "rules: [{ path: /*, public: true }], allow_from: [192.0.2.0/24]", ..OPEN };
    proxy.follows(nobody, 2).await;
    line.say("GET /query HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert_eq!(line.answer().await.status(), 200, "a kept connection stays");
    let said = get(proxy.inbound, "web", "/").await;
    assert_eq!((said.status(), said.code()), (403, "address-not-allowed"), "a new one is refused");

    let small = Said { more: "limits: { body_bytes: 4 }\n", ..OPEN };
    proxy.follows(small, 3).await;
    let post =
        "POST / HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello";
    assert_eq!(talk(proxy.inbound, post).await.status(), 413);
    // Another application, on the connection that is still the first.
    let other = Origin::plain("other").await;
    let moved = Proxy::file(proxy.out, proxy.inbound, proxy.admin, other.at, OPEN);
    proxy.folder.write("proxy.yaml", &moved);
    proxy.noticed("applied", 4).await;
    line.say("GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
    assert_eq!(line.answer().await.body, "other", "{}", proxy.infrar.log());
}

#[tokio::test]
async fn calls_out_follow_the_file_ports_come_and_go_and_so_does_the_log() {
    let (data, reports) = (Origin::plain("data").await, Origin::plain("reports").await);
    let services = [("data", data.at), ("reports", reports.at)];
    let first = Said { outbound: "token_files: { data: tokens/one }", ..OPEN };
    let proxy = Proxy::open(&data, &services, first).await;
    let bearer =
        || header(&data.heads().pop().expect("a request"), "authorization").map(str::to_owned);
    assert_eq!(get(proxy.out, "data", "/").await.body, "data", "{}", proxy.infrar.log());
    assert_eq!(bearer().as_deref(), Some("Bearer the-first-token"));
    let outside = reports.at.to_string();
    assert_eq!(get(proxy.out, &outside, "/").await.code(), "host-not-allowed");

    let [port, another] = free_ports();
    let outbound = format!(
        "unknown_hosts: allow, override_authorization: true, token_files: {{ data: tokens/two }}, ports: {{ reports: '{port}' }}"
    );
    let more = "log: { access: false }\n";
    proxy.follows(Said { outbound: &outbound, more, ..OPEN }, 1).await;
    let own =
        "GET / HTTP/1.1\r\nhost: data\r\nauthorization: Basic eDp5\r\nconnection: close\r\n\r\n";
    assert_eq!(talk(proxy.out, own).await.body, "data", "{}", proxy.infrar.log());
    assert_eq!(bearer().as_deref(), Some("Bearer the-second-token"));
    assert_eq!(get(proxy.out, &outside, "/unlogged").await.body, "reports");
    // A port of its own, whatever the Host says.
    until("the port is open", async || TcpStream::connect(port).await.is_ok()).await;
    let mut kept = Line::to(port).await;
    kept.say("GET /unlogged HTTP/1.1\r\nhost: whatever\r\n\r\n").await;
    assert_eq!(kept.answer().await.status(), 503, "no token for reports: {}", proxy.infrar.log());

    // The port is another service's now, and there is a second one.
    let outbound = format!(
        "token_files: {{ data: tokens/two }}, ports: {{ data: '{port}', reports: '{another}' }}"
    );
    proxy.follows(Said { outbound: &outbound, ..OPEN }, 2).await;
    kept.say("GET /logged HTTP/1.1\r\nhost: whatever\r\n\r\n").await;
    assert_eq!(kept.answer().await.body, "data", "{}", proxy.infrar.log());
    until("the second port is open", async || TcpStream::connect(another).await.is_ok()).await;
    // And now neither: what is idle on it leaves, and nobody is let in.
    proxy.follows(Said { outbound: "token_files: { data: tokens/two }", ..OPEN }, 3).await;
    assert_eq!(kept.rest().await, "");
    for gone in [port, another] {
        until("the port is closed", async || TcpStream::connect(gone).await.is_err()).await;
    }
    assert_eq!(get(proxy.out, &outside, "/").await.code(), "host-not-allowed");
    until("it is logged", async || proxy.infrar.log().contains("/logged")).await;
    assert!(!proxy.infrar.log().contains("/unlogged"), "{}", proxy.infrar.log());
}

#[tokio::test]
async fn a_wrong_file_changes_nothing_and_says_why_and_a_right_one_cures_it() {
    let app = Origin::plain("app").await;
    let proxy = Proxy::open(&app, &[], OPEN).await;
    assert!(proxy.metrics().await.contains("\ninfrar_settings_current 1\n"));
    let wrong = Said {
        inbound: "rules: [{ path: /healthz, public: true }, { path: query }]",
        more: "limits: { conections: 7 }\n",
        ..OPEN
    };
    proxy.says(wrong);
    proxy.noticed("refused", 1).await;
    until("the faults are said", async || proxy.infrar.log().contains("the old ones stay")).await;
    let log = proxy.infrar.log();
    for fault in ["proxy.yaml:6:", "rules[1]", "proxy.yaml:7:", "conections", "connections"] {
        assert!(log.contains(fault), "{fault}: {log}");
    }
    assert_eq!(
        get(proxy.inbound, "web", "/query").await.status(),
        200,
        "the old rules are in force"
    );
    assert!(proxy.metrics().await.contains("\ninfrar_settings_current 0\n"));

    // A port that somebody has is as wrong.
    let taken = format!("ports: {{ data: '{}' }}", app.at);
    let project = proxy.folder.read("project.yaml").replace("services:\n", &format!(
        "services:\n  data: {{ scopes: [use], endpoints: [{{ url: 'http://{}', provider: gcp, region: us-central1 }}] }}\n", app.at
    ));
    proxy.folder.write("project.yaml", &project);
    proxy.says(Said { outbound: &taken, inbound: "rules: []", ..OPEN });
    proxy.noticed("refused", 2).await;
    until("the port is named", async || proxy.infrar.log().contains("outbound.ports.data")).await;
    assert_eq!(
        get(proxy.inbound, "web", "/query").await.status(),
        200,
        "the old rules are in force"
    );

    proxy.follows(Said { inbound: "rules: []", ..OPEN }, 1).await;
    assert_eq!(get(proxy.inbound, "web", "/query").await.status(), 401);
    assert!(proxy.metrics().await.contains("\ninfrar_settings_current 1\n"));
}

#[tokio::test]
async fn what_needs_a_restart_is_named_once_and_the_rest_is_in_force() {
    let app = Origin::plain("app").await;
    let proxy = Proxy::open(&app, &[], OPEN).await;
    let [elsewhere] = free_ports();
    let text = Proxy::file(
        elsewhere,
        proxy.inbound,
        proxy.admin,
        proxy.app,
        Said { inbound: "rules: []", more: "workers: 7\nrole: sidecar\n", ..OPEN },
    );
    proxy.folder.write("proxy.yaml", &text.replace("service: web", "service: other"));
    proxy.noticed("applied", 1).await;
    until("the keys are named", async || proxy.infrar.log().contains("need a restart")).await;
    let log = proxy.infrar.log();
    let line = log.lines().find(|line| line.contains("need a restart")).expect("a line");
    assert!(line.contains("service, outbound.listen, workers"), "{line}");
    assert_eq!(log.matches("need a restart").count(), 1, "{log}");
    assert_eq!(get(proxy.inbound, "web", "/query").await.status(), 401, "the rules are in force");
    assert!(TcpStream::connect(elsewhere).await.is_err());
    assert!(proxy.metrics().await.contains("\ninfrar_settings_current 0\n"));
    // SIGHUP says it again, for whoever asks.
    proxy.infrar.signal("HUP");
    proxy.noticed("applied", 2).await;
}

#[tokio::test]
async fn sighup_reads_the_project_and_what_it_points_at() {
    let app = Origin::plain("app").await;
    let proxy = Proxy::open(&app, &[], OPEN).await;
    assert_eq!(get(proxy.out, "data", "/").await.code(), "unknown-service");
    // An edited project needs no signal.
    let service = |at: SocketAddr| {
        format!(
            "project: shop\nservices: {{ data: {{ scopes: [use], endpoints: [{{ url: 'http://{at}', provider: gcp, region: us-central1, auth_method: none }}] }} }}\npermissions: {{ web: {{ data: [use] }} }}\n"
        )
    };
    proxy.folder.write("project.yaml", &service(app.at));
    until("the service is known", async || get(proxy.out, "data", "/").await.body == "app").await;
    // A wrong project is refused by the signal, with the settings that name it.
    proxy.folder.write("project.yaml", "project: shop\nservices: { data: { endpoint: [] } }\n");
    proxy.infrar.signal("HUP");
    proxy.noticed("refused", 1).await;
    until("the fault is said", async || {
        let log = proxy.infrar.log();
        log.contains("the old ones stay") && log.contains("project.yaml:2:")
    })
    .await;
    assert_eq!(get(proxy.out, "data", "/").await.body, "app");
    proxy.folder.write("project.yaml", &service(app.at));
    proxy.infrar.signal("HUP");
    proxy.noticed("applied", 1).await;
}

#[tokio::test]
async fn nothing_in_flight_notices() {
    // The answer begins, and goes on when the story says so: with each further line of the request's body.
    let slow = Origin::scripted(|mut visit: Visit| async move {
        while visit.head().await.is_some() {
            visit.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
            for n in 0..4 {
                visit.line.hear("\r\n").await;
                visit.line.hear("\r\n").await;
                visit.say(format!("1\r\n{n}\r\n")).await;
            }
            visit.line.hear("0\r\n\r\n").await;
            visit.say("0\r\n\r\n").await;
        }
    })
    .await;
    let plain = Origin::plain("data").await;
    let token = Said { outbound: "token_files: { data: tokens/one }", ..OPEN };
    let proxy = Proxy::open(&slow, &[("data", slow.at), ("reports", plain.at)], token).await;
    let (mut out, mut inward) = (Line::to(proxy.out).await, Line::to(proxy.inbound).await);
    let others = [
        // Each makes every connection to endpoints and to the application anew, for whoever comes later.
        Said { outbound: "token_files: { data: tokens/two }", more: "zone: use1-az1\n", ..OPEN },
        Said { inbound: "rules: []", more: "limits: { headers: 50, connections: 1 }\n", ..OPEN },
        Said { more: "limits: { idle_timeout: 1s }\nlog: { access: false }\n", ..OPEN },
    ];
    for line in [&mut out, &mut inward] {
        line.say("POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n").await;
    }
    for (n, said) in (0_u32..).zip(others) {
        for line in [&mut out, &mut inward] {
            line.say("1\r\nx\r\n").await;
            line.hear(&format!("1\r\n{n}\r\n")).await;
        }
        proxy.follows(said, n + 1).await;
    }
    for line in [&mut out, &mut inward] {
        line.say("1\r\nx\r\n0\r\n\r\n").await;
        line.hear("1\r\n3\r\n0\r\n\r\n").await;
    }
}

#[tokio::test]
async fn under_load_no_call_fails_while_settings_come_and_go() {
    let app = Origin::plain("app").await;
    let proxy = Proxy::open(
        &app,
        &[("data", app.at)],
        Said { outbound: "token_files: { data: tokens/one }", ..OPEN },
    )
    .await;
    let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let callers: Vec<_> = [(proxy.out, "data"), (proxy.inbound, "web")]
        .into_iter()
        .flat_map(|way| [(way, true), (way, false)])
        .map(|((at, host), kept)| {
            let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
            tokio::spawn(async move {
                let mut line = Line::to(at).await;
                while !stop.load(Ordering::Relaxed) {
                    line.say(format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n")).await;
                    let said = line.answer().await;
                    assert_eq!((said.status(), &*said.body), (200, "app"), "{said:?}");
                    served.fetch_add(1, Ordering::Relaxed);
                    if !kept {
                        line = Line::to(at).await;
                    }
                }
            })
        })
        .collect();
    let zones = ["use1-az1", "use1-az2", "use1-az3"];
    for n in 1..=9 {
        let mark = served.load(Ordering::Relaxed);
        let [port] = free_ports();
        let outbound = format!(
            "token_files: {{ data: tokens/{} }}, ports: {{ data: '{port}' }}",
            ["one", "two"][n % 2]
        );
        let more = format!(
            "zone: {}\nlimits: {{ headers: {} }}\nlog: {{ access: {} }}\n",
            zones[n % 3],
            50 + n,
            n % 2 == 0
        );
        let times = u32::try_from(n).expect("a few");
        proxy.follows(Said { outbound: &outbound, more: &more, ..OPEN }, times).await;
        until("load goes on", async || served.load(Ordering::Relaxed) > mark + 40).await;
    }
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        assert!(caller.await.is_ok(), "{}", proxy.infrar.log());
    }
}

#[tokio::test]
async fn a_project_that_learns_enforces_from_the_moment_it_names() {
    let app = Origin::plain("app").await;
    let proxy = Proxy::open(&app, &[], OPEN).await;
    let end = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(3);
    let project = format!(
        "project: shop\nservices: {{ data: {{ scopes: [use], endpoints: [{{ url: 'http://{}', provider: gcp, region: us-central1, auth_method: none }}] }} }}\n\
         mode: learn\nlearn_until: {end}\n",
        app.at
    );
    proxy.folder.write("project.yaml", &project);
    // Nobody edits anything any more: that time passes is enough.
    until("it is called without a grant", async || {
        get(proxy.out, "data", "/").await.status() == 200
    })
    .await;
    until("learning is over", async || get(proxy.out, "data", "/").await.code() == "not-permitted")
        .await;
    assert!(jiff::Timestamp::now() >= end);
}

#[tokio::test]
async fn limits_are_those_of_the_file_from_the_next_request_on_also_on_a_kept_connection() {
    let app = Origin::plain("app").await;
    let proxy = Proxy::open(&app, &[], OPEN).await;
    let open = async || {
        let mut line = Line::to(proxy.inbound).await;
        line.say("GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
        assert_eq!(line.answer().await.status(), 200, "{}", proxy.infrar.log());
        line
    };
    let (mut large, mut slow) = (open().await, open().await);
    proxy
        .follows(Said { more: "limits: { body_bytes: 1KiB, stall_timeout: 300ms }\n", ..OPEN }, 1)
        .await;
    let post = "POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n";
    large.say(format!("{post}600\r\n{}\r\n0\r\n\r\n", "x".repeat(0x600))).await;
    let said = large.answer().await;
    assert_eq!((said.status(), said.code()), (413, "body-too-large"), "{said:?}");
    slow.say(format!("{post}3\r\nabc\r\n")).await;
    let said = slow.answer().await;
    assert_eq!((said.status(), said.code()), (408, "request-timeout"), "{said:?}");
}
