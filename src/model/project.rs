//! A project: all services that share one registry, one issuer and one ledger, as `project.yaml` describes
//! them and as the catalog carries them to every proxy.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use url::Url;

use crate::model::{Endpoint, NetworkMode, Place, ScopeSet, ServiceName, span};

/// What is true for the whole project, free of secrets: identities stay with the control plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Project {
    /// The project's name.
    pub name: ServiceName,
    /// How places reach each other.
    pub networking: Networking,
    /// Every service by name; shared, so that the next version of a large project costs what has changed in it.
    #[serde(with = "shared")]
    pub services: BTreeMap<ServiceName, Arc<Service>>,
    /// Caller → callee → scopes. What is not listed is refused.
    pub permissions: BTreeMap<ServiceName, BTreeMap<ServiceName, ScopeSet>>,
    /// Further issuers whose tokens callees accept.
    pub issuers: Vec<Issuer>,
    /// Whether a missing grant refuses.
    pub mode: Enforcement,
}

impl Project {
    /// The scopes that `caller` holds at `callee`; `None` without a grant.
    #[must_use]
    pub fn granted(&self, caller: &ServiceName, callee: &ServiceName) -> Option<&ScopeSet> {
        self.permissions.get(caller)?.get(callee)
    }
}

/// Services on the wire: without a trace of who shares them.
mod shared {
    use super::{Arc, BTreeMap, Deserialize, Service, ServiceName};

    pub(super) fn serialize<S: serde::Serializer>(
        services: &BTreeMap<ServiceName, Arc<Service>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(services.iter().map(|(name, service)| (name, &**service)))
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<ServiceName, Arc<Service>>, D::Error> {
        let services = BTreeMap::<ServiceName, Service>::deserialize(deserializer)?;
        Ok(services.into_iter().map(|(name, service)| (name, Arc::new(service))).collect())
    }
}

/// How the places of a project reach each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Networking {
    /// `false`: only endpoints of the caller's own place are used.
    pub multi_cloud: bool,
    /// For pairs of places without a row in `connections`.
    pub default_mode: NetworkMode,
    /// Pairs of places with a mode of their own.
    pub connections: Vec<Connection>,
}

impl Networking {
    /// The modes in which a caller at `from` may reach `to`, the preferred one first.
    #[must_use]
    pub fn modes(&self, from: &Place, to: &Place) -> (NetworkMode, Option<NetworkMode>) {
        let row = self.connections.iter().find(|row| row.from == *from && row.to == *to);
        row.map_or((self.default_mode, None), |row| {
            let fallback = match row.fallback {
                Fallback::Public if row.mode != NetworkMode::Public => Some(NetworkMode::Public),
                Fallback::Public | Fallback::None => None,
            };
            (row.mode, fallback)
        })
    }
}

/// A row of `multi_cloud.connections`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The caller's place.
    pub from: Place,
    /// The callee's place.
    pub to: Place,
    /// How `from` reaches `to`.
    pub mode: NetworkMode,
    /// Capacity in bits per second, where it is known.
    pub bandwidth_bps: Option<u64>,
    /// What to do when an endpoint has no address in `mode`, or none answers there.
    pub fallback: Fallback,
}

/// What follows when a connection's mode cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fallback {
    /// The internet.
    Public,
    /// The endpoint is not reached at all.
    #[default]
    None,
}

/// One logical name and everything that is said about it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Its deployments.
    pub endpoints: Vec<Endpoint>,
    /// Why it has none, where the source that should have found them says so. Of this process alone.
    #[serde(skip)]
    pub absence: Option<&'static str>,
    /// The scopes that exist at this service.
    pub scopes: ScopeSet,
    /// What the hop to an endpoint speaks.
    pub protocol: Protocol,
    /// How an endpoint is chosen.
    pub routing: Routing,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How often and how soon an attempt is repeated.
    pub retries: Retries,
    /// A second attempt before the first has answered.
    pub hedge: Option<Hedge>,
    /// When an endpoint is left alone.
    pub circuit: Circuit,
    /// How an endpoint's health is found out.
    pub health: HealthCheck,
    /// Ceilings per endpoint and proxy.
    pub limits: Limits,
}

/// What the hop to an endpoint speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/2 for gRPC and where connections are dear, HTTP/1.1 otherwise.
    #[default]
    Auto,
    /// HTTP/1.1.
    H1,
    /// HTTP/2.
    H2,
}

/// How one of several endpoints is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routing {
    /// What a good choice is.
    pub policy: Policy,
    /// For `balanced`: the latency within which the cheapest wins.
    #[serde(with = "span::option")]
    pub latency_target: Option<Duration>,
    /// How far from the caller an endpoint may be while a nearer one is left.
    pub locality: Locality,
    /// Keeps a client at one endpoint.
    pub sticky: Option<Sticky>,
}

/// What a good choice of endpoint is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The fastest.
    #[default]
    Latency,
    /// The cheapest path.
    Cost,
    /// The cheapest within `latency_target`.
    Balanced,
}

