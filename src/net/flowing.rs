//! Writes that get on, or end the connection.
//!
//! Whoever asks and never reads the answers fills the socket's buffer, and from then on everything behind it waits:
//! the connection, its place and what it holds in memory. Nothing in HTTP ends that, so the stream does. A socket is
//! writable again only once a good part of its buffer has been read, so reading a byte now and then does not help.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};

/// A stream that can be cut off.
pub trait Cut {
    /// Its end shall throw away what was written and nobody took.
    fn cut(&self);
}

impl Cut for TcpStream {
    fn cut(&self) {
        // Without this the system would keep the answers, megabytes of them, and offer them for minutes.
        if let Err(error) = self.set_zero_linger() {
            tracing::debug!(error = &error as &dyn std::error::Error, "a socket cannot be cut off");
        }
    }
}

/// A stream that fails with [`TimedOut`](io::ErrorKind::TimedOut) when what is written to it gets nowhere for a time.
/// It belongs directly around a socket, beneath TLS: what is buffered below it counts as written.
#[derive(Debug)]
pub struct Flowing<S> {
    stream: S,
    limit: Duration,
    /// Made at the first write that has to wait and used again: a write that goes through costs no timer.
    patience: Option<Pin<Box<Sleep>>>,
    /// Whether the last write had to wait.
    waits: bool,
}

impl<S: Cut> Flowing<S> {
    /// A write to `stream` may wait for `limit`.
    pub fn new(stream: S, limit: Duration) -> Self {
        Self { stream, limit, patience: None, waits: false }
    }

    /// What a write came to: as it is, or the end when it has waited too long.
    fn written(
        &mut self,
        outcome: Poll<io::Result<usize>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if outcome.is_ready() {
            self.waits = false;
            return outcome;
        }
        let limit = self.limit;
        let patience = self.patience.get_or_insert_with(|| Box::pin(sleep(limit)));
        if !self.waits {
            self.waits = true;
            patience.as_mut().reset(Instant::now() + limit);
        }
        ready!(patience.as_mut().poll(cx));
        self.stream.cut();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Flowing<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Cut + Unpin> AsyncWrite for Flowing<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(outcome, cx)
    }

    // A socket has nothing to flush and ends at once, which says nothing about what the peer reads.
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
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(outcome, cx)
    }
}

#[cfg(test)]
impl Cut for tokio::io::DuplexStream {
    fn cut(&self) {}
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_write_that_nobody_reads_ends_at_the_limit() {
        let (_client, server) = duplex(64);
        let mut stream = Flowing::new(server, LIMIT);
        let begun = Instant::now();
        let ended = stream.write_all(&[0; 100]).await.unwrap_err();
        assert_eq!((ended.kind(), begun.elapsed()), (io::ErrorKind::TimedOut, LIMIT));
    }

    #[tokio::test(start_paused = true)]
    async fn as_long_as_it_gets_on_it_may_take_its_time() {
        let (mut client, server) = duplex(64);
        let mut stream = Flowing::new(server, LIMIT);
        let begun = Instant::now();
        let reads = async {
            let mut piece = [0; 64];
            for _ in 0..10 {
                sleep(LIMIT - Duration::from_millis(1)).await;
                client.read_exact(&mut piece).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(stream.write_all(&[0; 640]), reads);
        written.unwrap();
        assert!(begun.elapsed() > LIMIT * 8);
        // Silence between two writes is nobody's fault.
        sleep(LIMIT * 3).await;
        stream.write_all(&[0; 64]).await.unwrap();
        let begun = Instant::now();
        assert!(stream.write_all(&[0; 64]).await.is_err());
        assert_eq!(begun.elapsed(), LIMIT, "the time runs from the write that waits");
    }
}
