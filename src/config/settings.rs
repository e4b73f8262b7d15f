//! What a proxy was told: every field checked, every default filled in.

use std::{
    collections::BTreeMap, net::SocketAddr, num::NonZeroUsize, path::PathBuf, time::Duration,
};

use http::Method;
use ipnet::IpNet;
use url::Url;

use super::defaults::{
    CONNECTIONS, HEADER_BYTES, HEADER_TIMEOUT, HEADERS, IDLE_TIMEOUT, STALL_TIMEOUT, STREAMS,
};
use crate::{
    discovery::Source,
    model::{EndpointId, Origin, Place, ScopeSet, ServiceName, Zone},
};

/// One proxy, as its file, environment and flags describe it.
#[derive(Clone, Debug, PartialEq)]
pub struct ProxyFile {
    /// What it stands beside.
    pub role: Role,
    /// Who it speaks for.
    pub service: ServiceName,
    /// Where it runs; only a `dev` proxy may not say.
    pub place: Option<Place>,
    /// The availability zone, where it is known.
    pub zone: Option<Zone>,
    /// Where the registry comes from.
    pub registry: Registry,
    /// Further sources of endpoints.
    pub discovery: Vec<Source>,
    /// The listener for calls of the local application.
    pub outbound: Option<Outbound>,
    /// The listeners for callers; an edge has at least one.
    pub inbound: Vec<Inbound>,
    /// The admin API.
    pub admin: Admin,
    /// Certificates added to the system's roots for upstreams.
    pub trust_ca_file: Option<PathBuf>,
    /// What one client may take.
    pub limits: ProxyLimits,
    /// How it ends.
    pub shutdown: ShutdownTimes,
    /// What it writes.
    pub log: Log,
    /// Data-plane threads.
    pub workers: Workers,
}

impl ProxyFile {
    /// What is right and yet worth a look.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let Some(outbound) = &self.outbound else { return Vec::new() };
        let ports = outbound.ports.iter();
        let ports = ports.map(|(service, at)| (format!("outbound.ports.{service}"), *at));
        let all = [("outbound.listen".to_owned(), outbound.listen)].into_iter().chain(ports);
        let open = all.filter(|(_, at)| !at.ip().is_loopback());
        open.map(|(key, at)| {
            let me = &self.service;
            format!("{key}: {at} is not loopback: whoever reaches it calls with the tokens of {me}")
        })
        .collect()
    }

    /// Every address it listens on, each with the key that chose it.
    #[must_use]
    pub fn addresses(&self) -> Vec<(SocketAddr, String)> {
        let mut all = vec![(self.admin.listen, "admin.listen".to_owned())];
        all.extend(self.admin.probes.map(|at| (at, "admin.probes".to_owned())));
        if let Some(outbound) = &self.outbound {
            all.push((outbound.listen, "outbound.listen".to_owned()));
            let ports = outbound.ports.iter();
            all.extend(ports.map(|(service, at)| (*at, format!("outbound.ports.{service}"))));
        }
        all.extend(self.inbound.iter().enumerate().map(|(index, inbound)| match index {
            0 => (inbound.listen, "inbound.listen".to_owned()),
            _ => (inbound.listen, format!("inbound[{index}].listen")),
        }));
        all
    }
}

/// What a proxy stands beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// One service.
    Sidecar,
    /// All services of a place.
    Edge,
    /// A developer.
    Dev,
}

/// Where a proxy's registry comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Registry {
    /// A control plane.
    Control(Control),
    /// This `project.yaml`.
    File(PathBuf),
}

/// The control plane to follow.
#[derive(Clone, Debug, PartialEq)]
pub struct Control {
    /// Its addresses; at least one.
    pub urls: Vec<Url>,
    /// The CA of its certificate, if no public one.
    pub ca_file: Option<PathBuf>,
    /// How this proxy proves who it is.
    pub credential: Credential,
    /// Where the last snapshot, keys and tokens survive a restart.
    pub state_dir: Option<PathBuf>,
    /// How old a kept snapshot may be.
    pub max_snapshot_age: Duration,
}

/// How a proxy proves who it is. The files are read when they are needed, so a rotated secret is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A shared secret.
    ClientSecretFile(PathBuf),
    /// A projected OIDC token.
    TokenFile(PathBuf),
    /// A private key in PEM.
    PrivateKeyFile(PathBuf),
}

/// The listener for calls of the local application.
#[derive(Clone, Debug, PartialEq)]
pub struct Outbound {
    /// By name: absolute-form, `Host` or CONNECT.
    pub listen: SocketAddr,
    /// A listener of its own per service.
    pub ports: BTreeMap<ServiceName, SocketAddr>,
    /// Hosts that are no service of the project.
    pub unknown_hosts: UnknownHosts,
    /// An edge to send cross-cloud calls through.
    pub via: Option<Origin>,
    /// What happens to an `authorization` that the application set.
    pub override_authorization: bool,
    /// A bearer from elsewhere per service, re-read when it changes.
    pub token_files: BTreeMap<ServiceName, PathBuf>,
}

