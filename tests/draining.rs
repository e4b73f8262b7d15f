//! How a proxy ends: not ready at once, in through the grace, out until the application has gone.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::net::SocketAddr;

use support::{
    Folder, Infrar, Line, Origin, Visit,
    frames::{self, ACK, DATA, END_STREAM, Frames, GOAWAY, HEADERS, NO_ERROR, PING},
    free_ports, get, readyz, talk, until,
};
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Duration, Instant},
};

/// A sidecar with both ways open, the application behind it, and a service that the application calls.
struct Sidecar {
    infrar: Infrar,
    inbound: SocketAddr,
    out: SocketAddr,
    admin: SocketAddr,
    app: Origin,
    far: Origin,
    /// What `/slow` waits for.
    release: watch::Sender<bool>,
    #[expect(dead_code, reason = "held for its Drop")]
    folder: Folder,
}

impl Sidecar {
    async fn open(shutdown: &str) -> Self {
        let folder = Folder::new();
        let [inbound, out, admin] = free_ports();
        let (release, released) = watch::channel(false);
        let slow = |name: &'static str| {
            let released = released.clone();
            move |visit: Visit| slowly(visit, name, released.clone())
        };
        let app = Origin::scripted(slow("app")).await;
        let far = Origin::scripted(slow("far")).await;
        folder.write(
            "project.yaml",
            &format!(
                "project: shop\nservices:\n  data: {{ scopes: [use], endpoints: [{{ url: 'http://{inbound}', provider: aws, region: us-east-1 }}] }}\n  \
                 far: {{ scopes: [use], endpoints: [{{ url: 'http://{}', provider: aws, region: us-east-1, auth_method: none }}] }}\n\
                 permissions: {{ data: {{ far: [use] }} }}\n",
                far.at
            ),
        );
        folder.write(
            "proxy.yaml",
            &format!(
                "service: data\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
                 inbound: {{ listen: '{inbound}', app: 'http://{}', tls: off, rules: [{{ path: /*, public: true }}] }}\n\
                 outbound: {{ listen: '{out}' }}\nshutdown: {{ {shutdown} }}\n",
                app.at
            ),
        );
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, inbound, out, admin, app, far, release, folder }
    }

    /// Waits until nobody listens on the way in any more.
    async fn closed(&self) {
        until("the way in is closed", async || TcpStream::connect(self.inbound).await.is_err())
            .await;
    }
}

/// Answers with a name; to `/slow` in two pieces, the second when it is released.
async fn slowly(mut visit: Visit, name: &'static str, mut released: watch::Receiver<bool>) {
    while let Some(head) = visit.head().await {
        if head.starts_with("GET /slow") {
            visit.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n").await;
            if released.wait_for(|it| *it).await.is_err() {
                return;
            }
            visit.say("4\r\nlast\r\n0\r\n\r\n").await;
        } else {
            visit
                .say(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len()))
                .await;
        }
    }
}

#[tokio::test]
async fn it_serves_through_the_grace_finishes_what_it_has_and_calls_out_until_the_app_has_gone() {
    let grace = Duration::from_secs(5);
    let mut sidecar = Sidecar::open("grace: 5s, deadline: 60s").await;
    let (inbound, out) = (sidecar.inbound, sidecar.out);

    // In flight: a call over each version, a kept connection each way, a call out.
    let mut slow = Line::to(inbound).await;
    slow.say("GET /slow HTTP/1.1\r\nhost: data\r\n\r\n").await;
    slow.hear("first").await;
    let mut streams = Frames::to(inbound).await;
    streams.say(frames::get(1, "/slow")).await;
    assert_eq!(streams.next_of(DATA).await.payload, b"first");
    let mut kept = Line::to(inbound).await;
    kept.say("GET / HTTP/1.1\r\nhost: data\r\n\r\n").await;
    assert_eq!(kept.answer().await.body, "app");
    let mut calling = Line::to(out).await;
    calling.say("GET /slow HTTP/1.1\r\nhost: far\r\n\r\n").await;
    calling.hear("first").await;

    let told = Instant::now();
    sidecar.infrar.signal("TERM");
    until("it is not ready", async || readyz(sidecar.admin).await == Some(503)).await;
    // Within the grace everything is served, for whoever has not heard yet.
    assert_eq!(get(inbound, "data", "/").await.body, "app");
    kept.say("GET / HTTP/1.1\r\nhost: data\r\n\r\n").await;
    assert_eq!(kept.answer().await.body, "app");
    streams.say(frames::get(3, "/")).await;
    assert_eq!(streams.answer(3).await, Ok((200, "app".to_owned())));
    assert!(told.elapsed() < grace, "the machine is too slow for this story");

    // After it nobody new comes in, and who has nothing to do leaves.
    sidecar.closed().await;
    assert!(told.elapsed() >= grace, "{:?}", told.elapsed());
    assert_eq!(kept.rest().await, "");

    // HTTP/2 is told in two steps (RFC 9113 §6.8): what was on its way meanwhile is served.
    let first = streams.next().await.expect("a frame");
    assert_eq!((first.kind, first.code(), first.last()), (GOAWAY, NO_ERROR, 0x7fff_ffff));
    let ping = streams.next_of(PING).await;
    streams.say(frames::get(5, "/")).await;
    assert_eq!(streams.answer(5).await, Ok((200, "app".to_owned())));
    streams.say(frames::frame(PING, ACK, 0, &ping.payload)).await;
    let second = streams.next().await.expect("a frame");
    assert_eq!((second.kind, second.code(), second.last()), (GOAWAY, NO_ERROR, 5));

    // What was in flight ends as it would have.
    assert_eq!(get(out, "far", "/").await.body, "far", "{}", sidecar.infrar.log());
    assert_eq!(readyz(sidecar.admin).await, Some(503));
    sidecar.release.send_replace(true);
    assert_eq!(slow.rest().await, "\r\n4\r\nlast\r\n0\r\n\r\n");
    let last = streams.next_of(DATA).await;
    assert_eq!((last.stream, &*last.payload), (1, &b"last"[..]));
    if !last.has(END_STREAM) {
        assert!(streams.next_of(DATA).await.has(END_STREAM));
    }
    assert_eq!(streams.end().await, None);
    calling.hear("0\r\n\r\n").await;

    // The way out is open as long as the application is there.
    assert!(sidecar.infrar.runs());
    sidecar.release.send_replace(false);
    calling.say("GET /slow HTTP/1.1\r\nhost: far\r\n\r\n").await;
    calling.hear("first").await;
    assert_eq!(get(out, "far", "/").await.body, "far");
    drop(sidecar.app);
    until("the way out is closed", async || TcpStream::connect(out).await.is_err()).await;
    sidecar.release.send_replace(true);
    assert_eq!(calling.rest().await, "\r\n4\r\nlast\r\n0\r\n\r\n");
    let log = sidecar.infrar.log();
    assert_eq!(sidecar.infrar.ended().await.code(), Some(0), "{log}");
    assert!(!log.contains("shutdown.deadline"), "{log}");
    assert_eq!(sidecar.far.heads().len(), 4);
}

#[tokio::test]
async fn what_hangs_is_ended_by_the_deadline() {
    let deadline = Duration::from_secs(2);
    let mut sidecar = Sidecar::open("grace: 100ms, deadline: 2s").await;
    let mut slow = Line::to(sidecar.inbound).await;
    slow.say("GET /slow HTTP/1.1\r\nhost: data\r\n\r\n").await;
    slow.hear("first").await;
    // One that never says it has heard the GOAWAY, and a tunnel, which nobody can tell to end.
    let mut streams = Frames::to(sidecar.inbound).await;
    let mut tunnel = Line::to(sidecar.out).await;
    tunnel.say("CONNECT far:80 HTTP/1.1\r\nhost: far:80\r\n\r\nGET / HTTP/1.1\r\n\r\n").await;
    tunnel.hear("far").await;
    sidecar.infrar.signal("TERM");
    let told = Instant::now();
    assert_eq!(sidecar.infrar.ended().await.code(), Some(0), "{}", sidecar.infrar.log());
    let took = told.elapsed();
    assert!(took >= deadline - Duration::from_millis(50), "{took:?}");
    assert!(took < deadline + Duration::from_secs(3), "{took:?}");
    let log = sidecar.infrar.log();
    assert!(log.contains("shutdown.deadline has passed"), "{log}");
    assert!(log.contains("requests of callers"), "{log}");
    // Nobody takes half an answer for a whole one.
    assert_eq!(slow.rest().await, "\r\n");
    assert_eq!(streams.end().await, Some(NO_ERROR));
}

#[tokio::test]
async fn who_is_told_twice_ends_at_once_however_far_it_had_come() {
    let mut sidecar = Sidecar::open("grace: 10ms, deadline: 120s").await;
    let mut slow = Line::to(sidecar.inbound).await;
    slow.say("GET /slow HTTP/1.1\r\nhost: data\r\n\r\n").await;
    slow.hear("first").await;
    sidecar.infrar.signal("INT");
    sidecar.closed().await;
    assert!(sidecar.infrar.runs());
    let told = Instant::now();
    sidecar.infrar.signal("TERM");
    sidecar.infrar.ended().await;
    assert!(told.elapsed() < Duration::from_secs(3), "{:?}", told.elapsed());
    assert!(sidecar.infrar.log().contains("told twice"), "{}", sidecar.infrar.log());
}

#[tokio::test]
async fn without_a_way_in_the_way_out_closes_when_nobody_has_called_for_a_while() {
    let folder = Folder::new();
    let [out, admin] = free_ports();
    let far = Origin::plain("far").await;
    folder.write(
        "project.yaml",
        &format!(
            "project: shop\nservices: {{ far: {{ scopes: [use], endpoints: [{{ url: 'http://{}', provider: aws, region: us-east-1, auth_method: none }}] }} }}\n\
             permissions: {{ web: {{ far: [use] }} }}\n",
            far.at
        ),
    );
    folder.write(
        "proxy.yaml",
        &format!(
            "service: web\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             outbound: {{ listen: '{out}' }}\nshutdown: {{ grace: 100ms, deadline: 60s }}\n"
        ),
    );
    let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
    infrar.ready(admin).await;
    // Told by the admin API, as a preStop hook may do it.
    let said = talk(
        admin,
        "POST /v1/drain HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert_eq!(said.status(), 202, "{said:?}");
    until("it is not ready", async || readyz(admin).await == Some(503)).await;
    let mut line = Line::to(out).await;
    let opened = Instant::now();
    let mut calls = 0;
    while opened.elapsed() < Duration::from_secs(2) {
        line.say("GET / HTTP/1.1\r\nhost: far\r\n\r\n").await;
        assert_eq!(line.answer().await.body, "far", "{}", infrar.log());
        calls += 1;
    }
    assert!(calls > 0);
    drop(line);
    let left = Instant::now();
    assert_eq!(infrar.ended().await.code(), Some(0), "{}", infrar.log());
    let took = left.elapsed();
    assert!(took > Duration::from_millis(4500) && took < Duration::from_secs(9), "{took:?}");
}

#[tokio::test]
async fn a_stream_that_comes_after_the_last_goodbye_is_not_answered_and_its_client_knows() {
    let mut sidecar = Sidecar::open("grace: 10ms, deadline: 60s").await;
    let mut streams = Frames::to(sidecar.inbound).await;
    streams.say(frames::get(1, "/slow")).await;
    assert_eq!(streams.next_of(DATA).await.payload, b"first");
    sidecar.infrar.signal("TERM");
    sidecar.closed().await;
    let first = streams.next().await.expect("a frame");
    assert_eq!((first.kind, first.last()), (GOAWAY, 0x7fff_ffff));
    let ping = streams.next_of(PING).await;
    streams.say(frames::frame(PING, ACK, 0, &ping.payload)).await;
    let second = streams.next().await.expect("a frame");
    assert_eq!((second.kind, second.last()), (GOAWAY, 1));
    let seen = sidecar.app.heads().len();
    streams.say(frames::get(3, "/")).await;
    sidecar.release.send_replace(true);
    let mut rest = Vec::new();
    while let Some(frame) = streams.next().await {
        rest.push(frame);
    }
    assert!(rest.iter().any(|it| it.stream == 1 && it.has(END_STREAM)), "{rest:?}");
    assert!(rest.iter().all(|it| it.kind != HEADERS), "{rest:?}");
    assert_eq!(sidecar.app.heads().len(), seen);
    drop(sidecar.app);
    assert_eq!(sidecar.infrar.ended().await.code(), Some(0), "{}", sidecar.infrar.log());
}

#[tokio::test]
async fn under_load_every_call_that_found_the_door_open_is_answered() {
    let mut sidecar = Sidecar::open("grace: 300ms, deadline: 60s").await;
    let (inbound, call) = (
        sidecar.inbound,
        "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    );
    let callers: Vec<_> = (0..16)
        .map(|_| {
            tokio::spawn(async move {
                let (mut served, mut lost) = (0, 0);
                while let Ok(stream) = TcpStream::connect(inbound).await {
                    let mut line = Line::over(stream);
                    line.say(call).await;
                    let said = line.rest().await;
                    assert!(said.is_empty() || said.starts_with("HTTP/1.1 200 "), "{said:?}");
                    *if said.is_empty() { &mut lost } else { &mut served } += 1;
                }
                (served, lost)
            })
        })
        .collect();
    until("load is on", async || sidecar.app.heads().len() > 500).await;
    sidecar.infrar.signal("TERM");
    let (mut served, mut lost) = (0, 0);
    for caller in callers {
        let ended: (usize, usize) = caller.await.expect("its calls are answered");
        (served, lost) = (served + ended.0, lost + ended.1);
    }
    // Between the last look at the door and its closing lies a moment that no system call takes away.
    assert!(lost <= 2, "{lost} of {served}");
    assert_eq!(sidecar.app.heads().len(), served);
    drop(sidecar.app);
    assert_eq!(sidecar.infrar.ended().await.code(), Some(0), "{}", sidecar.infrar.log());
}

#[tokio::test]
async fn a_signal_that_follows_a_drain_cuts_nothing_off_and_a_second_one_does() {
    let drain = "POST /v1/drain HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    for twice in [false, true] {
        let mut sidecar = Sidecar::open("grace: 10ms, deadline: 120s").await;
        let mut slow = Line::to(sidecar.inbound).await;
        slow.say("GET /slow HTTP/1.1\r\nhost: data\r\n\r\n").await;
        slow.hear("first").await;
        // As Kubernetes does it: the preStop hook, and the signal when that is done.
        assert_eq!(talk(sidecar.admin, drain).await.status(), 202);
        sidecar.closed().await;
        sidecar.infrar.signal("TERM");
        until("it has heard", async || sidecar.infrar.log().contains("it is ending already")).await;
        assert!(sidecar.infrar.runs(), "{}", sidecar.infrar.log());
        if twice {
            let told = Instant::now();
            sidecar.infrar.signal("TERM");
            sidecar.infrar.ended().await;
            assert!(told.elapsed() < Duration::from_secs(3), "{:?}", told.elapsed());
            assert!(sidecar.infrar.log().contains("told twice"), "{}", sidecar.infrar.log());
            continue;
        }
        sidecar.release.send_replace(true);
        assert_eq!(slow.rest().await, "\r\n4\r\nlast\r\n0\r\n\r\n");
        drop(sidecar.app);
        assert_eq!(sidecar.infrar.ended().await.code(), Some(0), "{}", sidecar.infrar.log());
    }
}
