//! The keys of `proxy.yaml`: one proxy. Their paths are also the names of its variables and flags.

use super::{
    kinds::{
        APP, BYTES, CONTROL_URL, DIRECTORY, DNS_NAME, ENDPOINT_ID, FILE, HEAD_BYTES, INNER_ADDRESS,
        LISTEN, METHOD, NAME, NETWORK, ORIGIN, PLACE, POSITIVE_SPAN, RESOLVER, RULE_PATH, SCOPE,
        SPAN, TLS_VERSION, WORKERS, ZONE,
    },
    shape::{Key, Shape},
};

/// The whole file.
pub(super) static PROXY: Shape = Shape::Table(&[
    Key::new(
        "role",
        &Shape::Choice(&["sidecar", "edge", "dev"]),
        "What this proxy stands beside: one service, a place, or a developer. Default sidecar.",
    ),
    Key::required(
        "service",
        &Shape::Text(&NAME),
        "Who this proxy speaks for; an edge has an identity of its own.",
    ),
    Key::new("place", &Shape::Text(&PLACE), "Where it runs: aws_us_east_1. Required but for dev."),
    Key::new("zone", &Shape::Nullable(&Shape::Text(&ZONE)), "The availability zone it runs in."),
    Key::new("control", &CONTROL, "The control plane to follow."),
    Key::new(
        "project",
        &Shape::Text(&FILE),
        "Instead of control: a project.yaml to take the registry from.",
    ),
    Key::new(
        "discovery",
        &Shape::List(&DISCOVERY),
        "Further sources of endpoints, over what the control plane or the project says of a service.",
    ),
    Key::new("outbound", &OUTBOUND, "The listener for calls of the local application."),
    Key::new("inbound", &Shape::OneOrMany(&INBOUND), "One or several listeners for callers."),
    Key::new("admin", &ADMIN, "The admin API."),
    Key::new(
        "trust",
        &Shape::Table(&[Key::new(
            "ca_file",
            &Shape::Text(&FILE),
            "Certificates added to the system's roots for upstreams.",
        )]),
        "Whom to trust besides the system's roots.",
    ),
    Key::new("limits", &LIMITS, "What one client may take."),
    Key::new(
        "shutdown",
        &Shape::Table(&[
            Key::new(
                "grace",
                &Shape::Text(&SPAN),
                "Between being not ready and accepting no more. Default 5s.",
            ),
            Key::new(
                "deadline",
                &Shape::Text(&POSITIVE_SPAN),
                "When it ends, whatever is still open. Default 25s.",
            ),
        ]),
        "How it ends.",
    ),
    Key::new(
        "log",
        &Shape::Table(&[
            Key::new(
                "format",
                &Shape::Choice(&["auto", "text", "json"]),
                "auto (the default): text on a terminal, else json.",
            ),
            Key::new("access", &Shape::Flag, "One line per request. Default true."),
        ]),
        "What it writes.",
    ),
    Key::new(
        "workers",
        &Shape::ChoiceOr(&["auto"], &Shape::Text(&WORKERS)),
        "Data-plane threads; auto (the default): the CPUs this container may use.",
    ),
]);

static CONTROL: Shape = Shape::Table(&[
    Key::required(
        "url",
        &Shape::OneOrMany(&Shape::Text(&CONTROL_URL)),
        "Its address, or a list: several addresses of one control plane.",
    ),
    Key::new("ca_file", &Shape::Text(&FILE), "The CA of its certificate, if no public one."),
    Key::required(
        "credential",
        &Shape::OneOf(&[
            Key::new(
                "client_secret_file",
                &Shape::Text(&FILE),
                "A shared secret; trailing white space is cut.",
            ),
            Key::new("token_file", &Shape::Text(&FILE), "A projected OIDC token."),
            Key::new("private_key_file", &Shape::Text(&FILE), "A private key in PEM."),
        ]),
        "How this proxy proves who it is.",
    ),
    Key::new(
        "state_dir",
        &Shape::Nullable(&Shape::Text(&DIRECTORY)),
        "Where the last snapshot, keys and tokens survive a restart.",
    ),
    Key::new(
        "max_snapshot_age",
        &Shape::Text(&POSITIVE_SPAN),
        "How old a kept snapshot may be. Default 7d.",
    ),
]);

