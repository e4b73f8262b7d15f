//! Headers on their way through: hop-by-hop, `via`, `forwarded`, trace context, credentials on and off.
//!
//! RFC 9110 §7.6.1 says which headers end at each hop; everything else passes untouched. What infrar adds is written
//! once per request, from values that a snapshot has prepared.

use std::{cell::RefCell, net::SocketAddr};

use http::{HeaderName, HeaderValue, Method, Version, header};

use crate::{
    proxy::reject::Rejection,
    wire::{Fields, TraceContext, request_id},
};

/// More hops through infrar than any sane path has.
const MOST_HOPS: usize = 8;

/// `x-request-id`.
pub(super) static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
static TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
static PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
static HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// Who calls, as the token said it.
pub(super) static CALLER: HeaderName = HeaderName::from_static("infrar-caller");
/// What the caller may do here.
pub(super) static SCOPES: HeaderName = HeaderName::from_static("infrar-scopes");
/// The token's claims, base64url JSON.
pub(super) static CLAIMS: HeaderName = HeaderName::from_static("infrar-claims");

/// This process and direction, as `via` names it.
#[derive(Clone, Debug)]
pub(super) struct Via {
    /// `infrar-ID`.
    name: String,
    /// `1.1 infrar-ID`.
    http1: HeaderValue,
    /// `2 infrar-ID`.
    http2: HeaderValue,
}

impl Via {
    /// A name nobody else has.
    #[must_use]
    pub(super) fn random() -> Self {
        Self::named(format!("infrar-{:08x}", fastrand::u32(..)))
    }

    /// The same name again, in memory of its own: workers do not share reference counts.
    #[must_use]
    pub(super) fn copy(&self) -> Self {
        Self::named(self.name.clone())
    }

    fn named(name: String) -> Self {
        let value = |version| {
            HeaderValue::try_from(format!("{version} {name}"))
                .unwrap_or_else(|_hex_only| HeaderValue::from_static("infrar"))
        };
        Self { http1: value("1.1"), http2: value("2"), name }
    }

    /// Refuses a request that has been here, or through too many of us; adds this hop otherwise.
    ///
    /// # Errors
    /// [`Rejection::Loop`].
    pub(super) fn pass(&self, version: Version, fields: &mut Fields) -> Result<(), Rejection> {
        let mut ours = 0;
        for value in fields.all(&header::VIA) {
            let text = value.to_str().unwrap_or_default();
            for hop in text.split(',').filter_map(|hop| hop.trim().split(' ').nth(1)) {
                if hop == self.name {
                    return Err(Rejection::Loop);
                }
                ours += usize::from(hop.starts_with("infrar-"));
            }
        }
        if ours > MOST_HOPS {
            return Err(Rejection::Loop);
        }
        let value = if version == Version::HTTP_2 { &self.http2 } else { &self.http1 };
        fields.append(header::VIA, value.clone());
        Ok(())
    }
}

/// Whether a comma-separated header names `word`.
pub(super) fn lists(fields: &Fields, name: &HeaderName, word: &str) -> bool {
    list(fields.all(name), word)
}

