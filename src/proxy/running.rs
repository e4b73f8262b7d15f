//! A data plane that runs, as whoever started it holds it: where it listens, and how that changes.

use std::{collections::BTreeMap, fmt, net::SocketAddr};

use tokio::sync::mpsc;

use crate::{
    model::ServiceName,
    net::{self, BindError, Spread},
    proxy::reload::Opening,
    runtime::{RuntimeError, WorkerId, Workers},
    upstream::OwnAddresses,
};

/// A data plane that runs.
pub struct Running {
    /// Where it listens.
    pub listeners: Vec<(Listener, SocketAddr)>,
    pub(super) workers: Workers,
    pub(super) spread: Spread<usize>,
    pub(super) own: OwnAddresses,
    /// Of this process, but no listeners of the data plane.
    pub(super) others: Vec<SocketAddr>,
    /// The addresses that the settings give the listeners, in the order of `listeners`.
    pub(super) asked: Vec<SocketAddr>,
    /// The way on which each worker is told of a listener that opens later.
    pub(super) ways: Vec<mpsc::Sender<Opening>>,
    pub(super) next_id: usize,
}

/// Listeners that may lie before a worker until it opens them. One that is told of more has stopped working.
pub(super) const OPENINGS: usize = 1024;

/// Sockets that are bound, but on which nothing is answered yet.
#[must_use = "dropping them closes their ports"]
pub struct Bound(Vec<(ServiceName, SocketAddr, Vec<std::net::TcpListener>)>);

impl Running {
    /// Waits until every worker has ended, which they do when [`Phase::Drain`](crate::runtime::Phase::Drain) has come and nothing is left.
    ///
    /// # Errors
    /// [`RuntimeError`] when one of them broke.
    pub async fn join(self) -> Result<(), RuntimeError> {
        self.workers.join().await
    }

    /// Ends when a worker has ended that nobody told to: part of the listeners are deaf then. Cancel-safe.
    ///
    /// # Errors
    /// [`RuntimeError`] when it broke.
    pub async fn lost(&mut self) -> Result<WorkerId, RuntimeError> {
        self.workers.lost().await
    }

    /// Open connections of clients.
    #[must_use]
    pub fn connections(&self) -> Spread<usize> {
        self.spread.clone()
    }

    /// Takes the addresses in `ports` that it does not have yet, for [`serve`](Self::serve).
    ///
    /// # Errors
    /// [`BindError`] when one of them cannot be had; none is taken then.
    pub fn bind(&self, ports: &BTreeMap<ServiceName, SocketAddr>) -> Result<Bound, BindError> {
        let mut bound = Vec::new();
        for (service, at) in ports {
            if !self.has_port(service, *at) {
                let key = Listener::Port(service.clone()).key();
                bound.push((service.clone(), *at, net::bind(*at, self.workers.count(), &key)?));
            }
        }
        Ok(Bound(bound))
    }

    /// Has `ports` served, once the settings that name them were sent: opens what was bound, and no longer counts those
    /// that the workers have closed.
    pub fn serve(&mut self, ports: &BTreeMap<ServiceName, SocketAddr>, bound: Bound) {
        let kept: Vec<_> = self
            .listeners
            .drain(..)
            .zip(self.asked.drain(..))
            .filter_map(|((listener, at), asked)| match listener {
                Listener::Port(service) => {
                    let service = owner_of(ports, &service, asked)?.clone();
                    Some(((Listener::Port(service), at), asked))
                }
                Listener::Outbound | Listener::Inbound(_) => Some(((listener, at), asked)),
            })
            .collect();
        (self.listeners, self.asked) = kept.into_iter().unzip();
        for (service, asked, sockets) in bound.0 {
            let at = sockets.first().and_then(|socket| socket.local_addr().ok()).unwrap_or(asked);
            let listener = Listener::Port(service);
            for (way, socket) in self.ways.iter().zip(sockets) {
                let opening =
                    Opening { id: self.next_id, listener: listener.clone(), asked, socket };
                if way.try_send(opening).is_err() {
                    tracing::error!(%at, "a worker does not open a listener");
                }
            }
            self.next_id += 1;
            self.listeners.push((listener, at));
            self.asked.push(asked);
        }
        let open = self.listeners.iter().map(|(_, at)| *at);
        self.own.set(open.chain(self.others.iter().copied()).collect());
    }

    /// Whether it has a port at `at` already; where any free port is asked for, one of `service`.
    fn has_port(&self, service: &ServiceName, at: SocketAddr) -> bool {
        self.listeners.iter().zip(&self.asked).any(|((listener, _), asked)| match listener {
            Listener::Port(before) => *asked == at && (at.port() != 0 || before == service),
            Listener::Outbound | Listener::Inbound(_) => false,
        })
    }
}

/// The service whose port is at `at`; where any free port was asked for, there may be several, and it is that of
/// `before`.
pub(super) fn owner_of<'a>(
    ports: &'a BTreeMap<ServiceName, SocketAddr>,
    before: &ServiceName,
    at: SocketAddr,
) -> Option<&'a ServiceName> {
    let mut owners = ports.iter().filter(|(_, address)| **address == at).map(|(name, _)| name);
    if at.port() == 0 { owners.find(|name| *name == before) } else { owners.next() }
}

/// What a listener is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listener {
    /// Calls out, by name.
    Outbound,
    /// Calls out, to one service.
    Port(ServiceName),
    /// Calls in; the place in `inbound`.
    Inbound(usize),
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key())
    }
}

impl Listener {
    /// The key of the settings that says where it listens.
    pub(super) fn key(&self) -> String {
        match self {
            Self::Outbound => "outbound.listen".to_owned(),
            Self::Port(service) => format!("outbound.ports.{service}"),
            Self::Inbound(0) => "inbound.listen".to_owned(),
            Self::Inbound(index) => format!("inbound[{index}].listen"),
        }
    }
}
