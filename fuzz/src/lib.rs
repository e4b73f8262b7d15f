//! One function per parser of foreign bytes: what must hold whatever arrives.
//!
//! The fuzz targets call these, and `tests/parsers.rs` runs them under proptest on stable. None only asks that nothing panics: each states
//! something that a wrong parser breaks, mostly that bytes mean the same however they are cut, and that what was read prints back to
//! what reads the same.

use std::sync::Arc;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::{BufMut, BytesMut};
use infrar::{
    api::Events,
    http1::{
        BodyDecoder, HeadLimits, ParsedRequest, ParsedResponse, Piece, encode_chunk,
        encode_headers, encode_last_chunk, encode_request_line, parse_request, parse_response,
        request_framing, response_framing,
    },
    identity::{Jwks, KeySet, Trusted, Verifier, normalise},
    wire::TraceContext,
};

/// A parser under test: its name, what must hold, and bytes that reach its inside.
pub struct Target {
    /// The name of the fuzz target.
    pub name: &'static str,
    /// What must hold for any bytes.
    pub holds: fn(&[u8]),
    /// Inputs worth changing a little.
    pub seeds: &'static [&'static [u8]],
}

/// Every parser of foreign bytes that is our own.
pub const TARGETS: &[Target] = &[
    Target { name: "http1_request", holds: http1_request, seeds: HTTP1_REQUESTS },
    Target { name: "http1_response", holds: http1_response, seeds: HTTP1_RESPONSES },
    Target { name: "chunked", holds: chunked, seeds: CHUNKED },
    Target { name: "traceparent", holds: traceparent, seeds: TRACEPARENTS },
    Target { name: "path", holds: path, seeds: PATHS },
    Target { name: "token", holds: token, seeds: TOKENS },
    Target { name: "events", holds: events, seeds: EVENTS },
];

const HTTP1_REQUESTS: &[&[u8]] = &[
    b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    b"POST /query?x=1 HTTP/1.1\r\nHost: data-intelligence\r\nContent-Length: 5\r\n\r\nhello",
    b"PUT http://data-intelligence/a%2Fb HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: y\r\n\r\n",
    b"CONNECT data-intelligence:443 HTTP/1.1\r\nhost: data-intelligence:443\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, Upgrade, x-y\r\nupgrade: websocket\r\nx-y: 1\r\nte: trailers, gzip\r\n\r\n",
    b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
];

const HTTP1_RESPONSES: &[&[u8]] = &[
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x\r\n\r\n2\r\nok\r\n0\r\nx: 1\r\n\r\n",
    b"HTTP/1.0 302\r\nlocation: /\r\n\r\nuntil the end",
];

const CHUNKED: &[&[u8]] = &[
    b"0\r\n\r\n",
    b"5\r\nhello\r\n1a;name=value\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\n\r\n",
    b"3\r\nabc\r\n000\r\ngrpc-status: 0\r\nx-y: z\r\n\r\nwhat follows",
    b"ffffffffffffffff\r\n",
];

const TRACEPARENTS: &[&[u8]] = &[
    b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    b"01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
    b"00-00000000000000000000000000000000-00f067aa0ba902b7-00",
];

const PATHS: &[&[u8]] = &[
    b"/",
    b"/query",
    b"/a/./b/../c//d/%2e%2E/e%2Ff/%7Eg",
    b"/%252e%252e/x",
    b"/a;x=1/..;/b",
    b"/\\..\\a",
];

const TOKENS: &[&[u8]] = &[
    b"{\"alg\":\"ES256\",\"kid\":\"k\",\"typ\":\"at+jwt\"}\0{\"iss\":\"https://issuer.example\",\"aud\":\"reports\",\"sub\":\"web\",\"exp\":4000000000}\0signature",
    b"{\"alg\":\"none\"}\0{\"iss\":\"https://issuer.example\"}\0",
    b"{\"alg\":\"HS256\",\"kid\":\"k\",\"jku\":\"https://elsewhere.example\"}\0{\"iss\":\"https://issuer.example\",\"aud\":[\"reports\",\"x\"],\"exp\":1e30}\0s",
];

