//! Attempts: choose, lease, send; try again where that is safe; all within one deadline.
//!
//! What may be sent again (DESIGN §7.3): whatever the endpoint certainly has not seen, and idempotent requests whose
//! body is still here. Retries after the first attempt spend a budget, so that a service in trouble is not buried
//! under its callers' patience.

use std::{
    cell::RefCell, future::poll_fn, pin::pin, rc::Rc, sync::Arc, task::Poll, time::Duration,
};

use http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header, uri::PathAndQuery};
use tokio::time::Instant;

use crate::{
    balance::{Chosen, Flight, NoChoice, Outcome, Tried, Vitals},
    net::Stream,
    proxy::{
        record::Record,
        reject::Rejection,
        view::{Cluster, Target, Ward},
    },
    runtime::Alarm,
    upstream::{ConnectError, Failure, Outgoing, Received, SendError, Want},
    wire::{Body, BodyError, Fields, Interim},
};

/// A fast failure must not look like a fast endpoint.
const PENALTY: Duration = Duration::from_secs(5);
/// Without any timeout in the settings an attempt may still not last for ever.
const FAR: Duration = Duration::from_secs(24 * 3600);

/// A request ready to be sent.
pub(super) struct Dispatch<'a> {
    /// The method.
    pub method: Method,
    /// The target as it arrived.
    pub uri: Uri,
    /// End-to-end headers; `host` and credentials are put in per attempt.
    pub fields: Fields,
    /// The body.
    pub body: Body,
    /// The token, for endpoints that take one.
    pub bearer: Option<HeaderValue>,
    /// Whether the client asks to switch protocols.
    pub upgrade: bool,
    /// Whether HTTP/2 is needed.
    pub grpc: bool,
    /// Where interim responses go.
    pub interim: &'a Interim,
    /// Bounds the attempts in time.
    pub alarm: &'a RefCell<Alarm>,
}

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Whether a method may be repeated (RFC 9110 §9.2.2), or the client says that the request may.
fn repeatable(method: &Method, fields: &Fields) -> bool {
    method.is_idempotent() || fields.contains(&IDEMPOTENCY_KEY)
}

/// One request's way through its attempts.
pub(super) struct Forward<'a> {
    cluster: &'a Rc<Cluster>,
    ward: &'a Ward,
    dispatch: Dispatch<'a>,
    record: &'a mut Record,
    begun: Instant,
    deadline: Instant,
    repeatable: bool,
    /// Whether a body that streams has been given to an attempt.
    spent: bool,
    tried: Tried,
    attempts: u32,
}

/// What one attempt came to.
enum Attempt {
    Received(Received),
    /// An answer that another endpoint might better.
    Held {
        received: Received,
        flight: Flight<Arc<Vitals>>,
    },
    /// It failed; `again` says whether another may follow.
    Failed {
        rejection: Rejection,
        again: bool,
    },
}

impl<'a> Forward<'a> {
    /// A request on its way to `cluster` that has been prepared at `begun`.
    pub(super) fn new(
        cluster: &'a Rc<Cluster>,
        ward: &'a Ward,
        dispatch: Dispatch<'a>,
        record: &'a mut Record,
        begun: Instant,
    ) -> Self {
        let limit = cluster.timeouts.request.unwrap_or(FAR);
        let deadline = record.started() + limit;
        let repeatable = repeatable(&dispatch.method, &dispatch.fields);
        Self {
            cluster,
            ward,
            dispatch,
            record,
            begun,
            deadline,
            repeatable,
            spent: false,
            tried: Tried::default(),
            attempts: 0,
        }
    }

