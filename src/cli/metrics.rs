//! The metrics that are worked out when somebody scrapes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use super::{
    reload::Reloads,
    world::{World, lock},
};
use crate::{
    balance::CircuitState,
    cost::{Meter, PriceBook, PriceClass},
    discovery::{Directory, Report, Sources},
    model::{EndpointId, NetworkMode, Place, ServiceName},
    net::Spread,
    proxy,
    telemetry::{AccessLog, Registry, names, process_lines_dropped},
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
    let unpriced = Unpriced::default();
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
        let access = log.get().map_or(0, |log| log.dropped().dropped_lines());
        for (log, dropped) in [("access", access), ("process", process_lines_dropped())] {
            found.counter(names::LOG_DROPPED, &[("log", log)], to_f64(dropped));
        }
        egress(found, &meter, &unpriced);
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

/// What became of looking for endpoints.
pub(super) fn discovery(found: &mut crate::telemetry::Families, sources: &Sources) {
    for report in sources.reports() {
        match report {
            Report::Dns(settings, stats) => {
                let labels =
                    [("service", settings.service.as_str()), ("name", settings.name.as_str())];
                let (answered, failed) = stats.lookups();
                for (outcome, count) in [("answered", answered), ("failed", failed)] {
                    let [service, name] = labels;
                    let count = to_f64(usize::try_from(count).unwrap_or(usize::MAX));
                    found.counter(
                        names::DNS_LOOKUPS,
                        &[service, name, ("outcome", outcome)],
                        count,
                    );
                }
                found.gauge(names::DNS_ENDPOINTS, &labels, to_f64(stats.endpoints()));
                if let Some(age) = stats.age() {
                    found.gauge(names::DNS_AGE, &labels, age.as_secs_f64());
                }
            }
        }
    }
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

/// What the price book says nothing about, each told once.
#[derive(Default)]
struct Unpriced(Mutex<BTreeSet<(String, &'static str)>>);

impl Unpriced {
    fn note(&self, from: &Place, class: PriceClass) {
        let (provider, class) = (from.provider().to_string(), class.as_str());
        if lock(&self.0).insert((provider.clone(), class)) {
            tracing::warn!(
                provider,
                class,
                "the price book has no rate for this; infrar_egress_usd_total leaves it out"
            );
        }
    }
}

/// Bytes by path, and what they cost in the marginal band; where no rate is known there is no cost, rather than one of zero.
fn egress(found: &mut crate::telemetry::Families, meter: &Meter, unpriced: &Unpriced) {
    use crate::cost::Leg;
    let mut sums: BTreeMap<[String; 6], (u64, Option<i64>)> = BTreeMap::new();
    for row in meter.read() {
        // Whoever sends pays: the answer's bytes are priced at the callee's place.
        let (here, there) = (Some(&row.path.from), row.path.to.as_ref());
        let (from, to) = match row.leg {
            Leg::Request => (here, there),
            Leg::Response => (there, here),
        };
        let cost = match from {
            // What a host outside the project pays is not our bill.
            None => Some(0),
            Some(from) => {
                let rate = PriceBook::shipped().rate(row.path.class, from, to);
                if rate.is_none() && row.bytes.0 > 0 {
                    unpriced.note(from, row.path.class);
                }
                rate.map(|rate| rate.cost(row.bytes).0)
            }
        };
        let labels = [
            row.path.callee.to_string(),
            row.path.from.to_string(),
            row.path.to.map_or_else(|| "internet".to_owned(), |to| to.to_string()),
            row.path.mode.to_string(),
            row.leg.as_str().to_owned(),
            row.kind.as_str().to_owned(),
        ];
        let sum = sums.entry(labels).or_insert((0, Some(0)));
        *sum = (sum.0 + row.bytes.0, sum.1.zip(cost).map(|(sum, cost)| sum + cost));
    }
    for (values, (bytes, cost)) in &sums {
        let names_of = ["callee", "from", "to", "mode", "leg", "kind"];
        let labels: Vec<_> = names_of.into_iter().zip(values.iter().map(String::as_str)).collect();
        found.counter(
            names::EGRESS_BYTES,
            &labels,
            to_f64(usize::try_from(*bytes).unwrap_or(usize::MAX)),
        );
        if let Some(cost) = cost {
            let dollars = to_f64(usize::try_from(*cost).unwrap_or(0)) / 1e9;
            found.counter(names::EGRESS_USD, &labels, dollars);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus samples are floats")]
fn to_f64(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Kind, Leg, PathKey};

    #[test]
    fn an_unknown_price_is_left_out_and_not_shown_as_nothing() {
        let meter = Meter::default();
        let place = |text: &str| text.parse::<Place>().unwrap();
        for (callee, from) in [("priced", "aws_us_east_1"), ("unpriced", "nobody_knows")] {
            let path = meter.path(PathKey {
                callee: callee.parse().unwrap(),
                from: place(from),
                to: Some(place("azure_eastus")),
                mode: NetworkMode::Public,
                class: PriceClass::OtherCloud,
            });
            path.add(Leg::Request, Kind::Http, 1_000_000_000);
        }
        let registry = Registry::default();
        let unpriced = Unpriced::default();
        registry.register_collector(Box::new(move |found| egress(found, &meter, &unpriced)));
        let text = registry.expose();
        let has = |name: &str, callee: &str| {
            let callee = format!("callee=\"{callee}\"");
            let mut lines = text.lines().filter(|line| line.contains("leg=\"request\""));
            lines.any(|line| line.starts_with(name) && line.contains(&callee))
        };
        assert!(has("infrar_egress_usd_total", "priced"), "{text}");
        assert!(has("infrar_egress_bytes_total", "unpriced"), "{text}");
        assert!(!has("infrar_egress_usd_total", "unpriced"), "{text}");
    }

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
