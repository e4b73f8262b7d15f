//! A worker's connections to one address.
//!
//! Idle HTTP/1.1 connections are a stack: the warmest is used first, and those at the bottom age out. A connection is
//! looked at before it is handed out, so that a request does not find out that the peer has hung up. HTTP/2
//! connections are shared; another is opened when the streams of those that stand run out.

use std::{
    cell::{Cell, RefCell},
    mem::MaybeUninit,
    rc::Rc,
    task::{Context, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use socket2::SockRef;
use tokio::{sync::Notify, time::Instant};

use crate::{
    http1::HeadLimits,
    model::Protocol,
    upstream::{ConnectError, Connector, H1, H2, Witness},
};

/// How long connections are kept.
#[derive(Clone, Copy, Debug)]
pub struct PoolSettings {
    /// An unused connection is closed after this time.
    pub idle: Duration,
    /// No request begins on a connection older than this.
    pub age: Duration,
    /// So many unused HTTP/1.1 connections are kept.
    pub spare: usize,
    /// How large the head of an answer may be.
    pub head: HeadLimits,
    /// Over TLS, HTTP/2 is tried first and HTTP/1.1 only if the peer does not speak it.
    pub prefer_h2: bool,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            // Below the 60 s after which common load balancers and servers hang up.
            idle: Duration::from_secs(55),
            age: Duration::from_secs(3600),
            spare: 1024,
            head: HeadLimits::default(),
            prefer_h2: false,
        }
    }
}

/// From this round trip on, many concurrent requests share an HTTP/2 connection: each further HTTP/1.1 connection
/// would cost its first request two round trips.
const LONG_TRIP: Duration = Duration::from_millis(5);
/// So many HTTP/1.1 connections in use make HTTP/2 the better way over a long trip.
const MANY: usize = 32;

/// What this machine may take to notice, when it is busy, that a peer has hung up.
const NOTICE: Duration = Duration::from_millis(100);

/// What a peer was seen not to speak is tried again after this time: it may have been replaced.
const REMEMBERED: Duration = Duration::from_secs(600);
/// A waiting connection keeps a buffer for heads of this size at most.
const KEPT_BUFFER: usize = 64 * 1024;

/// What a request asks of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    /// HTTP/2 is needed (gRPC).
    pub h2: bool,
    /// HTTP/1.1 is needed (an upgrade).
    pub h1: bool,
    /// The request can be repeated, should the connection turn out to be dead.
    pub repeatable: bool,
    /// Only a connection that was opened since then will do: one that was kept has just been found dead.
    pub since: Option<Instant>,
}

/// A connection for one request.
pub enum Lease {
    /// A connection of its own; it goes back when the answer is complete.
    H1 {
        /// The connection.
        connection: Box<H1>,
        /// Where it goes back to; counts it as busy until then.
        home: Home,
        /// Whether it has carried nothing before.
        fresh: bool,
    },
    /// A stream on a shared connection.
    H2 {
        /// The connection.
        connection: Rc<H2>,
        /// The way to open the stream.
        send: SendRequest<Bytes>,
        /// Whether it has carried nothing before.
        fresh: bool,
    },
}

impl Lease {
    /// Whether a request that dies on it without an answer may have met a peer that had hung up already.
    #[must_use]
    pub fn may_be_stale(&self) -> bool {
        match self {
            Self::H1 { fresh, .. } | Self::H2 { fresh, .. } => !fresh,
        }
    }

    /// Sees whether anything comes on a connection that others use too.
    #[must_use]
    pub fn witness(&self) -> Option<Witness> {
        match self {
            Self::H1 { .. } => None,
            Self::H2 { connection, .. } => Some(connection.witness()),
        }
    }
}

