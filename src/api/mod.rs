//! The control plane's HTTP contract: requests and answers, shared by both ends, and the one client for them.

mod client;
mod events;
mod types;

pub use client::{Client, ClientError, ClientSettings, Watch};
pub use events::{Event, EventError, Events};
pub use types::{
    CATALOG_READ, CONTROL_AUDIENCE, Catalog, Change, Credential, KEYS_WRITE, OauthRefusal,
    ServiceAnswer, ServiceList, ServiceSummary, TokenAnswer, TokenReply, USAGE_WRITE,
};
