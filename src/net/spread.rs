//! Spreads connections evenly over the workers.
//!
//! The kernel deals connections to the workers' sockets by a hash; with few long-lived connections one worker gets
//! most of them. So a worker that holds more than its even share hands what it accepts to the worker with fewest.

use std::{
    net::{SocketAddr, TcpStream as StdStream},
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::mpsc;

use crate::runtime::WorkerId;

/// Connections that may lie between two workers. When it is full the connection stays where it was accepted.
const IN_HAND: usize = 256;

/// Open connections per worker, and the way to hand one over. Clones are the same.
///
/// `T` says what the connection is: which listener it came from.
#[derive(Debug)]
pub struct Spread<T> {
    open: Arc<[Line]>,
    ways: Arc<[mpsc::Sender<Handover<T>>]>,
}

/// A counter on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line(AtomicUsize);

/// One open connection of a worker; dropping it ends the count.
#[derive(Debug)]
pub struct Open {
    worker: WorkerId,
    open: Arc<[Line]>,
}

/// Where a connection that was just accepted belongs.
#[derive(Debug)]
pub enum Placement {
    /// With the worker that accepted it.
    Keep(Open),
    /// With another, which counts it already; to be sent with [`Spread::hand`].
    HandTo(Open),
}

/// A connection on its way to another worker.
#[derive(Debug)]
pub struct Handover<T> {
    /// The connection; it does not block.
    pub stream: StdStream,
    /// Who called.
    pub peer: SocketAddr,
    /// What it is.
    pub what: T,
    /// Counts it at its new worker.
    pub open: Open,
}

impl<T> Clone for Spread<T> {
    fn clone(&self) -> Self {
        Self { open: Arc::clone(&self.open), ways: Arc::clone(&self.ways) }
    }
}

impl<T> Spread<T> {
    /// A spread over `workers`, and for each the channel on which it receives what others hand to it.
    #[must_use]
    pub fn new(workers: NonZeroUsize) -> (Self, Vec<mpsc::Receiver<Handover<T>>>) {
        let open = (0..workers.get()).map(|_| Line::default()).collect();
        let (ways, ends): (Vec<_>, _) = (0..workers.get()).map(|_| mpsc::channel(IN_HAND)).unzip();
        (Self { open, ways: ways.into() }, ends)
    }

    /// Counts a connection that `worker` accepted and says where it belongs.
    #[must_use]
    pub fn claim(&self, worker: WorkerId) -> Placement {
        let counts = || self.open.iter().map(|line| line.0.load(Ordering::Relaxed));
        let own = counts().nth(worker.index()).unwrap_or(0);
        let even = (counts().sum::<usize>() + 1).div_ceil(self.open.len());
        if own < even {
            return Placement::Keep(self.count(worker));
        }
        let fewest = counts().enumerate().min_by_key(|(_, count)| *count);
        match fewest {
            Some((index, count)) if count < own => {
                Placement::HandTo(self.count(WorkerId::new(index)))
            }
            _ => Placement::Keep(self.count(worker)),
        }
    }

    /// Counts a connection at `worker`, wherever it would belong.
    #[must_use]
    pub fn count(&self, worker: WorkerId) -> Open {
        if let Some(line) = self.open.get(worker.index()) {
            line.0.fetch_add(1, Ordering::Relaxed);
        }
        Open { worker, open: Arc::clone(&self.open) }
    }

    /// Sends a connection to the worker that `open` counts it at.
    ///
    /// # Errors
    /// The connection back, when that worker has ended or too much lies before it. It is still counted there; keep it
    /// under [`count`](Self::count) of the worker that has it.
    pub fn hand(
        &self,
        stream: StdStream,
        peer: SocketAddr,
        what: T,
        open: Open,
    ) -> Result<(), Box<Handover<T>>> {
        let handover = Handover { stream, peer, what, open };
        let Some(way) = self.ways.get(handover.open.worker.index()) else {
            return Err(Box::new(handover));
        };
        way.try_send(handover).map_err(|refused| {
            Box::new(match refused {
                mpsc::error::TrySendError::Full(back) | mpsc::error::TrySendError::Closed(back) => {
                    back
                }
            })
        })
    }

    /// Open connections of all workers.
    #[must_use]
    pub fn total(&self) -> usize {
        self.each().sum()
    }

    /// Open connections, worker by worker.
    pub fn each(&self) -> impl Iterator<Item = usize> {
        self.open.iter().map(|line| line.0.load(Ordering::Relaxed))
    }

    /// Open connections of one worker.
    #[must_use]
    pub fn of(&self, worker: WorkerId) -> usize {
        self.open.get(worker.index()).map_or(0, |line| line.0.load(Ordering::Relaxed))
    }
}

impl Open {
    /// The worker it is counted at.
    #[must_use]
    pub fn worker(&self) -> WorkerId {
        self.worker
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(line) = self.open.get(self.worker.index()) {
            line.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    const FIRST: WorkerId = WorkerId::new(0);
    const SECOND: WorkerId = WorkerId::new(1);

    fn two() -> (Spread<&'static str>, Vec<mpsc::Receiver<Handover<&'static str>>>) {
        Spread::new(NonZeroUsize::new(2).unwrap())
    }

    #[test]
    fn however_unevenly_the_kernel_deals_the_workers_hold_the_same() {
        let (spread, _ends) = two();
        let mut held = Vec::new();
        for _ in 0..64 {
            match spread.claim(FIRST) {
                Placement::Keep(open) | Placement::HandTo(open) => held.push(open),
            }
        }
        assert_eq!((spread.of(FIRST), spread.of(SECOND)), (32, 32));
        held.clear();
        assert_eq!(spread.total(), 0);
    }

    #[test]
    fn a_worker_within_its_share_keeps_what_it_accepts() {
        let (spread, _ends) = two();
        let _a = spread.count(SECOND);
        assert!(matches!(spread.claim(FIRST), Placement::Keep(_)));
        let (alone, _ends) = Spread::<()>::new(NonZeroUsize::MIN);
        let _b = alone.count(FIRST);
        assert!(matches!(alone.claim(FIRST), Placement::Keep(_)));
    }

    #[tokio::test]
    async fn a_connection_arrives_at_the_other_worker_and_is_counted_there() {
        let (spread, mut ends) = two();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let connect = || StdStream::connect(addr).unwrap();
        let _kept = spread.count(FIRST);
        let Placement::HandTo(open) = spread.claim(FIRST) else { panic!("above the even share") };
        spread.hand(connect(), addr, "outbound", open).unwrap();
        let received = ends[1].recv().await.unwrap();
        assert_eq!((received.what, spread.of(SECOND)), ("outbound", 1));
        drop(received);
        assert_eq!(spread.of(SECOND), 0);

        ends.clear(); // the workers have ended
        let back = spread.hand(connect(), addr, "outbound", spread.count(SECOND)).unwrap_err();
        assert_eq!((back.what, back.open.worker()), ("outbound", SECOND));
    }
}
