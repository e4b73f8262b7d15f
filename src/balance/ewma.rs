//! Peak EWMA latency: the slowest recent answer counts at once and is forgotten slowly.
//!
//! Estimate and stamp share one word, so a reader always sees a pair that belongs together, and a writer either
//! wins whole or not at all. Reading is a pure projection: an endpoint that nobody asks looks a little faster with
//! every second, until it is asked again. That is how a recovered endpoint is found out.
//!
//! Answers that come within the same millisecond and are not slower than the estimate are not written: the average
//! is over time, not over requests, and the cache line stays where it is.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::balance::Tick;

/// The time constant of forgetting, in seconds (as Linkerd and Envoy have it).
const DECAY_SECONDS: f32 = 10.0;

/// What an endpoint that was never asked is taken for: Linkerd's default round trip, in seconds.
const UNMEASURED_SECONDS: f32 = 0.030;

/// What a fast failure counts as, so that failing quickly does not look like being fast (Linkerd's load biaser).
const PENALTY: Duration = Duration::from_secs(5);

/// The highest estimate, in seconds: anything slower is as bad.
const CEILING_SECONDS: f32 = 3600.0;

/// One endpoint's latency.
///
/// Layout of the word: the stamp in milliseconds (upper half, wrapping after 49 days), the estimate in seconds as
/// the bits of an `f32` (lower half); a negative estimate was never measured.
#[derive(Debug)]
pub struct PeakEwma(AtomicU64);

/// The word, taken apart.
#[derive(Clone, Copy)]
struct Estimate {
    seconds: f32,
    measured: bool,
    millis: u32,
}

impl Estimate {
    fn read(word: u64) -> Self {
        let seconds = f32::from_bits(low_half(word));
        Self {
            seconds: seconds.abs(),
            measured: seconds.is_sign_positive(),
            millis: low_half(word >> 32),
        }
    }

    fn word(self) -> u64 {
        let signed = if self.measured { self.seconds } else { -self.seconds };
        u64::from(self.millis) << 32 | u64::from(signed.to_bits())
    }

    /// Seconds since the stamp. Another worker may have stamped a little later than our `now`: then none have passed.
    fn age(self, now: Tick) -> f32 {
        let elapsed = low_half(now.millis()).wrapping_sub(self.millis);
        if elapsed > u32::MAX / 2 {
            return 0.0;
        }
        Duration::from_millis(u64::from(elapsed)).as_secs_f32()
    }

    /// The estimate as it looks after `age` seconds of silence.
    fn projected(self, age: f32) -> f32 {
        if age == 0.0 { self.seconds } else { self.seconds * (-age / DECAY_SECONDS).exp() }
    }
}

