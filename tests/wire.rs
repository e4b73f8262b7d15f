//! What an application and a service see on the wire, byte by byte, through the real binary.
//!
//! One sidecar without a control plane stands between raw sockets: its project is a file, its services are origins that
//! follow a script.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use support::{
    Line, Origin, Said, Visit, free_ports, get, header,
    sidecar::{Service, Sidecar},
    talk, until,
};
use tokio::time::{Duration, Instant};

/// A refusal is a problem document that says why, in the words of RFC 9457 and RFC 9209.
fn assert_refused(said: &Said, status: u16, code: &str, error: &str) {
    assert_eq!((said.status(), said.code()), (status, code), "{said:?}");
    assert_eq!(said.header("content-type"), Some("application/problem+json"), "{said:?}");
    assert_eq!(said.header("proxy-status"), Some(&*format!("infrar; error={error}")), "{said:?}");
}

#[tokio::test]
async fn what_could_be_read_in_two_ways_is_refused_and_the_service_never_sees_it() {
    let service = Origin::plain("reached").await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let cases: &[(&str, &str)] = &[
        (
            "two lengths",
            "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        ),
        (
            "the same length twice",
            "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
        ),
        ("a list of lengths", "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 3, 3\r\n\r\nabc"),
        ("a signed length", "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: +3\r\n\r\nabc"),
        ("a length in hex", "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 0x3\r\n\r\nabc"),
        (
            "a length too long",
            "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 99999999999999999999\r\n\r\nabc",
        ),
        (
            "length and coding",
            "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "coding and length",
            "POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        ),
        (
            "another coding",
            "POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "chunked not last",
            "POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        ),
        (
            "chunked twice",
            "POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "a coding in HTTP/1.0",
            "POST / HTTP/1.0\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "a hidden coding",
            "POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: \u{b}chunked\r\n\r\n0\r\n\r\n",
        ),
        ("a bare LF", "GET / HTTP/1.1\nhost: data\r\n\r\n"),
        ("a bare LF between lines", "GET / HTTP/1.1\r\nhost: data\nx-a: 1\r\n\r\n"),
        ("a bare CR in a value", "GET / HTTP/1.1\r\nhost: data\r\nx-a: 1\rx-b: 2\r\n\r\n"),
        ("a bare CR as a line's end", "GET / HTTP/1.1\r\nhost: data\rx-a: 1\r\n\r\n"),
        ("a space before the colon", "GET / HTTP/1.1\r\nhost: data\r\ncontent-length : 0\r\n\r\n"),
        ("a tab before the colon", "GET / HTTP/1.1\r\nhost: data\r\nx-a\t: 0\r\n\r\n"),
        ("a folded line", "GET / HTTP/1.1\r\nhost: data\r\nx-a: 1\r\n 2\r\n\r\n"),
        ("a first line that is folded", "GET / HTTP/1.1\r\n host: data\r\n\r\n"),
        ("a NUL in a value", "GET / HTTP/1.1\r\nhost: data\r\nx-a: 1\0\r\n\r\n"),
        ("a NUL in a name", "GET / HTTP/1.1\r\nhost: data\r\nx\0a: 1\r\n\r\n"),
        ("a line without a colon", "GET / HTTP/1.1\r\nhost: data\r\nnothing\r\n\r\n"),
        ("a line without a name", "GET / HTTP/1.1\r\nhost: data\r\n: 1\r\n\r\n"),
        ("two hosts", "GET / HTTP/1.1\r\nhost: data\r\nhost: data\r\n\r\n"),
        ("no host", "GET / HTTP/1.1\r\n\r\n"),
        ("another version", "GET / HTTP/1.2\r\nhost: data\r\n\r\n"),
        ("a blank in the target", "GET /a b HTTP/1.1\r\nhost: data\r\n\r\n"),
    ];
    for (what, bytes) in cases {
        let said = sidecar.says(bytes).await;
        assert_refused(&said, 400, "bad-request", "http_request_error");
        assert_eq!(said.header("connection"), Some("close"), "{what}: {said:?}");
        assert_eq!(said.head.matches("HTTP/1.1").count(), 1, "{what}: {said:?}");
    }
    assert_eq!(service.heads(), Vec::<String>::new());
    assert_eq!(get(sidecar.out, "data", "/").await.body, "reached");
}

#[tokio::test]
async fn bad_chunks_end_the_connection_and_are_never_passed_on() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        // A service that waits for the whole body, and would answer then.
        while let Some(head) = visit.head().await {
            assert!(header(&head, "transfer-encoding").is_some(), "{head}");
            visit.line.hear("0\r\n\r\n").await;
            visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let begin = "POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n";
    for bad in [
        "x\r\nabc\r\n",
        "-1\r\nabc\r\n",
        "3 \r\nabcd\r\n",
        "3\nabc\r\n",
        "3\r\nabcd\r\n",
        "fffffffffffffffff\r\n",
        "\r\n",
        "3\r\nabc\n0\r\n\r\n",
    ] {
        let said = sidecar
            .says(&format!("{begin}{bad}GET /smuggled HTTP/1.1\r\nhost: data\r\n\r\n"))
            .await;
        assert_eq!((said.status(), said.code()), (400, "bad-request"), "{bad:?}: {said:?}");
        assert_eq!(said.header("connection"), Some("close"), "{bad:?}");
    }
    assert!(service.heads().iter().all(|head| !head.contains("smuggled")), "{:?}", service.heads());
}

#[tokio::test]
async fn the_request_arrives_as_it_was_but_for_what_ends_at_a_hop() {
    let service = Origin::plain("ok").await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let said = sidecar
        .says(
            "PATCH http://data.infrar.internal:8080/a%2Fb//c/../d?x=1&y=%20&& HTTP/1.1\r\nhost: other\r\n\
             connection: close, x-private, via, traceparent, x-request-id, forwarded\r\nx-private: 1\r\nkeep-alive: timeout=5\r\nproxy-connection: keep-alive\r\n\
             te: trailers, gzip\r\nproxy-authorization: Basic eA==\r\ninfrar-caller: root\r\ninfrar-scopes: all\r\n\
             infrar-claims: e30\r\ninfrar_caller: root\r\nx-kept: a, b\r\nx-kept: c\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\
             tracestate: a=b\r\nx-request-id: mine\r\nforwarded: for=192.0.2.7\r\ncontent-length: 4\r\n\r\nbody",
        )
        .await;
    assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
    let head = service.heads().remove(0);
    assert!(head.starts_with("PATCH /a%2Fb//c/../d?x=1&y=%20&& HTTP/1.1\r\n"), "{head}");
    assert_eq!(header(&head, "host"), Some(&*service.at.to_string()));
    for gone in [
        "x-private",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "infrar-caller",
        "infrar-scopes",
        "infrar-claims",
        "infrar_caller",
    ] {
        assert_eq!(header(&head, gone), None, "{head}");
    }
    assert!(!header(&head, "connection").unwrap_or_default().contains("x-private"), "{head}");
    assert!(head.contains("x-kept: a, b\r\n") && head.contains("x-kept: c\r\n"), "{head}");
    assert_eq!(header(&head, "te"), Some("trailers"), "{head}");
    assert_eq!(header(&head, "x-request-id"), Some("mine"));
    assert_eq!(header(&head, "tracestate"), Some("a=b"));
    let trace = header(&head, "traceparent").expect("a trace");
    assert!(
        trace.starts_with("00-0af7651916cd43dd8448eb211c80319c-") && trace.ends_with("-01"),
        "{trace}"
    );
    assert!(header(&head, "via").is_some_and(|via| via.starts_with("1.1 infrar-")), "{head}");
    assert!(head.contains("forwarded: for=192.0.2.7\r\n"), "{head}");
    assert!(
        head.contains("forwarded: host=\"data.infrar.internal:8080\";proto=http\r\n"),
        "{head}"
    );
}

#[tokio::test]
async fn a_host_is_the_same_in_either_case_and_what_is_none_is_refused() {
    let service = Origin::plain("ok").await;
    let sidecar =
        Sidecar::with_way_out(&[("data", &[service.at], "")], ", unknown_hosts: allow", "").await;
    assert_eq!(get(sidecar.out, "DATA.Infrar", "/").await.body, "ok");
    let long = format!("{}.example", "x".repeat(250));
    for (target, host) in [
        ("http://u:p@data/", "data"),
        ("/", "u@data"),
        ("ftp://data/", "data"),
        ("/", &*long),
        (&*format!("http://{long}/"), "data"),
    ] {
        let said = sidecar
            .says(&format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"))
            .await;
        assert_refused(&said, 400, "bad-request", "http_request_error");
    }
    assert_eq!(service.heads().len(), 1, "{:?}", service.heads());
}

#[tokio::test]
async fn every_answer_has_an_id_and_its_line_in_the_log_says_what_was_asked() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        visit.line.hear("ping").await;
        visit.say("pong").await;
    })
    .await;
    let sidecar =
        Sidecar::with(&[("data", &[service.at], "")], "limits: { body_bytes: 1KiB }\n").await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let mut line = Line::to(sidecar.out).await;
    line.say(format!("CONNECT data:443 HTTP/1.1\r\nhost: data:443\r\nx-request-id: tunnel-1\r\ntraceparent: 00-{trace}-b7ad6b7169203331-01\r\n\r\nping")).await;
    line.rest().await;
    drop(line);
    let logged = sidecar.line("tunnel-1").await;
    for said in ["\"path\":\"data:443\"", trace, "\"method\":\"CONNECT\""] {
        assert!(logged.contains(said), "{said} in {logged}");
    }

    // A head that was read, and bytes that are none.
    for (asked, method, path) in [
        ("POST /up HTTP/1.1\r\nhost: data\r\ncontent-length: 2000\r\n\r\n", "POST", "/up"),
        ("nonsense\r\n\r\n", "", ""),
    ] {
        let said = sidecar.says(asked).await;
        let id = said.header("x-request-id").unwrap_or_else(|| panic!("no id: {said:?}"));
        assert!(said.body.contains(&format!("\"request_id\":\"{id}\"")), "{said:?}");
        let logged = sidecar.line(id).await;
        for said in [format!("\"method\":\"{method}\""), format!("\"path\":\"{path}\"")] {
            assert!(logged.contains(&said), "{said} in {logged}");
        }
    }
}

#[tokio::test]
async fn the_count_of_headers_is_bounded_over_http2_too() {
    let service = Origin::plain("ok").await;
    let sidecar = Sidecar::with(&[("data", &[service.at], "")], "limits: { headers: 50 }\n").await;
    let stream = tokio::net::TcpStream::connect(sidecar.out).await.expect("it listens");
    let (mut send, connection) =
        h2::client::Builder::new().handshake::<_, bytes::Bytes>(stream).await.expect("HTTP/2");
    let driven = tokio::spawn(connection);
    for (count, status) in [(10, 200), (51, 431)] {
        let mut request = http::Request::get("http://data/").body(()).expect("a head");
        for n in 0..count {
            let name: http::HeaderName = format!("x-{n}").parse().expect("a name");
            request.headers_mut().insert(name, http::HeaderValue::from_static("1"));
        }
        let (answer, _body) = send.send_request(request, true).expect("an open connection");
        assert_eq!(answer.await.expect("an answer").status(), status);
    }
    driven.abort();
    assert_eq!(service.heads().len(), 1);
}

#[tokio::test]
async fn a_request_that_goes_in_circles_is_refused() {
    let service = Origin::plain("ok").await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    assert_eq!(get(sidecar.out, "data", "/").await.status(), 200);
    let via = header(&service.heads()[0], "via").expect("a via").to_owned();
    let said = sidecar
        .says(&format!("GET / HTTP/1.1\r\nhost: data\r\nvia: {via}\r\nconnection: close\r\n\r\n"))
        .await;
    assert_refused(&said, 508, "loop", "proxy_loop_detected");
    let hops: Vec<String> = (0..9).map(|n| format!("1.1 infrar-{n}")).collect();
    let said = sidecar
        .says(&format!(
            "GET / HTTP/1.1\r\nhost: data\r\nvia: {}\r\nconnection: close\r\n\r\n",
            hops.join(", ")
        ))
        .await;
    assert_refused(&said, 508, "loop", "proxy_loop_detected");
    assert_eq!(service.heads().len(), 1);
}

#[tokio::test]
async fn a_name_that_is_no_service_is_refused_with_what_was_perhaps_meant() {
    let service = Origin::plain("ok").await;
    let sidecar = Sidecar::open(&[("data-intelligence", &[service.at], "")]).await;
    let said = get(sidecar.out, "data-inteligence", "/").await;
    assert_refused(&said, 404, "unknown-service", "destination_not_found");
    assert!(said.body.contains(r#""nearest":["data-intelligence"]"#), "{}", said.body);
    let said = get(sidecar.out, "example.com", "/").await;
    assert_refused(&said, 403, "host-not-allowed", "http_request_denied");
    let said = talk(sidecar.out, "POST /a.b/C HTTP/1.1\r\nhost: nowhere\r\ncontent-type: application/grpc\r\nte: trailers\r\nconnection: close\r\n\r\n").await;
    assert_eq!((said.status(), said.header("grpc-status")), (200, Some("5")), "{said:?}");
}

#[tokio::test]
async fn what_is_too_large_or_too_slow_is_refused() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            visit.body(&head).await;
            visit.say("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        }
    })
    .await;
    let limits =
        "limits: { header_bytes: 2KiB, headers: 10, header_timeout: 200ms, body_bytes: 1KiB }\n";
    let sidecar = Sidecar::with(&[("data", &[service.at], "")], limits).await;
    let long = "x".repeat(3000);
    let said =
        sidecar.says(&format!("GET / HTTP/1.1\r\nhost: data\r\nx-long: {long}\r\n\r\n")).await;
    assert_refused(&said, 431, "headers-too-large", "http_request_error");
    let many: String = (0..12).map(|n| format!("x-{n}: 1\r\n")).collect();
    let said = sidecar.says(&format!("GET / HTTP/1.1\r\nhost: data\r\n{many}\r\n")).await;
    assert_refused(&said, 431, "headers-too-large", "http_request_error");
    let said = sidecar.says("GET / HTTP/1.1\r\nhost: da").await;
    assert_refused(&said, 408, "request-timeout", "http_request_error");
    let said = sidecar.says("POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 1025\r\n\r\n").await;
    assert_refused(&said, 413, "body-too-large", "http_request_error");
    assert_eq!(service.heads(), Vec::<String>::new());
    let chunk = "x".repeat(1025);
    let said = sidecar.says(&format!("POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n401\r\n{chunk}\r\n0\r\n\r\n")).await;
    assert_refused(&said, 413, "body-too-large", "http_request_error");
}

#[tokio::test]
async fn no_call_comes_back_to_the_proxy_however_its_address_is_written() {
    let sidecar = Sidecar::with_way_out(&[], ", unknown_hosts: allow", "").await;
    for at in [sidecar.admin, sidecar.probes, sidecar.out] {
        for host in ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "[::]"] {
            let said = get(sidecar.out, &format!("{host}:{}", at.port()), "/metrics").await;
            assert_refused(&said, 403, "address-not-allowed", "http_request_denied");
        }
    }
}

