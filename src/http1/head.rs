//! Request and response heads: bytes in, `http` types out.
//!
//! `httparse` reads the grammar; the checks around it refuse what it repairs (lines that end in a bare LF, RFC 9112
//! §2.2) and what only shows between lines (a second `Host`). Values are slices of the one buffer they arrived in.

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header};

use crate::wire::Fields;

/// How large a head may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// Bytes of the whole head.
    pub bytes: usize,
    /// Header lines.
    pub headers: usize,
}

impl Default for HeadLimits {
    /// Envoy's 60 KiB and 100 headers.
    fn default() -> Self {
        Self { bytes: 60 * 1024, headers: 100 }
    }
}

/// Why a head was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// More bytes or lines than [`HeadLimits`] allows.
    #[error("the head is larger than {} bytes or {} headers", .0.bytes, .0.headers)]
    TooLarge(HeadLimits),
    /// A line ends in a bare LF, or a CR stands alone (§2.2).
    #[error("a line does not end in CR LF")]
    LineEnd,
    /// The first line, a name or a value breaks the grammar; obs-fold and a space before the colon count (§5).
    #[error("the head breaks the grammar: {0}")]
    Grammar(&'static str),
    /// Another version than HTTP/1.0 or HTTP/1.1.
    #[error("the version is neither HTTP/1.0 nor HTTP/1.1")]
    Version,
    /// No `Host` in HTTP/1.1, more than one, or one that is no host (§3.2).
    #[error("a request has exactly one host header, which names a host")]
    Host,
    /// `content-length` twice, not a number, or beside `transfer-encoding` (§6.1, §6.3).
    #[error("the length of the body is ambiguous")]
    Length,
    /// Another transfer coding than a single `chunked` (§6.1).
    #[error("the only transfer coding is chunked")]
    Coding,
}

/// A request head and what it says about the connection.
#[derive(Debug)]
pub struct ParsedRequest {
    /// The method.
    pub method: Method,
    /// The target in any of the four forms (§3.2).
    pub uri: Uri,
    /// HTTP/1.0 or HTTP/1.1.
    pub version: Version,
    /// The header lines.
    pub fields: Fields,
}

/// A response head.
#[derive(Debug)]
pub struct ParsedResponse {
    /// The status.
    pub status: StatusCode,
    /// HTTP/1.0 or HTTP/1.1.
    pub version: Version,
    /// The header lines.
    pub fields: Fields,
}

/// Most heads have fewer lines than this; they are parsed without an allocation.
const INLINE_HEADERS: usize = 64;

fn offset(within: &[u8], part: &[u8]) -> (usize, usize) {
    let start = part.as_ptr().addr().wrapping_sub(within.as_ptr().addr());
    (start, start.wrapping_add(part.len()))
}

fn grammar(error: httparse::Error) -> HeadError {
    match error {
        httparse::Error::HeaderName => HeadError::Grammar("a header name"),
        httparse::Error::HeaderValue => HeadError::Grammar("a header value"),
        httparse::Error::NewLine => HeadError::LineEnd,
        httparse::Error::Status => HeadError::Grammar("the status line"),
        httparse::Error::Token => HeadError::Grammar("the first line"),
        httparse::Error::TooManyHeaders => HeadError::TooLarge(HeadLimits::default()),
        httparse::Error::Version => HeadError::Version,
    }
}

/// Finds the empty line that ends the head, refusing any line feed that no carriage return precedes.
///
/// `Ok(None)` means more bytes are needed.
fn end_of_head(bytes: &[u8], limits: HeadLimits) -> Result<Option<usize>, HeadError> {
    let mut line = 0;
    for at in memchr::memchr_iter(b'\n', bytes) {
        if at == 0 || bytes.get(at - 1) != Some(&b'\r') {
            return Err(HeadError::LineEnd);
        }
        let end = at + 1;
        if end - line == 2 && line > 0 {
            return if end > limits.bytes {
                Err(HeadError::TooLarge(limits))
            } else {
                Ok(Some(end))
            };
        }
        line = end;
    }
    if bytes.len() > limits.bytes { Err(HeadError::TooLarge(limits)) } else { Ok(None) }
}

