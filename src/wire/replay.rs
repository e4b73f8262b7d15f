//! A body that can be sent again from its beginning, while it is small.
//!
//! What passes is copied as it passes, up to 64 KiB. A body that grows beyond that is no longer kept at all: it streams
//! on as any other, and cannot be sent again. One reader at a time; a later one gets what was kept first and then the
//! rest as it comes. Whoever reads an earlier one, as an endpoint does whose answer was held back, gets nothing more, and
//! above all no end: what it has is not the whole.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Frame, SizeHint};

use crate::wire::{Body, BodyError, StreamBody};

/// What is kept of a body (DESIGN §7.1).
const REPLAY_BYTES: usize = 64 * 1024;

/// A body on its way, and what has passed of it. Once this is gone nothing more is kept.
pub struct Replay(Rc<RefCell<Tape>>);

struct Tape {
    rest: StreamBody,
    /// What has passed, from the beginning; `None` once it was given up.
    kept: Option<BytesMut>,
    trailers: Option<HeaderMap>,
    /// Everything has passed.
    ended: bool,
    /// Nobody will ask for it again.
    settled: bool,
    /// The number of the one reader that gets anything.
    reader: u32,
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.0.borrow_mut().settled = true;
    }
}

impl Replay {
    /// Keeps what passes of `body`, of which nothing has passed yet.
    #[must_use]
    pub fn new(body: StreamBody) -> Self {
        let kept = Some(BytesMut::new());
        let tape =
            Tape { rest: body, kept, trailers: None, ended: false, settled: false, reader: 0 };
        Self(Rc::new(RefCell::new(tape)))
    }

    /// Whether it can still be sent from its beginning.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.0.borrow().kept.is_some()
    }

    /// Whether all of it has passed.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.borrow().ended
    }

    /// The body from its beginning, while it [is whole](Self::is_whole). Whoever reads an earlier one waits in vain from
    /// now on.
    #[must_use]
    pub fn body(&self) -> Body {
        let number = {
            let mut tape = self.0.borrow_mut();
            tape.reader += 1;
            tape.reader
        };
        Body::stream(Reader { tape: Rc::clone(&self.0), number, at: 0, told: false })
    }
}

impl Tape {
    /// Keeps a copy: a piece itself may hold on to a read buffer many times its size.
    fn keep(&mut self, data: &[u8]) {
        if let Some(kept) = &mut self.kept {
            if kept.len() + data.len() <= REPLAY_BYTES {
                kept.extend_from_slice(data);
            } else {
                self.kept = None;
            }
        }
    }

    fn keep_trailers(&mut self, trailers: &HeaderMap) {
        let size: usize =
            trailers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        if self.kept.as_ref().is_some_and(|kept| kept.len() + size > REPLAY_BYTES) {
            self.kept = None;
        }
        if self.kept.is_some() {
            self.trailers = Some(trailers.clone());
        }
    }

    /// What was kept behind the first `at` bytes.
    fn behind(&self, at: usize) -> &[u8] {
        self.kept.as_ref().and_then(|kept| kept.get(at..)).unwrap_or_default()
    }
}

/// Reads what was kept, then the rest; nothing once there is a later one.
struct Reader {
    tape: Rc<RefCell<Tape>>,
    number: u32,
    /// How much of what was kept has been read.
    at: usize,
    /// The trailers have been read, or there will be none.
    told: bool,
}

