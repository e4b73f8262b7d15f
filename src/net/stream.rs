//! One byte stream for every connection: plaintext or TLS, and every byte on the wire tallied.
//!
//! The tally stands below TLS, so handshakes and record headers count as the traffic they are.

use std::{
    cell::RefCell,
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{client, server};

/// Who wants to know how many bytes a connection moved.
pub trait Tally {
    /// So many bytes were handed to the network.
    fn sent(&self, bytes: usize);
    /// So many bytes came from the network.
    fn received(&self, bytes: usize);
}

/// A socket whose bytes are tallied.
pub struct Tallied {
    tcp: TcpStream,
    tally: Option<Rc<dyn Tally>>,
}

impl Tallied {
    /// A socket and who counts its bytes.
    #[must_use]
    pub fn new(tcp: TcpStream, tally: Option<Rc<dyn Tally>>) -> Self {
        Self { tcp, tally }
    }

    /// The socket itself.
    #[must_use]
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }
}

impl AsyncRead for Tallied {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.tcp).poll_read(cx, buf))?;
        if let Some(tally) = &self.tally {
            tally.received(buf.filled().len() - before);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tallied {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.tcp).poll_write(cx, buf))?;
        if let Some(tally) = &self.tally {
            tally.sent(written);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs))?;
        if let Some(tally) = &self.tally {
            tally.sent(written);
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

enum Kind {
    Plain(Tallied),
    Server(Box<server::TlsStream<Tallied>>),
    Client(Box<client::TlsStream<Tallied>>),
}

/// What [`Stream::poll_land`] brings at most.
pub const LANDING_BYTES: usize = 16 * 1024;

thread_local! {
    /// Where a thread's small reads land. One piece of memory that every connection of a worker uses in turn stays in the
    /// CPU's nearest cache, where a buffer per connection would be fetched anew for each request, and a connection that
    /// waits holds no buffer at all.
    static LANDING: RefCell<[u8; LANDING_BYTES]> = const { RefCell::new([0; LANDING_BYTES]) };
}

/// A connection, plaintext or TLS.
pub struct Stream {
    kind: Kind,
    /// Bytes that were read to find out the protocol, and are read again first.
    prefix: Bytes,
}

macro_rules! each {
    ($stream:expr, $inner:ident => $use:expr) => {
        match &mut $stream.kind {
            Kind::Plain($inner) => $use,
            Kind::Server($inner) => $use,
            Kind::Client($inner) => $use,
        }
    };
}

impl Stream {
    /// A plaintext connection.
    #[must_use]
    pub fn plain(tcp: Tallied) -> Self {
        Self { kind: Kind::Plain(tcp), prefix: Bytes::new() }
    }

    /// A connection that ended TLS here.
    #[must_use]
    pub fn server(tls: server::TlsStream<Tallied>) -> Self {
        Self { kind: Kind::Server(Box::new(tls)), prefix: Bytes::new() }
    }

    /// A connection that began TLS here.
    #[must_use]
    pub fn client(tls: client::TlsStream<Tallied>) -> Self {
        Self { kind: Kind::Client(Box::new(tls)), prefix: Bytes::new() }
    }

    /// Puts bytes back in front of what is still to be read.
    #[must_use]
    pub fn with_prefix(mut self, prefix: Bytes) -> Self {
        self.prefix = prefix;
        self
    }

    /// The socket below.
    #[must_use]
    pub fn tcp(&self) -> &TcpStream {
        match &self.kind {
            Kind::Plain(tcp) => tcp.tcp(),
            Kind::Server(tls) => tls.get_ref().0.tcp(),
            Kind::Client(tls) => tls.get_ref().0.tcp(),
        }
    }

    /// Whether TLS protects it.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        !matches!(self.kind, Kind::Plain(_))
    }

    /// The protocol that ALPN chose, if any.
    #[must_use]
    pub fn alpn(&self) -> Option<&[u8]> {
        match &self.kind {
            Kind::Plain(_) => None,
            Kind::Server(tls) => tls.get_ref().1.alpn_protocol(),
            Kind::Client(tls) => tls.get_ref().1.alpn_protocol(),
        }
    }

    /// The name that the client asked for in the TLS handshake (SNI).
    #[must_use]
    pub fn server_name(&self) -> Option<&str> {
        match &self.kind {
            Kind::Plain(_) | Kind::Client(_) => None,
            Kind::Server(tls) => tls.get_ref().1.server_name(),
        }
    }

    /// Who is on the other side.
    ///
    /// # Errors
    /// Those of `getpeername`, when the connection is gone.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        self.tcp().peer_addr()
    }

    /// Reads what is there, 16 KiB at most, and puts it behind what `into` holds; `into` grows by what came and no
    /// more. For heads and small bodies: large ones are better read where they will stay.
    ///
    /// # Errors
    /// Those of the connection; `Ok(0)` is its end.
    pub fn poll_land(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut BytesMut,
    ) -> Poll<io::Result<usize>> {
        LANDING.with_borrow_mut(|landing| {
            let mut landed = ReadBuf::new(landing);
            ready!(Pin::new(self).poll_read(cx, &mut landed))?;
            let landed = landed.filled();
            if into.is_empty() {
                *into = BytesMut::from(landed);
            } else {
                into.extend_from_slice(landed);
            }
            Poll::Ready(Ok(landed.len()))
        })
    }

    /// Waits until something can be read, or the peer has closed, without holding a buffer.
    ///
    /// True readiness of the socket; call it only when the last read said `Pending`, because TLS may hold plaintext
    /// that the socket does not know of.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() { self.tcp().poll_read_ready(cx) } else { Poll::Ready(Ok(())) }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("tls", &self.is_tls()).finish_non_exhaustive()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            let take = self.prefix.len().min(buf.remaining());
            buf.put_slice(self.prefix.get(..take).unwrap_or_default());
            self.prefix.advance(take);
            return Poll::Ready(Ok(()));
        }
        each!(self, inner => Pin::new(inner).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, inner => Pin::new(inner).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, inner => Pin::new(inner).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.kind {
            Kind::Plain(tcp) => tcp.is_write_vectored(),
            Kind::Server(tls) => tls.is_write_vectored(),
            Kind::Client(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => Pin::new(inner).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => Pin::new(inner).poll_shutdown(cx))
    }
}