#[tokio::test]
async fn a_host_outside_the_project_is_named_metered_and_forgotten_before_the_busy_ones() {
    let outside = Origin::scripted(|mut visit: Visit| async move {
        let number = visit.number.to_string();
        while visit.head().await.is_some() {
            let length = number.len();
            visit.say(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{number}")).await;
        }
    })
    .await;
    let sidecar = Sidecar::with_way_out(&[], ", unknown_hosts: allow", "").await;
    assert_eq!(get(sidecar.out, &outside.at.to_string(), "/").await.body, "0");
    let line = sidecar.line_of_path("/").await;
    assert!(line.contains(&format!("\"endpoint\":\"{}\"", outside.at)), "{line}");
    let counted = ["callee=\"infrar-outside\"", "caller=\"web\"", "code=\"200\""];
    until("it is counted by name", async || {
        sidecar.metric("infrar_requests_total", &counted).await == Some(1.0)
    })
    .await;

    // An address of this machine's own that does not look like it: bytes to it count as sent to the internet.
    let probe = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
    if probe.connect("192.0.2.1:9").is_ok()
        && let Ok(here) = probe.local_addr()
    {
        let listener = tokio::net::TcpListener::bind((here.ip(), 0)).await.expect("our address");
        let at = listener.local_addr().expect("bound");
        let answer = async {
            let (stream, _peer) = listener.accept().await.expect("a call");
            let mut line = Line::over(stream);
            line.hear("\r\n\r\n").await;
            line.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            line
        };
        let host = at.to_string();
        let (said, _line) = tokio::join!(get(sidecar.out, &host, "/"), answer);
        assert_eq!(said.body, "ok", "{said:?}");
        let sent = [
            "callee=\"infrar-outside\"",
            "from=\"aws_us_east_1\"",
            "to=\"internet\"",
            "kind=\"http\"",
            "leg=\"request\"",
        ];
        until("its bytes are counted", async || {
            sidecar.metric("infrar_egress_bytes_total", &sent).await > Some(50.0)
        })
        .await;
    }

    // However many hosts are named, nothing of them stays in the metrics, and a connection in use is kept.
    let mut line = Line::to(sidecar.out).await;
    let busy = format!("GET / HTTP/1.1\r\nhost: {}\r\n\r\n", outside.at);
    line.say(&busy).await;
    let number = line.answer().await.body;
    for n in 0..600 {
        let host = format!("127.0.{}.{}:{}", 1 + n / 200, 1 + n % 200, outside.at.port());
        line.say(format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n")).await;
        let said = line.answer().await;
        assert_eq!(said.status(), 502);
        assert!(said.body.contains(&format!("no connection to {host} could be made")), "{said:?}");
        if n % 100 == 0 {
            line.say(&busy).await;
            assert_eq!(line.answer().await.body, number, "a busy connection was thrown away");
        }
    }
    let metrics = get(sidecar.admin, &sidecar.admin.to_string(), "/metrics").await;
    assert!(!metrics.body.contains("infrar_circuit_state{"), "{}", metrics.body);
}

#[tokio::test]
async fn trailers_do_not_say_what_only_a_head_may() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while visit.head().await.is_some() {
            let body = visit.line.hear("0\r\n").await + &visit.line.hear("\r\n\r\n").await;
            assert!(body.ends_with("0\r\nx-sum: 7\r\n\r\n"), "{body}");
            visit.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nset-cookie: a=b\r\nx-sum: 9\r\ncontent-length: 1\r\n\r\n").await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\ninfrar-caller: root\r\ncontent-length: 1\r\ntransfer-encoding: x\r\nhost: y\r\nx-sum: 7\r\nauthorization: Bearer x\r\n\r\n").await;
    assert!(line.hear("\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
    assert_eq!(line.hear("\r\n\r\n").await, "3\r\nabc\r\n0\r\nx-sum: 9\r\n\r\n");
}

#[tokio::test]
async fn hints_lose_what_ends_at_a_hop_and_do_not_reach_http_1_0() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while visit.head().await.is_some() {
            let hint = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\nconnection: x-a\r\nx-a: 1\r\nkeep-alive: timeout=5\r\n\r\n";
            visit.say(hint.repeat(100)).await;
            visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let said = get(sidecar.out, "data", "/").await;
    let hint = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>";
    assert_eq!(said.head, hint, "{said:?}");
    assert!(said.body.contains("\r\n\r\nHTTP/1.1 200 OK\r\n"), "{said:?}");
    assert!(said.body.matches("HTTP/1.1 103").count() < 50, "one request's hints are bounded");
    let said = sidecar.says("GET / HTTP/1.0\r\nhost: data\r\n\r\n").await;
    assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
}

#[tokio::test]
async fn expect_100_continue_is_answered_once_whatever_both_sides_speak() {
    let h1 = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            let body = visit.body(&head).await;
            let length = body.len();
            visit.say(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}")).await;
        }
    })
    .await;
    let h2 = Origin::scripted(|visit: Visit| async move {
        let mut connection = h2::server::handshake(visit.line.stream).await.expect("HTTP/2");
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            tokio::spawn(async move {
                let early = http::Response::builder().status(100).body(()).expect("a head");
                respond.send_informational(early).expect("an open stream");
                let mut body = request.into_body();
                let mut all = Vec::new();
                while let Some(Ok(data)) = body.data().await {
                    all.extend_from_slice(&data);
                }
                let mut sending =
                    respond.send_response(http::Response::new(()), false).expect("an open stream");
                sending.send_data(all.into(), true).expect("an open stream");
            });
        }
    })
    .await;
    let services: &[Service<'_>] =
        &[("one", &[h1.at], ""), ("two", &[h2.at], "    protocol: h2\n")];
    let sidecar = Sidecar::open(services).await;
    for service in ["one", "two"] {
        let mut line = Line::to(sidecar.out).await;
        line.say(format!("POST / HTTP/1.1\r\nhost: {service}\r\nexpect: 100-continue\r\ncontent-length: 5\r\nconnection: close\r\n\r\n")).await;
        assert!(line.hear("\r\n\r\n").await.starts_with("HTTP/1.1 100 "), "{service}");
        line.say("hello").await;
        let said = line.rest().await;
        assert!(said.starts_with("HTTP/1.1 200 ") && said.ends_with("hello"), "{service}: {said}");

        let stream = tokio::net::TcpStream::connect(sidecar.out).await.expect("it listens");
        let (mut send, connection) =
            h2::client::Builder::new().handshake(stream).await.expect("HTTP/2");
        let driven = tokio::spawn(connection);
        let request = http::Request::post(format!("http://{service}/"))
            .header("expect", "100-continue")
            .header("content-length", "5")
            .body(())
            .expect("a head");
        let (mut answer, mut body) = send.send_request(request, false).expect("an open connection");
        let early = std::future::poll_fn(|cx| answer.poll_informational(cx));
        let early = tokio::time::timeout(support::PATIENCE, early).await.expect("a word in time");
        assert_eq!(early.expect("one").expect("a head").status(), 100, "{service}");
        body.send_data(bytes::Bytes::from_static(b"hello"), true).expect("an open stream");
        let early = std::future::poll_fn(|cx| answer.poll_informational(cx)).await;
        assert!(early.is_none(), "{service}: {early:?}");
        assert_eq!(answer.await.expect("an answer").status(), 200, "{service}");
        driven.abort();
    }
}

