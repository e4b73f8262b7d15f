//! HTTP/2 to an endpoint: many requests share a connection; each is driven by the task of the request it serves.
//!
//! Many requests also share its fate. A peer that says goodbye gets no further request; one that has fallen silent is
//! asked for a sign of life while requests wait for it, and a request that waited in vain takes the connection out of
//! use.

use std::{
    cell::Cell,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, RecvStream, SendStream,
    client::{Connection, ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request, Uri, Version, header::CONTENT_LENGTH, uri::Authority};
use http_body::{Body as _, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, MissedTickBehavior, interval_at},
};

use crate::{
    http1::HeadError,
    net::Stream,
    runtime,
    upstream::{Awaited, ConnectError, Failure, Outgoing, Progress, Received, SendError},
    wire::{self, Body, BodyError, Interim, Prepended, Response},
};

/// Window of one stream: 1 MiB carries 100 Mbit/s over 80 ms.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// Window of the connection, over all its streams.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// What may wait to be written per stream.
const SEND_BUFFER: usize = 512 * 1024;

/// How often a connection with open streams is looked at; also how long a peer may take for a sign of life.
const BEAT: Duration = Duration::from_secs(5);
/// A peer that answered one PING is asked again after so many beats without a word. Servers of gRPC hang up on whoever
/// asks more often than once in five minutes.
const PATIENT_BEATS: u32 = 61;

/// A connection to an endpoint that speaks HTTP/2.
pub struct H2 {
    send: SendRequest<Bytes>,
    pulse: Rc<Pulse>,
    pub(super) opened: Instant,
    pub(super) idle_since: Cell<Instant>,
}

/// What a connection's task and those who use it tell each other.
#[derive(Default)]
struct Pulse {
    /// Streams that are open.
    open: Cell<usize>,
    /// Streams that there were.
    begun: Cell<u64>,
    /// How often the peer was heard.
    heard: Cell<u64>,
    /// It takes no more streams.
    closed: Cell<bool>,
}

/// Counts a stream as long as it lives.
struct Seat(Rc<H2>);

