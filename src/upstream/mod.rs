//! Connections to endpoints: opened, kept warm, retired; and the exchange of one request over them.
//!
//! A worker has one [`Pool`] per address it calls. A pool hands out HTTP/1.1 connections one request at a time and
//! shares HTTP/2 connections among many; it decides which of the two a request gets. It does not decide which endpoint
//! is called, nor whether a failed request is sent again: it only says exactly how far the request had come.

mod connect;
mod h1;
mod h2;
mod pool;

use std::cell::Cell;

use http::{
    Method,
    uri::{Authority, PathAndQuery, Scheme},
};

pub use self::{
    connect::{ConnectError, Connector, OwnAddresses},
    h1::H1,
    h2::{H2, Witness},
    pool::{Home, Lease, Pool, PoolSettings, Want},
};
use crate::{
    http1::HeadError,
    net::Stream,
    wire::{Body, BodyError, Fields, Interim, Response},
};

/// A request as it goes to an endpoint. The headers carry `host`; HTTP/2 says it as `:authority` instead.
pub struct Outgoing<'a> {
    /// The method.
    pub method: &'a Method,
    /// `:scheme` of HTTP/2.
    pub scheme: &'a Scheme,
    /// `:authority` of HTTP/2.
    pub authority: &'a Authority,
    /// Path and query, as they arrived.
    pub target: &'a PathAndQuery,
    /// End-to-end headers.
    pub fields: &'a Fields,
    /// The body; taken.
    pub body: Body,
    /// Whether `101 Switching Protocols` is a welcome answer.
    pub upgrade: bool,
    /// Where it is told how far the body has come.
    pub progress: &'a Progress,
}

/// Whom an exchange waits for before the head of its answer is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// The peer, for its answer: the body, if there is any, has been sent.
    Answer,
    /// Whoever sends the request's body, for more of it.
    Body,
    /// The peer, to take more of the body.
    Room,
}

/// How far the body of a request has come, for whoever bounds its exchange in time.
#[derive(Debug)]
pub struct Progress(Cell<(Awaited, u64)>);

impl Progress {
    /// Nothing has been sent yet of a request whose body `streams`, or is all here.
    #[must_use]
    pub fn new(streams: bool) -> Self {
        let awaited = if streams { Awaited::Body } else { Awaited::Answer };
        Self(Cell::new((awaited, 0)))
    }

    /// Whom the exchange waits for, and how many bytes of the body the peer has taken so far.
    #[must_use]
    pub fn get(&self) -> (Awaited, u64) {
        self.0.get()
    }

    fn set(&self, awaited: Awaited, taken: u64) {
        self.0.set((awaited, taken));
    }
}

/// What came back.
pub enum Received {
    /// A response whose body may still be on its way.
    Response(Response),
    /// The peer switched protocols: the stream is the caller's now.
    Upgraded(Response, Stream),
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The peer said it has not touched the request (`REFUSED_STREAM`; RFC 9113 §8.7).
    #[error("the peer refused the stream")]
    Refused,
    /// The peer ends the connection and has not touched the request (GOAWAY below it; RFC 9113 §6.8).
    #[error("the peer had said goodbye")]
    Gone,
    /// The connection ended before a byte of the answer came.
    #[error("the connection closed before an answer")]
    Closed,
    /// The peer reset the stream or the connection.
    #[error("the peer reset the request")]
    Reset,
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] std::io::Error),
    /// The answer is no valid HTTP.
    #[error("the answer is not valid")]
    BadResponse(#[source] HeadError),
    /// The request's own body broke off.
    #[error("the request's body broke off")]
    RequestBody(#[source] BodyError),
    /// The request cannot be said in HTTP/2.
    #[error("the request cannot be expressed in HTTP/2")]
    BadRequest,
}

/// A failed exchange.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: SendError,
    /// Whether bytes of an answer had come.
    pub answered: bool,
}

impl Failure {
    /// Whether the peer certainly has not acted on the request, so that it may be sent again whatever its method.
    #[must_use]
    pub fn is_unseen(&self) -> bool {
        match self.error {
            SendError::Refused | SendError::Gone => true,
            SendError::Closed
            | SendError::Reset
            | SendError::Io(_)
            | SendError::BadResponse(_)
            | SendError::RequestBody(_)
            | SendError::BadRequest => false,
        }
    }
}

impl Lease {
    /// Sends a request and waits for the head of its answer. The caller bounds the time; dropping the future ends the
    /// stream (HTTP/2) or the connection (HTTP/1.1).
    ///
    /// # Errors
    /// [`Failure`], which says how far the request had come.
    pub async fn send(
        self,
        outgoing: Outgoing<'_>,
        interim: &Interim,
    ) -> Result<Received, Failure> {
        match self {
            Self::H1 { connection, home, .. } => {
                h1::send(connection, home, outgoing, interim).await
            }
            Self::H2 { connection, send, .. } => {
                h2::send(connection, send, outgoing, interim).await
            }
        }
    }
}
