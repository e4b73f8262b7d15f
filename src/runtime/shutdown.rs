//! How far the end has come, known to every thread, and who is still at work.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFuture},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// The steps of a shutdown, in order. They are only ever climbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// Serving.
    Running = 0,
    /// `/readyz` says no, so that balancers look elsewhere; everything is still served.
    NotReady = 1,
    /// Listeners close; answers say `connection: close`.
    StopAccepting = 2,
    /// Connections end after what they are doing, idle ones at once; GOAWAY.
    Drain = 3,
    /// Whatever is left is dropped.
    Abort = 4,
}

impl Phase {
    const STEPS: [Self; 4] = [Self::NotReady, Self::StopAccepting, Self::Drain, Self::Abort];
}

/// One tree of shutdowns: a child follows its parent and may be ahead of it.
///
/// Asking ([`reached`](Self::reached)) is one relaxed load per generation, cheap enough for every request.
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<Node>);

#[derive(Debug)]
struct Node {
    phase: AtomicU8,
    /// One per step of [`Phase::STEPS`].
    steps: [CancellationToken; 4],
    work: TaskTracker,
    parent: Option<Shutdown>,
}

/// Someone at work: [`Shutdown::wait_idle`] waits until it is dropped.
#[derive(Debug)]
pub struct InFlight {
    _own: TaskTrackerToken,
    _parent: Option<Box<Self>>,
}

impl Shutdown {
    /// The root of a tree: nothing has been asked to end.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Node {
            phase: AtomicU8::new(Phase::Running as u8),
            steps: std::array::from_fn(|_| CancellationToken::new()),
            work: TaskTracker::new(),
            parent: None,
        }))
    }

    /// A part that can end before the whole: it follows this one, and its work counts here too.
    #[must_use]
    pub fn child(&self) -> Self {
        Self(Arc::new(Node {
            phase: AtomicU8::new(Phase::Running as u8),
            steps: self.0.steps.each_ref().map(CancellationToken::child_token),
            work: TaskTracker::new(),
            parent: Some(self.clone()),
        }))
    }

    /// Climbs to `phase`, waking whoever waits for it or for a step below. Going back is not possible.
    pub fn advance(&self, phase: Phase) {
        self.0.phase.fetch_max(phase as u8, Ordering::SeqCst);
        for (step, token) in Phase::STEPS.into_iter().zip(&self.0.steps) {
            if step <= phase {
                token.cancel();
            }
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        let own = self.0.phase.load(Ordering::Relaxed);
        let own = Phase::STEPS.into_iter().rev().find(|step| *step as u8 <= own);
        let above = self.0.parent.as_ref().map_or(Phase::Running, Self::phase);
        own.unwrap_or(Phase::Running).max(above)
    }

    /// Whether `phase` or a later one has come.
    #[must_use]
    pub fn reached(&self, phase: Phase) -> bool {
        self.0.phase.load(Ordering::Relaxed) >= phase as u8
            || self.0.parent.as_ref().is_some_and(|parent| parent.reached(phase))
    }

    /// Ends when `phase` or a later one has come; at once if it has, or if it is [`Phase::Running`]. Cancel-safe.
    pub async fn wait(&self, phase: Phase) {
        if let Some(step) = self.step(phase) {
            step.await;
        }
    }

    /// A token that is cancelled when `phase` comes, for crates that speak that type.
    #[must_use]
    pub fn token(&self, phase: Phase) -> CancellationToken {
        let reached = CancellationToken::new();
        match Phase::STEPS.iter().position(|step| *step == phase) {
            Some(index) => self.0.steps.get(index).cloned().unwrap_or(reached),
            None => {
                reached.cancel();
                reached
            }
        }
    }

    fn step(&self, phase: Phase) -> Option<WaitForCancellationFuture<'_>> {
        let index = Phase::STEPS.iter().position(|step| *step == phase)?;
        self.0.steps.get(index).map(CancellationToken::cancelled)
    }

    /// Counts the holder as at work until the answer is dropped. One atomic add: for connections and tunnels, not for
    /// each request.
    #[must_use]
    pub fn work(&self) -> InFlight {
        InFlight {
            _own: self.0.work.token(),
            _parent: self.0.parent.as_ref().map(|parent| Box::new(parent.work())),
        }
    }

    /// How many are at work, children's included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.work.len()
    }

    /// Ends when nobody is at work. Meant for after [`Phase::StopAccepting`]: it does not keep newcomers out.
    /// Cancel-safe.
    pub async fn wait_idle(&self) {
        self.0.work.close();
        self.0.work.wait().await;
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, time::Duration};

    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn a_later_phase_includes_the_earlier_ones() {
        let shutdown = Shutdown::new();
        let mut stopped = pin!(shutdown.wait(Phase::StopAccepting));
        assert!(poll!(&mut stopped).is_pending());
        shutdown.advance(Phase::Drain);
        stopped.await;
        shutdown.wait(Phase::NotReady).await;
        assert!(shutdown.reached(Phase::StopAccepting) && !shutdown.reached(Phase::Abort));
        shutdown.advance(Phase::NotReady);
        assert_eq!(shutdown.phase(), Phase::Drain);
    }

    #[tokio::test]
    async fn a_child_follows_its_parent_and_may_end_first() {
        let whole = Shutdown::new();
        let part = whole.child();
        part.advance(Phase::StopAccepting);
        assert_eq!((whole.phase(), part.phase()), (Phase::Running, Phase::StopAccepting));
        whole.advance(Phase::Abort);
        part.wait(Phase::Abort).await;
        assert!(part.reached(Phase::Abort) && part.token(Phase::Drain).is_cancelled());
        assert_eq!(part.phase(), Phase::Abort);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_means_that_nobody_is_at_work_in_any_part() {
        let whole = Shutdown::new();
        let part = whole.child();
        let (first, second) = (whole.work(), part.work());
        assert_eq!((whole.in_flight(), part.in_flight()), (2, 1));
        drop(first);
        let early = tokio::time::timeout(Duration::from_secs(60), whole.wait_idle()).await;
        assert!(early.is_err());
        drop(second);
        whole.wait_idle().await;
    }

    #[tokio::test]
    async fn waiting_for_running_ends_at_once() {
        let shutdown = Shutdown::new();
        shutdown.wait(Phase::Running).await;
        assert!(shutdown.reached(Phase::Running) && shutdown.token(Phase::Running).is_cancelled());
    }
}
