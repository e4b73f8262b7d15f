//! One HTTP/1.1 exchange with an endpoint, driven by the task of the request it serves.
//!
//! There is no connection task, no channel and no second wake-up: the request's own task writes the head, pumps the
//! body and reads the answer. An answer may come before the request's body has been sent; the rest of the upload then
//! goes on while the answer's body is read.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderName, Method, StatusCode, header};
use http_body::{Body as _, Frame, SizeHint};
use tokio::{
    io::AsyncWrite,
    time::{Instant, Sleep},
};
use tokio_util::io::poll_read_buf;

use crate::{
    http1::{
        self, BodyDecoder, Framing, HeadError, HeadLimits, ParsedResponse, Piece, encode_headers,
        encode_request_line,
    },
    net::{LANDING_BYTES, Stream},
    runtime::Turn,
    upstream::{Awaited, Failure, Home, Outgoing, Progress, Received, SendError},
    wire::{self, Body, BodyError, Interim, Response},
};

static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// What one read asks for at first; a body that fills it asks for twice as much the next time.
const FIRST_READ: usize = 8 * 1024;
/// What the first read of a large body asks for.
const LARGE_READ: usize = 128 * 1024;
/// What one read asks for at most.
const LARGEST_READ: usize = 512 * 1024;
/// How long a request waits for `100 Continue` before it sends its body anyway (RFC 9110 §10.1.1).
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);

/// A connection to an endpoint that speaks HTTP/1.1.
pub struct H1 {
    pub(super) stream: Stream,
    pub(super) read: BytesMut,
    pub(super) write: BytesMut,
    pub(super) opened: Instant,
    pub(super) idle_since: Instant,
    /// How long the peer says it keeps an idle connection (`keep-alive: timeout=5`).
    pub(super) peer_idle: Option<Duration>,
}

impl H1 {
    /// A connection that has carried nothing yet.
    #[must_use]
    pub fn new(stream: Stream, now: Instant) -> Self {
        Self {
            stream,
            read: BytesMut::new(),
            write: BytesMut::new(),
            opened: now,
            idle_since: now,
            peer_idle: None,
        }
    }
}

/// How far the request's body has come.
enum Upload {
    /// Waits for `100 Continue`.
    Held { body: Body, chunked: bool, until: Pin<Box<Sleep>> },
    /// On its way; `frame` is what still has to be written of the last frame.
    Sending { body: Body, chunked: bool, frame: Bytes, ended: bool },
    /// All bytes are with the kernel.
    Done,
    /// It broke; the answer may still come.
    Failed,
}

struct Exchange {
    connection: Box<H1>,
    upload: Upload,
    /// Whom the upload waits for.
    awaited: Awaited,
    /// Bytes that the peer has taken.
    taken: u64,
    turn: Turn,
    next_read: usize,
    answered: bool,
}

impl Exchange {
    fn upload_done(&self) -> bool {
        matches!(self.upload, Upload::Done)
    }