const EVENTS: &[&[u8]] = &[
    b"id: 7\nevent: change\ndata: {\"revision\":7}\n\n",
    b": keep-alive\r\n\r\ndata\rdata: x\r\r\nid: a\0b\n\n",
];

/// The two ways of receiving `data`: at once, and cut where its first byte says.
fn cut(data: &[u8]) -> (&[u8], &[u8]) {
    let at = data.first().map_or(0, |first| usize::from(*first) * data.len() / 256);
    data.split_at(at)
}

/// A request head reads the same however it is cut, and prints to what reads the same.
pub fn http1_request(data: &[u8]) {
    let limits = HeadLimits::default();
    let mut whole = BytesMut::from(data);
    let once = parse_request(&mut whole, limits);

    let (first, second) = cut(data);
    let mut pieces = BytesMut::from(first);
    let mut twice = parse_request(&mut pieces, limits);
    if matches!(twice, Ok(None)) {
        pieces.extend_from_slice(second);
        twice = parse_request(&mut pieces, limits);
    } else {
        pieces.extend_from_slice(second);
    }
    assert_eq!(once.is_err(), twice.is_err(), "a cut decides whether a head is refused");
    let (Ok(once), Ok(twice)) = (once, twice) else { return };
    assert_eq!(once.is_some(), twice.is_some());
    let (Some(once), Some(twice)) = (once, twice) else { return };
    assert_eq!(request_parts(&once), request_parts(&twice));
    assert_eq!(whole, pieces, "a cut decides where the head ends");

    let mut printed = BytesMut::new();
    encode_request_line(&once.method, &once.uri.to_string(), &mut printed);
    encode_headers(once.fields.iter(), &mut printed);
    if !printed.ends_with(b"\r\n\r\n") {
        printed.put_slice(b"\r\n");
    }
    let again = parse_request(&mut printed, HeadLimits { bytes: limits.bytes * 2, ..limits });
    if once.fields.contains(&http::header::HOST) {
        let again = again.expect("we print what we accept").expect("whole");
        assert_eq!((&once.method, &once.fields), (&again.method, &again.fields));
        assert!(printed.is_empty(), "a printed head is one head");
    }
    if let Ok(framing) = request_framing(once.version, &once.fields) {
        body(framing, &whole);
    }
}

fn request_parts(
    head: &ParsedRequest,
) -> (&http::Method, &http::Uri, http::Version, &infrar::wire::Fields) {
    (&head.method, &head.uri, head.version, &head.fields)
}

/// A response head reads the same however it is cut; its body as its framing says.
pub fn http1_response(data: &[u8]) {
    let limits = HeadLimits::default();
    let mut whole = BytesMut::from(data);
    let once = parse_response(&mut whole, limits);
    let (first, second) = cut(data);
    let mut pieces = BytesMut::from(first);
    let mut twice = parse_response(&mut pieces, limits);
    pieces.extend_from_slice(second);
    if matches!(twice, Ok(None)) {
        twice = parse_response(&mut pieces, limits);
    }
    assert_eq!(once.is_err(), twice.is_err(), "a cut decides whether a head is refused");
    let (Ok(once), Ok(twice)) = (once, twice) else { return };
    assert_eq!(once.is_some(), twice.is_some());
    let (Some(once), Some(twice)) = (once, twice) else { return };
    assert_eq!(response_parts(&once), response_parts(&twice));
    assert_eq!(whole, pieces, "a cut decides where the head ends");
    for method in [http::Method::GET, http::Method::HEAD] {
        if let Ok(framing) = response_framing(&method, once.status, &once.fields) {
            body(framing, &whole);
        }
    }
}

fn response_parts(
    head: &ParsedResponse,
) -> (http::StatusCode, http::Version, &infrar::wire::Fields) {
    (head.status, head.version, &head.fields)
}

