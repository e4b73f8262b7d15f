//! One body type for every direction and protocol of the data plane.
//!
//! Most bodies of a service call are empty or came in with the head; those cost no allocation. Everything else is a
//! stream of frames that is polled by the task that writes it on; nothing here buffers.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

/// Why a body ended before its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// The connection closed, or the stream was reset, before the declared end.
    #[error("the body broke off before its end")]
    Incomplete,
    /// The bytes were no valid framing (RFC 9112 §7.1).
    #[error("the body's framing is invalid")]
    Framing,
    /// More bytes came than the limit allows.
    #[error("the body is larger than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// Nothing came for too long.
    #[error("nothing of the body came for {limit:?}")]
    Stalled {
        /// For how long.
        limit: Duration,
    },
}

/// What comes next of a body; `None` is its end.
pub type NextFrame = Option<Result<Frame<Bytes>, BodyError>>;

/// A body that arrives in frames. Lives on one worker, so it need not be `Send`.
pub type StreamBody = Pin<Box<dyn http_body::Body<Data = Bytes, Error = BodyError>>>;

/// The body of a request or a response.
#[derive(Default)]
pub enum Body {
    /// No bytes and no trailers.
    #[default]
    Empty,
    /// All bytes are here; no trailers.
    Full(Bytes),
    /// Bytes and perhaps trailers are still to come.
    Stream(StreamBody),
}

impl Body {
    /// A body of frames that are still to come.
    pub fn stream<B>(body: B) -> Self
    where
        B: http_body::Body<Data = Bytes, Error = BodyError> + 'static,
    {
        Self::Stream(Box::pin(body))
    }

    /// Whether nothing will come.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Stream(stream) => stream.is_end_stream(),
        }
    }

    /// The exact length where it is known beforehand.
    #[must_use]
    pub fn exact_len(&self) -> Option<u64> {
        http_body::Body::size_hint(self).exact()
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() { Self::Empty } else { Self::Full(bytes) }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("Empty"),
            Self::Full(bytes) => write!(f, "Full({} bytes)", bytes.len()),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Self::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Self::Stream(stream) => stream.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Stream(stream) => stream.size_hint(),
        }
    }
}

/// A frame that was read early, then the rest.
pub struct Prepended<B> {
    first: Option<Result<Bytes, BodyError>>,
    rest: B,
}

impl<B> Prepended<B> {
    /// `first`, then `rest`.
    pub fn new(first: Result<Bytes, BodyError>, rest: B) -> Self {
        Self { first: Some(first), rest }
    }
}

impl<B> http_body::Body for Prepended<B>
where
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(first.map(Frame::data))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let early = self.first.as_ref().and_then(|first| first.as_ref().ok()).map_or(0, Bytes::len);
        self.rest
            .size_hint()
            .exact()
            .map_or_else(SizeHint::default, |left| SizeHint::with_exact(left + early as u64))
    }
}
