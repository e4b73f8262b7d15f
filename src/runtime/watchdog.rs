//! Coarse time-outs for many connections on one worker.
//!
//! A tokio timer per request costs a lock and a wheel slot each time. Here a connection registers once; arming and
//! disarming is one store into its own cell, and one timer per worker looks at all cells four times a second. A
//! deadline is met late by at most two ticks and never early while the worker keeps up. Deadlines that must be
//! exact use `tokio::time`.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::pin,
    rc::{Rc, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::worker::spawn_local;

/// How often the cells are looked at.
pub const TICK: Duration = Duration::from_millis(250);

/// The wait ran out before what was waited for came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the time ran out")]
pub struct Expired;

/// One per worker; clones are the same watchdog.
#[derive(Clone, Debug, Default)]
pub struct Watchdog(Rc<Pack>);

#[derive(Debug, Default)]
struct Pack {
    entries: RefCell<Vec<Rc<Entry>>>,
    /// The time of the last tick; renewed at a registration when no tick runs.
    now: Cell<Option<Instant>>,
    ticking: Cell<bool>,
}

#[derive(Debug, Default)]
struct Entry {
    /// None: disarmed.
    deadline: Cell<Option<Instant>>,
    waker: RefCell<Option<Waker>>,
    /// Where it stands in the pack's list.
    index: Cell<usize>,
}

/// One connection's time-out. Disarmed until armed; gone when dropped.
#[derive(Debug)]
pub struct Guard {
    entry: Rc<Entry>,
    pack: Rc<Pack>,
}

impl Watchdog {
    /// A watchdog that sleeps until someone registers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A new time-out, disarmed. Starts the tick if nobody was registered.
    ///
    /// # Panics
    /// When the calling thread is no worker: see [`spawn_local`].
    #[must_use]
    pub fn register(&self) -> Guard {
        let pack = Rc::clone(&self.0);
        if !pack.ticking.replace(true) {
            pack.now.set(Some(Instant::now()));
            spawn_local("watchdog", tick(Rc::downgrade(&pack)));
        }
        let entry = Rc::new(Entry::default());
        let mut entries = pack.entries.borrow_mut();
        entry.index.set(entries.len());
        entries.push(Rc::clone(&entry));
        drop(entries);
        Guard { entry, pack }
    }

    /// Wakes every task that waits for its guard, so that it looks around: the worker is draining.
    pub fn rouse(&self) {
        let mut index = 0;
        while let Some(entry) = self.0.entry(index) {
            index += 1;
            if let Some(waker) = entry.waker.take() {
                waker.wake();
            }
        }
    }

    /// How many are registered.
    #[must_use]
    pub fn registered(&self) -> usize {
        self.0.entries.borrow().len()
    }

    /// The time of the last tick: at most [`TICK`] old while someone is registered, and free of any clock read.
    #[must_use]
    pub fn coarse_now(&self) -> Instant {
        self.0.coarse_now()
    }
}

impl Pack {
    fn coarse_now(&self) -> Instant {
        self.now.get().unwrap_or_else(Instant::now)
    }

    /// Wakes whoever's deadline has come.
    fn look(&self, now: Instant) {
        self.now.set(Some(now));
        let mut index = 0;
        // The list is free while a waker runs: what it drops may be a guard.
        while let Some(entry) = self.entry(index) {
            index += 1;
            if entry.deadline.get().is_some_and(|deadline| deadline <= now)
                && let Some(waker) = entry.waker.take()
            {
                waker.wake();
            }
        }
    }

    fn entry(&self, index: usize) -> Option<Rc<Entry>> {
        self.entries.borrow().get(index).cloned()
    }
}

/// Ticks until the last guard is gone.
async fn tick(pack: Weak<Pack>) {
    let mut ticks = interval_at(Instant::now() + TICK, TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(pack) = pack.upgrade() else { return };
        if pack.entries.borrow().is_empty() {
            pack.ticking.set(false);
            pack.now.set(None);
            return;
        }
        pack.look(Instant::now());
    }
}

impl Guard {
    /// Expires after `limit`, give or take: not before `limit`, not later than `limit` and two ticks.
    pub fn arm(&self, limit: Duration) {
        // The last tick may be one tick old: add it, or the guard could bite early.
        self.arm_at(self.pack.coarse_now() + limit + TICK);
    }

    /// Expires at the first tick at or after `deadline`, for callers that have read the clock anyway.
    pub fn arm_at(&self, deadline: Instant) {
        self.entry.deadline.set(Some(deadline));
    }

    /// Does not expire until armed again.
    pub fn disarm(&self) {
        self.entry.deadline.set(None);
    }

    /// Whether the time ran out, as of the last tick.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.entry.deadline.get().is_some_and(|deadline| deadline <= self.pack.coarse_now())
    }

    /// Ready when the time has run out; else the task is woken when it does. A disarmed guard stays pending. One task
    /// waits per guard: the last that asked.
    pub fn poll_expired(&self, cx: &Context<'_>) -> Poll<()> {
        if self.is_expired() {
            return Poll::Ready(());
        }
        let mut waker = self.entry.waker.borrow_mut();
        match waker.as_ref() {
            Some(known) if known.will_wake(cx.waker()) => {}
            _ => *waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Ends when the time has run out. Cancel-safe.
    pub async fn expired(&self) {
        poll_fn(|cx| self.poll_expired(cx)).await;
    }

    /// Arms, waits for `work`, disarms. `work` is dropped when the time runs out first.
    ///
    /// # Errors
    /// [`Expired`] when it did.
    pub async fn limit<F: Future>(&self, limit: Duration, work: F) -> Result<F::Output, Expired> {
        self.arm(limit);
        let mut work = pin!(work);
        let outcome = poll_fn(|cx| {
            if let Poll::Ready(output) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            self.poll_expired(cx).map(|()| Err(Expired))
        })
        .await;
        self.disarm();
        outcome
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut entries = self.pack.entries.borrow_mut();
        let index = self.entry.index.get();
        entries.swap_remove(index);
        if let Some(moved) = entries.get(index) {
            moved.index.set(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{self, timeout};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn an_armed_guard_expires_after_its_limit_and_at_most_two_ticks_later() {
        let watchdog = Watchdog::new();
        let _early = watchdog.register();
        time::sleep(Duration::from_millis(120)).await;
        let guard = watchdog.register();
        let armed = Instant::now();
        guard.arm(LIMIT);
        guard.expired().await;
        assert!(armed.elapsed() >= LIMIT, "{:?}", armed.elapsed());
        assert!(armed.elapsed() <= LIMIT + 2 * TICK, "{:?}", armed.elapsed());
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn a_disarmed_guard_never_expires_and_a_new_arming_counts_from_then() {
        let watchdog = Watchdog::new();
        let guard = watchdog.register();
        guard.arm(LIMIT);
        guard.disarm();
        assert!(timeout(10 * LIMIT, guard.expired()).await.is_err());
        guard.arm(LIMIT);
        let armed = Instant::now();
        guard.expired().await;
        assert!(armed.elapsed() >= LIMIT);
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn arming_again_puts_the_end_off() {
        let watchdog = Watchdog::new();
        let guard = watchdog.register();
        let began = Instant::now();
        for _ in 0..5 {
            guard.arm(LIMIT);
            time::sleep(LIMIT / 2).await;
            assert!(!guard.is_expired());
        }
        guard.expired().await;
        assert!(began.elapsed() >= LIMIT * 3);
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn work_that_takes_too_long_is_dropped() {
        let watchdog = Watchdog::new();
        let guard = watchdog.register();
        let late = guard.limit(LIMIT, std::future::pending::<()>()).await;
        assert_eq!(late, Err(Expired));
        assert_eq!(guard.limit(LIMIT, async { 7 }).await, Ok(7));
        assert!(!guard.is_expired());
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn the_tick_stops_with_the_last_guard_and_starts_again_with_the_next() {
        let watchdog = Watchdog::new();
        let mut guards: Vec<_> = (0..5).map(|_| watchdog.register()).collect();
        for index in [1, 3, 0, 0, 0] {
            drop(guards.swap_remove(index)); // an order that moves entries about
        }
        assert_eq!(watchdog.registered(), 0);
        time::sleep(2 * TICK).await;
        assert!(!watchdog.0.ticking.get());
        let guard = watchdog.register();
        guard.arm(LIMIT);
        guard.expired().await;
    }
}