/// Takes the head off the buffer; all of it, mostly, so that nothing stays behind to hold the memory.
fn take(buffer: &mut BytesMut, end: usize) -> Bytes {
    if end == buffer.len() {
        std::mem::take(buffer).freeze()
    } else {
        buffer.split_to(end).freeze()
    }
}

fn version(minor: Option<u8>) -> Version {
    if minor == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 }
}

/// A value that `httparse` has let through.
#[expect(
    unsafe_code,
    reason = "looking at every byte a second time costs more than parsing it did: 2 us for a head with a token"
)]
fn checked(value: Bytes) -> HeaderValue {
    // SAFETY: the bytes must be such as `HeaderValue::from_bytes` takes: no control character but the tab, no DEL. That is
    // exactly what httparse lets through (its HEADER_VALUE_MAP; `values_are_such_as_http_takes` below tries every byte).
    unsafe { HeaderValue::from_maybe_shared_unchecked(value) }
}

fn collect(head: &Bytes, lines: &[httparse::Header<'_>]) -> Result<Fields, HeadError> {
    // Room for what the proxy adds, so that the list is allocated once.
    let mut fields = Fields::with_capacity(lines.len() + 8);
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes())
            .map_err(|_source| HeadError::Grammar("a header name"))?;
        let (start, end) = offset(head, line.value);
        // An empty value may lie anywhere, or nowhere.
        let value = if line.value.is_empty() { Bytes::new() } else { head.slice(start..end) };
        fields.append(name, checked(value));
    }
    Ok(fields)
}

/// Takes one request head off the front of `buffer`. `Ok(None)`: more bytes are needed, nothing was taken.
///
/// # Errors
/// [`HeadError`] for anything that is refused; the connection must then be closed, because nobody can say where the
/// next request would begin.
pub fn parse_request(
    buffer: &mut BytesMut,
    limits: HeadLimits,
) -> Result<Option<ParsedRequest>, HeadError> {
    // §2.2: an empty line before the request line is ignored.
    while buffer.starts_with(b"\r\n") {
        bytes::Buf::advance(buffer, 2);
    }
    let Some(end) = end_of_head(buffer, limits)? else { return Ok(None) };
    let head = take(buffer, end);
    let mut inline = [const { MaybeUninit::uninit() }; INLINE_HEADERS];
    let mut spilled = Vec::new();
    let mut parsed = httparse::Request::new(&mut []);
    let mut outcome = parsed.parse_with_uninit_headers(&head, &mut inline);
    if matches!(outcome, Err(httparse::Error::TooManyHeaders)) {
        spilled.resize_with(limits.headers, MaybeUninit::uninit);
        parsed = httparse::Request::new(&mut []);
        outcome = parsed.parse_with_uninit_headers(&head, &mut spilled);
    }
    match outcome {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(HeadError::Grammar("the head")),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooLarge(limits)),
        Err(error) => return Err(grammar(error)),
    }
    if parsed.headers.len() > limits.headers {
        return Err(HeadError::TooLarge(limits));
    }
    let method = Method::from_bytes(parsed.method.unwrap_or_default().as_bytes())
        .map_err(|_source| HeadError::Grammar("the method"))?;
    let (start, stop) = offset(&head, parsed.path.unwrap_or_default().as_bytes());
    let version = version(parsed.version);
    let uri = Uri::from_maybe_shared(head.slice(start..stop))
        .map_err(|_source| HeadError::Grammar("the request target"))?;
    if !is_target(&method, &uri, head.get(start..stop).unwrap_or_default()) {
        return Err(HeadError::Grammar("the request target"));
    }
    let fields = collect(&head, parsed.headers)?;
    check_host(version, &fields)?;
    Ok(Some(ParsedRequest { method, uri, version, fields }))
}

