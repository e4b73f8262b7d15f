//! A time limit for one wait after the other, each with a deadline of its own.
//!
//! A timer that is made and dropped per request takes the timer wheel's lock twice. An alarm is made once and left where
//! it is: a later deadline only moves it when it rings too early. Exact to the millisecond of tokio's timers.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Rings at the deadline of the moment.
#[derive(Debug, Default)]
pub struct Alarm(Option<Pin<Box<Sleep>>>);

impl Alarm {
    /// Ready once `deadline` has come; the task is woken then, and perhaps once before.
    pub fn poll(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = self.0.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            if sleep.deadline() >= deadline {
                return Poll::Ready(());
            }
            // It rang for an earlier wait that is over.
            sleep.as_mut().reset(deadline);
        }
    }

    /// Gives the timer back, where no wait will follow for long.
    pub fn stop(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn it_rings_at_each_deadline_whether_that_is_later_or_earlier() {
        let mut alarm = Alarm::default();
        let begun = Instant::now();
        for at in [2, 30, 31, 40] {
            let deadline = begun + at * SECOND;
            // A wait that ended long before its limit leaves the timer where it was.
            let far = poll_fn(|cx| Poll::Ready(alarm.poll(begun + 100 * SECOND, cx))).await;
            assert!(far.is_pending());
            poll_fn(|cx| alarm.poll(deadline, cx)).await;
            assert_eq!(Instant::now(), deadline);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_has_passed_rings_at_once() {
        let mut alarm = Alarm::default();
        let begun = Instant::now();
        poll_fn(|cx| alarm.poll(begun, cx)).await;
        tokio::time::sleep(SECOND).await;
        poll_fn(|cx| alarm.poll(begun + SECOND, cx)).await;
        assert_eq!(begun.elapsed(), SECOND);
    }
}
