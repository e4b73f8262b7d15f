//! The control plane: registry, token issuer and their HTTP API. It meets proxies over the wire only.
//!
//! The one idea: everything it serves comes from one immutable version of the project, swapped whole. A version
//! is on disk (its revision and the hash of its content) before anybody sees it, so that revisions never go
//! backwards, not even through a crash.
//!
//! It does not read `project.yaml` and watches no file: whoever runs it passes a checked project and, later,
//! the next one.

mod guard;
mod identities;
mod intake;
mod registry;
mod reject;
mod router;
mod serve;
mod services;
mod store;
mod throttle;
mod tokens;

pub use identities::{Identities, Identity};
pub use registry::{RegistryError, Replaced};
pub use serve::{Control, ControlError, Running, Settings, TlsFiles};
