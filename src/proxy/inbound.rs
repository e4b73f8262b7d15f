//! The inbound story: somebody calls the application behind us.
//!
//! Who is it, may it, and only then: pass. A request without a grant never reaches the application, and identity
//! headers that it brings itself are removed before anything is decided.

use std::{cell::RefCell, collections::HashSet, rc::Rc};

use http::{HeaderValue, header};

use crate::{
    identity::{Action, Claims, Grant, Refused, Strictness, TokenCache, TokenFault, admit},
    model::{ScopeSet, ServiceName},
    proxy::{
        forward::Forward,
        headers,
        record::Record,
        reject::Rejection,
        settings::{App, InboundSettings},
        view::{Cluster, View},
        walk::{self, Walk},
        worker::{Answer, Call, Worker},
    },
    runtime::Clock,
    upstream::Received,
    wire::{Fields, Request},
};

/// Finds out who calls and what it may do; shared by sidecar and edge.
pub(super) struct Gate {
    worker: Rc<Worker>,
    settings: InboundSettings,
    cache: Rc<RefCell<TokenCache>>,
    /// Callers of which the log knows what they would be refused, were the project not learning.
    told: RefCell<HashSet<(Box<str>, ServiceName)>>,
}

/// So many callers are told of; the log is for people.
const MOST_TOLD: usize = 1000;

/// Who was let in.
pub(super) struct Admitted {
    /// Proof of it.
    pub grant: Grant,
    /// What the token said; `None` on a public path.
    pub claims: Option<Rc<Claims>>,
}

impl Admitted {
    /// Tells the application who calls; what a caller said of itself has gone before.
    pub(super) fn introduce(&self, fields: &mut Fields) {
        if let Some(claims) = &self.claims {
            fields.set(headers::CALLER.clone(), claims.caller_header().clone());
            fields.set(headers::CLAIMS.clone(), claims.claims_header().clone());
            if let Some(scopes) = self.grant.scopes() {
                fields.set(headers::SCOPES.clone(), scopes.clone());
            }
        }
    }
}

impl Gate {
    /// The gate of one listener on one worker.
    #[must_use]
    pub(super) fn new(worker: Rc<Worker>, settings: InboundSettings) -> Self {
        let cache = Rc::new(RefCell::new(TokenCache::new(settings.token_cache)));
        Self { worker, settings, cache, told: RefCell::default() }
    }

    /// The gate with other settings. What was verified stays verified: rules are asked for each request.
    #[must_use]
    pub(super) fn with(&self, settings: InboundSettings) -> Self {
        if settings.token_cache != self.settings.token_cache {
            return Self::new(Rc::clone(&self.worker), settings);
        }
        let (worker, cache) = (Rc::clone(&self.worker), Rc::clone(&self.cache));
        Self { worker, settings, cache, told: RefCell::new(self.told.borrow().clone()) }
    }

    /// Lets a request for `callee` in, or says why not.
    ///
    /// # Errors
    /// The [`Rejection`].
    pub(super) async fn admit(
        &self,
        request: &Request,
        callee: &ServiceName,
        view: Option<&View>,
        record: &mut Record,
    ) -> Result<Admitted, Rejection> {
        let action = self.settings.rules.action(&request.method, request.uri.path());
        if let Some(grant) = action.open() {
            record.belongs_to(self.worker.inbound_desk.of_caller("", callee));
            return Ok(Admitted { grant, claims: None });
        }
        let claims = self.claims(&request.fields, callee).await?;
        let caller = claims.caller().as_str();
        record.belongs_to(self.worker.inbound_desk.of_caller(caller, callee));
        let grant = self.grant(&claims, action, callee, view)?;
        Ok(Admitted { grant, claims: Some(claims) })
    }

    fn grant(
        &self,
        claims: &Claims,
        action: Action<'_>,
        callee: &ServiceName,
        view: Option<&View>,
    ) -> Result<Grant, Rejection> {
        // A caller of another issuer has no row, whatever its subject is called.
        let granted = view
            .zip(claims.caller().ours())
            .and_then(|(view, caller)| view.catalog().project.granted(caller, callee));
        let listed = view
            .filter(|_| !claims.is_ours())
            .and_then(|view| view.catalog().project.services.get(callee))
            .map(|service| &service.scopes);
        let strictness = view.map_or(Strictness::Enforce, |view| view.strictness());
        let grant = admit(claims, action, granted, listed, strictness);
        if grant.as_ref().is_ok_and(Grant::is_learned) {
            self.learned(claims, action, callee, granted);
        }
        grant.map_err(|refused| match refused {
            Refused::NotPermitted { caller } => {
                Rejection::NotPermitted { caller, callee: callee.clone() }
            }
            Refused::ScopeMissing { caller, missing } => {
                Rejection::ScopeMissing { caller, callee: callee.clone(), missing }
            }
            Refused::Unlisted => Rejection::Unlisted { callee: callee.clone() },
            Refused::Path(_fault) => {
                Rejection::BadRequest("the path can be read in more than one way; write it plainly")
            }
        })
    }

    /// Says once of each caller what would be refused if the project did not learn.
    fn learned(
        &self,
        claims: &Claims,
        action: Action<'_>,
        callee: &ServiceName,
        granted: Option<&ScopeSet>,
    ) {
        let mut told = self.told.borrow_mut();
        let key = (claims.caller().as_str().into(), callee.clone());
        if told.len() >= MOST_TOLD || !told.insert(key) {
            return;
        }
        if let Err(refused) = admit(claims, action, granted, None, Strictness::Enforce) {
            tracing::info!(%callee, would_be_refused = %refused, "a call that enforcing permissions would refuse");
        }
    }