/// What happens to calls for hosts that are no service of the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownHosts {
    /// They are refused.
    Deny,
    /// They are passed on, without a token.
    Allow,
}

/// A listener for callers.
#[derive(Clone, Debug, PartialEq)]
pub struct Inbound {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The application behind it; an edge has none.
    pub app: Option<App>,
    /// Who ends TLS.
    pub tls: Tls,
    /// Networks that may connect.
    pub allow_from: Vec<IpNet>,
    /// First match wins, no match is refused. `None`: any granted scope.
    pub rules: Option<Vec<Rule>>,
    /// `false`: the bearer is removed before the application.
    pub forward_authorization: bool,
    /// Verified tokens kept per worker; 0: verify every time.
    pub token_cache: usize,
    /// Where others reach it, if the registry is to be told.
    pub advertise: Option<Advertise>,
}

/// An endpoint that the registry is told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertise {
    /// Its id; one is made of the place and the host of `url` where none is written.
    pub id: Option<EndpointId>,
    /// Its public address.
    pub url: Origin,
    /// Its address in mode vpn.
    pub internal_url: Option<Origin>,
    /// Its address in mode `private_peering`.
    pub private_url: Option<Origin>,
    /// How long it stays without a heartbeat.
    pub ttl: Duration,
}

/// The application behind an inbound listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct App {
    /// Its address.
    pub origin: Origin,
    /// What is spoken to it.
    pub protocol: AppProtocol,
}

/// What is spoken to the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppProtocol {
    /// HTTP/1.1, and HTTP/2 for gRPC.
    Auto,
    /// HTTP/2 only, without TLS.
    H2c,
}

/// Who ends the TLS of a caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// This proxy, with a certificate from files that are re-read when they change.
    Files {
        /// The chain in PEM.
        cert_file: PathBuf,
        /// Its key in PEM.
        key_file: PathBuf,
        /// The oldest version spoken.
        min_version: TlsVersion,
    },
    /// The cloud's front end; tokens are still checked.
    Platform,
    /// Nobody: the listener is on loopback.
    Off,
}

/// The oldest TLS version that is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// 1.2
    V12,
    /// 1.3
    V13,
}

/// One line of `inbound.rules`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which paths, after normalising.
    pub path: RulePath,
    /// Which methods; `None`: every one.
    pub methods: Option<Vec<Method>>,
    /// Who may.
    pub access: Access,
}

/// Which paths a rule is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RulePath {
    /// This one.
    Exact(String),
    /// This one and everything below it. Without the `/*` that it is written with; empty for `/*` itself.
    Below(String),
}

/// Who may do what a rule is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anyone; no token is asked for.
    Public,
    /// A token with every one of these scopes; with none, any valid token.
    Scopes(ScopeSet),
}

/// The admin API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// On loopback.
    pub listen: SocketAddr,
    /// A second listener with `/livez`, `/readyz` and `/metrics` only.
    pub probes: Option<SocketAddr>,
}

/// What one client may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyLimits {
    /// Bytes of one request head.
    pub header_bytes: usize,
    /// Fields of one request head.
    pub headers: usize,
    /// Until a request head is there.
    pub header_timeout: Duration,
    /// A connection without a request.
    pub idle_timeout: Duration,
    /// While nothing of a body moves.
    pub stall_timeout: Duration,
    /// HTTP/2 streams of one connection.
    pub streams: u32,
    /// Connections of one listener.
    pub connections: usize,
    /// Bytes of one request body; `None`: no limit.
    pub body_bytes: Option<u64>,
}

impl Default for ProxyLimits {
    fn default() -> Self {
        Self {
            header_bytes: HEADER_BYTES,
            headers: HEADERS,
            header_timeout: HEADER_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
            stall_timeout: STALL_TIMEOUT,
            streams: STREAMS,
            connections: CONNECTIONS,
            body_bytes: None,
        }
    }
}

/// How a proxy ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShutdownTimes {
    /// Between being not ready and accepting no more.
    pub grace: Duration,
    /// When it ends, whatever is still open.
    pub deadline: Duration,
}

/// What a proxy writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// In which form.
    pub format: LogFormat,
    /// Whether there is a line per request.
    pub access: bool,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// How many data-plane threads there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers {
    /// As many as this container may use CPUs.
    Auto,
    /// This many.
    Count(NonZeroUsize),
}
