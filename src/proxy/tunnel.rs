//! Two streams that speak to each other: after `CONNECT`, and after an upgrade.
//!
//! A tunnel on which nothing moves holds no buffers, and ends when nothing has moved either way for the time that an
//! unused connection may stay.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio_util::io::poll_read_buf;

use crate::{
    net::{LANDING_BYTES, Stream},
    proxy::record::Record,
    runtime::{Guard, Phase, Shutdown},
};

/// What a read asks for once there is much to carry.
const LARGE_READ: usize = 64 * 1024;
/// How long a tunnel that is told to end may go on.
const LINGER: Duration = Duration::from_secs(1);

/// Copies both ways until both sides have ended, nothing has moved for too long, or the proxy must end; settles the
/// record.
pub(super) async fn join(
    mut near: Stream,
    mut far: Stream,
    record: Record,
    (guard, idle): (&Guard, Duration),
    shutdown: &Shutdown,
) {
    guard.arm(idle);
    let (mut up, mut down) = (Way::default(), Way::default());
    let flow = record.flow();
    let carried = poll_fn(|cx| {
        let there = up.poll(&mut near, &mut far, cx, |bytes| flow.receive(bytes));
        let back = down.poll(&mut far, &mut near, cx, |bytes| flow.send(bytes));
        if std::mem::take(&mut up.moved) | std::mem::take(&mut down.moved) {
            guard.arm(idle);
        }
        match (there, back) {
            (Poll::Ready(Err(broken)), _) | (_, Poll::Ready(Err(broken))) => {
                Poll::Ready(Err(broken))
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(Ok(())),
            (Poll::Pending, _) | (_, Poll::Pending) => {
                guard.poll_expired(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
            }
        }
    });
    let ended = tokio::select! {
        ended = carried => ended,
        () = shutdown.wait(Phase::Abort) => Err(io::ErrorKind::Interrupted.into()),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a tunnel ended before both of its sides");
    }
    record.settle();
    let close = async {
        let ends = tokio::join!(near.shutdown(), far.shutdown());
        if let (Err(error), _) | (_, Err(error)) = ends {
            tracing::trace!(%error, "a tunnel's end was gone already");
        }
    };
    if tokio::time::timeout(LINGER, close).await.is_err() {
        tracing::trace!("a tunnel's end did not say goodbye");
    }
}

/// One direction.
#[derive(Default)]
struct Way {
    /// What was read and not written yet.
    held: BytesMut,
    /// The last read brought all that it could.
    much: bool,
    ended: bool,
    closed: bool,
    moved: bool,
}

impl Way {
    /// Carries what there is; ready when the one side has ended and the other was told.
    fn poll(
        &mut self,
        from: &mut Stream,
        to: &mut Stream,
        cx: &mut Context<'_>,
        count: impl Fn(usize),
    ) -> Poll<io::Result<()>> {
        let mut to = Pin::new(to);
        while !self.closed {
            while self.held.has_remaining() {
                let written = ready!(to.as_mut().poll_write(cx, &self.held))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.held.advance(written);
                self.moved = true;
                count(written);
            }
            if self.ended {
                ready!(to.as_mut().poll_shutdown(cx))?;
                self.closed = true;
                break;
            }
            match self.poll_fill(from, cx) {
                Poll::Ready(read) => self.ended = read? == 0,
                Poll::Pending => {
                    self.held = BytesMut::new();
                    self.much = false;
                    ready!(to.poll_flush(cx))?;
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads what is there: little at first, so that a tunnel of short messages holds only those.
    fn poll_fill(&mut self, from: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if !self.much {
            let read = ready!(from.poll_land(cx, &mut self.held))?;
            self.much = read == LANDING_BYTES;
            return Poll::Ready(Ok(read));
        }
        self.held.reserve(LARGE_READ);
        poll_read_buf(Pin::new(from), cx, &mut self.held)
    }
}
