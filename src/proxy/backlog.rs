//! What waits to be written on one HTTP/2 connection, and how much that may be.
//!
//! A window says what a client is willing to take, not what it takes: where windows are wide and nobody reads, every
//! stream fills a buffer of its own. So all streams of a connection share one bound. Bytes count from the moment they are
//! given to `h2` until it has given them to the socket or thrown them away; that they count no earlier keeps a stream
//! whose window is shut from holding up the others.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::{Buf, Bytes};

/// Bytes that may wait on one connection (Envoy's `per_connection_buffer_limit_bytes`); one more piece of one stream may
/// come on top.
const MOST: usize = 1024 * 1024;
/// Whoever waits for room is woken when so many are left: not for every packet.
const ROOM: usize = MOST / 2;

/// The bytes that wait on one connection; shared by its streams.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Cell<usize>,
    waiting: RefCell<Vec<Waker>>,
    /// How often those who waited have been woken.
    round: Cell<u64>,
}

/// Where somebody stands who waits for room: the round for which they will be woken.
#[derive(Debug, Default)]
pub(super) struct Turn(Option<u64>);

impl Backlog {
    /// Whether another piece may be sent.
    pub(super) fn has_room(&self) -> bool {
        self.bytes.get() < MOST
    }

    /// Ready when another piece may be sent; else the task is woken when that is so.
    pub(super) fn poll_room(&self, turn: &mut Turn, cx: &Context<'_>) -> Poll<()> {
        if self.has_room() {
            return Poll::Ready(());
        }
        let round = self.round.get();
        if turn.0.replace(round) != Some(round) {
            self.waiting.borrow_mut().push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn release(&self, bytes: usize) {
        let left = self.bytes.get().saturating_sub(bytes);
        self.bytes.set(left);
        if left > ROOM || self.waiting.borrow().is_empty() {
            return;
        }
        self.round.set(self.round.get().wrapping_add(1));
        // The list is free while wakers run.
        for waker in self.waiting.take() {
            waker.wake();
        }
    }
}

/// Bytes on their way to `h2` and from there to the socket.
#[derive(Debug)]
pub(super) struct Piece {
    data: Bytes,
    backlog: Rc<Backlog>,
}

impl Piece {
    /// Counts `data` as waiting.
    pub(super) fn new(data: Bytes, backlog: &Rc<Backlog>) -> Self {
        backlog.bytes.set(backlog.bytes.get() + data.len());
        Self { data, backlog: Rc::clone(backlog) }
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.data.advance(count);
        self.backlog.release(count);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.backlog.release(self.data.len());
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use super::*;

    fn ready(backlog: &Backlog, turn: &mut Turn) -> bool {
        backlog.poll_room(turn, &Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn what_is_written_or_thrown_away_waits_no_longer() {
        let backlog = Rc::<Backlog>::default();
        let mut turn = Turn::default();
        let mut written = Piece::new(vec![0; MOST - 1].into(), &backlog);
        assert!(ready(&backlog, &mut turn));
        let thrown = Piece::new(vec![0; 10].into(), &backlog);
        assert!(!ready(&backlog, &mut turn));
        assert!(!ready(&backlog, &mut turn));
        assert_eq!(backlog.waiting.borrow().len(), 1, "who looks twice waits once");
        written.advance(ROOM);
        assert!(ready(&backlog, &mut turn));
        assert_eq!(backlog.waiting.borrow().len(), 1, "nobody is woken for a little room");
        drop(thrown);
        assert_eq!(backlog.waiting.borrow().len(), 0);
        drop(written);
        assert_eq!(backlog.bytes.get(), 0);
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_and_finds_room() {
        let backlog = Rc::<Backlog>::default();
        let held = Piece::new(vec![0; 2 * MOST].into(), &backlog);
        let mut turn = Turn::default();
        let mut waits = pin!(poll_fn(|cx| backlog.poll_room(&mut turn, cx)));
        tokio::select! {
            biased;
            () = &mut waits => panic!("there is no room"),
            () = std::future::ready(()) => {}
        }
        drop(held);
        waits.await;
    }
}