impl http_body::Body for Reader {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let mut tape = this.tape.borrow_mut();
        if tape.reader != this.number {
            // Neither an end, which would pass for the body's, nor an error, which would take the answer with it that is
            // still to be given: the upload stands still until its answer has been read.
            return Poll::Pending;
        }
        let behind = tape.behind(this.at);
        if !behind.is_empty() {
            this.at += behind.len();
            return Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(behind)))));
        }
        if tape.settled {
            // A stream may go on for days after its answer has begun.
            tape.kept = None;
        }
        if tape.ended {
            let trailers = if this.told { None } else { tape.trailers.clone() };
            this.told = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(tape.rest.as_mut().poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    tape.keep(data);
                    this.at += data.len();
                } else if let Some(trailers) = frame.trailers_ref() {
                    tape.keep_trailers(trailers);
                    (tape.ended, this.told) = (true, true);
                }
            }
            None => (tape.ended, this.told) = (true, true),
            // It broke off: nobody gets it whole any more.
            Some(Err(_broken)) => tape.kept = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let tape = self.tape.borrow();
        let trailers = !self.told && tape.trailers.is_some();
        tape.reader == self.number
            && tape.behind(self.at).is_empty()
            && !trailers
            && (tape.ended || tape.rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let tape = self.tape.borrow();
        if tape.reader != self.number {
            return SizeHint::default();
        }
        let behind = tape.behind(self.at).len() as u64;
        if tape.ended && tape.trailers.is_none() {
            return SizeHint::with_exact(behind);
        }
        let rest = tape.rest.size_hint().exact();
        rest.map_or_else(SizeHint::default, |rest| SizeHint::with_exact(behind + rest))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use http_body::Body as _;
    use http_body_util::BodyExt;
    use proptest::prelude::*;

    use super::*;

    /// Pieces and trailers of which each is there when it is asked for.
    struct Script(VecDeque<Result<Frame<Bytes>, BodyError>>);

    impl http_body::Body for Script {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            Poll::Ready(self.0.pop_front())
        }
    }

    fn replay(pieces: &[Vec<u8>], trailers: Option<&str>) -> Replay {
        let mut trailer = HeaderMap::new();
        if let Some(value) = trailers {
            trailer.insert("x-sum", value.parse().unwrap());
        }
        let data = pieces.iter().map(|piece| Ok(Frame::data(Bytes::from(piece.clone()))));
        let frames = data.chain(trailers.map(|_| Ok(Frame::trailers(trailer)))).collect();
        Replay::new(Box::pin(Script(frames)))
    }

    async fn all(body: Body) -> (Vec<u8>, Option<HeaderMap>) {
        let collected = body.collect().await.unwrap();
        let trailers = collected.trailers().cloned();
        (collected.to_bytes().to_vec(), trailers)
    }

    #[tokio::test]
    async fn a_body_can_be_read_again_with_its_trailers_and_from_any_point() {
        let replay = replay(&[b"one".to_vec(), b"two".to_vec()], Some("6"));
        let mut first = replay.body();
        assert_eq!(first.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
        drop(first);
        for _ in 0..2 {
            let (data, trailers) = all(replay.body()).await;
            assert_eq!(data, b"onetwo");
            assert_eq!(trailers.unwrap()["x-sum"], "6");
        }
        assert!(replay.is_whole());
    }

    #[tokio::test]
    async fn a_body_that_grows_too_large_streams_on_and_is_given_up() {
        let piece = vec![7; REPLAY_BYTES / 2];
        let replay = replay(&[piece.clone(), piece.clone(), vec![7]], None);
        let mut body = replay.body();
        for whole in [true, true, false] {
            assert!(body.frame().await.unwrap().is_ok());
            assert_eq!(replay.is_whole(), whole);
        }
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn what_is_kept_goes_when_nobody_can_ask_for_it_again() {
        let replay = replay(&[b"one".to_vec(), b"two".to_vec()], None);
        drop(replay.body().frame().await);
        let tape = Rc::clone(&replay.0);
        let mut second = replay.body();
        drop(replay);
        assert_eq!(second.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
        assert_eq!(second.frame().await.unwrap().unwrap().into_data().unwrap(), "two");
        assert!(tape.borrow().kept.is_none());
        assert!(second.frame().await.is_none());
    }

    #[tokio::test]
    async fn an_earlier_reader_sees_neither_more_nor_an_end() {
        let half = vec![7; REPLAY_BYTES];
        for pieces in [vec![b"one".to_vec(), b"two".to_vec()], vec![half.clone(), half]] {
            let replay = replay(&pieces, None);
            let mut first = replay.body();
            assert!(first.frame().await.unwrap().is_ok());
            let mut second = replay.body();
            assert!(futures_util::poll!(first.frame()).is_pending());
            while let Some(frame) = second.frame().await {
                assert!(frame.is_ok());
            }
            assert!(replay.has_ended());
            assert!(futures_util::poll!(first.frame()).is_pending());
            assert!(!first.is_end_stream());
            assert_eq!(first.size_hint().exact(), None);
        }
    }

    #[tokio::test]
    async fn a_body_that_broke_off_is_not_whole() {
        let script = Script([Err(BodyError::Incomplete)].into());
        let replay = Replay::new(Box::pin(script));
        assert!(replay.body().frame().await.unwrap().is_err());
        assert!(!replay.is_whole());
    }

    proptest! {
        #[test]
        fn every_reader_gets_every_byte(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20),
            stops in prop::collection::vec(0_usize..20, 0..4),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let whole = pieces.concat();
            let replay = replay(&pieces, None);
            runtime.block_on(async {
                for stop in stops {
                    let mut body = replay.body();
                    for _ in 0..stop {
                        drop(body.frame().await);
                    }
                }
                assert_eq!(all(replay.body()).await.0, whole);
            });
        }
    }
}