#[tokio::test]
async fn an_upgrade_to_h2c_among_others_is_left_out() {
    let service = Origin::plain("ok").await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let said = sidecar.says("GET / HTTP/1.1\r\nhost: data\r\nconnection: upgrade, close\r\nupgrade: h2c, websocket\r\n\r\n").await;
    assert_eq!(said.status(), 200, "{said:?}");
    assert_eq!(header(&service.heads()[0], "upgrade"), Some("websocket"));
}

#[tokio::test]
async fn a_tunnel_and_an_upgrade_carry_bytes_both_ways() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        if visit.number == 0 {
            visit.line.hear("ping").await;
            return visit.say("pong").await;
        }
        let head = visit.head().await.expect("a request");
        assert_eq!(header(&head, "upgrade"), Some("chat"), "{head}");
        assert!(header(&head, "connection").is_some_and(|c| c.eq_ignore_ascii_case("upgrade")), "{head}");
        visit.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\nearly").await;
        visit.line.hear("late").await;
        visit.say("bye").await;
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("CONNECT data:443 HTTP/1.1\r\nhost: data:443\r\n\r\nping").await;
    assert!(line.hear("\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
    assert_eq!(line.rest().await, "pong");
    let mut line = Line::to(sidecar.out).await;
    line.say("GET /chat HTTP/1.1\r\nhost: data\r\nconnection: Upgrade\r\nupgrade: chat\r\n\r\n")
        .await;
    let head = line.hear("\r\n\r\n").await;
    assert!(
        head.starts_with("HTTP/1.1 101 ") && header(&head, "upgrade") == Some("chat"),
        "{head}"
    );
    line.hear("early").await;
    line.say("late").await;
    assert_eq!(line.rest().await, "bye");
}

#[tokio::test]
async fn who_expects_100_continue_gets_it_from_the_service_or_gets_its_refusal_instead() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            if head.starts_with("POST /no ") {
                visit.say("HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno").await;
                return;
            }
            visit.say("HTTP/1.1 100 Continue\r\n\r\n").await;
            let body = visit.body(&head).await;
            visit.say(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say(
        "POST /yes HTTP/1.1\r\nhost: data\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
    )
    .await;
    assert!(line.hear("\r\n\r\n").await.starts_with("HTTP/1.1 100 "));
    line.say("hello").await;
    let said = line.answer().await;
    assert_eq!((said.status(), &*said.body), (200, "hello"), "{said:?}");
    // What the service does not want is never sent: its refusal comes instead, and the connection ends with it.
    let mut line = Line::to(sidecar.out).await;
    line.say(
        "POST /no HTTP/1.1\r\nhost: data\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
    )
    .await;
    let said = line.answer().await;
    assert_eq!((said.status(), &*said.body), (403, "no"), "{said:?}");
    assert_eq!(said.header("connection"), Some("close"), "{said:?}");
}

#[tokio::test]
async fn hints_come_before_the_answer_and_trailers_behind_it() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            let body = visit.line.hear("\r\n\r\n").await;
            assert!(body.contains("0\r\nx-sum: 7\r\n"), "{head}{body}");
            visit.say("HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n").await;
            visit.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 9\r\n\r\n").await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("POST / HTTP/1.1\r\nhost: data\r\nte: trailers\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 7\r\n\r\n").await;
    let hints = line.hear("\r\n\r\n").await;
    assert!(
        hints.starts_with("HTTP/1.1 103 ") && header(&hints, "link") == Some("</a.css>"),
        "{hints}"
    );
    let head = line.hear("\r\n\r\n").await;
    assert!(
        head.starts_with("HTTP/1.1 200 ") && header(&head, "transfer-encoding") == Some("chunked"),
        "{head}"
    );
    assert_eq!(line.hear("\r\n\r\n").await, "3\r\nabc\r\n0\r\nx-sum: 9\r\n\r\n");
}

