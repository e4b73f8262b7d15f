//! What moves slowly, stalls, breaks off or is refused midway, and whose fault that is.
//!
//! Time is what these stories are about, so some of them let a little of it pass.
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
    atomic::{AtomicUsize, Ordering},
};

use support::{
    Line, Origin, PATIENCE, Visit,
    frames::{
        DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, GOAWAY, HEADERS, REFUSED_STREAM,
        RST_STREAM, block,
    },
    get, header,
    http2::{Frames, OK},
    sidecar::Sidecar,
    until,
};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::Notify,
    time::{Duration, Instant, interval, sleep, timeout},
};

const H2: &str = "    protocol: h2\n";
const STALL: &str = "limits: { stall_timeout: 300ms }\n";
/// So that all requests share their connections.
const ONE: &str = "workers: 1\n";
const CHUNKED: &str = "POST / HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n";

/// Two ends that tell each other how far they are.
fn signal() -> (Arc<Notify>, Arc<Notify>) {
    let notify = Arc::new(Notify::new());
    (Arc::clone(&notify), notify)
}

/// An origin that speaks HTTP/2 by `script`, which gets the number of the connection.
async fn h2_origin<F>(script: impl Fn(usize, Frames) -> F + Clone + Send + Sync + 'static) -> Origin
where
    F: Future<Output = ()> + Send + 'static,
{
    Origin::scripted(move |visit: Visit| {
        let script = script.clone();
        async move {
            let Some(frames) = Frames::server(visit.line.stream).await else { return };
            script(visit.number, frames).await;
        }
    })
    .await
}

/// Answers every request that is complete with 200.
async fn obliging(mut frames: Frames) {
    while let Some(stream) = frames.request().await {
        frames.ok(stream).await;
    }
}

/// Says a body in ten pieces, 100 ms apart.
async fn upload_slowly(line: &mut Line) {
    let mut pace = interval(Duration::from_millis(100));
    for _ in 0..10 {
        pace.tick().await;
        line.say("1\r\nx\r\n").await;
    }
    line.say("0\r\n\r\n").await;
}

#[tokio::test]
async fn an_upload_may_take_longer_than_its_answer_and_nobody_is_blamed() {
    let patient = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            visit.body(&head).await;
            visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
    })
    .await;
    let silent =
        Origin::scripted(|mut visit: Visit| async move { while visit.head().await.is_some() {} })
            .await;
    let multiplexing = h2_origin(|_number, frames| obliging(frames)).await;
    let limit = "    timeouts: { request: 300ms }\n    circuit: { failure_threshold: 1 }\n";
    let sidecar = Sidecar::open(&[
        ("data", &[patient.at], limit),
        ("many", &[multiplexing.at], &format!("{limit}{H2}")),
        ("silent", &[silent.at], limit),
    ])
    .await;
    for host in ["data", "many", "data", "many"] {
        let mut line = Line::to(sidecar.out).await;
        line.say(CHUNKED.replace("data", host)).await;
        upload_slowly(&mut line).await;
        let said = line.answer().await;
        assert_eq!(said.status(), 200, "{host}: {said:?}\n{}", sidecar.infrar.log());
    }
    // From its end on, the answer is awaited as long as any.
    let mut line = Line::to(sidecar.out).await;
    line.say(CHUNKED.replace("data", "silent")).await;
    upload_slowly(&mut line).await;
    let ended = Instant::now();
    let said = line.answer().await;
    assert_eq!((said.status(), said.code()), (504, "deadline"), "{said:?}");
    assert!(ended.elapsed() >= Duration::from_millis(290), "{:?}", ended.elapsed());
}

