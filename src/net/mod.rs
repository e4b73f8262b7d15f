//! The one seam to the network: dialling, listening, TLS.

mod stream;

pub use stream::{Stream, Tallied, Tally};
