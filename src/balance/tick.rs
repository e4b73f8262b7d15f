//! Time as the balancer keeps it: nanoseconds since a zero that the process chose.

use std::time::Duration;

use tokio::time::Instant;

/// A moment, in nanoseconds since the process's own zero. It fits an atomic, which an `Instant` does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub u64);

impl Tick {
    /// The moment `now`, counted from `zero`; moments before it are `zero` itself.
    #[must_use]
    pub fn since(zero: Instant, now: Instant) -> Self {
        Self(0).after(now.saturating_duration_since(zero))
    }

    /// This moment, moved on by `span`.
    #[must_use]
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was; zero when it is later.
    #[must_use]
    pub fn elapsed_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Whole milliseconds since zero.
    pub(super) fn millis(self) -> u64 {
        self.0 / 1_000_000
    }

    /// The moment so many milliseconds after zero.
    pub(super) fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }
}
