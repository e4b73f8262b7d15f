//! Socket → TLS → HTTP connection; the connection limit; draining.

use std::{
    cell::RefCell, net::SocketAddr, pin::Pin, rc::Rc, sync::Arc, task::Poll, time::Duration,
};

use bytes::BytesMut;
use ipnet::IpNet;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::io::poll_read_buf;

use crate::{
    net::{self, Handover, Open, Placement, ServerTls, Spread, Stream, Tallied},
    proxy::{
        Listener,
        headers::Forwarded,
        live::Live,
        reject::Rejection,
        serve_h1, serve_h2,
        story::Story,
        worker::{Peer, Worker},
    },
    runtime::{self, Guard, InFlight, Phase, WorkerId},
};

/// What an HTTP/2 client says first (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Clients that one worker tells at the same time why they are turned away. Beyond that the door is shut without a word:
/// a crowd at the door must not cost what the limit was to save.
pub(super) const TOLD_AT_ONCE: usize = 64;

/// Of those who are turned away the log tells no more often.
const WARN_EVERY: Duration = Duration::from_secs(1);

/// One listener on one worker.
pub(super) struct Door {
    /// Tells it from the others; the same on every worker.
    pub id: usize,
    /// What it is for.
    pub listener: Listener,
    /// The address that the settings give it.
    pub address: SocketAddr,
    /// What it does with requests.
    pub story: Rc<Story>,
    /// Who is let in.
    pub terms: Live<Terms>,
}

/// Whom a listener lets in, and how.
#[derive(Default)]
pub(super) struct Terms {
    /// Its certificate; `None`: plaintext.
    pub tls: Option<Arc<ServerTls>>,
    /// Where connections may come from; empty: from anywhere.
    pub allow_from: Vec<IpNet>,
}

impl Terms {
    fn allows(&self, peer: SocketAddr) -> bool {
        let ip = peer.ip().to_canonical();
        self.allow_from.is_empty() || self.allow_from.iter().any(|net| net.contains(&ip))
    }
}

/// The listeners of one worker; some may open and close while it serves.
#[derive(Default)]
pub(super) struct Doors(RefCell<Vec<Rc<Door>>>);

impl Doors {
    /// Another one.
    pub(super) fn add(&self, door: Rc<Door>) {
        self.0.borrow_mut().push(door);
    }

    /// All of them.
    #[must_use]
    pub(super) fn all(&self) -> Vec<Rc<Door>> {
        self.0.borrow().clone()
    }

    /// One less.
    pub(super) fn remove(&self, id: usize) {
        let mut doors = self.0.borrow_mut();
        let at = doors.iter().position(|door| door.id == id);
        let gone = at.map(|at| doors.remove(at));
        // Dropped after the borrow.
        drop(doors);
        drop(gone);
    }

    fn find(&self, id: usize) -> Option<Rc<Door>> {
        self.0.borrow().iter().find(|door| door.id == id).cloned()
    }
}

/// Accepts connections of one listener until the proxy stops accepting.
pub(super) async fn listen(
    door: Rc<Door>,
    listener: TcpListener,
    worker: Rc<Worker>,
    me: WorkerId,
    spread: Spread<usize>,
) {
    loop {
        let (tcp, peer) = tokio::select! {
            accepted = net::accept(&listener) => accepted,
            () = door.story.end().wait(Phase::StopAccepting) => break,
        };
        welcome(&door, tcp, peer, &worker, me, &spread);
    }
    // Whoever is in the doorway believes to be connected: the kernel would reset them when the door is shut.
    for (tcp, peer) in net::accept_rest(listener) {
        welcome(&door, tcp, peer, &worker, me, &spread);
    }
}

/// Lets a connection in, or turns it away; one above this worker's even share goes to the worker with fewest.
fn welcome(
    door: &Rc<Door>,
    tcp: TcpStream,
    peer: SocketAddr,
    worker: &Rc<Worker>,
    me: WorkerId,
    spread: &Spread<usize>,
) {
    if !door.terms.now().allows(peer) {
        let why = Rejection::AddressNotAllowed("the client's address is not allowed");
        return turn_away(door, tcp, peer, why);
    }
    // Each way has its own count: whoever crowds the way in must not keep the application from calling out.
    if door.story.way().in_flight() >= worker.limits().connections {
        let why = Rejection::Overloaded("connections (`limits.connections`)");
        return turn_away(door, tcp, peer, why);
    }
    match spread.claim(me) {
        Placement::Keep(open) => admit(door, tcp, peer, open, worker),
        Placement::HandTo(open) => {
            let Ok(std) = tcp.into_std() else { return };
            if let Err(back) = spread.hand(std, peer, door.id, open) {
                let Handover { stream, peer, .. } = *back;
                if let Ok(tcp) = TcpStream::from_std(stream) {
                    admit(door, tcp, peer, spread.count(me), worker);
                }
            }
        }
    }
}

/// Takes over connections that other workers accepted.
pub(super) async fn take_over(
    doors: Rc<Doors>,
    mut handed: tokio::sync::mpsc::Receiver<Handover<usize>>,
    worker: Rc<Worker>,
) {
    while let Some(Handover { stream, peer, what, open }) = handed.recv().await {
        if let (Some(door), Ok(tcp)) = (doors.find(what), TcpStream::from_std(stream)) {
            admit(&door, tcp, peer, open, &worker);
        }
    }
}

