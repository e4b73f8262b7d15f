//! Bytes per path, counted where they move.
//!
//! A [`Path`] is made once per snapshot (and per worker, when workers shall not share cache lines) and holds the
//! counters; the path of a request only adds to them. The [`Meter`] knows every path ever made and adds them up when
//! somebody reads. Counts of paths whose snapshot is gone are kept, so what is read never falls.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use crate::{
    cost::PriceClass,
    model::{ByteCount, NetworkMode, Place, ServiceName},
};

/// Where bytes go, seen from the proxy that counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Leg {
    /// Towards the callee.
    Request,
    /// Back to the caller.
    Response,
}

impl Leg {
    /// The leg as metrics and the ledger write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Response => "response",
        }
    }
}

/// What the bytes were part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Requests and responses.
    Http,
    /// A `CONNECT` tunnel.
    Tunnel,
}

impl Kind {
    /// The kind as metrics and the ledger write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Tunnel => "tunnel",
        }
    }
}

/// What bytes are counted by, besides their leg and kind.
///
/// `from` and `to` are the places of caller and callee; the bytes of [`Leg::Response`] move the other way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathKey {
    /// The service that is called.
    pub callee: ServiceName,
    /// The caller's place.
    pub from: Place,
    /// The callee's place; `None`: a host outside the project.
    pub to: Option<Place>,
    /// How `from` reaches `to`.
    pub mode: NetworkMode,
    /// What the path is to the provider who bills it; it tells zones apart, which the places do not.
    pub class: PriceClass,
}

/// The counters of one path: leg × kind, on a cache line that nothing else shares.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Cells {
    http: Both,
    tunnel: Both,
}

#[derive(Debug, Default)]
struct Both {
    request: AtomicU64,
    response: AtomicU64,
}

impl Cells {
    fn cell(&self, leg: Leg, kind: Kind) -> &AtomicU64 {
        let both = match kind {
            Kind::Http => &self.http,
            Kind::Tunnel => &self.tunnel,
        };
        match leg {
            Leg::Request => &both.request,
            Leg::Response => &both.response,
        }
    }
}

/// The counters of one path, to be added to without looking anything up. Clones count into the same cells.
#[derive(Clone, Debug)]
pub struct Path(Arc<Cells>);

impl Path {
    /// So many bytes have moved.
    pub fn add(&self, leg: Leg, kind: Kind, bytes: u64) {
        self.0.cell(leg, kind).fetch_add(bytes, Relaxed);
    }
}

/// Bytes of one path, leg and kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressBytes {
    /// Which path.
    pub path: PathKey,
    /// Which way.
    pub leg: Leg,
    /// As part of what.
    pub kind: Kind,
    /// How many since the process began.
    pub bytes: ByteCount,
}

/// Every path of this process.
#[derive(Debug, Default)]
pub struct Meter(Mutex<BTreeMap<PathKey, Counted>>);

#[derive(Debug, Default)]
struct Counted {
    live: Vec<Arc<Cells>>,
    /// Of paths that nobody holds any more.
    settled: Sums,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums([[u64; 2]; 2]);

impl Sums {
    fn add(&mut self, cells: &Cells) {
        for (row, leg) in self.0.iter_mut().zip(LEGS) {
            for (sum, kind) in row.iter_mut().zip(KINDS) {
                *sum = sum.saturating_add(cells.cell(leg, kind).load(Relaxed));
            }
        }
    }
}

const LEGS: [Leg; 2] = [Leg::Request, Leg::Response];
const KINDS: [Kind; 2] = [Kind::Http, Kind::Tunnel];

impl Meter {
    /// New counters for a path; the series exist at zero from here on. Takes a lock: call it when a snapshot is made.
    #[must_use]
    pub fn path(&self, key: PathKey) -> Path {
        let cells = Arc::new(Cells::default());
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = paths.entry(key).or_default();
        counted.settle();
        counted.live.push(cells.clone());
        Path(cells)
    }