/// §3.2: the method decides which form a target has. A fragment, which `http` would drop, and a user, which it would keep,
/// do not belong in a request (RFC 9110 §4.2.4).
fn is_target(method: &Method, uri: &Uri, target: &[u8]) -> bool {
    let form = match (uri.scheme(), uri.authority()) {
        (None, Some(_)) => *method == Method::CONNECT,
        (None, None) if target == b"*" => *method == Method::OPTIONS,
        (_, _) => *method != Method::CONNECT,
    };
    let user = || uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
    form && memchr::memchr(b'#', target).is_none() && !user()
}

/// §3.2: exactly one `Host` in HTTP/1.1, at most one in HTTP/1.0, and it must be one.
fn check_host(version: Version, fields: &Fields) -> Result<(), HeadError> {
    let mut hosts = fields.all(&header::HOST);
    let good = match hosts.next() {
        Some(host) => hosts.next().is_none() && is_host(host.as_bytes()),
        None => version == Version::HTTP_10,
    };
    if good { Ok(()) } else { Err(HeadError::Host) }
}

/// Whether every byte may stand in `uri-host [ ":" port ]` (RFC 3986 §3.2.2).
#[must_use]
pub fn is_host(host: &[u8]) -> bool {
    let may_stand =
        |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(byte);
    host.iter().all(may_stand)
}

