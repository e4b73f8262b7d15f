//! The vocabulary: names, places, addresses, scopes, money, and the project they form.
//!
//! The one idea: text becomes a type at the door and is never looked at as text again. Every constructor
//! here checks; nothing behind it has to. No I/O, no async and no clock live on this floor.

mod cloud;
mod endpoint;
mod money;
mod name;
mod origin;
mod project;
mod scope;
pub mod span;

pub use cloud::{NetworkMode, Place, PlaceError, Provider, Region, Zone};
pub use endpoint::{AuthMethod, Endpoint, EndpointState};
pub use money::{ByteCount, NanoUsd};
pub use name::{EndpointId, NameError, ServiceName};
pub use origin::{Host, Origin, OriginError, Scheme};
pub use project::{
    Backoff, Circuit, Connection, Enforcement, Fallback, HealthCheck, HealthKind, Hedge,
    HedgeAfter, Issuer, Limits, Locality, Networking, Policy, Project, Protocol, Retries, Routing,
    Service, Sticky, Timeouts,
};
pub use scope::{Scope, ScopeError, ScopeSet};
