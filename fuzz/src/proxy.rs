//! Which service a host means, and what a hop does to headers.

use std::collections::BTreeMap;

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, request::Parts};
use infrar::{
    http1::{HeadLimits, parse_request},
    identity::Action,
    model::ServiceName,
    proxy::{Hop, Rejection, service_named},
    wire::{Body, Request, TraceContext},
};

/// Authorities as `Host`, `CONNECT` and absolute targets have them.
pub const AUTHORITIES: &[&[u8]] = &[
    b"data-intelligence",
    b"Data-Intelligence.Infrar.Internal:80",
    b"data.localhost.:8080",
    b"user:pass@data.infrar",
    b"[::1]:8080",
    b"[data.infrar]:8080",
    b"data.example.com:443",
];

/// Request heads whose headers trip hops over.
pub const HEADS: &[&[u8]] = &[
    b"GET /ws HTTP/1.1\r\nhost: data\r\nconnection: keep-alive, Upgrade, x-y\r\nupgrade: websocket\r\nx-y: 1\r\nte: trailers, gzip\r\nkeep-alive: 5\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: data:8080\r\ncontent-length: 1\r\nconnection: host, via, traceparent, x-request-id, content-length, authorization\r\nauthorization: Bearer x\r\nx-request-id: 7\r\ntraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\ntracestate: a=b\r\n\r\n",
    b"GET http://data/ HTTP/1.0\r\nvia: 1.1 infrar-1, 1.1 other\r\nvia: 2 infrar-2\r\nforwarded: for=192.0.2.9;host=\"x\"\r\ninfrar-caller: admin\r\ninfrar-scopes: all\r\ninfrar-claims: e30\r\ninfrar_caller: admin\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: [fd00::1]:80\r\nproxy-connection: close\r\nproxy-authorization: Basic eA==\r\ntransfer-encoding: chunked\r\nhttp2-settings: x\r\nte: trailers\r\n\r\n",
];

/// A service has four names, in either case and with any port; a host is the same that `http` reads.
pub fn authority(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let named = service_named(text);
    assert!(!named.bytes().any(|byte| byte.is_ascii_uppercase()), "{text}");
    if let Ok(authority) = text.parse::<http::uri::Authority>() {
        let host = authority.host().to_ascii_lowercase();
        let host = host.strip_suffix('.').unwrap_or(&host);
        let known = [".infrar.internal", ".infrar", ".localhost"];
        let bare = known.iter().find_map(|suffix| host.strip_suffix(suffix)).unwrap_or(host);
        assert_eq!(named, bare, "{text}");
    }
    if let Ok(name) = text.parse::<ServiceName>() {
        for suffix in ["", ".infrar", ".infrar.internal", ".localhost"] {
            for rest in ["", ":80", ".", ".:8080"] {
                assert_eq!(service_named(&format!("{name}{suffix}{rest}")), name.as_str());
            }
        }
    }
}

/// What is for one connection ends at a hop, what is for the other end passes unchanged, what is ours is ours alone.
pub fn headers(data: &[u8]) {
    let Ok(Some(head)) = parse_request(&mut BytesMut::from(data), HeadLimits::default()) else {
        return;
    };
    let (method, uri, version, fields) = (head.method, head.uri, head.version, head.fields);
    let asked = || Request {
        method: method.clone(),
        uri: uri.clone(),
        version,
        fields: fields.clone(),
        body: Body::Empty,
    };
    let before = parts(asked());

    let hop = Hop::new(None, false);
    let mut out = asked();
    match hop.dress(&mut out) {
        Ok(()) => {
            let again = hop.dress(&mut out);
            let out = parts(out);
            passed(&before, &out);
            let asked = before.uri.authority().map(|it| it.as_str().to_owned());
            let asked =
                asked.or_else(|| Some(before.headers.get("host")?.to_str().ok()?.to_owned()));
            forwarded(&out.headers, &asked.expect("a call names a host"), None);
            assert_eq!(again, Err(Rejection::Loop), "it has been here");
        }
        Err(refused) => assert!(matches!(refused, Rejection::Loop | Rejection::BadRequest(_))),
    }

    let hop = Hop::new(Some("[2001:db8::1]:443".parse().expect("an address")), true);
    let mut out = asked();
    let grant = Action::Public.open().expect("a public path is open");
    match hop.undress(&mut out, grant, None) {
        Ok(()) => {
            let out = parts(out);
            passed(&before, &out);
            let host = out.headers.get("host").map_or("", |host| host.to_str().expect("ASCII"));
            forwarded(&out.headers, host, Some("[2001:db8::1]"));
        }
        Err(refused) => assert!(matches!(refused, Rejection::Loop | Rejection::BadRequest(_))),
    }
}

/// The same with the headers as a map, in which they are compared.
fn parts(request: Request) -> Parts {
    let mut parts = http::Request::new(()).into_parts().0;
    (parts.method, parts.uri, parts.version) = (request.method, request.uri, request.version);
    parts.headers = request.fields.into();
    parts
}

