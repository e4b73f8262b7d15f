//! The metrics that are worked out when somebody scrapes.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use super::{
    reload::Reloads,
    world::{World, lock},
};
use crate::{
    balance::CircuitState,
    cost::{Meter, PriceBook},
    discovery::Directory,
    model::{EndpointId, NetworkMode, ServiceName},
    net::Spread,
    proxy,
    telemetry::{AccessLog, Registry, names},
};

/// The values that are worked out when somebody scrapes.
pub(super) fn expose(
    registry: &Registry,
    world: &World,
    directory: &Arc<Directory>,
    meter: &Arc<Meter>,
    running: &proxy::Running,
    log: Arc<OnceLock<AccessLog>>,
) {
    let (directory, meter, spread) =
        (Arc::clone(directory), Arc::clone(meter), running.connections());
    let (tokens, trust) = (Arc::clone(&world.tokens), Arc::clone(&world.trust));
    registry.register_collector(Box::new(move |found| {
        connections(found, &spread);
        if let Some(age) = directory.age() {
            found.gauge(names::SNAPSHOT_AGE, &[], age.as_secs_f64());
        }
        if let Some(catalog) = directory.load() {
            found.gauge(
                names::SNAPSHOT_REVISION,
                &[],
                to_f64(usize::try_from(catalog.revision).unwrap_or(usize::MAX)),
            );
        }
        let stats = tokens.stats();
        found.counter(
            names::TOKENS_RECEIVED,
            &[],
            to_f64(usize::try_from(stats.received).unwrap_or(usize::MAX)),
        );
        found.counter(
            names::TOKEN_FAILURES,
            &[],
            to_f64(usize::try_from(stats.failures).unwrap_or(usize::MAX)),
        );
        for (callee, left) in &stats.left {
            let left = left.unwrap_or_default().as_secs_f64();
            found.gauge(names::TOKEN_LEFT, &[("callee", callee.as_str())], left);
        }
        for keys in lock(&trust).sets() {
            let stats = keys.stats();
            let labels = [("issuer", &**keys.issuer())];
            found.counter(
                names::JWKS_FETCHES,
                &labels,
                to_f64(usize::try_from(stats.fetches).unwrap_or(usize::MAX)),
            );
            found.counter(
                names::JWKS_FAILURES,
                &labels,
                to_f64(usize::try_from(stats.failures).unwrap_or(usize::MAX)),
            );
            found.gauge(names::JWKS_KEYS, &labels, to_f64(stats.keys));
            found.counter(
                names::JWKS_UNKNOWN,
                &labels,
                to_f64(usize::try_from(stats.unknown).unwrap_or(usize::MAX)),
            );
            if let Some(age) = stats.age {
                found.gauge(names::JWKS_AGE, &labels, age.as_secs_f64());
            }
        }
        if let Some(log) = log.get() {
            found.counter(names::LOG_DROPPED, &[], to_f64(log.dropped().dropped_lines()));
        }
        egress(found, &meter);
    }));
}

/// Open connections, in all and by worker.
fn connections(found: &mut crate::telemetry::Families, spread: &Spread<usize>) {
    found.gauge(names::CONNECTIONS, &[], to_f64(spread.total()));
    for (worker, open) in spread.each().enumerate() {
        let worker = worker.to_string();
        found.gauge(names::WORKER_CONNECTIONS, &[("worker", &*worker)], to_f64(open));
    }
}

/// What came of reading the settings again.
pub(super) fn settings(found: &mut crate::telemetry::Families, reloads: &Reloads) {
    let (applied, refused) = reloads.counts();
    for (outcome, count) in [("applied", applied), ("refused", refused)] {
        let count = to_f64(usize::try_from(count).unwrap_or(usize::MAX));
        found.counter(names::SETTINGS_RELOADS, &[("outcome", outcome)], count);
    }
    let current = if reloads.is_current() { 1.0 } else { 0.0 };
    found.gauge(names::SETTINGS_CURRENT, &[], current);
}

