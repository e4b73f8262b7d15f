//! What the data plane needs to know to run; filled in by `config`, never wrong.
//!
//! They are immutable and replaced whole while it runs. Role, service and the addresses of listeners stay as they were
//! at the start, but for `ports`: whoever sends other settings sees to that.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use ipnet::IpNet;

use crate::{
    http1::HeadLimits,
    identity::Rules,
    model::{Origin, Place, Protocol, ServiceName, Zone},
    net::{ClientTls, ServerTls},
    telemetry::AccessLog,
};

/// What a proxy is to the services around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Beside one service.
    Sidecar,
    /// In front of all services of a place.
    Edge,
    /// On a laptop.
    Dev,
}

/// One proxy.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What it is.
    pub role: Role,
    /// Who it is.
    pub service: ServiceName,
    /// Where it runs.
    pub place: Option<Place>,
    /// In which zone, where that is known.
    pub zone: Option<Zone>,
    /// The way out.
    pub outbound: Option<OutboundSettings>,
    /// The ways in.
    pub inbound: Vec<InboundSettings>,
    /// What a client may ask of it.
    pub limits: Limits,
    /// Whom TLS trusts.
    pub tls: Arc<ClientTls>,
    /// Writes a line per request, if anybody wants to read it.
    pub access: Option<AccessLog>,
}

/// The way out.
#[derive(Clone, Debug)]
pub struct OutboundSettings {
    /// Calls by name.
    pub listen: SocketAddr,
    /// Calls to one service, whatever the `Host`.
    pub ports: BTreeMap<ServiceName, SocketAddr>,
    /// Hosts that are no service of the project.
    pub unknown_hosts: UnknownHosts,
    /// The edge that cross-cloud calls go through.
    pub via: Option<Origin>,
    /// Whether a token replaces an `authorization` that the app set itself.
    pub override_authorization: bool,
}

/// What becomes of a call to a host that is no service of the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownHosts {
    /// It is refused.
    Deny,
    /// It is passed on, without a token.
    Allow,
}

/// One way in.
#[derive(Clone, Debug)]
pub struct InboundSettings {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The application behind it; an edge has none.
    pub app: Option<App>,
    /// Its certificate; `None`: plaintext.
    pub tls: Option<Arc<ServerTls>>,
    /// What a request must show.
    pub rules: Rules,
    /// Where connections may come from.
    pub allow_from: Vec<IpNet>,
    /// Whether the application sees the bearer.
    pub forward_authorization: bool,
    /// Verified tokens kept per worker.
    pub token_cache: usize,
}

/// The application behind an inbound listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct App {
    /// Its address.
    pub origin: Origin,
    /// What it speaks.
    pub protocol: Protocol,
}

/// What a client may ask of the proxy.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of a head.
    pub head: HeadLimits,
    /// Until a request's head is complete, until a TLS handshake is, and until the first request begins.
    pub header_timeout: Duration,
    /// How long a connection may be unused, once a request was answered on it.
    pub idle_timeout: Duration,
    /// How long a body may stall.
    pub stall_timeout: Duration,
    /// Concurrent streams of an HTTP/2 connection.
    pub streams: u32,
    /// Connections in all.
    pub connections: usize,
    /// Bytes of a request's body.
    pub body_bytes: Option<u64>,
}

impl Limits {
    /// How long a connection may be open without a request: whoever connects wants something.
    #[must_use]
    pub(super) fn first_request(&self) -> Duration {
        self.header_timeout.min(self.idle_timeout)
    }
}

impl Default for Limits {
    /// Envoy's values where it has any (60 KiB, 100 headers, 1 h, 5 min, 1024 streams); a head must be complete
    /// within 10 s, because nothing good is that slow.
    fn default() -> Self {
        Self {
            head: HeadLimits::default(),
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(3600),
            stall_timeout: Duration::from_secs(300),
            streams: 1024,
            connections: 10_000,
            body_bytes: None,
        }
    }
}