fn low_half(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

impl PeakEwma {
    /// An endpoint that nobody has asked yet.
    #[must_use]
    pub fn new(now: Tick) -> Self {
        let fresh = Estimate {
            seconds: UNMEASURED_SECONDS,
            measured: false,
            millis: low_half(now.millis()),
        };
        Self(AtomicU64::new(fresh.word()))
    }

    /// An answer took `latency`. A slower one than expected counts at once, a faster one with the weight of the time
    /// that passed since the last.
    pub fn observe(&self, latency: Duration, now: Tick) {
        let sample = latency.as_secs_f32().min(CEILING_SECONDS);
        // The closure may run again when another worker wrote in between; an `Err` is "nothing to write".
        let _unchanged = self.0.fetch_update(Relaxed, Relaxed, |word| {
            let old = Estimate::read(word);
            let age = old.age(now);
            let seconds = if !old.measured || sample >= old.seconds {
                sample
            } else if age == 0.0 {
                return None;
            } else {
                // exp_m1 keeps the small weight of a few milliseconds exact.
                old.seconds + (old.seconds - sample) * (-age / DECAY_SECONDS).exp_m1()
            };
            let millis = if age == 0.0 { old.millis } else { low_half(now.millis()) };
            Some(Estimate { seconds, measured: true, millis }.word())
        });
    }

    /// The endpoint failed after `latency`: it counts as slow, however fast the failure came.
    pub fn penalize(&self, latency: Duration, now: Tick) {
        self.observe(latency.max(PENALTY), now);
    }

    /// Whoever asked had no answer after `latency` and did not wait for it. That much it takes at least: the estimate only
    /// ever rises.
    pub fn exceeds(&self, latency: Duration, now: Tick) {
        let sample = latency.as_secs_f32().min(CEILING_SECONDS);
        // As above.
        let _unchanged = self.0.fetch_update(Relaxed, Relaxed, |word| {
            let old = Estimate::read(word);
            let age = old.age(now);
            if sample <= old.projected(age) {
                return None;
            }
            let millis = if age == 0.0 { old.millis } else { low_half(now.millis()) };
            Some(Estimate { seconds: sample, measured: old.measured, millis }.word())
        });
    }

    /// What an answer would take now, in seconds: the estimate less what was forgotten since. Never written back.
    #[must_use]
    pub fn project(&self, now: Tick) -> f32 {
        let estimate = Estimate::read(self.0.load(Relaxed));
        estimate.projected(estimate.age(now))
    }

    /// The last estimate as it was written, for people to read; `None` before the first answer.
    #[must_use]
    pub fn measured(&self) -> Option<Duration> {
        let estimate = Estimate::read(self.0.load(Relaxed));
        estimate.measured.then(|| Duration::from_secs_f32(estimate.seconds))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ZERO: Tick = Tick(0);

    fn at(millis: u64) -> Tick {
        Tick::from_millis(millis)
    }

    #[test]
    fn a_spike_counts_at_once_and_half_is_forgotten_after_seven_seconds() {
        let ewma = PeakEwma::new(ZERO);
        ewma.observe(Duration::from_millis(2), at(1));
        ewma.observe(Duration::from_millis(100), at(2));
        assert!((ewma.project(at(2)) - 0.1).abs() < 1e-6);
        // exp(-6.93/10) = 0.5
        assert!((ewma.project(at(6_933)) - 0.05).abs() < 1e-4);
    }

    #[test]
    fn a_first_answer_replaces_the_assumption_even_when_it_is_faster() {
        let ewma = PeakEwma::new(ZERO);
        assert_eq!(ewma.measured(), None);
        assert!((ewma.project(ZERO) - UNMEASURED_SECONDS).abs() < 1e-9);
        ewma.observe(Duration::from_micros(300), ZERO);
        assert!((ewma.project(ZERO) - 0.0003).abs() < 1e-7);
    }

    #[test]
    fn failing_fast_looks_slow() {
        let ewma = PeakEwma::new(ZERO);
        ewma.observe(Duration::from_millis(5), at(1));
        ewma.penalize(Duration::from_micros(90), at(2));
        assert_eq!(ewma.measured(), Some(PENALTY));
    }

    #[test]
    fn failing_slowly_counts_as_slow_as_it_was() {
        let ewma = PeakEwma::new(ZERO);
        ewma.penalize(Duration::from_secs(30), at(1));
        assert_eq!(ewma.measured(), Some(Duration::from_secs(30)));
    }

    #[test]
    fn whoever_does_not_wait_for_an_answer_only_makes_it_look_slower() {
        let ewma = PeakEwma::new(ZERO);
        ewma.exceeds(Duration::from_millis(1), at(1));
        assert!((ewma.project(at(1)) - UNMEASURED_SECONDS).abs() < 1e-5);
        ewma.exceeds(Duration::from_secs(1), at(2));
        assert!((ewma.project(at(2)) - 1.0).abs() < 1e-6);
        // No answer was ever measured, and the first replaces what was only feared.
        assert_eq!(ewma.measured(), None);
        ewma.observe(Duration::from_millis(5), at(3));
        assert_eq!(ewma.measured(), Some(Duration::from_millis(5)));
        ewma.exceeds(Duration::from_millis(300), at(4));
        assert!((ewma.project(at(4)) - 0.3).abs() < 1e-6);
        // What was forgotten since counts again.
        ewma.exceeds(Duration::from_millis(200), at(8_000));
        assert!((ewma.project(at(8_000)) - 0.2).abs() < 1e-6);
    }

    #[test]
    fn many_fast_answers_in_one_millisecond_weigh_as_much_as_the_time_they_took() {
        let ewma = PeakEwma::new(ZERO);
        ewma.observe(Duration::from_millis(100), at(1));
        for _ in 0..100_000 {
            ewma.observe(Duration::from_millis(1), at(2));
        }
        assert!(ewma.project(at(2)) > 0.099);
    }

    #[test]
    fn steady_answers_move_the_estimate_although_each_weighs_little() {
        let ewma = PeakEwma::new(ZERO);
        ewma.observe(Duration::from_millis(100), ZERO);
        for millis in 1..=60_000 {
            ewma.observe(Duration::from_millis(50), at(millis));
        }
        let seconds = ewma.project(at(60_000));
        assert!((0.0499..0.0505).contains(&seconds), "{seconds}");
    }

    #[test]
    fn a_reader_with_an_older_clock_sees_the_estimate_undecayed() {
        let ewma = PeakEwma::new(ZERO);
        ewma.observe(Duration::from_millis(100), at(5_000));
        assert!((ewma.project(at(4_000)) - 0.1).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn silence_only_ever_lowers_the_projection(
            latency_us in 1u64..10_000_000,
            start in 0u64..10_000_000_000,
            steps in proptest::collection::vec(0u64..5_000, 1..50),
        ) {
            let ewma = PeakEwma::new(at(start));
            ewma.observe(Duration::from_micros(latency_us), at(start));
            let mut now = start;
            let mut last = ewma.project(at(now));
            for step in steps {
                now += step;
                let next = ewma.project(at(now));
                prop_assert!(next <= last && next >= 0.0);
                last = next;
            }
        }

        #[test]
        fn the_estimate_stays_between_the_fastest_and_the_slowest_answer(
            samples in proptest::collection::vec((1u64..5_000_000, 0u64..20_000), 1..100),
        ) {
            let ewma = PeakEwma::new(ZERO);
            let mut now = 0;
            for (micros, pause) in &samples {
                now += pause;
                ewma.observe(Duration::from_micros(*micros), at(now));
            }
            let low = Duration::from_micros(samples.iter().map(|s| s.0).min().unwrap()).as_secs_f32();
            let high = Duration::from_micros(samples.iter().map(|s| s.0).max().unwrap()).as_secs_f32();
            let seen = ewma.measured().unwrap().as_secs_f32();
            prop_assert!(seen >= low * 0.999 && seen <= high * 1.001, "{low} {seen} {high}");
        }
    }
}
