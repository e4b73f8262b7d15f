//! HTTP/2 with a client: one task drives the connection, one per stream answers its request.
//!
//! Floods are bounded by what RFC 9113 §10.5 leaves to us: streams, header bytes, and how many streams a client may
//! reset before they were answered (rapid reset, CVE-2023-44487). What the `h2` crate lets through and HTTP/1.1 would
//! read in another way is refused here.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    server::{Builder, Connection, SendResponse},
};
use http::{HeaderMap, Method, StatusCode, Version, header, request::Parts};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Duration, Instant};

use crate::{
    http1::HeadLimits,
    net::Stream,
    proxy::{
        flow::Flow,
        headers,
        reject::{self, Rejection},
        settings::Limits,
        story::Story,
        worker::{Answer, Call, Peer},
    },
    runtime::{self, Guard, Phase},
    wire::{self, Body, BodyError, Fields, Interim, NextFrame, Prepended, Request, Response},
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
/// A stream that its client resets within this time and without an answer was given up (Envoy's
/// `premature_reset_min_stream_lifetime_seconds`).
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(1);
/// The connection is ended when half of its streams were given up, of so many at least (Envoy's
/// `premature_reset_total_stream_count`).
const STREAMS_JUDGED: u32 = 500;

/// Serves a connection until either side has had enough.
pub(super) async fn serve(stream: Stream, guard: Guard, story: Rc<Story>, peer: Peer) {
    let limits = *story.worker().limits();
    let Some(mut connection) = shake(stream, &guard, &limits).await else { return };
    let peer = Rc::new(peer);
    let streams = Rc::<Streams>::default();
    let mut leaving = false;
    guard.arm(limits.idle_timeout);
    loop {
        let next = poll_fn(|cx| {
            if let Poll::Ready(accepted) = connection.poll_accept(cx) {
                return Poll::Ready(Next::Stream(Box::new(accepted)));
            }
            if !leaving && streams.is_flood() {
                return Poll::Ready(Next::Flood);
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
                Some(Ok((request, respond))) => {
                    guard.arm(limits.idle_timeout);
                    let seat = Seat::take(&streams, story.worker().watchdog.coarse_now());
                    let (story, peer) = (Rc::clone(&story), Rc::clone(&peer));
                    // Written where it stays: what is moved on is then a pointer and not the room for a whole request.
                    let room = Box::new_uninit();
                    let stream = Box::write(room, async move {
                        answer(request, respond, &story, &peer, &seat).await;
                        drop(seat);
                    });
                    runtime::spawn_local("h2-stream", Box::into_pin(stream));
                }
                Some(Err(error)) => return tracing::debug!(%error, "an HTTP/2 connection ended"),
                None => return,
            },
            Next::Busy => guard.arm(limits.idle_timeout),
            Next::Flood => {
                tracing::warn!("a client that gives up most of what it asks for was shown out");
                leaving = true;
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                guard.arm(limits.header_timeout);
            }
            Next::Leave if leaving => return,
            Next::Leave => {
                leaving = true;
                connection.graceful_shutdown();
                guard.arm(limits.idle_timeout);
            }
        }
    }
}

/// Speaks the preface within the time for a head.
async fn shake(
    stream: Stream,
    guard: &Guard,
    limits: &Limits,
) -> Option<Connection<Stream, Bytes>> {
    // Twice what is allowed: what lies between is refused with a reason, which `h2` itself would not give.
    let header_bytes = u32::try_from(limits.head.bytes.saturating_mul(2)).unwrap_or(u32::MAX);
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
    /// The client opens streams to give them up.
    Flood,
}

/// The streams of a connection, counted.
#[derive(Default)]
struct Streams {
    open: Cell<usize>,
    ended: Cell<u32>,
    /// Those among them that the client reset at once.
    given_up: Cell<u32>,
}

impl Streams {
    fn is_flood(&self) -> bool {
        self.given_up.get() >= self.ended.get().max(STREAMS_JUDGED) / 2
    }
}

/// Counts one stream.
struct Seat {
    streams: Rc<Streams>,
    taken: Instant,
}

impl Seat {
    fn take(streams: &Rc<Streams>, now: Instant) -> Self {
        streams.open.set(streams.open.get() + 1);
        Self { streams: Rc::clone(streams), taken: now }
    }

    /// The client does not wait for the answer.
    fn given_up(&self, now: Instant) {
        if now.duration_since(self.taken) < GIVEN_UP_WITHIN {
            self.streams.given_up.set(self.streams.given_up.get().saturating_add(1));
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Streams { open, ended, .. } = &*self.streams;
        open.set(open.get().saturating_sub(1));
        ended.set(ended.get().saturating_add(1));
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
    // Whoever has reset the stream already costs the service nothing.
    if poll_fn(|cx| Poll::Ready(respond.poll_reset(cx))).await.is_ready() {
        return seat.given_up(story.worker().watchdog.coarse_now());
    }
    let flow = story.flow();
    let method = request.method().clone();
    let limits = story.worker().limits();
    let (mut parts, stream) = request.into_parts();
    let length = match check(&parts, &limits) {
        Ok(length) => length,
        Err(rejection) => {
            let refusal = story.refuse(rejection, Some(with_body(parts, Body::Empty)), &flow);
            return finish(refusal, &mut respond, &method, &flow).await;
        }
    };
    join_cookies(&mut parts.headers);
    let welcome = Rc::<Cell<Welcome>>::default();
    if headers::list(parts.headers.get_all(header::EXPECT).iter(), "100-continue") {
        welcome.set(Welcome::Awaited);
    }
    let incoming = Incoming {
        stream,
        flow: Rc::clone(&flow),
        welcome: Rc::clone(&welcome),
        limit: limits.body_bytes,
        length,
        trailers: false,
    };
    let body = gather(incoming).await;
    let interim = Interim::default();
    let request = Box::new(with_body(parts, body));
    let alarm = RefCell::default();
    let call = Call { request, peer, interim: &interim, alarm: &alarm, flow: &flow };
    let mut walk = pin!(story.answer(call));
    let walked = poll_fn(|cx| {
        let walked = walk.as_mut().poll(cx);
        if welcome.get() == Welcome::Due {
            welcome.set(Welcome::Said);
            say_early(&mut respond, StatusCode::CONTINUE, Fields::new());
        }
        for (status, mut fields) in interim.take() {
            headers::strip_hop_by_hop(&mut fields);
            say_early(&mut respond, status, fields);
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
        None => seat.given_up(story.worker().watchdog.coarse_now()),
    }
}

/// What is left to us of RFC 9113 §8: one path, one host, one length, and a head within the limits. The length, if it
/// is said.
fn check(parts: &Parts, limits: &Limits) -> Result<Option<u64>, Rejection> {
    let Parts { method, uri, headers, .. } = parts;
    if *method == Method::CONNECT {
        return Err(Rejection::BadRequest("CONNECT is for HTTP/1.1 on the outbound port"));
    }
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > limits.head.bytes || headers.len() > limits.head.headers {
        let HeadLimits { bytes, headers } = limits.head;
        return Err(Rejection::HeadersTooLarge { bytes, headers });
    }
    let path = uri.path();
    let whole_server = path == "*" && *method == Method::OPTIONS;
    if !path.starts_with('/') && !whole_server {
        return Err(Rejection::BadRequest("the path does not begin with a slash"));
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let agree = match (uri.authority(), hosts.next()) {
        (Some(_), None) => true,
        (Some(authority), Some(host)) => {
            authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes())
        }
        (None, host) => host.is_some(),
    };
    if !agree || hosts.next().is_some() {
        return Err(Rejection::BadRequest("a request has exactly one host"));
    }
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let length = lengths.next().and_then(|value| value.to_str().ok()?.parse().ok());
    if lengths.next().is_some() {
        return Err(Rejection::BadRequest("the length of the body is ambiguous"));
    }
    match (length, limits.body_bytes) {
        (Some(length), Some(limit)) if length > limit => Err(Rejection::BodyTooLarge { limit }),
        (length, _) => Ok(length),
    }
}

fn with_body(parts: Parts, body: Body) -> Request {
    let Parts { method, uri, headers, .. } = parts;
    Request { method, uri, version: Version::HTTP_2, fields: headers.into(), body }
}

/// Whether a client has been told that its body is welcome (`expect: 100-continue`).
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Welcome {
    /// It waits for it.
    Awaited,
    /// Somebody wants the body now.
    Due,
    /// It was told, or does not wait.
    #[default]
    Said,
}

fn say_early(respond: &mut SendResponse<Bytes>, status: StatusCode, fields: Fields) {
    if let Err(error) = respond.send_informational(head(status, fields)) {
        tracing::trace!(%error, "an interim response could not be sent");
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
    welcome: Rc<Cell<Welcome>>,
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
            let polled = self.stream.poll_data(cx);
            if self.welcome.get() == Welcome::Awaited {
                self.welcome.set(if polled.is_pending() { Welcome::Due } else { Welcome::Said });
            }
            match ready!(polled) {
                Some(Ok(data)) => {
                    let taken = self.took(&data);
                    return Poll::Ready(Some(taken.map(|()| Frame::data(data))));
                }
                Some(Err(_)) => return Poll::Ready(Some(Err(BodyError::Incomplete))),
                None => self.trailers = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(Some(trailers)) => Poll::Ready(wire::trailers(trailers).map(Ok)),
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

#[cfg(test)]
mod tests {
    use tokio::{io::duplex, time::timeout};

    use super::*;
    use crate::runtime::{TICK, Watchdog};

    const STALL: Duration = Duration::from_secs(300);

    type Ends = (
        h2::client::ResponseFuture,
        SendStream<Bytes>,
        http::Request<RecvStream>,
        SendResponse<Bytes>,
    );

    /// A request whose body does not end here, as both sides hold it.
    async fn open(request: http::request::Builder) -> Ends {
        let (near, far) = duplex(1024 * 1024);
        let shaken = tokio::join!(h2::client::handshake(near), h2::server::handshake(far));
        let ((mut send, connection), mut server) = (shaken.0.unwrap(), shaken.1.unwrap());
        runtime::spawn_local("client", async { connection.await.unwrap() });
        let (answer, body) = send.send_request(request.body(()).unwrap(), false).unwrap();
        let (request, respond) = server.accept().await.unwrap().unwrap();
        runtime::spawn_local("server", async move {
            while let Some(Ok(_more)) = server.accept().await {}
        });
        (answer, body, request, respond)
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn a_client_that_takes_nothing_does_not_hold_an_answer_for_ever() {
        let (answer, _body, _request, mut respond) = open(http::Request::get("http://data/")).await;
        let stream = respond.send_response(http::Response::new(()), false).unwrap();
        let mut held = answer.await.unwrap().into_body();
        let begun = Instant::now();
        // More than the window that every stream begins with.
        let flow = Flow::new(&Watchdog::new(), STALL);
        let sent = send_body(stream, Body::Full(vec![0; 200_000].into()), &flow).await;
        assert!(matches!(sent, Err(Broken::Client)));
        assert!((STALL..STALL + 4 * TICK).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        let end = loop {
            match held.data().await.unwrap() {
                Ok(_data) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(end.reason(), Some(Reason::CANCEL));
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn a_body_that_stalls_is_given_up_whether_its_length_was_said_or_not() {
        let watchdog = Watchdog::new();
        let post = || http::Request::post("http://data/");
        for (request, length) in [(post().header("content-length", 10), Some(10)), (post(), None)] {
            let (_answer, mut body, request, _respond) = open(request).await;
            body.send_data(Bytes::from_static(b"hello"), false).unwrap();
            let mut incoming = Incoming {
                stream: request.into_body(),
                flow: Flow::new(&watchdog, STALL),
                welcome: Rc::default(),
                limit: None,
                length,
                trailers: false,
            };
            let mut next = async || poll_fn(|cx| Pin::new(&mut incoming).poll_frame(cx)).await;
            assert_eq!(next().await.unwrap().unwrap().into_data().unwrap(), "hello");
            let begun = Instant::now();
            let stalled = timeout(10 * STALL, next()).await.ok();
            assert!(matches!(stalled, Some(Some(Err(BodyError::Stalled { .. })))));
            assert!((STALL..STALL + 4 * TICK).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        }
    }
}
