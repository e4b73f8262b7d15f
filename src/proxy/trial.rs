//! One attempt, and what it teaches about its endpoint however it ends.
//!
//! Most attempts end with an answer or a failure, and then somebody says which. An attempt whose client leaves just ends,
//! in the middle of whatever it waited for: that its endpoint had not answered until then is all that anybody knows, and
//! that is told by the drop.

use tokio::time::Instant;

use crate::{
    balance::{CircuitState, Outcome, Pass, Vitals},
    model::Circuit,
    proxy::view::Ward,
};

/// An attempt on its way.
pub(super) struct Trial<'a> {
    ward: &'a Ward,
    circuit: &'a Circuit,
    vitals: &'a Vitals,
    /// Goes back to the circuit, once.
    pass: Option<Pass>,
    /// Since when the endpoint is waited for; `None` as long as somebody else is, or where its pace means nothing.
    since: Option<Instant>,
}

impl<'a> Trial<'a> {
    /// An attempt that the circuit let pass, at an endpoint whose pace does not count yet.
    pub(super) fn begin(
        ward: &'a Ward,
        circuit: &'a Circuit,
        vitals: &'a Vitals,
        pass: Pass,
    ) -> Self {
        Self { ward, circuit, vitals, pass: Some(pass), since: None }
    }

    /// The endpoint is waited for since then.
    pub(super) fn awaits(&mut self, since: Option<Instant>) {
        self.since = since;
    }

    /// It came to this at `now`; gives the state that the circuit came to by it.
    pub(super) fn settle(mut self, outcome: Outcome, now: Instant) -> Option<CircuitState> {
        let pass = self.pass.take()?;
        let tick = self.ward.tick(now);
        let took = self.since.map(|since| now.duration_since(since));
        let latency = &self.vitals.latency;
        match (outcome, took) {
            (Outcome::Success, Some(took)) => latency.observe(took, tick),
            // An answer that came while the body was on its way says little about the endpoint's pace.
            (Outcome::Success, None) | (Outcome::Unknown, _) => {}
            (Outcome::Failure, took) => latency.penalize(took.unwrap_or_default(), tick),
        }
        self.vitals.breaker.settle(pass, outcome, self.circuit, tick)
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        let Some(pass) = self.pass.take() else { return };
        let now = Instant::now();
        let tick = self.ward.tick(now);
        if let Some(since) = self.since {
            self.vitals.latency.exceeds(now.duration_since(since), tick);
        }
        self.vitals.breaker.settle(pass, Outcome::Unknown, self.circuit, tick);
    }
}