impl Seat {
    fn take(connection: Rc<H2>) -> Self {
        let pulse = &connection.pulse;
        pulse.open.set(pulse.open.get() + 1);
        pulse.begun.set(pulse.begun.get() + 1);
        Self(connection)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let open = &self.0.pulse.open;
        open.set(open.get().saturating_sub(1));
        if open.get() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

/// Remembers how often a peer had been heard when a request began.
pub struct Witness {
    connection: Rc<H2>,
    heard: u64,
}

impl Witness {
    /// The request waited in vain: a connection on which nothing came meanwhile gets no further one.
    pub fn in_vain(&self) {
        if self.connection.pulse.heard.get() == self.heard {
            tracing::debug!("an HTTP/2 connection fell silent and is given up");
            self.connection.retire();
        }
    }
}

impl H2 {
    /// Speaks the preface and starts the task that drives the connection.
    ///
    /// # Errors
    /// [`ConnectError::Protocol`] when the peer does not speak HTTP/2.
    pub(super) async fn handshake(
        stream: Stream,
        header_bytes: u32,
    ) -> Result<Rc<Self>, ConnectError> {
        let pulse = Rc::<Pulse>::default();
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buffer_size(SEND_BUFFER)
            .max_header_list_size(header_bytes)
            .enable_push(false)
            .handshake::<_, Bytes>(Listened { stream, pulse: Rc::clone(&pulse) })
            .await
            .map_err(|_source| ConnectError::Protocol)?;
        runtime::spawn_local("h2-upstream", drive(connection, Rc::clone(&pulse)));
        let now = Instant::now();
        Ok(Rc::new(Self { send, pulse, opened: now, idle_since: Cell::new(now) }))
    }

    /// The way to open another stream, if it can take one right now. A peer that has said goodbye is found out here,
    /// before anything of a request is spent on it.
    pub(super) fn ready(&self) -> Option<SendRequest<Bytes>> {
        let full = self.pulse.open.get() >= self.send.current_max_send_streams();
        if full || self.is_closed() {
            return None;
        }
        let mut send = self.send.clone();
        match send.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => Some(send),
            // It waits for nothing: no stream of this clone is pending.
            Poll::Pending => None,
            Poll::Ready(Err(error)) => {
                tracing::debug!(%error, "an HTTP/2 connection takes no more streams");
                self.retire();
                None
            }
        }
    }

    /// Whether it takes no more streams.
    pub(super) fn is_closed(&self) -> bool {
        self.pulse.closed.get()
    }

    /// Whether no stream is open.
    pub(super) fn is_idle(&self) -> bool {
        self.pulse.open.get() == 0
    }

    /// Keeps it out of the choice; open streams end in peace.
    pub(super) fn retire(&self) {
        self.pulse.closed.set(true);
    }

    /// Sees whether the peer is heard from now on.
    pub(super) fn witness(self: &Rc<Self>) -> Witness {
        Witness { connection: Rc::clone(self), heard: self.pulse.heard.get() }
    }
}

/// Drives a connection until it ends or its peer gives no sign of life; streams that are open then end with it.
async fn drive(mut connection: Connection<Listened, Bytes>, pulse: Rc<Pulse>) {
    let mut pings = connection.ping_pong();
    let mut beats = interval_at(Instant::now() + BEAT, BEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watch = Watch::default();
    poll_fn(|cx| {
        if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
            if let Err(error) = ended {
                tracing::debug!(%error, "an HTTP/2 connection to an endpoint ended");
            }
            return Poll::Ready(());
        }
        while beats.poll_tick(cx).is_ready() {
            match watch.beat(&pulse) {
                Beat::Well => {}
                Beat::Ask => ask(pings.as_mut(), cx),
                Beat::Dead => {
                    tracing::debug!("an HTTP/2 connection gave no sign of life and is ended");
                    return Poll::Ready(());
                }
            }
        }
        Poll::Pending
    })
    .await;
    pulse.closed.set(true);
}

/// Asks for a sign of life.
fn ask(pings: Option<&mut PingPong>, cx: &mut Context<'_>) {
    let Some(pings) = pings else { return };
    // Takes the answer to the last one off, without which there cannot be another.
    if let Poll::Ready(Err(error)) = pings.poll_pong(cx) {
        tracing::trace!(%error, "no more pings");
    }
    if let Err(error) = pings.send_ping(Ping::opaque()) {
        tracing::trace!(%error, "a ping could not be sent");
    }
}

/// Watches whether a peer lives.
#[derive(Default)]
struct Watch {
    heard: u64,
    begun: u64,
    /// Beats since a request began or the peer spoke of itself.
    quiet: u32,
    /// A PING is on its way.
    asked: bool,
}

/// What a look at a connection comes to.
#[derive(Debug, PartialEq, Eq)]
enum Beat {
    Well,
    /// It has been silent.
    Ask,
    /// It was asked, and stayed silent.
    Dead,
}

impl Watch {
    fn beat(&mut self, pulse: &Pulse) -> Beat {
        let (heard, begun) = (pulse.heard.get(), pulse.begun.get());
        let spoke = std::mem::replace(&mut self.heard, heard) != heard;
        let news = std::mem::replace(&mut self.begun, begun) != begun;
        if pulse.open.get() == 0 {
            (self.quiet, self.asked) = (0, false);
            return Beat::Well;
        }
        if self.asked && !spoke {
            return Beat::Dead;
        }
        // What it says when asked is a sign of life and no more.
        let itself = spoke && !std::mem::take(&mut self.asked);
        if itself || news {
            self.quiet = 0;
            return Beat::Well;
        }
        self.quiet = self.quiet.saturating_add(1);
        if self.quiet % PATIENT_BEATS != 1 {
            return Beat::Well;
        }
        self.asked = true;
        Beat::Ask
    }
}

/// A stream whose every read is counted.
struct Listened {
    stream: Stream,
    pulse: Rc<Pulse>,
}

impl AsyncRead for Listened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.pulse.heard.set(self.pulse.heard.get() + 1);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Listened {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn classify(error: &h2::Error) -> SendError {
    let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
    // A GOAWAY without an error names the last stream it will serve; ours came later and was not touched.
    let gone =
        error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
    if gone {
        return SendError::Gone;
    }
    if refused {
        return SendError::Refused;
    }
    if error.is_io() { SendError::Closed } else { SendError::Reset }
}

/// The request's body on its way.
struct Upload {
    body: Body,
    stream: SendStream<Bytes>,
    /// A frame that waits for window.
    waiting: Bytes,
    done: bool,
    /// Whom it waits for.
    awaited: Awaited,
    /// Bytes that the peer has room for.
    taken: u64,
}

impl Upload {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SendError>> {
        while !self.done {
            if !self.waiting.is_empty() {
                self.stream.reserve_capacity(self.waiting.len());
                self.awaited = Awaited::Room;
                let room = match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(room)) => room,
                    Some(Err(error)) => return Poll::Ready(Err(classify(&error))),
                    None => return Poll::Ready(Err(SendError::Reset)),
                };
                let piece = self.waiting.split_to(room.min(self.waiting.len()));
                self.taken += piece.len() as u64;
                let last = self.waiting.is_empty() && self.body.is_empty();
                self.stream.send_data(piece, last).map_err(|error| classify(&error))?;
                self.done = last;
                continue;
            }
            self.awaited = Awaited::Body;
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.waiting = data,
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        self.stream.send_trailers(trailers).map_err(|error| classify(&error))?;
                        self.done = true;
                    }
                },
                None => {
                    self.stream.send_data(Bytes::new(), true).map_err(|error| classify(&error))?;
                    self.done = true;
                }
                Some(Err(error)) => {
                    self.stream.send_reset(h2::Reason::CANCEL);
                    return Poll::Ready(Err(SendError::RequestBody(error)));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

struct Exchange {
    answer: ResponseFuture,
    upload: Option<Upload>,
}

impl Exchange {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        interim: &Interim,
        progress: &Progress,
    ) -> Poll<Result<http::Response<RecvStream>, SendError>> {
        if let Some(upload) = &mut self.upload {
            match upload.poll(cx) {
                Poll::Ready(Err(error @ SendError::RequestBody(_))) => {
                    return Poll::Ready(Err(error));
                }
                Poll::Ready(Ok(()) | Err(_)) => {
                    progress.set(Awaited::Answer, upload.taken);
                    self.upload = None;
                }
                Poll::Pending => progress.set(upload.awaited, upload.taken),
            }
        }
        while let Poll::Ready(Some(Ok(early))) = self.answer.poll_informational(cx) {
            let (parts, ()) = early.into_parts();
            interim.put(parts.status, parts.headers.into());
        }
        let response = ready!(Pin::new(&mut self.answer).poll(cx));
        Poll::Ready(response.map_err(|error| classify(&error)))
    }
}

/// Sends a request and waits for the head of its answer; the caller bounds the time.
///
/// # Errors
/// [`Failure`], which says whether the peer can have seen the request.
pub(super) async fn send(
    connection: Rc<H2>,
    mut send: SendRequest<Bytes>,
    mut outgoing: Outgoing<'_>,
    interim: &Interim,
) -> Result<Received, Failure> {
    let unseen = |error| Failure { error, answered: false };
    let seat = Seat::take(Rc::clone(&connection));
    let request = head(&mut outgoing).ok_or_else(|| unseen(SendError::BadRequest))?;
    let body = std::mem::take(&mut outgoing.body);
    let (answer, stream) = send.send_request(request, body.is_empty()).map_err(|error| {
        connection.retire();
        // It closed before the request was on its way: nobody has seen it.
        let error = classify(&error);
        unseen(if matches!(error, SendError::Closed) { SendError::Gone } else { error })
    })?;
    let upload = (!body.is_empty()).then_some(Upload {
        body,
        stream,
        waiting: Bytes::new(),
        done: false,
        awaited: Awaited::Body,
        taken: 0,
    });
    let mut exchange = Exchange { answer, upload };
    let progress = outgoing.progress;
    let answered = poll_fn(|cx| exchange.poll(cx, interim, progress)).await;
    let response = answered.map_err(|error| {
        if matches!(error, SendError::Gone) {
            connection.retire();
        }
        unseen(error)
    })?;
    let (mut parts, stream) = response.into_parts();
    // Two lines of one name are rare, and that is known without looking for one.
    if parts.headers.len() > parts.headers.keys_len() {
        one_length(&mut parts.headers).map_err(|error| Failure { error, answered: true })?;
    }
    let upload = exchange.upload.take();
    let body = Incoming { stream, upload, trailers: false, seat };
    let body = gather(body).await;
    Ok(Received::Response(Response { status: parts.status, fields: parts.headers.into(), body }))
}

/// Leaves one `content-length` of several that say the same (RFC 9110 §8.6); `h2` holds the peer to the first.
fn one_length(headers: &mut HeaderMap) -> Result<(), SendError> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let first = lengths.next().cloned();
    match (first, lengths.next()) {
        (Some(first), Some(second)) => {
            if *second != first || lengths.any(|other| *other != first) {
                return Err(SendError::BadResponse(HeadError::Length));
            }
            headers.insert(CONTENT_LENGTH, first);
            Ok(())
        }
        (_, None) | (None, _) => Ok(()),
    }
}

