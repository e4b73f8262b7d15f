//! Which endpoints exist: sources feed one snapshot that the data plane reads without a lock.
//!
//! A source lives on the side runtime and publishes whole catalogs into the [`Directory`]; workers only ever see a
//! complete one. When every source is silent the last catalog stays, in memory and on disk, and its age is a number
//! that can be watched.

mod directory;
mod registry;
mod state;

pub use directory::Directory;
pub use registry::{Passes, Registry};
pub use state::{Origin, Seal, State, StateFault, Stored};