    /// A bare connection to an endpoint of `cluster`, for a tunnel; another is tried when one cannot be reached.
    ///
    /// # Errors
    /// The [`Rejection`] of the last attempt.
    pub(super) async fn tunnel(
        cluster: &'a Rc<Cluster>,
        ward: &'a Ward,
        record: &'a mut Record,
    ) -> Result<Stream, Rejection> {
        let interim = Interim::default();
        let alarm = RefCell::default();
        let dispatch = Dispatch {
            method: Method::CONNECT,
            uri: Uri::default(),
            fields: Fields::new(),
            body: Body::Empty,
            bearer: None,
            upgrade: true,
            grpc: false,
            interim: &interim,
            alarm: &alarm,
        };
        let mut forward = Forward::new(cluster, ward, dispatch, record, Instant::now());
        loop {
            forward.attempts += 1;
            let begun = Instant::now();
            let (target, chosen) = forward.choose(begun)?;
            forward.record.attempt(&target.id, target.mode);
            let flight = Flight::begin(Arc::clone(&target.vitals));
            let opened = target.pool.connector().open_tunnel(cluster.timeouts.connect).await;
            let now = Instant::now();
            forward.record.waited(begun, now);
            let outcome = if opened.is_ok() { Outcome::Success } else { Outcome::Failure };
            forward.settle(&target, chosen, outcome, begun, now);
            match opened {
                Ok(stream) => {
                    forward.record.carried_by(flight);
                    return Ok(stream);
                }
                Err(error) if !forward.may_go_on().await => {
                    return Err(refuse_connect(cluster, &error));
                }
                Err(_error) => {}
            }
        }
    }

    /// Sends it, and again where that is safe.
    ///
    /// # Errors
    /// The [`Rejection`] of the last attempt.
    pub(super) async fn send(mut self) -> Result<Received, Rejection> {
        if self.cluster.targets.is_empty() {
            let (service, why) = (self.cluster.service.clone(), self.cluster.absence);
            return Err(Rejection::NoHealthyEndpoint { service, why });
        }
        self.cluster.budget.deposit(self.ward.tick(self.record.started()));
        loop {
            let begun = if self.attempts == 0 { self.begun } else { Instant::now() };
            self.attempts += 1;
            match self.attempt(begun).await? {
                Attempt::Received(received) => return Ok(received),
                Attempt::Held { received, flight } => {
                    if !Box::pin(self.may_go_on()).await {
                        self.record.carried_by(flight);
                        return Ok(received);
                    }
                }
                Attempt::Failed { rejection, again } => {
                    if !again || !Box::pin(self.may_go_on()).await {
                        return Err(rejection);
                    }
                }
            }
        }
    }

    /// Whether there is an attempt, a budget and time left; pauses before the next.
    async fn may_go_on(&self) -> bool {
        let now = Instant::now();
        if self.attempts >= self.cluster.max_attempts
            || !self.cluster.budget.withdraw(self.ward.tick(now))
        {
            return false;
        }
        let (base, max) = self.cluster.backoff;
        let steps = self.attempts.saturating_sub(1).min(16);
        let longest = base.saturating_mul(1 << steps).min(max);
        let pause = longest.mul_f64(fastrand::f64());
        if now + pause >= self.deadline {
            return false;
        }
        // The first retry goes elsewhere at once when there is an elsewhere.
        if self.attempts > 1 || self.cluster.targets.len() == 1 {
            tokio::time::sleep(pause).await;
        }
        true
    }

    async fn attempt(&mut self, begun: Instant) -> Result<Attempt, Rejection> {
        let (target, chosen) = self.choose(begun)?;
        self.record.attempt(&target.id, target.mode);
        let flight = Flight::begin(Arc::clone(&target.vitals));
        let outcome = self.exchange(&target, begun).await;
        let now = Instant::now();
        self.record.waited(begun, now);
        let verdict = self.judge(&outcome);
        self.settle(&target, chosen, verdict, begun, now);
        Ok(match outcome {
            // Held back: returned after all when there is no further attempt.
            Ok(received) if verdict == Outcome::Failure && self.may_repeat_answer(&received) => {
                Attempt::Held { received, flight }
            }
            Ok(received) => {
                self.record.carried_by(flight);
                Attempt::Received(received)
            }
            Err((rejection, again)) => Attempt::Failed { rejection, again },
        })
    }

    fn choose(&mut self, now: Instant) -> Result<(Rc<Target>, Chosen), Rejection> {
        let cluster = self.cluster;
        let service = || cluster.service.clone();
        let tick = self.ward.tick(now);
        let mut rng = fastrand::Rng::with_seed(tick.0);
        let chosen = cluster
            .picker
            .borrow_mut()
            .choose(&cluster.candidates, &self.tried, &cluster.aim, tick, &mut rng)
            .map_err(|none| match none {
                NoChoice::Empty => {
                    Rejection::NoHealthyEndpoint { service: service(), why: cluster.absence }
                }
                NoChoice::CircuitOpen { retry_at } => Rejection::CircuitOpen {
                    service: service(),
                    retry_after: retry_at
                        .map_or(Duration::from_secs(60), |at| at.elapsed_since(tick)),
                },
                NoChoice::Full => Rejection::Overloaded("requests at every endpoint"),
            })?;
        self.tried.add(chosen.index);
        let target = cluster.targets.get(chosen.index).ok_or_else(|| {
            Rejection::NoHealthyEndpoint { service: service(), why: cluster.absence }
        })?;
        Ok((Rc::clone(target), chosen))
    }

