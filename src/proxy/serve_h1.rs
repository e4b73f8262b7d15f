//! HTTP/1.1 with a client: one task per connection reads requests, lets the story answer, and writes the answers.
//!
//! A connection on which nothing happens gives back its buffers and the room for a request, and waits for the socket to
//! become readable. What is refused while a head is read ends the connection, because nobody can say where the next request would begin.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use http::{Method, StatusCode, Version, header};
use http_body::Body as _;
use tokio::io::AsyncWrite;

use crate::{
    http1::{
        self, BodyDecoder, Framing, HeadError, ParsedRequest, encode_headers, encode_status_line,
    },
    net::Stream,
    proxy::{
        headers,
        record::Record,
        reject::{self, Rejection},
        story::Story,
        tunnel,
        wire_h1::{FIRST_READ, Incoming, Wire, client_gone, first_read, poll_write_all},
        worker::{Answer, Call, Peer},
    },
    runtime::{Alarm, Guard, Phase, Turn},
    wire::{Body, BodyError, Fields, Interim, NextFrame, Request, Response},
};

/// Bytes of a body that are copied behind the head, so that both leave in one packet.
const SMALL_BODY: usize = 16 * 1024;
/// A connection on which no request follows for this long gives its buffers back.
const PARK_AFTER: std::time::Duration = std::time::Duration::from_millis(250);
/// How long a connection that is being closed still listens, so that its last answer is not lost to a reset.
const LINGER: std::time::Duration = std::time::Duration::from_secs(1);

/// What came of waiting for a head.
enum Head {
    Request(ParsedRequest),
    /// It must be refused, and the connection closed.
    Refused(Rejection),
    /// Nothing came for a while.
    Idle,
    /// The client has gone.
    Over,
}

/// Why a connection stopped working.
enum Pause {
    /// There is nothing to do for now.
    Idle,
    /// It has ended.
    Over,
    /// Both sides speak to each other directly from here on.
    Tunnel(Box<Tunnel>),
}

/// Two sides that are to be joined.
struct Tunnel {
    response: Response,
    far: Stream,
    record: Record,
    asked: Asked,
}

/// What the client may expect after this answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Afterwards {
    KeepAlive,
    Close,
}