    /// Writes what is there of the head and the body.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SendError>> {
        if let Upload::Held { body, chunked, until } = &mut self.upload {
            if until.as_mut().poll(cx).is_ready() {
                let (body, chunked) = (std::mem::take(body), *chunked);
                self.upload = Upload::Sending { body, chunked, frame: Bytes::new(), ended: false };
            } else {
                self.awaited = Awaited::Room;
                ready!(write_out(&mut self.connection, &mut Bytes::new(), &mut self.taken, cx))
                    .map_err(SendError::Io)?;
                self.awaited = Awaited::Body;
                return Poll::Pending;
            }
        }
        loop {
            let Upload::Sending { body, chunked, frame, ended } = &mut self.upload else {
                return Poll::Ready(Ok(()));
            };
            self.awaited = Awaited::Room;
            ready!(write_out(&mut self.connection, frame, &mut self.taken, cx))
                .map_err(SendError::Io)?;
            self.awaited = Awaited::Body;
            if *ended {
                self.upload = Upload::Done;
                return Poll::Ready(Ok(()));
            }
            let write = &mut self.connection.write;
            match ready!(Pin::new(body).poll_frame(cx)) {
                Some(Ok(next)) => match next.into_data() {
                    Ok(data) if *chunked => http1::encode_chunk(&data, write),
                    Ok(data) => *frame = data,
                    Err(trailers) => {
                        *ended = true;
                        if *chunked {
                            http1::encode_last_chunk(trailers.trailers_ref(), write);
                        }
                    }
                },
                None => {
                    *ended = true;
                    if *chunked {
                        http1::encode_last_chunk(None, write);
                    }
                }
                Some(Err(error)) => return Poll::Ready(Err(SendError::RequestBody(error))),
            }
        }
    }

    /// Reads until a response head is there, pumping the upload meanwhile.
    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        limits: HeadLimits,
        progress: &Progress,
    ) -> Poll<Result<ParsedResponse, SendError>> {
        ready!(self.turn.poll_give(cx));
        if !matches!(self.upload, Upload::Done | Upload::Failed) {
            match self.poll_upload(cx) {
                Poll::Ready(Err(error @ SendError::RequestBody(_))) => {
                    return Poll::Ready(Err(error));
                }
                // The peer may have answered before it stopped reading; look for that answer.
                Poll::Ready(Err(_write)) => self.upload = Upload::Failed,
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            match self.upload {
                Upload::Done | Upload::Failed => progress.set(Awaited::Answer, self.taken),
                Upload::Held { .. } | Upload::Sending { .. } => {
                    progress.set(self.awaited, self.taken);
                }
            }
        }
        loop {
            if let Some(head) = http1::parse_response(&mut self.connection.read, limits)
                .map_err(SendError::BadResponse)?
            {
                return Poll::Ready(Ok(head));
            }
            if ready!(self.poll_fill(cx)).map_err(SendError::Io)? == 0 {
                let error = if self.connection.read.is_empty() && !self.answered {
                    SendError::Closed
                } else {
                    SendError::BadResponse(HeadError::Grammar("a head that ends too early"))
                };
                return Poll::Ready(Err(error));
            }
            self.answered = true;
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let connection = &mut *self.connection;
        if self.next_read <= LANDING_BYTES {
            let count = ready!(connection.stream.poll_land(cx, &mut connection.read))?;
            if count == LANDING_BYTES {
                self.next_read = LANDING_BYTES * 2;
            }
            return Poll::Ready(Ok(count));
        }
        connection.read.reserve(self.next_read);
        let room = connection.read.capacity() - connection.read.len();
        let read =
            ready!(poll_read_buf(Pin::new(&mut connection.stream), cx, &mut connection.read))?;
        if read >= room {
            self.next_read = (self.next_read * 2).min(LARGEST_READ);
        }
        Poll::Ready(Ok(read))
    }

    /// Sends what is left of the body: the new protocol begins behind the request's end (RFC 9110 §7.8).
    async fn finish_upload(&mut self, progress: &Progress) -> Result<(), SendError> {
        self.proceed();
        poll_fn(|cx| {
            let done = self.poll_upload(cx);
            progress.set(self.awaited, self.taken);
            done
        })
        .await
    }

    /// Lets the body go that waits for `100 Continue`.
    fn proceed(&mut self) {
        if let Upload::Held { body, chunked, .. } = &mut self.upload {
            let (body, chunked) = (std::mem::take(body), *chunked);
            self.upload = Upload::Sending { body, chunked, frame: Bytes::new(), ended: false };
        }
    }
}

/// Writes the connection's buffer, then `frame`, then what TLS holds back; adds what was written to `taken`.
fn write_out(
    connection: &mut H1,
    frame: &mut Bytes,
    taken: &mut u64,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    let mut stream = Pin::new(&mut connection.stream);
    while connection.write.has_remaining() || frame.has_remaining() {
        let slices = [IoSlice::new(&connection.write), IoSlice::new(frame)];
        let written = match (connection.write.is_empty(), frame.is_empty()) {
            (true, _) => ready!(stream.as_mut().poll_write(cx, frame))?,
            (_, true) => ready!(stream.as_mut().poll_write(cx, &connection.write))?,
            (false, false) => ready!(stream.as_mut().poll_write_vectored(cx, &slices))?,
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        *taken += written as u64;
        let of_head = written.min(connection.write.len());
        connection.write.advance(of_head);
        frame.advance(written - of_head);
    }
    stream.poll_flush(cx)
}

/// Sends a request and waits for the head of its answer.
///
/// The caller bounds the time. Cancel-safe in the sense that dropping the future closes the connection; what the peer
/// has seen by then is unknown.
///
/// # Errors
/// [`Failure`], which says whether the peer can have seen the request.
pub(super) async fn send(
    connection: Box<H1>,
    home: Home,
    mut outgoing: Outgoing<'_>,
    interim: &Interim,
) -> Result<Received, Failure> {
    let limits = home.pool().head_limits();
    let progress = outgoing.progress;
    let mut exchange = begin(connection, &mut outgoing);
    loop {
        let head = match poll_fn(|cx| exchange.poll_head(cx, limits, progress)).await {
            Ok(head) => head,
            Err(error) => return Err(Failure { error, answered: exchange.answered }),
        };
        match head.status {
            StatusCode::SWITCHING_PROTOCOLS if outgoing.upgrade => {
                if let Err(error) = Box::pin(exchange.finish_upload(progress)).await {
                    return Err(Failure { error, answered: true });
                }
                return Ok(upgraded(exchange, head));
            }
            StatusCode::SWITCHING_PROTOCOLS => {
                let error =
                    SendError::BadResponse(HeadError::Grammar("an upgrade nobody asked for"));
                return Err(Failure { error, answered: true });
            }
            StatusCode::CONTINUE => exchange.proceed(),
            status if status.is_informational() => interim.put(status, head.fields),
            _ => return finish(exchange, home, outgoing.method, head),
        }
    }
}

/// Writes the head into the connection's buffer and settles how the body is framed.
fn begin(mut connection: Box<H1>, outgoing: &mut Outgoing<'_>) -> Exchange {
    let write = &mut connection.write;
    write.clear();
    encode_request_line(outgoing.method, outgoing.target.as_str(), write);
    encode_headers(outgoing.fields.iter(), write);
    let body = std::mem::take(&mut outgoing.body);
    let length = body.exact_len();
    let chunked = length.is_none();
    if chunked {
        write.put_slice(b"transfer-encoding: chunked\r\n");
    } else if let Some(length) = length.filter(|n| *n > 0)
        && !outgoing.fields.contains(&header::CONTENT_LENGTH)
    {
        write.put_slice(b"content-length: ");
        write.put_slice(itoa::Buffer::new().format(length).as_bytes());
        write.put_slice(b"\r\n");
    }
    write.put_slice(b"\r\n");
    let waits = !body.is_empty() && outgoing.fields.contains(&header::EXPECT);
    let upload = if waits {
        let until = Box::pin(tokio::time::sleep(CONTINUE_PATIENCE));
        Upload::Held { body, chunked, until }
    } else {
        let (frame, body, ended) = match body {
            Body::Empty => (Bytes::new(), Body::Empty, true),
            Body::Full(bytes) => (bytes, Body::Empty, true),
            stream @ Body::Stream(_) => (Bytes::new(), stream, false),
        };
        Upload::Sending { body, chunked, frame, ended }
    };
    Exchange {
        connection,
        upload,
        awaited: Awaited::Room,
        taken: 0,
        turn: Turn::default(),
        next_read: FIRST_READ,
        answered: false,
    }
}

fn upgraded(exchange: Exchange, head: ParsedResponse) -> Received {
    let response = Response { status: head.status, fields: head.fields, body: Body::Empty };
    let prefix = exchange.connection.read.freeze();
    Received::Upgraded(response, exchange.connection.stream.with_prefix(prefix))
}

/// Turns the head into a response whose body reads the rest.
fn finish(
    mut exchange: Exchange,
    home: Home,
    method: &Method,
    head: ParsedResponse,
) -> Result<Received, Failure> {
    let framing = http1::response_framing(method, head.version, head.status, &head.fields)
        .map_err(|error| Failure { error: SendError::BadResponse(error), answered: true })?;
    let mut reusable =
        framing != Framing::UntilClose && http1::keeps_alive(head.version, &head.fields);
    if let Some(value) = head.fields.get(&KEEP_ALIVE) {
        exchange.connection.peer_idle = peer_idle(value.as_bytes());
    }
    // A body that is held back or half sent makes the connection useless after this answer.
    let decoder = BodyDecoder::new(framing, home.pool().head_limits());
    let body = match decoder.remaining() {
        Some(0) => {
            reusable &= exchange.upload_done();
            release(exchange, &home, reusable);
            Body::Empty
        }
        Some(left) if exchange.upload_done() && left <= exchange.connection.read.len() as u64 => {
            let length = usize::try_from(left).unwrap_or(usize::MAX);
            let bytes = exchange.connection.read.split_to(length).freeze();
            release(exchange, &home, reusable);
            Body::Full(bytes)
        }
        _ => {
            let known = decoder
                .remaining()
                .map_or(FIRST_READ * 2, |left| usize::try_from(left).unwrap_or(usize::MAX));
            exchange.next_read = known.clamp(FIRST_READ, LARGE_READ);
            Body::stream(Incoming { exchange: Some(exchange), decoder, home, reusable })
        }
    };
    Ok(Received::Response(Response { status: head.status, fields: head.fields, body }))
}

/// Reads `timeout=N` out of a `keep-alive` header.
fn peer_idle(value: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok()?;
    let seconds = text.split(',').find_map(|part| part.trim().strip_prefix("timeout="))?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

fn release(exchange: Exchange, home: &Home, reusable: bool) {
    // Bytes after the answer belong to nobody: such a connection is not trusted again.
    if reusable && exchange.connection.read.is_empty() {
        home.pool().put(exchange.connection);
    }
}

/// The body of an answer that was not complete when its head was read.
struct Incoming {
    exchange: Option<Exchange>,
    decoder: BodyDecoder,
    home: Home,
    reusable: bool,
}

impl Incoming {
    fn end(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            let reusable = self.reusable && exchange.upload_done();
            release(exchange, &self.home, reusable);
        }
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        loop {
            let Some(exchange) = &mut this.exchange else { return Poll::Ready(None) };
            if !matches!(exchange.upload, Upload::Done | Upload::Failed) {
                match exchange.poll_upload(cx) {
                    // Who breaks off a request has no use for its answer, and the peer must not wait for the rest.
                    Poll::Ready(Err(SendError::RequestBody(error))) => {
                        this.exchange = None;
                        return Poll::Ready(Some(Err(error)));
                    }
                    Poll::Ready(Err(_write)) => exchange.upload = Upload::Failed,
                    Poll::Ready(Ok(())) | Poll::Pending => {}
                }
            }
            match this.decoder.next(&mut exchange.connection.read) {
                Ok(Piece::Data(data)) => {
                    if this.decoder.is_done() {
                        this.end();
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Ok(Piece::Trailers(trailers)) => {
                    this.end();
                    return Poll::Ready(wire::trailers(trailers).map(Ok));
                }
                Ok(Piece::End) => {
                    this.end();
                    return Poll::Ready(None);
                }
                Ok(Piece::More) => {}
                Err(_framing) => {
                    this.exchange = None;
                    return Poll::Ready(Some(Err(BodyError::Framing)));
                }
            }
            match ready!(exchange.poll_fill(cx)) {
                Ok(0) => {
                    let whole = matches!(this.decoder, BodyDecoder::UntilClose);
                    this.exchange = None;
                    return Poll::Ready((!whole).then_some(Err(BodyError::Incomplete)));
                }
                // A reset, or TLS without a close_notify (§9.8), is no end: what came before it may be half a body.
                Err(_broken) => {
                    this.exchange = None;
                    return Poll::Ready(Some(Err(BodyError::Incomplete)));
                }
                Ok(_) => {}
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.exchange.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.decoder {
            BodyDecoder::Length(left) => SizeHint::with_exact(*left),
            BodyDecoder::Chunked(_) | BodyDecoder::UntilClose => SizeHint::default(),
        }
    }
}