/// A worker's connections to one address.
pub struct Pool {
    settings: PoolSettings,
    protocol: Protocol,
    connector: Connector,
    #[expect(
        clippy::vec_box,
        reason = "a connection moves between pool and request each time: as a pointer"
    )]
    idle: RefCell<Vec<Box<H1>>>,
    shared: RefCell<Vec<Rc<H2>>>,
    /// HTTP/1.1 connections that carry a request.
    busy: Cell<usize>,
    opening: Cell<bool>,
    opened: Notify,
    /// When the peer was seen to refuse HTTP/1.1 in ALPN.
    h2_only: Cell<Option<Instant>>,
    /// When the peer was seen not to speak HTTP/2.
    h1_only: Cell<Option<Instant>>,
    round_trip: Cell<Duration>,
    /// The last time that anybody told: a second old at most, because pruning tells it.
    now: Cell<Instant>,
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(settings: PoolSettings, protocol: Protocol, connector: Connector) -> Rc<Self> {
        Rc::new(Self {
            settings,
            protocol,
            connector,
            idle: RefCell::default(),
            shared: RefCell::default(),
            busy: Cell::new(0),
            opening: Cell::new(false),
            opened: Notify::new(),
            h2_only: Cell::new(None),
            h1_only: Cell::new(None),
            round_trip: Cell::new(Duration::ZERO),
            now: Cell::new(Instant::now()),
        })
    }

    /// How large the head of an answer may be.
    #[must_use]
    pub fn head_limits(&self) -> HeadLimits {
        self.settings.head
    }

    /// The way there.
    #[must_use]
    pub fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Connections that stand, in use or not.
    #[must_use]
    pub fn open(&self) -> usize {
        self.busy.get() + self.idle.borrow().len() + self.shared.borrow().len()
    }

    /// So soon after sending on it a connection fails that the peer had left before: about a round trip. What fails later
    /// has been worked on.
    #[must_use]
    pub fn finds_out_within(&self) -> Duration {
        self.round_trip.get() + NOTICE
    }

    fn wants_h2(&self, want: Want) -> bool {
        if want.h1 {
            return false;
        }
        match self.protocol {
            Protocol::H1 => want.h2,
            Protocol::H2 => true,
            Protocol::Auto => {
                let crowded = self.busy.get() >= MANY && self.round_trip.get() >= LONG_TRIP;
                let better = (crowded || self.settings.prefer_h2) && self.connector.is_tls();
                want.h2 || self.was_seen(&self.h2_only) || (better && !self.was_seen(&self.h1_only))
            }
        }
    }

    /// Whether something was seen of the peer not too long ago.
    fn was_seen(&self, when: &Cell<Option<Instant>>) -> bool {
        when.get().is_some_and(|at| self.now.get().duration_since(at) < REMEMBERED)
    }

    /// A connection that is there already at `now`, without waiting for anything.
    #[must_use]
    pub fn kept(self: &Rc<Self>, want: Want, now: Instant) -> Option<Lease> {
        self.now.set(now);
        if self.wants_h2(want) {
            return self.roomy(want);
        }
        let connection = self.warm(now, want)?;
        Some(Lease::H1 { connection, home: Home::begin(self), fresh: false })
    }

    /// A shared connection that takes another stream.
    fn roomy(&self, want: Want) -> Option<Lease> {
        self.shared.borrow().iter().find_map(|connection| {
            if want.since.is_some_and(|since| connection.opened < since) {
                return None;
            }
            let send = connection.ready()?;
            Some(Lease::H2 { connection: Rc::clone(connection), send, fresh: false })
        })
    }

    /// A connection for one request, a kept one if there is any; whatever that takes ends at `deadline`.
    ///
    /// # Errors
    /// [`ConnectError`] when a new one was needed and could not be had; nothing has been sent then.
    pub async fn lease(
        self: &Rc<Self>,
        want: Want,
        deadline: Instant,
    ) -> Result<Lease, ConnectError> {
        if self.wants_h2(want) {
            match self.lease_h2(want, deadline).await {
                // It was a wish, not a need.
                Err(ConnectError::Protocol) if !want.h2 && self.protocol == Protocol::Auto => {
                    self.h1_only.set(Some(Instant::now()));
                }
                leased => return leased,
            }
        }
        let now = Instant::now();
        if let Some(connection) = self.warm(now, want) {
            return Ok(Lease::H1 { connection, home: Home::begin(self), fresh: false });
        }
        match self.connector.open_h1(deadline).await {
            Ok((stream, trip)) => {
                self.round_trip.set(trip);
                let connection = Box::new(H1::new(stream, Instant::now()));
                Ok(Lease::H1 { connection, home: Home::begin(self), fresh: true })
            }
            Err(ConnectError::WantsH2) if !want.h1 => {
                self.h2_only.set(Some(Instant::now()));
                self.lease_h2(want, deadline).await
            }
            Err(error) => Err(error),
        }
    }

    /// The warmest idle connection that is still good.
    fn warm(&self, now: Instant, want: Want) -> Option<Box<H1>> {
        if want.since.is_some() {
            return None;
        }
        loop {
            let mut connection = self.idle.borrow_mut().pop()?;
            if self.is_fit(&mut connection, now) && is_quiet(&connection, want.repeatable) {
                return Some(connection);
            }
        }
    }

    fn is_fit(&self, connection: &mut H1, now: Instant) -> bool {
        // A second before the peer would hang up: our request must not cross its close.
        let peer = connection
            .peer_idle
            .map_or(self.settings.idle, |limit| limit.saturating_sub(Duration::from_secs(1)));
        let idle = self.settings.idle.min(peer);
        now.duration_since(connection.idle_since) < idle
            && now.duration_since(connection.opened) < self.settings.age
    }

    async fn lease_h2(
        self: &Rc<Self>,
        want: Want,
        deadline: Instant,
    ) -> Result<Lease, ConnectError> {
        loop {
            if let Some(lease) = self.roomy(want) {
                return Ok(lease);
            }
            if self.opening.get() {
                // Someone else is opening one; a request that arrives meanwhile shares it.
                let waiting = self.opened.notified();
                if tokio::time::timeout_at(deadline, waiting).await.is_err() {
                    return Err(ConnectError::Timeout);
                }
                continue;
            }
            let opening = Opening::begin(self);
            let (stream, trip) = self.connector.open_h2(deadline).await?;
            self.round_trip.set(trip);
            let header_bytes = u32::try_from(self.settings.head.bytes).unwrap_or(u32::MAX);
            let connection = tokio::time::timeout_at(deadline, H2::handshake(stream, header_bytes))
                .await
                .map_err(|_elapsed| ConnectError::Timeout)??;
            self.shared.borrow_mut().push(Rc::clone(&connection));
            drop(opening);
            let send = connection.ready().ok_or(ConnectError::Protocol)?;
            return Ok(Lease::H2 { connection, send, fresh: true });
        }
    }

    /// Takes a connection back.
    pub(super) fn put(&self, mut connection: Box<H1>) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() < self.settings.spare {
            // Rather too early than too late: the peer hangs up by its own clock.
            connection.idle_since = self.now.get();
            // What is left of the buffer shares its memory with the answer's last bytes; a waiting connection holds none.
            connection.read = BytesMut::new();
            if connection.write.try_reclaim(KEPT_BUFFER + 1) {
                connection.write = BytesMut::new();
            }
            idle.push(connection);
        }
    }

    /// Closes what is too old or unused for too long. Called about once a second.
    pub fn prune(&self, now: Instant) {
        self.now.set(now);
        self.idle.borrow_mut().retain_mut(|connection| self.is_fit(connection, now));
        for connection in self.shared.borrow().iter() {
            let old = now.duration_since(connection.opened) >= self.settings.age;
            let unused = connection.is_idle()
                && now.duration_since(connection.idle_since.get()) >= self.settings.idle;
            if old || unused {
                connection.retire();
            }
        }
        self.shared.borrow_mut().retain(|connection| !connection.is_closed());
    }
}

