//! Who is let in: how many connections a listener holds, in all and from one address, and how long a new one may keep
//! silent.
//!
//! A connection costs a descriptor before it has said anything, so whoever opens many and says nothing would take
//! them all. One above the number is closed at once: a client that is told so asks again or asks another, one that
//! waits in the kernel's queue knows nothing. The data plane has limits of its own, told in its settings.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

/// What an HTTP/2 client says first (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A listener that is full says so in the log this often, not once per connection.
const SAY: Duration = Duration::from_secs(30);

/// The places of one listener. Clones share them.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Places>);

#[derive(Debug)]
struct Places {
    all: usize,
    each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    from: HashMap<IpAddr, usize>,
    said: Option<Instant>,
}

impl Gate {
    /// Lets in `all` at a time, of them at most `each` from one address.
    #[must_use]
    pub fn new(all: usize, each: usize) -> Self {
        Self(Arc::new(Places { all, each, taken: Mutex::default() }))
    }

    /// A place for a connection from `peer`, held until it is dropped; `None` when there is none.
    #[must_use]
    pub fn enter(&self, peer: IpAddr) -> Option<Place> {
        let source = source(peer);
        let mut taken = self.0.lock();
        let from = taken.from.get(&source).copied().unwrap_or_default();
        if taken.all >= self.0.all || from >= self.0.each {
            let now = Instant::now();
            if taken.said.is_none_or(|said| now.saturating_duration_since(said) >= SAY) {
                taken.said = Some(now);
                let (open, limit) = (taken.all, self.0.all);
                tracing::warn!(%peer, from_there = from, open, limit, "connections are turned away: there are too many");
            }
            return None;
        }
        taken.all += 1;
        taken.from.insert(source, from + 1);
        Some(Place { places: Arc::clone(&self.0), source })
    }
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    source: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all = taken.all.saturating_sub(1);
        if let Some(from) = taken.from.get_mut(&self.source) {
            *from = from.saturating_sub(1);
            if *from == 0 {
                taken.from.remove(&self.source);
            }
        }
    }
}

/// What counts as one address: of IPv6 the /64 that one customer gets, else the address.
#[must_use]
pub fn source(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        address @ IpAddr::V4(_) => address,
    }
}

/// A stream whose peer must say within a time which HTTP it speaks; reading it fails with
/// [`TimedOut`](io::ErrorKind::TimedOut) otherwise. What comes later is the business of whoever reads it.
#[derive(Debug)]
pub struct Opening<S> {
    stream: S,
    awaited: Option<Awaited>,
}

#[derive(Debug)]
struct Awaited {
    deadline: Pin<Box<Sleep>>,
    /// Bytes so far, all of them those of [`PREFACE`].
    read: usize,
}

impl<S> Opening<S> {
    /// `stream` must begin within `limit` from now.
    pub fn new(stream: S, limit: Duration) -> Self {
        Self { stream, awaited: Some(Awaited { deadline: Box::pin(sleep(limit)), read: 0 }) }
    }

    /// After the first byte of anything but HTTP/2, and after the whole preface of that, it is clear what is spoken.
    fn heard(&mut self, bytes: &[u8]) {
        let Some(awaited) = &mut self.awaited else { return };
        let rest = PREFACE.get(awaited.read..).unwrap_or_default();
        awaited.read += bytes.len();
        if bytes.len() >= rest.len() || !rest.starts_with(bytes) {
            self.awaited = None;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Opening<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(cx, buf) {
            self.heard(buf.filled().get(before..).unwrap_or_default());
            return Poll::Ready(read);
        }
        let Some(awaited) = &mut self.awaited else { return Poll::Pending };
        ready!(awaited.deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Opening<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_address_takes_its_share_and_leaves_the_rest_to_others() {
        let gate = Gate::new(3, 2);
        let (first, _second) = (gate.enter(ip("192.0.2.1")), gate.enter(ip("192.0.2.1")));
        assert!(first.is_some() && gate.enter(ip("192.0.2.1")).is_none());
        let _other = gate.enter(ip("192.0.2.2")).unwrap();
        assert!(gate.enter(ip("192.0.2.3")).is_none(), "all are taken");
        drop(first);
        assert!(gate.enter(ip("::ffff:192.0.2.1")).is_some(), "a place was given back");
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one() {
        let gate = Gate::new(8, 1);
        let _held = gate.enter(ip("2001:db8::1")).unwrap();
        assert!(gate.enter(ip("2001:db8::2")).is_none());
        assert!(gate.enter(ip("2001:db8:0:1::1")).is_some());
        assert_eq!(gate.0.lock().from.len(), 1, "nothing is kept of those who left");
    }

    /// How long a peer that says `words` and then nothing is read from.
    async fn read_after(words: &[u8]) -> (Duration, io::Result<usize>) {
        let (mut client, server) = duplex(64);
        let mut opening = Opening::new(server, LIMIT);
        client.write_all(words).await.unwrap();
        let mut buf = [0; 64];
        let begun = Instant::now();
        for _ in words {
            opening.read_exact(&mut buf[..1]).await.unwrap();
        }
        let read = tokio::time::timeout(LIMIT * 2, opening.read(&mut buf)).await;
        (begun.elapsed(), read.unwrap_or(Ok(0)))
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_does_not_begin_is_given_up_at_the_limit() {
        for words in [&b""[..], b"P", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r"] {
            let (took, read) = read_after(words).await;
            assert_eq!(took, LIMIT, "{words:?}");
            assert_eq!(read.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_begun_is_waited_for() {
        for words in [&b"G"[..], b"POST", PREFACE] {
            let (took, read) = read_after(words).await;
            assert_eq!(took, LIMIT * 2, "{words:?}");
            assert_eq!(read.unwrap(), 0);
        }
    }
}