#[tokio::test]
async fn the_answer_to_head_has_a_length_and_no_body_and_the_connection_goes_on() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            let body = if head.starts_with("HEAD") { "" } else { "12345" };
            visit.say(format!("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{body}")).await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("HEAD / HTTP/1.1\r\nhost: data\r\n\r\nGET / HTTP/1.1\r\nhost: data\r\n\r\n").await;
    let head = line.hear("\r\n\r\n").await;
    assert_eq!(header(&head, "content-length"), Some("5"), "{head}");
    assert_eq!(line.answer().await.body, "12345");
}

#[tokio::test]
async fn both_directions_stream_at_once() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        visit.head().await.expect("a request");
        visit.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        for word in ["one", "two", "six"] {
            visit.line.hear(&format!("3\r\n{word}\r\n")).await;
            visit.say(format!("3\r\n{word}\r\n")).await;
        }
        visit.line.hear("0\r\n\r\n").await;
        visit.say("0\r\n\r\n").await;
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n").await;
    assert!(line.hear("\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
    for word in ["one", "two", "six"] {
        line.say(format!("3\r\n{word}\r\n")).await;
        line.hear(word).await;
    }
    line.say("0\r\n\r\n").await;
    line.hear("0\r\n\r\n").await;
}

#[tokio::test]
async fn a_get_never_sees_that_a_kept_connection_had_died() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        // Each connection answers once and promises to stay, then closes as soon as the next request comes.
        if visit.head().await.is_some() {
            visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
        visit.head().await;
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    for n in 0..20 {
        line.say("GET / HTTP/1.1\r\nhost: data\r\n\r\n").await;
        let said = line.answer().await;
        assert_eq!(
            (said.status(), &*said.body),
            (200, "ok"),
            "call {n}: {said:?}\n{}",
            sidecar.infrar.log()
        );
    }
}

#[tokio::test]
async fn a_post_that_may_have_been_seen_is_not_sent_twice() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        // The request is read, and then nothing is said: it may have had its effect.
        if let Some(head) = visit.head().await {
            visit.body(&head).await;
        }
    })
    .await;
    let other = Origin::plain("other").await;
    let sidecar =
        Sidecar::open(&[("data", &[service.at, service.at], ""), ("other", &[other.at], "")]).await;
    let said = sidecar
        .says("POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi")
        .await;
    assert_refused(&said, 502, "upstream-reset", "connection_terminated");
    assert_eq!(service.heads().len(), 1, "{:?}", service.heads());
    // With a key that makes it repeatable it is.
    let said = sidecar.says("POST / HTTP/1.1\r\nhost: data\r\nidempotency-key: 1\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi").await;
    assert_refused(&said, 502, "upstream-reset", "connection_terminated");
    assert!(service.heads().len() > 2, "{:?}", service.heads());
}