/// Takes one response head off the front of `buffer`. `Ok(None)`: more bytes are needed, nothing was taken.
///
/// # Errors
/// [`HeadError`] for anything that is refused; the connection cannot be used again.
pub fn parse_response(
    buffer: &mut BytesMut,
    limits: HeadLimits,
) -> Result<Option<ParsedResponse>, HeadError> {
    let Some(end) = end_of_head(buffer, limits)? else { return Ok(None) };
    let head = take(buffer, end);
    let mut inline = [const { MaybeUninit::uninit() }; INLINE_HEADERS];
    let mut spilled = Vec::new();
    let config = httparse::ParserConfig::default();
    let mut parsed = httparse::Response::new(&mut []);
    let mut outcome = config.parse_response_with_uninit_headers(&mut parsed, &head, &mut inline);
    if matches!(outcome, Err(httparse::Error::TooManyHeaders)) {
        spilled.resize_with(limits.headers, MaybeUninit::uninit);
        parsed = httparse::Response::new(&mut []);
        outcome = config.parse_response_with_uninit_headers(&mut parsed, &head, &mut spilled);
    }
    match outcome {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(HeadError::Grammar("the head")),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooLarge(limits)),
        Err(error) => return Err(grammar(error)),
    }
    if parsed.headers.len() > limits.headers {
        return Err(HeadError::TooLarge(limits));
    }
    let status = StatusCode::from_u16(parsed.code.unwrap_or(0))
        .map_err(|_source| HeadError::Grammar("the status code"))?;
    let version = version(parsed.version);
    Ok(Some(ParsedResponse { status, version, fields: collect(&head, parsed.headers)? }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(text: &str) -> Result<Option<ParsedRequest>, HeadError> {
        parse_request(&mut BytesMut::from(text), HeadLimits::default())
    }

    #[test]
    fn a_request_is_read_and_what_follows_it_is_left() {
        let mut buffer =
            BytesMut::from("\r\nPOST /query?a=b HTTP/1.1\r\nHost: data\r\nX: 1\r\n\r\nbody");
        let head = parse_request(&mut buffer, HeadLimits::default()).unwrap().unwrap();
        assert_eq!((head.method, head.version), (Method::POST, Version::HTTP_11));
        assert_eq!(head.uri, "/query?a=b");
        assert_eq!(head.fields.get("x").unwrap(), "1");
        assert_eq!(&buffer[..], b"body");
    }

    #[test]
    fn half_a_head_is_not_an_error() {
        assert!(request("GET / HTTP/1.1\r\nHost: a\r\n").unwrap().is_none());
        assert!(request("").unwrap().is_none());
    }

    #[test]
    fn what_two_parsers_could_read_differently_is_refused() {
        for bad in [
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\r\n\r\n",
            "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
            "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
            "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\n: a\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\";for=\"b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
            "GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET * HTTP/1.1\r\nHost: a\r\n\r\n",
            "CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n",
            "CONNECT http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET http://u:p@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            assert!(request(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_form_of_a_target_is_read() {
        for good in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET http://a:80?b HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: [fd00::1%25x]:80\r\n\r\n",
            "GET / HTTP/1.1\r\nHost:\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
            "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
            "CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443\r\n\r\n",
        ] {
            assert!(request(good).is_ok_and(|head| head.is_some()), "{good:?}");
        }
    }

    #[test]
    fn a_head_beyond_its_limits_is_too_large() {
        let limits = HeadLimits { bytes: 200, headers: 3 };
        let many = "GET / HTTP/1.1\r\nHost: a\r\nA: 1\r\nB: 1\r\nC: 1\r\n\r\n";
        let long = format!("GET / HTTP/1.1\r\nHost: a\r\nA: {}", "x".repeat(300));
        for text in [many, &long] {
            let outcome = parse_request(&mut BytesMut::from(text), limits);
            assert_eq!(outcome.unwrap_err(), HeadError::TooLarge(limits));
        }
        let hundred: String = (0..99).map(|n| format!("h{n}: x\r\n")).collect();
        assert!(request(&format!("GET / HTTP/1.1\r\nHost: a\r\n{hundred}\r\n")).unwrap().is_some());
        assert!(request(&format!("GET / HTTP/1.1\r\nHost: a\r\nz: z\r\n{hundred}\r\n")).is_err());
    }

    #[test]
    fn values_are_such_as_http_takes() {
        for byte in 0..=u8::MAX {
            let mut buffer = BytesMut::from(&b"GET / HTTP/1.1\r\nHost: a\r\nX: a"[..]);
            buffer.extend_from_slice(&[byte]);
            buffer.extend_from_slice(b"b\r\n\r\n");
            let taken = parse_request(&mut buffer, HeadLimits::default());
            let valid = HeaderValue::from_bytes(&[b'a', byte, b'b']).is_ok();
            assert_eq!(taken.is_ok(), valid, "byte {byte}");
        }
    }

    #[test]
    fn a_response_is_read_without_a_reason_phrase() {
        let mut buffer = BytesMut::from("HTTP/1.1 204\r\nServer: x\r\n\r\n");
        let head = parse_response(&mut buffer, HeadLimits::default()).unwrap().unwrap();
        assert_eq!(head.status, StatusCode::NO_CONTENT);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _request = parse_request(&mut BytesMut::from(&bytes[..]), HeadLimits::default());
            let _response = parse_response(&mut BytesMut::from(&bytes[..]), HeadLimits::default());
        }

        #[test]
        fn how_the_bytes_are_cut_does_not_change_what_is_read(cut in 0usize..70) {
            let text = b"POST /query HTTP/1.1\r\nHost: data\r\nContent-Length: 3\r\nX-Y: z\r\n\r\nabc";
            let mut buffer = BytesMut::from(&text[..cut.min(text.len())]);
            let first = parse_request(&mut buffer, HeadLimits::default()).unwrap();
            let head = match first {
                Some(head) => head,
                None => {
                    buffer.extend_from_slice(&text[cut.min(text.len())..]);
                    parse_request(&mut buffer, HeadLimits::default()).unwrap().unwrap()
                }
            };
            prop_assert_eq!(head.uri.path(), "/query");
            prop_assert_eq!(head.fields.len(), 3);
        }
    }
}
