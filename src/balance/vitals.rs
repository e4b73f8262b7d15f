//! What the process knows about one endpoint right now.

use std::{
    ops::Deref,
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
};

use crate::balance::{Breaker, PeakEwma, Tick};

/// Latency, requests in flight, circuit and health of one endpoint; one per endpoint and process, kept when the
/// snapshot changes. Aligned so that no other data shares its cache lines (adjacent-line prefetch takes two).
#[derive(Debug)]
#[repr(align(128))]
pub struct Vitals {
    /// How long it takes to answer.
    pub latency: PeakEwma,
    /// Whether it is left alone for a while.
    pub breaker: Breaker,
    in_flight: AtomicU32,
    healthy: AtomicBool,
}

impl Vitals {
    /// An endpoint that nobody has asked yet: healthy, idle, circuit closed.
    #[must_use]
    pub fn new(now: Tick) -> Self {
        Self {
            latency: PeakEwma::new(now),
            breaker: Breaker::default(),
            in_flight: AtomicU32::new(0),
            healthy: AtomicBool::new(true),
        }
    }

    /// Requests that were sent to it and are not settled yet.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Whether its health checks pass. Without checks it is healthy.
    #[must_use]
    pub fn healthy(&self) -> bool {
        self.healthy.load(Relaxed)
    }

    /// A health check has decided.
    pub fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Relaxed);
    }
}

/// A request on its way: counted in [`Vitals::in_flight`] until this is dropped, however the request ends.
#[derive(Debug)]
pub struct Flight<V: Deref<Target = Vitals>>(V);

impl<V: Deref<Target = Vitals>> Flight<V> {
    /// Counts one more request.
    #[must_use]
    pub fn begin(vitals: V) -> Self {
        vitals.in_flight.fetch_add(1, Relaxed);
        Self(vitals)
    }

    /// The endpoint it is on its way to.
    #[must_use]
    pub fn vitals(&self) -> &Vitals {
        &self.0
    }
}

impl<V: Deref<Target = Vitals>> Drop for Flight<V> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_request_counts_until_it_is_dropped() {
        let vitals = Arc::new(Vitals::new(Tick(0)));
        let first = Flight::begin(vitals.clone());
        let second = Flight::begin(vitals.clone());
        assert_eq!(vitals.in_flight(), 2);
        drop(first);
        drop(second);
        assert_eq!(vitals.in_flight(), 0);
    }

    #[test]
    fn endpoints_do_not_share_cache_lines() {
        assert_eq!(align_of::<Vitals>(), 128);
        assert_eq!(size_of::<Vitals>(), 128);
    }
}
