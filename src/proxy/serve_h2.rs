//! HTTP/2 with a client: one task drives the connection, one per stream answers its request.
//!
//! Floods are bounded by what RFC 9113 §10.5 leaves to us: streams, header bytes, and how many streams a client may
//! reset before they were answered (rapid reset, CVE-2023-44487).

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    server::{Builder, Connection, SendResponse},
};
use http::{HeaderMap, Method, StatusCode, Version, header};
use http_body::{Body as _, Frame, SizeHint};

use crate::{
    net::Stream,
    proxy::{
        flow::Flow,
        reject::{self, Rejection},
        settings::Limits,
        story::Story,
        worker::{Answer, Call, Peer},
    },
    runtime::{self, Guard, Phase},
    wire::{Body, BodyError, Fields, Interim, NextFrame, Prepended, Request, Response},
};

/// Window of one stream. 1 MiB carries 100 Mbit/s over a round trip of 80 ms.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// Window of a connection, over all its streams.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// What may wait to be written per stream.
const SEND_BUFFER: usize = 512 * 1024;
/// Streams that a client may reset before we have seen them, and streams that we reset for its errors, before the
/// connection is ended.
const RESETS: usize = 100;
/// A stream that its client resets within this time, and before an answer, was hardly meant (Envoy's value).
const PREMATURE: Duration = Duration::from_secs(1);
/// So many of those, if they are at least half of all, end the connection (Envoy's value).
const MOST_PREMATURE: usize = 500;
/// How long a connection that was told to go may take for its farewell.
const LINGER: Duration = Duration::from_secs(1);

/// Serves a connection until either side has had enough.
pub(super) async fn serve(stream: Stream, guard: Guard, story: Rc<Story>, peer: Peer) {
    let limits = *story.worker().limits();
    let Some(mut connection) = shake(stream, &guard, &limits).await else { return };
    let peer = Rc::new(peer);
    let streams = Rc::new(Streams::default());
    let mut leaving = false;
    guard.arm(limits.idle_timeout);
    loop {
        let next = poll_fn(|cx| {
            if let Poll::Ready(accepted) = connection.poll_accept(cx) {
                return Poll::Ready(Next::Stream(Box::new(accepted)));
            }
            if !leaving && story.end().reached(Phase::Drain) {
                return Poll::Ready(Next::Leave);
            }
            match guard.poll_expired(cx) {
                Poll::Ready(()) if streams.open.get() > 0 => Poll::Ready(Next::Busy),
                Poll::Ready(()) => Poll::Ready(Next::Leave),
                Poll::Pending => Poll::Pending,
            }
        })
        .await;
        match next {
            Next::Stream(accepted) => match *accepted {
                Some(Ok(_)) if streams.are_a_flood() => {
                    return send_away(connection, &guard).await;
                }
                Some(Ok((request, respond))) => {
                    guard.arm(limits.idle_timeout);
                    let seat = Seat::take(&streams);
                    let (story, peer) = (Rc::clone(&story), Rc::clone(&peer));
                    // Boxed here: what is moved on is then a pointer and not the room for a whole request.
                    runtime::spawn_local(
                        "h2-stream",
                        Box::pin(
                            async move { answer(request, respond, &story, &peer, &seat).await },
                        ),
                    );
                }
                Some(Err(error)) => return tracing::debug!(%error, "an HTTP/2 connection ended"),
                None => return,
            },
            Next::Busy => guard.arm(limits.idle_timeout),
            Next::Leave if leaving => return,
            Next::Leave => {
                leaving = true;
                connection.graceful_shutdown();
                guard.arm(limits.idle_timeout);
            }
        }
    }
}

/// Ends the connection of a client that floods us.
async fn send_away(mut connection: Connection<Stream, Bytes>, guard: &Guard) {
    tracing::warn!("a client that resets its requests at once was sent away");
    connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
    guard.arm(LINGER);
    poll_fn(|cx| match connection.poll_closed(cx) {
        Poll::Ready(_ended) => Poll::Ready(()),
        Poll::Pending => guard.poll_expired(cx),
    })
    .await;
}

/// Speaks the preface within the time for a head.
async fn shake(
    stream: Stream,
    guard: &Guard,
    limits: &Limits,
) -> Option<Connection<Stream, Bytes>> {
    let header_bytes = u32::try_from(limits.head.bytes).unwrap_or(u32::MAX);
    guard.arm(limits.header_timeout);
    let shake = Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(header_bytes)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(Some(RESETS))
        .handshake::<_, Bytes>(stream);
    tokio::select! {
        shaken = shake => match shaken {
            Ok(connection) => Some(connection),
            Err(error) => {
                tracing::debug!(%error, "an HTTP/2 connection did not begin");
                None
            }
        },
        () = guard.expired() => None,
    }
}

/// A request, and the way to answer it.
type Opened = (http::Request<RecvStream>, SendResponse<Bytes>);

/// What a connection has to attend to.
enum Next {
    Stream(Box<Option<Result<Opened, h2::Error>>>),
    /// Idle for too long, but for streams that are open.
    Busy,
    /// Idle for too long, or we are draining.
    Leave,
}

