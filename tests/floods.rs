//! HTTP/2 as an attacker speaks it, on both ways: floods, and heads that could become another request on the next hop.
//!
//! Whatever is said, the process lives on and other connections are served.
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
    cell::Cell,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use support::{
    Folder, Infrar, Origin, Visit,
    frames::{
        self, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Frames, HEADERS,
        MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE, PING, PROTOCOL_ERROR, REFUSED_STREAM,
        RST_STREAM, SETTINGS, WINDOW_UPDATE,
    },
    free_ports, get, header, until,
};
use tokio::{
    sync::watch,
    time::{Duration, timeout},
};

/// A sidecar with both ways open; the service `data` is the application behind it, so both ways lead to one origin.
struct Sidecar {
    infrar: Infrar,
    ways: [SocketAddr; 2],
    origin: Origin,
    /// Bodies that the origin took for whole.
    whole: Arc<AtomicUsize>,
    /// What `/hold` waits for.
    release: watch::Sender<bool>,
    #[expect(dead_code, reason = "held for its Drop")]
    folder: Folder,
}

impl Sidecar {
    async fn open(keys: &str) -> Self {
        let folder = Folder::new();
        let [inbound, out, admin] = free_ports();
        let whole = Arc::<AtomicUsize>::default();
        let (release, released) = watch::channel(false);
        let count = Arc::clone(&whole);
        let origin =
            Origin::scripted(move |visit| answer(visit, Arc::clone(&count), released.clone()))
                .await;
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
                 inbound: {{ listen: '{inbound}', app: 'http://{}', tls: off, rules: [{{ path: /*, public: true }}] }}\n\
                 outbound: {{ listen: '{out}' }}\nlog: {{ format: json }}\n{keys}",
                origin.at
            ),
        );
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, ways: [inbound, out], origin, whole, release, folder }
    }

    /// Both ways are open to newcomers, and the process has not panicked anywhere.
    async fn lives(&mut self, after: &str) {
        for way in self.ways {
            let said = get(way, "data", "/alive").await;
            assert_eq!((said.status(), &*said.body), (200, "ok"), "{after}: {said:?}");
            let mut frames = Frames::to(way).await;
            frames.say(frames::get(1, "/alive")).await;
            assert_eq!(frames.answer(1).await, Ok((200, "ok".to_owned())), "{after}");
        }
        assert!(self.infrar.runs(), "{after}");
        let log = self.infrar.log();
        assert!(!log.contains("panicked"), "{after}: {log}");
    }

    /// What came to the origin but for the calls of `lives`.
    fn heads(&self) -> Vec<String> {
        let mut heads = self.origin.heads();
        heads.retain(|head| !head.contains(" /alive "));
        heads
    }
}

/// What the answer to `/large` is long.
const LARGE: usize = 1024 * 1024;

/// Answers with `ok`; to `/hold` when it is released, to a body when that is whole.
async fn answer(mut visit: Visit, whole: Arc<AtomicUsize>, mut released: watch::Receiver<bool>) {
    while let Some(head) = visit.head().await {
        if head.contains(" /hold") && released.wait_for(|it| *it).await.is_err() {
            return;
        }
        let framed = header(&head, "content-length").is_some_and(|length| length != "0")
            || header(&head, "transfer-encoding").is_some();
        if framed && visit.whole_body(&head).await.is_none() {
            return;
        }
        whole.fetch_add(usize::from(framed), Ordering::Relaxed);
        if head.contains(" /large") {
            visit.say(format!("HTTP/1.1 200 OK\r\ncontent-length: {LARGE}\r\n\r\n")).await;
            visit.say(vec![b'x'; LARGE]).await;
            continue;
        }
        visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    }
}

#[tokio::test]
async fn a_burst_of_resets_ends_the_connection() {
    let mut sidecar = Sidecar::open("").await;
    for way in sidecar.ways {
        let mut bystander = Frames::to(way).await;
        let mut frames = Frames::to(way).await;
        let burst: Vec<u8> = (0..2000)
            .flat_map(|n| [frames::get(2 * n + 1, "/hold"), frames::reset(2 * n + 1)].concat())
            .collect();
        frames.say(burst).await;
        assert_eq!(frames.end().await, Some(ENHANCE_YOUR_CALM));
        bystander.say(frames::get(1, "/alive")).await;
        assert_eq!(bystander.answer(1).await, Ok((200, "ok".to_owned())));
    }
    // CVE-2023-44487: what was reset at once costs the service next to nothing.
    assert!(sidecar.heads().len() < 500, "{}", sidecar.heads().len());
    sidecar.lives("a burst of resets").await;
}

#[tokio::test]
async fn resets_that_wait_until_the_request_was_accepted_end_the_connection_too() {
    let mut sidecar = Sidecar::open("").await;
    for way in sidecar.ways {
        let mut frames = Frames::to(way).await;
        let mut stood = 0;
        while stood < 600 {
            frames.say(frames::get(2 * stood + 1, "/hold")).await;
            if !frames.settled().await {
                break;
            }
            frames.say(frames::reset(2 * stood + 1)).await;
            stood += 1;
        }
        assert!((200..=500).contains(&stood), "{stood}");
    }
    sidecar.lives("patient resets").await;
}

#[tokio::test]
async fn resets_of_requests_whose_bodies_are_open_end_the_connection_too() {
    let mut sidecar = Sidecar::open("").await;
    for way in sidecar.ways {
        let mut frames = Frames::to(way).await;
        let mut stood = 0;
        while stood < 600 {
            frames.say(frames::headers(2 * stood + 1, 0, &frames::request("POST", "/hold"))).await;
            if !frames.settled().await {
                break;
            }
            frames.say(frames::reset(2 * stood + 1)).await;
            stood += 1;
        }
        assert!((200..=500).contains(&stood), "{stood}");
    }
    sidecar.lives("resets of open bodies").await;
    // Nobody was told that the request was bad: its client had gone.
    let log = sidecar.infrar.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("\"path\":\"/hold\"")).collect();
    assert!(lines.len() >= 400, "{}", lines.len());
    for line in lines {
        assert!(line.contains("\"status\":499") && line.contains("client-gone"), "{line}");
    }
}

#[tokio::test]
async fn a_request_that_is_reset_before_anybody_looks_at_it_leaves_a_line_all_the_same() {
    let sidecar = Sidecar::open("").await;
    let [inbound, _] = sidecar.ways;
    let mut frames = Frames::to(inbound).await;
    let burst: Vec<u8> = (0..20)
        .flat_map(|n| [frames::get(2 * n + 1, "/early"), frames::reset(2 * n + 1)].concat())
        .collect();
    frames.say(burst).await;
    assert!(frames.settled().await);
    let lines = || sidecar.infrar.log().matches("\"path\":\"/early\"").count();
    until("each has its line", async || lines() == 20).await;
}

#[tokio::test]
async fn what_a_client_does_not_read_is_not_held_for_it() {
    const STREAMS: u32 = 80;
    let sidecar = Sidecar::open("").await;
    let [inbound, _] = sidecar.ways;
    let mut frames = Frames::to(inbound).await;
    // Windows as wide as there are.
    let vast = 0x7fff_ffff_u32.to_be_bytes();
    let setting = [&4u16.to_be_bytes()[..], &vast].concat();
    frames.say(frames::frame(SETTINGS, 0, 0, &setting)).await;
    frames.say(frames::frame(WINDOW_UPDATE, 0, 0, &(0x7fff_ffff_u32 - 65_535).to_be_bytes())).await;
    assert!(frames.settled().await);
    let before = sidecar.infrar.memory();
    let asked: Vec<u8> = (0..STREAMS).flat_map(|n| frames::get(2 * n + 1, "/large")).collect();
    frames.say(asked).await;
    until("all are being answered", async || sidecar.heads().len() == 80).await;
    let still = Cell::new((0, 0));
    until("nothing moves any more", async || {
        let (now, (before, looks)) = (sidecar.infrar.memory(), still.get());
        still.set(if now.abs_diff(before) < 64 { (before, looks + 1) } else { (now, 0) });
        looks > 50
    })
    .await;
    let grown = sidecar.infrar.memory().saturating_sub(before);
    assert!(grown < 24 * 1024, "{grown} KiB for one connection");
    // Whoever reads after all gets everything.
    let mut left = usize::try_from(STREAMS).expect("few");
    let mut bytes = 0;
    while left > 0 {
        let frame = frames.next().await.expect("the connection stands");
        assert!(![RST_STREAM, frames::GOAWAY].contains(&frame.kind), "{frame:?}");
        if frame.kind == DATA {
            bytes += frame.payload.len();
            left -= usize::from(frame.has(END_STREAM));
        }
    }
    assert_eq!(bytes, 80 * LARGE);
}

#[tokio::test]
async fn who_now_and_then_cancels_a_call_keeps_its_connection() {
    let mut sidecar = Sidecar::open("").await;
    for way in sidecar.ways {
        let mut frames = Frames::to(way).await;
        // More calls are answered than given up.
        for n in 0..300 {
            let (first, second, third) = (6 * n + 1, 6 * n + 3, 6 * n + 5);
            frames
                .say(
                    [
                        frames::get(first, "/hold"),
                        frames::get(second, "/alive"),
                        frames::get(third, "/alive"),
                    ]
                    .concat(),
                )
                .await;
            assert!(frames.answer(second).await.is_ok(), "{n}");
            frames.say(frames::reset(first)).await;
        }
        assert!(frames.settled().await);
    }
    sidecar.lives("now and then a reset").await;
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_the_others_answered() {
    let mut sidecar = Sidecar::open("limits: { streams: 10 }\n").await;
    for way in sidecar.ways {
        sidecar.release.send_replace(false);
        let mut frames = Frames::to(way).await;
        assert_eq!(frames.setting(MAX_CONCURRENT_STREAMS), Some(10));
        let all: Vec<u8> = (0..13).flat_map(|n| frames::get(2 * n + 1, "/hold")).collect();
        frames.say(all).await;
        for n in 10..13 {
            let refused = frames.next_of(RST_STREAM).await;
            assert_eq!((refused.stream, refused.code()), (2 * n + 1, REFUSED_STREAM));
        }
        sidecar.release.send_replace(true);
        let mut answered = 0;
        while answered < 10 {
            let frame = frames.next_of(HEADERS).await;
            assert!(frame.stream < 20 && frame.status() == 200, "{frame:?}");
            answered += 1;
        }
        // There is room again.
        frames.say(frames::get(101, "/alive")).await;
        assert_eq!(frames.answer(101).await, Ok((200, "ok".to_owned())));
    }
    sidecar.lives("too many streams").await;
}

#[tokio::test]
async fn the_defaults_are_those_of_the_field() {
    let sidecar = Sidecar::open("").await;
    for way in sidecar.ways {
        let frames = Frames::to(way).await;
        assert_eq!(frames.setting(MAX_CONCURRENT_STREAMS), Some(1024));
        assert!(
            frames.setting(MAX_HEADER_LIST_SIZE).is_some_and(|size| size >= 60 * 1024),
            "{:?}",
            frames.settings
        );
        // 60 KiB of head and 100 headers are taken, in either version.
        let long = "x".repeat(48 * 1024);
        let mut fields = frames::request("GET", "/").to_vec();
        fields.extend([("x-a", "1"); 40]);
        let mut frames = frames;
        frames.say(frames::headers(1, END_STREAM, &fields)).await;
        assert_eq!(frames.answer(1).await, Ok((200, "ok".to_owned())));
        let said = support::talk(
            way,
            format!("GET / HTTP/1.1\r\nhost: data\r\nx-long: {long}\r\nconnection: close\r\n\r\n"),
        )
        .await;
        assert_eq!(said.status(), 200, "{}", said.head);
    }
}

#[tokio::test]
async fn a_head_without_end_is_given_up() {
    let mut sidecar = Sidecar::open("").await;
    for way in sidecar.ways {
        // CVE-2024-27316: pieces of a head for ever; large ones, small ones, and ones with nothing in them.
        for piece in [16_000, 100, 1, 0] {
            let mut frames = Frames::to(way).await;
            let opened = frames::block(&frames::request("GET", "/"));
            frames.say(frames::frame(HEADERS, END_STREAM, 1, &opened)).await;
            let field = frames::block(&[("x-a", &"a".repeat(piece))]);
            let part = &field[..if piece == 0 { 0 } else { field.len() }];
            let more = frames::frame(CONTINUATION, 0, 1, part);
            let mut said = 0;
            while said < 4000 && frames.say(&more).await {
                said += 1;
            }
            let code = frames.end().await;
            assert!(code.is_none_or(|code| code != 0), "{piece}: {code:?} after {said}");
        }
    }
    assert_eq!(sidecar.heads(), Vec::<String>::new());
    sidecar.lives("heads without end").await;
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused_with_the_reason() {
    let mut sidecar = Sidecar::open("limits: { header_bytes: 4KiB, headers: 20 }\n").await;
    for way in sidecar.ways {
        let mut frames = Frames::to(way).await;
        let long = "x".repeat(5000);
        let mut fields = frames::request("GET", "/").to_vec();
        fields.push(("x-long", &long));
        frames.say(frames::headers(1, END_STREAM, &fields)).await;
        let (status, body) = frames.answer(1).await.expect("an answer");
        assert_eq!(status, 431, "{body}");
        assert!(body.contains("\"code\":\"headers-too-large\""), "{body}");

        let mut fields = frames::request("GET", "/").to_vec();
        fields.extend([("x-a", "1"); 21]);
        frames.say(frames::headers(3, END_STREAM, &fields)).await;
        let (status, body) = frames.answer(3).await.expect("an answer");
        assert_eq!(status, 431, "{body}");
        assert!(body.contains("\"code\":\"headers-too-large\""), "{body}");

        // So is one of a gRPC call, in its own words.
        let mut fields = frames::request("POST", "/a.b/C").to_vec();
        fields.extend([("content-type", "application/grpc"), ("te", "trailers")]);
        fields.extend([("x-a", "1"); 21]);
        frames.say(frames::headers(5, END_STREAM, &fields)).await;
        assert_eq!(frames.answer(5).await, Ok((200, String::new())));

        // Far beyond the limit the connection may end; nothing of it is passed on either way.
        let vast = "x".repeat(15_000);
        let mut fields = frames::request("GET", "/").to_vec();
        fields.push(("x-vast", &vast));
        frames.say(frames::headers(7, END_STREAM, &fields)).await;
        let answer = frames.answer(7).await;
        assert!(matches!(answer, Ok((431, _)) | Err(_)), "{answer:?}");
        assert_eq!(sidecar.heads(), Vec::<String>::new());
    }
    sidecar.lives("large heads").await;
}

#[tokio::test]
async fn a_head_that_http_2_forbids_is_refused_and_never_passed_on() {
    let mut sidecar = Sidecar::open("").await;
    let [method, scheme, authority, path] = frames::request("GET", "/bad");
    let with = |field: (&'static str, &'static str)| vec![method, scheme, authority, path, field];
    let cases: Vec<(&str, Vec<(&str, &str)>)> = vec![
        ("a name in capitals", with(("X-Upper", "1"))),
        ("one capital", with(("x-upPer", "1"))),
        ("connection", with(("connection", "close"))),
        ("transfer-encoding", with(("transfer-encoding", "chunked"))),
        ("keep-alive", with(("keep-alive", "timeout=5"))),
        ("proxy-connection", with(("proxy-connection", "keep-alive"))),
        ("upgrade", with(("upgrade", "websocket"))),
        ("te", with(("te", "gzip"))),
        ("a space in a name", with(("x a", "1"))),
        ("a colon in a name", with(("x:a", "1"))),
        ("a line end in a name", with(("x\r\na", "1"))),
        ("no name", with(("", "1"))),
        ("a line end in a value", with(("x-a", "1\r\nx-b: 2"))),
        ("a bare LF in a value", with(("x-a", "1\nx-b: 2"))),
        ("a bare CR in a value", with(("x-a", "1\rx-b: 2"))),
        ("a NUL in a value", with(("x-a", "1\0"))),
        ("no path", vec![method, scheme, authority]),
        ("no path, and the host in a header", vec![method, scheme, ("host", "data")]),
        ("an empty path", vec![method, scheme, authority, (":path", "")]),
        ("a path without a slash", vec![method, scheme, authority, (":path", "bad")]),
        ("a star that is no OPTIONS", vec![method, scheme, authority, (":path", "*")]),
        (
            "a target as a path",
            vec![method, scheme, authority, (":path", "http://other.example/bad")],
        ),
        ("a blank in the path", vec![method, scheme, authority, (":path", "/bad HTTP/1.1")]),
        ("a line end in the path", vec![method, scheme, authority, (":path", "/bad\r\nx-a: 1")]),
        ("two paths", vec![method, scheme, authority, path, (":path", "/other")]),
        ("no method", vec![scheme, authority, path]),
        ("a blank in the method", vec![(":method", "GET /x"), scheme, authority, path]),
        ("a line end in the method", vec![(":method", "GET\r\n"), scheme, authority, path]),
        ("no scheme", vec![method, authority, path]),
        ("no host", vec![method, scheme, path]),
        ("two authorities", vec![method, scheme, authority, (":authority", "other"), path]),
        (
            "a line end in the authority",
            vec![method, scheme, (":authority", "data\r\nx-a: 1"), path],
        ),
        ("a pseudo-header after the others", vec![method, scheme, ("x-a", "1"), authority, path]),
        ("an unknown pseudo-header", vec![method, scheme, authority, path, (":x", "1")]),
        ("a status", vec![method, scheme, authority, path, (":status", "200")]),
        ("two hosts", vec![method, scheme, path, ("host", "data"), ("host", "other")]),
        ("a host that is none", vec![method, scheme, path, ("host", "data b, c")]),
        ("a host with a path", vec![method, scheme, path, ("host", "data/x")]),
        ("another host", with(("host", "other"))),
        ("a length and no body", with(("content-length", "5"))),
        ("a signed length", with(("content-length", "+0"))),
        ("a length that is none", with(("content-length", "x"))),
        (
            "two lengths",
            vec![method, scheme, authority, path, ("content-length", "0"), ("content-length", "1")],
        ),
    ];
    for way in sidecar.ways {
        for (what, fields) in &cases {
            let mut frames = Frames::to(way).await;
            frames.say(frames::headers(1, END_STREAM, fields)).await;
            let answer = frames.answer(1).await;
            assert!(
                matches!(&answer, Ok((400, _)) | Err(PROTOCOL_ERROR)),
                "{what} on {way}: {answer:?}"
            );
            assert_eq!(sidecar.heads(), Vec::<String>::new(), "{what}");
        }
    }
    sidecar.lives("forbidden heads").await;
}

#[tokio::test]
async fn a_body_that_is_not_as_long_as_was_said_is_nobodys_whole_body() {
    let mut sidecar = Sidecar::open("").await;
    let mut cases = 0;
    for way in sidecar.ways {
        for (said, pieces) in [
            ("10", &["12345"][..]),
            ("3", &["12345"]),
            ("6", &["123", "4567"]),
            ("4", &["12", "3"]),
        ] {
            let mut frames = Frames::to(way).await;
            let mut fields = frames::request("POST", "/body").to_vec();
            fields.push(("content-length", said));
            frames.say(frames::headers(1, 0, &fields)).await;
            for (n, piece) in pieces.iter().enumerate() {
                let last = if n + 1 == pieces.len() { END_STREAM } else { 0 };
                frames.say(frames::frame(DATA, last, 1, piece.as_bytes())).await;
            }
            let answer = frames.answer(1).await;
            assert!(
                matches!(answer, Ok((400 | 502, _)) | Err(PROTOCOL_ERROR)),
                "{said} {pieces:?}: {answer:?}"
            );
            cases += 1;
        }
        // A body that is reset in the middle.
        let mut frames = Frames::to(way).await;
        frames.say(frames::headers(1, 0, &frames::request("POST", "/body"))).await;
        frames.say(frames::frame(DATA, 0, 1, b"12345")).await;
        assert!(frames.settled().await);
        frames.say(frames::reset(1)).await;
        assert!(frames.settled().await);
    }
    assert!(cases > 0);
    sidecar.lives("bodies of another length").await;
    assert_eq!(sidecar.whole.load(Ordering::Relaxed), 0, "{:?}", sidecar.heads());
    // The same length said twice is one length on the next hop.
    for way in sidecar.ways {
        let mut frames = Frames::to(way).await;
        let mut fields = frames::request("POST", "/twice").to_vec();
        fields.extend([("content-length", "2"), ("content-length", "2")]);
        frames.say(frames::headers(1, 0, &fields)).await;
        frames.say(frames::frame(DATA, END_STREAM, 1, b"ok")).await;
        let answer = frames.answer(1).await;
        assert!(matches!(answer, Ok((200 | 400, _)) | Err(PROTOCOL_ERROR)), "{answer:?}");
    }
    for head in sidecar.heads().iter().filter(|head| head.contains(" /twice ")) {
        assert_eq!(head.matches("content-length").count(), 1, "{head}");
    }
}

#[tokio::test]
async fn frames_that_make_no_sense_end_their_connection_alone() {
    let mut sidecar = Sidecar::open("").await;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("DATA on the connection", frames::frame(DATA, 0, 0, b"x")),
        ("DATA on a stream nobody opened", frames::frame(DATA, 0, 7, b"x")),
        ("HEADERS on an even stream", frames::get(2, "/bad")),
        ("HEADERS on the connection", frames::get(0, "/bad")),
        ("HEADERS that depend on themselves", {
            let block =
                [&1u32.to_be_bytes()[..], &[0], &frames::block(&frames::request("GET", "/bad"))]
                    .concat();
            frames::frame(HEADERS, END_HEADERS | END_STREAM | 0x20, 1, &block)
        }),
        ("a stream below the last", [frames::get(5, "/alive"), frames::get(3, "/bad")].concat()),
        ("more padding than there is", frames::frame(HEADERS, END_HEADERS | 8, 1, &[255, 0])),
        ("CONTINUATION of nothing", frames::frame(CONTINUATION, END_HEADERS, 1, b"")),
        (
            "something between a head and its end",
            [
                frames::frame(
                    HEADERS,
                    END_STREAM,
                    1,
                    &frames::block(&frames::request("GET", "/bad")),
                ),
                frames::frame(PING, 0, 0, &[0; 8]),
            ]
            .concat(),
        ),
        (
            "a head that is no HPACK",
            frames::frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff; 64]),
        ),
        ("an index of no header", frames::frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x80])),
        (
            "a table without end",
            frames::frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x3f, 0xff, 0xff, 0xff, 0x7f]),
        ),
        ("SETTINGS on a stream", frames::frame(SETTINGS, 0, 1, &[])),
        ("SETTINGS cut short", frames::frame(SETTINGS, 0, 0, &[0; 5])),
        (
            "a window that is too large",
            frames::frame(SETTINGS, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff]),
        ),
        (
            "a window that overflows",
            frames::frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffffu32.to_be_bytes()),
        ),
        ("a window of nothing", frames::frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
        ("PING cut short", frames::frame(PING, 0, 0, &[0; 7])),
        ("RST_STREAM of nothing", frames::frame(RST_STREAM, 0, 9, &[0; 4])),
        ("RST_STREAM cut short", frames::frame(RST_STREAM, 0, 1, &[0; 3])),
        ("PUSH_PROMISE from a client", frames::frame(5, END_HEADERS, 1, &[0; 8])),
        ("a frame that is too large", frames::frame(DATA, 0, 1, &[0; 17_000])),
    ];
    for way in sidecar.ways {
        for (what, bytes) in &cases {
            let mut bystander = Frames::to(way).await;
            let mut frames = Frames::to(way).await;
            frames.say(bytes).await;
            // A connection or a stream ends; if neither, nothing is passed on.
            frames.settled().await;
            bystander.say(frames::get(1, "/alive")).await;
            assert_eq!(bystander.answer(1).await, Ok((200, "ok".to_owned())), "{what}");
            assert_eq!(sidecar.heads(), Vec::<String>::new(), "{what}");
        }
        for preface in [
            "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        ] {
            let said = support::talk(way, preface).await;
            assert!(!said.head.starts_with("HTTP/1.1 2"), "{said:?}");
        }
    }
    sidecar.lives("frames without sense").await;
}

#[tokio::test]
async fn answers_that_nobody_reads_are_not_piled_up() {
    let mut sidecar = Sidecar::open("").await;
    for way in sidecar.ways {
        let mut deaf = Frames::to(way).await;
        let flood = [frames::frame(PING, 0, 0, &[7; 8]), frames::frame(SETTINGS, 0, 0, &[])];
        let flood = flood.concat().repeat(1000);
        // Who never reads what is answered is not read from either, or is shown out.
        let mut taken = 0;
        while let Ok(true) = timeout(Duration::from_secs(1), deaf.say(&flood)).await {
            taken += 1;
            assert!(taken < 2000, "four million frames were taken and their answers kept");
        }
        until("others are served", async || get(way, "data", "/alive").await.status() == 200).await;
    }
    sidecar.lives("pings that nobody reads the answer of").await;
}
