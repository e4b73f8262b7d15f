//! How long a body is and what ends it (RFC 9112 §6).

use http::{Method, StatusCode, Version, header};

use crate::{http1::HeadError, wire::Fields};

/// What ends a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// So many bytes.
    Length(u64),
    /// The last chunk.
    Chunked,
    /// The end of the connection; responses only.
    UntilClose,
}

/// `Some(Ok(n))` for exactly one plain number, `None` without the header.
fn content_length(fields: &Fields) -> Option<Result<u64, HeadError>> {
    let mut values = fields.all(&header::CONTENT_LENGTH);
    let first = values.next()?;
    if values.next().is_some() {
        return Some(Err(HeadError::Length));
    }
    let digits = first.as_bytes();
    // At most 18 digits: no valid length is longer, and none overflows.
    let plain = !digits.is_empty() && digits.len() <= 18 && digits.iter().all(u8::is_ascii_digit);
    let number = plain.then(|| digits.iter().fold(0, |sum, d| sum * 10 + u64::from(d - b'0')));
    Some(number.ok_or(HeadError::Length))
}

/// `Some(Ok(()))` for exactly one `chunked`, `None` without the header.
fn transfer_encoding(fields: &Fields) -> Option<Result<(), HeadError>> {
    let mut values = fields.all(&header::TRANSFER_ENCODING);
    let first = values.next()?;
    let chunked = values.next().is_none() && first.as_bytes().eq_ignore_ascii_case(b"chunked");
    Some(if chunked { Ok(()) } else { Err(HeadError::Coding) })
}

/// Whether the connection lasts beyond this message (§9.3): `close` ends it whatever else is said, and HTTP/1.0 must
/// say that it stays.
#[must_use]
pub fn keeps_alive(version: Version, fields: &Fields) -> bool {
    let mut stays = version != Version::HTTP_10;
    for value in fields.all(&header::CONNECTION) {
        for word in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            if word.eq_ignore_ascii_case(b"close") {
                return false;
            }
            stays |= word.eq_ignore_ascii_case(b"keep-alive");
        }
    }
    stays
}

/// The framing of a request's body.
///
/// # Errors
/// [`HeadError::Length`] or [`HeadError::Coding`] where the length is ambiguous.
pub fn request_framing(version: Version, fields: &Fields) -> Result<Framing, HeadError> {
    match (transfer_encoding(fields), content_length(fields)) {
        (None, None) => Ok(Framing::None),
        (None, Some(length)) => {
            length.map(|n| if n == 0 { Framing::None } else { Framing::Length(n) })
        }
        (Some(_), Some(_)) => Err(HeadError::Length),
        // §6.1: a transfer coding in HTTP/1.0 means faulty framing.
        (Some(_), None) if version == Version::HTTP_10 => Err(HeadError::Coding),
        (Some(coding), None) => coding.map(|()| Framing::Chunked),
    }
}

/// The framing of a response's body; `method` is that of the request it answers.
///
/// # Errors
/// [`HeadError::Length`] or [`HeadError::Coding`] where the length is ambiguous.
pub fn response_framing(
    method: &Method,
    version: Version,
    status: StatusCode,
    fields: &Fields,
) -> Result<Framing, HeadError> {
    let bodiless = *method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    match (transfer_encoding(fields), content_length(fields)) {
        (Some(_), Some(_)) => Err(HeadError::Length),
        // §6.1, as for requests.
        (Some(_), None) if version == Version::HTTP_10 => Err(HeadError::Coding),
        (Some(Err(error)), None) | (None, Some(Err(error))) => Err(error),
        (_, _) if bodiless => Ok(Framing::None),
        (Some(Ok(())), None) => Ok(Framing::Chunked),
        (None, Some(Ok(0))) => Ok(Framing::None),
        (None, Some(Ok(length))) => Ok(Framing::Length(length)),
        (None, None) => Ok(Framing::UntilClose),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> Fields {
        let mut fields = Fields::new();
        for (name, value) in lines {
            let name = http::HeaderName::from_static(name);
            fields.append(name, http::HeaderValue::from_static(value));
        }
        fields
    }

    #[test]
    fn ambiguous_lengths_are_refused() {
        for lines in [
            &[("content-length", "3"), ("content-length", "3")][..],
            &[("content-length", "3, 3")],
            &[("content-length", "+3")],
            &[("content-length", "-1")],
            &[("content-length", "0x3")],
            &[("content-length", "")],
            &[("content-length", "9999999999999999999")],
            &[("content-length", "3"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "gzip, chunked")],
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "identity")],
            &[("transfer-encoding", "xchunked")],
        ] {
            assert!(request_framing(Version::HTTP_11, &headers(lines)).is_err(), "{lines:?}");
        }
        assert!(
            request_framing(Version::HTTP_10, &headers(&[("transfer-encoding", "chunked")]))
                .is_err()
        );
    }

    #[test]
    fn close_ends_a_connection_whatever_else_is_said() {
        let (old, new) = (Version::HTTP_10, Version::HTTP_11);
        for (version, lines, stays) in [
            (new, &[][..], true),
            (old, &[], false),
            (old, &[("connection", "Keep-Alive, x")], true),
            (new, &[("connection", "x, Close")], false),
            (old, &[("connection", "close"), ("connection", "keep-alive")], false),
            (old, &[("connection", "keep-alive, close")], false),
        ] {
            assert_eq!(keeps_alive(version, &headers(lines)), stays, "{version:?} {lines:?}");
        }
    }

    #[test]
    fn what_is_plain_is_accepted() {
        let request = |lines: &[_]| request_framing(Version::HTTP_11, &headers(lines)).unwrap();
        assert_eq!(request(&[]), Framing::None);
        assert_eq!(request(&[("content-length", "0")]), Framing::None);
        assert_eq!(request(&[("content-length", "12")]), Framing::Length(12));
        assert_eq!(request(&[("transfer-encoding", "Chunked")]), Framing::Chunked);
    }

    #[test]
    fn some_responses_never_have_a_body() {
        let long = headers(&[("content-length", "10")]);
        let framing =
            |method, status| response_framing(&method, Version::HTTP_11, status, &long).unwrap();
        assert_eq!(framing(Method::HEAD, StatusCode::OK), Framing::None);
        assert_eq!(framing(Method::GET, StatusCode::NOT_MODIFIED), Framing::None);
        assert_eq!(framing(Method::GET, StatusCode::OK), Framing::Length(10));
        let open = |version, headers: &Fields| {
            response_framing(&Method::GET, version, StatusCode::OK, headers)
        };
        assert_eq!(open(Version::HTTP_11, &Fields::new()), Ok(Framing::UntilClose));
        let chunked = headers(&[("transfer-encoding", "chunked")]);
        assert_eq!(open(Version::HTTP_11, &chunked), Ok(Framing::Chunked));
        assert_eq!(open(Version::HTTP_10, &chunked), Err(HeadError::Coding));
    }
}
