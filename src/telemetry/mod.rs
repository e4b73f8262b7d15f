//! Logs and metrics, and the one list of metric names.
//!
//! Whoever counts owns a cell that nobody else writes, so counting is a load and a store; a scrape on another thread
//! adds the cells up. Log lines leave the caller's thread through a bounded queue that drops rather than waits.

mod access;
mod cells;
mod expose;
mod log;
pub mod names;
mod process;
mod writer;

pub use access::{AccessLog, Entry};
pub use cells::{Counter, Direction, Histogram};
pub use expose::{Families, Registry};
#[cfg(test)]
pub(crate) use log::tests::overhear;
pub use log::{Format, LogError, LogGuard, process_lines_dropped, start};
pub use writer::{Dropped, Flushing};
