//! Names to addresses, addresses to connections.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, Shared},
    stream::FuturesUnordered,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::{Semaphore, oneshot},
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

use crate::{model::Host, runtime::Supervisor};

/// Silence after which the kernel asks whether the peer is still there, and how often it asks again.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Unacknowledged data for this long ends the connection (`TCP_USER_TIMEOUT`, RFC 5482); Linkerd's value.
const USER_TIMEOUT: Duration = Duration::from_secs(30);
/// Head start of one address over the next (RFC 8305 §5, "Connection Attempt Delay").
const STAGGER: Duration = Duration::from_millis(250);

/// How long an answer is used without asking again. getaddrinfo tells no TTL; five seconds follows a failover in DNS
/// without a look-up for each connection.
const FRESH: Duration = Duration::from_secs(5);
/// How long a failure is believed.
const FAILED: Duration = Duration::from_secs(1);
/// Longest look-up.
const LOOKUP_LIMIT: Duration = Duration::from_secs(10);
/// Most look-ups that the system is asked for at once. Whoever gives up waiting leaves its thread behind until the
/// system gives up too, and there are as many threads again for files.
const LOOKUPS: usize = 8;
/// How long a connection waits for a new look-up when there is an older answer to fall back on.
const PATIENCE: Duration = Duration::from_secs(1);
/// Names remembered. When full, those that are not being looked up are forgotten.
const NAMES: usize = 4096;

/// Connects to one address within `limit`: no delay for small packets, keep-alive after a minute, given up when
/// data stays unacknowledged for 30 s. Cancel-safe: a connection half made is dropped.
///
/// # Errors
/// What the system says; [`io::ErrorKind::TimedOut`] at the limit.
pub async fn connect(address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    timeout(limit, dial(address)).await.unwrap_or_else(|_elapsed| Err(timed_out()))
}

/// Connects to the first of `addresses` that answers, within `limit` in all. They are tried in order, families
/// alternating, each with a head start of 250 ms over the next (RFC 8305).
///
/// # Errors
/// The failure of the first address; [`io::ErrorKind::TimedOut`] at the limit; [`io::ErrorKind::NotFound`] when there
/// are none.
pub async fn connect_any(addresses: &[SocketAddr], limit: Duration) -> io::Result<TcpStream> {
    match addresses {
        [only] => connect(*only, limit).await,
        many => timeout(limit, race(alternate(many), dial))
            .await
            .unwrap_or_else(|_elapsed| Err(timed_out())),
    }
}

async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_nodelay(true)?;
    let options = SockRef::from(&socket);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
    options.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    options.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.connect(address).await
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no connection within the time allowed")
}

/// The same addresses, families taking turns; the first stays first.
fn alternate(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let Some(first) = addresses.first() else { return Vec::new() };
    let (lead, other): (Vec<_>, Vec<_>) =
        addresses.iter().copied().partition(|address| address.is_ipv4() == first.is_ipv4());
    let (mut lead, mut other) = (lead.into_iter(), other.into_iter());
    let mut order = Vec::with_capacity(addresses.len());
    while order.len() < addresses.len() {
        order.extend(lead.next());
        order.extend(other.next());
    }
    order
}

async fn race<D, F, T>(addresses: Vec<SocketAddr>, dial: D) -> io::Result<T>
where
    D: Fn(SocketAddr) -> F,
    F: Future<Output = io::Result<T>>,
{
    let mut waiting = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut first_failure = None;
    loop {
        match waiting.next() {
            Some(address) => attempts.push(dial(address)),
            None if attempts.is_empty() => {
                return Err(first_failure.unwrap_or_else(|| {
                    io::Error::new(io::ErrorKind::NotFound, "there is no address to connect to")
                }));
            }
            None => {}
        }
        tokio::select! {
            Some(outcome) = attempts.next() => match outcome {
                Ok(connection) => return Ok(connection),
                Err(failure) => _ = first_failure.get_or_insert(failure),
            },
            () = sleep(STAGGER), if !waiting.as_slice().is_empty() => {}
        }
    }
}

/// IP addresses of a name, in the order the system prefers.
pub type Addresses = Arc<[IpAddr]>;