#[tokio::test]
async fn a_client_that_stalls_in_its_upload_is_told_so_and_the_endpoint_is_not_blamed() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            if head.starts_with("POST") {
                visit.line.hear("never").await;
            }
            visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
    })
    .await;
    let other = h2_origin(|_number, frames| obliging(frames)).await;
    let circuit = "    circuit: { failure_threshold: 1 }\n";
    let services: &[(&str, &[_], &str)] =
        &[("data", &[service.at], circuit), ("many", &[other.at], &format!("{circuit}{H2}"))];
    let sidecar = Sidecar::with(services, STALL).await;
    for host in ["data", "many"] {
        let said = sidecar
            .says(&format!("POST / HTTP/1.1\r\nhost: {host}\r\ncontent-length: 9\r\n\r\nabc"))
            .await;
        assert_eq!((said.status(), said.code()), (408, "request-timeout"), "{said:?}");
        assert_eq!(said.header("connection"), Some("close"), "{said:?}");
        // Over HTTP/2 likewise.
        let stream = TcpStream::connect(sidecar.out).await.expect("it listens");
        let mut frames = Frames::client(stream, (3, 100)).await;
        frames.ask(1, "POST", host, 0).await;
        frames.say(DATA, 0, 1, b"abc").await;
        let answer = frames.hear(DATA).await;
        let problem = String::from_utf8_lossy(&answer.payload).into_owned();
        assert!(problem.contains("\"code\":\"request-timeout\""), "{problem}");
        assert_eq!(get(sidecar.out, host, "/").await.status(), 200);
    }
}

#[tokio::test]
async fn an_endpoint_that_takes_no_bytes_is_given_up_and_blamed() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        visit.head().await;
        std::future::pending::<()>().await;
    })
    .await;
    let keys = "    circuit: { failure_threshold: 1 }\n";
    let sidecar = Sidecar::with(&[("data", &[service.at], keys)], STALL).await;
    let stream = TcpStream::connect(sidecar.out).await.expect("it listens");
    let (read, mut write) = stream.into_split();
    let upload = tokio::spawn(async move {
        drop(
            write
                .write_all(b"POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 1000000000\r\n\r\n")
                .await,
        );
        let piece = vec![0; 1 << 20];
        while write.write_all(&piece).await.is_ok() {}
    });
    let mut line = Line::over(tokio::io::join(read, tokio::io::sink()));
    let head = line.hear("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 504 "), "{head}");
    line.hear("\"code\":\"deadline\"").await;
    upload.abort();
    assert_eq!(get(sidecar.out, "data", "/").await.code(), "circuit-open");
}

#[tokio::test]
async fn a_connection_that_says_goodbye_gets_no_further_request() {
    let (told, said_goodbye) = signal();
    let service = h2_origin(move |number, mut frames| {
        let told = Arc::clone(&told);
        async move {
            if number > 0 {
                return obliging(frames).await;
            }
            // The first answer goes on, so that the connection stays.
            let stream = frames.request().await.expect("a request");
            frames.say(HEADERS, END_HEADERS, stream, OK).await;
            frames.say(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]).await;
            frames.settle().await;
            told.notify_one();
            while frames.next().await.is_some() {}
        }
    })
    .await;
    let keys = format!("{H2}    retries: {{ max_attempts: 1 }}\n");
    let sidecar = Sidecar::with(&[("data", &[service.at], &keys)], ONE).await;
    let mut open = Line::to(sidecar.out).await;
    open.say("GET /long HTTP/1.1\r\nhost: data\r\n\r\n").await;
    open.hear("\r\n\r\n").await;
    said_goodbye.notified().await;
    let mut line = Line::to(sidecar.out).await;
    line.say(format!("{CHUNKED}3\r\nabc\r\n")).await;
    line.say("0\r\n\r\n").await;
    let said = line.answer().await;
    assert_eq!(said.status(), 200, "{said:?}\n{}", sidecar.infrar.log());
}