/// Who ended an answer before its end.
enum Broken {
    /// The client left, or took nothing for too long.
    Client,
    /// The rest of the request's body cannot be carried; our code for it.
    Request(&'static str),
    /// The endpoint broke off; our code for it.
    Endpoint(&'static str),
}

impl From<io::Error> for Broken {
    /// Nothing but writing to the client fails in this way.
    fn from(_gone: io::Error) -> Self {
        Self::Client
    }
}

/// What is known of a request once its answer is written.
struct Asked {
    method: Method,
    version: Version,
    keep_alive: bool,
}

/// One connection.
pub(super) struct Connection {
    wire: Rc<Wire>,
    story: Rc<Story>,
    peer: Peer,
    alarm: RefCell<Alarm>,
    write: BytesMut,
    /// A request was answered on it.
    served: bool,
}

impl Connection {
    /// A connection whose first bytes, if any were read, are in `read`.
    pub(super) fn new(
        stream: Stream,
        read: BytesMut,
        guard: Guard,
        story: Rc<Story>,
        peer: Peer,
    ) -> Self {
        let limits = *story.worker().limits();
        let wire = Rc::new(Wire {
            stream: RefCell::new(stream),
            read: RefCell::new(read),
            guard,
            decoder: RefCell::new(BodyDecoder::Length(0)),
            expects: Cell::new(false),
            broken: Cell::new(false),
            next_read: Cell::new(FIRST_READ),
            limit: Cell::new(limits.body_bytes),
            flow: story.flow(),
        });
        Self { wire, story, peer, alarm: RefCell::default(), write: BytesMut::new(), served: false }
    }

    /// Serves requests until either side has had enough.
    pub(super) async fn serve(mut self) {
        loop {
            // The room that a request needs is boxed and given back while the connection is idle: thousands of idle
            // connections cost little, and a busy one allocates it once.
            match Box::pin(self.work()).await {
                Pause::Idle => {}
                Pause::Over => return,
                Pause::Tunnel(tunnel) => return Box::pin(self.tunnel(*tunnel)).await,
            }
            if !self.park().await {
                return;
            }
        }
    }

    /// Tells a client that it is not served, and closes.
    pub(super) async fn refuse(mut self, rejection: Rejection) {
        self.turn_down(rejection, None).await;
    }

    /// Waits, without holding anything, until the client says something; `false` when it will not.
    async fn park(&mut self) -> bool {
        let wire = &self.wire;
        *wire.read.borrow_mut() = BytesMut::new();
        self.write = BytesMut::new();
        self.alarm.get_mut().stop();
        let limits = self.story.worker().limits();
        wire.guard.arm(if self.served { limits.idle_timeout } else { limits.first_request() });
        poll_fn(|cx| {
            if self.story.end().reached(Phase::Drain) || wire.guard.poll_expired(cx).is_ready() {
                return Poll::Ready(false);
            }
            wire.stream.borrow().poll_readable(cx).map(|ready| ready.is_ok())
        })
        .await
    }

    /// Serves requests as long as they follow each other closely.
    async fn work(&mut self) -> Pause {
        loop {
            let request = match self.head().await {
                Head::Request(request) => request,
                Head::Refused(rejection) => return self.turn_down(rejection, None).await,
                Head::Idle => return Pause::Idle,
                Head::Over => return Pause::Over,
            };
            let framing = match self.framing(&request) {
                Ok(framing) => framing,
                Err(rejection) => return self.turn_down(rejection, Some(request)).await,
            };
            let (request, asked) = self.request(request, framing);
            match self.answer(request).await {
                None => return Pause::Over,
                Some(Answer::Tunnel(response, far, record)) => {
                    return Pause::Tunnel(Box::new(Tunnel { response, far, record, asked }));
                }
                Some(Answer::Response(response, record)) => {
                    if self.finish(response, record, &asked).await == Afterwards::Close {
                        return Pause::Over;
                    }
                    self.served = true;
                }
            }
        }
    }

    /// Answers what is refused before its story begins, and closes.
    async fn turn_down(&mut self, rejection: Rejection, head: Option<ParsedRequest>) -> Pause {
        let (mut method, mut version) = (Method::GET, Version::HTTP_11);
        let request = head.map(|head| {
            (method, version) = (head.method.clone(), head.version);
            let (uri, fields) = (head.uri, head.fields);
            Request { method: head.method, uri, version, fields, body: Body::Empty }
        });
        let asked = Asked { method, version, keep_alive: false };
        self.wire.flow.restart(self.story.worker().limits().stall_timeout);
        let refused = self.story.refuse(rejection, request, &self.wire.flow);
        if let Answer::Response(response, record) = refused {
            self.finish(response, record, &asked).await;
        }
        Pause::Over
    }

    /// Waits for the next request's head.
    async fn head(&mut self) -> Head {
        let limits = *self.story.worker().limits();
        self.wire.next_read.set(FIRST_READ);
        let mut begun = !self.wire.read.borrow().is_empty();
        self.wire.guard.arm(if begun { limits.header_timeout } else { PARK_AFTER });
        loop {
            if begun {
                match http1::parse_request(&mut self.wire.read.borrow_mut(), limits.head) {
                    Ok(Some(request)) => {
                        self.wire.guard.disarm();
                        return Head::Request(request);
                    }
                    Ok(None) => {}
                    Err(error) => return Head::Refused(refuse(error)),
                }
            }
            match poll_fn(|cx| self.poll_more(cx)).await {
                Some(Ok(0) | Err(_)) => return Head::Over,
                Some(Ok(_)) if !begun => {
                    begun = true;
                    self.wire.guard.arm(limits.header_timeout);
                }
                Some(Ok(_)) => {}
                None if begun => {
                    return Head::Refused(Rejection::RequestTimeout(limits.header_timeout));
                }
                None => return Head::Idle,
            }
        }
    }

    /// Reads more of a head; `None` when the time is up.
    fn poll_more(&self, cx: &mut Context<'_>) -> Poll<Option<io::Result<usize>>> {
        if let Poll::Ready(read) = self.wire.poll_fill(cx) {
            return Poll::Ready(Some(read));
        }
        if self.story.end().reached(Phase::Drain) && self.wire.read.borrow().is_empty() {
            return Poll::Ready(None);
        }
        self.wire.guard.poll_expired(cx).map(|()| None)
    }

    /// How the body of a request is framed, if it can be carried at all.
    fn framing(&self, head: &ParsedRequest) -> Result<Framing, Rejection> {
        let limits = self.story.worker().limits();
        if head.method == Method::CONNECT && !self.story.takes_connect() {
            return Err(Rejection::BadRequest("CONNECT is for the outbound port"));
        }
        let framing = http1::request_framing(head.version, &head.fields).map_err(refuse)?;
        // What follows its head belongs to the tunnel (RFC 9110 §9.3.6): a body would be cut out of that.
        if head.method == Method::CONNECT && framing != Framing::None {
            return Err(Rejection::BadRequest("CONNECT has no body"));
        }
        if let (Framing::Length(length), Some(limit)) = (framing, limits.body_bytes)
            && length > limit
        {
            return Err(Rejection::BodyTooLarge { limit });
        }
        Ok(framing)
    }

    /// Makes a request of a head, with the body that follows it.
    fn request(&self, head: ParsedRequest, framing: Framing) -> (Box<Request>, Asked) {
        let limits = self.story.worker().limits();
        let wire = &self.wire;
        wire.flow.restart(limits.stall_timeout);
        wire.limit.set(limits.body_bytes);
        wire.broken.set(false);
        wire.next_read.set(FIRST_READ);
        let waits = head.version == Version::HTTP_11
            && framing != Framing::None
            && headers::lists(&head.fields, &header::EXPECT, "100-continue");
        wire.expects.set(waits);
        let keep_alive = http1::keeps_alive(head.version, &head.fields);
        let mut read = wire.read.borrow_mut();
        let body = match framing {
            Framing::None | Framing::UntilClose => Body::Empty,
            // All of it is here already: no stream is needed, and it can be sent again.
            Framing::Length(length) if length <= read.len() as u64 => {
                wire.expects.set(false);
                wire.flow.receive(usize::try_from(length).unwrap_or(usize::MAX));
                Body::Full(read.split_to(usize::try_from(length).unwrap_or(0)).freeze())
            }
            Framing::Length(_) | Framing::Chunked => {
                *wire.decoder.borrow_mut() = BodyDecoder::new(framing, limits.head);
                wire.next_read.set(first_read(framing));
                if !waits {
                    wire.acknowledge();
                }
                Body::stream(Incoming(Rc::clone(wire)))
            }
        };
        if !matches!(body, Body::Stream(_)) {
            *wire.decoder.borrow_mut() = BodyDecoder::Length(0);
        }
        let asked = Asked { method: head.method.clone(), version: head.version, keep_alive };
        let request = Box::new(Request {
            method: head.method,
            uri: head.uri,
            version: head.version,
            fields: head.fields,
            body,
        });
        (request, asked)
    }

    /// Lets the story answer; `None` when the client went away meanwhile.
    async fn answer(&mut self, request: Box<Request>) -> Option<Answer> {
        let story = Rc::clone(&self.story);
        // RFC 9110 §15.2: HTTP/1.0 knows no interim responses.
        let hears = request.version != Version::HTTP_10;
        let interim = Interim::default();
        let call = Call {
            request,
            peer: &self.peer,
            interim: &interim,
            alarm: &self.alarm,
            flow: &self.wire.flow,
        };
        let mut walk = pin!(story.answer(call));
        let (wire, write) = (&self.wire, &mut self.write);
        poll_fn(|cx| {
            let walked = walk.as_mut().poll(cx);
            for (status, mut fields) in interim.take().into_iter().filter(|_| hears) {
                headers::strip_hop_by_hop(&mut fields);
                encode_status_line(status, write);
                encode_headers(fields.iter(), write);
                write.put_slice(b"\r\n");
            }
            if !write.is_empty() {
                let mut stream = wire.stream.borrow_mut();
                match poll_write_all(&mut stream, write, &mut Bytes::new(), cx) {
                    Poll::Ready(Err(_gone)) => return Poll::Ready(None),
                    Poll::Ready(Ok(())) | Poll::Pending => {}
                }
            }
            if let Poll::Ready(answer) = walked {
                return Poll::Ready(Some(answer));
            }
            if client_gone(wire, cx) { Poll::Ready(None) } else { Poll::Pending }
        })
        .await
    }

    /// Writes an answer and says whether the connection can be used again.
    async fn finish(&mut self, response: Response, record: Record, asked: &Asked) -> Afterwards {
        let Response { status, fields, body } = response;
        let unread = !self.wire.decoder.borrow().is_done() || self.wire.broken.get();
        let draining = self.story.end().reached(Phase::StopAccepting);
        let mut keep_alive = asked.keep_alive
            && !draining
            && !(unread && (self.wire.expects.get() || body_is_short(&body)));
        let framing = self.encode_head(status, fields, &body, asked, &mut keep_alive);
        let written = self.write_body(body, framing).await;
        self.wire.flow.moved();
        match written {
            Ok(()) => record.settle(),
            Err(Broken::Client) => return Afterwards::Close,
            Err(Broken::Request(code) | Broken::Endpoint(code)) => {
                record.broke(code);
                return Afterwards::Close;
            }
        }
        let complete = self.wire.decoder.borrow().is_done() && !self.wire.broken.get();
        if keep_alive && complete {
            return Afterwards::KeepAlive;
        }
        self.linger().await;
        Afterwards::Close
    }

    /// Writes the head into the buffer and settles how the body is framed.
    fn encode_head(
        &mut self,
        status: StatusCode,
        mut fields: Fields,
        body: &Body,
        asked: &Asked,
        keep_alive: &mut bool,
    ) -> Framing {
        let write = &mut self.write;
        let bodiless = asked.method == Method::HEAD
            || status == StatusCode::NO_CONTENT
            || status == StatusCode::NOT_MODIFIED
            || status.is_informational();
        let declared =
            fields.get(&header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let framing = match (bodiless, body.exact_len(), declared) {
            (true, ..) => Framing::None,
            (false, Some(length), _) => {
                if declared != Some(length) {
                    fields.set(header::CONTENT_LENGTH, length.into());
                }
                Framing::Length(length)
            }
            (false, None, Some(length)) => Framing::Length(length),
            (false, None, None) if asked.version == Version::HTTP_11 => Framing::Chunked,
            (false, None, None) => {
                *keep_alive = false;
                Framing::UntilClose
            }
        };
        encode_status_line(status, write);
        encode_headers(fields.iter(), write);
        if framing == Framing::Chunked {
            write.put_slice(b"transfer-encoding: chunked\r\n");
        }
        if !*keep_alive {
            write.put_slice(b"connection: close\r\n");
        } else if asked.version == Version::HTTP_10 {
            write.put_slice(b"connection: keep-alive\r\n");
        }
        write.put_slice(b"\r\n");
        framing
    }

    /// Writes what is in the buffer, then the body.
    async fn write_body(&mut self, mut body: Body, framing: Framing) -> Result<(), Broken> {
        if framing == Framing::None {
            // The answer to HEAD may still have a body on its way to us; it ends here.
            return Ok(self.flush(Bytes::new()).await?);
        }
        if let Body::Full(bytes) = body {
            return Ok(self.write_whole(bytes).await?);
        }
        let mut body = Pin::new(&mut body);
        loop {
            let frame = match poll_fn(|cx| Poll::Ready(body.as_mut().poll_frame(cx))).await {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    // Nothing to add for now: the client gets what there is.
                    self.flush(Bytes::new()).await?;
                    poll_fn(|cx| self.poll_answer(body.as_mut(), cx)).await?
                }
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let bytes = data.len();
                        if framing == Framing::Chunked {
                            http1::encode_chunk(&data, &mut self.write);
                            self.flush(Bytes::new()).await?;
                        } else {
                            self.flush(data).await?;
                        }
                        self.wire.flow.send(bytes);
                    }
                    Err(frame) => {
                        if framing == Framing::Chunked {
                            http1::encode_last_chunk(frame.trailers_ref(), &mut self.write);
                            return Ok(self.flush(Bytes::new()).await?);
                        }
                    }
                },
                None => break,
                // The end must look like no end: without the last chunk the client knows that something is missing.
                Some(Err(error)) => return Err(self.culprit(&error)),
            }
        }
        match framing {
            Framing::Chunked => http1::encode_last_chunk(None, &mut self.write),
            Framing::Length(length) if length != self.wire.flow.sent() => {
                return Err(Broken::Endpoint(reject::UPSTREAM_RESET));
            }
            Framing::Length(_) | Framing::None | Framing::UntilClose => {}
        }
        Ok(self.flush(Bytes::new()).await?)
    }