/// Whether comma-separated values name `word`.
pub(super) fn list<'a>(mut values: impl Iterator<Item = &'a HeaderValue>, word: &str) -> bool {
    values.any(|value| {
        value
            .as_bytes()
            .split(|b| *b == b',')
            .any(|w| w.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
    })
}

/// The protocol that the client asks to switch to, if it does.
pub(super) fn upgrade(method: &Method, version: Version, fields: &Fields) -> Option<HeaderValue> {
    let asked = version == Version::HTTP_11
        && *method != Method::CONNECT
        && fields.contains(&header::UPGRADE)
        && lists(fields, &header::CONNECTION, "upgrade");
    if !asked {
        return None;
    }
    // h2c by upgrade was dropped by RFC 9113 §3.1: nobody needs it, and it would hide the protocol from us.
    let protocols: Vec<&[u8]> = fields
        .all(&header::UPGRADE)
        .flat_map(|value| value.as_bytes().split(|b| *b == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|protocol| !protocol.is_empty() && !protocol.eq_ignore_ascii_case(b"h2c"))
        .collect();
    let wanted = (!protocols.is_empty()).then(|| protocols.join(&b", "[..]))?;
    HeaderValue::try_from(wanted).ok()
}

/// Removes what ends at this hop: RFC 9110 §7.6.1, and what `connection` lists.
///
/// `te: trailers` is kept: it is how a gRPC client says that it reads trailers, and we pass them on.
pub(super) fn strip_hop_by_hop(fields: &mut Fields) {
    // Most heads have nothing to strip; one look at each name costs less than looking every one up.
    if !fields.names().any(is_hop_by_hop) {
        return;
    }
    let listed: Vec<HeaderName> = fields
        .all(&header::CONNECTION)
        .flat_map(|value| value.as_bytes().split(|b| *b == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .filter(|name| !is_relied_on(name))
        .collect();
    let trailers = lists(fields, &header::TE, "trailers");
    fields.retain(|name| !is_hop_by_hop(name) && !listed.contains(name));
    if trailers {
        fields.append(header::TE, HeaderValue::from_static("trailers"));
    }
}

/// Whether we rely on a header: a client must not make us drop it by `connection` (RFC 9110 §7.6.1, last paragraph).
fn is_relied_on(name: &HeaderName) -> bool {
    [&header::HOST, &header::CONTENT_LENGTH, &header::AUTHORIZATION, &header::VIA]
        .into_iter()
        .chain([&header::FORWARDED, &TRACEPARENT, &TRACESTATE, &REQUEST_ID])
        .any(|relied_on| relied_on == name)
}

/// Whether a header may end at this hop. Names of another length are told apart without a comparison.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    match name.as_str().len() {
        2 => name == header::TE,
        7 => name == header::UPGRADE,
        10 => name == header::CONNECTION || name == KEEP_ALIVE,
        14 => name == HTTP2_SETTINGS,
        16 => name == PROXY_CONNECTION,
        17 => name == header::TRANSFER_ENCODING,
        18 => name == header::PROXY_AUTHENTICATE,
        19 => name == header::PROXY_AUTHORIZATION,
        _ => false,
    }
}

/// The request's trace: continued where the caller named a valid one, begun otherwise.
pub(super) fn continue_trace(fields: &mut Fields) -> TraceContext {
    let found = fields.get(&TRACEPARENT).and_then(|value| TraceContext::parse(value.as_bytes()));
    let trace = found.unwrap_or_else(|| {
        // §3.3: tracestate without a valid traceparent means nothing.
        fields.remove(&TRACESTATE);
        TraceContext::begin()
    });
    fields.set(TRACEPARENT.clone(), trace.next_hop());
    trace
}

/// The request's id: kept where the caller sent one, made otherwise.
pub(super) fn identify(fields: &mut Fields) -> HeaderValue {
    if let Some(id) = fields.get(&REQUEST_ID).filter(|id| id.len() <= 128 && !id.is_empty()) {
        return id.clone();
    }
    let id = request_id();
    fields.set(REQUEST_ID.clone(), id.clone());
    id
}

/// Says in `forwarded` (RFC 7239) whom a connection's requests come from, which host they ask for, and how. Requests of
/// one connection mostly ask for one host, so the last value is kept.
#[derive(Debug)]
pub(super) struct Forwarded {
    peer: Option<SocketAddr>,
    tls: bool,
    last: RefCell<Option<(String, HeaderValue)>>,
}

impl Forwarded {
    /// For a connection from `peer`; `None` where the client is the application itself.
    pub(super) fn new(peer: Option<SocketAddr>, tls: bool) -> Self {
        Self { peer, tls, last: RefCell::default() }
    }

    /// Adds this hop.
    pub(super) fn add(&self, fields: &mut Fields, host: &str) {
        let mut last = self.last.borrow_mut();
        if let Some((known, value)) = &*last
            && known == host
        {
            fields.append(header::FORWARDED, value.clone());
            return;
        }
        if let Ok(value) = HeaderValue::try_from(self.element(host)) {
            fields.append(header::FORWARDED, value.clone());
            *last = Some((host.to_owned(), value));
        }
    }

    fn element(&self, host: &str) -> String {
        let mut text = String::with_capacity(host.len() + 64);
        if let Some(peer) = self.peer {
            let ip = peer.ip().to_canonical();
            // §6: IPv6 stands in brackets and quotes.
            let node = if ip.is_ipv6() { format!("for=\"[{ip}]\";") } else { format!("for={ip};") };
            text.push_str(&node);
        }
        let token = host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
        text.push_str("host=");
        if token && !host.is_empty() {
            text.push_str(host);
        } else {
            // A client must not end the string and go on in our name.
            text.push('"');
            for letter in host.chars() {
                text.extend(matches!(letter, '"' | '\\').then_some('\\'));
                text.push(letter);
            }
            text.push('"');
        }
        text.push_str(if self.tls { ";proto=https" } else { ";proto=http" });
        text
    }
}

/// Removes the names that only infrar may say, also as servers read them that make `-` of `_` (CGI's variables).
pub(super) fn strip_identity(fields: &mut Fields) {
    if fields.names().any(is_identity) {
        fields.retain(|name| !is_identity(name));
    }
}

fn is_identity(name: &HeaderName) -> bool {
    // Names of another length are told apart without a comparison.
    let name = name.as_str().as_bytes();
    name.len() == 13
        && matches!(name.split_at(7), (b"infrar-" | b"infrar_", b"caller" | b"scopes" | b"claims"))
}

/// Whether the caller speaks gRPC, so that refusals must be said in its language.
pub(super) fn is_grpc(fields: &Fields) -> bool {
    fields.get(&header::CONTENT_TYPE).is_some_and(|value| {
        let bytes = value.as_bytes();
        bytes.starts_with(b"application/grpc") && matches!(bytes.get(16), None | Some(b'+' | b';'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> Fields {
        let mut map = Fields::new();
        for (name, value) in lines {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn what_ends_at_a_hop_is_removed_and_the_rest_is_not() {
        let mut map = headers(&[
            ("connection", "close, X-Private, authorization, via, traceparent, x-request-id"),
            ("via", "1.1 a"),
            ("traceparent", "t"),
            ("x-request-id", "7"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers, gzip"),
            ("authorization", "Bearer x"),
            ("x-other", "2"),
        ]);
        strip_hop_by_hop(&mut map);
        assert_eq!(
            map,
            headers(&[
                ("via", "1.1 a"),
                ("traceparent", "t"),
                ("x-request-id", "7"),
                ("authorization", "Bearer x"),
                ("x-other", "2"),
                ("te", "trailers"),
            ])
        );
    }

    #[test]
    fn a_request_that_comes_back_is_refused() {
        let via = Via::random();
        let mut map = Fields::new();
        via.pass(Version::HTTP_11, &mut map).unwrap();
        assert_eq!(via.pass(Version::HTTP_11, &mut map), Err(Rejection::Loop));
        assert!(Via::random().pass(Version::HTTP_2, &mut map).is_ok());
        let mut far = headers(&[(
            "via",
            "1.1 infrar-1, 1.1 infrar-2, 1.1 infrar-3, 1.1 other, 1.1 infrar-4",
        )]);
        for _hop in 0..4 {
            Via::random().pass(Version::HTTP_11, &mut far).unwrap();
        }
        assert!(Via::random().pass(Version::HTTP_11, &mut far).is_ok());
        assert_eq!(Via::random().pass(Version::HTTP_11, &mut far), Err(Rejection::Loop));
    }

    #[test]
    fn forwarded_names_the_peer_the_host_and_the_scheme() {
        let mut map = Fields::new();
        Forwarded::new(Some("192.0.2.1:999".parse().unwrap()), false).add(&mut map, "data");
        Forwarded::new(Some("[2001:db8::1]:999".parse().unwrap()), true).add(&mut map, "data:8443");
        Forwarded::new(None, false).add(&mut map, "a\";for=\"b");
        let all: Vec<_> = map.all("forwarded").map(|v| v.to_str().unwrap()).collect();
        assert_eq!(
            all,
            [
                "for=192.0.2.1;host=data;proto=http",
                "for=\"[2001:db8::1]\";host=\"data:8443\";proto=https",
                "host=\"a\\\";for=\\\"b\";proto=http",
            ]
        );
    }

    #[test]
    fn an_upgrade_to_h2c_is_not_one() {
        let asks = |protocol| {
            let map = headers(&[("connection", "Upgrade"), ("upgrade", protocol)]);
            upgrade(&Method::GET, Version::HTTP_11, &map)
        };
        assert_eq!(asks("websocket").unwrap(), "websocket");
        assert_eq!(asks("h2c"), None);
        assert_eq!(asks("H2C, websocket ,chat").unwrap(), "websocket, chat");
        assert_eq!(asks(" , h2c,"), None);
        let map = headers(&[("connection", "Upgrade"), ("upgrade", "h2c"), ("upgrade", "chat")]);
        assert_eq!(upgrade(&Method::GET, Version::HTTP_11, &map).unwrap(), "chat");
    }

    #[test]
    fn nobody_speaks_for_infrar_also_not_with_an_underscore() {
        let mut map = headers(&[
            ("infrar-caller", "a"),
            ("infrar_caller", "a"),
            ("infrar_scopes", "a"),
            ("infrar_claims", "a"),
            ("infrar-client", "kept"),
            ("infrared-lamp", "kept"),
        ]);
        strip_identity(&mut map);
        assert_eq!(map, headers(&[("infrar-client", "kept"), ("infrared-lamp", "kept")]));
    }

    #[test]
    fn grpc_is_known_by_its_content_type() {
        assert!(is_grpc(&headers(&[("content-type", "application/grpc+proto")])));
        assert!(is_grpc(&headers(&[("content-type", "application/grpc")])));
        assert!(!is_grpc(&headers(&[("content-type", "application/grpc-web")])));
        assert!(!is_grpc(&headers(&[])));
    }
}