static DISCOVERY: Shape =
    Shape::OneOf(&[Key::new("dns", &DNS, "The addresses that a name has in DNS.")]);

static DNS: Shape = Shape::Table(&[
    Key::required("service", &Shape::Text(&NAME), "The service whose endpoints they are."),
    Key::required(
        "name",
        &Shape::Text(&DNS_NAME),
        "The whole name; for address it is also what host, SNI and certificate say.",
    ),
    Key::new(
        "type",
        &Shape::Choice(&["address", "srv"]),
        "address (the default): A and AAAA; srv: target, port, priority (the lowest is active, others standby), weight.",
    ),
    Key::new(
        "port",
        &Shape::Number { least: 1, most: 65_535 },
        "Where the addresses listen. Default: that of the scheme. Not for srv.",
    ),
    Key::new("scheme", &Shape::Choice(&["https", "http"]), "What is spoken. Default https."),
    Key::new("place", &Shape::Text(&PLACE), "Where they are. Default: where this proxy runs."),
    Key::new("zone", &Shape::Nullable(&Shape::Text(&ZONE)), "Their availability zone."),
    Key::new(
        "mode",
        &Shape::Choice(&["public", "vpn", "private_peering"]),
        "The network mode the addresses are for. Default: private_peering in this proxy's place, else public.",
    ),
    Key::new(
        "auth_method",
        &Shape::Choice(&["bearer_token", "none"]),
        "How a caller proves itself. Default bearer_token.",
    ),
    Key::new(
        "resolver",
        &Shape::Nullable(&Shape::Text(&RESOLVER)),
        "The DNS server to ask. Default: those of the system.",
    ),
    Key::new(
        "min_ttl",
        &Shape::Text(&POSITIVE_SPAN),
        "How long an answer holds at least. Default 1s.",
    ),
    Key::new(
        "max_ttl",
        &Shape::Text(&POSITIVE_SPAN),
        "How long an answer holds at most. Default 5m.",
    ),
]);

static OUTBOUND: Shape = Shape::Table(&[
    Key::new("listen", &Shape::Text(&LISTEN), "Default 127.0.0.1:15001."),
    Key::new(
        "ports",
        &Shape::Map { name: &NAME, value: &Shape::Text(&LISTEN) },
        "A listener of its own per service.",
    ),
    Key::new(
        "unknown_hosts",
        &Shape::Choice(&["deny", "allow"]),
        "Hosts that are no service of the project. Default deny.",
    ),
    Key::new(
        "via",
        &Shape::Nullable(&Shape::Text(&ORIGIN)),
        "An edge to send cross-cloud calls through.",
    ),
    Key::new(
        "override_authorization",
        &Shape::Flag,
        "true: replace an authorization that the application set. Default false.",
    ),
    Key::new(
        "token_files",
        &Shape::Map { name: &NAME, value: &Shape::Text(&FILE) },
        "A bearer from elsewhere per service, re-read when it changes.",
    ),
]);

