//! How long an answer is held where somebody fails to prove who they are.
//!
//! Counted per claimed name and address. The secret is compared first and nobody is turned away; but while a pair
//! fails, all that it asks is answered later, a right secret too: if that came at once, whoever guesses would wait no
//! longer than that. A guess costs the time for which it is held, and the name's owner, when it shares the address,
//! at most [`LONGEST`]. The table is bounded; when it is full, the least used pair is forgotten.

use std::{net::IpAddr, time::Duration};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use crate::{model::ServiceName, net};

/// Failures that cost nothing: a secret that is being exchanged, a typing error.
const FREE: u32 = 5;
/// The first that is held is held for this long, each further one twice as long.
const FIRST: Duration = Duration::from_millis(100);
/// No answer is held longer: well below the time that clients wait.
const LONGEST: Duration = Duration::from_secs(2);
/// How long after its last failure a pair is forgiven.
const WINDOW: Duration = Duration::from_secs(30);
/// Pairs that are remembered.
const PAIRS: usize = 4096;

/// Who asks: the name that was claimed (`None`: no known one), and from where.
pub(super) type Pair = (Option<ServiceName>, IpAddr);

/// Counts failures.
pub(super) struct Throttle {
    failures: Cache<Pair, (Instant, u32)>,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Self { failures: Cache::new(PAIRS) }
    }

    /// The pair of a claimed name and the network of an address.
    pub(super) fn pair(name: Option<ServiceName>, peer: IpAddr) -> Pair {
        (name, net::source(peer))
    }

    /// How long the answer to `pair` is held after what it has failed at so far.
    pub(super) fn hold(&self, pair: &Pair, now: Instant) -> Duration {
        let Some(above) = self.count(pair, now).checked_sub(FREE + 1) else {
            return Duration::ZERO;
        };
        FIRST.saturating_mul(2_u32.saturating_pow(above)).min(LONGEST)
    }

    /// Counts one failure. Two at the same moment may count as one; the bound is a light one.
    pub(super) fn failed(&self, pair: Pair, now: Instant) {
        let count = self.count(&pair, now).saturating_add(1);
        self.failures.insert(pair, (now, count));
    }

    fn count(&self, pair: &Pair, now: Instant) -> u32 {
        let counted = self.failures.get(pair);
        let counted = counted.filter(|(last, _)| now.saturating_duration_since(*last) < WINDOW);
        counted.map_or(0, |(_, count)| count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web() -> Option<ServiceName> {
        Some("web".parse().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn each_failure_is_held_longer_up_to_a_bound_until_it_is_forgiven() {
        let throttle = Throttle::new();
        let guesser = Throttle::pair(web(), "192.0.2.1".parse().unwrap());
        let mut held = Vec::new();
        for _ in 0..50 {
            throttle.failed(guesser.clone(), Instant::now());
            held.push(throttle.hold(&guesser, Instant::now()).as_millis());
        }
        assert_eq!(held[..11], [0, 0, 0, 0, 0, 100, 200, 400, 800, 1600, 2000]);
        assert_eq!(held.last(), Some(&2000));
        tokio::time::advance(WINDOW).await;
        assert_eq!(throttle.hold(&guesser, Instant::now()), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn other_names_and_other_networks_are_not_held_up() {
        let throttle = Throttle::new();
        let guesser = Throttle::pair(web(), "2001:db8::1".parse().unwrap());
        for _ in 0..50 {
            throttle.failed(guesser.clone(), Instant::now());
        }
        for (name, peer, held) in [
            (web(), "2001:db8::2", true),
            (web(), "2001:db8:0:1::1", false),
            (Some("data".parse().unwrap()), "2001:db8::1", false),
            (None, "2001:db8::1", false),
        ] {
            let pair = Throttle::pair(name, peer.parse().unwrap());
            assert_eq!(throttle.hold(&pair, Instant::now()) > Duration::ZERO, held, "{pair:?}");
        }
    }
}
