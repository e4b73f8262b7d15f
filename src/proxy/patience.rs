//! How long an attempt waits, and for whom.
//!
//! A deadline is for the endpoint, and runs while the endpoint is awaited. As long as a body streams, its sender sets the
//! pace; only a body that stalls ends the wait then, at the cost of whoever it waits for.

use std::{
    cell::RefCell,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    runtime::Alarm,
    upstream::{Awaited, Progress},
};

/// How long an attempt waits, and for whom.
pub(super) struct Patience {
    /// When the answer must be there; `None` as long as the body is on its way.
    pub deadline: Option<Instant>,
    /// From the end of the body on.
    pub limit: Duration,
    /// While the endpoint takes none of the body.
    pub stall: Duration,
    /// When the body had been sent.
    pub uploaded: Option<Instant>,
    /// What the endpoint had taken when it stopped, and how long it may take none.
    stuck: Option<(u64, Instant)>,
}

impl Patience {
    /// Nothing has been waited for yet. Without a `deadline` it is counted from the end of the body.
    pub(super) fn new(deadline: Option<Instant>, limit: Duration, stall: Duration) -> Self {
        Self { deadline, limit, stall, uploaded: None, stuck: None }
    }

    /// Ready when the endpoint has had its time.
    pub(super) fn poll(
        &mut self,
        progress: &Progress,
        alarm: &RefCell<Alarm>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let until = match (self.deadline, progress.get()) {
            (Some(deadline), _) => deadline,
            (None, (Awaited::Answer, _)) => {
                let now = Instant::now();
                self.uploaded = Some(now);
                *self.deadline.insert(now + self.limit)
            }
            // The client's side knows how long it may stall.
            (None, (Awaited::Body, _)) => return Poll::Pending,
            (None, (Awaited::Room, taken)) => match self.stuck {
                Some((before, until)) if before == taken => until,
                Some(_) | None => self.stuck.insert((taken, Instant::now() + self.stall)).1,
            },
        };
        alarm.borrow_mut().poll(until, cx)
    }
}
