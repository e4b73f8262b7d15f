//! The keys of `project.yaml`: what is true for the whole project.

use super::{
    kinds::{
        AMOUNT, BANDWIDTH, ENDPOINT_ID, FILE, HEADER, HEDGE_AFTER, INNER_ADDRESS, NAME, ORIGIN,
        PATH, PERCENT, PLACE, POSITIVE_SPAN, PROVIDER, REGION, SCOPE, SHA256, TEXT, TIMESTAMP,
        WEB_URL, ZONE,
    },
    shape::{Key, Shape},
};

/// The whole file.
pub(super) static PROJECT: Shape = Shape::Table(&[
    Key::required("project", &Shape::Text(&NAME), "The project's name."),
    Key::new("multi_cloud", &MULTI_CLOUD, "How places reach each other."),
    Key::new(
        "services",
        &Shape::Map { name: &NAME, value: &SERVICE },
        "Every service by its logical name.",
    ),
    Key::new(
        "permissions",
        &Shape::Map {
            name: &NAME,
            value: &Shape::Map { name: &NAME, value: &Shape::List(&Shape::Text(&SCOPE)) },
        },
        "Caller, callee, scopes. What is not listed is refused.",
    ),
    Key::new(
        "identities",
        &Shape::Map { name: &NAME, value: &IDENTITY },
        "Who may ask for tokens, and how it proves who it is.",
    ),
    Key::new(
        "issuers",
        &Shape::List(&ISSUER),
        "Further token issuers whose tokens callees accept.",
    ),
    Key::new(
        "capabilities",
        &Shape::Map { name: &TEXT, value: &CAPABILITY },
        "Fixed monthly costs, for the cost report.",
    ),
    Key::new(
        "prices",
        &Shape::Map { name: &PROVIDER, value: &PRICES },
        "Per provider: what differs from the price book.",
    ),
    Key::new(
        "mode",
        &Shape::Choice(&["enforce", "learn"]),
        "Whether a missing grant refuses (enforce, the default) or is reported until learn_until.",
    ),
    Key::new("learn_until", &Shape::Text(&TIMESTAMP), "When mode learn ends."),
]);

static MULTI_CLOUD: Shape = Shape::Table(&[
    Key::new(
        "enabled",
        &Shape::Flag,
        "false: only endpoints of the caller's own place are used. Default true.",
    ),
    Key::new(
        "networking_mode",
        &Shape::Choice(MODES),
        "For pairs of places without a connection below. Default public.",
    ),
    Key::new("connections", &Shape::List(&CONNECTION), "Pairs of places with a mode of their own."),
]);

const MODES: &[&str] = &["public", "vpn", "private_peering"];

static CONNECTION: Shape = Shape::Table(&[
    Key::required("from", &Shape::Text(&PLACE), "The caller's place."),
    Key::required("to", &Shape::Text(&PLACE), "The callee's place."),
    Key::required("type", &Shape::Choice(MODES), "How from reaches to."),
    Key::new("bandwidth", &Shape::Nullable(&Shape::Text(&BANDWIDTH)), "Bits per second."),
    Key::new(
        "fallback",
        &Shape::Choice(&["public", "none"]),
        "What to do when that way is closed. Default none.",
    ),
]);

static SERVICE: Shape = Shape::Table(&[
    Key::new("endpoints", &Shape::List(&ENDPOINT), "Its deployments."),
    Key::new("scopes", &Shape::List(&Shape::Text(&SCOPE)), "The scopes that exist here."),
    Key::new(
        "protocol",
        &Shape::Choice(&["auto", "h1", "h2"]),
        "What the hop to an endpoint speaks. Default auto.",
    ),
    Key::new("routing", &ROUTING, "How an endpoint is chosen."),
    Key::new("timeouts", &TIMEOUTS, "How long things may take."),
    Key::new("retries", &RETRIES, "How often an attempt is repeated."),
    Key::new("hedge", &Shape::Nullable(&HEDGE), "A second attempt before the first has answered."),
    Key::new("circuit", &CIRCUIT, "When an endpoint is left alone."),
    Key::new("health", &HEALTH, "How an endpoint's health is found out."),
    Key::new("limits", &LIMITS, "Ceilings per endpoint and proxy."),
]);