    /// Who is it? The token is verified, or remembered as verified.
    async fn claims(&self, fields: &Fields, callee: &ServiceName) -> Result<Rc<Claims>, Rejection> {
        let token = bearer(fields)?;
        match self.verified(token, callee) {
            Ok(claims) => Ok(claims),
            Err(fault @ TokenFault::UnknownKey { .. }) => {
                // The key may be newer than our set of them: one more look, once it has been fetched.
                let found = Box::pin(self.worker.verifier().refresh(&fault)).await;
                if !found {
                    return Err(refuse(callee, &fault));
                }
                self.verified(token, callee).map_err(|fault| refuse(callee, &fault))
            }
            Err(fault) => Err(refuse(callee, &fault)),
        }
    }

    fn verified(&self, token: &[u8], callee: &ServiceName) -> Result<Rc<Claims>, TokenFault> {
        let now = Clock::system().unix_seconds();
        let verifier = self.worker.verifier();
        self.cache.borrow_mut().verify(&verifier, token, &[callee.as_str()], now)
    }

    /// Puts on what the application may rely on.
    pub(super) fn undress(&self, fields: &mut Fields, admitted: &Admitted) {
        admitted.introduce(fields);
        if !self.settings.forward_authorization {
            fields.remove(&header::AUTHORIZATION);
        }
    }
}

/// The one bearer token of a request (RFC 6750 §2.1).
fn bearer(fields: &Fields) -> Result<&[u8], Rejection> {
    let mut values = fields.all(&header::AUTHORIZATION);
    let value = values.next().ok_or(Rejection::TokenMissing)?.as_bytes();
    if values.next().is_some() {
        return Err(Rejection::TokenInvalid("there is more than one authorization header"));
    }
    let (scheme, token) = value.split_at_checked(7).ok_or(Rejection::TokenMissing)?;
    if !scheme.eq_ignore_ascii_case(b"bearer ") {
        return Err(Rejection::TokenMissing);
    }
    let token = token.trim_ascii();
    if token.is_empty() { Err(Rejection::TokenMissing) } else { Ok(token) }
}

fn refuse(callee: &ServiceName, fault: &TokenFault) -> Rejection {
    tracing::debug!(%callee, reason = fault.label(), "a token was refused");
    match fault {
        TokenFault::Missing => Rejection::TokenMissing,
        TokenFault::Expired => Rejection::TokenExpired,
        TokenFault::Oversized
        | TokenFault::Malformed
        | TokenFault::HeaderNotAllowed
        | TokenFault::AlgorithmNotAllowed
        | TokenFault::UnknownKey { .. }
        | TokenFault::BadSignature
        | TokenFault::WrongIssuer
        | TokenFault::WrongAudience
        | TokenFault::NoExpiry
        | TokenFault::NotYetValid
        | TokenFault::NoSubject
        | TokenFault::Type => Rejection::TokenInvalid(fault.label()),
    }
}

/// Answers calls for the application behind this proxy.
pub(super) struct Inbound {
    worker: Rc<Worker>,
    gate: Gate,
    callee: ServiceName,
    app: Rc<Cluster>,
}

impl Inbound {
    /// The way in to `app`.
    #[must_use]
    pub(super) fn new(worker: Rc<Worker>, settings: InboundSettings, app: Rc<Cluster>) -> Self {
        let callee = worker.me.clone();
        let gate = Gate::new(Rc::clone(&worker), settings);
        Self { worker, gate, callee, app }
    }

    /// The way in with other settings, to `app`.
    #[must_use]
    pub(super) fn with(&self, settings: InboundSettings, app: Rc<Cluster>) -> Self {
        let (worker, callee) = (Rc::clone(&self.worker), self.callee.clone());
        Self { worker, gate: self.gate.with(settings), callee, app }
    }

    /// Where it leads, if that is still `app`.
    #[must_use]
    pub(super) fn leads_to(&self, app: &App) -> Option<Rc<Cluster>> {
        (self.gate.settings.app.as_ref() == Some(app)).then(|| Rc::clone(&self.app))
    }

    /// Answers one request from outside; a refusal is an answer too.
    pub(super) async fn answer(&self, mut call: Call<'_>) -> Answer {
        let mut walk = Walk::begin(&self.worker.inbound_desk, &mut call.request, call.flow);
        let outcome = self.carry(call, &mut walk).await;
        walk.end(outcome)
    }

    async fn carry(&self, mut call: Call<'_>, walk: &mut Walk) -> Result<Received, Rejection> {
        // Has it been here before?
        let host = walk::enter(&self.worker.via_in, &mut call.request)?;
        // Who is it, and may it?
        let (view, record) = (self.worker.view().ok(), &mut walk.record);
        let admitted =
            self.gate.admit(&call.request, &self.callee, view.as_deref(), record).await?;
        if let Some(answer) = walk::last_stop(&mut call.request) {
            return Ok(answer);
        }
        // What does the application see?
        self.gate.undress(&mut call.request.fields, &admitted);
        keep_host(&mut call.request, &host);
        let dispatch = walk.dispatch(call, &host, None);
        let (ward, record, grant) = (&self.worker.ward, &mut walk.record, &admitted.grant);
        let begun = record.started();
        Forward::new(&self.app, ward, dispatch, record, begun, grant).send().await
    }
}

/// Gives a request the `host` that HTTP/2, or an absolute target, said elsewhere.
pub(super) fn keep_host(request: &mut Request, host: &HeaderValue) {
    if request.uri.authority().is_some() {
        request.fields.set(header::HOST, host.clone());
    }
}
