//! Attempts: choose, lease, send; try again where that is safe; all within one deadline.
//!
//! What may be sent again (DESIGN §7.3): whatever the endpoint certainly has not seen, and idempotent requests whose
//! body is still here. Retries after the first attempt spend a budget, so that a service in trouble is not buried
//! under its callers' patience.

use std::{
    cell::RefCell, future::poll_fn, pin::pin, rc::Rc, sync::Arc, task::Poll, time::Duration,
};

use http::{HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header, uri::PathAndQuery};
use tokio::time::Instant;

use crate::{
    balance::{Chosen, Flight, NoChoice, Outcome, Tried},
    identity::Grant,
    net::Stream,
    proxy::{
        complaint,
        patience::Patience,
        record::Record,
        reject::Rejection,
        trial::Trial,
        view::{Cluster, Target, Ward},
    },
    runtime::Alarm,
    upstream::{ConnectError, Failure, Lease, Outgoing, Progress, Received, SendError, Want},
    wire::{Body, BodyError, Fields, Interim, Replay, Request},
};

/// Without any timeout in the settings an attempt may still not last for ever.
const FAR: Duration = Duration::from_secs(24 * 3600);

/// A request ready to be sent.
pub(super) struct Dispatch<'a> {
    /// The request, with end-to-end headers; `host` and credentials are put in per attempt. Boxed, as it is from its
    /// first stage on: what every stage hands to the next is then a pointer.
    pub request: Box<Request>,
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
    /// Whether a body that streams has been given to an attempt for good.
    spent: bool,
    /// A body that streams and may have to be sent again, once an attempt has it.
    replay: Option<Replay>,
    tried: Tried,
    attempts: u32,
}

/// What one attempt came to.
enum Attempt {
    Received(Received),
    /// An answer that another attempt might better, after `pause` if the service says when.
    Held {
        received: Received,
        target: Rc<Target>,
        pause: Option<Duration>,
    },
    /// It failed; `again` says whether another may follow.
    Failed {
        rejection: Rejection,
        again: bool,
    },
}