    /// Everything counted so far, in a fixed order. Takes a lock that no request takes.
    #[must_use]
    pub fn read(&self) -> Vec<EgressBytes> {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        paths.iter_mut().flat_map(|(key, counted)| counted.read(key)).collect()
    }
}

impl Counted {
    /// Moves the counts of paths that nobody holds any more into `settled`.
    fn settle(&mut self) {
        let settled = &mut self.settled;
        self.live.retain_mut(|cells| {
            // Unlike the count alone, `get_mut` also sees what the last holder wrote before it let go.
            let held = Arc::get_mut(cells).is_none();
            if !held {
                settled.add(cells);
            }
            held
        });
    }

    fn read(&mut self, key: &PathKey) -> Vec<EgressBytes> {
        self.settle();
        let mut sums = self.settled;
        for cells in &self.live {
            sums.add(cells);
        }
        let Sums([request, response]) = sums;
        let rows = [(Leg::Request, request), (Leg::Response, response)];
        let each = rows.into_iter().flat_map(|(leg, [http, tunnel])| {
            [(leg, Kind::Http, http), (leg, Kind::Tunnel, tunnel)]
        });
        each.map(|(leg, kind, bytes)| EgressBytes {
            path: key.clone(),
            leg,
            kind,
            bytes: ByteCount(bytes),
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(callee: &str) -> PathKey {
        PathKey {
            callee: callee.parse().unwrap(),
            from: "aws_us_east_1".parse().unwrap(),
            to: Some("azure_eastus".parse().unwrap()),
            mode: NetworkMode::Public,
            class: PriceClass::OtherCloud,
        }
    }

    fn bytes(meter: &Meter, callee: &str, leg: Leg, kind: Kind) -> u64 {
        let wanted = |it: &EgressBytes| it.path == key(callee) && it.leg == leg && it.kind == kind;
        meter.read().into_iter().find(wanted).unwrap().bytes.0
    }

    #[test]
    fn a_path_is_there_at_zero_before_anything_moved() {
        let meter = Meter::default();
        let _path = meter.path(key("reports"));
        let read = meter.read();
        assert_eq!(read.len(), 4);
        assert!(read.iter().all(|it| it.bytes == ByteCount(0)));
    }

    #[test]
    fn counts_outlive_the_snapshot_that_made_them_and_leave_nothing_behind() {
        let meter = Meter::default();
        for _ in 0..1000 {
            meter.path(key("reports")).add(Leg::Request, Kind::Http, 7);
        }
        assert_eq!(bytes(&meter, "reports", Leg::Request, Kind::Http), 7000);
        assert!(meter.0.lock().unwrap()[&key("reports")].live.is_empty());
    }

    #[test]
    fn workers_add_up() {
        let meter = Meter::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let path = meter.path(key("reports"));
                scope.spawn(move || {
                    for _ in 0..1000 {
                        path.add(Leg::Response, Kind::Tunnel, 3);
                    }
                });
            }
        });
        assert_eq!(bytes(&meter, "reports", Leg::Response, Kind::Tunnel), 12_000);
        assert_eq!(bytes(&meter, "reports", Leg::Request, Kind::Tunnel), 0);
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_whenever_paths_come_and_go(
            steps in proptest::collection::vec((0usize..3, 0u64..1_000_000, any::<bool>(), any::<bool>()), 0..60),
        ) {
            let meter = Meter::default();
            let names = ["a", "b", "c"];
            let mut held = Vec::new();
            let mut expected = [0u64; 3];
            for (service, bytes, keep, read) in steps {
                let path = meter.path(key(names[service]));
                path.add(Leg::Request, Kind::Http, bytes);
                expected[service] += bytes;
                if keep {
                    held.push(path);
                } else {
                    held.clear();
                }
                if read {
                    prop_assert_eq!(bytes_of_all(&meter), expected.iter().sum::<u64>());
                }
            }
            prop_assert_eq!(bytes_of_all(&meter), expected.iter().sum::<u64>());
        }
    }

    fn bytes_of_all(meter: &Meter) -> u64 {
        meter.read().into_iter().map(|it| it.bytes).sum::<ByteCount>().0
    }
}