#[tokio::test]
async fn what_a_peer_says_it_has_not_seen_is_sent_again_and_a_goodbye_costs_no_attempt() {
    let service = h2_origin(|number, mut frames| async move {
        if number > 0 {
            return obliging(frames).await;
        }
        let first = frames.request().await.expect("a request");
        frames.ok(first).await;
        frames.request().await.expect("another");
        let last = [first.to_be_bytes(), [0; 4]].concat();
        frames.say(GOAWAY, 0, 0, &last).await;
        while frames.next().await.is_some() {}
    })
    .await;
    let refusing = h2_origin(|_number, mut frames| async move {
        let first = frames.request().await.expect("a request");
        frames.say(RST_STREAM, 0, first, &REFUSED_STREAM.to_be_bytes()).await;
        obliging(frames).await;
    })
    .await;
    let keys = format!("{H2}    retries: {{ max_attempts: 1 }}\n");
    let services: &[(&str, &[_], &str)] =
        &[("data", &[service.at], &keys), ("many", &[refusing.at], H2)];
    let sidecar = Sidecar::with(services, ONE).await;
    let post = "POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi";
    for _ in 0..2 {
        let said = sidecar.says(post).await;
        assert_eq!(said.status(), 200, "{said:?}\n{}", sidecar.infrar.log());
    }
    let said = sidecar.says(&post.replace("data", "many")).await;
    assert_eq!(said.status(), 200, "{said:?}\n{}", sidecar.infrar.log());
}

#[tokio::test]
async fn a_connection_on_which_nothing_comes_any_more_is_replaced() {
    let service = h2_origin(|number, mut frames| async move {
        if number > 0 {
            return obliging(frames).await;
        }
        let first = frames.request().await.expect("a request");
        frames.ok(first).await;
        while frames.next().await.is_some() {}
    })
    .await;
    let keys = format!("{H2}    timeouts: {{ request: 300ms }}\n");
    let sidecar = Sidecar::with(&[("data", &[service.at], &keys)], ONE).await;
    assert_eq!(get(sidecar.out, "data", "/").await.status(), 200);
    assert_eq!(get(sidecar.out, "data", "/").await.status(), 504);
    assert_eq!(get(sidecar.out, "data", "/").await.status(), 200);
}

#[tokio::test]
async fn an_answer_that_stalls_midway_ends_and_is_not_taken_for_whole() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while let Some(head) = visit.head().await {
            let framing = if head.contains("/chunks") {
                "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
            } else {
                "content-length: 9\r\n\r\nabc"
            };
            visit.say(format!("HTTP/1.1 200 OK\r\n{framing}")).await;
        }
    })
    .await;
    let sidecar = Sidecar::with(&[("data", &[service.at], "")], STALL).await;
    for path in ["/length", "/chunks"] {
        let said = get(sidecar.out, "data", path).await;
        assert!(said.body.contains("abc") && !said.body.contains("0\r\n\r\n"), "{said:?}");
        let line = sidecar.line_of_path(path).await;
        assert!(
            line.contains("\"code\":\"deadline\"") && line.contains("\"bytes_out\":3"),
            "{line}"
        );
    }
    let stream = TcpStream::connect(sidecar.out).await.expect("it listens");
    let mut frames = Frames::client(stream, (3, 100)).await;
    frames.ask(1, "GET", "data", END_STREAM).await;
    frames.hear(RST_STREAM).await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_for_too_long_is_given_up() {
    let service = Origin::plain("twelve bytes").await;
    let sidecar = Sidecar::with(&[("data", &[service.at], "")], STALL).await;
    let stream = TcpStream::connect(sidecar.out).await.expect("it listens");
    // Its window is 0 and stays so.
    let mut frames = Frames::client(stream, (4, 0)).await;
    frames.ask(1, "GET", "data", END_STREAM).await;
    frames.hear(HEADERS).await;
    frames.hear(RST_STREAM).await;
}

#[tokio::test]
async fn after_an_upload_in_chunks_the_answer_may_take_longer_than_a_stall() {
    let (told, released) = signal();
    // A service that computes.
    let service = Origin::scripted(move |mut visit: Visit| {
        let released = Arc::clone(&released);
        async move {
            while let Some(head) = visit.head().await {
                if visit.whole_body(&head).await.is_none() {
                    return;
                }
                released.notified().await;
                visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            }
        }
    })
    .await;
    let sidecar = Sidecar::with(&[("data", &[service.at], "")], STALL).await;
    let mut line = Line::to(sidecar.out).await;
    line.say(format!("{CHUNKED}3\r\nabc\r\n")).await;
    line.say("0\r\n\r\n").await;
    // Meanwhile others stall, one after the other: so much time has passed.
    for _ in 0..3 {
        assert_eq!(sidecar.says(&format!("{CHUNKED}3\r\nabc\r\n")).await.status(), 408);
    }
    told.notify_one();
    assert_eq!(line.answer().await.body, "ok");
}

