//! The inbound story: somebody calls the application behind us.
//!
//! Who is it, may it, and only then: pass. A request without a grant never reaches the application, and identity
//! headers that it brings itself are removed before anything is decided.

use std::{cell::RefCell, rc::Rc};

use http::{HeaderValue, Uri, header};

use crate::{
    identity::{Action, Claims, Grant, Refused, TokenCache, TokenFault, admit},
    model::ServiceName,
    proxy::{
        forward::{Dispatch, Forward},
        headers,
        record::Record,
        reject::Rejection,
        settings::InboundSettings,
        view::{Cluster, View},
        worker::{Answer, Call, Peer, Worker, refused, relayed},
    },
    runtime::Clock,
    upstream::Received,
    wire::{Fields, Request},
};

/// Finds out who calls and what it may do; shared by sidecar and edge.
pub(super) struct Gate {
    worker: Rc<Worker>,
    settings: InboundSettings,
    cache: RefCell<TokenCache>,
}

/// Who was let in.
pub(super) struct Admitted {
    /// Proof of it.
    pub grant: Grant,
    /// What the token said; `None` on a public path.
    pub claims: Option<Rc<Claims>>,
}

impl Gate {
    /// The gate of one listener on one worker.
    #[must_use]
    pub(super) fn new(worker: Rc<Worker>, settings: InboundSettings) -> Self {
        let cache = RefCell::new(TokenCache::new(settings.token_cache));
        Self { worker, settings, cache }
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
        let grant = Self::grant(&claims, action, callee, view)?;
        Ok(Admitted { grant, claims: Some(claims) })
    }

    fn grant(
        claims: &Claims,
        action: Action<'_>,
        callee: &ServiceName,
        view: Option<&View>,
    ) -> Result<Grant, Rejection> {
        let caller = claims.caller();
        let granted = view.and_then(|view| {
            let name: &str = caller.as_str();
            view.catalog.project.permissions.get(name)?.get(callee)
        });
        let strictness =
            view.map_or(crate::identity::Strictness::Enforce, |view| view.strictness.get());
        admit(claims, action, granted, strictness).map_err(|refused| match refused {
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
        headers::strip_identity(fields);
        if let Some(claims) = &admitted.claims {
            fields.set(headers::CALLER.clone(), claims.caller_header().clone());
            fields.set(headers::CLAIMS.clone(), claims.claims_header().clone());
            if let Some(scopes) = admitted.grant.scopes() {
                fields.set(headers::SCOPES.clone(), scopes.clone());
            }
        }
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
        let callee = worker.settings.service.clone();
        let gate = Gate::new(Rc::clone(&worker), settings);
        Self { worker, gate, callee, app }
    }

    /// Answers one request from outside; a refusal is an answer too.
    pub(super) async fn answer(&self, mut call: Call<'_>) -> Answer {
        let desk = &self.worker.inbound_desk;
        let mut record = desk.open(&call.request.method, &call.request.uri, call.flow);
        let grpc = headers::is_grpc(&call.request.fields);
        let id = headers::identify(&mut call.request.fields);
        match self.carry(call, &id, grpc, &mut record).await {
            Ok(received) => relayed(received, record),
            Err(rejection) => refused(&rejection, Some(&id), grpc, record),
        }
    }

    async fn carry(
        &self,
        call: Call<'_>,
        id: &HeaderValue,
        grpc: bool,
        record: &mut Record,
    ) -> Result<Received, Rejection> {
        let mut request = call.request;
        // Known before anything can refuse it: its line in the log says which request that was.
        record.identified(id, headers::continue_trace(&mut request.fields));
        // Has it been here before?
        self.worker.via_in.pass(request.version, &mut request.fields)?;
        // Who is it, and may it?
        let view = self.worker.view().ok();
        let admitted = self.gate.admit(&request, &self.callee, view.as_deref(), record).await?;
        // What does the application see?
        let upgrade = headers::upgrade(&request.method, request.version, &request.fields);
        headers::strip_hop_by_hop(&mut request.fields);
        self.gate.undress(&mut request.fields, &admitted);
        arrived(&request.uri, &mut request.fields, call.peer, upgrade.as_ref());
        let dispatch = Dispatch {
            method: request.method,
            uri: request.uri,
            fields: request.fields,
            body: request.body,
            bearer: None,
            upgrade: upgrade.is_some(),
            grpc,
            interim: call.interim,
            alarm: call.alarm,
        };
        let begun = record.started();
        Forward::new(&self.app, &self.worker.ward, dispatch, record, begun).send().await
    }
}

/// Says where a request came from, and gives it the `host` that HTTP/2 says as `:authority`.
pub(super) fn arrived(uri: &Uri, fields: &mut Fields, peer: &Peer, upgrade: Option<&HeaderValue>) {
    if let Some(authority) = uri.authority()
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        fields.set(header::HOST, host);
    }
    let host = fields.get(&header::HOST).cloned();
    let host = host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or_default();
    peer.forwarded.add(fields, host);
    if let Some(protocol) = upgrade {
        fields.set(header::CONNECTION, HeaderValue::from_static("upgrade"));
        fields.set(header::UPGRADE, protocol.clone());
    }
}
