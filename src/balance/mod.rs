//! Which endpoint serves this attempt: arithmetic only.
//!
//! A choice is made from one cluster snapshot, so all attempts of a request judge the same list. What is known
//! about an endpoint (its [`Vitals`]) outlives snapshots and is shared by the workers of the process through
//! relaxed atomics on a cache line of its own; what exact shares need ([`Picker`]) belongs to one worker.
//!
//! Nothing here waits, locks, allocates per request or reads a clock: callers pass `now` (a [`Tick`]) and a random
//! source, so a test can replay any choice.

mod breaker;
mod budget;
mod ewma;
mod pick;
mod tick;
mod vitals;

pub use breaker::{Breaker, CircuitState, CircuitView, Hold, Outcome, Pass};
pub use budget::Budget;
pub use ewma::PeakEwma;
pub use pick::{Aim, Appraisal, Candidate, Chosen, NoChoice, Picker, Standing, Tier, Tried};
pub use tick::Tick;
pub use vitals::{Flight, Vitals};
