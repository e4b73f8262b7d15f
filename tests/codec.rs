//! Our HTTP/1.1 codec beside hyper's: what we accept, hyper reads alike; what we refuse and hyper does not is written
//! down here, one by one.
//!
//! The fuzz targets `hyper_request` and `hyper_response` ask the same of any bytes; here messages are put together from
//! parts over which parsers are known to differ.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "the codecs are compared with assertions"
)]

use http::Method;
use infrar::http1::HeadError;
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, TestRunner},
};

#[path = "../fuzz/src/peers.rs"]
#[expect(unreachable_pub, reason = "it is a part of the fuzzer's crate")]
mod peers;

use peers::{
    hyper_answer, hyper_request, hyper_requests, hyper_response, read_requests, read_response,
};

/// Heads and bodies that hyper repairs and we refuse, each with our reason. Whatever is added here must make us the
/// stricter one.
const REPAIRED_REQUESTS: &[(&str, &str, HeadError)] = &[
    ("lines that end in a bare LF", "GET / HTTP/1.1\nHost: a\n\n", HeadError::LineEnd),
    ("one line that does", "GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n", HeadError::LineEnd),
    ("an empty line of a bare LF ahead", "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", HeadError::LineEnd),
    ("no host", "GET / HTTP/1.1\r\n\r\n", HeadError::Host),
    ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", HeadError::Host),
    ("a host that is none", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", HeadError::Host),
    ("a host that ends a quoted string", "GET / HTTP/1.1\r\nHost: a\"\r\n\r\n", HeadError::Host),
    (
        "a host as the target of a GET",
        "GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        HeadError::Grammar("the request target"),
    ),
    (
        "a path as the target of a CONNECT",
        "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
        HeadError::Grammar("the request target"),
    ),
    (
        "a fragment",
        "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
        HeadError::Grammar("the request target"),
    ),
    (
        "a user",
        "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        HeadError::Grammar("the request target"),
    ),
    (
        "the same length twice",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        HeadError::Length,
    ),
    (
        "a length beside chunks",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HeadError::Length,
    ),
    (
        "chunks beside a length",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
        HeadError::Length,
    ),
    (
        "chunks within another coding",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HeadError::Coding,
    ),
    (
        "chunks said twice",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HeadError::Coding,
    ),
    (
        "white space behind a chunk's size",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1 \r\nx\r\n0\r\n\r\n",
        HeadError::Grammar("a chunk size"),
    ),
    (
        "a chunk's size of seventeen digits",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n00000000000000001\r\nx\r\n0\r\n\r\n",
        HeadError::Grammar("a chunk size"),
    ),
    (
        "a NUL in a chunk's extension",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;\0\r\nx\r\n0\r\n\r\n",
        HeadError::Grammar("a chunk size"),
    ),
];

/// The same for answers.
const REPAIRED_RESPONSES: &[(&str, &str, HeadError)] = &[
    ("lines that end in a bare LF", "HTTP/1.1 200 OK\nContent-Length: 0\n\n", HeadError::LineEnd),
    (
        "the same length twice",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        HeadError::Length,
    ),
    (
        "a length beside chunks",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HeadError::Length,
    ),
    (
        "another coding than chunks",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
        HeadError::Coding,
    ),
    (
        "two lengths where there is no body",
        "HTTP/1.1 204 No Content\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        HeadError::Length,
    ),
];

/// What both refuse: nothing here may come to be accepted by us.
const REFUSED_REQUESTS: &[&str] = &[
    "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\n folded: 1\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\nX y: 1\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\n: 1\r\n\r\n",
    "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /\t HTTP/1.1\r\nHost: a\r\n\r\n",
    " GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "G\u{e4}T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx",
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\nxy",
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\nx",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\nx",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;a\nb\r\nx\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\nx\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nbad trailer\r\n\r\n",
];

#[test]
fn what_hyper_repairs_we_refuse_for_a_reason() {
    for (what, text, why) in REPAIRED_REQUESTS {
        let ours = read_requests(text.as_bytes());
        assert_eq!((ours.messages.len(), ours.refused), (0, Some(*why)), "{what}: {text:?}");
        let theirs = hyper_requests(text.as_bytes());
        assert_eq!(theirs.len(), 1, "hyper has become as strict about {what}: move it: {text:?}");
    }
    for (what, text, why) in REPAIRED_RESPONSES {
        let ours = read_response(&Method::GET, text.as_bytes());
        assert_eq!((ours.messages.len(), ours.refused), (0, Some(*why)), "{what}: {text:?}");
        let theirs = hyper_answer(&Method::GET, text.as_bytes());
        assert!(theirs.is_some(), "hyper has become as strict about {what}: move it: {text:?}");
    }
}

#[test]
fn what_hyper_refuses_we_refuse() {
    for text in REFUSED_REQUESTS {
        let ours = read_requests(text.as_bytes());
        assert!(ours.messages.is_empty() && ours.refused.is_some(), "{text:?}: {ours:?}");
        assert!(hyper_requests(text.as_bytes()).is_empty(), "hyper accepts {text:?}");
    }
    let text = b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(read_response(&Method::GET, text).refused, Some(HeadError::Coding));
    assert_eq!(hyper_answer(&Method::GET, text), None);
}

#[test]
fn requests_in_a_row_are_the_same_requests_to_both() {
    let whole = "POST /a?b=c HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
         GET http://a:80/%7e HTTP/1.1\r\nHost: a\r\nX:\t 1 \t\r\nx: 2\r\n\r\n\
         PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: Chunked\r\n\r\n2;q=\"1\"\r\nab\r\n000\r\nt: 1\r\n\r\n\
         OPTIONS * HTTP/1.1\r\nHost:\r\n\r\n\r\n\
         HEAD / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n\
         DELETE / HTTP/1.1\r\nHost: a\r\nConnection: x, CLOSE\r\n\r\n\
         GET /never HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(read_requests(whole.as_bytes()).messages.len(), 6);
    hyper_request(whole.as_bytes());
    for cut in 0..whole.len() {
        hyper_request(&whole.as_bytes()[..cut]);
    }
}

#[test]
fn no_request_of_odd_parts_is_read_in_two_ways() {
    let lines = (vec(select(FRAMING), 0..3), vec(select(LINES), 0..3));
    let first = (select(METHODS), select(TARGETS), select(VERSIONS));
    let request = (first, lines, select(ENDS), vec(select(BODIES), 0..4));
    let request = request.prop_map(|((method, target, version), (framing, lines), end, bodies)| {
        let lines = [framing, lines].concat().concat();
        format!("{method} {target} {version}\r\n{lines}{end}{}", bodies.concat())
    });
    runner()
        .run(&vec(request, 1..3), |requests| {
            hyper_request(requests.concat().as_bytes());
            Ok(())
        })
        .unwrap_or_else(|fault| panic!("{fault}"));
}

#[test]
fn no_response_of_odd_parts_is_read_in_two_ways() {
    let lines = (vec(select(FRAMING), 0..3), vec(select(LINES), 0..3));
    let response = (vec(select(INTERIM), 0..2), select(STATUSES), lines, vec(select(BODIES), 0..4));
    let response = response.prop_map(|(interim, status, (framing, lines), bodies)| {
        let lines = [framing, lines].concat().concat();
        format!("{}{status}\r\n{lines}\r\n{}", interim.concat(), bodies.concat())
    });
    runner()
        .run(&response, |response| {
            hyper_response(response.as_bytes());
            Ok(())
        })
        .unwrap_or_else(|fault| panic!("{fault}"));
}

fn runner() -> TestRunner {
    TestRunner::new(Config { cases: 4096, failure_persistence: None, ..Config::default() })
}

const METHODS: &[&str] =
    &["GET", "POST", "POST", "PUT", "HEAD", "OPTIONS", "CONNECT", "get", "M-SEARCH", "P\u{e4}T"];
const TARGETS: &[&str] = &[
    "/",
    "/a?b=c",
    "/%2e%2e/x;y",
    "//a",
    "*",
    "a:443",
    "http://a",
    "http://a?q",
    "HTTPS://a:1/b",
    "/a#b",
    "/\u{fc}",
    "/a\"<>",
    "",
];
const VERSIONS: &[&str] =
    &["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.2", "http/1.1", "HTTP/1.1 "];
const ENDS: &[&str] = &["Host: a\r\n\r\n", "Host: a\r\n\r\n", "Host: a\r\n\r\n", "\r\n", "\n", ""];
const FRAMING: &[&str] = &[
    "Content-Length: 0\r\n",
    "Content-Length: 3\r\n",
    "content-length:3\r\n",
    "Content-Length: 03\r\n",
    "Content-Length: 3 \r\n",
    "Content-Length: 3,3\r\n",
    "Content-Length: +3\r\n",
    "Content-Length : 3\r\n",
    "Content-Length: 3\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: chunked\r\n",
    "transfer-encoding:\tCHUNKED\r\n",
    "Transfer-Encoding: gzip, chunked\r\n",
    "Transfer-Encoding: chunked, identity\r\n",
    "Transfer-Encoding: \"chunked\"\r\n",
    "Transfer-Encoding:\r\n chunked\r\n",
    "Transfer-Encoding: ,chunked\r\n",
    "Transfer-Encoding\x0b: chunked\r\n",
    "Transfer_Encoding: chunked\r\n",
];
const LINES: &[&str] = &[
    "X: 1\r\n",
    "x:2\r\n",
    "X: \r\n",
    "X: \u{e4}\r\n",
    "Host: b\r\n",
    "Connection: close\r\n",
    "Connection: keep-alive, X\r\n",
    "Connection: content-length\r\n",
    "Upgrade: websocket\r\nConnection: upgrade\r\n",
    "Expect: 100-continue\r\n",
    "Trailer: t\r\n",
    " folded\r\n",
    "bare\rreturn: 1\r\n",
    "no colon\r\n",
];
const BODIES: &[&str] = &[
    "abc",
    "3\r\nabc\r\n",
    "003;x=y\r\nabc\r\n",
    "3 ;x\r\nabc\r\n",
    "3\nabc\r\n",
    "4\r\nabc\r\n",
    "0\r\n\r\n",
    "0\r\n\r\n",
    "0\r\nt: 1\r\n\r\n",
    "0\r\ncontent-length: 1\r\n\r\n",
    "0\r\nt : 1\r\n\r\n",
    "\r\n",
    "GET /inner HTTP/1.1\r\nHost: a\r\n\r\n",
];
const INTERIM: &[&str] = &[
    "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n",
    "HTTP/1.1 102\r\nContent-Length: 3\r\n\r\n",
];
const STATUSES: &[&str] = &[
    "HTTP/1.1 200 OK",
    "HTTP/1.1 200",
    "HTTP/1.1 200 ",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 204 No Content",
    "HTTP/1.1 205 Reset",
    "HTTP/1.1 304 Not Modified",
    "HTTP/1.1 999 \u{e4}",
    "HTTP/1.1 099 Low",
    "HTTP/1.1 20 Short",
    "HTTP/1.2 200 OK",
];
