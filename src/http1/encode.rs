//! Heads as bytes: `http` types in, one contiguous write out.

use bytes::{BufMut, BytesMut};
use http::{HeaderName, HeaderValue, Method, StatusCode};

/// Writes `METHOD target HTTP/1.1`.
pub fn encode_request_line(method: &Method, target: &str, out: &mut BytesMut) {
    out.reserve(method.as_str().len() + target.len() + 16);
    out.put_slice(method.as_str().as_bytes());
    out.put_u8(b' ');
    if target.starts_with('?') {
        // An absolute target without a path was asked for: §3.2.1 writes one.
        out.put_u8(b'/');
    }
    out.put_slice(target.as_bytes());
    out.put_slice(b" HTTP/1.1\r\n");
}

/// Writes `HTTP/1.1 status reason`.
pub fn encode_status_line(status: StatusCode, out: &mut BytesMut) {
    if status == StatusCode::OK {
        out.put_slice(b"HTTP/1.1 200 OK\r\n");
        return;
    }
    out.put_slice(b"HTTP/1.1 ");
    out.put_slice(status.as_str().as_bytes());
    out.put_u8(b' ');
    out.put_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    out.put_slice(b"\r\n");
}

/// Writes header lines without the empty line that ends a head.
pub fn encode_headers<'a>(
    lines: impl Iterator<Item = (&'a HeaderName, &'a HeaderValue)>,
    out: &mut BytesMut,
) {
    for (name, value) in lines {
        let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
        out.reserve(name.len() + value.len() + 4);
        out.extend_from_slice(name);
        out.extend_from_slice(b": ");
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Fields;

    #[test]
    fn a_head_is_written_as_it_is_read() {
        let mut fields = Fields::new();
        for (name, value) in [("host", "a"), ("x", "1"), ("x", "2")] {
            fields.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let mut out = BytesMut::new();
        encode_request_line(&Method::GET, "/p?q", &mut out);
        encode_headers(fields.iter(), &mut out);
        assert_eq!(&out[..], b"GET /p?q HTTP/1.1\r\nhost: a\r\nx: 1\r\nx: 2\r\n");
        let mut out = BytesMut::new();
        encode_request_line(&Method::GET, "?q", &mut out);
        assert_eq!(&out[..], b"GET /?q HTTP/1.1\r\n");
        let mut out = BytesMut::new();
        encode_status_line(StatusCode::NOT_FOUND, &mut out);
        assert_eq!(&out[..], b"HTTP/1.1 404 Not Found\r\n");
    }
}
