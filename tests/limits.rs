//! What a proxy takes from its clients, and from whom: addresses, connections, time, sizes.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::{net::SocketAddr, sync::Arc};

use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use support::{
    Folder, Infrar, Line, Origin, Said, Visit,
    frames::{self, Frames, NO_ERROR},
    free_ports, get, header, talk, until,
};
use tokio::{
    net::TcpStream,
    time::{Duration, Instant, interval},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// A sidecar with both ways open; the service `data` is the application behind it, so both ways lead to one origin.
struct Sidecar {
    infrar: Infrar,
    inbound: SocketAddr,
    out: SocketAddr,
    admin: SocketAddr,
    origin: Origin,
    folder: Folder,
}

impl Sidecar {
    /// With these keys in `inbound`, and further ones.
    async fn open(tls: &str, inbound_keys: &str, keys: &str) -> Self {
        let folder = Folder::new();
        let [inbound, out, admin] = free_ports();
        let origin = Origin::scripted(answer).await;
        let key = KeyPair::generate().expect("a key");
        let leaf = CertificateParams::new(["localhost".to_owned()]).expect("names");
        folder.write("leaf.pem", &leaf.self_signed(&key).expect("a leaf").pem());
        folder.write("leaf.key", &key.serialize_pem());
        folder.write(
            "project.yaml",
            &format!(
                "project: shop\nservices:\n  data: {{ scopes: [use], endpoints: [{{ url: 'http://{}', provider: aws, region: us-east-1, auth_method: none }}] }}\n\
                 permissions: {{ data: {{ data: [use] }} }}\n",
                origin.at
            ),
        );
        folder.write(
            "proxy.yaml",
            &format!(
                "service: data\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
                 inbound:\n  listen: '{inbound}'\n  app: 'http://{}'\n  tls: {tls}\n  rules: [{{ path: /*, public: true }}]\n{inbound_keys}\
                 outbound: {{ listen: '{out}' }}\nlog: {{ format: json }}\n{keys}",
                origin.at
            ),
        );
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, inbound, out, admin, origin, folder }
    }

    /// How many requests were answered with this problem.
    async fn refused(&self, code: &str) -> f64 {
        let said = get(self.admin, &self.admin.to_string(), "/metrics").await;
        let error = format!("error=\"{code}\"");
        let rows = said.body.lines();
        let rows =
            rows.filter(|line| line.starts_with("infrar_requests_total{") && line.contains(&error));
        rows.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    fn ways(&self) -> [SocketAddr; 2] {
        [self.inbound, self.out]
    }
}

/// Answers with `ok` when the whole body is there.
async fn answer(mut visit: Visit) {
    while let Some(head) = visit.head().await {
        if header(&head, "transfer-encoding").is_some() {
            // The chunks and the trailers end like two heads, and are noted as such.
            if visit.head().await.is_none() {
                return;
            }
        } else if visit.whole_body(&head).await.is_none() {
            return;
        }
        visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    }
}

/// A refusal is a problem document that says why, in the words of RFC 9457 and RFC 9209.
fn assert_refused(said: &Said, status: u16, code: &str, error: &str) {
    assert_eq!((said.status(), said.code()), (status, code), "{said:?}");
    assert_eq!(said.header("content-type"), Some("application/problem+json"), "{said:?}");
    assert_eq!(said.header("proxy-status"), Some(&*format!("infrar; error={error}")), "{said:?}");
    assert!(said.body.contains("\"request_id\""), "{said:?}");
}

const CALL: &str = "GET / HTTP/1.1\r\nhost: data\r\n\r\n";

#[tokio::test]
async fn who_comes_from_another_address_is_refused() {
    let sidecar = Sidecar::open("off", "  allow_from: [10.0.0.0/8, '2001:db8::/32']\n", "").await;
    let said = talk(sidecar.inbound, CALL).await;
    assert_refused(&said, 403, "address-not-allowed", "http_request_denied");
    assert_eq!(said.header("connection"), Some("close"), "{said:?}");
    assert_eq!(sidecar.origin.heads(), Vec::<String>::new());
    // The way out is not meant: its clients are on this machine.
    assert_eq!(get(sidecar.out, "data", "/").await.body, "ok");
    let sidecar = Sidecar::open("off", "  allow_from: [127.0.0.0/8]\n", "").await;
    assert_eq!(get(sidecar.inbound, "data", "/").await.body, "ok");
    // Over TLS a stranger is not even greeted.
    let tls = "{ cert_file: leaf.pem, key_file: leaf.key }";
    let sidecar = Sidecar::open(tls, "  allow_from: [10.0.0.0/8]\n", "").await;
    assert_eq!(Line::to(sidecar.inbound).await.rest().await, "");
    until("but counted", async || sidecar.refused("address-not-allowed").await == 1.0).await;
}

#[tokio::test]
async fn whoever_crowds_the_way_in_does_not_keep_the_application_from_calling_out() {
    let sidecar = Sidecar::open("off", "", "limits: { connections: 4 }\n").await;
    let mut crowd = Vec::new();
    for _ in 0..4 {
        let mut line = Line::to(sidecar.inbound).await;
        line.say(CALL).await;
        assert_eq!(line.answer().await.status(), 200);
        crowd.push(line);
    }
    for _ in 0..20 {
        let said = talk(sidecar.inbound, CALL).await;
        assert_refused(&said, 503, "overloaded", "connection_limit_reached");
    }
    assert_eq!(get(sidecar.out, "data", "/").await.status(), 200);
    until("they are counted", async || sidecar.refused("overloaded").await == 20.0).await;
    let warned = sidecar.infrar.log().matches("was turned away").count();
    assert!((1..10).contains(&warned), "{warned} lines for twenty connections");
}

#[tokio::test]
async fn one_connection_too_many_is_turned_away_and_the_next_one_served_when_there_is_room() {
    let sidecar = Sidecar::open("off", "", "limits: { connections: 4 }\n").await;
    for way in sidecar.ways() {
        let mut lines = Vec::new();
        until("the connections of before have gone", async || {
            get(way, "data", "/").await.status() == 200
        })
        .await;
        while lines.len() < 4 {
            let mut line = Line::to(way).await;
            line.say(CALL).await;
            match line.answer().await.status() {
                200 => lines.push(line),
                // The last connection of `until` is still being closed.
                503 => assert!(line.rest().await.is_empty()),
                other => panic!("{other}"),
            }
        }
        // Several at once, and each of them learns why.
        for _ in 0..10 {
            let said = talk(way, CALL).await;
            assert_refused(&said, 503, "overloaded", "connection_limit_reached");
            assert_eq!(said.header("connection"), Some("close"), "{said:?}");
            assert_eq!(said.header("retry-after"), Some("1"), "{said:?}");
        }
        // Those that are in are served.
        for line in &mut lines {
            line.say(CALL).await;
            assert_eq!(line.answer().await.body, "ok");
        }
        drop(lines.pop());
        until("there is room", async || get(way, "data", "/").await.status() == 200).await;
        drop(lines);
    }
    let log = sidecar.infrar.log();
    assert!(log.contains("limits.connections"), "{log}");
}

#[tokio::test]
async fn a_head_that_dribbles_in_is_given_up_however_often_something_comes() {
    let sidecar = Sidecar::open("off", "", "limits: { header_timeout: 400ms }\n").await;
    for way in sidecar.ways() {
        let began = Instant::now();
        let mut line = Line::to(way).await;
        let mut ticks = interval(Duration::from_millis(50));
        let said = loop {
            ticks.tick().await;
            line.say("x").await;
            if tokio::time::timeout(Duration::ZERO, line.stream.readable()).await.is_ok() {
                let head = line.hear("\r\n\r\n").await;
                break Said { head, body: line.rest().await, closed: true };
            }
            assert!(began.elapsed() < Duration::from_secs(5), "it is still listened to");
        };
        assert_refused(&said, 408, "request-timeout", "http_request_error");
        // So is a client that begins to speak HTTP/2 and stops.
        assert_eq!(talk(way, "PRI * HTTP/2.0\r\n").await.head, "");
    }
    assert_eq!(sidecar.origin.heads(), Vec::<String>::new());
}

#[tokio::test]
async fn who_says_nothing_in_the_handshake_is_given_up() {
    let tls = "{ cert_file: leaf.pem, key_file: leaf.key }";
    let sidecar = Sidecar::open(tls, "", "limits: { header_timeout: 300ms }\n").await;
    for begin in ["", "\u{16}\u{3}\u{1}\u{2}"] {
        let began = Instant::now();
        let mut line = Line::to(sidecar.inbound).await;
        line.say(begin).await;
        line.rest().await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
    // And whoever does not speak TLS at all.
    let said = talk(sidecar.inbound, CALL).await;
    assert!(!said.head.contains("200"), "{said:?}");
}

#[tokio::test]
async fn a_refusal_over_http2_lets_a_client_that_is_still_sending_finish() {
    let sidecar = Sidecar::open("off", "", "").await;
    let at = sidecar.ways().into_iter().next().unwrap();
    let mut streams = Frames::to(at).await;
    // Refused by its head alone; the body is on its way.
    let mut fields = frames::request("POST", "/").to_vec();
    fields.extend([("host", "a"), ("host", "b")]);
    streams.say(frames::headers(1, frames::END_HEADERS, &fields)).await;
    assert_eq!(streams.answer(1).await.map(|(status, _)| status), Ok(400));
    for _ in 0..3 {
        streams.say(frames::frame(frames::DATA, 0, 1, &[b'x'; 1000])).await;
    }
    streams.say(frames::frame(frames::DATA, frames::END_STREAM, 1, b"the end")).await;
    streams.say(frames::get(3, "/")).await;
    // Some clients take a reset behind the answer for a failure.
    loop {
        let frame = streams.next().await.expect("the connection stands");
        assert!(frame.stream != 1 || frame.kind != frames::RST_STREAM, "{frame:?}");
        if frame.stream == 3 && frame.kind == frames::DATA && frame.has(frames::END_STREAM) {
            break;
        }
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed_whatever_it_speaks_and_a_busy_one_is_not() {
    let sidecar = Sidecar::open("off", "", "limits: { idle_timeout: 500ms }\n").await;
    for way in sidecar.ways() {
        let began = Instant::now();
        let mut silent = Line::to(way).await;
        let mut kept = Line::to(way).await;
        kept.say(CALL).await;
        assert_eq!(kept.answer().await.body, "ok");
        let mut streams = Frames::to(way).await;
        streams.say(frames::get(1, "/")).await;
        assert_eq!(streams.answer(1).await, Ok((200, "ok".to_owned())));
        let busy = async {
            let mut line = Line::to(way).await;
            let mut ticks = interval(Duration::from_millis(200));
            while began.elapsed() < Duration::from_secs(3) {
                ticks.tick().await;
                line.say(CALL).await;
                assert_eq!(line.answer().await.body, "ok");
            }
        };
        let idle = async {
            // Nothing is said to an HTTP/1.1 client, which could take it for an answer.
            assert_eq!(silent.rest().await, "");
            assert_eq!(kept.rest().await, "");
            let goodbye = streams.next().await.expect("a frame");
            assert_eq!((goodbye.kind, goodbye.code()), (frames::GOAWAY, NO_ERROR));
            let goodbye = streams.next_of(frames::PING).await;
            streams.say(frames::frame(frames::PING, frames::ACK, 0, &goodbye.payload)).await;
            assert!(streams.end().await.is_none_or(|code| code == NO_ERROR));
            began.elapsed()
        };
        let ((), took) = tokio::join!(busy, idle);
        assert!(took >= Duration::from_millis(500), "{took:?}");
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
}

#[tokio::test]
async fn sizes_are_bounded_on_both_ways_and_in_both_versions() {
    let limits = "limits: { header_bytes: 2KiB, headers: 12, body_bytes: 1KiB }\n";
    let sidecar = Sidecar::open("off", "", limits).await;
    let (long, chunk) = ("x".repeat(3000), "x".repeat(1025));
    let many: String = (0..13).map(|n| format!("x-{n}: 1\r\n")).collect();
    for way in sidecar.ways() {
        let said = talk(way, format!("GET /{long} HTTP/1.1\r\nhost: data\r\n\r\n")).await;
        assert_refused(&said, 431, "headers-too-large", "http_request_error");
        let said = talk(way, format!("GET / HTTP/1.1\r\nhost: data\r\nx: {long}\r\n\r\n")).await;
        assert_refused(&said, 431, "headers-too-large", "http_request_error");
        let said = talk(way, format!("GET / HTTP/1.1\r\nhost: data\r\n{many}\r\n")).await;
        assert_refused(&said, 431, "headers-too-large", "http_request_error");
        let said = talk(way, "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 1025\r\n\r\n").await;
        assert_refused(&said, 413, "body-too-large", "http_request_error");
        assert!(sidecar.origin.heads().iter().all(|head| head.contains(" /chunks ")));
        let said = talk(
            way,
            format!("POST /chunks HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n401\r\n{chunk}\r\n0\r\n\r\n"),
        )
        .await;
        assert_refused(&said, 413, "body-too-large", "http_request_error");

        let mut streams = Frames::to(way).await;
        let mut fields = frames::request("POST", "/").to_vec();
        fields.push(("content-length", "1025"));
        streams.say(frames::headers(1, 0, &fields)).await;
        let (status, body) = streams.answer(1).await.expect("an answer");
        assert!(status == 413 && body.contains("body-too-large"), "{status} {body}");
        assert!(sidecar.origin.heads().iter().all(|head| head.contains(" /chunks ")));
        let path = frames::request("POST", "/chunks");
        streams.say(frames::headers(3, 0, &path)).await;
        streams.say(frames::frame(frames::DATA, frames::END_STREAM, 3, chunk.as_bytes())).await;
        let (status, body) = streams.answer(3).await.expect("an answer");
        assert!(status == 413 && body.contains("body-too-large"), "{status} {body}");
        // Exactly as much as is allowed.
        let body = &chunk[..1024];
        let said = talk(
            way,
            format!("POST /chunks HTTP/1.1\r\nhost: data\r\nconnection: close\r\ncontent-length: 1024\r\n\r\n{body}"),
        )
        .await;
        assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
    }
}

#[tokio::test]
async fn trailers_carry_nothing_that_a_head_may_not() {
    let sidecar = Sidecar::open("off", "", "").await;
    for way in sidecar.ways() {
        let said = talk(
            way,
            "POST / HTTP/1.1\r\nhost: data\r\nte: trailers\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\
             x-sum: 7\r\ninfrar-caller: root\r\nInfrar-Scopes: all\r\ninfrar-claims: e30\r\ncontent-length: 5\r\n\
             transfer-encoding: chunked\r\nhost: other\r\nauthorization: Bearer x\r\n\r\n",
        )
        .await;
        assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
        assert_eq!(
            sidecar.origin.heads().pop().as_deref(),
            Some("2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\n")
        );
        let mut streams = Frames::to(way).await;
        streams.say(frames::headers(1, 0, &frames::request("POST", "/"))).await;
        streams.say(frames::frame(frames::DATA, 0, 1, b"hi")).await;
        assert!(streams.settled().await);
        let trailers = [
            ("x-sum", "8"),
            ("infrar-caller", "root"),
            ("infrar-scopes", "all"),
            ("infrar-claims", "e30"),
            ("content-length", "5"),
            ("host", "other"),
            ("authorization", "Bearer x"),
        ];
        streams.say(frames::headers(1, frames::END_STREAM, &trailers)).await;
        assert_eq!(streams.answer(1).await, Ok((200, "ok".to_owned())));
        assert_eq!(
            sidecar.origin.heads().pop().as_deref(),
            Some("2\r\nhi\r\n0\r\nx-sum: 8\r\n\r\n")
        );
    }
}

#[tokio::test]
async fn who_connects_and_asks_for_nothing_does_not_keep_others_out_for_long() {
    let keys = "limits: { header_timeout: 600ms, connections: 4 }\n";
    let sidecar = Sidecar::open("off", "", keys).await;
    for way in sidecar.ways() {
        let mut kept = Line::to(way).await;
        kept.say(CALL).await;
        assert_eq!(kept.answer().await.body, "ok");
        let mut silent = vec![Line::to(way).await, Line::to(way).await];
        let mut streams = Frames::to(way).await;
        until("there is room again", async || get(way, "data", "/").await.status() == 200).await;
        for line in &mut silent {
            assert_eq!(line.rest().await, "");
        }
        // It is told, and does not keep the place by not saying that it has heard.
        assert_eq!(streams.end().await, Some(NO_ERROR));
        // Who was answered stays for longer.
        kept.say(CALL).await;
        assert_eq!(kept.answer().await.body, "ok");
    }
    let tls = "{ cert_file: leaf.pem, key_file: leaf.key }";
    let sidecar = Sidecar::open(tls, "", keys).await;
    for protocol in [&b"http/1.1"[..], b"h2"] {
        let mut line = greeted(&sidecar, protocol).await;
        drop(line.rest().await);
    }
}

/// A connection that has shaken hands, and agreed to speak `protocol`.
async fn greeted(sidecar: &Sidecar, protocol: &[u8]) -> Line<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    let leaf = sidecar.folder.read("leaf.pem");
    for root in CertificateDer::pem_slice_iter(leaf.as_bytes()) {
        roots.add(root.expect("PEM")).expect("a root");
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(sidecar.inbound).await.expect("it listens");
    let name = ServerName::try_from("localhost").expect("a name");
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("TLS");
    Line::over(stream)
}

#[tokio::test]
async fn connections_are_spread_evenly_over_the_workers_and_that_can_be_seen() {
    let sidecar = Sidecar::open("off", "", "workers: 4\n").await;
    let mut lines = Vec::new();
    for _ in 0..40 {
        let mut line = Line::to(sidecar.out).await;
        line.say(CALL).await;
        assert_eq!(line.answer().await.body, "ok");
        lines.push(line);
    }
    let metrics = get(sidecar.admin, &sidecar.admin.to_string(), "/metrics").await.body;
    for worker in 0..4 {
        let row = format!("infrar_worker_connections{{worker=\"{worker}\"}} 10");
        assert!(metrics.lines().any(|line| line == row), "{row}: {metrics}");
    }
    drop(lines);
    until("they are gone", async || {
        let said = get(sidecar.admin, &sidecar.admin.to_string(), "/metrics").await;
        said.body.matches("infrar_worker_connections{worker=").count() == 4
            && said.body.lines().any(|line| line == "infrar_connections 0")
    })
    .await;
}
