//! What stands in headers, streams and settings: traces, events, names, places, addresses.

use infrar::{
    api::Events,
    model::{EndpointId, Origin, Place, Scope, ScopeSet, ServiceName, span},
    wire::TraceContext,
};

use super::cut;

pub const TRACEPARENTS: &[&[u8]] = &[
    b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    b"01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
    b"00-00000000000000000000000000000000-00f067aa0ba902b7-00",
];

pub const EVENTS: &[&[u8]] = &[
    b"id: 7\nevent: change\ndata: {\"revision\":7}\n\n",
    b": keep-alive\r\n\r\ndata\rdata: x\r\r\nid: a\0b\n\n",
];

/// Text that people and peers write.
pub const WORDS: &[&[u8]] = &[
    b"data-intelligence",
    b"aws_us_east_1",
    b"aws/us-east-1",
    b"read:data write:query",
    b"1m 30s",
    b"366d",
    b"P1DT2H",
    b"15050003040m",
];

/// Addresses as `url`, `internal_url` and `Host` have them.
pub const ORIGINS: &[&[u8]] = &[
    b"https://data.example",
    b"https://Data.Example:8443/",
    b"http://127.0.0.1:80",
    b"http://[::1]:9000",
    b"10.1.1.10",
    b"10.1.1.10:8443",
    b"[fd00::1]:443",
    b"data.internal:443/",
    b"https://u:p@a/b?c#d",
];

/// A trace that is continued keeps its id; one that cannot be read is none.
pub fn traceparent(data: &[u8]) {
    let Some(trace) = TraceContext::parse(data) else { return };
    let next = trace.next_hop();
    let again = TraceContext::parse(next.as_bytes()).expect("we send what we read");
    assert_eq!(again.trace_id(), trace.trace_id());
    assert_ne!(next.as_bytes(), data, "the parent is ours now");
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

/// A word that is accepted prints as what is accepted again, and as the same.
pub fn words(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(name) = text.parse::<ServiceName>() {
        assert_eq!(name.as_str(), text);
        assert!(format!("{name}.infrar").parse::<http::uri::Authority>().is_ok());
    }
    if let Ok(id) = text.parse::<EndpointId>() {
        assert_eq!(id.as_str(), text);
    }
    if let Ok(place) = text.parse::<Place>() {
        assert_eq!(place.to_string().parse(), Ok(place.clone()), "{text}");
        assert_eq!(format!("{}/{}", place.provider(), place.region()).parse(), Ok(place));
    }
    if let Ok(scope) = text.parse::<Scope>() {
        assert_eq!(scope.as_str(), text);
        assert!(http::HeaderValue::from_str(text).is_ok(), "a scope goes into a header");
    }
    if let Ok(scopes) = ScopeSet::parse_list(text) {
        assert_eq!(ScopeSet::parse_list(&scopes.to_string()), Ok(scopes.clone()));
        assert!(scopes.iter().all(|scope| scopes.contains(scope)));
    }
    if let Ok(span) = span::parse(text) {
        assert_eq!(span::parse(&span::print(span)), Ok(span), "{text}");
    }
}

/// An address prints as what reads the same; what it leaves out is taken from its base, and nothing else is.
pub fn origin(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(origin) = text.parse::<Origin>() {
        assert_eq!(origin.to_string().parse(), Ok(origin.clone()), "{text}");
        let host = origin.authority();
        assert!(http::HeaderValue::from_str(&host).is_ok(), "{host:?} goes into a header");
        if let Ok(authority) = host.parse::<http::uri::Authority>() {
            assert_eq!(authority.host(), origin.host().to_string(), "{text}");
        }
    }
    let base: Origin = "https://base.example:9999".parse().expect("an address");
    let Ok(relative) = Origin::parse_relative(text, &base) else { return };
    let written = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let absolute: Origin = written.parse().expect("only scheme and port may be left out");
    assert_eq!(relative.scheme(), absolute.scheme(), "{text}");
    assert_eq!(relative.host(), absolute.host(), "{text}");
    let authority = text.strip_suffix('/').unwrap_or(text).parse::<http::uri::Authority>();
    if !text.contains("://")
        && let Ok(authority) = authority
    {
        assert_eq!(relative.port(), authority.port_u16().unwrap_or(9999), "{text}");
    }
}