/// Circuits and latencies by endpoint.
pub(super) fn conditions(found: &mut crate::telemetry::Families, ward: &proxy::Ward) {
    for ((service, endpoint, mode), (circuit, latency)) in worst(ward.conditions()) {
        let labels = [
            ("service", service.as_str()),
            ("endpoint", endpoint.as_str()),
            ("mode", mode.as_str()),
        ];
        found.gauge(names::CIRCUIT_STATE, &labels, f64::from(circuit));
        if let Some(latency) = latency {
            found.gauge(names::ENDPOINT_LATENCY, &labels, latency.as_secs_f64());
        }
    }
}

/// What tells one series from another.
type Labels = (ServiceName, EndpointId, NetworkMode);

/// The worst circuit and the highest latency of each set of labels. While an endpoint moves to another address it is known
/// under both, and one must not hide the other.
fn worst(
    conditions: impl IntoIterator<Item = proxy::Condition>,
) -> BTreeMap<Labels, (u8, Option<Duration>)> {
    let mut worst = BTreeMap::new();
    for condition in conditions {
        let circuit = match condition.circuit {
            CircuitState::Closed => 0,
            CircuitState::HalfOpen => 1,
            CircuitState::Open => 2,
        };
        let labels = (condition.service, condition.endpoint, condition.mode);
        let series: &mut (u8, Option<Duration>) = worst.entry(labels).or_default();
        *series = (series.0.max(circuit), series.1.max(condition.latency));
    }
    worst
}

/// Bytes by path, and what they cost in the marginal band.
fn egress(found: &mut crate::telemetry::Families, meter: &Meter) {
    use crate::cost::Leg;
    let mut sums: BTreeMap<[String; 6], (u64, i64)> = BTreeMap::new();
    for row in meter.read() {
        // Whoever sends pays: the answer's bytes are priced at the callee's place.
        let (here, there) = (Some(&row.path.from), row.path.to.as_ref());
        let (from, to) = match row.leg {
            Leg::Request => (here, there),
            Leg::Response => (there, here),
        };
        // What a host outside the project pays is not our bill.
        let rate = from.and_then(|from| PriceBook::shipped().rate(row.path.class, from, to));
        let cost = rate.map_or(0, |rate| rate.cost(row.bytes).0);
        let labels = [
            row.path.callee.to_string(),
            row.path.from.to_string(),
            row.path.to.map_or_else(|| "internet".to_owned(), |to| to.to_string()),
            row.path.mode.to_string(),
            row.leg.as_str().to_owned(),
            row.kind.as_str().to_owned(),
        ];
        let sum = sums.entry(labels).or_default();
        *sum = (sum.0 + row.bytes.0, sum.1 + cost);
    }
    for (values, (bytes, cost)) in &sums {
        let names_of = ["callee", "from", "to", "mode", "leg", "kind"];
        let labels: Vec<_> = names_of.into_iter().zip(values.iter().map(String::as_str)).collect();
        found.counter(
            names::EGRESS_BYTES,
            &labels,
            to_f64(usize::try_from(*bytes).unwrap_or(usize::MAX)),
        );
        let dollars = to_f64(usize::try_from(*cost).unwrap_or(0)) / 1e9;
        found.counter(names::EGRESS_USD, &labels, dollars);
    }
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus samples are floats")]
fn to_f64(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_addresses_of_one_endpoint_show_the_worse_of_both() {
        let condition = |endpoint: &str, circuit, millis: Option<u64>| proxy::Condition {
            service: "data".parse().unwrap(),
            endpoint: endpoint.parse().unwrap(),
            mode: NetworkMode::Public,
            circuit,
            latency: millis.map(Duration::from_millis),
        };
        let all = [
            condition("one", CircuitState::Open, None),
            condition("one", CircuitState::Closed, Some(7)),
            condition("one", CircuitState::HalfOpen, Some(3)),
            condition("two", CircuitState::Closed, None),
        ];
        let shown: Vec<_> = worst(all).into_values().collect();
        assert_eq!(shown, [(2, Some(Duration::from_millis(7))), (0, None)]);
    }
}
