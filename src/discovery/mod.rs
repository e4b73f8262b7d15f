//! Which endpoints exist: sources feed one snapshot that the data plane reads without a lock.
//!
//! A source lives on the side runtime and publishes whole catalogs into the [`Directory`]; workers only ever see a
//! complete one. Further sources ([`Source`]: DNS) lay the endpoints that they find over it. When every source is silent
//! the last catalog stays, in memory and on disk, and its age is a number that can be watched.

mod directory;
mod dns;
mod lookup;
mod overlay;
mod presence;
mod registry;
mod snapshot;
mod source;
mod state;

pub use directory::Directory;
pub use dns::{DnsKind, DnsSettings, DnsStats};
pub use overlay::{Deployment, Found, Layer};
pub use presence::{Advertisement, AskReady, AskServed, Introduction, Presence};
pub use registry::{Passes, Registry};
pub use snapshot::Snapshot;
pub use source::{Report, Source, Sources};
pub use state::{Origin, Seal, State, StateFault, Stored};