static ENDPOINT: Shape = Shape::Table(&[
    Key::new(
        "id",
        &Shape::Text(&ENDPOINT_ID),
        "Unique in its service. Default: the place with -, then -2, -3.",
    ),
    Key::required(
        "url",
        &Shape::Text(&ORIGIN),
        "The public address; its host is the certificate's name in every mode.",
    ),
    Key::required("provider", &Shape::Text(&PROVIDER), "Who runs it."),
    Key::required("region", &Shape::Text(&REGION), "Where."),
    Key::new("zone", &Shape::Nullable(&Shape::Text(&ZONE)), "The availability zone."),
    Key::new(
        "internal_url",
        &Shape::Nullable(&Shape::Text(&INNER_ADDRESS)),
        "The address in mode vpn.",
    ),
    Key::new(
        "private_url",
        &Shape::Nullable(&Shape::Text(&INNER_ADDRESS)),
        "The address in mode private_peering.",
    ),
    Key::new(
        "auth_method",
        &Shape::Choice(&["bearer_token", "none"]),
        "How a caller proves itself. Default bearer_token.",
    ),
    Key::new(
        "weight",
        &Shape::Number { least: 0, most: 1_000_000 },
        "Its share among unequal weights. Default 100.",
    ),
    Key::new(
        "state",
        &Shape::Choice(&["active", "standby", "draining", "deprecated"]),
        "Whether it takes part in the choice. Default active.",
    ),
]);

static ROUTING: Shape = Shape::Table(&[
    Key::new(
        "policy",
        &Shape::Choice(&["latency", "cost", "balanced"]),
        "What a good choice is. Default latency.",
    ),
    Key::new(
        "latency_target",
        &Shape::Nullable(&Shape::Text(&POSITIVE_SPAN)),
        "For balanced: the latency within which the cheapest wins.",
    ),
    Key::new(
        "locality",
        &Shape::Choice(&["none", "zone", "region", "provider"]),
        "How near endpoints are preferred. Default none.",
    ),
    Key::new(
        "sticky",
        &Shape::Nullable(&Shape::OneOf(&[
            Key::new("header", &Shape::Text(&HEADER), "The value of this request header."),
            Key::new("cookie", &Shape::Text(&HEADER), "A cookie of this name."),
        ])),
        "Keeps a client at one endpoint.",
    ),
]);

static TIMEOUTS: Shape = Shape::Table(&[
    Key::new("connect", &Shape::Text(&POSITIVE_SPAN), "Until a connection stands. Default 5s."),
    Key::new(
        "attempt",
        &Shape::Nullable(&Shape::Text(&POSITIVE_SPAN)),
        "Until one attempt's response head. Default null: only request limits.",
    ),
    Key::new(
        "request",
        &Shape::Nullable(&Shape::Text(&POSITIVE_SPAN)),
        "Until the response head, over all attempts. Default 30s; null: no limit.",
    ),
]);

static RETRIES: Shape = Shape::Table(&[
    Key::new(
        "max_attempts",
        &Shape::Number { least: 1, most: 10 },
        "Attempts in all, the first included. Default 3.",
    ),
    Key::new(
        "backoff",
        &Shape::Table(&[
            Key::new("base", &Shape::Text(&POSITIVE_SPAN), "The first pause. Default 25ms."),
            Key::new("max", &Shape::Text(&POSITIVE_SPAN), "The longest pause. Default 1s."),
        ]),
        "The pause before the next one.",
    ),
]);

static HEDGE: Shape = Shape::Table(&[
    Key::required("after", &Shape::Text(&HEDGE_AFTER), "A percentile of its latency, or a time."),
    Key::required("budget", &Shape::Text(&PERCENT), "The share of requests that may be hedged."),
]);

