//! Wall time: the one place that reads it.

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the wall time. Inside a process time is `tokio::time::Instant`; wall time appears only in tokens, logs and
/// the ledger, and comes from here.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Source);

#[derive(Clone, Copy, Debug)]
enum Source {
    System,
    /// Wall time `start` was at `at`; it advances as tokio's clock does.
    Anchored {
        start: Timestamp,
        at: Instant,
    },
}

impl Clock {
    /// The machine's clock.
    #[must_use]
    pub const fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that shows `start` now and follows tokio's clock from there, so that a paused runtime pauses it too.
    #[must_use]
    pub fn starting_at(start: Timestamp) -> Self {
        Self(Source::Anchored { start, at: Instant::now() })
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        match self.0 {
            Source::System => system_now(),
            Source::Anchored { start, at } => start.saturating_add(at.elapsed()).unwrap_or(start),
        }
    }

    /// Seconds since 1970, as tokens write time (RFC 7519 `NumericDate`).
    #[must_use]
    pub fn unix_seconds(&self) -> i64 {
        self.now().as_second()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
fn system_now() -> Timestamp {
    // A clock outside jiff's range (years -9999 to 9999) is no clock; 1970 is as good as any answer then.
    Timestamp::try_from(std::time::SystemTime::now()).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_anchored_clock_follows_the_paused_clock() {
        let start: Timestamp = "2026-11-23T09:00:00Z".parse().unwrap();
        let clock = Clock::starting_at(start);
        assert_eq!(clock.now(), start);
        tokio::time::advance(Duration::from_secs(90)).await;
        assert_eq!(clock.unix_seconds(), start.as_second() + 90);
    }

    #[test]
    fn the_system_clock_is_past_the_day_this_was_written() {
        let written: Timestamp = "2026-11-01T00:00:00Z".parse().unwrap();
        assert!(Clock::system().now() > written);
    }
}
