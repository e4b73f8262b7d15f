//! Takes a body off a buffer, whatever its framing.

use bytes::{Bytes, BytesMut};
use http::HeaderMap;

use crate::http1::{Chunk, ChunkDecoder, Framing, HeadError, HeadLimits};

/// What the decoder found at the front of the buffer.
#[derive(Debug, PartialEq)]
pub enum Piece {
    /// Bytes of the body.
    Data(Bytes),
    /// The trailers of a chunked body; the end follows.
    Trailers(HeaderMap),
    /// The body is complete.
    End,
    /// More bytes are needed.
    More,
}

/// Takes one body off a buffer.
#[derive(Debug)]
pub enum BodyDecoder {
    /// So many bytes are left.
    Length(u64),
    /// Chunks.
    Chunked(Box<ChunkDecoder>),
    /// Everything until the connection ends.
    UntilClose,
}

impl BodyDecoder {
    /// A decoder at the start of a body; `limits` bound the trailers.
    #[must_use]
    pub fn new(framing: Framing, limits: HeadLimits) -> Self {
        match framing {
            Framing::None => Self::Length(0),
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Box::new(ChunkDecoder::new(limits))),
            Framing::UntilClose => Self::UntilClose,
        }
    }

    /// Whether the end has been taken.
    #[must_use]
    pub fn is_done(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunks) => chunks.is_done(),
            Self::UntilClose => false,
        }
    }

    /// How many bytes are left, where that is known.
    #[must_use]
    pub fn remaining(&self) -> Option<u64> {
        match self {
            Self::Length(left) => Some(*left),
            Self::Chunked(chunks) => chunks.is_done().then_some(0),
            Self::UntilClose => None,
        }
    }

    /// Takes the next piece off the front of `buffer`.
    ///
    /// # Errors
    /// [`HeadError`] for bytes that break the framing; the connection cannot be used again.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Piece, HeadError> {
        match self {
            Self::Length(0) => Ok(Piece::End),
            Self::Length(_) | Self::UntilClose if buffer.is_empty() => Ok(Piece::More),
            Self::Length(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                *left = left.saturating_sub(take as u64);
                Ok(Piece::Data(buffer.split_to(take).freeze()))
            }
            Self::UntilClose => Ok(Piece::Data(buffer.split().freeze())),
            Self::Chunked(chunks) if chunks.is_done() => Ok(Piece::End),
            Self::Chunked(chunks) => match chunks.next(buffer)? {
                Chunk::Data(data) => Ok(Piece::Data(data)),
                Chunk::End(trailers) if trailers.is_empty() => Ok(Piece::End),
                Chunk::End(trailers) => Ok(Piece::Trailers(trailers)),
                Chunk::More => Ok(Piece::More),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_of_known_length_leaves_what_follows() {
        let mut buffer = BytesMut::from("abcdef");
        let mut decoder = BodyDecoder::new(Framing::Length(4), HeadLimits::default());
        assert_eq!(decoder.next(&mut buffer).unwrap(), Piece::Data("abcd".into()));
        assert_eq!(decoder.next(&mut buffer).unwrap(), Piece::End);
        assert!(decoder.is_done());
        assert_eq!(&buffer[..], b"ef");
    }

    #[test]
    fn trailers_come_before_the_end() {
        let mut buffer = BytesMut::from("1\r\nx\r\n0\r\nA: b\r\n\r\n");
        let mut decoder = BodyDecoder::new(Framing::Chunked, HeadLimits::default());
        assert_eq!(decoder.next(&mut buffer).unwrap(), Piece::Data("x".into()));
        let Piece::Trailers(trailers) = decoder.next(&mut buffer).unwrap() else { unreachable!() };
        assert_eq!(trailers["a"], "b");
        assert_eq!(decoder.next(&mut buffer).unwrap(), Piece::End);
    }
}
