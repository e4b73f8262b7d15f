//! Method and path → operation: the one table of the control plane, and what holds for all of it.

use std::{
    any::Any,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    BoxError, Extension, Router,
    body::Body,
    error_handling::HandleErrorLayer,
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CACHE_CONTROL, PRAGMA},
};
use serde::{Deserialize, Serialize};
use serde_json::json as literal;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, limit::GlobalConcurrencyLimitLayer};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    api::{CATALOG_READ, KEYS_WRITE, TokenReply},
    control::{
        guard::Guard,
        intake::Intake,
        registry::Registry,
        reject::{Rejection, TokenRefusal, json},
        services::{self, Watcher},
        throttle::Throttle,
        tokens::{Desk, Proof, Question},
    },
    identity::{Mint, OwnClaims},
    runtime::Clock,
};

/// Questions of the API that are answered at once; more are refused, not queued.
const CONCURRENCY: usize = 1024;
/// How long an answer may take to begin.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long others may keep the key set; shorter than the lead of a new key.
const JWKS_CACHE: &str = "public, max-age=300";

/// What the operations share.
pub(super) struct Shared {
    pub(super) registry: Registry,
    pub(super) mint: Mint,
    pub(super) intake: Intake,
    pub(super) throttle: Throttle,
    pub(super) clock: Clock,
    /// Cancelled when the control plane ends.
    pub(super) end: CancellationToken,
}

/// Where a request came from.
#[derive(Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

type App = State<Arc<Shared>>;

/// The table.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    let limits = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(too_much))
        .load_shed()
        // The layer is applied to each route; a plain limit would be one per route.
        .layer(GlobalConcurrencyLimitLayer::new(CONCURRENCY))
        .timeout(DEADLINE);
    Router::new()
        .route("/v1/keys/rotate", post(rotate))
        .route("/v1/catalog", get(catalog))
        .route("/v1/watch", get(watch))
        .route("/v1/services", get(list))
        .route("/v1/services/{name}", get(show))
        .layer(limits)
        // Below the limits. What comes to the token endpoint slowly is limited by the intake, with a share for each
        // address; what answers out of memory needs no limit, and a busy control plane is alive.
        .route("/oauth2/token", post(token))
        .route("/.well-known/jwks.json", get(jwks))
        .route("/.well-known/openid-configuration", get(discovery))
        .route("/.well-known/oauth-authorization-server", get(discovery))
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .fallback(async || Rejection::NotFound)
        .method_not_allowed_fallback(async || Rejection::Method)
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(shared)
}

async fn token(
    State(shared): App,
    Extension(Peer(peer)): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match shared.grant(peer.ip(), &headers, body).await {
        Ok(reply) => {
            let mut answer = json(StatusCode::OK, "application/json", &reply);
            // RFC 6749 §5.1.
            answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            answer.headers_mut().insert(PRAGMA, HeaderValue::from_static("no-cache"));
            answer
        }
        Err(refusal) => refusal.into_response(),
    }
}

async fn catalog(State(shared): App, headers: HeaderMap) -> Result<Response, Rejection> {
    shared.admit(&headers, CATALOG_READ)?;
    Ok(services::catalog(&shared.registry.current(), &headers))
}

#[derive(Deserialize)]
struct From {
    from: Option<u64>,
}