/// What a hop writes itself.
const OURS: &[&str] = &["via", "forwarded", "traceparent", "tracestate", "x-request-id", "host"];
/// What nobody may say but infrar.
const IDENTITY: &[&str] = &[
    "infrar-caller",
    "infrar-scopes",
    "infrar-claims",
    "infrar_caller",
    "infrar_scopes",
    "infrar_claims",
];
/// What ends at a hop without being listed (RFC 9110 §7.6.1, and the credentials of a proxy).
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "proxy-connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "upgrade",
    "http2-settings",
    "proxy-authorization",
    "proxy-authenticate",
];
/// What a client cannot make a hop drop.
const KEPT: &[&str] = &["content-length", "authorization"];

fn passed(before: &Parts, after: &Parts) {
    assert_eq!((&before.method, &before.uri), (&after.method, &after.uri));
    let listed: Vec<String> = before
        .headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(|name| String::from_utf8_lossy(name.trim_ascii()).to_ascii_lowercase())
        .collect();
    let upgrades = after.headers.contains_key(header::UPGRADE);
    for name in before.headers.keys() {
        let (text, values) = (name.as_str(), |map: &HeaderMap| all(map, name));
        if OURS.contains(&text) {
            continue;
        }
        let gone = IDENTITY.contains(&text)
            || HOP_BY_HOP.contains(&text)
            || (listed.iter().any(|one| one == text) && !KEPT.contains(&text));
        match text {
            "te" => assert!(["", "trailers"].contains(&joined(&after.headers, name).as_str())),
            "connection" if upgrades => assert_eq!(after.headers[name], "upgrade"),
            "upgrade" if upgrades => assert_eq!(all(&after.headers, name).len(), 1),
            _ if gone => {
                assert!(!after.headers.contains_key(name), "{name} is not for the next hop")
            }
            _ => assert_eq!(values(&before.headers), values(&after.headers), "{name}"),
        }
    }
    for name in after.headers.keys().map(HeaderName::as_str) {
        assert!(OURS.contains(&name) || before.headers.contains_key(name), "{name} is new");
    }
    if upgrades {
        let asked = before.headers.contains_key(header::UPGRADE)
            && listed.iter().any(|name| name == "upgrade")
            && before.version == http::Version::HTTP_11
            && before.method != Method::CONNECT;
        assert!(asked, "an upgrade nobody asked for");
    }
    let traces = all(&after.headers, &HeaderName::from_static("traceparent"));
    assert!(matches!(&traces[..], [one] if TraceContext::parse(one.as_bytes()).is_some()));
    assert!(after.headers.get("x-request-id").is_some_and(|id| !id.is_empty()));
    let hops = |map| all(map, &header::VIA).len();
    let told = if listed.iter().any(|name| name == "via") { 0 } else { hops(&before.headers) };
    assert!(hops(&after.headers) > told, "this hop is in `via`");
}

fn all(map: &HeaderMap, name: &HeaderName) -> Vec<HeaderValue> {
    map.get_all(name).iter().cloned().collect()
}

fn joined(map: &HeaderMap, name: &HeaderName) -> String {
    let texts = map.get_all(name).iter().map(|value| value.to_str().unwrap_or("?"));
    texts.collect::<Vec<_>>().join(",")
}

/// The last element of `forwarded` is ours and says exactly this (RFC 7239 §4).
fn forwarded(map: &HeaderMap, host: &str, node: Option<&str>) {
    let last =
        map.get_all(header::FORWARDED).iter().next_back().expect("this hop is in `forwarded`");
    let pairs = element(last.to_str().expect("ASCII")).expect("one element");
    assert_eq!(pairs.get("host").map(String::as_str), Some(host), "{last:?}");
    assert_eq!(pairs.get("for").map(String::as_str), node, "{last:?}");
    assert_eq!(pairs.len(), if node.is_some() { 3 } else { 2 }, "{last:?}");
}

/// Reads one `forwarded-element` by the letter.
fn element(text: &str) -> Option<BTreeMap<String, String>> {
    let mut pairs = BTreeMap::new();
    let mut rest = text;
    loop {
        let (name, value) = rest.split_once('=')?;
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => unquoted(quoted)?,
            None => {
                let end = value.find(';').unwrap_or(value.len());
                let (value, after) = value.split_at(end);
                let token =
                    |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
                (value.bytes().all(token).then(|| value.to_owned())?, after)
            }
        };
        if pairs.insert(name.to_owned(), value).is_some() {
            return None;
        }
        match after.strip_prefix(';') {
            Some(more) => rest = more,
            None => return after.is_empty().then_some(pairs),
        }
    }
}

/// The text of a quoted string, and what follows it.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((value, text.get(at + 1..)?)),
            '\\' => value.push(letters.next()?.1),
            other => value.push(other),
        }
    }
    None
}