/// The request line and headers as HTTP/2 sends them.
fn head(outgoing: &mut Outgoing<'_>) -> Option<Request<()>> {
    let mut request = Request::new(());
    *request.method_mut() = outgoing.method.clone();
    *request.version_mut() = Version::HTTP_2;
    let mut target = http::uri::Parts::default();
    target.scheme = Some(outgoing.scheme.clone());
    target.authority = Some(authority(outgoing));
    // As in HTTP/1.1: an absolute target may have come without a path (RFC 9113 §8.3.1).
    target.path_and_query = Some(match outgoing.target.as_str() {
        query if query.starts_with('?') => format!("/{query}").parse().ok()?,
        _ => outgoing.target.clone(),
    });
    *request.uri_mut() = Uri::from_parts(target).ok()?;
    *request.headers_mut() = outgoing.fields.to_map(&http::header::HOST);
    Some(request)
}

/// The host that the headers ask for; where they leave it to the endpoint, that is the endpoint's own.
fn authority(outgoing: &Outgoing<'_>) -> Authority {
    let host = outgoing.fields.get(&http::header::HOST).map(http::HeaderValue::as_bytes);
    let other = host.filter(|host| *host != outgoing.authority.as_str().as_bytes());
    let other = other.and_then(|host| Authority::try_from(host).ok());
    other.unwrap_or_else(|| outgoing.authority.clone())
}

