//! Method and path → operation: the one table of the control plane, and what holds for all of it.

use std::{any::Any, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    BoxError, Router,
    error_handling::HandleErrorLayer,
    extract::State,
    middleware::from_fn,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, limit::GlobalConcurrencyLimitLayer};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    api::{CATALOG_READ, Catalog, KEYS_WRITE, ServiceAnswer, ServiceList},
    control::{
        asked::{From, KnownCatalog, LastEvent, Named, Public, Reader, Writer, bounded},
        contract::{self, Guarded, Malformed, OfService},
        guard::{self, Guard},
        intake::Intake,
        keys::{Keys, KeysError},
        leases::Leases,
        operations,
        proxies::Proxies,
        public::{self, Pages},
        rates::Rates,
        registry::Registry,
        reject::{Rejection, json},
        services::{self, Watcher},
        throttle::Throttle,
    },
    identity::{Mint, OwnClaims},
    runtime::Clock,
};

/// Questions of the API that are answered at once; more are refused, not queued.
const CONCURRENCY: usize = 1024;
/// How long an answer may take to begin.
const DEADLINE: Duration = Duration::from_secs(10);
/// What the operations share.
pub(super) struct Shared {
    pub(super) registry: Arc<Registry>,
    pub(super) leases: Arc<Leases>,
    pub(super) proxies: Arc<Proxies>,
    pub(super) mint: Arc<Mint>,
    pub(super) keys: Arc<Keys>,
    pub(super) intake: Intake,
    pub(super) throttle: Throttle,
    pub(super) rates: Rates,
    pub(super) clock: Clock,
    /// Cancelled when the control plane ends.
    pub(super) end: CancellationToken,
}

/// Where a request came from.
#[derive(Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

type App = State<Arc<Shared>>;

/// The table. Every route stands in the document too: `routes!` makes both.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    let limits = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(too_much))
        .load_shed()
        // The layer is applied to each route; a plain limit would be one per route.
        .layer(GlobalConcurrencyLimitLayer::new(CONCURRENCY))
        .timeout(DEADLINE);
    let small = OpenApiRouter::with_openapi(contract::basis())
        .routes(routes!(rotate))
        .routes(routes!(catalog))
        .routes(routes!(watch))
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(
            operations::show,
            operations::register,
            operations::adjust,
            operations::remove
        ))
        .routes(routes!(operations::heartbeat))
        .routes(routes!(operations::drain))
        .routes(routes!(operations::proxies))
        .routes(routes!(operations::report))
        .layer(from_fn(bounded));
    let (router, document) = small
        .routes(routes!(operations::export, operations::import))
        .layer(limits)
        // Below the limits. What comes to the token endpoint slowly is limited by the intake, with a share for each
        // address; what answers out of memory needs no limit, and a busy control plane is alive.
        .routes(routes!(public::token))
        .merge(public::memory().layer(from_fn(bounded)))
        .split_for_parts();
    let pages = Pages::new(&contract::finish(document, shared.registry.issuer()));
    router
        .fallback(async |_: Public| Rejection::NotFound)
        .method_not_allowed_fallback(async |_: Public| Rejection::Method)
        .layer(axum::Extension(Arc::new(pages)))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(shared)
}

/// Everything a proxy needs to know.
#[utoipa::path(
    get, path = "/v1/catalog", operation_id = "catalog", tag = "catalog",
    params(KnownCatalog),
    responses(
        (status = 200, description = "The catalog", body = Catalog, headers(("etag" = String), ("cache-control" = String))),
        (status = 304, description = "It is the one that is known", headers(("etag" = String), ("cache-control" = String))),
        Guarded,
    ),
    security(("bearer" = ["infrar:catalog:read"])),
)]
async fn catalog(
    State(shared): App,
    Reader(claims): Reader,
    headers: HeaderMap,
) -> Result<Response, Rejection> {
    shared.admit(&claims, CATALOG_READ)?;
    let known = headers
        .get(http::header::IF_NONE_MATCH)
        .and_then(|tag| shared.registry.tagged(tag.to_str().ok()?));
    if let Some(revision) = known.filter(|known| *known > shared.registry.current().revision) {
        shared.registry.reach(revision).await;
    }
    services::catalog(&shared.registry.current(), &headers)
}

