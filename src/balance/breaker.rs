//! The circuit of one endpoint: closed, open, half-open.
//!
//! All of it is one atomic word, so that every worker sees the same circuit and a transition happens once. Closed
//! counts consecutive failures and opens *at* the threshold. After the recovery timeout exactly one request may try
//! (the probe); its success closes the circuit, its failure opens it for another timeout. What an answer means is
//! decided by the caller, who says it as an [`Outcome`].

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::{balance::Tick, model::Circuit};

/// What an attempt says about the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It answered as a working endpoint does; a refusal of the caller (401, 403, 404, 429) is such an answer, and 501.
    Success,
    /// Connect, TLS, reset and timeout failures, and every 5xx but 501.
    Failure,
    /// Nothing was learnt: the caller went away, or the attempt was never sent.
    Unknown,
}

/// What the circuit is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CircuitState {
    /// Requests pass.
    Closed,
    /// No request passes until the recovery timeout is over.
    Open,
    /// One request tries.
    HalfOpen,
}

impl CircuitState {
    /// The state as the admin API and the metrics write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half-open",
        }
    }
}

/// Who decides about the circuit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hold {
    /// The outcomes.
    #[default]
    Auto,
    /// An operator keeps it closed.
    Closed,
    /// An operator keeps it open.
    Open,
}

/// The circuit for people to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CircuitView {
    /// What it is in.
    pub state: CircuitState,
    /// Who decides.
    pub hold: Hold,
    /// Consecutive failures, as far as they were counted.
    pub failures: u32,
    /// When it opened, or its probe began; `None` while closed.
    pub since: Option<Tick>,
    /// When the next request may try; `None` while closed or held.
    pub next_probe: Option<Tick>,
}

/// Leave to send one request; goes back into [`Breaker::settle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a probe that is never settled keeps the circuit half-open until it is overdue"]
pub struct Pass {
    /// When its probe began; `None` for an ordinary request.
    probe: Option<u64>,
}

impl Pass {
    /// Whether this is the one request that tries a half-open circuit.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        self.probe.is_some()
    }
}

/// The circuit of one endpoint.
///
/// Layout of the word: bits 0–1 state, 2–3 hold, 4–15 failures (saturating), 16–63 milliseconds of `since`.
#[derive(Debug, Default)]
pub struct Breaker(AtomicU64);

/// The most failures that the word can count, and so the highest threshold but for [`Circuit::NEVER`].
const MOST_FAILURES: u64 = 0xfff;

/// The word, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word {
    state: CircuitState,
    hold: Hold,
    failures: u64,
    millis: u64,
}

impl Word {
    fn read(word: u64) -> Self {
        let state = match word & 0b11 {
            0 => CircuitState::Closed,
            1 => CircuitState::Open,
            _ => CircuitState::HalfOpen,
        };
        let hold = match word >> 2 & 0b11 {
            0 => Hold::Auto,
            1 => Hold::Closed,
            _ => Hold::Open,
        };
        Self { state, hold, failures: word >> 4 & MOST_FAILURES, millis: word >> 16 }
    }

    fn word(self) -> u64 {
        let state = match self.state {
            CircuitState::Closed => 0,
            CircuitState::Open => 1,
            CircuitState::HalfOpen => 2,
        };
        let hold = match self.hold {
            Hold::Auto => 0,
            Hold::Closed => 1,
            Hold::Open => 2,
        };
        state | hold << 2 | self.failures.min(MOST_FAILURES) << 4 | self.millis << 16
    }

    /// Whether a probe may begin. In half-open one is on its way; when it is a whole timeout old it is taken for lost.
    fn probe_due(self, circuit: &Circuit, now: Tick) -> bool {
        now.millis() >= self.millis.saturating_add(millis(circuit.recovery_timeout))
    }

    /// The word after an ordinary request's `outcome`; `None` when nothing changes.
    fn after_request(self, outcome: Outcome, circuit: &Circuit, now: Tick) -> Option<Self> {
        // An answer that comes after the circuit opened is about the time before.
        if self.state != CircuitState::Closed {
            return None;
        }
        match outcome {
            Outcome::Unknown => None,
            Outcome::Success => (self.failures > 0).then_some(Self { failures: 0, ..self }),
            // What never opens need not be counted either.
            Outcome::Failure if circuit.failure_threshold == Circuit::NEVER => None,
            Outcome::Failure => {
                let failures = (self.failures + 1).min(MOST_FAILURES);
                let threshold = u64::from(circuit.failure_threshold).clamp(1, MOST_FAILURES);
                let next = Self { failures, ..self };
                Some(if failures < threshold { next } else { next.opened(now.millis()) })
            }
        }
    }

