//! The control plane's HTTP contract: requests and answers, shared by both ends, and the one client for them.

mod types;

pub use types::{CONTROL_AUDIENCE, Catalog, Change};
