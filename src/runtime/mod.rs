//! How tasks live and end, and what time it is.
//!
//! The data plane is one thread per worker, each with a runtime of its own whose tasks never leave it
//! ([`Workers`], [`spawn_local`]). Whatever may stall (files, DNS, the control plane's client, log writing) lives on
//! the [`Side`] runtime and is born through a [`Supervisor`]. [`Shutdown`] tells all of them how far the end has
//! come. No other room starts a thread or a task by itself.

mod alarm;
mod backoff;
mod clock;
mod digest;
mod files;
mod panics;
mod shutdown;
mod side;
mod signals;
mod supervisor;
mod turn;
mod watchdog;
mod worker;

pub use alarm::Alarm;
pub use backoff::Backoff;
pub use clock::Clock;
pub use digest::{hex, sha256};
pub use files::{PrivateFault, clear_leftovers, read_private, write_private};
pub use panics::{panics, report_panics};
pub use shutdown::{InFlight, Phase, Shutdown};
pub use side::Side;
pub use signals::{Signal, Signals};
pub use supervisor::{Supervisor, SupervisorError};
pub use turn::Turn;
pub use watchdog::{Expired, Guard, TICK, Watchdog};
pub use worker::{RuntimeError, WorkerId, Workers, cpus, open_files, spawn_local};