    /// The word after the outcome of the probe that began at `began`; `None` when it is not that probe any more.
    fn after_probe(
        self,
        began: u64,
        outcome: Outcome,
        circuit: &Circuit,
        now: Tick,
    ) -> Option<Self> {
        if self.state != CircuitState::HalfOpen || self.millis != began {
            return None;
        }
        Some(match outcome {
            Outcome::Success => {
                Self { state: CircuitState::Closed, failures: 0, millis: 0, ..self }
            }
            Outcome::Failure => self.opened(now.millis()),
            // Nobody knows more than before, so the next request may try at once.
            Outcome::Unknown => {
                self.opened(now.millis().saturating_sub(millis(circuit.recovery_timeout)))
            }
        })
    }

    fn opened(self, millis: u64) -> Self {
        Self { state: CircuitState::Open, millis, ..self }
    }
}

fn millis(span: Duration) -> u64 {
    // 48 bits hold 8,900 years.
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX).min(u64::MAX >> 16)
}

impl Breaker {
    /// Whether [`Breaker::admit`] would let a request pass.
    #[must_use]
    pub fn permits(&self, circuit: &Circuit, now: Tick) -> bool {
        let word = self.0.load(Relaxed);
        // A closed circuit without failures, the everyday case, is the word 0.
        if word == 0 {
            return true;
        }
        let word = Word::read(word);
        match (word.hold, word.state) {
            (Hold::Closed, _) | (Hold::Auto, CircuitState::Closed) => true,
            (Hold::Open, _) => false,
            (Hold::Auto, CircuitState::Open | CircuitState::HalfOpen) => {
                word.probe_due(circuit, now)
            }
        }
    }

    /// Lets one request pass, or not. Of several workers that ask an open circuit whose time has come, one gets the
    /// probe.
    #[must_use]
    pub fn admit(&self, circuit: &Circuit, now: Tick) -> Option<Pass> {
        let word = self.0.load(Relaxed);
        if word == 0 {
            return Some(Pass { probe: None });
        }
        let seen = Word::read(word);
        match (seen.hold, seen.state) {
            (Hold::Closed, _) | (Hold::Auto, CircuitState::Closed) => Some(Pass { probe: None }),
            (Hold::Open, _) => None,
            (Hold::Auto, CircuitState::Open | CircuitState::HalfOpen) => {
                if !seen.probe_due(circuit, now) {
                    return None;
                }
                let began = now.millis();
                let probe = Word { state: CircuitState::HalfOpen, millis: began, ..seen };
                let claimed = self.0.compare_exchange(word, probe.word(), Relaxed, Relaxed);
                claimed.ok().map(|_before| Pass { probe: Some(began) })
            }
        }
    }

    /// What came of the request that `pass` was for. Gives the state that the circuit came to by it; `None`: it stayed.
    pub fn settle(
        &self,
        pass: Pass,
        outcome: Outcome,
        circuit: &Circuit,
        now: Tick,
    ) -> Option<CircuitState> {
        let word = self.0.load(Relaxed);
        if word == 0 && outcome != Outcome::Failure {
            return None;
        }
        let mut reached = None;
        // An `Err` is "nothing to write".
        let _unchanged = self.0.fetch_update(Relaxed, Relaxed, |word| {
            let word = Word::read(word);
            let next = match pass.probe {
                None => word.after_request(outcome, circuit, now),
                Some(began) => word.after_probe(began, outcome, circuit, now),
            };
            reached = next.map(|next| next.state).filter(|state| *state != word.state);
            next.map(Word::word)
        });
        reached
    }

    /// An operator takes the circuit over, or gives it back. Given back, it starts closed and without failures.
    pub fn hold(&self, hold: Hold) {
        let word = Word { state: CircuitState::Closed, hold, failures: 0, millis: 0 };
        self.0.store(word.word(), Relaxed);
    }

