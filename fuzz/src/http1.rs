//! Heads, bodies and chunks.

use bytes::{BufMut, BytesMut};
use infrar::http1::{
    BodyDecoder, Framing, HeadLimits, ParsedRequest, ParsedResponse, Piece, encode_chunk,
    encode_headers, encode_last_chunk, encode_request_line, parse_request, parse_response,
    request_framing, response_framing,
};

use super::cut;

pub const HTTP1_REQUESTS: &[&[u8]] = &[
    b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    b"POST /query?x=1 HTTP/1.1\r\nHost: data-intelligence\r\nContent-Length: 5\r\n\r\nhello",
    b"PUT http://data-intelligence/a%2Fb HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: y\r\n\r\n",
    b"CONNECT data-intelligence:443 HTTP/1.1\r\nhost: data-intelligence:443\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, Upgrade, x-y\r\nupgrade: websocket\r\nx-y: 1\r\nte: trailers, gzip\r\n\r\n",
    b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
];

pub const HTTP1_RESPONSES: &[&[u8]] = &[
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x\r\n\r\n2\r\nok\r\n0\r\nx: 1\r\n\r\n",
    b"HTTP/1.0 302\r\nlocation: /\r\n\r\nuntil the end",
];

pub const CHUNKED: &[&[u8]] = &[
    b"0\r\n\r\n",
    b"5\r\nhello\r\n1a;name=value\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\n\r\n",
    b"3\r\nabc\r\n000\r\ngrpc-status: 0\r\nx-y: z\r\n\r\nwhat follows",
    b"ffffffffffffffff\r\n",
];

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
    encode_request_line(&once.method, &target(&once), &mut printed);
    encode_headers(once.fields.iter(), &mut printed);
    printed.put_slice(b"\r\n");
    let again = parse_request(&mut printed, HeadLimits { bytes: limits.bytes * 2, ..limits });
    if once.fields.contains(&http::header::HOST) {
        let again = again.expect("we print what we accept").expect("whole");
        assert_eq!((&once.method, &once.fields), (&again.method, &again.fields));
        assert_eq!((once.uri.path(), once.uri.query()), (again.uri.path(), again.uri.query()));
        assert!(printed.is_empty(), "a printed head is one head");
    }
    if let Ok(framing) = request_framing(once.version, &once.fields) {
        body(framing, &whole);
    }
}

/// The target as it is sent on: to the host that was asked for, a path; to a tunnel, the host.
fn target(head: &ParsedRequest) -> String {
    match head.uri.path_and_query() {
        Some(path) => path.as_str().to_owned(),
        None => head.uri.to_string(),
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
        if let Ok(framing) = response_framing(&method, once.version, once.status, &once.fields) {
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
    body(Framing::Chunked, data);

    let mut printed = BytesMut::new();
    for part in data.chunks(300) {
        encode_chunk(part, &mut printed);
    }
    encode_last_chunk(None, &mut printed);
    let read = read_body(Framing::Chunked, &[&printed]);
    assert_eq!(read, Ok((data.to_vec(), true, Vec::new())));
}

/// Reads a body at once and cut in two: the bytes, the end and what is left over must be the same.
fn body(framing: Framing, data: &[u8]) {
    let (first, second) = cut(data);
    let once = read_body(framing, &[data]);
    let twice = read_body(framing, &[first, second]);
    assert_eq!(once, twice, "a cut changes the body");
}

/// The bytes, whether the end was reached, and what was left over; or what came before the refusal.
fn read_body(framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, bool, Vec<u8>), Vec<u8>> {
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
