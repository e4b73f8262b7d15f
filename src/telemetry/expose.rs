//! Cells and ages as Prometheus reads them (text format 0.0.4).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus::{
    TextEncoder,
    proto::{
        Bucket, Counter as CounterProto, Gauge, Histogram as HistogramProto, LabelPair, Metric,
        MetricFamily, MetricType,
    },
};

use crate::telemetry::{
    cells::{Buckets, Count, Counter, Histogram, Sums},
    names::{Kind, Name},
    process,
};

/// Label names and values in the order they were given.
type Labels = Vec<(&'static str, String)>;
type Collector = Arc<dyn Fn(&mut Families) + Send + Sync>;

/// Cells of one series. Those whose writer is gone are added up once and forgotten: a counter never goes back.
#[derive(Default)]
struct Series {
    live: Vec<Arc<Count>>,
    settled: u64,
    live_buckets: Vec<Arc<Buckets>>,
    settled_buckets: Sums,
}

impl Series {
    /// Done at every scrape and whenever a cell is opened, so that a process nobody scrapes does not grow either.
    fn settle(&mut self) {
        // `get_mut` succeeds only when no writer is left, and then sees all it wrote.
        self.live.retain_mut(|cell| match Arc::get_mut(cell) {
            Some(cell) => {
                self.settled += cell.load();
                false
            }
            None => true,
        });
        self.live_buckets.retain_mut(|buckets| match Arc::get_mut(buckets) {
            Some(buckets) => {
                buckets.add_to(&mut self.settled_buckets);
                false
            }
            None => true,
        });
    }

    fn count(&mut self) -> u64 {
        self.settle();
        self.live.iter().fold(self.settled, |sum, cell| sum + cell.load())
    }

    fn sums(&mut self) -> Sums {
        self.settle();
        let mut sums = self.settled_buckets.clone();
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
        let series = family.series.entry(owned(labels)).or_default();
        series.settle();
        add(series)
    }

    /// A counter cell of its own; cells with equal labels are exposed as their sum.
    #[must_use]
    pub fn counter(&self, name: Name, labels: &[(&'static str, &str)]) -> Counter {
        let cell = Arc::new(Count::default());
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

    /// Adds values that are worked out when somebody looks: ages, sizes, sums kept elsewhere. The collector runs on
    /// the scraping thread while no lock of the registry is held.
    pub fn register_collector(&self, collector: Box<dyn Fn(&mut Families) + Send + Sync>) {
        self.collectors.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::from(collector));
    }

    /// Everything, in a fixed order.
    #[must_use]
    pub fn expose(&self) -> String {
        let mut found = Families::default();
        process::collect(&mut found);
        let collectors = self.collectors.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for collector in collectors {
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
    /// A counter's value, added to what cells and other collectors say of the same series.
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
        // A counter may be told in parts, by cells and collectors; of two gauges the later holds.
        let before = family.1.get(&labels).map(|metric| metric.get_counter().get_value());
        if let (Kind::Counter, Some(before)) = (name.kind, before) {
            let mut counter = CounterProto::default();
            counter.set_value(before + metric.get_counter().get_value());
            metric.set_counter(counter);
        }
        family.1.insert(labels, metric);
    }

    pub(super) fn encode(self) -> String {
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

    /// One series of each name in the list.
    fn every_metric() -> Registry {
        let registry = filled();
        registry.register_collector(Box::new(|found| {
            for name in names::ALL {
                match name.kind {
                    Kind::Counter => found.counter(*name, &[("of", "all")], 1.0),
                    Kind::Gauge => found.gauge(*name, &[("of", "all")], 1.0),
                    Kind::Histogram => {}
                }
            }
        }));
        for name in names::ALL.iter().filter(|name| name.kind == Kind::Histogram) {
            registry.histogram(*name, &[("of", "all")]).record(Duration::from_millis(1));
        }
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
    fn a_count_made_on_a_thread_that_has_ended_stays() {
        let registry = Registry::default();
        for _worker in 0..3 {
            let cell = registry.counter(names::TASK_PANICS, &[]);
            let histogram = registry.histogram(names::PROXY_OVERHEAD, &[]);
            let worker = std::thread::spawn(move || {
                cell.add(5);
                histogram.record(Duration::from_micros(7));
            });
            worker.join().unwrap();
        }
        let families = registry.families.lock().unwrap();
        // Opening the third cell folded the first two in, without any scrape.
        let panics = &families[names::TASK_PANICS.name].series[&Vec::new()];
        assert_eq!((panics.settled, panics.live.len()), (10, 1));
        drop(families);
        for _scrape in 0..2 {
            let text = registry.expose();
            assert!(
                text.contains("infrar_proxy_overhead_seconds_bucket{le=\"0.00001\"} 3\n"),
                "{text}"
            );
            assert!(
                text.contains("infrar_proxy_overhead_seconds_bucket{le=\"0.000005\"} 0\n"),
                "{text}"
            );
            assert!(text.contains("infrar_proxy_overhead_seconds_count 3\n"), "{text}");
        }
        let families = registry.families.lock().unwrap();
        let panics = &families[names::TASK_PANICS.name].series[&Vec::new()];
        assert_eq!((panics.settled, panics.live.len()), (15, 0));
    }

    #[test]
    fn a_collector_may_open_a_cell() {
        let registry = Arc::new(Registry::default());
        let weak = Arc::downgrade(&registry);
        registry.register_collector(Box::new(move |_found| {
            weak.upgrade().unwrap().counter(names::TOKEN_FAILURES, &[]).inc();
        }));
        assert!(registry.expose().contains("infrar_token_failures_total 1\n"));
        assert!(registry.expose().contains("infrar_token_failures_total 2\n"));
    }

    #[test]
    fn a_counter_told_in_parts_is_their_sum() {
        let registry = Registry::default();
        let cell = registry.counter(names::TOKEN_FAILURES, &[]);
        cell.inc();
        for _part in 0..2 {
            registry.register_collector(Box::new(|found| {
                found.counter(names::TOKEN_FAILURES, &[], 2.0);
            }));
        }
        assert!(registry.expose().contains("infrar_token_failures_total 5\n"));
    }

    #[test]
    fn a_metric_without_a_series_is_left_out_and_the_order_is_fixed() {
        let registry = filled();
        let text = registry.expose();
        assert!(!text.contains("infrar_jwks_"), "{text}");
        let types: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        assert!(types.is_sorted(), "{types:?}");
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
        promtool.stdin.take().unwrap().write_all(every_metric().expose().as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}");
    }
}
