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
    Reason, RecvStream,
    server::{Builder, Connection, SendResponse},
};
use http::{HeaderMap, Method, StatusCode, Version, header, request::Parts};
use http_body::{Frame, SizeHint};
use tokio::time::{Duration, Instant, timeout};

use crate::{
    http1::{self, HeadLimits},
    net::Stream,
    proxy::{
        answer_h2::{Outlet, head},
        backlog::{Backlog, Piece},
        flow::Flow,
        headers,
        reject::Rejection,
        settings::Limits,
        story::Story,
        worker::{Answer, Call, Peer},
    },
    runtime::{self, Guard, Phase},
    wire::{self, Body, BodyError, Fields, Interim, Prepended, Request},
};

/// Window of one stream. 1 MiB carries 100 Mbit/s over a round trip of 80 ms.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// Window of a connection, over all its streams.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// What may wait to be written per stream; what may wait over all of them is [`Backlog`]'s to say.
const SEND_BUFFER: usize = 256 * 1024;
/// Streams that a client may reset before we have seen them, and streams that we reset for its errors, before the
/// connection is ended.
const RESETS: usize = 100;
/// How much is read of a body that was answered before its end, and for how long, before its stream is reset.
const LET_OUT: usize = 64 * 1024;
const LET_OUT_WITHIN: Duration = Duration::from_secs(1);
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
    guard.arm(limits.first_request());
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
                // Without streams there is nothing to wait for but that the client has heard.
                let idle = streams.open.get() == 0;
                guard.arm(if idle { limits.first_request() } else { limits.idle_timeout });
            }
        }
    }
}