/// Why a name has no address.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ResolveError {
    /// The system's resolver failed, and there is no earlier answer.
    #[error("{name} does not resolve")]
    Lookup {
        /// The name.
        name: Arc<str>,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The resolver gave no answer in time, and there is no earlier one.
    #[error("{name} was not resolved within {LOOKUP_LIMIT:?}")]
    Slow {
        /// The name.
        name: Arc<str>,
    },
    /// The runtime that asks is gone: the process is ending.
    #[error("names are no longer resolved")]
    Ended,
}

type Answer = Result<Addresses, ResolveError>;
type Lookup = Arc<dyn Fn(Arc<str>) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync>;

/// Resolves names, on the side runtime, for any thread. Answers are kept for 5 s, failures for 1 s; while a look-up
/// fails or is slow the last good answer goes on being used. One look-up serves all who ask meanwhile.
#[derive(Clone)]
pub struct Resolver(Arc<Inner>);

struct Inner {
    supervisor: Supervisor,
    lookup: Lookup,
    names: Mutex<HashMap<Arc<str>, Entry>>,
}

#[derive(Default)]
struct Entry {
    good: Option<(Addresses, Instant)>,
    failed: Option<(ResolveError, Instant)>,
    pending: Option<Shared<BoxFuture<'static, Answer>>>,
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").field("names", &lock(&self.0.names).len()).finish()
    }
}

impl Resolver {
    /// A resolver that asks the system, in tasks of `supervisor`.
    #[must_use]
    pub fn new(supervisor: Supervisor) -> Self {
        Self::asking(supervisor, |name| {
            let found = (name, 0).to_socket_addrs()?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }

    /// A resolver that asks `system`, which blocks.
    fn asking<S>(supervisor: Supervisor, system: S) -> Self
    where
        S: Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static,
    {
        let (system, places) = (Arc::new(system), Arc::new(Semaphore::new(LOOKUPS)));
        Self::with_lookup(supervisor, move |name| {
            let (system, places) = (Arc::clone(&system), Arc::clone(&places));
            Box::pin(async move {
                let place = places.acquire_owned().await.map_err(io::Error::other)?;
                let asking = spawn_blocking(move || {
                    // Held by the thread: whoever waits for it may have left.
                    let _place = place;
                    system(&name)
                });
                asking.await.map_err(io::Error::other)?
            })
        })
    }

    /// A resolver that asks `lookup`, in tasks of `supervisor`: for tests, and for names that are not in DNS.
    pub fn with_lookup<L>(supervisor: Supervisor, lookup: L) -> Self
    where
        L: Fn(Arc<str>) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync + 'static,
    {
        let names = Mutex::default();
        Self(Arc::new(Inner { supervisor, lookup: Arc::new(lookup), names }))
    }

    /// Where to connect for `host` and `port`; never empty. An address stands for itself, `localhost` and names
    /// below it for loopback (RFC 6761 §6.3). Cancel-safe.
    ///
    /// # Errors
    /// [`ResolveError`] when there is neither an answer nor an earlier one.
    pub async fn resolve(&self, host: &Host, port: u16) -> Result<Vec<SocketAddr>, ResolveError> {
        let addresses = match host {
            Host::Address(address) => return Ok(vec![SocketAddr::new(*address, port)]),
            Host::Name(_) if host.is_loopback() => {
                let both = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
                return Ok(both.map(|address| SocketAddr::new(address, port)).to_vec());
            }
            Host::Name(name) => self.name(name).await?,
        };
        Ok(addresses.iter().map(|address| SocketAddr::new(*address, port)).collect())
    }

    async fn name(&self, name: &Arc<str>) -> Answer {
        let (earlier, pending) = match self.known(name) {
            Known::Answer(answer) => return answer,
            Known::Pending { earlier, pending } => (earlier, pending),
        };
        let Some(earlier) = earlier else { return pending.await };
        match timeout(PATIENCE, pending).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) | Err(_) => Ok(earlier),
        }
    }

    fn known(&self, name: &Arc<str>) -> Known {
        let now = Instant::now();
        let mut names = lock(&self.0.names);
        if names.len() >= NAMES && !names.contains_key(name) {
            names.retain(|_, entry| entry.pending.is_some());
        }
        let entry = names.entry(Arc::clone(name)).or_default();
        let earlier = match &entry.good {
            Some((good, until)) if now < *until => return Known::Answer(Ok(Arc::clone(good))),
            Some((good, _)) => Some(Arc::clone(good)),
            None => None,
        };
        match &entry.failed {
            Some((failure, until)) if now < *until => {
                return Known::Answer(earlier.ok_or_else(|| failure.clone()));
            }
            _ => {}
        }
        let pending = entry.pending.get_or_insert_with(|| self.ask(Arc::clone(name))).clone();
        Known::Pending { earlier, pending }
    }

