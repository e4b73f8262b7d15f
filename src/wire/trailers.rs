//! What may stand behind a body.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, header};
use http_body::Frame;

/// The last frame of a body that ends with `trailers`; `None` when nothing is left of them. What frames, routes or proves
/// something belongs in the head alone (RFC 9110 §6.5.1): whoever merges trailers into the head must not be fooled.
#[must_use]
pub fn trailers(mut trailers: HeaderMap) -> Option<Frame<Bytes>> {
    let barred: Vec<HeaderName> =
        trailers.keys().filter(|name| is_of_the_head(name)).cloned().collect();
    for name in barred {
        trailers.remove(name);
    }
    (!trailers.is_empty()).then(|| Frame::trailers(trailers))
}

fn is_of_the_head(name: &HeaderName) -> bool {
    let text = name.as_str();
    // Names of ours, also as servers read them that make `-` of `_`.
    let ours = text.strip_prefix("infrar").is_some_and(|rest| rest.starts_with(['-', '_']));
    ours || matches!(text, "keep-alive" | "proxy-connection" | "http2-settings")
        || [
            // Framing, and what ends at a hop.
            header::CONTENT_LENGTH,
            header::TRANSFER_ENCODING,
            header::TRAILER,
            header::TE,
            header::CONNECTION,
            header::UPGRADE,
            // Routing.
            header::HOST,
            header::VIA,
            header::FORWARDED,
            header::MAX_FORWARDS,
            header::EXPECT,
            // Credentials.
            header::AUTHORIZATION,
            header::PROXY_AUTHORIZATION,
            header::PROXY_AUTHENTICATE,
            header::WWW_AUTHENTICATE,
            header::COOKIE,
            header::SET_COOKIE,
        ]
        .contains(name)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn map(names: &[&'static str]) -> HeaderMap {
        let value = HeaderValue::from_static("1");
        names.iter().map(|name| (HeaderName::from_static(name), value.clone())).collect()
    }

    #[test]
    fn what_belongs_in_the_head_does_not_come_behind_the_body() {
        let barred = ["infrar-caller", "infrar_scopes", "content-length", "host", "authorization"];
        assert!(trailers(map(&barred)).is_none());
        let mixed = [&barred[..], &["grpc-status", "x-sum", "infrared"]].concat();
        let left = trailers(map(&mixed)).unwrap().into_trailers().unwrap();
        assert_eq!(left, map(&["grpc-status", "x-sum", "infrared"]));
    }
}
