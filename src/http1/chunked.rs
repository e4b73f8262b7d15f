//! The chunked transfer coding (RFC 9112 §7.1).

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::http1::{HeadError, HeadLimits};

/// What a chunk-size line may be at most: sixteen digits and room for extensions, which are ignored.
const SIZE_LINE: usize = 1024;

/// What the extensions of one body may be at most in all; hyper's limit. They are no part of the body, so that nothing
/// else bounds them.
const EXTENSIONS: usize = 16 * 1024;

/// What the decoder found at the front of the buffer.
#[derive(Debug, PartialEq)]
pub enum Chunk {
    /// Bytes of the body.
    Data(Bytes),
    /// The end, with the trailers.
    End(HeaderMap),
    /// More bytes are needed.
    More,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Size,
    Data(u64),
    DataEnd,
    Trailers,
    Nothing,
}

/// Takes chunks off a buffer. Strict: sizes are bare hex digits, every line ends in CR LF.
#[derive(Debug)]
pub struct ChunkDecoder {
    expect: Expect,
    limits: HeadLimits,
    /// Bytes of extensions so far.
    extensions: usize,
}

impl ChunkDecoder {
    /// A decoder at the start of a body; `limits` bound the trailers.
    #[must_use]
    pub fn new(limits: HeadLimits) -> Self {
        Self { expect: Expect::Size, limits, extensions: 0 }
    }

    /// Whether the last chunk and the trailers have been taken.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.expect == Expect::Nothing
    }

    /// Takes the next piece off the front of `buffer`.
    ///
    /// # Errors
    /// [`HeadError`] for bytes that are no chunked body; the connection cannot be used again.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Chunk, HeadError> {
        loop {
            match self.expect {
                Expect::Size => {
                    let Some((size, extension)) = size_line(buffer)? else {
                        return Ok(Chunk::More);
                    };
                    self.extensions += extension;
                    if self.extensions > EXTENSIONS {
                        return Err(HeadError::Grammar("the extensions of chunks"));
                    }
                    self.expect = if size == 0 { Expect::Trailers } else { Expect::Data(size) };
                }
                Expect::Data(left) => {
                    if buffer.is_empty() {
                        return Ok(Chunk::More);
                    }
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                    let data = buffer.split_to(take).freeze();
                    let left = left.saturating_sub(take as u64);
                    self.expect = if left == 0 { Expect::DataEnd } else { Expect::Data(left) };
                    return Ok(Chunk::Data(data));
                }
                Expect::DataEnd => {
                    match (buffer.first(), buffer.get(1)) {
                        (Some(b'\r'), Some(b'\n')) => buffer.advance(2),
                        (None, _) | (Some(b'\r'), None) => return Ok(Chunk::More),
                        (Some(_), _) => return Err(HeadError::Grammar("a chunk")),
                    }
                    self.expect = Expect::Size;
                }
                Expect::Trailers => {
                    let Some(trailers) = trailers(buffer, self.limits)? else {
                        return Ok(Chunk::More);
                    };
                    self.expect = Expect::Nothing;
                    return Ok(Chunk::End(trailers));
                }
                Expect::Nothing => return Ok(Chunk::End(HeaderMap::new())),
            }
        }
    }
}

/// Takes a chunk-size line: the size, and the length of what follows it; `None`: more bytes are needed.
fn size_line(buffer: &mut BytesMut) -> Result<Option<(u64, usize)>, HeadError> {
    let Some(end) = memchr::memchr(b'\n', buffer) else {
        let bad = buffer.len() > SIZE_LINE;
        return if bad { Err(HeadError::Grammar("a chunk size")) } else { Ok(None) };
    };
    let line = buffer.split_to(end + 1);
    let line = line.strip_suffix(b"\r\n").ok_or(HeadError::LineEnd)?;
    if line.len() > SIZE_LINE || line.iter().any(|b| *b == b'\r' || *b == 0) {
        return Err(HeadError::Grammar("a chunk size"));
    }
    let digits = line.split(|b| *b == b';').next().unwrap_or_default();
    // §7.1.1 lets old senders put white space before the extension; it is not part of the number.
    let digits = if digits.len() < line.len() { digits.trim_ascii_end() } else { digits };
    if digits.is_empty() || digits.len() > 16 {
        return Err(HeadError::Grammar("a chunk size"));
    }
    let mut size = 0u64;
    for digit in digits {
        let value = char::from(*digit).to_digit(16).ok_or(HeadError::Grammar("a chunk size"))?;
        size = size
            .checked_mul(16)
            .and_then(|s| s.checked_add(u64::from(value)))
            .ok_or(HeadError::Grammar("a chunk size"))?;
    }
    Ok(Some((size, line.len() - digits.len())))
}