/// Speaks the preface within the time for a head.
async fn shake(
    stream: Stream,
    guard: &Guard,
    limits: &Limits,
) -> Option<Connection<Stream, Piece>> {
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
        .handshake::<_, Piece>(stream);
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
type Opened = (http::Request<RecvStream>, SendResponse<Piece>);

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

/// The streams of a connection, counted, and what they have to write.
#[derive(Default)]
struct Streams {
    backlog: Rc<Backlog>,
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
    mut respond: SendResponse<Piece>,
    story: &Rc<Story>,
    peer: &Peer,
    seat: &Seat,
) {
    let flow = story.flow();
    // Whoever has reset the stream already costs the service nothing.
    if is_reset(&mut respond).await {
        story.missed(with_body(request.into_parts().0, Body::Empty), &flow);
        return seat.given_up(story.worker().watchdog.coarse_now());
    }
    let method = request.method().clone();
    let limits = story.worker().limits();
    let (mut parts, stream) = request.into_parts();
    let upload = Rc::<Upload>::default();
    let backlog = &seat.streams.backlog;
    let outlet = Outlet { flow: &flow, backlog, broken: &upload.broken };
    let length = match check(&parts, &limits) {
        Ok(length) => length,
        Err(rejection) => {
            let refusal = story.refuse(rejection, Some(with_body(parts, Body::Empty)), &flow);
            outlet.finish(refusal, &mut respond, &method).await;
            upload.leave(stream);
            return upload.let_out().await;
        }
    };
    join_cookies(&mut parts.headers);
    upload.expected(&parts.headers);
    let incoming = Incoming::new(stream, (&flow, &upload), (limits.body_bytes, length));
    let body = gather(incoming).await;
    let interim = Interim::default();
    let request = Box::new(with_body(parts, body));
    let alarm = RefCell::default();
    let call = Call { request, peer, interim: &interim, alarm: &alarm, flow: &flow };
    let mut walk = pin!(story.answer(call));
    let walked = poll_fn(|cx| {
        let walked = walk.as_mut().poll(cx);
        if upload.welcome.get() == Welcome::Due {
            upload.welcome.set(Welcome::Said);
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
    // A reset ends an upload first, and the walk with it.
    let missed = walked.is_none() || (upload.broken.get() && is_reset(&mut respond).await);
    match walked {
        Some(answer) if !missed => {
            outlet.finish(answer, &mut respond, &method).await;
            upload.let_out().await;
        }
        unwanted => {
            seat.given_up(story.worker().watchdog.coarse_now());
            if let Some(Answer::Response(_, record) | Answer::Tunnel(_, _, record)) = unwanted {
                record.missed();
            }
        }
    }
}

/// Whether the client has reset the stream.
async fn is_reset(respond: &mut SendResponse<Piece>) -> bool {
    poll_fn(|cx| Poll::Ready(respond.poll_reset(cx))).await.is_ready()
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
        // What the next hop reads as a header of HTTP/1.1 keeps to its grammar.
        (None, host) => host.is_some_and(|host| http1::is_host(host.as_bytes())),
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

/// What a request's body and whoever answers the request tell each other.
#[derive(Default)]
struct Upload {
    welcome: Cell<Welcome>,
    /// The body broke off.
    broken: Cell<bool>,
    /// What nobody has read of it.
    rest: Cell<Option<RecvStream>>,
}

impl Upload {
    /// Looks whether the client waits to be told that its body is welcome.
    fn expected(&self, headers: &HeaderMap) {
        if headers::list(headers.get_all(header::EXPECT).iter(), "100-continue") {
            self.welcome.set(Welcome::Awaited);
        }
    }

    /// Nobody reads any more of the body.
    fn leave(&self, stream: RecvStream) {
        if !stream.is_end_stream() {
            self.rest.set(Some(stream));
        }
    }

    /// Reads a little more of a body that was answered before its end. The reset that follows else (RFC 9113 §8.1)
    /// meets clients that are just sending, and some take it for a failure and the answer for lost.
    async fn let_out(&self) {
        let Some(mut rest) = self.rest.take() else { return };
        Box::pin(async move {
            let reading = async {
                let mut left = LET_OUT;
                while let Some(Ok(data)) = rest.data().await {
                    if rest.flow_control().release_capacity(data.len()).is_err() {
                        return;
                    }
                    let Some(less) = left.checked_sub(data.len()) else { return };
                    left = less;
                }
            };
            let _over = timeout(LET_OUT_WITHIN, reading).await;
        })
        .await;
    }
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

fn say_early(respond: &mut SendResponse<Piece>, status: StatusCode, fields: Fields) {
    if let Err(error) = respond.send_informational(head(status, fields)) {
        tracing::trace!(%error, "an interim response could not be sent");
    }
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
    /// Until this is dropped.
    stream: Option<RecvStream>,
    flow: Rc<Flow>,
    upload: Rc<Upload>,
    limit: Option<u64>,
    length: Option<u64>,
    trailers: bool,
}

impl Incoming {
    fn new(
        stream: RecvStream,
        (flow, upload): (&Rc<Flow>, &Rc<Upload>),
        (limit, length): (Option<u64>, Option<u64>),
    ) -> Self {
        let (flow, upload) = (Rc::clone(flow), Rc::clone(upload));
        Self { stream: Some(stream), flow, upload, limit, length, trailers: false }
    }

    fn has_ended(&self) -> bool {
        self.stream.as_ref().is_none_or(RecvStream::is_end_stream)
    }

    fn took(&mut self, data: &Bytes) -> Result<(), BodyError> {
        self.flow.receive(data.len());
        let received = self.flow.received();
        if let Some(limit) = self.limit.filter(|limit| received > *limit) {
            return Err(BodyError::TooLarge { limit });
        }
        let released =
            self.stream.as_mut().map(|stream| stream.flow_control().release_capacity(data.len()));
        released.transpose().map(drop).map_err(|_source| BodyError::Incomplete)
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(None) };
        if !self.trailers {
            let polled = stream.poll_data(cx);
            let welcome = &self.upload.welcome;
            if welcome.get() == Welcome::Awaited {
                welcome.set(if polled.is_pending() { Welcome::Due } else { Welcome::Said });
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
        let Some(stream) = &mut self.stream else { return Poll::Ready(None) };
        match ready!(stream.poll_trailers(cx)) {
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
        if let Some(stream) = self.stream.take() {
            self.upload.leave(stream);
        }
    }
}

/// A small request is usually here in full when its head is.
async fn gather(mut body: Incoming) -> Body {
    if body.has_ended() {
        return Body::Empty;
    }
    let first = poll_fn(|cx| {
        Poll::Ready(match &mut body.stream {
            Some(stream) => stream.poll_data(cx),
            None => Poll::Ready(None),
        })
    })
    .await;
    if let Poll::Ready(Some(Ok(data))) = first {
        return match body.took(&data) {
            Ok(()) if body.has_ended() => data.into(),
            Ok(()) => Body::stream(Prepended::new(Ok(data), body)),
            Err(error) => {
                body.upload.broken.set(true);
                Body::stream(Prepended::new(Err(error), body))
            }
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
                if matches!(frame, Some(Err(_))) {
                    this.upload.broken.set(true);
                }
                Poll::Ready(frame)
            }
            Poll::Pending => this.flow.poll_stalled(cx).map(|()| {
                this.upload.broken.set(true);
                Some(Err(BodyError::Stalled { limit: this.flow.limit() }))
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended()
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
    use h2::SendStream;
    use http_body::Body as _;
    use tokio::{io::duplex, time::timeout};

    use super::*;
    use crate::runtime::{TICK, Watchdog};

    const STALL: Duration = Duration::from_secs(300);

    /// A request whose body does not end here, as both sides hold it.
    async fn open(request: http::request::Builder) -> (SendStream<Bytes>, RecvStream) {
        let (near, far) = duplex(1024 * 1024);
        let shaken = tokio::join!(h2::client::handshake(near), h2::server::handshake(far));
        let ((mut send, connection), mut server) = (shaken.0.unwrap(), shaken.1.unwrap());
        runtime::spawn_local("client", async { connection.await.unwrap() });
        let (answer, body) = send.send_request(request.body(()).unwrap(), false).unwrap();
        let (request, respond) = server.accept().await.unwrap().unwrap();
        runtime::spawn_local("server", async move {
            while let Some(Ok(_more)) = server.accept().await {}
            drop((answer, respond));
        });
        (body, request.into_body())
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn a_body_that_stalls_is_given_up_whether_its_length_was_said_or_not() {
        let watchdog = Watchdog::new();
        let post = || http::Request::post("http://data/");
        for (request, length) in [(post().header("content-length", 10), Some(10)), (post(), None)] {
            let (mut body, stream) = open(request).await;
            body.send_data(Bytes::from_static(b"hello"), false).unwrap();
            let (flow, upload) = (Flow::new(&watchdog, STALL), Rc::default());
            let mut incoming = Incoming::new(stream, (&flow, &upload), (None, length));
            let mut next = async || poll_fn(|cx| Pin::new(&mut incoming).poll_frame(cx)).await;
            assert_eq!(next().await.unwrap().unwrap().into_data().unwrap(), "hello");
            let begun = Instant::now();
            let stalled = timeout(10 * STALL, next()).await.ok();
            assert!(matches!(stalled, Some(Some(Err(BodyError::Stalled { .. })))));
            assert!((STALL..STALL + 4 * TICK).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        }
    }
}
