//! The answer to one HTTP/2 request on its way to the client: as its windows allow, and as its connection has room.

use std::{
    cell::Cell,
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{Reason, SendStream, server::SendResponse};
use http::{Method, StatusCode, Version, header};
use http_body::Body as _;

use crate::{
    proxy::{
        backlog::{Backlog, Piece, Turn},
        flow::Flow,
        reject,
        worker::Answer,
    },
    wire::{Body, BodyError, Fields, NextFrame, Response},
};

/// Where an answer goes.
pub(super) struct Outlet<'a> {
    /// What moves of the exchange.
    pub flow: &'a Flow,
    /// What waits to be written on the connection.
    pub backlog: &'a Rc<Backlog>,
    /// Whether the request's body broke off, so that what breaks off with it is no endpoint's doing.
    pub broken: &'a Cell<bool>,
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

/// The head of an answer, as HTTP/2 sends it.
pub(super) fn head(status: StatusCode, fields: Fields) -> http::Response<()> {
    let mut response = http::Response::new(());
    *response.status_mut() = status;
    *response.version_mut() = Version::HTTP_2;
    *response.headers_mut() = fields.into();
    response
}

impl Outlet<'_> {
    /// Sends an answer and settles its record.
    pub(super) async fn finish(
        &self,
        answer: Answer,
        respond: &mut SendResponse<Piece>,
        method: &Method,
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
        let sent = if ends { Ok(()) } else { self.send_body(stream, body).await };
        self.flow.moved();
        match sent {
            Ok(()) => record.settle(),
            Err(Broken::Client) => {}
            Err(Broken::Request(code) | Broken::Endpoint(code)) => record.broke(code),
        }
    }

    /// Sends a body; a stream that cannot be finished is reset.
    async fn send_body(&self, mut stream: SendStream<Piece>, mut body: Body) -> Result<(), Broken> {
        let sent = self.send_frames(&mut stream, &mut body).await;
        if let Err(broken) = &sent {
            // Either way the client must not take what it has for the whole.
            stream.send_reset(match broken {
                Broken::Client | Broken::Request(_) => Reason::CANCEL,
                Broken::Endpoint(_) => Reason::INTERNAL_ERROR,
            });
        }
        sent
    }

    async fn send_frames(
        &self,
        stream: &mut SendStream<Piece>,
        body: &mut Body,
    ) -> Result<(), Broken> {
        loop {
            let mut turn = Turn::default();
            match poll_fn(|cx| self.poll_answer(stream, body, &mut turn, cx)).await? {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let last = body.is_empty();
                        self.send_data(stream, data, last).await?;
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
                    let end = Piece::new(Bytes::new(), self.backlog);
                    return stream.send_data(end, true).map_err(|_gone| Broken::Client);
                }
                Some(Err(error)) => {
                    return Err(poll_fn(|cx| Poll::Ready(self.culprit(stream, &error, cx))).await);
                }
            }
        }
    }

    /// Whose fault it is that an answer's body broke off: with the upload that goes on beside it, it ends too, and whoever
    /// resets a stream ends both.
    fn culprit(
        &self,
        stream: &mut SendStream<Piece>,
        error: &BodyError,
        cx: &mut Context<'_>,
    ) -> Broken {
        if stream.poll_reset(cx).is_ready() {
            return Broken::Client;
        }
        if !self.broken.get() {
            return Broken::Endpoint(reject::UPSTREAM_RESET);
        }
        reject::body_code(error).map_or(Broken::Client, Broken::Request)
    }

    /// Waits for the next piece of the answer's body. Nothing is taken from the endpoint for which there is no room.
    fn poll_answer(
        &self,
        stream: &mut SendStream<Piece>,
        body: &mut Body,
        turn: &mut Turn,
        cx: &mut Context<'_>,
    ) -> Poll<Result<NextFrame, Broken>> {
        if self.backlog.poll_room(turn, cx).is_pending() {
            return self.poll_given_up(stream, cx).map(Err);
        }
        if let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) {
            return Poll::Ready(Ok(frame));
        }
        if stream.poll_reset(cx).is_ready() {
            return Poll::Ready(Err(Broken::Client));
        }
        self.flow.poll_stalled(cx).map(|()| Err(Broken::Endpoint(reject::DEADLINE)))
    }

    /// Ready when the client has left, or has taken nothing for too long.
    fn poll_given_up(&self, stream: &mut SendStream<Piece>, cx: &mut Context<'_>) -> Poll<Broken> {
        if stream.poll_reset(cx).is_ready() {
            return Poll::Ready(Broken::Client);
        }
        self.flow.poll_stalled(cx).map(|()| Broken::Client)
    }

    /// Sends one piece as the window allows, and as the connection has room.
    async fn send_data(
        &self,
        stream: &mut SendStream<Piece>,
        mut data: Bytes,
        last: bool,
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
                    Poll::Pending => self.flow.poll_stalled(cx).map(|()| Err(Broken::Client)),
                })
                .await?
            };
            // Asked behind the window: however many streams a client opens it for at once, they take turns.
            if !self.backlog.has_room() {
                self.room(stream).await?;
            }
            let piece = data.split_to(room.min(data.len()));
            let (bytes, ends) = (piece.len(), last && data.is_empty());
            let piece = Piece::new(piece, self.backlog);
            stream.send_data(piece, ends).map_err(|_gone| Broken::Client)?;
            self.flow.send(bytes);
        }
        Ok(())
    }

    /// Waits until the connection has room.
    async fn room(&self, stream: &mut SendStream<Piece>) -> Result<(), Broken> {
        let mut turn = Turn::default();
        poll_fn(|cx| {
            if self.backlog.poll_room(&mut turn, cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            self.poll_given_up(stream, cx).map(Err)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::duplex,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::runtime::{self, TICK, Watchdog};

    const STALL: Duration = Duration::from_secs(300);

    #[tokio::test(flavor = "local", start_paused = true)]
    async fn a_client_that_takes_nothing_does_not_hold_an_answer_for_ever() {
        let (near, far) = duplex(1024 * 1024);
        let server = h2::server::Builder::new().handshake::<_, Piece>(far);
        let shaken = tokio::join!(h2::client::handshake(near), server);
        let ((mut send, connection), mut server) = (shaken.0.unwrap(), shaken.1.unwrap());
        runtime::spawn_local("client", async { connection.await.unwrap() });
        let request = http::Request::get("http://data/").body(()).unwrap();
        let (answer, _body) = send.send_request(request, false).unwrap();
        let (_request, mut respond) = server.accept().await.unwrap().unwrap();
        runtime::spawn_local("server", async move {
            while let Some(Ok(_more)) = server.accept().await {}
        });
        let stream = respond.send_response(http::Response::new(()), false).unwrap();
        let mut held = answer.await.unwrap().into_body();
        let begun = Instant::now();
        // More than the window that every stream begins with.
        let flow = Flow::new(&Watchdog::new(), STALL);
        let (backlog, broken) = (Rc::default(), Cell::default());
        let outlet = Outlet { flow: &flow, backlog: &backlog, broken: &broken };
        let sent = outlet.send_body(stream, Body::Full(vec![0; 200_000].into())).await;
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
}