    /// The circuit for people to read. An open circuit whose time has come shows as half-open.
    #[must_use]
    pub fn view(&self, circuit: &Circuit, now: Tick) -> CircuitView {
        let word = Word::read(self.0.load(Relaxed));
        let since = Some(Tick::from_millis(word.millis));
        let next_probe = Some(Tick::from_millis(word.millis).after(circuit.recovery_timeout));
        let state = match (word.hold, word.state) {
            (Hold::Closed, _) => CircuitState::Closed,
            (Hold::Open, _) => CircuitState::Open,
            (Hold::Auto, CircuitState::Open) if word.probe_due(circuit, now) => {
                CircuitState::HalfOpen
            }
            (Hold::Auto, state) => state,
        };
        let failures = u32::try_from(word.failures).unwrap_or(u32::MAX);
        let by_outcomes = word.hold == Hold::Auto && state != CircuitState::Closed;
        CircuitView {
            state,
            hold: word.hold,
            failures,
            since: since.filter(|_| by_outcomes),
            next_probe: next_probe.filter(|_| by_outcomes),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Tick {
        Tick::from_millis(seconds * 1000)
    }

    fn opened(circuit: &Circuit) -> Breaker {
        let breaker = Breaker::default();
        for _ in 0..circuit.failure_threshold {
            let pass = breaker.admit(circuit, at(1)).unwrap();
            let _reached = breaker.settle(pass, Outcome::Failure, circuit, at(1));
        }
        breaker
    }

    fn state(breaker: &Breaker, now: Tick) -> CircuitState {
        breaker.view(&Circuit::default(), now).state
    }

    #[test]
    fn the_fifth_failure_in_a_row_opens_it() {
        let circuit = Circuit::default();
        let breaker = Breaker::default();
        for failures in 1..=4 {
            let pass = breaker.admit(&circuit, at(1)).unwrap();
            breaker.settle(pass, Outcome::Failure, &circuit, at(1));
            assert_eq!(breaker.view(&circuit, at(1)).failures, failures);
            assert_eq!(state(&breaker, at(1)), CircuitState::Closed);
        }
        let pass = breaker.admit(&circuit, at(1)).unwrap();
        breaker.settle(pass, Outcome::Failure, &circuit, at(1));
        assert_eq!(state(&breaker, at(1)), CircuitState::Open);
        assert_eq!(breaker.admit(&circuit, at(60)), None);
        assert_eq!(breaker.view(&circuit, at(1)).next_probe, Some(at(61)));
    }

    #[test]
    fn a_circuit_that_never_opens_does_not_open_at_what_the_word_can_count() {
        let circuit = Circuit { failure_threshold: Circuit::NEVER, ..Circuit::default() };
        let breaker = Breaker::default();
        for _ in 0..5000 {
            let pass = breaker.admit(&circuit, at(1)).expect("closed");
            breaker.settle(pass, Outcome::Failure, &circuit, at(1));
        }
        assert_eq!(breaker.view(&circuit, at(1)).state, CircuitState::Closed);
    }

    #[test]
    fn a_success_in_between_starts_the_count_again() {
        let circuit = Circuit::default();
        let breaker = Breaker::default();
        for outcome in [Outcome::Failure; 4].into_iter().chain([Outcome::Success]).cycle().take(40)
        {
            let pass = breaker.admit(&circuit, at(1)).unwrap();
            breaker.settle(pass, outcome, &circuit, at(1));
            assert_eq!(state(&breaker, at(1)), CircuitState::Closed);
        }
    }

    #[test]
    fn one_probe_tries_after_the_timeout_and_its_success_closes() {
        let circuit = Circuit::default();
        let breaker = opened(&circuit);
        assert!(!breaker.permits(&circuit, at(60)));
        assert!(breaker.permits(&circuit, at(61)));
        let probe = breaker.admit(&circuit, at(61)).unwrap();
        assert!(probe.is_probe());
        assert_eq!(breaker.admit(&circuit, at(61)), None);
        breaker.settle(probe, Outcome::Success, &circuit, at(62));
        assert_eq!(state(&breaker, at(62)), CircuitState::Closed);
        assert_eq!(breaker.view(&circuit, at(62)).failures, 0);
    }

    #[test]
    fn a_failed_probe_opens_it_for_another_timeout() {
        let circuit = Circuit::default();
        let breaker = opened(&circuit);
        let probe = breaker.admit(&circuit, at(61)).unwrap();
        breaker.settle(probe, Outcome::Failure, &circuit, at(62));
        assert_eq!(breaker.admit(&circuit, at(121)), None);
        assert!(breaker.admit(&circuit, at(122)).unwrap().is_probe());
    }

    #[test]
    fn a_probe_that_was_cancelled_lets_the_next_request_try_at_once() {
        let circuit = Circuit::default();
        let breaker = opened(&circuit);
        let probe = breaker.admit(&circuit, at(61)).unwrap();
        breaker.settle(probe, Outcome::Unknown, &circuit, at(62));
        assert!(breaker.admit(&circuit, at(62)).unwrap().is_probe());
    }

    #[test]
    fn a_lost_probe_is_replaced_and_its_late_answer_counts_no_more() {
        let circuit = Circuit::default();
        let breaker = opened(&circuit);
        let lost = breaker.admit(&circuit, at(61)).unwrap();
        let second = breaker.admit(&circuit, at(121)).unwrap();
        breaker.settle(lost, Outcome::Success, &circuit, at(122));
        assert_eq!(state(&breaker, at(122)), CircuitState::HalfOpen);
        breaker.settle(second, Outcome::Success, &circuit, at(122));
        assert_eq!(state(&breaker, at(122)), CircuitState::Closed);
    }

    #[test]
    fn answers_from_before_it_opened_change_nothing() {
        let circuit = Circuit::default();
        let breaker = Breaker::default();
        let early = breaker.admit(&circuit, at(1)).unwrap();
        for _ in 0..5 {
            let pass = breaker.admit(&circuit, at(1)).unwrap();
            breaker.settle(pass, Outcome::Failure, &circuit, at(1));
        }
        breaker.settle(early, Outcome::Success, &circuit, at(2));
        assert_eq!(state(&breaker, at(2)), CircuitState::Open);
    }

    #[test]
    fn an_operator_can_hold_it_and_give_it_back() {
        let circuit = Circuit::default();
        let breaker = opened(&circuit);
        breaker.hold(Hold::Closed);
        for _ in 0..9 {
            let pass = breaker.admit(&circuit, at(2)).unwrap();
            breaker.settle(pass, Outcome::Failure, &circuit, at(2));
        }
        assert!(breaker.permits(&circuit, at(2)));
        breaker.hold(Hold::Open);
        assert_eq!(breaker.admit(&circuit, at(1_000_000)), None);
        assert_eq!(state(&breaker, at(2)), CircuitState::Open);
        breaker.hold(Hold::Auto);
        assert!(!breaker.admit(&circuit, at(2)).unwrap().is_probe());
    }

    #[test]
    fn workers_that_ask_together_share_one_probe() {
        let circuit = Circuit::default();
        let breaker = opened(&circuit);
        let probes: usize = std::thread::scope(|scope| {
            let ask = || breaker.admit(&circuit, at(61)).is_some();
            let workers: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
            workers.into_iter().map(|worker| usize::from(worker.join().unwrap())).sum()
        });
        assert_eq!(probes, 1);
    }

    fn any_outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![Just(Outcome::Success), Just(Outcome::Failure), Just(Outcome::Unknown)]
    }

    proptest! {
        /// A model with plain fields, one request at a time, agrees at every step.
        #[test]
        fn the_word_behaves_as_the_plain_state_machine(
            threshold in 1u32..8,
            recovery_seconds in 1u64..100,
            steps in proptest::collection::vec((any_outcome(), 0u64..80), 1..200),
        ) {
            let circuit = Circuit {
                failure_threshold: threshold,
                recovery_timeout: Duration::from_secs(recovery_seconds),
            };
            let breaker = Breaker::default();
            let (mut now, mut failures, mut open_until) = (0u64, 0u32, None::<u64>);
            for (outcome, pause) in steps {
                now += pause;
                let expected = open_until.is_none_or(|until| now >= until);
                prop_assert_eq!(breaker.permits(&circuit, at(now)), expected);
                let pass = breaker.admit(&circuit, at(now));
                prop_assert_eq!(pass.is_some(), expected);
                let Some(pass) = pass else { continue };
                prop_assert_eq!(pass.is_probe(), open_until.is_some());
                breaker.settle(pass, outcome, &circuit, at(now));
                match (outcome, open_until.is_some()) {
                    (Outcome::Success, _) => (failures, open_until) = (0, None),
                    (Outcome::Failure, true) => open_until = Some(now + recovery_seconds),
                    (Outcome::Failure, false) => {
                        failures += 1;
                        if failures >= threshold {
                            open_until = Some(now + recovery_seconds);
                        }
                    }
                    (Outcome::Unknown, true) => open_until = Some(now),
                    (Outcome::Unknown, false) => {}
                }
            }
        }
    }
}