/// Takes the trailer section; `None`: more bytes are needed.
fn trailers(buffer: &mut BytesMut, limits: HeadLimits) -> Result<Option<HeaderMap>, HeadError> {
    if buffer.starts_with(b"\r\n") {
        buffer.advance(2);
        return Ok(Some(HeaderMap::new()));
    }
    let Some(end) = memchr::memmem::find(buffer, b"\r\n\r\n").map(|at| at + 4) else {
        let long = buffer.len() > limits.bytes;
        return if long { Err(HeadError::TooLarge(limits)) } else { Ok(None) };
    };
    let section = buffer.split_to(end).freeze();
    if end > limits.bytes {
        return Err(HeadError::TooLarge(limits));
    }
    for at in memchr::memchr_iter(b'\n', &section) {
        if at == 0 || section.get(at - 1) != Some(&b'\r') {
            return Err(HeadError::LineEnd);
        }
    }
    let mut lines = vec![httparse::EMPTY_HEADER; limits.headers];
    match httparse::parse_headers(&section, &mut lines) {
        Ok(httparse::Status::Complete((length, parsed))) if length == section.len() => {
            let mut map = HeaderMap::with_capacity(parsed.len());
            for line in parsed {
                let name = HeaderName::from_bytes(line.name.as_bytes())
                    .map_err(|_source| HeadError::Grammar("a trailer name"))?;
                let value = HeaderValue::from_bytes(line.value)
                    .map_err(|_source| HeadError::Grammar("a trailer value"))?;
                map.append(name, value);
            }
            Ok(Some(map))
        }
        Err(httparse::Error::TooManyHeaders) => Err(HeadError::TooLarge(limits)),
        Ok(_) | Err(_) => Err(HeadError::Grammar("the trailers")),
    }
}

/// Writes `data` as one chunk; nothing for an empty slice, which would end the body.
pub fn encode_chunk(data: &[u8], out: &mut BytesMut) {
    if data.is_empty() {
        return;
    }
    let mut digits = [0u8; 16];
    let mut at = digits.len();
    let mut left = data.len();
    while left > 0 {
        at -= 1;
        if let Some(slot) = digits.get_mut(at) {
            *slot = *b"0123456789abcdef".get(left & 0xf).unwrap_or(&b'0');
        }
        left >>= 4;
    }
    out.reserve(data.len() + 20);
    out.put_slice(digits.get(at..).unwrap_or_default());
    out.put_slice(b"\r\n");
    out.put_slice(data);
    out.put_slice(b"\r\n");
}

/// Writes the last chunk and the trailers.
pub fn encode_last_chunk(trailers: Option<&HeaderMap>, out: &mut BytesMut) {
    out.put_slice(b"0\r\n");
    if let Some(trailers) = trailers {
        crate::http1::encode_headers(trailers.iter(), out);
    }
    out.put_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(mut buffer: BytesMut) -> Result<(Vec<u8>, Option<HeaderMap>), HeadError> {
        let mut decoder = ChunkDecoder::new(HeadLimits::default());
        let mut body = Vec::new();
        loop {
            match decoder.next(&mut buffer)? {
                Chunk::Data(data) => body.extend_from_slice(&data),
                Chunk::End(trailers) => return Ok((body, Some(trailers))),
                Chunk::More => return Ok((body, None)),
            }
        }
    }

    #[test]
    fn chunks_extensions_and_trailers_are_read() {
        let text = "4;name=value\r\nWiki\r\n5 ;x\r\npedia\r\n0\r\nChecksum: 7\r\n\r\n";
        let (body, trailers) = decode(text.into()).unwrap();
        assert_eq!(body, b"Wikipedia");
        assert_eq!(trailers.unwrap()["checksum"], "7");
    }

    #[test]
    fn bad_chunks_are_refused() {
        for bad in [
            "4\nWiki\r\n0\r\n\r\n",
            "0x4\r\nWiki\r\n0\r\n\r\n",
            " 4\r\nWiki\r\n0\r\n\r\n",
            "4 \r\nWiki\r\n0\r\n\r\n",
            "+4\r\nWiki\r\n0\r\n\r\n",
            "-1\r\n",
            "\r\n",
            "g\r\n",
            "ffffffffffffffff0\r\n",
            "4\r\nWikiX\r\n",
            "4\r\nWiki\n0\r\n\r\n",
            "4;a\rb\r\nWiki\r\n0\r\n\r\n",
            "0\r\nbad header\r\n\r\n",
            "0\r\na : b\r\n\r\n",
            "0\r\nA: b\nC: d\r\n\r\n",
        ] {
            assert!(decode(bad.into()).is_err(), "{bad:?}");
        }
        assert!(decode(BytesMut::from(&b"1".repeat(2000)[..])).is_err());
        let chunk = format!("1;{}\r\nx\r\n", "e".repeat(1000));
        assert!(decode(BytesMut::from(&chunk.repeat(16)[..])).is_ok());
        assert!(decode(BytesMut::from(&chunk.repeat(17)[..])).is_err());
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_however_it_is_cut(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..8),
            step in 1usize..50,
        ) {
            let mut wire = BytesMut::new();
            for part in &parts {
                encode_chunk(part, &mut wire);
            }
            encode_last_chunk(None, &mut wire);
            let mut decoder = ChunkDecoder::new(HeadLimits::default());
            let (mut buffer, mut body, mut done) = (BytesMut::new(), Vec::new(), false);
            for piece in wire.chunks(step) {
                buffer.extend_from_slice(piece);
                loop {
                    match decoder.next(&mut buffer).unwrap() {
                        Chunk::Data(data) => body.extend_from_slice(&data),
                        Chunk::End(_) => { done = true; break }
                        Chunk::More => break,
                    }
                }
            }
            prop_assert!(done && decoder.is_done());
            prop_assert_eq!(body, parts.concat());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _outcome = decode(BytesMut::from(&bytes[..]));
        }
    }
}
