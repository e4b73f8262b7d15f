//! Cells that one writer counts in and anybody may read.
//!
//! The types hold that promise: a handle may move to another thread, but two cannot use it, and no two cells share a
//! cache line.

use std::{
    cell::Cell,
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the application behind this proxy.
    Outbound,
    /// To the application behind this proxy.
    Inbound,
}

impl Direction {
    /// The direction as logs and metrics write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// Makes a handle `Send` but not `Sync`: one thread writes.
type OneWriter = PhantomData<Cell<()>>;

/// Adds with a load and a store: right only while there is one writer.
fn add(cell: &AtomicU64, more: u64) {
    cell.store(cell.load(Relaxed).wrapping_add(more), Relaxed);
}

/// The cell of a counter.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn load(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A counter with one writer. Not a clone of it, but the registry reads the same cell.
#[derive(Debug)]
pub struct Counter(Arc<Count>, OneWriter);

impl Counter {
    pub(super) fn new(cell: Arc<Count>) -> Self {
        Self(cell, PhantomData)
    }

    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, more: u64) {
        add(&self.0.0, more);
    }
}

/// Most buckets a histogram has, with the one above all bounds.
pub(super) const MOST_BUCKETS: usize = 24;

/// The cells of a histogram.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Buckets {
    /// Upper bounds in nanoseconds.
    bounds: Vec<u64>,
    /// One more than there are bounds: that one counts what is above all of them. The rest stays 0.
    counts: [AtomicU64; MOST_BUCKETS],
    sum_nanos: AtomicU64,
}

impl Buckets {
    pub(super) fn new(bounds: &[f64]) -> Self {
        let nanos = |bound: &f64| {
            u64::try_from(Duration::from_secs_f64(*bound).as_nanos()).unwrap_or(u64::MAX)
        };
        Self {
            bounds: bounds.iter().map(nanos).collect(),
            counts: [const { AtomicU64::new(0) }; MOST_BUCKETS],
            sum_nanos: AtomicU64::new(0),
        }
    }

    /// Adds what is counted here to `sums`.
    pub(super) fn add_to(&self, sums: &mut Sums) {
        sums.counts.resize(self.bounds.len() + 1, 0);
        for (sum, count) in sums.counts.iter_mut().zip(&self.counts) {
            *sum += count.load(Relaxed);
        }
        sums.nanos = sums.nanos.wrapping_add(self.sum_nanos.load(Relaxed));
    }
}

/// A histogram's counts, added up.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums {
    /// Per bucket, not cumulative; the last is what is above all bounds.
    pub(super) counts: Vec<u64>,
    /// Sum of all values in nanoseconds.
    pub(super) nanos: u64,
}

/// A histogram of durations with one writer.
#[derive(Debug)]
pub struct Histogram(Arc<Buckets>, OneWriter);

impl Histogram {
    pub(super) fn new(buckets: Arc<Buckets>) -> Self {
        Self(buckets, PhantomData)
    }

    /// Counts a duration.
    pub fn record(&self, span: Duration) {
        let nanos = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        let bucket = self.0.bounds.partition_point(|bound| *bound < nanos);
        if let Some(cell) = self.0.counts.get(bucket) {
            add(cell, 1);
        }
        add(&self.0.sum_nanos, nanos);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_falls_into_the_bucket_whose_bound_it_does_not_exceed() {
        let buckets = Arc::new(Buckets::new(&[0.001, 0.01]));
        let histogram = Histogram::new(Arc::clone(&buckets));
        for millis in [1, 2, 10, 11, 5000] {
            histogram.record(Duration::from_millis(millis));
        }
        let mut sums = Sums::default();
        buckets.add_to(&mut sums);
        assert_eq!(sums.counts, [1, 2, 2]);
        assert_eq!(sums.nanos, 5_024_000_000);
    }
}