static CIRCUIT: Shape = Shape::Table(&[
    Key::new(
        "failure_threshold",
        &Shape::Number { least: 1, most: 1_000 },
        "Consecutive failures that open it. Default 5.",
    ),
    Key::new(
        "recovery_timeout",
        &Shape::Text(&POSITIVE_SPAN),
        "How long it stays open. Default 60s.",
    ),
]);

static HEALTH: Shape = Shape::Table(&[
    Key::new("type", &Shape::Choice(&["http", "grpc", "tcp"]), "What is asked. Default http."),
    Key::new(
        "path",
        &Shape::Nullable(&Shape::Text(&PATH)),
        "The path of an HTTP check; without one there is none.",
    ),
    Key::new("interval", &Shape::Text(&POSITIVE_SPAN), "Between two checks. Default 10s."),
    Key::new("timeout", &Shape::Text(&POSITIVE_SPAN), "How long one may take. Default 5s."),
    Key::new(
        "healthy",
        &Shape::Number { least: 1, most: 100 },
        "Good checks in a row that heal. Default 2.",
    ),
    Key::new(
        "unhealthy",
        &Shape::Number { least: 1, most: 100 },
        "Bad checks in a row that condemn. Default 3.",
    ),
]);

static CEILING: Shape = Shape::Nullable(&Shape::Number { least: 1, most: 1_000_000 });

static LIMITS: Shape = Shape::Table(&[
    Key::new("connections", &CEILING, "Connections. Default null: no limit."),
    Key::new("requests", &CEILING, "Requests in flight. Default null: no limit."),
]);

static IDENTITY: Shape = Shape::Table(&[
    Key::new(
        "client_secret_file",
        &Shape::Text(&FILE),
        "Its secret; relative to this file, trailing white space is cut.",
    ),
    Key::new(
        "client_secret_sha256",
        &Shape::Text(&SHA256),
        "Instead of the file: the SHA-256 of the secret, in hexadecimal, as `infrar project export` writes it.",
    ),
    Key::new("issuer", &Shape::Text(&WEB_URL), "The issuer of its platform's OIDC tokens."),
    Key::new("subject", &Shape::Text(&TEXT), "The subject of those tokens."),
]);

static ISSUER: Shape = Shape::Table(&[
    Key::required("issuer", &Shape::Text(&TEXT), "The iss of its tokens, compared to the letter."),
    Key::new("jwks_uri", &Shape::Text(&WEB_URL), "Where its keys are."),
    Key::new("jwks_file", &Shape::Text(&FILE), "Its keys; relative to this file."),
    Key::new(
        "audiences",
        &Shape::List(&Shape::Text(&TEXT)),
        "Audiences that stand for every service. The name of a service stands for that one alone, where it is accepted anyway.",
    ),
]);

static CAPABILITY: Shape = Shape::Table(&[
    Key::required("provider", &Shape::Text(&PROVIDER), "Who runs it."),
    Key::required("region", &Shape::Text(&REGION), "Where."),
    Key::new(
        "monthly_cost",
        &Shape::Table(&[
            Key::new("compute", &Shape::Text(&AMOUNT), "US dollars a month."),
            Key::new("storage", &Shape::Text(&AMOUNT), "US dollars a month."),
        ]),
        "What it costs besides its traffic.",
    ),
]);

static PRICES: Shape = Shape::Table(&[
    Key::new("baseline_gb", &Shape::Text(&AMOUNT), "The account's other traffic this month."),
    Key::new(
        "bytes_per_gb",
        &Shape::Number { least: 1_000_000_000, most: 1_073_741_824 },
        "What the provider calls a gigabyte.",
    ),
    Key::new("rates", &Shape::Any, "Rates that differ from the price book."),
    Key::new("waivers", &Shape::Any, "Waivers that hold for this account."),
]);