async fn watch(
    State(shared): App,
    headers: HeaderMap,
    query: Result<Query<From>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Rejection> {
    let claims = shared.admit(&headers, CATALOG_READ)?;
    let Query(From { from }) = query.map_err(|_source| Rejection::BadRequest {
        detail: "from is a revision: a whole number".to_owned(),
    })?;
    // A browser's reconnect says where it was (WHATWG HTML §9.2.4).
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let left = claims.exp.saturating_sub(shared.clock.unix_seconds());
    let until = Instant::now() + Duration::from_secs(u64::try_from(left).unwrap_or(0));
    let watcher = Watcher { name: claims.sub, until, end: shared.end.clone() };
    Ok(services::watch(shared.registry.follow(), last.or(from), watcher))
}

async fn list(State(shared): App, headers: HeaderMap) -> Result<Response, Rejection> {
    shared.admit(&headers, CATALOG_READ)?;
    Ok(services::list(&shared.registry.current()))
}

async fn show(
    State(shared): App,
    headers: HeaderMap,
    Path(name): Path<String>,
) -> Result<Response, Rejection> {
    shared.admit(&headers, CATALOG_READ)?;
    services::show(&shared.registry.current(), &name)
}

async fn jwks(State(shared): App) -> Response {
    let keys = shared.mint.jwks(shared.clock.now());
    let mut answer = json(StatusCode::OK, "application/jwk-set+json", &keys);
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static(JWKS_CACHE));
    answer
}

async fn rotate(State(shared): App, headers: HeaderMap) -> Result<Response, Rejection> {
    #[derive(Serialize)]
    struct Rotated {
        kid: String,
    }
    let claims = shared.admit(&headers, KEYS_WRITE)?;
    let kid = shared.mint.rotate(shared.clock.now()).map_err(|error| {
        tracing::error!(error = &error as &dyn std::error::Error, "the keys were not rotated");
        Rejection::Internal
    })?;
    tracing::info!(caller = %claims.sub, "a new signing key is published");
    Ok(json(StatusCode::OK, "application/json", &Rotated { kid }))
}

/// RFC 8414 §2, and what OpenID Connect Discovery 1.0 §3 requires besides.
async fn discovery(State(shared): App) -> Response {
    let issuer = shared.registry.issuer();
    let document = literal!({
        "issuer": issuer,
        "token_endpoint": format!("{issuer}/oauth2/token"),
        "jwks_uri": format!("{issuer}/.well-known/jwks.json"),
        "grant_types_supported": ["client_credentials"],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        // No authorization endpoint: there are no people here, only services.
        "response_types_supported": [],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    });
    json(StatusCode::OK, "application/json", &document)
}

async fn ready(State(shared): App) -> Response {
    // Project and keys are there from the start; only the end makes it unready.
    if shared.end.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "ending\n").into_response()
    } else {
        "ok\n".into_response()
    }
}

impl Shared {
    fn admit(&self, headers: &HeaderMap, scope: &'static str) -> Result<OwnClaims, Rejection> {
        let version = self.registry.current();
        let (mint, issuer) = (&self.mint, self.registry.issuer());
        Guard { version: &version, mint, issuer, now: self.clock.now() }.admit(headers, scope)
    }

    /// A token for whoever asks from `peer`.
    async fn grant(
        &self,
        peer: IpAddr,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<TokenReply, TokenRefusal> {
        let body = self.intake.read(body, peer).await?;
        let question = Question::read(headers, &body)?;
        let Proof { caller, hold } = self.at_desk(|desk| desk.caller(&question, peer));
        if !hold.is_zero() {
            sleep(hold).await;
        }
        let caller = caller?;
        // What is in force now counts, not what was when the question came.
        self.at_desk(|desk| desk.grant(&caller, &question))
    }

    fn at_desk<T>(&self, ask: impl FnOnce(&Desk<'_>) -> T) -> T {
        ask(&Desk {
            version: &self.registry.current(),
            issuer: self.registry.issuer(),
            mint: &self.mint,
            throttle: &self.throttle,
            now: self.clock.now(),
        })
    }
}

async fn too_much(error: BoxError) -> Response {
    if error.is::<tower::timeout::error::Elapsed>() {
        Rejection::Deadline.into_response()
    } else {
        Rejection::Overloaded.into_response()
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the signature is tower-http's")]
fn panicked(cause: Box<dyn Any + Send>) -> Response {
    let cause = cause.downcast_ref::<&str>().copied().map(str::to_owned);
    tracing::error!(cause, "an operation panicked");
    Rejection::Internal.into_response()
}