    /// Leases a connection and sends. A kept connection that turns out to be dead is replaced by a new one, once: that
    /// says nothing about the endpoint.
    async fn exchange(
        &mut self,
        target: &Target,
        begun: Instant,
    ) -> Result<Received, (Rejection, bool)> {
        let attempt = self.cluster.timeouts.attempt.unwrap_or(FAR);
        let deadline = self.deadline.min(begun + attempt);
        let want =
            Want { h2: self.dispatch.grpc, h1: self.dispatch.upgrade, repeatable: self.repeatable };
        let mut now = begun;
        loop {
            let left = deadline.saturating_duration_since(now);
            let limit = self.cluster.timeouts.connect.min(left);
            let lease = match target.pool.kept(want, now) {
                Some(lease) => lease,
                // Boxed, like everything that most requests never do: the room for it would be in every future.
                None => Box::pin(target.pool.lease(want, limit)).await.map_err(|error| {
                    tracing::debug!(
                        service = %self.cluster.service, endpoint = %target.id,
                        error = &error as &dyn std::error::Error, "no connection to an endpoint"
                    );
                    (refuse_connect(self.cluster, &error), true)
                })?,
            };
            let stale = lease.may_be_stale();
            // A body that streams is gone once it has been handed over.
            let whole = self.is_whole() && !matches!(self.dispatch.body, Body::Stream(_));
            let interim = self.dispatch.interim;
            let alarm = self.dispatch.alarm;
            let sent = {
                let mut sending = pin!(lease.send(self.outgoing(target), interim));
                poll_fn(|cx| {
                    if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                        return Poll::Ready(Some(sent));
                    }
                    alarm.borrow_mut().poll(deadline, cx).map(|()| None)
                })
                .await
            };
            match sent {
                Some(Ok(received)) => return Ok(received),
                Some(Err(failure)) if stale && whole && self.repeatable && is_dead(&failure) => {
                    now = Instant::now();
                }
                Some(Err(failure)) => return Err(self.refuse(&failure, whole)),
                None => {
                    let limit = deadline.duration_since(self.record.started());
                    let service = self.cluster.service.clone();
                    let again = self.repeatable && whole && deadline < self.deadline;
                    return Err((Rejection::Deadline { service, limit }, again));
                }
            }
        }
    }

    /// Whether the body can still be sent from its beginning.
    fn is_whole(&self) -> bool {
        !self.spent
    }

    /// The request as this target gets it.
    fn outgoing<'b>(&'b mut self, target: &'b Target) -> Outgoing<'b> {
        let fields = &mut self.dispatch.fields;
        if let Some(host) = &target.host {
            fields.set(header::HOST, host.clone());
        }
        if let Some(bearer) = &self.dispatch.bearer {
            // A token goes only where it belongs, whatever an earlier attempt was given.
            if target.takes_token {
                fields.set(header::AUTHORIZATION, bearer.clone());
            } else {
                fields.remove(&header::AUTHORIZATION);
            }
        }
        let body = match &self.dispatch.body {
            Body::Empty => Body::Empty,
            Body::Full(bytes) => Body::Full(bytes.clone()),
            Body::Stream(_) => {
                self.spent = true;
                std::mem::take(&mut self.dispatch.body)
            }
        };
        Outgoing {
            method: &self.dispatch.method,
            scheme: &target.scheme,
            authority: &target.authority,
            target: self.dispatch.uri.path_and_query().unwrap_or(&ROOT),
            fields: &self.dispatch.fields,
            body,
            upgrade: self.dispatch.upgrade,
        }
    }

    /// What a failed exchange means for the client, and whether another may follow.
    fn refuse(&self, failure: &Failure, whole: bool) -> (Rejection, bool) {
        let service = self.cluster.service.clone();
        tracing::debug!(
            %service, error = &failure.error as &dyn std::error::Error, answered = failure.answered,
            "an exchange with an endpoint failed"
        );
        let rejection = match &failure.error {
            SendError::Refused | SendError::Closed | SendError::Reset | SendError::Io(_) => {
                Rejection::UpstreamReset { service }
            }
            SendError::BadResponse(_) => Rejection::BadResponse { service },
            SendError::RequestBody(BodyError::TooLarge { limit }) => {
                Rejection::BodyTooLarge { limit: *limit }
            }
            SendError::RequestBody(BodyError::Framing) => {
                Rejection::BadRequest("the body's framing is invalid")
            }
            SendError::RequestBody(BodyError::Incomplete) => {
                Rejection::BadRequest("the body broke off before its end")
            }
            SendError::RequestBody(BodyError::Stalled { limit }) => {
                Rejection::RequestTimeout(*limit)
            }
            SendError::BadRequest => {
                Rejection::BadRequest("the request cannot be expressed in HTTP/2")
            }
        };
        let ours = matches!(failure.error, SendError::RequestBody(_) | SendError::BadRequest);
        let again = whole && !ours && !failure.answered && (failure.is_unseen() || self.repeatable);
        (rejection, again)
    }

    /// Whether another endpoint might do better with a request that this one answered badly.
    fn may_repeat_answer(&self, received: &Received) -> bool {
        let Received::Response(response) = received else { return false };
        let status = response.status;
        let gateway = matches!(
            status,
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
        );
        gateway && self.repeatable && self.is_whole() && self.attempts < self.cluster.max_attempts
    }

    /// What an outcome says about the endpoint (DESIGN §7.3).
    fn judge(&self, outcome: &Result<Received, (Rejection, bool)>) -> Outcome {
        match outcome {
            Ok(Received::Upgraded(..)) => Outcome::Success,
            Ok(Received::Response(response)) => {
                let status = response.status;
                // An infrar behind the endpoint that refuses the caller says nothing about the service.
                let counts = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED;
                if counts { Outcome::Failure } else { Outcome::Success }
            }
            Err((
                Rejection::ConnectFailed { .. }
                | Rejection::TlsFailed { .. }
                | Rejection::UpstreamReset { .. }
                | Rejection::BadResponse { .. }
                | Rejection::Deadline { .. },
                _,
            )) => Outcome::Failure,
            Err(_) => Outcome::Unknown,
        }
    }

    fn settle(
        &self,
        target: &Target,
        chosen: Chosen,
        outcome: Outcome,
        begun: Instant,
        now: Instant,
    ) {
        let tick = self.ward.tick(now);
        let vitals = &target.vitals;
        match outcome {
            Outcome::Success => vitals.latency.observe(now.duration_since(begun), tick),
            Outcome::Failure => vitals.latency.penalize(PENALTY, tick),
            Outcome::Unknown => {}
        }
        vitals.breaker.settle(chosen.pass, outcome, self.cluster.aim.circuit(), tick);
    }
}