/// A PUT whose body comes in chunks of 1 KiB, so that nobody knows its length before its end.
fn put(kib: usize) -> String {
    let chunk = format!("400\r\n{}\r\n", "x".repeat(1024));
    let body = chunk.repeat(kib);
    format!(
        "PUT / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n{body}0\r\n\r\n"
    )
}

#[tokio::test]
async fn a_small_body_that_streams_is_sent_again_and_a_large_one_is_not() {
    // The endpoint that is called first dies with the whole request in its hands, the other says how much it was given.
    let service = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            let length = visit.body(&head).await.matches('x').count().to_string();
            if visit.number == 0 {
                return;
            }
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", length.len());
            visit.say(head + &length).await;
        }
    })
    .await;
    let dying = Origin::scripted(|mut visit: Visit| async move {
        if let Some(head) = visit.head().await {
            visit.body(&head).await;
        }
    })
    .await;
    let services: [Service<'_>; 2] =
        [("data", &[service.at, service.at], ""), ("gone", &[dying.at, dying.at], "")];
    let sidecar = Sidecar::open(&services).await;
    let said = sidecar.says(&put(10)).await;
    assert_eq!((said.status(), &*said.body), (200, "10240"), "{said:?}");
    assert_eq!(service.heads().len(), 2, "{:?}", service.heads());
    // 100 KiB are more than is kept: the one attempt that there can be ends it.
    let said = sidecar.says(&put(100).replace("host: data", "host: gone")).await;
    assert_refused(&said, 502, "upstream-reset", "connection_terminated");
    assert!(said.body.contains("too large to be sent again"), "{said:?}");
    assert_eq!(dying.heads().len(), 1);
    // What was not to be repeated is not, however small.
    let said =
        sidecar.says(&put(1).replace("PUT", "POST").replace("host: data", "host: gone")).await;
    assert_refused(&said, 502, "upstream-reset", "connection_terminated");
    assert!(!said.body.contains("too large"), "{said:?}");
    assert_eq!(dying.heads().len(), 2);
}

