//! The control plane: registry, token issuer and their HTTP API. It meets proxies over the wire only.

mod identities;

pub use identities::{Identities, Identity};
