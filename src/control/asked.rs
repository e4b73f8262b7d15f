//! What a request says before its body: who asks, how often they may, and of what. Each is read by an extractor, so that an
//! operation's signature tells what it needs and nothing else of the request is looked at before.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use axum::{
    body::HttpBody,
    extract::{FromRequestParts, Path, Query, Request},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::request::Parts;
use serde::{Deserialize, de::DeserializeOwned};
use utoipa::IntoParams;
use uuid::Uuid;

use crate::{
    control::{
        endpoints::Target,
        rates::Rates,
        reject::Rejection,
        router::{Peer, Shared},
        services,
    },
    identity::OwnClaims,
    model::ServiceName,
};

/// The largest body that is taken, but for the project.
pub(super) const BODY_LIMIT: usize = 16 * 1024;

/// Anybody, as often as one address may.
pub(super) struct Public;

/// Somebody who has proved who they are and asks for what costs no commit.
pub(super) struct Reader(pub(super) OwnClaims);

/// Somebody who has proved who they are and asks for what may cost a commit.
pub(super) struct Writer(pub(super) OwnClaims);

type App = Arc<Shared>;

impl FromRequestParts<App> for Public {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, shared: &App) -> Result<Self, Rejection> {
        shared.rates.public(peer(parts))?;
        Ok(Self)
    }
}

impl FromRequestParts<App> for Reader {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, shared: &App) -> Result<Self, Rejection> {
        let claims = prove(parts, shared)?;
        shared.rates.read(&claims.sub)?;
        Ok(Self(claims))
    }
}

impl FromRequestParts<App> for Writer {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, shared: &App) -> Result<Self, Rejection> {
        let claims = prove(parts, shared)?;
        shared.rates.write(&claims.sub)?;
        Ok(Self(claims))
    }
}

/// Who asks. Only failures count for the address: a neighbour's wrong tokens turn nobody away.
fn prove(parts: &Parts, shared: &Shared) -> Result<OwnClaims, Rejection> {
    shared.guard(&parts.headers).map_err(|refusal| {
        let rates: &Rates = &shared.rates;
        rates.public(peer(parts)).err().map_or(refusal, Rejection::from)
    })
}

fn peer(parts: &Parts) -> IpAddr {
    let unknown = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    parts.extensions.get::<Peer>().map_or(unknown, |Peer(peer)| peer.ip())
}

/// `{name}`.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct Named {
    /// The service.
    #[param(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", max_length = 63)]
    pub(super) name: String,
}

impl FromRequestParts<App> for Named {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, shared: &App) -> Result<Self, Rejection> {
        path(parts, shared).await
    }
}

/// `{name}` and `{id}`.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct OneEndpoint {
    /// The service.
    #[param(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", max_length = 63)]
    name: String,
    /// The endpoint's id at it.
    #[param(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", max_length = 63)]
    id: String,
}

impl FromRequestParts<App> for Target {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, shared: &App) -> Result<Self, Rejection> {
        let OneEndpoint { name, id } = path(parts, shared).await?;
        let service: ServiceName = services::name(&name)?;
        let id = id.parse().map_err(|error: crate::model::NameError| Rejection::BadRequest {
            detail: format!("the endpoint's id: {error}"),
        })?;
        Ok(Self { service, id })
    }
}

/// `{instance}`.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct Instance {
    /// What a proxy has called itself at its start.
    pub(super) instance: Uuid,
}

impl FromRequestParts<App> for Instance {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, shared: &App) -> Result<Self, Rejection> {
        path(parts, shared).await
    }
}

/// `from`.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct From {
    /// The revision that is known; without it the stream begins with `resync`.
    #[param(nullable = false)]
    pub(super) from: Option<u64>,
}

impl FromRequestParts<App> for From {
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, shared: &App) -> Result<Self, Rejection> {
        let query: Result<Query<Self>, _> = Query::from_request_parts(parts, shared).await;
        query.map(|Query(from)| from).map_err(|_source| Rejection::BadRequest {
            detail: "from is a revision: a whole number, said once".to_owned(),
        })
    }
}

async fn path<T: DeserializeOwned + Send>(parts: &mut Parts, shared: &App) -> Result<T, Rejection> {
    let path: Result<Path<T>, _> = Path::from_request_parts(parts, shared).await;
    path.map(|Path(path)| path)
        .map_err(|error| Rejection::BadRequest { detail: format!("the path: {error}") })
}

/// `if-match` of what changes something, as the document tells it.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "written into the document; `operations::precondition` reads it")]
pub(super) struct IfMatch {
    /// Only if this is still its ETag, as an answer carried it; `*`: if it is there at all.
    #[param(
        rename = "if-match",
        nullable = false,
        pattern = r#"^(\*|"[0-9]{1,19}"(, ?"[0-9]{1,19}")*)$"#
    )]
    if_match: Option<String>,
}

/// `if-none-match` of what makes something.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "written into the document; `operations::precondition` reads it")]
pub(super) struct IfAbsent {
    /// `*`: only if it is not there yet.
    #[param(rename = "if-none-match", nullable = false, pattern = r"^\*$")]
    if_none_match: Option<String>,
}

/// What a reader of the catalog, or of the watch, knows already; for the document.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "written into the document; `services::catalog` reads it")]
pub(super) struct KnownCatalog {
    /// The ETag of the catalog that is known.
    #[param(rename = "if-none-match", nullable = false)]
    if_none_match: Option<String>,
}

/// See [`KnownCatalog`].
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "written into the document; the watch reads it")]
pub(super) struct LastEvent {
    /// The `id` of the last event that came.
    #[param(rename = "last-event-id", nullable = false)]
    last_event_id: Option<String>,
}

/// Refuses bodies that say themselves that they are too large, on every route that takes only small ones or none.
pub(super) async fn bounded(request: Request, next: Next) -> Response {
    if request.body().size_hint().lower() > BODY_LIMIT as u64 {
        return Rejection::BodyTooLarge.into_response();
    }
    next.run(request).await
}