#[tokio::test]
async fn a_streamed_post_that_the_peer_says_it_has_not_seen_is_sent_again() {
    // Over HTTP/2 the first stream is refused once some of its body is there; others are answered with what they sent.
    let service = Origin::scripted(|visit: Visit| async move {
        let Ok(mut connection) = h2::server::handshake(visit.line.stream).await else { return };
        let mut refused = visit.number > 0;
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let refuse = !std::mem::replace(&mut refused, true);
            tokio::spawn(async move {
                let mut body = request.into_body();
                let mut length = 0;
                while let Some(Ok(data)) = body.data().await {
                    length += data.len();
                    body.flow_control().release_capacity(data.len()).expect("an open stream");
                    if refuse {
                        return respond.send_reset(h2::Reason::REFUSED_STREAM);
                    }
                }
                let mut answer =
                    respond.send_response(http::Response::new(()), false).expect("open");
                answer.send_data(length.to_string().into(), true).expect("open");
            });
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "    protocol: h2\n")]).await;
    let said = sidecar.says(&put(10).replace("PUT", "POST")).await;
    assert_eq!((said.status(), &*said.body), (200, "10240"), "{said:?}\n{}", sidecar.infrar.log());
    let log = || sidecar.infrar.log();
    until("the log tells of both attempts", async || log().contains("\"attempts\":2")).await;
}

