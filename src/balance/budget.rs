//! How many attempts beyond the first a service may be sent.
//!
//! A retry is a second load on something that is already in trouble. The budget is a share of the requests of the
//! last ten seconds, so retries never multiply an outage, with a small floor so that a quiet service may retry at all.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::balance::Tick;

/// Seconds that count.
const WINDOW: u64 = 10;

/// A share of the last ten seconds' requests, for one service and process.
///
/// Each second has a slot: the second in the upper half of the word, the count in the lower.
#[derive(Debug)]
#[repr(align(128))]
pub struct Budget {
    percent: u64,
    floor: u64,
    requests: [AtomicU64; 10],
    spent: [AtomicU64; 10],
}

impl Budget {
    /// The budget for retries: 20 % of the requests, at least 3 in ten seconds.
    #[must_use]
    pub fn for_retries() -> Self {
        Self::new(20, 3)
    }

    /// `percent` of the requests of the last ten seconds, at least `floor`.
    #[must_use]
    pub fn new(percent: u32, floor: u32) -> Self {
        Self {
            percent: percent.into(),
            floor: floor.into(),
            requests: Default::default(),
            spent: Default::default(),
        }
    }

    /// A request has begun (its first attempt, not a retry).
    pub fn deposit(&self, now: Tick) {
        add(&self.requests, second(now));
    }

    /// Takes one attempt out of the budget; `false` when nothing is left.
    ///
    /// It is taken first and given back when it was too many, so that workers who ask together cannot overdraw.
    #[must_use]
    pub fn withdraw(&self, now: Tick) -> bool {
        let second = second(now);
        let slot = add(&self.spent, second);
        let within = sum(&self.spent, second) <= self.allowance(second);
        if !within {
            slot.fetch_sub(1, Relaxed);
        }
        within
    }

    /// How many attempts are left now.
    #[must_use]
    pub fn left(&self, now: Tick) -> u64 {
        let second = second(now);
        self.allowance(second).saturating_sub(sum(&self.spent, second))
    }

    fn allowance(&self, second: u64) -> u64 {
        (sum(&self.requests, second) * self.percent / 100).max(self.floor)
    }
}

/// Seconds since the process's zero, counted from 1 so that an untouched slot belongs to no second.
fn second(now: Tick) -> u64 {
    now.0 / 1_000_000_000 + 1
}

/// Counts one in the slot of `second`, which is emptied first when it still belongs to an older one.
fn add(slots: &[AtomicU64; 10], second: u64) -> &AtomicU64 {
    let [first, ..] = slots;
    let index = usize::try_from(second % WINDOW).unwrap_or(0);
    let slot = slots.get(index).unwrap_or(first);
    let mut word = slot.load(Relaxed);
    loop {
        // A slot that a faster worker has moved on already counts ours too: it is late by less than a second.
        if word >> 32 >= second {
            slot.fetch_add(1, Relaxed);
            return slot;
        }
        match slot.compare_exchange_weak(word, second << 32 | 1, Relaxed, Relaxed) {
            Ok(_) => return slot,
            Err(other) => word = other,
        }
    }
}

/// What was counted in the ten seconds that end with `second`.
fn sum(slots: &[AtomicU64; 10], second: u64) -> u64 {
    slots
        .iter()
        .map(|slot| slot.load(Relaxed))
        .filter(|word| (word >> 32) + WINDOW > second)
        .map(|word| word & u64::from(u32::MAX))
        .sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Tick {
        Tick::from_millis(seconds * 1000)
    }

    #[test]
    fn a_quiet_service_may_retry_three_times_in_ten_seconds() {
        let budget = Budget::for_retries();
        let granted = (0..10).filter(|_| budget.withdraw(at(0))).count();
        assert_eq!(granted, 3);
        assert!(!budget.withdraw(at(9)));
        assert!(budget.withdraw(at(10)));
    }

    #[test]
    fn a_busy_service_may_retry_one_in_five() {
        let budget = Budget::for_retries();
        for second in 0..10 {
            for _ in 0..100 {
                budget.deposit(at(second));
            }
        }
        assert_eq!((0..1000).filter(|_| budget.withdraw(at(9))).count(), 200);
        assert_eq!(budget.left(at(9)), 0);
    }

    #[test]
    fn workers_that_ask_together_cannot_overdraw() {
        let budget = Budget::for_retries();
        for _ in 0..1000 {
            budget.deposit(at(1));
        }
        let granted: usize = std::thread::scope(|scope| {
            let ask = || (0..1000).filter(|_| budget.withdraw(at(1))).count();
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert!((1..=200).contains(&granted), "{granted}");
    }

    proptest! {
        #[test]
        fn retries_never_exceed_the_share_of_the_window_or_the_floor(
            steps in proptest::collection::vec((0u64..4, 0usize..30, 0usize..30), 1..80),
        ) {
            let budget = Budget::for_retries();
            let mut now = 0u64;
            let mut log: Vec<(u64, usize, usize)> = Vec::new();
            for (pause, requests, wanted) in steps {
                now += pause;
                (0..requests).for_each(|_| budget.deposit(at(now)));
                let granted = (0..wanted).filter(|_| budget.withdraw(at(now))).count();
                log.push((now, requests, granted));
                let recent = || log.iter().filter(|entry| entry.0 + WINDOW > now);
                let seen: usize = recent().map(|entry| entry.1).sum();
                let spent: usize = recent().map(|entry| entry.2).sum();
                let allowed = (seen / 5).max(3);
                if granted > 0 {
                    prop_assert!(spent <= allowed, "{spent} of {allowed}");
                }
                // And what is left is really given: a refusal means that the budget is spent.
                prop_assert!(granted == wanted || spent >= allowed);
            }
        }
    }
}
