//! Cells and ages as Prometheus reads them (text format 0.0.4).

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use prometheus::{
    TextEncoder,
    proto::{
        Bucket, Counter as CounterProto, Gauge, Histogram as HistogramProto, LabelPair, Metric,
        MetricFamily, MetricType,
    },
};

use crate::telemetry::{
    cells::{Buckets, Counter, Histogram, Sums},
    names::{Kind, Name},
    process,
};

/// Label names and values in the order they were given.
type Labels = Vec<(&'static str, String)>;
type Collector = Box<dyn Fn(&mut Families) + Send + Sync>;

/// Cells of one series. Those whose writer is gone are added up once and forgotten: a counter never goes back.
#[derive(Default)]
struct Series {
    live: Vec<Arc<AtomicU64>>,
    settled: u64,
    live_buckets: Vec<Arc<Buckets>>,
    settled_buckets: Sums,
}

impl Series {
    fn count(&mut self) -> u64 {
        let settled = &mut self.settled;
        self.live.retain_mut(|cell| {
            // `get_mut` succeeds only when no writer is left, and then sees all it wrote.
            let held = Arc::get_mut(cell).is_none();
            if !held {
                *settled += cell.load(Relaxed);
            }
            held
        });
        self.live.iter().fold(*settled, |sum, cell| sum + cell.load(Relaxed))
    }

    fn sums(&mut self) -> Sums {
        let settled = &mut self.settled_buckets;
        self.live_buckets.retain_mut(|buckets| {
            let held = Arc::get_mut(buckets).is_none();
            if !held {
                buckets.add_to(settled);
            }
            held
        });
        let mut sums = settled.clone();
        self.live_buckets.iter().for_each(|buckets| buckets.add_to(&mut sums));
        sums
    }
}

#[derive(Default)]
struct Family {
    name: Option<Name>,
    series: BTreeMap<Labels, Series>,
}

/// Every series of one process. Its locks are taken when a series begins and when it is scraped, never to count.
#[derive(Default)]
pub struct Registry {
    families: Mutex<BTreeMap<&'static str, Family>>,
    collectors: Mutex<Vec<Collector>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

fn owned(labels: &[(&'static str, &str)]) -> Labels {
    labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
}

impl Registry {
    fn series<T>(
        &self,
        name: Name,
        labels: &[(&'static str, &str)],
        add: impl FnOnce(&mut Series) -> T,
    ) -> T {
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let family = families.entry(name.name).or_default();
        family.name = Some(name);
        add(family.series.entry(owned(labels)).or_default())
    }

    /// A counter cell of its own; cells with equal labels are exposed as their sum.
    #[must_use]
    pub fn counter(&self, name: Name, labels: &[(&'static str, &str)]) -> Counter {
        let cell = Arc::new(AtomicU64::new(0));
        self.series(name, labels, |series| series.live.push(Arc::clone(&cell)));
        Counter::new(cell)
    }

    /// A histogram of its own; those with equal labels are exposed as their sum.
    #[must_use]
    pub fn histogram(&self, name: Name, labels: &[(&'static str, &str)]) -> Histogram {
        let buckets = Arc::new(Buckets::new(name.bounds));
        self.series(name, labels, |series| series.live_buckets.push(Arc::clone(&buckets)));
        Histogram::new(buckets)
    }

    /// Adds values that are worked out when somebody looks: ages, sizes, sums kept elsewhere.
    pub fn register_collector(&self, collector: Collector) {
        self.collectors.lock().unwrap_or_else(PoisonError::into_inner).push(collector);
    }

    /// Everything, in a fixed order.
    #[must_use]
    pub fn expose(&self) -> String {
        let mut found = Families::default();
        process::collect(&mut found);
        for collector in self.collectors.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            collector(&mut found);
        }
        for family in self.families.lock().unwrap_or_else(PoisonError::into_inner).values_mut() {
            let Some(name) = family.name else { continue };
            for (labels, series) in &mut family.series {
                let metric = match name.kind {
                    Kind::Counter => counter_metric(to_f64(series.count())),
                    Kind::Gauge => gauge_metric(to_f64(series.count())),
                    Kind::Histogram => histogram_metric(&series.sums(), name.bounds),
                };
                found.push(name, labels.clone(), metric);
            }
        }
        found.encode()
    }
}

/// What is exposed, gathered by name.
#[derive(Default)]
pub struct Families(BTreeMap<&'static str, (Option<Name>, BTreeMap<Labels, Metric>)>);

impl Families {
    /// A counter's value.
    pub fn counter(&mut self, name: Name, labels: &[(&'static str, &str)], value: f64) {
        self.push(name, owned(labels), counter_metric(value));
    }

    /// A gauge's value.
    pub fn gauge(&mut self, name: Name, labels: &[(&'static str, &str)], value: f64) {
        self.push(name, owned(labels), gauge_metric(value));
    }

    fn push(&mut self, name: Name, labels: Labels, mut metric: Metric) {
        let pairs = labels.iter().map(|(label, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*label).to_owned());
            pair.set_value(value.clone());
            pair
        });
        metric.set_label(pairs.collect());
        let family = self.0.entry(name.name).or_default();
        family.0 = Some(name);
        family.1.insert(labels, metric);
    }

    fn encode(self) -> String {
        let families: Vec<MetricFamily> = self
            .0
            .into_values()
            .filter_map(|(name, metrics)| {
                let name = name?;
                let mut family = MetricFamily::default();
                family.set_name(name.name.to_owned());
                family.set_help(name.help.to_owned());
                family.set_field_type(match name.kind {
                    Kind::Counter => MetricType::COUNTER,
                    Kind::Gauge => MetricType::GAUGE,
                    Kind::Histogram => MetricType::HISTOGRAM,
                });
                family.set_metric(metrics.into_values().collect());
                Some(family)
            })
            .collect();
        // The encoder fails for families without series only, and there are none.
        TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }
}

/// Counts beyond 2^53 lose their last digits in a scrape, as everywhere in Prometheus.
#[expect(clippy::cast_precision_loss, reason = "Prometheus samples are floats")]
pub(super) fn to_f64(count: u64) -> f64 {
    count as f64
}

fn counter_metric(value: f64) -> Metric {
    let mut counter = CounterProto::default();
    counter.set_value(value);
    let mut metric = Metric::default();
    metric.set_counter(counter);
    metric
}

fn gauge_metric(value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::default();
    metric.set_gauge(gauge);
    metric
}

fn histogram_metric(sums: &Sums, bounds: &[f64]) -> Metric {
    let mut below = 0;
    let buckets = bounds.iter().zip(&sums.counts).map(|(bound, count)| {
        below += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound);
        bucket.set_cumulative_count(below);
        bucket
    });
    let mut histogram = HistogramProto::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(sums.counts.iter().sum());
    histogram.set_sample_sum(to_f64(sums.nanos) / 1e9);
    let mut metric = Metric::default();
    metric.set_histogram(histogram);
    metric
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        process::{Command, Stdio},
        time::Duration,
    };

    use super::*;
    use crate::telemetry::names;

    fn filled() -> Registry {
        let registry = Registry::default();
        let labels = [
            ("direction", "outbound"),
            ("caller", "a"),
            ("callee", "b"),
            ("code", "200"),
            ("error", ""),
        ];
        registry.counter(names::REQUESTS, &labels).add(3);
        let still = registry.counter(names::REQUESTS, &labels);
        still.add(4);
        registry
            .histogram(names::REQUEST_DURATION, &[("direction", "outbound"), ("callee", "b\"\\\n")])
            .record(Duration::from_millis(3));
        registry.register_collector(Box::new(|found| found.gauge(names::SNAPSHOT_AGE, &[], 1.5)));
        registry
    }

    #[test]
    fn cells_of_a_series_are_added_up_and_outlive_their_writers() {
        let registry = filled();
        for _scrape in 0..2 {
            let text = registry.expose();
            assert!(text.contains(
                "infrar_requests_total{direction=\"outbound\",caller=\"a\",callee=\"b\",code=\"200\",error=\"\"} 7"
            ), "{text}");
        }
        let text = registry.expose();
        assert!(text.contains("infrar_snapshot_age_seconds 1.5"));
        assert!(text.contains("le=\"+Inf\"} 1"));
        assert!(text.contains("infrar_request_duration_seconds_sum{direction=\"outbound\",callee=\"b\\\"\\\\\\n\"} 0.003"));
    }

    #[test]
    fn promtool_finds_nothing_to_complain_about() {
        let spawned = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut promtool) = spawned else {
            #[expect(
                clippy::disallowed_methods,
                reason = "a missing tool may only be skipped outside CI"
            )]
            let ci = std::env::var("CI").is_ok_and(|value| value == "true");
            assert!(!ci, "promtool is not installed");
            println!("skipped: promtool is not installed (Debian's package prometheus has it)");
            return;
        };
        promtool.stdin.take().unwrap().write_all(filled().expose().as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}");
    }
}