#[tokio::test]
async fn an_endpoint_that_refuses_connections_is_passed_over() {
    let [nobody] = free_ports();
    let service = Origin::plain("second").await;
    // Each worker has its own line about an endpoint.
    let services: &[(&str, &[_], &str)] =
        &[("data", &[nobody, service.at], ""), ("gone", &[nobody], "")];
    let sidecar = Sidecar::with(services, "workers: 1\n").await;
    for n in 0..6 {
        let said = sidecar
            .says(
                "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi",
            )
            .await;
        assert_eq!((said.status(), &*said.body), (200, "second"), "call {n}: {said:?}");
    }
    let said = get(sidecar.out, "gone", "/").await;
    assert_refused(&said, 502, "connect-failed", "connection_refused");
    assert!(said.body.contains("no connection to gone could be made"), "{said:?}");
    // Where that was, the log knows, once and not for each call.
    get(sidecar.out, "gone", "/").await;
    let told = || {
        let log = sidecar.infrar.log();
        let lines = log.lines().filter(|line| line.contains("no connection to an endpoint"));
        let lines = lines.filter(|line| line.contains("\"service\":\"gone\""));
        lines.filter(|line| line.contains(&format!("http://{nobody}"))).count()
    };
    until("the log names the address", async || told() == 1).await;
}