impl<'a> Forward<'a> {
    /// A request on its way to `cluster` that has been prepared at `begun`. Without a grant there is none.
    pub(super) fn new(
        cluster: &'a Rc<Cluster>,
        ward: &'a Ward,
        dispatch: Dispatch<'a>,
        record: &'a mut Record,
        begun: Instant,
        grant: &Grant,
    ) -> Self {
        if grant.is_learned() {
            record.learned();
        }
        let limit = cluster.timeouts.request.unwrap_or(FAR);
        let deadline = record.started() + limit;
        let repeatable = repeatable(&dispatch.request.method, &dispatch.request.fields);
        Self {
            cluster,
            ward,
            dispatch,
            record,
            begun,
            deadline,
            repeatable,
            spent: false,
            replay: None,
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
        grant: &Grant,
    ) -> Result<Stream, Rejection> {
        let interim = Interim::default();
        let alarm = RefCell::default();
        let dispatch = Dispatch {
            request: Box::new(Request {
                method: Method::CONNECT,
                uri: Uri::default(),
                version: Version::HTTP_11,
                fields: Fields::new(),
                body: Body::Empty,
            }),
            bearer: None,
            upgrade: true,
            grpc: false,
            interim: &interim,
            alarm: &alarm,
        };
        let begun = Instant::now();
        let mut forward = Forward::new(cluster, ward, dispatch, record, begun, grant);
        cluster.budget.deposit(ward.tick(begun));
        loop {
            forward.attempts += 1;
            let begun = Instant::now();
            let (target, chosen) = forward.choose(begun)?;
            forward.record.attempt(&target.id, target.mode, begun);
            let flight = Flight::begin(Arc::clone(&target.vitals));
            // How long connecting takes says nothing about answers.
            let trial = Trial::begin(ward, cluster.aim.circuit(), &target.vitals, chosen.pass);
            let limit = forward.deadline.min(begun + cluster.timeouts.connect);
            let opened = target.tunnels().open_tunnel(limit).await;
            let now = Instant::now();
            forward.record.waited(now);
            let outcome = if opened.is_ok() { Outcome::Success } else { Outcome::Failure };
            if let Some(state) = trial.settle(outcome, now) {
                complaint::circuit(cluster, &target, state);
            }
            match opened {
                Ok(stream) => {
                    forward.record.carried_by(flight);
                    return Ok(stream);
                }
                Err(error) => {
                    complaint::no_connection(cluster, &target, &error);
                    if !forward.may_go_on(None).await {
                        return Err(refuse_connect(cluster, &error));
                    }
                }
            }
        }
    }

    /// Sends it, and again where that is safe.
    ///
    /// # Errors
    /// The [`Rejection`] of the last attempt.
    pub(super) async fn send(mut self) -> Result<Received, Rejection> {
        if self.cluster.targets.is_empty() {
            let (service, why) = (self.cluster.callee.clone(), self.cluster.absence);
            return Err(Rejection::NoHealthyEndpoint { service, why });
        }
        self.cluster.budget.deposit(self.ward.tick(self.record.started()));
        let begun = self.begun;
        match self.attempt(begun).await? {
            Attempt::Received(received) => Ok(received),
            // Boxed, like everything that most requests never do.
            first @ (Attempt::Held { .. } | Attempt::Failed { .. }) => {
                Box::pin(self.go_on(first)).await
            }
        }
    }

    /// Tries again, as often as that is allowed. The service's own answer, if there was one, is better than any refusal of
    /// ours.
    async fn go_on(mut self, first: Attempt) -> Result<Received, Rejection> {
        let mut outcome = Ok(first);
        let mut held = None;
        loop {
            match outcome {
                Ok(Attempt::Received(received)) => return Ok(received),
                Ok(Attempt::Held { received, target, pause }) => {
                    if !self.may_go_on(pause).await {
                        return Ok(self.give(received, &target));
                    }
                    held = Some((received, target));
                }
                Ok(Attempt::Failed { again: true, .. }) if self.may_go_on(None).await => {}
                Ok(Attempt::Failed { rejection, .. }) | Err(rejection) => {
                    let (received, target) = held.ok_or(rejection)?;
                    return Ok(self.give(received, &target));
                }
            }
            outcome = self.attempt(Instant::now()).await;
        }
    }

    /// Gives the client an answer that was held back. What another attempt took of the body is lost to this endpoint: its
    /// upload stands still.
    fn give(&mut self, received: Received, target: &Target) -> Received {
        self.record.answered_by(&target.id, target.mode);
        self.record.carried_by(Flight::begin(Arc::clone(&target.vitals)));
        received
    }

    /// Whether there is an attempt, a budget and time left; pauses before the next, as long as the service asked for.
    async fn may_go_on(&mut self, asked: Option<Duration>) -> bool {
        let now = Instant::now();
        if self.attempts >= self.cluster.max_attempts {
            return false;
        }
        let (base, max) = self.cluster.backoff;
        let steps = self.attempts.saturating_sub(1).min(16);
        let longest = base.saturating_mul(1 << steps).min(max);
        let pause = asked.unwrap_or_else(|| longest.mul_f64(fastrand::f64()));
        // An endpoint may ask for any pause, also for one that no clock can count.
        let left = self.deadline.saturating_duration_since(now);
        if pause >= left || !self.cluster.budget.withdraw(self.ward.tick(now)) {
            return false;
        }
        // The first retry goes elsewhere at once when there is an elsewhere.
        if asked.is_some() || self.attempts > 1 || self.cluster.targets.len() == 1 {
            self.record.pauses(now);
            tokio::time::sleep(pause).await;
            self.record.waited(Instant::now());
        }
        true
    }

    async fn attempt(&mut self, begun: Instant) -> Result<Attempt, Rejection> {
        self.attempts += 1;
        let (target, chosen) = self.choose(begun)?;
        self.record.attempt(&target.id, target.mode, begun);
        let flight = Flight::begin(Arc::clone(&target.vitals));
        let circuit = self.cluster.aim.circuit();
        let mut trial = Trial::begin(self.ward, circuit, &target.vitals, chosen.pass);
        trial.awaits(Some(begun));
        let outcome = self.exchange(&target, begun, &mut trial).await;
        let now = Instant::now();
        self.record.waited(now);
        if let Some(state) = trial.settle(judge(&outcome), now) {
            complaint::circuit(self.cluster, &target, state);
        }
        Ok(match outcome {
            Ok(received) => match self.betterable(&received) {
                // Held back: returned after all when there is no better one.
                Some(pause) => Attempt::Held { received, target, pause },
                None => {
                    self.record.carried_by(flight);
                    Attempt::Received(received)
                }
            },
            Err((rejection, again)) => Attempt::Failed { rejection, again },
        })
    }

    fn choose(&mut self, now: Instant) -> Result<(Rc<Target>, Chosen), Rejection> {
        let cluster = self.cluster;
        let service = || cluster.callee.clone();
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

    /// Leases a connection and sends. A kept connection that turns out to be dead is replaced once, by a new one: that
    /// says nothing about the endpoint.
    async fn exchange(
        &mut self,
        target: &Target,
        begun: Instant,
        trial: &mut Trial<'_>,
    ) -> Result<Received, (Rejection, bool)> {
        let attempt = self.cluster.timeouts.attempt.unwrap_or(FAR);
        let deadline = self.deadline.min(begun + attempt);
        let body = self.has_stream();
        // A body that an earlier attempt has seen to its end is here: from then on the clock runs.
        let streams = body && !self.replay.as_ref().is_some_and(Replay::has_ended);
        let mut want = Want {
            h2: self.dispatch.grpc,
            h1: self.dispatch.upgrade,
            // What streams may not be there a second time: such a connection is looked at more closely.
            repeatable: self.repeatable && !body,
            since: None,
        };
        let mut now = begun;
        loop {
            let limit = deadline.min(now + self.cluster.timeouts.connect);
            let lease = match target.pool.kept(want, now) {
                Some(lease) if self.attempts == 1 => lease,
                // Boxed, like everything that most requests never do: the room for it would be in every future.
                kept => Box::pin(self.lease(target, want, kept, limit)).await?,
            };
            let stale = lease.may_be_stale() && want.since.is_none();
            if matches!(self.dispatch.request.body, Body::Stream(_)) {
                self.keep(&lease);
            }
            let witness = lease.witness();
            let mut patience = self.patience(streams, deadline);
            trial.awaits((!streams).then_some(begun));
            let sent = self.send_on(lease, target, &mut patience, trial).await;
            if let (true, Some(uploaded)) = (streams, patience.uploaded) {
                self.deadline = uploaded + self.cluster.timeouts.request.unwrap_or(FAR);
            }
            match sent {
                Some(Ok(received)) => return Ok(received),
                Some(Err(failure)) => {
                    let ended = Instant::now();
                    let prompt = ended.duration_since(now) <= target.pool.finds_out_within();
                    if !stale || !self.is_whole() || !self.is_no_fault(&failure, prompt) {
                        return Err(self.refuse(&failure));
                    }
                    // The next one may be as dead as this one.
                    (now, want.since) = (ended, Some(ended));
                }
                None => {
                    if let Some(witness) = witness {
                        witness.in_vain();
                    }
                    return Err(self.overdue(&patience, deadline));
                }
            }
        }
    }

    /// Sends on `lease` and waits; `None` when the endpoint has had its time.
    async fn send_on(
        &mut self,
        lease: Lease,
        target: &Target,
        patience: &mut Patience,
        trial: &mut Trial<'_>,
    ) -> Option<Result<Received, Failure>> {
        let interim = self.dispatch.interim;
        let alarm = self.dispatch.alarm;
        let progress = Progress::new(self.has_stream());
        let mut sending = pin!(lease.send(self.outgoing(target, &progress), interim));
        poll_fn(|cx| {
            if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                return Poll::Ready(Some(sent));
            }
            let over = patience.poll(&progress, alarm, cx);
            if patience.uploaded.is_some() {
                trial.awaits(patience.uploaded);
            }
            over.map(|()| None)
        })
        .await
    }

    /// A connection, where none is kept or time has passed since the token was taken: with one that is still good.
    async fn lease(
        &mut self,
        target: &Target,
        want: Want,
        kept: Option<Lease>,
        limit: Instant,
    ) -> Result<Lease, (Rejection, bool)> {
        let lease = match kept {
            Some(lease) => lease,
            None => target.pool.lease(want, limit).await.map_err(|error| {
                complaint::no_connection(self.cluster, target, &error);
                (refuse_connect(self.cluster, &error), true)
            })?,
        };
        self.renew().await.map_err(|rejection| (rejection, false))?;
        Ok(lease)
    }

    /// Attempts and connecting take time, in which a token may have come to its end: an expired one is never sent.
    async fn renew(&mut self) -> Result<(), Rejection> {
        let (Some(bearer), Some(slot)) = (&mut self.dispatch.bearer, &self.cluster.token) else {
            return Ok(());
        };
        if let Ok(Ok(fresh)) = tokio::time::timeout_at(self.deadline, slot.bearer()).await {
            bearer.clone_from(fresh.header());
            return Ok(());
        }
        let service = self.cluster.service.clone();
        let why = "it came to its end while the call was on its way";
        Err(Rejection::TokenUnavailable { service, why })
    }

    /// How long an attempt that ends at `deadline` waits; one whose body streams does not count the time for that.
    fn patience(&self, streams: bool, deadline: Instant) -> Patience {
        let timeouts = &self.cluster.timeouts;
        let limit = timeouts.request.unwrap_or(FAR).min(timeouts.attempt.unwrap_or(FAR));
        let stall = self.record.flow().limit();
        let deadline = (!streams).then_some(deadline);
        Patience::new(deadline, limit, stall)
    }

    /// The refusal of an attempt whose endpoint had its time, and whether another may follow.
    fn overdue(&self, patience: &Patience, deadline: Instant) -> (Rejection, bool) {
        let service = self.cluster.callee.clone();
        let limit = match (patience.deadline, patience.uploaded) {
            (None, _) => patience.stall,
            (Some(_), Some(_)) => patience.limit,
            (Some(deadline), None) => deadline.duration_since(self.record.started()),
        };
        let again = self.repeatable && self.is_whole() && deadline < self.deadline;
        (Rejection::Deadline { service, limit }, again)
    }

    /// Whether a kept connection was found to be at its end: that says nothing about the endpoint, and the request can
    /// be sent on another. What does not fail `prompt`ly was being worked on.
    fn is_no_fault(&self, failure: &Failure, prompt: bool) -> bool {
        match failure.error {
            SendError::Gone => true,
            SendError::Closed | SendError::Io(_) => self.repeatable && !failure.answered && prompt,
            SendError::Refused
            | SendError::Reset
            | SendError::BadResponse(_)
            | SendError::RequestBody(_)
            | SendError::BadRequest => false,
        }
    }

    /// Whether there is a body that streams, or one that did before it was kept.
    fn has_stream(&self) -> bool {
        self.replay.is_some() || matches!(self.dispatch.request.body, Body::Stream(_))
    }

    /// Whether the body can still be sent from its beginning.
    fn is_whole(&self) -> bool {
        self.replay.as_ref().map_or(!self.spent, Replay::is_whole)
    }

    /// Keeps what passes of a body that streams, where the request might be sent again after it met `lease`: it is
    /// repeatable, or it goes where the peer can say that it has not seen it.
    fn keep(&mut self, lease: &Lease) {
        let more = self.cluster.max_attempts > 1;
        let unseen = matches!(lease, Lease::H2 { .. });
        let again =
            (more && (self.repeatable || unseen)) || (self.repeatable && lease.may_be_stale());
        match std::mem::take(&mut self.dispatch.request.body) {
            Body::Stream(stream) if again => self.replay = Some(Replay::new(stream)),
            body @ (Body::Empty | Body::Full(_) | Body::Stream(_)) => {
                self.dispatch.request.body = body
            }
        }
    }

    /// The request as this target gets it.
    fn outgoing<'b>(&'b mut self, target: &'b Target, progress: &'b Progress) -> Outgoing<'b> {
        let fields = &mut self.dispatch.request.fields;
        match &target.host {
            Some(host) => fields.set(header::HOST, host.clone()),
            None if fields.contains(&header::HOST) => {}
            // HTTP/1.0 needs no host, HTTP/1.1 does.
            None => {
                if let Ok(host) = HeaderValue::from_str(target.authority.as_str()) {
                    fields.append(header::HOST, host);
                }
            }
        }
        if let Some(bearer) = &self.dispatch.bearer {
            // A token goes only where it belongs, whatever an earlier attempt was given.
            if target.takes_token {
                fields.set(header::AUTHORIZATION, bearer.clone());
            } else {
                fields.remove(&header::AUTHORIZATION);
            }
        }
        let body = match (&self.dispatch.request.body, &self.replay) {
            (Body::Empty, None) => Body::Empty,
            (Body::Full(bytes), _) => Body::Full(bytes.clone()),
            (Body::Empty, Some(replay)) => replay.body(),
            (Body::Stream(_), _) => {
                self.spent = true;
                std::mem::take(&mut self.dispatch.request.body)
            }
        };
        Outgoing {
            method: &self.dispatch.request.method,
            scheme: &target.scheme,
            authority: &target.authority,
            target: self.dispatch.request.uri.path_and_query().unwrap_or(&ROOT),
            fields: &self.dispatch.request.fields,
            body,
            upgrade: self.dispatch.upgrade,
            progress,
        }
    }

    /// What a failed exchange means for the client, and whether another may follow.
    fn refuse(&self, failure: &Failure) -> (Rejection, bool) {
        let service = self.cluster.callee.clone();
        let whole = self.is_whole();
        tracing::debug!(
            %service, error = &failure.error as &dyn std::error::Error, answered = failure.answered,
            "an exchange with an endpoint failed"
        );
        let rejection = match &failure.error {
            SendError::Refused
            | SendError::Gone
            | SendError::Closed
            | SendError::Reset
            | SendError::Io(_) => {
                let spent = self.repeatable && !whole && !failure.answered;
                Rejection::UpstreamReset { service, spent }
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

    /// Whether another attempt might do better with a request that was answered badly, and after which pause if the
    /// service asks for one (DESIGN §7.3).
    fn betterable(&self, received: &Received) -> Option<Option<Duration>> {
        let Received::Response(response) = received else { return None };
        let pause = match response.status {
            StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => None,
            StatusCode::TOO_MANY_REQUESTS => Some(retry_after(&response.fields)?),
            _ => return None,
        };
        let again = self.repeatable && self.is_whole() && self.attempts < self.cluster.max_attempts;
        again.then_some(pause)
    }
}

/// What an outcome says about the endpoint (DESIGN §7.3).
fn judge(outcome: &Result<Received, (Rejection, bool)>) -> Outcome {
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

static ROOT: std::sync::LazyLock<PathAndQuery> =
    std::sync::LazyLock::new(|| PathAndQuery::from_static("/"));

/// When a service says that it will do better (RFC 9110 §10.2.3); it may also name a date, which nobody does here.
fn retry_after(fields: &Fields) -> Option<Duration> {
    let seconds = fields.get(&header::RETRY_AFTER)?.to_str().ok()?;
    seconds.trim().parse().ok().map(|seconds| Duration::from_secs(seconds).min(FAR))
}

fn refuse_connect(cluster: &Cluster, error: &ConnectError) -> Rejection {
    let service = cluster.callee.clone();
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