/// A small answer is usually here in full when its head is: then no stream is needed.
async fn gather(mut body: Incoming) -> Body {
    if body.stream.is_end_stream() {
        return Body::Empty;
    }
    if body.upload.is_some() {
        return Body::stream(body);
    }
    let first = poll_fn(|cx| Poll::Ready(body.stream.poll_data(cx))).await;
    match first {
        Poll::Ready(Some(Ok(data))) => {
            let released = body.stream.flow_control().release_capacity(data.len());
            if body.stream.is_end_stream() && released.is_ok() {
                return data.into();
            }
            Body::stream(Prepended::new(Ok(data), body))
        }
        Poll::Ready(Some(Err(_)) | None) | Poll::Pending => Body::stream(body),
    }
}

/// The body of an answer.
struct Incoming {
    stream: RecvStream,
    upload: Option<Upload>,
    trailers: bool,
    #[expect(
        dead_code,
        reason = "held for its Drop: the stream counts as open until the body ends"
    )]
    seat: Seat,
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(upload) = &mut this.upload
            && let Poll::Ready(ended) = upload.poll(cx)
        {
            this.upload = None;
            // Who breaks off a request has no use for its answer; the peer has been told.
            if let Err(SendError::RequestBody(error)) = ended {
                return Poll::Ready(Some(Err(error)));
            }
        }
        if !this.trailers {
            match ready!(this.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    let released = this.stream.flow_control().release_capacity(data.len());
                    if released.is_err() {
                        return Poll::Ready(Some(Err(BodyError::Incomplete)));
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(_)) => return Poll::Ready(Some(Err(BodyError::Incomplete))),
                None => this.trailers = true,
            }
        }
        match ready!(this.stream.poll_trailers(cx)) {
            Ok(Some(trailers)) => Poll::Ready(wire::trailers(trailers).map(Ok)),
            Ok(None) => Poll::Ready(None),
            Err(_) => Poll::Ready(Some(Err(BodyError::Incomplete))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use http::{HeaderValue, Method, header, uri::PathAndQuery, uri::Scheme};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::{net::Tallied, wire::Fields};

    #[test]
    fn the_host_that_was_asked_for_is_the_authority() {
        let (endpoint, path) = ("127.0.0.1:80".parse().unwrap(), "/".parse().unwrap());
        let asked = |host: &'static str| {
            let mut fields = Fields::new();
            fields.append(header::HOST, HeaderValue::from_static(host));
            let outgoing = Outgoing {
                method: &Method::GET,
                scheme: &Scheme::HTTP,
                authority: &endpoint,
                target: &path,
                fields: &fields,
                body: Body::Empty,
                upgrade: false,
                progress: &Progress::new(false),
            };
            authority(&outgoing).to_string()
        };
        assert_eq!(asked("data.example:8443"), "data.example:8443");
        assert_eq!(asked("127.0.0.1:80"), "127.0.0.1:80");
        assert_eq!(asked("no host at all"), "127.0.0.1:80");
    }

    /// Lets `beats` pass, in each of which the peer speaks or not.
    fn after(watch: &mut Watch, pulse: &Pulse, beats: &[bool]) -> Vec<Beat> {
        let looks = beats.iter().map(|spoke| {
            pulse.heard.set(pulse.heard.get() + u64::from(*spoke));
            watch.beat(pulse)
        });
        looks.collect()
    }

    #[test]
    fn a_peer_is_asked_when_requests_wait_in_silence_and_given_up_when_that_lasts() {
        let (mut watch, pulse) = (Watch::default(), Pulse::default());
        assert_eq!(after(&mut watch, &pulse, &[false; 3]), [Beat::Well, Beat::Well, Beat::Well]);
        pulse.open.set(1);
        pulse.begun.set(1);
        assert_eq!(
            after(&mut watch, &pulse, &[false, true, true]),
            [Beat::Well, Beat::Well, Beat::Well]
        );
        assert_eq!(after(&mut watch, &pulse, &[false, false]), [Beat::Ask, Beat::Dead]);
    }

    #[test]
    fn a_peer_that_lives_is_asked_once_in_five_minutes_at_most() {
        let (mut watch, pulse) = (Watch::default(), Pulse::default());
        pulse.open.set(1);
        let mut last = None;
        for beat in 0..1000u32 {
            match watch.beat(&pulse) {
                Beat::Well => {}
                Beat::Ask => {
                    assert!(
                        last.is_none_or(|last| BEAT * (beat - last) >= Duration::from_secs(300))
                    );
                    last = Some(beat);
                    // It says what it must, and no more.
                    pulse.heard.set(pulse.heard.get() + 1);
                }
                Beat::Dead => panic!("it answered"),
            }
        }
        assert!(last > Some(900));
    }

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn requests_on_a_connection_that_has_died_silently_end_long_before_their_deadline() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = listener.local_addr().unwrap();
        let (here, there) = tokio::join!(TcpStream::connect(at), listener.accept());
        let (shaken, mut server) = tokio::join!(
            H2::handshake(Stream::plain(Tallied::new(here.unwrap(), None)), 16_384),
            async { h2::server::handshake(there.unwrap().0).await.unwrap() },
        );
        let connection = shaken.unwrap();
        let send = connection.ready().unwrap();
        let (fields, progress) = (Fields::new(), Progress::new(false));
        let outgoing = Outgoing {
            method: &Method::GET,
            scheme: &Scheme::HTTP,
            authority: &Authority::from_static("data"),
            target: &PathAndQuery::from_static("/"),
            fields: &fields,
            body: Body::Empty,
            upgrade: false,
            progress: &progress,
        };
        let begun = Instant::now();
        let interim = Interim::default();
        let (sent, _held) = tokio::join!(
            send_and_end(Rc::clone(&connection), send, outgoing, &interim),
            // It takes the request, and then nobody drives it any more.
            async { server.accept().await },
        );
        assert!(matches!(sent, Err(Failure { error: SendError::Closed, answered: false })));
        assert!(begun.elapsed() <= 4 * BEAT, "{:?}", begun.elapsed());
        assert!(connection.is_closed());
    }

    async fn send_and_end(
        connection: Rc<H2>,
        ready: SendRequest<Bytes>,
        outgoing: Outgoing<'_>,
        interim: &Interim,
    ) -> Result<(), Failure> {
        send(connection, ready, outgoing, interim).await.map(|_received| ())
    }
}