#[tokio::test]
async fn a_silent_service_is_given_up_at_its_deadline_also_in_the_words_of_grpc() {
    let service =
        Origin::scripted(|mut visit: Visit| async move { while visit.head().await.is_some() {} })
            .await;
    let limit = "    timeouts: { request: 300ms }\n";
    let sidecar = Sidecar::open(&[("data", &[service.at], limit)]).await;
    let asked = Instant::now();
    let said = get(sidecar.out, "data", "/").await;
    assert_refused(&said, 504, "deadline", "http_response_timeout");
    assert!(
        asked.elapsed() >= Duration::from_millis(300) && asked.elapsed() < Duration::from_secs(5),
        "{:?}",
        asked.elapsed()
    );
    let said = sidecar.says("POST /a.b/C HTTP/1.1\r\nhost: data\r\ncontent-type: application/grpc\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
    assert_eq!((said.status(), said.header("grpc-status")), (200, Some("4")), "{said:?}");
    until("the metric says so", async || {
        let metrics = get(sidecar.admin, &sidecar.admin.to_string(), "/metrics").await;
        metrics.body.lines().any(|line| {
            line.starts_with("infrar_requests_total") && line.contains("error=\"deadline\"")
        })
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_is_asked_for_without_a_body() {
    let service = Origin::plain("ok").await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let connect = "CONNECT data:80 HTTP/1.1\r\nhost: data:80\r\n";
    for (framing, body) in
        [("content-length: 5", "hello"), ("transfer-encoding: chunked", "0\r\n\r\n")]
    {
        let said = sidecar.says(&format!("{connect}{framing}\r\n\r\n{body}")).await;
        assert_refused(&said, 400, "bad-request", "http_request_error");
    }
    assert_eq!(service.heads(), Vec::<String>::new());
    let mut line = Line::to(sidecar.out).await;
    line.say(format!("{connect}content-length: 0\r\n\r\nGET / HTTP/1.1\r\nhost: data\r\n\r\n"))
        .await;
    assert!(line.hear("\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
    assert_eq!(line.answer().await.body, "ok");
}
