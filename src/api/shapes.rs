//! How the model's types look in the API's document: their form on the wire, not they themselves.
//!
//! The model stands on the lowest floor and does not know of documents: it must not change when a library for those does, and
//! most of its types write themselves as text anyway (`try_from = "String"`), which no derive could see. A test here holds
//! these forms against what the model writes.
#![expect(dead_code, reason = "a form is written into the document and never made")]

use std::collections::BTreeMap;

use utoipa::ToSchema;

/// The name of a service: a DNS label.
#[derive(ToSchema)]
#[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", example = "data-intelligence")]
pub(crate) struct ServiceName(String);

/// The id of an endpoint, unique within its service: a DNS label.
#[derive(ToSchema)]
#[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", example = "aws-us-east-1")]
pub(crate) struct EndpointId(String);

/// Provider and region: `aws_us_east_1` or `aws/us-east-1`; answers have the first form.
#[derive(ToSchema)]
#[schema(pattern = "^[a-z0-9-]+(/[a-z0-9-]+|_[a-z0-9_-]+)$", example = "aws_us_east_1")]
pub(crate) struct Place(String);

/// An availability zone.
#[derive(ToSchema)]
#[schema(pattern = "^[a-z0-9-]+$", example = "us-east-1a")]
pub(crate) struct Zone(String);

/// Scheme, host and perhaps port, without path.
#[derive(ToSchema)]
#[schema(pattern = "^[hH][tT][tT][pP][sS]?://[^/?#@ ]+/?$", example = "https://data.example.com")]
pub(crate) struct Origin(String);

/// One scope token (RFC 6749 §3.3).
#[derive(ToSchema)]
#[schema(pattern = r"^[!#-\[\]-~]+$", example = "read:data")]
pub(crate) struct Scope(String);

/// A length of time: `25ms`, `5s`, `1m 30s`, `7d`.
#[derive(ToSchema)]
#[schema(example = "5s")]
pub(crate) struct Span(String);

/// Whether an endpoint takes part in the choice.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum EndpointState {
    Active,
    Standby,
    Draining,
    Deprecated,
}

/// How a caller proves itself to an endpoint.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum AuthMethod {
    BearerToken,
    None,
}

/// One deployment of a service.
#[derive(ToSchema)]
pub(crate) struct Endpoint {
    id: EndpointId,
    /// The address in mode `public`, and the host, SNI and certificate name in every mode.
    url: Origin,
    /// Where `url` leads, when a source has looked its host up itself.
    found_at: Option<Origin>,
    /// The address in mode `vpn`.
    internal_url: Option<Origin>,
    /// The address in mode `private_peering`.
    private_url: Option<Origin>,
    place: Place,
    zone: Option<Zone>,
    auth_method: AuthMethod,
    /// Share among unequal weights.
    weight: u32,
    state: EndpointState,
}

/// What is true for the whole project.
#[derive(ToSchema)]
pub(crate) struct Project {
    name: ServiceName,
    networking: Networking,
    /// Every service by its name.
    services: BTreeMap<ServiceName, Service>,
    /// Caller → callee → scopes. What is not listed is refused.
    permissions: BTreeMap<ServiceName, BTreeMap<ServiceName, Vec<Scope>>>,
    /// Further issuers whose tokens callees accept.
    issuers: Vec<Issuer>,
    mode: Enforcement,
}

/// How the places of a project reach each other.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum NetworkMode {
    Public,
    Vpn,
    PrivatePeering,
}

/// How the places of a project reach each other.
#[derive(ToSchema)]
pub(crate) struct Networking {
    multi_cloud: bool,
    /// For pairs of places without a row in `connections`.
    default_mode: NetworkMode,
    connections: Vec<Connection>,
}

/// A pair of places with a mode of its own.
#[derive(ToSchema)]
pub(crate) struct Connection {
    from: Place,
    to: Place,
    mode: NetworkMode,
    /// Bits per second.
    bandwidth_bps: Option<u64>,
    fallback: Fallback,
}

/// What follows when a connection's mode cannot be used.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum Fallback {
    Public,
    None,
}

/// One logical name and everything that is said about it.
#[derive(ToSchema)]
pub(crate) struct Service {
    endpoints: Vec<Endpoint>,
    /// The scopes that exist at it.
    scopes: Vec<Scope>,
    protocol: Protocol,
    routing: Routing,
    timeouts: Timeouts,
    retries: Retries,
    hedge: Option<Hedge>,
    circuit: Circuit,
    health: HealthCheck,
    limits: Limits,
}

/// What the hop to an endpoint speaks.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum Protocol {
    Auto,
    H1,
    H2,
}

/// How one of several endpoints is chosen.
#[derive(ToSchema)]
pub(crate) struct Routing {
    policy: Policy,
    latency_target: Option<Span>,
    locality: Locality,
    sticky: Option<Sticky>,
}

/// What a good choice is.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum Policy {
    Latency,
    Cost,
    Balanced,
}

/// How near endpoints are preferred.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum Locality {
    None,
    Zone,
    Region,
    Provider,
}

/// What keeps a client at one endpoint.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum Sticky {
    Header(String),
    Cookie(String),
}

/// How long the parts of a call may take.
#[derive(ToSchema)]
pub(crate) struct Timeouts {
    connect: Span,
    attempt: Option<Span>,
    request: Option<Span>,
}

/// How often and how soon an attempt is repeated.
#[derive(ToSchema)]
pub(crate) struct Retries {
    max_attempts: u32,
    backoff: Backoff,
}

/// An exponential pause with full jitter.
#[derive(ToSchema)]
pub(crate) struct Backoff {
    base: Span,
    max: Span,
}