    /// Whose fault it is that an answer's body broke off: with the upload that goes on beside it, it ends too.
    fn culprit(&self, error: &BodyError) -> Broken {
        if !self.wire.broken.get() {
            return Broken::Endpoint(reject::UPSTREAM_RESET);
        }
        reject::body_code(error).map_or(Broken::Client, Broken::Request)
    }

    /// Waits for the next piece of the answer's body.
    fn poll_answer(
        &self,
        body: Pin<&mut Body>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<NextFrame, Broken>> {
        if let Poll::Ready(frame) = body.poll_frame(cx) {
            return Poll::Ready(Ok(frame));
        }
        if client_gone(&self.wire, cx) {
            return Poll::Ready(Err(Broken::Client));
        }
        self.wire.flow.poll_stalled(cx).map(|()| Err(Broken::Endpoint(reject::DEADLINE)))
    }

    /// Writes what is in the buffer and a body that is all here, a small one in the same packet.
    async fn write_whole(&mut self, bytes: Bytes) -> io::Result<()> {
        let length = bytes.len();
        if bytes.len() <= SMALL_BODY {
            self.write.put_slice(&bytes);
            let mut turn = Turn::default();
            poll_fn(|cx| turn.poll_give(cx)).await;
            self.flush(Bytes::new()).await?;
        } else {
            self.flush(bytes).await?;
        }
        self.wire.flow.send(length);
        Ok(())
    }

    /// Writes the buffer and then `frame`, and flushes; gives up when the client takes nothing for too long.
    async fn flush(&mut self, mut frame: Bytes) -> io::Result<()> {
        let (wire, write) = (&self.wire, &mut self.write);
        let mut left = usize::MAX;
        poll_fn(|cx| {
            let mut stream = wire.stream.borrow_mut();
            match poll_write_all(&mut stream, write, &mut frame, cx) {
                Poll::Ready(done) => Poll::Ready(done),
                Poll::Pending => {
                    let now = write.len() + frame.len();
                    if now < left {
                        left = now;
                        wire.flow.moved();
                    }
                    wire.flow.poll_stalled(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
                }
            }
        })
        .await
    }

    /// Hands both sides to each other.
    async fn tunnel(mut self, tunnel: Tunnel) {
        let Tunnel { response, far, record, asked } = tunnel;
        encode_status_line(response.status, &mut self.write);
        if asked.method != Method::CONNECT {
            encode_headers(response.fields.iter(), &mut self.write);
        }
        self.write.put_slice(b"\r\n");
        if self.flush(Bytes::new()).await.is_err() {
            return;
        }
        let shutdown = self.story.end().clone();
        let Ok(wire) = Rc::try_unwrap(self.wire) else { return };
        let early = wire.read.into_inner().freeze();
        let near = wire.stream.into_inner().with_prefix(early);
        let idle = self.story.worker().limits().idle_timeout;
        Box::pin(tunnel::join(near, far, record, (&wire.guard, idle), &shutdown)).await;
    }

    /// Says that no more will come, then listens a little: a close with unread bytes would send a reset, which can
    /// overtake the answer (RFC 9112 §9.6).
    async fn linger(&self) {
        let wire = &self.wire;
        wire.guard.arm(LINGER);
        wire.next_read.set(FIRST_READ);
        poll_fn(|cx| {
            let ended = Pin::new(&mut *wire.stream.borrow_mut()).poll_shutdown(cx);
            match ended {
                Poll::Pending if wire.guard.poll_expired(cx).is_pending() => Poll::Pending,
                Poll::Pending | Poll::Ready(_) => Poll::Ready(()),
            }
        })
        .await;
        poll_fn(|cx| {
            loop {
                wire.read.borrow_mut().clear();
                match wire.poll_fill(cx) {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(()),
                    Poll::Ready(Ok(_)) => {}
                    Poll::Pending => return wire.guard.poll_expired(cx),
                }
                if wire.guard.is_expired() {
                    return Poll::Ready(());
                }
            }
        })
        .await;
    }
}

/// Whether waiting for the rest of a request's body would keep an answer that is complete already.
fn body_is_short(body: &Body) -> bool {
    !matches!(body, Body::Stream(_))
}

fn refuse(error: HeadError) -> Rejection {
    match error {
        HeadError::TooLarge(limits) => {
            Rejection::HeadersTooLarge { bytes: limits.bytes, headers: limits.headers }
        }
        HeadError::LineEnd => Rejection::BadRequest("a line of the head does not end in CR LF"),
        HeadError::Grammar(what) => Rejection::BadRequest(what),
        HeadError::Version => Rejection::BadRequest("the version is neither HTTP/1.0 nor HTTP/1.1"),
        HeadError::Host => {
            Rejection::BadRequest("a request has exactly one host header, which names a host")
        }
        HeadError::Length => Rejection::BadRequest("the length of the body is ambiguous"),
        HeadError::Coding => Rejection::BadRequest("the only transfer coding is chunked"),
    }
}