/// How near endpoints are preferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// Nearness does not count by itself.
    #[default]
    None,
    /// The caller's zone first.
    Zone,
    /// The caller's region first.
    Region,
    /// The caller's provider first.
    Provider,
}

/// What keeps a client at one endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sticky {
    /// The value of a request header.
    Header(String),
    /// A cookie of this name.
    Cookie(String),
}

/// How long the parts of a call may take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// Until a connection (and TLS on it) stands.
    #[serde(with = "span")]
    pub connect: Duration,
    /// Until the response head of one attempt is there; `None`: only `request` limits.
    #[serde(with = "span::option")]
    pub attempt: Option<Duration>,
    /// Until the response head is there, over all attempts; `None`: no limit.
    #[serde(with = "span::option")]
    pub request: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            attempt: None,
            request: Some(Duration::from_secs(30)),
        }
    }
}

/// How often and how soon an attempt is repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retries {
    /// Attempts in all, the first included; at least 1.
    pub max_attempts: u32,
    /// The pause before the next one.
    pub backoff: Backoff,
}

impl Default for Retries {
    fn default() -> Self {
        Self { max_attempts: 3, backoff: Backoff::default() }
    }
}

/// An exponential pause with full jitter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backoff {
    /// The first pause.
    #[serde(with = "span")]
    pub base: Duration,
    /// The longest pause.
    #[serde(with = "span")]
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { base: Duration::from_millis(25), max: Duration::from_secs(1) }
    }
}

/// A second attempt before the first has answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hedge {
    /// When it starts.
    pub after: HedgeAfter,
    /// The share of requests that may be hedged, in percent.
    pub budget_percent: f64,
}

/// When a hedge starts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HedgeAfter {
    /// At this percentile of the endpoint's own latency.
    Percentile(f64),
    /// After a fixed time.
    Fixed(#[serde(with = "span")] Duration),
}

/// When an endpoint is left alone for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Circuit {
    /// Consecutive failures that open it.
    pub failure_threshold: u32,
    /// How long it stays open.
    #[serde(with = "span")]
    pub recovery_timeout: Duration,
}

impl Circuit {
    /// The threshold of a circuit that never opens.
    pub const NEVER: u32 = u32::MAX;
}

impl Default for Circuit {
    fn default() -> Self {
        Self { failure_threshold: 5, recovery_timeout: Duration::from_secs(60) }
    }
}

/// How an endpoint's health is found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is asked.
    pub kind: HealthKind,
    /// The path of an HTTP check; without one there is no active HTTP check.
    pub path: Option<String>,
    /// Between two checks.
    #[serde(with = "span")]
    pub interval: Duration,
    /// How long one check may take.
    #[serde(with = "span")]
    pub timeout: Duration,
    /// Good checks in a row that make an endpoint healthy.
    pub healthy: u32,
    /// Bad checks in a row that make it unhealthy.
    pub unhealthy: u32,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            kind: HealthKind::Http,
            path: None,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
            healthy: 2,
            unhealthy: 3,
        }
    }
}

/// What an active check asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthKind {
    /// `GET path`, 2xx is healthy.
    #[default]
    Http,
    /// The gRPC health service.
    Grpc,
    /// A TCP (and TLS) connect.
    Tcp,
}

/// Ceilings per endpoint and proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Connections.
    pub connections: Option<u32>,
    /// Requests in flight.
    pub requests: Option<u32>,
}

/// A further issuer whose tokens callees accept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issuer {
    /// The `iss` of its tokens, compared to the letter.
    pub issuer: String,
    /// Where its keys are.
    pub jwks_uri: Option<Url>,
    /// Its keys, read from a file by whoever reads the project; as JWK set JSON.
    pub jwks: Option<serde_json::Value>,
    /// Audiences that stand for every service. The name of a service stands for that one alone, where it is accepted
    /// anyway.
    pub audiences: Vec<String>,
}

/// Whether a missing grant refuses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Enforcement {
    /// It refuses.
    #[default]
    Enforce,
    /// It is reported and let through until this moment.
    LearnUntil(jiff::Timestamp),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_without_a_row_uses_the_default_mode() {
        let place = |text: &str| text.parse::<Place>().unwrap();
        let networking = Networking {
            multi_cloud: true,
            default_mode: NetworkMode::Public,
            connections: vec![Connection {
                from: place("aws_us_east_1"),
                to: place("azure_eastus"),
                mode: NetworkMode::Vpn,
                bandwidth_bps: None,
                fallback: Fallback::Public,
            }],
        };
        let (aws, azure) = (place("aws_us_east_1"), place("azure_eastus"));
        assert_eq!(networking.modes(&aws, &azure), (NetworkMode::Vpn, Some(NetworkMode::Public)));
        assert_eq!(networking.modes(&azure, &aws), (NetworkMode::Public, None));
    }
}