static ROOT: std::sync::LazyLock<PathAndQuery> =
    std::sync::LazyLock::new(|| PathAndQuery::from_static("/"));

/// Whether a kept connection was found to be closed before it said a word.
fn is_dead(failure: &Failure) -> bool {
    !failure.answered && matches!(failure.error, SendError::Closed | SendError::Io(_))
}

fn refuse_connect(cluster: &Cluster, error: &ConnectError) -> Rejection {
    let service = cluster.service.clone();
    match error {
        ConnectError::Resolve => {
            Rejection::ConnectFailed { service, why: "its name does not resolve", timeout: false }
        }
        ConnectError::Own => {
            Rejection::AddressNotAllowed("the address is one of the proxy's own listeners")
        }
        ConnectError::Refused(_) => {
            Rejection::ConnectFailed { service, why: "refused", timeout: false }
        }
        ConnectError::Timeout => {
            Rejection::ConnectFailed { service, why: "timed out", timeout: true }
        }
        ConnectError::Certificate(_) => Rejection::TlsFailed {
            service,
            why: "its certificate is not accepted",
            certificate: true,
        },
        ConnectError::Tls(_) => {
            Rejection::TlsFailed { service, why: "the handshake failed", certificate: false }
        }
        ConnectError::Protocol | ConnectError::WantsH2 => Rejection::TlsFailed {
            service,
            why: "it does not speak the HTTP version that is needed",
            certificate: false,
        },
    }
}
