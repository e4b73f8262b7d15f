//! How often one may ask: a token bucket for each caller, and for each address of those that prove nothing.
//!
//! A bucket is one number, the moment by which it would be full again (the generic cell rate algorithm), so that taking from it
//! is one atomic exchange. The table is bounded; when it is full, the least used bucket is forgotten, and its owner begins
//! with a full one.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use crate::{model::ServiceName, net};

/// Buckets that are remembered.
const BUCKETS: usize = 16 * 1024;
/// What reads may come at once, as seconds of their rate; and writes.
const READ_BURST: u64 = 2;
const WRITE_BURST: u64 = 5;
/// Questions per second from one address that proves nothing, and at once.
const PUBLIC: u32 = 500;
const PUBLIC_BURST: u64 = 2;

/// Whose bucket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Reader(ServiceName),
    Writer(ServiceName),
    Address(IpAddr),
}

/// A bucket is empty: how long until there is something in it, in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wait(pub(super) u64);

/// One kind of buckets: how long one token takes to come back, and how much lies in a full one, in nanoseconds.
#[derive(Clone, Copy)]
struct Size {
    interval: u64,
    depth: u64,
}

impl Size {
    /// `None` for a rate of 0: no limit.
    fn new(rate: u32, burst_seconds: u64) -> Option<Self> {
        let interval = 1_000_000_000_u64.checked_div(rate.into())?.max(1);
        Some(Self { interval, depth: interval * u64::from(rate) * burst_seconds })
    }
}

/// The buckets. One per control plane.
pub(super) struct Rates {
    began: Instant,
    buckets: Cache<Owner, Arc<AtomicU64>>,
    reads: Option<Size>,
    writes: Option<Size>,
    public: Option<Size>,
}

impl Rates {
    /// Reads and writes per second of each caller; 0: none is limited. Without a limit for reads, addresses have none.
    pub(super) fn new(reads: u32, writes: u32) -> Self {
        Self {
            began: Instant::now(),
            buckets: Cache::new(BUCKETS),
            reads: Size::new(reads, READ_BURST),
            writes: Size::new(writes, WRITE_BURST),
            public: Size::new(if reads == 0 { 0 } else { PUBLIC }, PUBLIC_BURST),
        }
    }

    /// A question of a caller that costs no commit.
    pub(super) fn read(&self, caller: &ServiceName) -> Result<(), Wait> {
        self.take(self.reads, || Owner::Reader(caller.clone()))
    }

    /// A question of a caller that may cost a commit.
    pub(super) fn write(&self, caller: &ServiceName) -> Result<(), Wait> {
        self.take(self.writes, || Owner::Writer(caller.clone()))
    }

    /// A question that proves nothing.
    pub(super) fn public(&self, peer: IpAddr) -> Result<(), Wait> {
        self.take(self.public, || Owner::Address(net::source(peer)))
    }

    fn take(&self, size: Option<Size>, owner: impl FnOnce() -> Owner) -> Result<(), Wait> {
        let Some(Size { interval, depth }) = size else { return Ok(()) };
        let owner = owner();
        let bucket = self.buckets.get(&owner).unwrap_or_else(|| {
            // Of two who come first together, one may find a bucket that nobody else will see: one question too many.
            let bucket = Arc::new(AtomicU64::new(0));
            self.buckets.insert(owner, Arc::clone(&bucket));
            bucket
        });
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX / 2);
        let taken = bucket.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            let full_at = full_at.max(now) + interval;
            (full_at - now <= depth).then_some(full_at)
        });
        taken.map(drop).map_err(|full_at| {
            let wait = (full_at + interval).saturating_sub(now + depth);
            Wait(wait.div_ceil(1_000_000_000).max(1))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    fn taken(mut take: impl FnMut() -> Result<(), Wait>) -> usize {
        (0..100_000).take_while(|_| take().is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_bucket_is_emptied_at_once_and_fills_at_its_rate() {
        let rates = Rates::new(2_000, 100);
        let web: ServiceName = "web".parse().unwrap();
        assert_eq!(taken(|| rates.read(&web)), 4_000);
        assert_eq!(taken(|| rates.write(&web)), 500);
        assert_eq!(rates.write(&web), Err(Wait(1)));
        advance(Duration::from_secs(1)).await;
        assert_eq!(taken(|| rates.read(&web)), 2_000);
        assert_eq!(taken(|| rates.write(&web)), 100);
        assert_eq!(taken(|| rates.read(&"data".parse().unwrap())), 4_000);
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_have_buckets_of_their_own_and_a_network_has_one() {
        let rates = Rates::new(2_000, 100);
        let from = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(taken(|| rates.public(from("2001:db8::1"))), 1_000);
        assert_eq!(rates.public(from("2001:db8::2")), Err(Wait(1)));
        assert_eq!(rates.public(from("192.0.2.1")), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_rate_says_how_long_to_wait_and_none_never_says_no() {
        let (slow, none) = (Rates::new(1, 1), Rates::new(0, 0));
        let web: ServiceName = "web".parse().unwrap();
        assert_eq!(taken(|| slow.write(&web)), 5);
        assert_eq!(slow.write(&web), Err(Wait(1)));
        assert_eq!(taken(|| none.read(&web)), 100_000);
        assert_eq!(taken(|| none.public([192, 0, 2, 1].into())), 100_000);
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_does_not_grow_with_those_who_ask() {
        let rates = Rates::new(2_000, 100);
        for address in 0..100_000_u32 {
            rates.public(std::net::Ipv4Addr::from(address).into()).unwrap();
        }
        assert!(rates.buckets.len() <= BUCKETS);
    }
}
