//! A client's HTTP/1.1 connection as its task and the body of the request of the moment share it.

use std::{
    cell::{Cell, RefCell},
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use http_body::{Frame, SizeHint};
#[cfg(target_os = "linux")]
use socket2::SockRef;
use tokio::io::AsyncWrite;
use tokio_util::io::poll_read_buf;

use crate::{
    http1::{BodyDecoder, Framing, Piece},
    net::{LANDING_BYTES, Stream},
    proxy::flow::Flow,
    runtime::Guard,
    wire::{self, BodyError},
};

/// What a read asks for at first.
pub(super) const FIRST_READ: usize = 8 * 1024;
/// What the first read of a large body asks for.
const LARGE_READ: usize = 128 * 1024;
/// What a read of a large body asks for at most.
const LARGEST_READ: usize = 512 * 1024;
/// What a client may send ahead of its answer.
const READ_AHEAD: usize = 64 * 1024;

/// A connection, shared by its task and the body of the request it carries; both run in the same task.
pub(super) struct Wire {
    /// The socket.
    pub stream: RefCell<Stream>,
    /// What was read and not taken yet.
    pub read: RefCell<BytesMut>,
    /// Ends waiting for a request.
    pub guard: Guard,
    /// The body of the request of the moment.
    pub decoder: RefCell<BodyDecoder>,
    /// The client waits for `100 Continue`.
    pub expects: Cell<bool>,
    /// That body cannot be carried to its end.
    pub broken: Cell<bool>,
    /// What the next read asks for.
    pub next_read: Cell<usize>,
    /// Bytes that it may have.
    pub limit: Cell<Option<u64>>,
    /// What moves of the exchange of the moment.
    pub flow: Rc<Flow>,
}

impl Wire {
    /// Reads as much as the last reads make likely.
    pub(super) fn poll_fill(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut read = self.read.borrow_mut();
        let mut stream = self.stream.borrow_mut();
        if self.next_read.get() <= LANDING_BYTES {
            let count = ready!(stream.poll_land(cx, &mut read))?;
            if count == LANDING_BYTES {
                self.next_read.set(LANDING_BYTES * 2);
            }
            return Poll::Ready(Ok(count));
        }
        read.reserve(self.next_read.get());
        let room = read.capacity() - read.len();
        let count = ready!(poll_read_buf(Pin::new(&mut *stream), cx, &mut *read))?;
        if count >= room {
            self.next_read.set((self.next_read.get() * 2).min(LARGEST_READ));
        }
        Poll::Ready(Ok(count))
    }

    /// Has the kernel acknowledge what came: a client that sends head and body in two writes and leaves Nagle's algorithm
    /// on (urllib3 does, towards a proxy) holds the second back until then, and the kernel would wait 40 ms.
    pub(super) fn acknowledge(&self) {
        #[cfg(target_os = "linux")]
        if let Err(error) = SockRef::from(self.stream.borrow().tcp()).set_tcp_quickack(true) {
            tracing::trace!(%error, "the kernel acknowledges when it likes");
        }
    }

    /// Tells the client that its body is welcome.
    fn poll_continue(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
        let mut stream = self.stream.borrow_mut();
        let mut stream = Pin::new(&mut *stream);
        let written = ready!(stream.as_mut().poll_write(cx, CONTINUE))?;
        self.expects.set(false);
        if written < CONTINUE.len() {
            // A client that cannot take 25 bytes before its body is not worth a state of its own.
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        stream.poll_flush(cx)
    }
}

/// The body of the request that a connection carries.
pub(super) struct Incoming(pub Rc<Wire>);

impl Incoming {
    fn fail(&self, error: BodyError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.0.broken.set(true);
        Poll::Ready(Some(Err(error)))
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let wire = &self.0;
        if wire.broken.get() {
            return Poll::Ready(Some(Err(BodyError::Incomplete)));
        }
        if wire.expects.get() && ready!(wire.poll_continue(cx)).is_err() {
            return self.fail(BodyError::Incomplete);
        }
        loop {
            let piece = wire.decoder.borrow_mut().next(&mut wire.read.borrow_mut());
            match piece {
                Ok(Piece::Data(data)) => {
                    wire.flow.receive(data.len());
                    let received = wire.flow.received();
                    if let Some(limit) = wire.limit.get().filter(|limit| received > *limit) {
                        return self.fail(BodyError::TooLarge { limit });
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Ok(Piece::Trailers(trailers)) => {
                    wire.flow.moved();
                    return Poll::Ready(wire::trailers(trailers).map(Ok));
                }
                Ok(Piece::End) => {
                    wire.flow.moved();
                    return Poll::Ready(None);
                }
                Ok(Piece::More) => {}
                Err(_framing) => return self.fail(BodyError::Framing),
            }
            match wire.poll_fill(cx) {
                Poll::Ready(Ok(0) | Err(_)) => return self.fail(BodyError::Incomplete),
                Poll::Ready(Ok(_)) => wire.flow.moved(),
                Poll::Pending if wire.flow.poll_stalled(cx).is_pending() => return Poll::Pending,
                Poll::Pending => return self.fail(BodyError::Stalled { limit: wire.flow.limit() }),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        !self.0.broken.get() && self.0.decoder.borrow().is_done()
    }

    fn size_hint(&self) -> SizeHint {
        match &*self.0.decoder.borrow() {
            BodyDecoder::Length(left) => SizeHint::with_exact(*left),
            BodyDecoder::Chunked(_) | BodyDecoder::UntilClose => SizeHint::default(),
        }
    }
}

impl Drop for Incoming {
    /// Whoever gave it up does not wait for it any more.
    fn drop(&mut self) {
        self.0.flow.moved();
    }
}

/// What the first read of a body asks for: all of it, within bounds.
pub(super) fn first_read(framing: Framing) -> usize {
    match framing {
        Framing::Length(length) => {
            usize::try_from(length).unwrap_or(usize::MAX).clamp(FIRST_READ, LARGE_READ)
        }
        Framing::None | Framing::Chunked | Framing::UntilClose => FIRST_READ * 2,
    }
}

/// Writes the buffer and then `frame`, and flushes.
pub(super) fn poll_write_all(
    stream: &mut Stream,
    write: &mut BytesMut,
    frame: &mut Bytes,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    let mut stream = Pin::new(stream);
    while write.has_remaining() || frame.has_remaining() {
        let written = match (write.is_empty(), frame.is_empty()) {
            (true, _) => ready!(stream.as_mut().poll_write(cx, frame))?,
            (_, true) => ready!(stream.as_mut().poll_write(cx, write))?,
            (false, false) => {
                let slices = [IoSlice::new(write), IoSlice::new(frame)];
                ready!(stream.as_mut().poll_write_vectored(cx, &slices))?
            }
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        let of_buffer = written.min(write.len());
        write.advance(of_buffer);
        frame.advance(written - of_buffer);
    }
    stream.poll_flush(cx)
}

/// Whether the client has closed the connection while its request is being answered. What it sends ahead is kept for
/// later, up to a bound.
pub(super) fn client_gone(wire: &Wire, cx: &mut Context<'_>) -> bool {
    if !wire.decoder.borrow().is_done() || wire.read.borrow().len() >= READ_AHEAD {
        return false;
    }
    // The socket is asked first: the buffer is still shared with the head that came in it, so that reading now would
    // mean another one.
    while let Poll::Ready(Ok(())) = { wire.stream.borrow().poll_readable(cx) } {
        match wire.poll_fill(cx) {
            Poll::Ready(Ok(0) | Err(_)) => return true,
            Poll::Ready(Ok(_)) if wire.read.borrow().len() < READ_AHEAD => {}
            Poll::Ready(Ok(_)) | Poll::Pending => return false,
        }
    }
    false
}
