//! What travels between a proxy and the control plane.

use std::{collections::BTreeMap, time::Duration};

use secrecy::SecretString;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    api::shapes,
    model::{
        AuthMethod, Endpoint, EndpointState, Origin, Place, Project, ScopeSet, Service,
        ServiceName, Zone,
    },
};

/// The audience of tokens for the control plane's own API.
pub const CONTROL_AUDIENCE: &str = "infrar-control";

/// The scope at [`CONTROL_AUDIENCE`] that reads catalog, services and changes; every identity has it.
pub const CATALOG_READ: &str = "infrar:catalog:read";

/// The scope at [`CONTROL_AUDIENCE`] that reports usage; every identity has it.
pub const USAGE_WRITE: &str = "infrar:usage:write";

/// The scope at [`CONTROL_AUDIENCE`] that registers endpoints of the service with the caller's own name, looks after them
/// and removes them; every identity has it.
pub const ENDPOINTS_OWN: &str = "infrar:endpoints:own";

/// The scope at [`CONTROL_AUDIENCE`] that changes endpoints of any service; only `permissions` grants it.
pub const REGISTRY_WRITE: &str = "infrar:registry:write";

/// The scope at [`CONTROL_AUDIENCE`] that replaces the project; only `permissions` grants it.
pub const PROJECT_WRITE: &str = "infrar:project:write";

/// The scope at [`CONTROL_AUDIENCE`] that rotates the signing keys; only `permissions` grants it.
pub const KEYS_WRITE: &str = "infrar:keys:write";

/// `GET /v1/catalog`: one version of everything a proxy needs to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Catalog {
    /// Rises with every change; never reused by one control plane's data directory.
    pub revision: u64,
    /// The `iss` of the project's own tokens; empty for a proxy that runs from a file alone.
    pub issuer: String,
    /// The project itself.
    #[schema(value_type = shapes::Project)]
    pub project: Project,
}

/// `GET /v1/services`: every service in brief, by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServiceList {
    /// The revision that was read.
    pub revision: u64,
    /// One row per service.
    pub services: Vec<ServiceSummary>,
}

/// One row of [`ServiceList`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServiceSummary {
    /// The service.
    #[schema(value_type = shapes::ServiceName)]
    pub name: ServiceName,
    /// How many endpoints it has.
    pub endpoints: usize,
    /// How many of them are active.
    pub active: usize,
    /// Where they are, each place once.
    #[schema(value_type = Vec<shapes::Place>)]
    pub places: Vec<Place>,
    /// The scopes that exist at it.
    #[schema(value_type = Vec<shapes::Scope>)]
    pub scopes: ScopeSet,
}

/// `GET /v1/services/{name}`: one service in full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServiceAnswer {
    /// The revision that was read.
    pub revision: u64,
    /// The service.
    #[schema(value_type = shapes::ServiceName)]
    pub name: ServiceName,
    /// Everything that is said about it.
    #[serde(flatten)]
    #[schema(value_type = shapes::Service)]
    pub service: Service,
    /// Who may call it, and with which scopes.
    #[schema(value_type = BTreeMap<shapes::ServiceName, Vec<shapes::Scope>>)]
    pub callers: BTreeMap<ServiceName, ScopeSet>,
}

/// `PUT /v1/services/{name}/endpoints/{id}`: registers an endpoint, or renews and changes what is registered. It is gone when
/// its lease ends, unless it is renewed before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Registration {
    /// The address in mode `public`, and the host, SNI and certificate name in every mode.
    #[schema(value_type = shapes::Origin)]
    pub url: Origin,
    /// The address in mode `vpn`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<shapes::Origin>)]
    pub internal_url: Option<Origin>,
    /// The address in mode `private_peering`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<shapes::Origin>)]
    pub private_url: Option<Origin>,
    /// Provider and region.
    #[schema(value_type = shapes::Place)]
    pub place: Place,
    /// Availability zone, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<shapes::Zone>)]
    pub zone: Option<Zone>,
    /// How a caller proves itself.
    #[serde(default)]
    #[schema(value_type = shapes::AuthMethod)]
    pub auth_method: AuthMethod,
    /// Share among unequal weights.
    #[serde(default = "usual_weight")]
    #[schema(maximum = 1_000_000)]
    pub weight: u32,
    /// Whether it takes part in the choice.
    #[serde(default)]
    #[schema(value_type = shapes::EndpointState)]
    pub state: EndpointState,
    /// How long it stays without a heartbeat, in seconds: 5 to 3600.
    #[serde(default = "usual_ttl")]
    #[schema(minimum = 5, maximum = 3600)]
    pub ttl_seconds: u64,
}

fn usual_weight() -> u32 {
    100
}

fn usual_ttl() -> u64 {
    30
}

/// `PATCH /v1/services/{name}/endpoints/{id}`: changes what is said; what is left out stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Adjustment {
    /// Whether it takes part in the choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<shapes::EndpointState>)]
    pub state: Option<EndpointState>,
    /// Share among unequal weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1_000_000)]
    pub weight: Option<u32>,
}

/// Where an endpoint comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The project; it stays until the project says otherwise.
    Project,
    /// Somebody registered it.
    Lease,
}

/// The answer to everything that is done with one endpoint. Its ETag is the revision of its last change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EndpointAnswer {
    /// The revision that was read, or that the change led to.
    pub revision: u64,
    /// The service.
    #[schema(value_type = shapes::ServiceName)]
    pub service: ServiceName,
    /// Where it comes from.
    pub source: Source,
    /// What is left of its lease, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<u64>,
    /// The endpoint.
    #[schema(value_type = shapes::Endpoint)]
    pub endpoint: Endpoint,
}

