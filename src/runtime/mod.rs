//! How tasks live and end, and what time it is.
//!
//! The data plane is one thread per worker, each with a runtime of its own whose tasks never leave it
//! ([`Workers`], [`spawn_local`]). Whatever may stall (files, DNS, the control plane's client, log writing) lives on
//! the [`Side`] runtime and is born through a [`Supervisor`]. [`Shutdown`] tells all of them how far the end has
//! come. No other room starts a thread or a task by itself.

mod clock;
mod files;
mod shutdown;
mod side;
mod signals;
mod supervisor;
mod watchdog;
mod worker;

pub use clock::Clock;
pub use files::write_private;
pub use shutdown::{InFlight, Phase, Shutdown};
pub use side::Side;
pub use signals::{Signal, Signals};
pub use supervisor::{Supervisor, SupervisorError};
pub use watchdog::{Expired, Guard, TICK, Watchdog};
pub use worker::{RuntimeError, WorkerId, Workers, cpus, open_files, panics, spawn_local};
