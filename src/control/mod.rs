//! The control plane: registry, token issuer and their HTTP API. It meets proxies over the wire only.
//!
//! The one idea: everything it serves comes from one immutable version of the project, swapped whole. A version
//! is on disk (its revision and the hash of its content) before anybody sees it, so that revisions never go
//! backwards, not even through a crash.
//!
//! It does not read `project.yaml` and watches no file: whoever runs it passes a checked project and, later,
//! the next one.

mod asked;
mod begin;
mod book;
mod contract;
mod endpoints;
mod guard;
mod identities;
mod intake;
mod journal;
mod keys;
mod leases;
mod operations;
mod project;
mod proxies;
mod public;
mod rates;
mod registry;
mod reject;
mod router;
mod serve;
mod services;
mod throttle;
mod tokens;

pub use book::BookError;
pub use identities::{Identities, Identity};
pub use project::{document, identities};
pub use registry::RegistryError;
pub use serve::{Control, ControlError, Replaced, Running, Settings, TlsFiles, usual_store};