static INBOUND: Shape = Shape::Table(&[
    Key::new("listen", &Shape::Text(&LISTEN), "Default 0.0.0.0:15006."),
    Key::new(
        "app",
        &Shape::Text(&APP),
        "The application; h2c:// or https:// forces one. Required but for an edge.",
    ),
    Key::new(
        "tls",
        &Shape::ChoiceOr(
            &["platform", "off", "auto"],
            &Shape::Table(&[
                Key::required("cert_file", &Shape::Text(&FILE), "The certificate chain in PEM."),
                Key::required("key_file", &Shape::Text(&FILE), "Its key in PEM."),
                Key::new("min_version", &Shape::Text(&TLS_VERSION), "Default \"1.3\"."),
            ]),
        ),
        "A certificate; platform where the cloud ends TLS; off only on loopback.",
    ),
    Key::new(
        "mtls",
        &Shape::Choice(&["off", "optional", "required"]),
        "Certificates of callers. Only off in this release.",
    ),
    Key::new(
        "allow_from",
        &Shape::List(&Shape::Text(&NETWORK)),
        "Networks that may connect. Default: all.",
    ),
    Key::new(
        "rules",
        &Shape::Nullable(&Shape::List(&RULE)),
        "First match wins; no match is refused. No rules: any granted scope.",
    ),
    Key::new(
        "forward_authorization",
        &Shape::Flag,
        "false: the bearer is removed before the application. Default true.",
    ),
    Key::new(
        "token_cache",
        &Shape::Number { least: 0, most: 1_000_000 },
        "Verified tokens kept per worker; 0: verify every time. Default 10000.",
    ),
    Key::new(
        "advertise",
        &Shape::Nullable(&Shape::Table(&[
            Key::required("url", &Shape::Text(&ORIGIN), "Its public address."),
            Key::new("internal_url", &Shape::Text(&INNER_ADDRESS), "Its address in mode vpn."),
            Key::new("private_url", &Shape::Text(&INNER_ADDRESS), "In mode private_peering."),
            Key::new(
                "id",
                &Shape::Text(&ENDPOINT_ID),
                "Its id. Default: the place and what tells its url from others.",
            ),
            Key::new(
                "ttl",
                &Shape::Text(&POSITIVE_SPAN),
                "How long it stays registered without a heartbeat, 5s to 1h. Default 30s.",
            ),
        ])),
        "Registers this endpoint with the control plane, and takes it away at the end. Default null: it does not.",
    ),
]);

static RULE: Shape = Shape::Table(&[
    Key::required("path", &Shape::Text(&RULE_PATH), "Exact, or a prefix ending in /*."),
    Key::new(
        "methods",
        &Shape::Nullable(&Shape::List(&Shape::Text(&METHOD))),
        "Default: every method.",
    ),
    Key::new("public", &Shape::Flag, "true: no token is asked for."),
    Key::new(
        "scopes",
        &Shape::List(&Shape::Text(&SCOPE)),
        "Every one of them is needed; []: any valid token.",
    ),
]);

static ADMIN: Shape = Shape::Table(&[
    Key::new("listen", &Shape::Text(&LISTEN), "On loopback. Default 127.0.0.1:15000."),
    Key::new(
        "probes",
        &Shape::Nullable(&Shape::Text(&LISTEN)),
        "A second listener with /livez, /readyz and /metrics only.",
    ),
]);

static LIMITS: Shape = Shape::Table(&[
    Key::new("header_bytes", &Shape::Text(&HEAD_BYTES), "Bytes of one head. Default 60KiB."),
    Key::new(
        "headers",
        &Shape::Number { least: 1, most: 10_000 },
        "Fields of one head. Default 100.",
    ),
    Key::new(
        "header_timeout",
        &Shape::Text(&POSITIVE_SPAN),
        "Until a head is there; for the first one, from the connection on. Default 10s.",
    ),
    Key::new(
        "idle_timeout",
        &Shape::Text(&POSITIVE_SPAN),
        "A connection without a further request. Default 1h.",
    ),
    Key::new(
        "stall_timeout",
        &Shape::Text(&POSITIVE_SPAN),
        "While nothing of a request's or an answer's body moves. Default 5m.",
    ),
    Key::new(
        "streams",
        &Shape::Number { least: 1, most: 1_000_000 },
        "HTTP/2 streams of one connection. Default 1024.",
    ),
    Key::new(
        "connections",
        &Shape::Number { least: 1, most: 10_000_000 },
        "Connections of one listener. Default 10000.",
    ),
    Key::new(
        "body_bytes",
        &Shape::Nullable(&Shape::Text(&BYTES)),
        "Bytes of one request body. Default null: no limit.",
    ),
]);