/// The streams of one connection.
#[derive(Default)]
struct Streams {
    open: Cell<usize>,
    /// All that there were.
    begun: Cell<usize>,
    /// Those that their client reset at once.
    premature: Cell<usize>,
}

impl Streams {
    /// Whether the client opens streams only to reset them (rapid reset).
    fn are_a_flood(&self) -> bool {
        let premature = self.premature.get();
        premature > MOST_PREMATURE && premature * 2 >= self.begun.get()
    }
}

/// Counts an open stream.
struct Seat(Rc<Streams>);

impl Seat {
    fn take(streams: &Rc<Streams>) -> Self {
        streams.open.set(streams.open.get() + 1);
        streams.begun.set(streams.begun.get() + 1);
        Self(Rc::clone(streams))
    }

    /// The client reset the stream before it was answered.
    fn reset_unanswered(&self, age: Duration) {
        if age < PREMATURE {
            self.0.premature.set(self.0.premature.get() + 1);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get().saturating_sub(1));
    }
}

/// Answers one request.
async fn answer(
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    story: &Rc<Story>,
    peer: &Peer,
    seat: &Seat,
) {
    let flow = story.flow();
    let begun = story.worker().watchdog.coarse_now();
    let method = request.method().clone();
    if method == Method::CONNECT {
        let why = Rejection::BadRequest("CONNECT is for HTTP/1.1 on the outbound port");
        return finish(story.refuse(&why, &flow), &mut respond, &method, &flow).await;
    }
    let limit = story.worker().limits().body_bytes;
    let (mut parts, stream) = request.into_parts();
    join_cookies(&mut parts.headers);
    let length = parts
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    if let (Some(length), Some(limit)) = (length, limit)
        && length > limit
    {
        let refusal = story.refuse(&Rejection::BodyTooLarge { limit }, &flow);
        return finish(refusal, &mut respond, &method, &flow).await;
    }
    let incoming = Incoming { stream, flow: Rc::clone(&flow), limit, length, trailers: false };
    let body = gather(incoming).await;
    let interim = Interim::default();
    let request = Request {
        method: parts.method,
        uri: parts.uri,
        version: Version::HTTP_2,
        fields: parts.headers.into(),
        body,
    };
    let alarm = RefCell::default();
    let call = Call { request, peer, interim: &interim, alarm: &alarm, flow: &flow };
    let mut walk = pin!(story.answer(call));
    let walked = poll_fn(|cx| {
        let walked = walk.as_mut().poll(cx);
        for (status, headers) in interim.take() {
            let early = head(status, headers);
            if let Err(error) = respond.send_informational(early) {
                tracing::trace!(%error, "an interim response could not be sent");
            }
        }
        match walked {
            Poll::Ready(answer) => Poll::Ready(Some(answer)),
            // Whoever resets the stream no longer waits for the answer.
            Poll::Pending => respond.poll_reset(cx).map(|_reason| None),
        }
    })
    .await;
    match walked {
        Some(answer) => finish(answer, &mut respond, &method, &flow).await,
        None => {
            seat.reset_unanswered(story.worker().watchdog.coarse_now().duration_since(begun));
        }
    }
}

/// Sends an answer and settles its record.
async fn finish(
    answer: Answer,
    respond: &mut SendResponse<Bytes>,
    method: &Method,
    flow: &Rc<Flow>,
) {
    let Answer::Response(response, record) = answer else {
        // Upgrades are asked for in HTTP/1.1 only, so no tunnel comes back here.
        return respond.send_reset(Reason::INTERNAL_ERROR);
    };
    let Response { status, mut fields, body } = response;
    if let (false, Some(length)) = (fields.contains(&header::CONTENT_LENGTH), body.exact_len())
        && length > 0
    {
        fields.append(header::CONTENT_LENGTH, length.into());
    }
    let ends = body.is_empty() || *method == Method::HEAD;
    let stream = match respond.send_response(head(status, fields), ends) {
        Ok(stream) => stream,
        Err(error) => return tracing::debug!(%error, "an answer could not be sent"),
    };
    let sent = if ends { Ok(()) } else { send_body(stream, body, flow).await };
    flow.moved();
    match sent {
        Ok(()) => record.settle(),
        Err(Broken::Client) => {}
        Err(Broken::Endpoint(code)) => record.broke(code),
    }
}

