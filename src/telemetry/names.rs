//! The one list of metric names. A name, once published, stays.

use crate::telemetry::cells::MOST_BUCKETS;

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Counts by size.
    Histogram,
}

/// A metric's name, what it is, and what it means.
#[derive(Clone, Copy, Debug)]
pub struct Name {
    /// As it is exposed.
    pub name: &'static str,
    /// For people.
    pub help: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Upper bounds of a histogram's buckets, in seconds.
    pub bounds: &'static [f64],
}

/// From a tenth of a millisecond, a call next door, to a minute, which no timeout outlasts.
const CALLS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0,
];
/// What the proxy itself adds: microseconds.
const OVERHEAD: &[f64] = &[
    0.000005, 0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1,
    1.0,
];

const fn counter(name: &'static str, help: &'static str) -> Name {
    Name { name, help, kind: Kind::Counter, bounds: &[] }
}

const fn gauge(name: &'static str, help: &'static str) -> Name {
    Name { name, help, kind: Kind::Gauge, bounds: &[] }
}

const fn histogram(name: &'static str, help: &'static str, bounds: &'static [f64]) -> Name {
    assert!(bounds.len() < MOST_BUCKETS, "a histogram has no more cells than this");
    Name { name, help, kind: Kind::Histogram, bounds }
}

/// Requests by direction, caller, callee, status and problem code.
pub const REQUESTS: Name = counter(
    "infrar_requests_total",
    "Requests answered, by HTTP status and, where infrar answered itself, its problem code.",
);
/// How long requests took.
pub const REQUEST_DURATION: Name = histogram(
    "infrar_request_duration_seconds",
    "From a request's head to the last byte of its answer.",
    CALLS,
);
/// How long they took beyond the endpoint's own time.
pub const PROXY_OVERHEAD: Name = histogram(
    "infrar_proxy_overhead_seconds",
    "Request duration less the time spent connecting to and waiting for the endpoint.",
    OVERHEAD,
);
/// Bytes by path.
pub const EGRESS_BYTES: Name = counter(
    "infrar_egress_bytes_total",
    "Bytes on connections to endpoints, TLS included, by callee, places, network mode, leg and kind.",
);
/// What they cost at list prices.
pub const EGRESS_USD: Name = counter(
    "infrar_egress_usd_total",
    "Price of those bytes in the marginal band of the shipped price book, in US dollars.",
);
/// Labels: `service`, `endpoint`, `mode`.
pub const CIRCUIT_STATE: Name =
    gauge("infrar_circuit_state", "State of an endpoint's circuit: 0 closed, 1 half-open, 2 open.");
/// Labels: `service`, `endpoint`, `mode`.
pub const ENDPOINT_LATENCY: Name = gauge(
    "infrar_endpoint_latency_seconds",
    "Peak EWMA of an endpoint's response time, as the balancer sees it: a failure counts as 5 s at least, and an old value fades with the next answer only.",
);
/// Labels: `direction`, `caller`, `callee`.
pub const LEARNED_GRANTS: Name = counter(
    "infrar_learned_grants_total",
    "Requests without a grant that passed because the project is learning.",
);
/// Client connections.
pub const CONNECTIONS: Name = gauge("infrar_connections", "Open connections of clients.");
/// The same by `worker`, which counts from 0.
pub const WORKER_CONNECTIONS: Name = gauge(
    "infrar_worker_connections",
    "Open connections of clients, by the worker that serves them.",
);
/// Age of the snapshot in use.
pub const SNAPSHOT_AGE: Name = gauge(
    "infrar_snapshot_age_seconds",
    "Since the snapshot in use was last confirmed by its source.",
);
/// Revision of the snapshot in use.
pub const SNAPSHOT_REVISION: Name =
    gauge("infrar_snapshot_revision", "Revision of the snapshot in use.");
/// Labels: `service`, `name`, `outcome` (`answered` or `failed`).
pub const DNS_LOOKUPS: Name = counter(
    "infrar_dns_lookups_total",
    "Times that a name of discovery was looked up, by what came of it: answered or failed.",
);
/// Labels: `service`, `name`.
pub const DNS_AGE: Name = gauge(
    "infrar_dns_answer_age_seconds",
    "Since DNS last told everything about a name of discovery.",
);
/// Labels: `service`, `name`.
pub const DNS_ENDPOINTS: Name = gauge(
    "infrar_dns_endpoints",
    "Endpoints that a name of discovery leads to, draining ones included.",
);
/// Tokens received.
pub const TOKENS_RECEIVED: Name =
    counter("infrar_token_received_total", "Tokens received from the issuer or a file.");