    /// Asks on the side runtime; the answer is remembered whether or not somebody still waits for it.
    fn ask(&self, name: Arc<str>) -> Shared<BoxFuture<'static, Answer>> {
        let inner = Arc::clone(&self.0);
        let (sender, receiver) = oneshot::channel();
        self.0.supervisor.spawn_until_end("look-up", async move {
            let outcome = timeout(LOOKUP_LIMIT, (inner.lookup)(Arc::clone(&name))).await;
            let answer = match outcome {
                Ok(Ok(found)) if !found.is_empty() => Ok(deduplicated(found)),
                Ok(found) => {
                    let nothing = || io::Error::new(io::ErrorKind::NotFound, "it has no address");
                    let source = Arc::new(found.err().unwrap_or_else(nothing));
                    Err(ResolveError::Lookup { name: Arc::clone(&name), source })
                }
                Err(_elapsed) => Err(ResolveError::Slow { name: Arc::clone(&name) }),
            };
            inner.remember(name, &answer);
            let _nobody_waits = sender.send(answer);
        });
        receiver.map(|outcome| outcome.unwrap_or(Err(ResolveError::Ended))).boxed().shared()
    }
}

enum Known {
    Answer(Answer),
    Pending { earlier: Option<Addresses>, pending: Shared<BoxFuture<'static, Answer>> },
}

impl Inner {
    fn remember(&self, name: Arc<str>, answer: &Answer) {
        let now = Instant::now();
        let mut names = lock(&self.names);
        let entry = names.entry(name).or_default();
        entry.pending = None;
        match answer {
            Ok(good) => {
                entry.good = Some((Arc::clone(good), now + FRESH));
                entry.failed = None;
            }
            Err(failure) => entry.failed = Some((failure.clone(), now + FAILED)),
        }
    }
}

fn deduplicated(found: Vec<IpAddr>) -> Addresses {
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(found.len());
    for address in found {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses.into()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;
    use tokio::{net::TcpListener, runtime::Handle, time::advance};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn v4(last: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, last))
    }

    fn here() -> Supervisor {
        Supervisor::new(Handle::current())
    }

    fn host(name: &str) -> Host {
        Host::Name(name.into())
    }

