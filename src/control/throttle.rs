//! How often somebody may fail to prove who they are.
//!
//! Counted per caller and address, and asked only about those who have just failed: whoever proves who it is never
//! waits for what others did under its name. The table is bounded; when it is full, the least used pair is forgotten.

use std::{net::IpAddr, time::Duration};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use crate::model::ServiceName;

/// Failures that are let pass in one [`WINDOW`].
const ALLOWED: u32 = 20;
/// How long failures count.
const WINDOW: Duration = Duration::from_secs(30);
/// Pairs that are remembered.
const PAIRS: usize = 4096;

/// Who failed: the name that was claimed (`None`: no known one), and from where.
pub(super) type Pair = (Option<ServiceName>, IpAddr);

/// Counts failures.
pub(super) struct Throttle {
    failures: Cache<Pair, (Instant, u32)>,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Self { failures: Cache::new(PAIRS) }
    }

    /// How long `pair` has to wait before it may try again; `None`: not at all.
    pub(super) fn wait(&self, pair: &Pair, now: Instant) -> Option<Duration> {
        let (since, count) = self.failures.get(pair)?;
        let left = WINDOW.checked_sub(now.saturating_duration_since(since))?;
        (count >= ALLOWED && !left.is_zero()).then_some(left)
    }

    /// Counts one failure. Two at the same moment may count as one; the bound is a light one.
    pub(super) fn failed(&self, pair: Pair, now: Instant) {
        let counted = self
            .failures
            .get(&pair)
            .filter(|(since, _)| now.saturating_duration_since(*since) < WINDOW);
        let (since, count) = counted.unwrap_or((now, 0));
        self.failures.insert(pair, (since, count.saturating_add(1)));
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn many_failures_make_one_address_wait_and_no_other() {
        let throttle = Throttle::new();
        let web = Some("web".parse().unwrap());
        let guesser = (web.clone(), IpAddr::from(Ipv4Addr::new(192, 0, 2, 1)));
        let service = (web, IpAddr::from(Ipv4Addr::LOCALHOST));
        for _ in 0..ALLOWED {
            assert_eq!(throttle.wait(&guesser, Instant::now()), None);
            throttle.failed(guesser.clone(), Instant::now());
        }
        assert_eq!(throttle.wait(&guesser, Instant::now()), Some(WINDOW));
        assert_eq!(throttle.wait(&service, Instant::now()), None);
        tokio::time::advance(WINDOW).await;
        assert_eq!(throttle.wait(&guesser, Instant::now()), None);
    }
}