/// Who ended an answer before its end.
enum Broken {
    /// The client left, or took nothing for too long.
    Client,
    /// The endpoint broke off; our code for it.
    Endpoint(&'static str),
}

/// The head of an answer, as HTTP/2 sends it.
fn head(status: StatusCode, fields: Fields) -> http::Response<()> {
    let mut response = http::Response::new(());
    *response.status_mut() = status;
    *response.version_mut() = Version::HTTP_2;
    *response.headers_mut() = fields.into();
    response
}

/// Sends a body; a stream that cannot be finished is reset.
async fn send_body(
    mut stream: SendStream<Bytes>,
    mut body: Body,
    flow: &Rc<Flow>,
) -> Result<(), Broken> {
    let sent = send_frames(&mut stream, &mut body, flow).await;
    if let Err(broken) = &sent {
        // Either way the client must not take what it has for the whole.
        stream.send_reset(match broken {
            Broken::Client => Reason::CANCEL,
            Broken::Endpoint(_) => Reason::INTERNAL_ERROR,
        });
    }
    sent
}

async fn send_frames(
    stream: &mut SendStream<Bytes>,
    body: &mut Body,
    flow: &Rc<Flow>,
) -> Result<(), Broken> {
    loop {
        match poll_fn(|cx| poll_answer(stream, body, flow, cx)).await? {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    let last = body.is_empty();
                    send_data(stream, data, last, flow).await?;
                    if last {
                        return Ok(());
                    }
                }
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return stream.send_trailers(trailers).map_err(|_gone| Broken::Client);
                }
            },
            None => {
                return stream.send_data(Bytes::new(), true).map_err(|_gone| Broken::Client);
            }
            Some(Err(_broken)) => return Err(Broken::Endpoint(reject::UPSTREAM_RESET)),
        }
    }
}

/// Waits for the next piece of the answer's body.
fn poll_answer(
    stream: &mut SendStream<Bytes>,
    body: &mut Body,
    flow: &Flow,
    cx: &mut Context<'_>,
) -> Poll<Result<NextFrame, Broken>> {
    if let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) {
        return Poll::Ready(Ok(frame));
    }
    if stream.poll_reset(cx).is_ready() {
        return Poll::Ready(Err(Broken::Client));
    }
    flow.poll_stalled(cx).map(|()| Err(Broken::Endpoint(reject::DEADLINE)))
}

/// Sends one piece as the window allows.
async fn send_data(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    last: bool,
    flow: &Flow,
) -> Result<(), Broken> {
    // What fits is sent at once: small answers never wait.
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = if stream.capacity() >= data.len() {
            data.len()
        } else {
            poll_fn(|cx| match stream.poll_capacity(cx) {
                Poll::Ready(Some(Ok(room))) => Poll::Ready(Ok(room)),
                Poll::Ready(Some(Err(_)) | None) => Poll::Ready(Err(Broken::Client)),
                Poll::Pending => flow.poll_stalled(cx).map(|()| Err(Broken::Client)),
            })
            .await?
        };
        let piece = data.split_to(room.min(data.len()));
        let (bytes, ends) = (piece.len(), last && data.is_empty());
        stream.send_data(piece, ends).map_err(|_gone| Broken::Client)?;
        flow.send(bytes);
    }
    Ok(())
}

/// RFC 9113 §8.2.3: cookies that came in several lines are one header again for everybody else.
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let lines: Vec<&[u8]> =
        headers.get_all(header::COOKIE).iter().map(http::HeaderValue::as_bytes).collect();
    if let Ok(joined) = http::HeaderValue::from_bytes(&lines.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// The body of a request.
struct Incoming {
    stream: RecvStream,
    flow: Rc<Flow>,
    limit: Option<u64>,
    length: Option<u64>,
    trailers: bool,
}

impl Incoming {
    fn took(&mut self, data: &Bytes) -> Result<(), BodyError> {
        self.flow.receive(data.len());
        let received = self.flow.received();
        if let Some(limit) = self.limit.filter(|limit| received > *limit) {
            return Err(BodyError::TooLarge { limit });
        }
        let released = self.stream.flow_control().release_capacity(data.len());
        released.map_err(|_source| BodyError::Incomplete)
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.trailers {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    let taken = self.took(&data);
                    return Poll::Ready(Some(taken.map(|()| Frame::data(data))));
                }
                Some(Err(_)) => return Poll::Ready(Some(Err(BodyError::Incomplete))),
                None => self.trailers = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(Some(trailers)) => Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
            Ok(None) => Poll::Ready(None),
            Err(_) => Poll::Ready(Some(Err(BodyError::Incomplete))),
        }
    }
}

impl Drop for Incoming {
    /// Whoever gave it up does not wait for it any more.
    fn drop(&mut self) {
        self.flow.moved();
    }
}

/// A small request is usually here in full when its head is.
async fn gather(mut body: Incoming) -> Body {
    if body.stream.is_end_stream() {
        return Body::Empty;
    }
    let first = poll_fn(|cx| Poll::Ready(body.stream.poll_data(cx))).await;
    if let Poll::Ready(Some(Ok(data))) = first {
        return match body.took(&data) {
            Ok(()) if body.stream.is_end_stream() => data.into(),
            Ok(()) => Body::stream(Prepended::new(Ok(data), body)),
            Err(error) => Body::stream(Prepended::new(Err(error), body)),
        };
    }
    Body::stream(body)
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        match this.poll_next(cx) {
            Poll::Ready(frame) => {
                this.flow.moved();
                Poll::Ready(frame)
            }
            Poll::Pending => this
                .flow
                .poll_stalled(cx)
                .map(|()| Some(Err(BodyError::Stalled { limit: this.flow.limit() }))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // h2 holds the peer to its content-length.
        self.length.map_or_else(SizeHint::default, |length| {
            SizeHint::with_exact(length.saturating_sub(self.flow.received()))
        })
    }
}