    /// Answers the n-th look-up with the n-th reply: None fails. Counts them.
    fn scripted(replies: &'static [Option<u8>]) -> (Resolver, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let resolver = Resolver::with_lookup(here(), move |_name| {
            let reply = replies[count.fetch_add(1, Ordering::SeqCst)];
            Box::pin(async move {
                sleep(Duration::from_millis(10)).await;
                reply.map(|last| vec![v4(last), v4(last)]).ok_or_else(|| io::Error::other("down"))
            })
        });
        (resolver, asked)
    }

    async fn last(resolver: &Resolver) -> Option<IpAddr> {
        resolver.resolve(&host("data.example"), 443).await.ok().map(|found| found[0].ip())
    }

    #[tokio::test]
    async fn a_connection_has_the_options_of_a_long_lived_one() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let stream = connect(listener.local_addr().unwrap(), LIMIT).await.unwrap();
        let options = SockRef::from(&stream);
        assert!(stream.nodelay().unwrap() && options.keepalive().unwrap());
        #[cfg(target_os = "linux")]
        {
            assert_eq!(options.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
            assert_eq!(options.tcp_user_timeout().unwrap(), Some(USER_TIMEOUT));
        }
    }

    #[tokio::test]
    async fn a_dead_address_is_passed_over_for_one_that_answers() {
        let dead = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let alive = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addresses = [dead.local_addr().unwrap(), alive.local_addr().unwrap()];
        drop(dead);
        let stream = connect_any(&addresses, LIMIT).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), addresses[1]);
        drop(alive);
        let refused = connect_any(&addresses, LIMIT).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect_any(&[], LIMIT).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_address_has_a_head_start_and_no_more() {
        let silent: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
        let prompt: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let began = Instant::now();
        let winner = race(vec![silent, prompt], |address| async move {
            if address == silent {
                std::future::pending::<()>().await;
            }
            Ok(address)
        });
        assert_eq!(winner.await.unwrap(), prompt);
        assert_eq!(began.elapsed(), STAGGER);
    }

    #[test]
    fn families_take_turns_and_the_preferred_one_stays_first() {
        let all = ["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1"].map(|text| text.parse().unwrap());
        let order: Vec<String> = alternate(&all).iter().map(ToString::to_string).collect();
        assert_eq!(order, ["[::1]:1", "1.1.1.1:1", "[::2]:1", "[::3]:1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_used_for_five_seconds_and_asked_for_once_by_many() {
        let (resolver, asked) = scripted(&[Some(1), Some(2)]);
        let answers = join_all((0..100).map(|_| last(&resolver))).await;
        assert!(answers.iter().all(|answer| *answer == Some(v4(1))));
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        advance(FRESH - Duration::from_millis(1)).await;
        assert_eq!(last(&resolver).await, Some(v4(1)));
        advance(Duration::from_millis(1)).await;
        assert_eq!(last(&resolver).await, Some(v4(2)));
        assert_eq!(resolver.resolve(&host("data.example"), 443).await.unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_good_answer_outlives_a_failing_resolver() {
        let (resolver, asked) = scripted(&[Some(1), None, Some(3)]);
        assert_eq!(last(&resolver).await, Some(v4(1)));
        advance(FRESH).await;
        assert_eq!(last(&resolver).await, Some(v4(1)));
        assert_eq!(last(&resolver).await, Some(v4(1)));
        assert_eq!(asked.load(Ordering::SeqCst), 2, "a failure is believed for a second");
        advance(FAILED).await;
        assert_eq!(last(&resolver).await, Some(v4(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_never_resolved_is_an_error_and_asked_again_after_a_second() {
        let (resolver, asked) = scripted(&[None, Some(2)]);
        assert_eq!(last(&resolver).await, None);
        assert_eq!(last(&resolver).await, None);
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        advance(FAILED).await;
        assert_eq!(last(&resolver).await, Some(v4(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_resolver_delays_nobody_who_has_an_earlier_answer_for_long() {
        let first = AtomicUsize::new(0);
        let resolver = Resolver::with_lookup(here(), move |_name| {
            let stalled = first.fetch_add(1, Ordering::SeqCst) > 0;
            Box::pin(async move {
                if stalled {
                    std::future::pending::<()>().await;
                }
                Ok(vec![v4(1)])
            })
        });
        assert_eq!(last(&resolver).await, Some(v4(1)));
        advance(FRESH).await;
        let began = Instant::now();
        assert_eq!(last(&resolver).await, Some(v4(1)));
        assert_eq!(began.elapsed(), PATIENCE);
        let fresh = resolver.resolve(&host("other.example"), 1).await;
        assert!(matches!(fresh, Err(ResolveError::Slow { .. })), "{fresh:?}");
    }

    #[test]
    fn names_whose_look_up_never_ends_hold_up_no_file() {
        let side = crate::runtime::Side::start().unwrap();
        side.block_on(async {
            let (release, held) = std::sync::mpsc::channel::<()>();
            let held = Mutex::new(held);
            let begun = tokio::sync::watch::Sender::new(0);
            let count = begun.clone();
            let resolver = Resolver::asking(Supervisor::new(side.handle()), move |_name| {
                count.send_modify(|count| *count += 1);
                // Ends with the test.
                let _ended = lock(&held).recv();
                Err(io::Error::other("dead"))
            });
            for number in 0..4 * LOOKUPS {
                drop(resolver.known(&format!("dead-{number}.example").into()));
            }
            let mut begun = begun.subscribe();
            begun.wait_for(|count| *count == LOOKUPS).await.unwrap();
            assert!(tokio::fs::metadata("/").await.unwrap().is_dir());
            assert_eq!(*begun.borrow(), LOOKUPS);
            drop(release);
        });
    }

    #[tokio::test]
    async fn addresses_and_localhost_need_no_look_up() {
        let (resolver, asked) = scripted(&[]);
        let address = resolver.resolve(&Host::Address(v4(9)), 80).await.unwrap();
        assert_eq!(address, [SocketAddr::new(v4(9), 80)]);
        let local = resolver.resolve(&host("data.localhost"), 80).await.unwrap();
        assert!(local.iter().all(|address| address.ip().is_loopback()));
        assert_eq!(asked.load(Ordering::SeqCst), 0);
    }
}