/// A chunked body carries the same bytes however it is cut, and what it carried can be printed and read again.
pub fn chunked(data: &[u8]) {
    body(infrar::http1::Framing::Chunked, data);

    let mut printed = BytesMut::new();
    for part in data.chunks(300) {
        encode_chunk(part, &mut printed);
    }
    encode_last_chunk(None, &mut printed);
    let read = read_body(infrar::http1::Framing::Chunked, &[&printed]);
    assert_eq!(read, Ok((data.to_vec(), true, Vec::new())));
}

/// Reads a body at once and cut in two: the bytes, the end and what is left over must be the same.
fn body(framing: infrar::http1::Framing, data: &[u8]) {
    let (first, second) = cut(data);
    let once = read_body(framing, &[data]);
    let twice = read_body(framing, &[first, second]);
    assert_eq!(once, twice, "a cut changes the body");
}

/// The bytes, whether the end was reached, and what was left over; or what came before the refusal.
fn read_body(
    framing: infrar::http1::Framing,
    pieces: &[&[u8]],
) -> Result<(Vec<u8>, bool, Vec<u8>), Vec<u8>> {
    let mut decoder = BodyDecoder::new(framing, HeadLimits::default());
    let (mut buffer, mut read) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.next(&mut buffer) {
                Ok(Piece::Data(part)) => read.extend_from_slice(&part),
                Ok(Piece::Trailers(_)) => {}
                Ok(Piece::More | Piece::End) => break,
                Err(_) => return Err(read),
            }
        }
    }
    Ok((read, decoder.is_done(), if decoder.is_done() { buffer.to_vec() } else { Vec::new() }))
}

/// A trace that is continued keeps its id; one that cannot be read is none.
pub fn traceparent(data: &[u8]) {
    let Some(trace) = TraceContext::parse(data) else { return };
    let next = trace.next_hop();
    let again = TraceContext::parse(next.as_bytes()).expect("we send what we read");
    assert_eq!(again.trace_id(), trace.trace_id());
    assert_ne!(next.as_bytes(), data, "the parent is ours now");
}

/// A normal path is normal, and has no segment that another reader would resolve.
pub fn path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(normal) = normalise(text) else { return };
    assert_eq!(normalise(&normal).as_deref(), Ok(&*normal), "normalising twice");
    if normal != "*" {
        assert!(normal.starts_with('/'));
        assert!(!normal.contains("//"), "{normal}");
        assert!(normal.split('/').all(|part| part != "." && part != ".."), "{normal}");
    }
}

/// Whatever a token says: without the key nobody makes one that is accepted. `head NUL claims NUL signature`, or the token itself.
pub fn token(data: &[u8]) {
    let keys = KeySet::from_json(&serde_json::json!({ "keys": [{
        "kty": "EC", "crv": "P-256", "kid": "k", "alg": "ES256", "use": "sig",
        "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
    }] }))
    .expect("the key of RFC 7517, appendix A");
    let issuer: Arc<str> = Arc::from("https://issuer.example");
    let verifier = Verifier::new(vec![Trusted {
        issuer: Arc::clone(&issuer),
        ours: true,
        audiences: Vec::new(),
        keys: Jwks::fixed(issuer, keys),
    }]);
    let now = 1_800_000_000;
    assert!(verifier.verify(data, &["reports"], now).is_err(), "a token out of thin air");
    let assembled: Vec<String> =
        data.splitn(3, |byte| *byte == 0).map(|part| BASE64_URL_SAFE_NO_PAD.encode(part)).collect();
    let assembled = assembled.join(".");
    assert!(verifier.verify(assembled.as_bytes(), &["reports"], now).is_err(), "{assembled}");
}

/// Server-sent events are the same however the stream is cut.
pub fn events(data: &[u8]) {
    let read = |pieces: &[&[u8]]| {
        let (mut events, mut read) = (Events::default(), Vec::new());
        for piece in pieces {
            let pushed = events.push(piece);
            read.extend(std::iter::from_fn(|| events.pop()));
            if pushed.is_err() {
                return Err(read);
            }
        }
        Ok(read)
    };
    let (first, second) = cut(data);
    assert_eq!(read(&[data]), read(&[first, second]), "a cut changes the events");
}