#[tokio::test]
async fn a_client_that_sends_head_and_body_apart_does_not_wait_for_our_acknowledgement() {
    let service = Origin::plain("ok").await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    // As urllib3 does when it speaks to a proxy.
    line.stream.set_nodelay(false).expect("our own socket");
    let mut shortest = Duration::MAX;
    for round in 0..30 {
        let begun = Instant::now();
        line.say("POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 1500\r\n\r\n").await;
        line.say("x".repeat(1500)).await;
        assert_eq!(line.answer().await.body, "ok");
        // A new connection is acknowledged at once for a while.
        if round >= 20 {
            shortest = shortest.min(begun.elapsed());
        }
    }
    assert!(shortest < Duration::from_millis(30), "{shortest:?}");
}

#[tokio::test]
async fn who_resets_hundreds_of_requests_before_their_answer_is_told_to_calm_down() {
    let silent =
        Origin::scripted(|mut visit: Visit| async move { while visit.head().await.is_some() {} })
            .await;
    let sidecar = Sidecar::open(&[("data", &[silent.at], "")]).await;
    let stream = TcpStream::connect(sidecar.out).await.expect("it listens");
    let mut frames = Frames::client(stream, (3, 100)).await;
    let goodbye = async {
        for round in 0..1500 {
            let id = round * 2 + 1;
            frames.ask(id, "GET", "data", END_STREAM).await;
            frames.say(6, 0, 0, &[1; 8]).await;
            loop {
                let frame = frames.next().await.expect("a goodbye before the end");
                match frame.kind {
                    GOAWAY => return (round, frame.code()),
                    6 => break,
                    _ => {}
                }
            }
            frames.say(RST_STREAM, 0, id, &8u32.to_be_bytes()).await;
        }
        (1500, 0)
    };
    let (round, code) = goodbye.await;
    assert!(round >= 250 && code == ENHANCE_YOUR_CALM, "{code} after {round}");
}

#[tokio::test]
async fn a_429_is_obeyed_where_it_says_until_when() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        let mut calls = 0;
        while let Some(head) = visit.head().await {
            visit.body(&head).await;
            calls += 1;
            if calls % 2 == 1 {
                visit.say("HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 2\r\n\r\nno").await;
            } else {
                visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            }
        }
    })
    .await;
    let far = Origin::scripted(|mut visit: Visit| async move {
        while visit.head().await.is_some() {
            visit.say("HTTP/1.1 429 Too Many Requests\r\nretry-after: 60\r\ncontent-length: 2\r\n\r\nno").await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], ""), ("far", &[far.at], "")]).await;
    let asked = Instant::now();
    let said = get(sidecar.out, "data", "/").await;
    assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
    assert!(asked.elapsed() >= Duration::from_secs(1), "{:?}", asked.elapsed());
    let said = sidecar
        .says("POST / HTTP/1.1\r\nhost: data\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi")
        .await;
    assert_eq!((said.status(), &*said.body), (429, "no"), "{said:?}");
    let said = get(sidecar.out, "far", "/").await;
    assert_eq!((said.status(), &*said.body), (429, "no"), "{said:?}");
}

#[tokio::test]
async fn the_services_own_answer_is_better_than_a_refusal_of_ours() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while visit.head().await.is_some() {
            visit.say("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy").await;
        }
    })
    .await;
    let keys = "    circuit: { failure_threshold: 1 }\n";
    let sidecar = Sidecar::open(&[("data", &[service.at], keys)]).await;
    let said = get(sidecar.out, "data", "/").await;
    assert_eq!((said.status(), &*said.body), (503, "busy"), "{said:?}");
    assert_eq!(get(sidecar.out, "data", "/").await.code(), "circuit-open");
}