/// Says why, where that needs no handshake and not too many are told already; counts it in any case.
fn turn_away(door: &Rc<Door>, tcp: TcpStream, peer: SocketAddr, why: Rejection) {
    let story = Rc::clone(&door.story);
    let worker = story.worker();
    let now = worker.watchdog.coarse_now();
    if worker.warned.get().is_none_or(|last| now.duration_since(last) >= WARN_EVERY) {
        worker.warned.set(Some(now));
        tracing::warn!(%peer, %why, "a connection was turned away");
    }
    let seat = Arc::clone(&worker.telling).try_acquire_owned();
    let (None, Ok(seat)) = (&door.terms.now().tls, seat) else {
        // Dropped, and thereby settled.
        let _unsaid = story.refuse(why, None, &story.flow());
        return;
    };
    let guard = story.worker().watchdog.register();
    let peer = Peer { server_name: None, forwarded: Forwarded::new(None, false) };
    let stream = Stream::plain(Tallied::new(tcp, None));
    runtime::spawn_local("turned-away", async move {
        serve_h1::Connection::new(stream, BytesMut::new(), guard, story, peer).refuse(why).await;
        drop(seat);
    });
}

fn admit(door: &Rc<Door>, tcp: TcpStream, peer: SocketAddr, open: Open, worker: &Rc<Worker>) {
    let door = Rc::clone(door);
    let guard = worker.watchdog.register();
    let work = door.story.end().work();
    runtime::spawn_local("connection", connection(door, tcp, peer, guard, (open, work)));
}

/// What counts a connection as open and as work.
type Counted = (Open, InFlight);

/// TLS if the listener has it, then whichever HTTP the client speaks.
async fn connection(
    door: Rc<Door>,
    tcp: TcpStream,
    address: SocketAddr,
    guard: Guard,
    counted: Counted,
) {
    let tallied = Tallied::new(tcp, None);
    let limit = door.story.worker().limits().header_timeout;
    let terms = door.terms.now();
    let mut stream = match &terms.tls {
        None => Stream::plain(tallied),
        Some(tls) => {
            let shake = TlsAcceptor::from(tls.current()).accept(tallied);
            match guard.limit(limit, Box::pin(shake)).await {
                Ok(Ok(stream)) => Stream::server(stream),
                Ok(Err(error)) => {
                    return tracing::debug!(%address, %error, "a TLS handshake failed");
                }
                Err(_expired) => return tracing::debug!(%address, "a TLS handshake took too long"),
            }
        }
    };
    let server_name = stream.server_name().map(Box::from);
    // The application itself is nobody to be named.
    let named = (!door.story.takes_connect()).then_some(address);
    let forwarded = Forwarded::new(named, stream.is_tls());
    let peer = Peer { server_name, forwarded };
    let story = Rc::clone(&door.story);
    drop((door, terms));
    match stream.alpn() {
        Some(b"h2") => Box::pin(serve_h2::serve(stream, guard, story, peer)).await,
        Some(_) => {
            serve_h1::Connection::new(stream, BytesMut::new(), guard, story, peer).serve().await
        }
        None => {
            let Some(read) = first_bytes(&mut stream, &guard, &story).await else { return };
            if read.starts_with(PREFACE) {
                let stream = stream.with_prefix(read.freeze());
                Box::pin(serve_h2::serve(stream, guard, story, peer)).await;
            } else {
                serve_h1::Connection::new(stream, read, guard, story, peer).serve().await;
            }
        }
    }
    drop(counted);
}

/// Reads until it is clear whether the client speaks HTTP/2 (prior knowledge, RFC 9113 §3.3); `None` when it left.
async fn first_bytes(stream: &mut Stream, guard: &Guard, story: &Rc<Story>) -> Option<BytesMut> {
    let limits = *story.worker().limits();
    let mut read = BytesMut::new();
    guard.arm(limits.first_request());
    loop {
        let undecided = read.len() < PREFACE.len() && PREFACE.starts_with(&read);
        if !read.is_empty() && !undecided {
            guard.disarm();
            return Some(read);
        }
        let count = std::future::poll_fn(|cx| {
            if read.is_empty() && !stream.is_tls() {
                // A connection on which nothing has been said holds no buffer.
                match stream.poll_readable(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
                    Poll::Pending => return waited(guard, story, cx),
                }
            }
            read.reserve(8 * 1024);
            match poll_read_buf(Pin::new(&mut *stream), cx, &mut read) {
                Poll::Ready(count) => Poll::Ready(Some(count)),
                Poll::Pending => {
                    if read.is_empty() {
                        read = BytesMut::new();
                    }
                    waited(guard, story, cx)
                }
            }
        })
        .await;
        match count {
            Some(Ok(0) | Err(_)) | None => return None,
            Some(Ok(_)) => guard.arm(limits.header_timeout),
        }
    }
}

/// Whether waiting makes no more sense.
fn waited<T>(guard: &Guard, story: &Story, cx: &std::task::Context<'_>) -> Poll<Option<T>> {
    if story.end().reached(Phase::Drain) {
        return Poll::Ready(None);
    }
    guard.poll_expired(cx).map(|()| None)
}