/// Every change, in its order.
///
/// Server-sent events (WHATWG HTML §9.2), without end: `change` (its data a `Change`, its `id` the revision), `resync` and
/// `current` (a `Standing`). After `resync` the catalog must be fetched. A browser's `last-event-id` counts before `from`.
#[utoipa::path(
    get, path = "/v1/watch", operation_id = "watch", tag = "catalog",
    params(From, LastEvent),
    responses(
        (status = 200, description = "The stream", body = String, content_type = "text/event-stream",
            headers(("cache-control" = String))),
        Malformed, Guarded,
    ),
    security(("bearer" = ["infrar:catalog:read"])),
)]
async fn watch(
    State(shared): App,
    Reader(claims): Reader,
    headers: HeaderMap,
    From { from }: From,
) -> Result<Response, Rejection> {
    shared.admit(&claims, CATALOG_READ)?;
    // A browser's reconnect says where it was (WHATWG HTML §9.2.4).
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let left = claims.exp.saturating_sub(shared.clock.unix_seconds());
    let until = Instant::now() + Duration::from_secs(u64::try_from(left).unwrap_or(0));
    let watcher = Watcher { name: claims.sub, until, end: shared.end.clone() };
    Ok(services::watch(&shared.registry, last.or(from), watcher))
}

/// Every service in brief.
#[utoipa::path(
    get, path = "/v1/services", operation_id = "list_services", tag = "catalog",
    responses((status = 200, description = "By name", body = ServiceList), Guarded),
    security(("bearer" = ["infrar:catalog:read"])),
)]
async fn list(State(shared): App, Reader(claims): Reader) -> Result<Response, Rejection> {
    shared.admit(&claims, CATALOG_READ)?;
    services::list(&shared.registry.current())
}

/// One service in full.
#[utoipa::path(
    get, path = "/v1/services/{name}", operation_id = "show_service", tag = "catalog",
    params(Named),
    responses((status = 200, description = "The service", body = ServiceAnswer), OfService, Guarded),
    security(("bearer" = ["infrar:catalog:read"])),
)]
async fn show(
    State(shared): App,
    Reader(claims): Reader,
    Named { name }: Named,
) -> Result<Response, Rejection> {
    shared.admit(&claims, CATALOG_READ)?;
    services::show(&shared.registry.current(), &name)
}

#[derive(Serialize, ToSchema)]
struct Rotated {
    /// The new key's id in the key set.
    kid: String,
}

/// Publishes a new signing key, which signs after the lead.
#[utoipa::path(
    post, path = "/v1/keys/rotate", operation_id = "rotate_keys", tag = "keys",
    responses((status = 200, description = "The new key", body = Rotated), Guarded),
    security(("bearer" = ["infrar:keys:write"])),
)]
async fn rotate(State(shared): App, Writer(claims): Writer) -> Result<Response, Rejection> {
    shared.admit(&claims, KEYS_WRITE)?;
    let kid = shared.keys.rotate().await.map_err(|error| {
        tracing::error!(error = &error as &dyn std::error::Error, "the keys were not rotated");
        match error {
            KeysError::Mint(_) => Rejection::Internal,
            KeysError::Store(rejection) => rejection,
        }
    })?;
    tracing::info!(caller = %claims.sub, "a new signing key is published");
    Ok(json(StatusCode::OK, "application/json", &Rotated { kid }))
}

impl Shared {
    /// Who asks, when they prove it.
    pub(super) fn guard(&self, headers: &HeaderMap) -> Result<OwnClaims, Rejection> {
        let version = self.registry.current();
        let (mint, issuer) = (&self.mint, self.registry.issuer());
        Guard { version: &version, mint, issuer, now: self.clock.now() }.who(headers)
    }

    /// Whether they may.
    pub(super) fn admit(&self, claims: &OwnClaims, scope: &'static str) -> Result<(), Rejection> {
        guard::admit(&self.registry.current(), claims, scope)
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