#[tokio::test]
async fn our_own_time_does_not_include_that_of_the_endpoint_nor_of_tunnels() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        let Some(head) = visit.head().await else { return };
        let (begin, end) = if head.contains("upgrade") {
            ("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\nabc", "")
        } else {
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "0\r\n\r\n")
        };
        visit.say(begin).await;
        // A service that streams for a while.
        sleep(Duration::from_millis(700)).await;
        visit.say(end).await;
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    assert_eq!(get(sidecar.out, "data", "/").await.status(), 200);
    let said = sidecar
        .says("GET / HTTP/1.1\r\nhost: data\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\n")
        .await;
    assert_eq!((said.status(), &*said.body), (101, "abc"), "{said:?}");
    until("both are counted", async || {
        sidecar.sum_of("infrar_request_duration_seconds_count").await >= 2.0
    })
    .await;
    let duration = sidecar.sum_of("infrar_request_duration_seconds_sum").await;
    let overhead = sidecar.sum_of("infrar_proxy_overhead_seconds_sum").await;
    assert!(overhead < duration / 2.0, "{overhead} of {duration}");
    let count = sidecar.sum_of("infrar_proxy_overhead_seconds_count").await;
    assert!((count - 1.0).abs() < 0.1, "{count}");
}

#[tokio::test]
async fn a_broken_transfer_is_logged_with_what_moved_and_with_who_broke_it() {
    let (hear, heard) = signal();
    let told = Arc::clone(&heard);
    let service = Origin::scripted(move |mut visit: Visit| {
        let hear = Arc::clone(&hear);
        async move {
            let Some(head) = visit.head().await else { return };
            if head.contains("/tunnel") {
                visit.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\nhello").await;
                visit.line.hear("bye").await;
                visit.line.stream.set_zero_linger().expect("our own socket");
                return;
            }
            if head.contains("/answer") {
                visit.say("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc").await;
                // What came must have been passed on before the reset overtakes it.
                hear.notified().await;
                visit.line.stream.set_zero_linger().expect("our own socket");
                return;
            }
            if head.contains("/client") {
                visit.line.hear("12345").await;
                visit.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n").await;
            }
            while visit.line.stream.readable().await.is_ok() && visit.head().await.is_some() {}
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("GET /answer HTTP/1.1\r\nhost: data\r\n\r\n").await;
    line.hear("abc").await;
    told.notify_one();
    assert_eq!(line.rest().await, "");
    let logged = sidecar.line_of_path("/answer").await;
    assert!(
        logged.contains("\"code\":\"upstream-reset\"") && logged.contains("\"bytes_out\":3"),
        "{logged}"
    );

    let mut line = Line::to(sidecar.out).await;
    line.say("POST /client HTTP/1.1\r\nhost: data\r\ncontent-length: 5\r\n\r\n12345").await;
    line.hear("abcd").await;
    drop(line);
    let logged = sidecar.line_of_path("/client").await;
    assert!(
        logged.contains("\"code\":\"client-gone\"")
            && logged.contains("\"bytes_in\":5")
            && logged.contains("\"bytes_out\":4"),
        "{logged}"
    );

    let mut line = Line::to(sidecar.out).await;
    line.say("POST /before HTTP/1.1\r\nhost: data\r\ncontent-length: 5\r\n\r\n12345").await;
    until("the service has it", async || {
        service.heads().iter().any(|head| head.contains("/before"))
    })
    .await;
    drop(line);
    let logged = sidecar.line_of_path("/before").await;
    assert!(logged.contains("\"status\":499") && logged.contains("\"bytes_in\":5"), "{logged}");

    let mut line = Line::to(sidecar.out).await;
    line.say("GET /tunnel HTTP/1.1\r\nhost: data\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\n")
        .await;
    line.hear("hello").await;
    line.say("bye").await;
    line.rest().await;
    let logged = sidecar.line_of_path("/tunnel").await;
    assert!(logged.contains("\"bytes_in\":3") && logged.contains("\"bytes_out\":5"), "{logged}");
}

#[tokio::test]
async fn an_upgrade_waits_for_the_end_of_its_request() {
    let (switch, switched) = signal();
    let service = Origin::scripted(move |mut visit: Visit| {
        let switch = Arc::clone(&switch);
        async move {
            visit.head().await.expect("a request");
            visit.line.hear("2\r\nab\r\n").await;
            visit.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\n").await;
            switch.notify_one();
            assert_eq!(visit.line.hear("0\r\n\r\n").await, "3\r\ncde\r\n0\r\n\r\n");
            assert_eq!(visit.line.hear("raw").await, "raw");
            visit.say("bye").await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("POST /chat HTTP/1.1\r\nhost: data\r\nconnection: upgrade\r\nupgrade: chat\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab").await;
    switched.notified().await;
    line.say("cde\r\n0\r\n\r\nraw").await;
    let head = line.hear("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert_eq!(line.rest().await, "bye");
}

#[tokio::test]
async fn an_answer_without_a_length_that_ends_in_a_reset_is_not_taken_for_whole() {
    let (hear, heard) = signal();
    let service = Origin::scripted(move |mut visit: Visit| {
        let hear = Arc::clone(&hear);
        async move {
            let Some(head) = visit.head().await else { return };
            visit.say("HTTP/1.1 200 OK\r\n\r\nabc").await;
            if head.contains("/broken") {
                hear.notified().await;
                visit.line.stream.set_zero_linger().expect("our own socket");
            }
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("GET /broken HTTP/1.1\r\nhost: data\r\n\r\n").await;
    line.hear("3\r\nabc\r\n").await;
    heard.notify_one();
    assert_eq!(line.rest().await, "");
    assert!(get(sidecar.out, "data", "/whole").await.body.ends_with("0\r\n\r\n"));
}

#[tokio::test]
async fn a_request_that_meets_a_reset_is_sent_again_when_that_is_safe() {
    let broken = Origin::scripted(|mut visit: Visit| async move {
        visit.head().await;
        visit.line.stream.set_zero_linger().expect("our own socket");
    })
    .await;
    let service = Origin::plain("second").await;
    let sidecar = Sidecar::open(&[("data", &[broken.at, service.at], "")]).await;
    for call in 0..6 {
        let said = get(sidecar.out, "data", "/").await;
        assert_eq!((said.status(), &*said.body), (200, "second"), "call {call}: {said:?}");
    }
}

#[tokio::test]
async fn a_put_that_streams_never_meets_a_connection_that_had_died() {
    let visits = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&visits);
    let (close, closed) = signal();
    let service = Origin::scripted(move |mut visit: Visit| {
        let (seen, close) = (Arc::clone(&seen), Arc::clone(&close));
        async move {
            seen.fetch_add(1, Ordering::SeqCst);
            while let Some(head) = visit.head().await {
                if header(&head, "transfer-encoding").is_some() {
                    visit.line.hear("0\r\n\r\n").await;
                }
                visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                if visit.number == 0 {
                    drop(visit);
                    return close.notify_one();
                }
            }
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say("GET / HTTP/1.1\r\nhost: data\r\n\r\n").await;
    assert_eq!(line.answer().await.body, "ok");
    closed.notified().await;
    line.say(format!("{}3\r\nabc\r\n", CHUNKED.replace("POST", "PUT"))).await;
    line.say("0\r\n\r\n").await;
    let said = line.answer().await;
    assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
    assert_eq!(visits.load(Ordering::SeqCst), 2);
}

/// Answers the first request at once with the head of an answer and its first chunk, and tells when its client has gone.
async fn early(mut visit: Visit, gone: Arc<Notify>) {
    if visit.head().await.is_none() {
        return;
    }
    visit.line.hear("abc").await;
    visit.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n").await;
    while visit.head().await.is_some() {}
    gone.notify_one();
}

/// The same over HTTP/2, whose requests share a connection.
async fn early_h2(mut frames: Frames, gone: Arc<Notify>) {
    let mut answered = 0;
    while let Some(frame) = frames.next().await {
        if frame.kind == DATA && frame.stream > answered {
            answered = frame.stream;
            frames.say(HEADERS, END_HEADERS, answered, OK).await;
            frames.say(DATA, 0, answered, b"first").await;
        }
        if frame.kind == RST_STREAM {
            gone.notify_one();
        }
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_behind_the_begin_of_its_answer_ends_both_and_is_its_clients_doing()
 {
    let (tell, told) = signal();
    let h1 = Arc::clone(&tell);
    let slow = Origin::scripted(move |visit: Visit| early(visit, Arc::clone(&h1))).await;
    let many = h2_origin(move |_number, frames| early_h2(frames, Arc::clone(&tell))).await;
    let keys = "limits: { body_bytes: 1KiB, stall_timeout: 60s }\n";
    let services = [("data", &[slow.at][..], ""), ("many", &[many.at][..], H2)];
    let sidecar = Sidecar::with(&services, keys).await;
    for host in ["data", "many"] {
        let chunked = CHUNKED.replace("data", host);
        for (path, rest, code) in [
            ("/leaves", None, "client-gone"),
            ("/large", Some(format!("600\r\n{}\r\n", "x".repeat(0x600))), "body-too-large"),
            ("/garbage", Some("nonsense\r\n".to_owned()), "bad-request"),
        ] {
            let path = format!("{path}-{host}");
            let mut line = Line::to(sidecar.out).await;
            line.say(format!("{}3\r\nabc\r\n", chunked.replace(" / ", &format!(" {path} ")))).await;
            line.hear("first").await;
            match rest {
                None => drop(line),
                Some(rest) => {
                    line.say(rest).await;
                    assert!(!line.rest().await.contains("0\r\n\r\n"));
                }
            }
            timeout(PATIENCE, told.notified()).await.expect("the endpoint is told");
            let logged = sidecar.line_of_path(&path).await;
            assert!(
                logged.contains(&format!("\"code\":\"{code}\""))
                    && logged.contains("\"status\":200"),
                "{logged}"
            );
        }
        // Over HTTP/2 its client resets the stream.
        let stream = TcpStream::connect(sidecar.out).await.expect("it listens");
        let mut frames = Frames::client(stream, (3, 100)).await;
        frames.ask(1, "POST", host, 0).await;
        frames.say(DATA, 0, 1, b"abc").await;
        frames.hear(DATA).await;
        frames.say(RST_STREAM, 0, 1, &8u32.to_be_bytes()).await;
        timeout(PATIENCE, told.notified()).await.expect("the endpoint is told");
        let mine = || {
            let log = sidecar.infrar.log();
            log.lines()
                .find(|line| {
                    line.contains("\"path\":\"/\"")
                        && line.contains(&format!("\"callee\":\"{host}\""))
                })
                .map(str::to_owned)
        };
        until("it is logged", async || mine().is_some()).await;
        let logged = mine().expect("it was there");
        assert!(
            logged.contains("\"code\":\"client-gone\"") && logged.contains("\"status\":200"),
            "{logged}"
        );
    }
}

#[tokio::test]
async fn an_answer_has_one_length_however_often_an_endpoint_says_it() {
    let twice = [(":status", "200"), ("content-length", "2"), ("content-length", "2")];
    let service = h2_origin(move |_number, mut frames| async move {
        while let Some(stream) = frames.request().await {
            frames.say(HEADERS, END_HEADERS, stream, &block(&twice)).await;
            frames.say(DATA, END_STREAM, stream, b"ok").await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], H2)]).await;
    for method in ["GET", "HEAD"] {
        let said = sidecar
            .says(&format!("{method} / HTTP/1.1\r\nhost: data\r\nconnection: close\r\n\r\n"))
            .await;
        assert_eq!(said.status(), 200, "{said:?}");
        assert_eq!(said.head.matches("content-length: 2").count(), 1, "{said:?}");
    }
}
