//! HTTP/2 to an endpoint: many requests share a connection; each is driven by the task of the request it serves.

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client::ResponseFuture, client::SendRequest};
use http::{Request, Uri, Version, uri::Authority};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::Instant;

use crate::{
    net::Stream,
    runtime,
    upstream::{ConnectError, Failure, Outgoing, Received, SendError},
    wire::{self, Body, BodyError, Interim, Prepended, Response},
};

/// Window of one stream: 1 MiB carries 100 Mbit/s over 80 ms.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// Window of the connection, over all its streams.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// What may wait to be written per stream.
const SEND_BUFFER: usize = 512 * 1024;

/// A connection to an endpoint that speaks HTTP/2.
pub struct H2 {
    send: SendRequest<Bytes>,
    open: Cell<usize>,
    closed: Rc<Cell<bool>>,
    pub(super) opened: Instant,
    pub(super) idle_since: Cell<Instant>,
}

/// Counts a stream as long as it lives.
struct Seat(Rc<H2>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get().saturating_sub(1));
        if self.0.open.get() == 0 {
            self.0.idle_since.set(Instant::now());
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
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buffer_size(SEND_BUFFER)
            .max_header_list_size(header_bytes)
            .enable_push(false)
            .handshake::<_, Bytes>(stream)
            .await
            .map_err(|_source| ConnectError::Protocol)?;
        let closed = Rc::new(Cell::new(false));
        let flag = Rc::clone(&closed);
        runtime::spawn_local("h2-upstream", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an HTTP/2 connection to an endpoint ended");
            }
            flag.set(true);
        });
        let now = Instant::now();
        Ok(Rc::new(Self {
            send,
            open: Cell::new(0),
            closed,
            opened: now,
            idle_since: Cell::new(now),
        }))
    }

    /// Whether it can take another stream right now.
    pub(super) fn has_room(&self) -> bool {
        !self.closed.get() && self.open.get() < self.send.current_max_send_streams()
    }

    /// Whether it ended.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Whether no stream is open.
    pub(super) fn is_idle(&self) -> bool {
        self.open.get() == 0
    }

    /// Keeps it out of the choice; open streams end in peace.
    pub(super) fn retire(&self) {
        self.closed.set(true);
    }
}

fn classify(error: &h2::Error) -> SendError {
    let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
    // A GOAWAY without an error names the last stream it will serve; ours came later and was not touched.
    let gone =
        error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
    if refused || gone {
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
}

impl Upload {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SendError>> {
        while !self.done {
            if !self.waiting.is_empty() {
                self.stream.reserve_capacity(self.waiting.len());
                let room = match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(room)) => room,
                    Some(Err(error)) => return Poll::Ready(Err(classify(&error))),
                    None => return Poll::Ready(Err(SendError::Reset)),
                };
                let piece = self.waiting.split_to(room.min(self.waiting.len()));
                let last = self.waiting.is_empty() && self.body.is_empty();
                self.stream.send_data(piece, last).map_err(|error| classify(&error))?;
                self.done = last;
                continue;
            }
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
    ) -> Poll<Result<http::Response<RecvStream>, SendError>> {
        if let Some(upload) = &mut self.upload {
            match upload.poll(cx) {
                Poll::Ready(Err(error @ SendError::RequestBody(_))) => {
                    return Poll::Ready(Err(error));
                }
                Poll::Ready(Ok(()) | Err(_)) => self.upload = None,
                Poll::Pending => {}
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
    mut outgoing: Outgoing<'_>,
    interim: &Interim,
) -> Result<Received, Failure> {
    let unseen = |error| Failure { error, answered: false };
    connection.open.set(connection.open.get() + 1);
    let seat = Seat(Rc::clone(&connection));
    let mut send = connection.send.clone();
    std::future::poll_fn(|cx| send.poll_ready(cx)).await.map_err(|error| {
        connection.retire();
        // Nothing of this request has been written yet.
        tracing::debug!(%error, "an HTTP/2 connection takes no more streams");
        unseen(SendError::Refused)
    })?;
    let request = head(&mut outgoing).ok_or_else(|| unseen(SendError::BadRequest))?;
    let body = std::mem::take(&mut outgoing.body);
    let (answer, stream) = send.send_request(request, body.is_empty()).map_err(|error| {
        connection.retire();
        // It closed before the request was on its way: nobody has seen it.
        let error = classify(&error);
        unseen(if matches!(error, SendError::Closed) { SendError::Refused } else { error })
    })?;
    let upload =
        (!body.is_empty()).then_some(Upload { body, stream, waiting: Bytes::new(), done: false });
    let mut exchange = Exchange { answer, upload };
    let response = std::future::poll_fn(|cx| exchange.poll(cx, interim)).await.map_err(unseen)?;
    let (parts, stream) = response.into_parts();
    let upload = exchange.upload.take();
    let body = Incoming { stream, upload, trailers: false, seat };
    let body = gather(body).await;
    Ok(Received::Response(Response { status: parts.status, fields: parts.headers.into(), body }))
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
    let first = std::future::poll_fn(|cx| Poll::Ready(body.stream.poll_data(cx))).await;
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
            && upload.poll(cx).is_ready()
        {
            this.upload = None;
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
    use http::{HeaderValue, header, uri::Scheme};

    use super::*;
    use crate::wire::Fields;

    #[test]
    fn the_host_that_was_asked_for_is_the_authority() {
        let (endpoint, path) = ("127.0.0.1:80".parse().unwrap(), "/".parse().unwrap());
        let asked = |host: &'static str| {
            let mut fields = Fields::new();
            fields.append(header::HOST, HeaderValue::from_static(host));
            let outgoing = Outgoing {
                method: &http::Method::GET,
                scheme: &Scheme::HTTP,
                authority: &endpoint,
                target: &path,
                fields: &fields,
                body: Body::Empty,
                upgrade: false,
            };
            authority(&outgoing).to_string()
        };
        assert_eq!(asked("data.example:8443"), "data.example:8443");
        assert_eq!(asked("127.0.0.1:80"), "127.0.0.1:80");
        assert_eq!(asked("no host at all"), "127.0.0.1:80");
    }
}
