//! The control plane's HTTP contract: requests and answers, shared by both ends, and the one client for them.

mod client;
mod events;
mod operations;
mod patch;
mod shapes;
mod types;

pub use client::{Client, ClientError, ClientSettings, Watch};
pub use events::{Event, EventError, Events};
pub use patch::{Change, Patch, PatchError, Settings, Standing, Told, differences};
pub use types::{
    Adjustment, CATALOG_READ, CONTROL_AUDIENCE, Catalog, Credential, ENDPOINTS_OWN, EndpointAnswer,
    Heartbeat, IdentityDocument, KEYS_WRITE, OauthRefusal, PROJECT_WRITE, ProjectDocument,
    ProxyList, ProxyReport, ProxyRow, REGISTRY_WRITE, Registration, ServiceAnswer, ServiceList,
    ServiceSummary, Source, TokenAnswer, TokenReply, USAGE_WRITE,
};
