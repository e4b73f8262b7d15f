//! What moves of one exchange's bodies, either way, and for how long nothing does.
//!
//! Either side of a body may fall silent: the client that sends or takes it, the endpoint that answers. Whoever waits
//! for one of them asks here. Any movement, in either direction, ends the wait; a stream that is quiet one way and busy
//! the other is alive. Nothing is armed, and no clock is asked, as long as nobody waits.

use std::{
    cell::{Cell, OnceCell},
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use crate::runtime::{Guard, Watchdog};

/// Counts what moves and limits how long nothing does; shared by all who handle one exchange.
pub(super) struct Flow {
    received: Cell<u64>,
    sent: Cell<u64>,
    /// Somebody waits, and nothing has moved since.
    still: Cell<bool>,
    guard: OnceCell<Guard>,
    watchdog: Watchdog,
    limit: Cell<Duration>,
}

impl Flow {
    /// Nothing has moved yet.
    #[must_use]
    pub(super) fn new(watchdog: &Watchdog, limit: Duration) -> Rc<Self> {
        Rc::new(Self {
            received: Cell::new(0),
            sent: Cell::new(0),
            still: Cell::new(false),
            guard: OnceCell::new(),
            watchdog: watchdog.clone(),
            limit: Cell::new(limit),
        })
    }

    /// Another exchange begins, on the same connection and with the limit of the moment.
    pub(super) fn restart(&self, limit: Duration) {
        self.moved();
        self.limit.set(limit);
        self.received.set(0);
        self.sent.set(0);
    }

    /// Bytes of the request's body so far.
    #[must_use]
    pub(super) fn received(&self) -> u64 {
        self.received.get()
    }

    /// Bytes of the answer's body so far.
    #[must_use]
    pub(super) fn sent(&self) -> u64 {
        self.sent.get()
    }

    /// How long nothing may move.
    #[must_use]
    pub(super) fn limit(&self) -> Duration {
        self.limit.get()
    }

    /// The client sent so many more bytes of its body.
    pub(super) fn receive(&self, bytes: usize) {
        self.received.set(self.received.get() + bytes as u64);
        self.moved();
    }

    /// The client was given so many more bytes of the answer's body.
    pub(super) fn send(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
        self.moved();
    }

    /// Something moved, or nobody waits any more.
    pub(super) fn moved(&self) {
        if self.still.replace(false)
            && let Some(guard) = self.guard.get()
        {
            guard.disarm();
        }
    }

    /// Ready when nothing has moved for too long; else the task is woken when that is so.
    pub(super) fn poll_stalled(&self, cx: &Context<'_>) -> Poll<()> {
        let guard = self.guard.get_or_init(|| self.watchdog.register());
        if !self.still.replace(true) {
            guard.arm(self.limit.get());
        }
        guard.poll_expired(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::{Instant, sleep, timeout};

    use super::*;
    use crate::runtime::TICK;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn a_wait_ends_when_nothing_moves_for_its_limit_however_often_it_is_looked_at() {
        let flow = Flow::new(&Watchdog::new(), LIMIT);
        let begun = Instant::now();
        while poll_fn(|cx| Poll::Ready(flow.poll_stalled(cx))).await.is_pending() {
            sleep(LIMIT / 10).await;
        }
        assert!(begun.elapsed() >= LIMIT, "{:?}", begun.elapsed());
        assert!(begun.elapsed() <= LIMIT + 4 * TICK, "{:?}", begun.elapsed());
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn whatever_moves_begins_a_new_wait_and_what_nobody_waits_for_never_stalls() {
        let flow = Flow::new(&Watchdog::new(), LIMIT);
        assert_eq!(flow.watchdog.registered(), 0);
        for _ in 0..4 {
            let stalled = poll_fn(|cx| flow.poll_stalled(cx));
            assert!(timeout(LIMIT / 2, stalled).await.is_err());
            flow.receive(3);
            flow.send(4);
        }
        sleep(10 * LIMIT).await;
        assert!(poll_fn(|cx| Poll::Ready(flow.poll_stalled(cx))).await.is_pending());
        assert_eq!((flow.received(), flow.sent()), (12, 16));
        flow.restart(3 * LIMIT);
        assert_eq!((flow.received(), flow.sent()), (0, 0));
        let stalled = poll_fn(|cx| flow.poll_stalled(cx));
        assert!(timeout(2 * LIMIT, stalled).await.is_err());
    }
}