/// The pool that a connection was taken from; the connection counts as busy until this is dropped.
pub struct Home(Rc<Pool>);

impl Home {
    fn begin(pool: &Rc<Pool>) -> Self {
        pool.busy.set(pool.busy.get() + 1);
        Self(Rc::clone(pool))
    }

    /// The pool.
    pub(super) fn pool(&self) -> &Pool {
        &self.0
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.0.busy.set(self.0.busy.get().saturating_sub(1));
    }
}

/// Marks that a connection is being opened; whoever waits for it is told when that ended, well or not.
struct Opening<'a>(&'a Pool);

impl<'a> Opening<'a> {
    fn begin(pool: &'a Pool) -> Self {
        pool.opening.set(true);
        Self(pool)
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.opening.set(false);
        self.0.opened.notify_waiters();
    }
}

/// Whether the peer has neither closed an idle connection nor said anything on it.
///
/// What the event queue has seen costs nothing to ask. A request that must not be repeated asks the kernel itself.
fn is_quiet(connection: &H1, repeatable: bool) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    if repeatable && connection.stream.poll_readable(&mut cx).is_pending() {
        return true;
    }
    let mut byte = [MaybeUninit::uninit(); 1];
    let seen = SockRef::from(connection.stream.tcp()).peek(&mut byte);
    matches!(seen, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}