/// `POST /v1/services/{name}/endpoints/{id}/heartbeat`: the lease begins anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Heartbeat {
    /// The revision in force.
    pub revision: u64,
    /// How long the lease now is, in seconds; ask again after a third of it.
    pub expires_in: u64,
}

/// `PUT /v1/proxies/{instance}`: a proxy tells which revision it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProxyReport {
    /// The revision that its newest requests walk by.
    pub revision: u64,
    /// Where it runs, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<shapes::Place>)]
    pub place: Option<Place>,
    /// `sidecar`, `edge` or `dev`.
    #[schema(max_length = 16)]
    pub role: String,
    /// Its release.
    #[schema(max_length = 64)]
    pub version: String,
}

/// `GET /v1/proxies`: who serves which revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProxyList {
    /// The revision in force.
    pub revision: u64,
    /// Every proxy that was heard of in the last two minutes.
    // Not the type's own form: to its report nothing may be added when it is sent, and here three keys are.
    #[schema(value_type = Vec<shapes::ProxyRow>)]
    pub proxies: Vec<ProxyRow>,
}

/// One row of [`ProxyList`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyRow {
    /// Made by the proxy at its start.
    pub instance: Uuid,
    /// Who it speaks for.
    pub service: ServiceName,
    /// How long ago it was heard of, in seconds.
    pub seen_seconds_ago: u64,
    /// What it said.
    #[serde(flatten)]
    pub report: ProxyReport,
}

/// `GET` and `PUT /v1/project`: the project as it was written, without what was registered beside it and without secrets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectDocument {
    /// What every proxy may know.
    #[schema(value_type = shapes::Project)]
    pub project: Project,
    /// Who may ask for tokens.
    #[schema(value_type = BTreeMap<shapes::ServiceName, IdentityDocument>)]
    pub identities: BTreeMap<ServiceName, IdentityDocument>,
}

/// How one identity proves itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, deny_unknown_fields)]
pub enum IdentityDocument {
    /// By a shared secret, of which only the digest travels and is kept.
    Secret {
        /// SHA-256 of the secret, in hexadecimal.
        #[schema(pattern = "^[0-9a-fA-F]{64}$")]
        client_secret_sha256: String,
    },
    /// By an OIDC token of its platform.
    Workload {
        /// The token's `iss`.
        issuer: String,
        /// The token's `sub`.
        subject: String,
    },
}

/// What an identity proves itself with at the token endpoint.
#[derive(Clone, Debug)]
pub struct Credential {
    /// The identity's name in `identities`.
    pub client_id: ServiceName,
    /// Its secret (RFC 6749 §2.3.1).
    pub secret: SecretString,
}

/// A token as its caller keeps it.
#[derive(Clone, Debug)]
pub struct TokenAnswer {
    /// The bearer.
    pub access_token: SecretString,
    /// How long it is good, from the moment of the answer; `None` when the answer did not say.
    pub expires_in: Option<Duration>,
    /// The scopes that it carries.
    pub scope: ScopeSet,
}

/// The token endpoint's answer on the wire (RFC 6749 §5.1). It holds a secret: no `Debug`.
#[derive(Serialize, Deserialize, ToSchema)]
pub struct TokenReply {
    /// The bearer.
    pub access_token: String,
    /// `Bearer`.
    pub token_type: String,
    /// Seconds. RFC 6749 only recommends it, and some issuers write it as text.
    #[serde(default, deserialize_with = "seconds", skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<u64>,
    /// Space-separated; may be left out when it is what was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
}

/// A number of seconds, as a number or as text; a fraction is cut off.
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Whole(u64),
        Number(f64),
        Text(String),
    }
    let bad = || D::Error::custom("expires_in is no number of seconds");
    let Some(written) = Option::<Written>::deserialize(deserializer)? else { return Ok(None) };
    match written {
        Written::Whole(seconds) => Ok(Some(seconds)),
        Written::Number(seconds) => {
            let whole = Duration::try_from_secs_f64(seconds).map_err(|_range| bad())?;
            Ok(Some(whole.as_secs()))
        }
        Written::Text(text) => text.trim().parse().map(Some).map_err(|_syntax| bad()),
    }
}

/// The token endpoint's refusal on the wire (RFC 6749 §5.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OauthRefusal {
    /// `invalid_client`, `invalid_scope`, `invalid_target` …
    pub error: String,
    /// A sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_description: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_answer_need_not_say_how_long_it_is_good_and_may_say_it_as_text() {
        let read = |further: &str| {
            let text = format!(r#"{{"access_token":"t","token_type":"Bearer"{further}}}"#);
            serde_json::from_str::<TokenReply>(&text).map(|reply| reply.expires_in).ok()
        };
        assert_eq!(read(""), Some(None));
        assert_eq!(read(r#","expires_in":null"#), Some(None));
        assert_eq!(read(r#","expires_in":3599"#), Some(Some(3599)));
        assert_eq!(read(r#","expires_in":3599.9"#), Some(Some(3599)));
        assert_eq!(read(r#","expires_in":"3599""#), Some(Some(3599)));
        for bad in [r#""soon""#, "-1", "[]", "1e99"] {
            assert_eq!(read(&format!(r#","expires_in":{bad}"#)), None, "{bad}");
        }
    }
}