/// Attempts to get one that failed.
pub const TOKEN_FAILURES: Name =
    counter("infrar_token_failures_total", "Attempts to get a token that failed.");
/// Label: `callee`.
pub const TOKEN_LEFT: Name = gauge(
    "infrar_token_left_seconds",
    "How long the token for a callee may still be sent; 0 when there is none.",
);
/// Fetches of keys.
pub const JWKS_FETCHES: Name =
    counter("infrar_jwks_fetches_total", "Fetches of an issuer's public keys.");
/// Those that failed.
pub const JWKS_FAILURES: Name =
    counter("infrar_jwks_failures_total", "Fetches of an issuer's public keys that failed.");
/// Age of the keys in use.
pub const JWKS_AGE: Name =
    gauge("infrar_jwks_age_seconds", "Since an issuer's public keys were last fetched.");
/// Whether there are any.
pub const JWKS_KEYS: Name = gauge(
    "infrar_jwks_keys",
    "Public keys of an issuer that can verify; 0 while none were fetched: its tokens are refused.",
);
/// Tokens that were refused for it, or waited for a fetch.
pub const JWKS_UNKNOWN: Name = counter(
    "infrar_jwks_unknown_total",
    "Tokens that named a key which the issuer was not known to have.",
);
/// Label: `outcome`, `applied` or `refused`.
pub const SETTINGS_RELOADS: Name = counter(
    "infrar_settings_reloads_total",
    "Times that the settings were read again, by what came of it: applied or refused.",
);
/// Whether the files are in force.
pub const SETTINGS_CURRENT: Name = gauge(
    "infrar_settings_current",
    "1 when what is in force is what the files say; 0 after a refusal, and while a key waits for a restart.",
);
/// Build.
pub const BUILD_INFO: Name = gauge("infrar_build_info", "1, with the version as a label.");
/// Bugs.
pub const TASK_PANICS: Name =
    counter("infrar_task_panics_total", "Panics: each is a bug to report, and ended a task.");
/// Log lines lost.
pub const LOG_DROPPED: Name = counter(
    "infrar_log_lines_dropped_total",
    "Log lines dropped because they came faster than they could be written, or nobody reads them.",
);
/// Memory.
pub const PROCESS_MEMORY: Name = gauge("process_resident_memory_bytes", "Resident memory.");
/// File descriptors.
pub const PROCESS_FDS: Name = gauge("process_open_fds", "Open file descriptors.");
/// CPU time.
pub const PROCESS_CPU: Name = counter("process_cpu_seconds_total", "User and system CPU time.");
/// Start.
pub const PROCESS_START: Name =
    gauge("process_start_time_seconds", "Start of the process, seconds since 1970.");

/// All of the above.
pub const ALL: &[Name] = &[
    REQUESTS,
    REQUEST_DURATION,
    PROXY_OVERHEAD,
    EGRESS_BYTES,
    EGRESS_USD,
    CIRCUIT_STATE,
    ENDPOINT_LATENCY,
    LEARNED_GRANTS,
    CONNECTIONS,
    WORKER_CONNECTIONS,
    SNAPSHOT_AGE,
    SNAPSHOT_REVISION,
    DNS_LOOKUPS,
    DNS_AGE,
    DNS_ENDPOINTS,
    TOKENS_RECEIVED,
    TOKEN_FAILURES,
    TOKEN_LEFT,
    JWKS_FETCHES,
    JWKS_FAILURES,
    JWKS_AGE,
    JWKS_KEYS,
    JWKS_UNKNOWN,
    SETTINGS_RELOADS,
    SETTINGS_CURRENT,
    BUILD_INFO,
    TASK_PANICS,
    LOG_DROPPED,
    PROCESS_MEMORY,
    PROCESS_FDS,
    PROCESS_CPU,
    PROCESS_START,
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_list_is_complete_and_no_name_is_there_twice() {
        let written = include_str!("names.rs").matches(": Name =").count();
        // One is this test's own text.
        assert_eq!(ALL.len(), written - 1);
        let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
    }

    #[test]
    fn names_are_words_that_end_as_their_kind_demands() {
        for metric in ALL {
            let (name, help) = (metric.name, metric.help);
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            assert!(name.starts_with("infrar_") || name.starts_with("process_"), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
            assert!(help.ends_with('.'), "{name}: {help}");
            let histogram = metric.kind == Kind::Histogram;
            assert_eq!(histogram, !metric.bounds.is_empty(), "{name}");
            assert!(!histogram || name.ends_with("_seconds"), "{name}");
            assert!(metric.bounds.is_sorted_by(|low, high| low < high), "{name}");
        }
    }
}