/// A second attempt before the first has answered.
#[derive(ToSchema)]
pub(crate) struct Hedge {
    after: HedgeAfter,
    budget_percent: f64,
}

/// When a hedge starts.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum HedgeAfter {
    Percentile(f64),
    Fixed(Span),
}

/// When an endpoint is left alone for a while.
#[derive(ToSchema)]
pub(crate) struct Circuit {
    failure_threshold: u32,
    recovery_timeout: Span,
}

/// How an endpoint's health is found out.
#[derive(ToSchema)]
pub(crate) struct HealthCheck {
    kind: HealthKind,
    path: Option<String>,
    interval: Span,
    timeout: Span,
    healthy: u32,
    unhealthy: u32,
}

/// What an active check asks.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum HealthKind {
    Http,
    Grpc,
    Tcp,
}

/// Ceilings per endpoint and proxy.
#[derive(ToSchema)]
pub(crate) struct Limits {
    connections: Option<u32>,
    requests: Option<u32>,
}

/// A further issuer whose tokens callees accept.
#[derive(ToSchema)]
pub(crate) struct Issuer {
    issuer: String,
    #[schema(format = Uri)]
    jwks_uri: Option<String>,
    /// A JWK set (RFC 7517 §5).
    jwks: Option<serde_json::Value>,
    audiences: Vec<String>,
}

/// Whether a missing grant refuses, or is reported and let through until a moment.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub(crate) enum Enforcement {
    Enforce,
    LearnUntil(Moment),
}

/// A moment in time (RFC 3339).
#[derive(ToSchema)]
#[schema(format = DateTime)]
pub(crate) struct Moment(String);

/// What one proxy said, and when.
#[derive(ToSchema)]
pub(crate) struct ProxyRow {
    /// Made by the proxy at its start.
    instance: uuid::Uuid,
    /// Who it speaks for.
    service: ServiceName,
    /// How long ago it was heard of.
    seen_seconds_ago: u64,
    /// The revision that its newest requests walk by.
    revision: u64,
    /// Where it runs, where that is known.
    place: Option<Place>,
    /// `sidecar`, `edge` or `dev`.
    role: String,
    /// Its release.
    version: String,
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use serde_json::Value;
    use utoipa::OpenApi;

    use super::*;
    use crate::model;

    #[derive(OpenApi)]
    #[openapi(components(schemas(Project)))]
    struct Document;

    /// Holds a value that the model wrote against a form, objects down to their last one.
    fn compare(document: &Value, form: &Value, value: &Value, place: &str) {
        if let Some(name) = form["$ref"].as_str() {
            let form = document.pointer(name.trim_start_matches('#'));
            return compare(document, form.expect(name), value, place);
        }
        if let Some(forms) = form["oneOf"].as_array() {
            // Of what may be null, what it is otherwise.
            let other: Vec<_> = forms.iter().filter(|form| form["type"] != "null").collect();
            if let ([one], false) = (&*other, value.is_null()) {
                compare(document, one, value, place);
            }
            return;
        }
        if let Some(values) = form["enum"].as_array() {
            assert!(values.contains(value), "{place}: {value} is none of {values:?}");
        }
        match value {
            Value::Array(items) => {
                items.iter().for_each(|item| compare(document, &form["items"], item, place));
            }
            Value::Object(members) if form["properties"].is_object() => {
                let known: BTreeSet<_> = form["properties"].as_object().unwrap().keys().collect();
                let optional = ["found_at"];
                let written: BTreeSet<_> = members.keys().collect();
                let differ: Vec<_> = known.symmetric_difference(&written).collect();
                let differ = differ.iter().any(|key| !optional.contains(&key.as_str()));
                assert!(!differ, "{place}: {known:?} against {written:?}");
                for (key, member) in members {
                    compare(document, &form["properties"][key], member, &format!("{place}.{key}"));
                }
            }
            Value::Object(members) => {
                for (key, member) in members {
                    compare(
                        document,
                        &form["additionalProperties"],
                        member,
                        &format!("{place}.{key}"),
                    );
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn the_forms_are_those_that_the_model_writes() {
        let endpoint = serde_json::json!({"id": "home", "url": "https://data.example", "internal_url": null,
            "private_url": null, "place": "azure/eastus", "zone": null, "auth_method": "bearer_token", "weight": 100,
            "state": "active"});
        let service = model::Service {
            endpoints: vec![serde_json::from_value(endpoint).unwrap()],
            scopes: model::ScopeSet::parse_list("read:data").unwrap(),
            hedge: Some(model::Hedge {
                after: model::HedgeAfter::Fixed(Duration::from_millis(5)),
                budget_percent: 5.0,
            }),
            ..model::Service::default()
        };
        let place = |text: &str| text.parse::<model::Place>().unwrap();
        let project = model::Project {
            name: "shop".parse().unwrap(),
            networking: model::Networking {
                multi_cloud: true,
                default_mode: model::NetworkMode::PrivatePeering,
                connections: vec![model::Connection {
                    from: place("aws_us_east_1"),
                    to: place("azure_eastus"),
                    mode: model::NetworkMode::Vpn,
                    bandwidth_bps: Some(1),
                    fallback: model::Fallback::Public,
                }],
            },
            services: BTreeMap::from([("data".parse().unwrap(), service.into())]),
            permissions: BTreeMap::new(),
            issuers: vec![model::Issuer {
                issuer: "https://issuer.example".to_owned(),
                jwks_uri: None,
                jwks: None,
                audiences: Vec::new(),
            }],
            mode: model::Enforcement::Enforce,
        };
        let document = serde_json::to_value(Document::openapi()).unwrap();
        let form = &document["components"]["schemas"]["Project"];
        assert!(form.is_object(), "{document}");
        compare(&document, form, &serde_json::to_value(project).unwrap(), "project");
    }
}
