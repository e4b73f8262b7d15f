//! What the registry's part of the API does, each operation from its request to its answer.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{ETAG, HeaderName, IF_MATCH, IF_NONE_MATCH},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    api::{
        Adjustment, CATALOG_READ, ENDPOINTS_OWN, Heartbeat, PROJECT_WRITE, ProjectDocument,
        ProxyList, ProxyReport, REGISTRY_WRITE, Registration,
    },
    control::{
        endpoints::{self, Precondition, Target},
        project::{self, Past},
        registry::Version,
        reject::{Rejection, json},
        router::Shared,
        services,
    },
    identity::OwnClaims,
    model::{EndpointState, ServiceName},
};

type App = State<Arc<Shared>>;
type Named = Path<(String, String)>;

/// The largest body that is taken, and the largest project.
const BODY_LIMIT: usize = 16 * 1024;
const PROJECT_LIMIT: usize = 32 * 1024 * 1024;
/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(5);

/// `GET /v1/services/{name}/endpoints/{id}`.
pub(super) async fn show(
    State(shared): App,
    headers: HeaderMap,
    path: Named,
) -> Result<Response, Rejection> {
    shared.admit(&headers, CATALOG_READ)?;
    let target = target(path)?;
    answer(&shared, &target, StatusCode::OK).await
}

/// `PUT /v1/services/{name}/endpoints/{id}`.
pub(super) async fn register(
    State(shared): App,
    headers: HeaderMap,
    path: Named,
    body: Body,
) -> Result<Response, Rejection> {
    let target = target(path)?;
    let claims = shared.may_change(&headers, &target.service)?;
    let registration: Registration = read(body, BODY_LIMIT).await?;
    let faults = endpoints::faults(&registration);
    if !faults.is_empty() {
        return Err(Rejection::BadRequest { detail: faults.join("; ") });
    }
    let precondition = precondition(&headers)?;
    let fresh = shared.registry.current().book.endpoint(&target.service, &target.id).is_none();
    shared.leases.begin(&target, registration.ttl_seconds).await?;
    let (wanted, ttl) = (target.clone(), registration.ttl_seconds);
    let owner = claims.sub.clone();
    shared
        .registry
        .change(move |draft| {
            endpoints::register(draft, &wanted, &owner, &registration, &precondition)
        })
        .await?;
    let Target { service, id } = &target;
    tracing::info!(caller = %claims.sub, %service, endpoint = %id, "an endpoint is registered");
    let status = if fresh { StatusCode::CREATED } else { StatusCode::OK };
    told(&shared.registry.current(), &target, status, Some(ttl))
}

/// `PATCH /v1/services/{name}/endpoints/{id}`.
pub(super) async fn adjust(
    State(shared): App,
    headers: HeaderMap,
    path: Named,
    body: Body,
) -> Result<Response, Rejection> {
    let target = target(path)?;
    // Only from those who may is a body waited for.
    shared.may_change(&headers, &target.service)?;
    let adjustment: Adjustment = read(body, BODY_LIMIT).await?;
    change(&shared, &headers, target, adjustment).await
}

/// `POST /v1/services/{name}/endpoints/{id}/drain`.
pub(super) async fn drain(
    State(shared): App,
    headers: HeaderMap,
    path: Named,
) -> Result<Response, Rejection> {
    let target = target(path)?;
    let adjustment = Adjustment { state: Some(EndpointState::Draining), weight: None };
    change(&shared, &headers, target, adjustment).await
}

async fn change(
    shared: &Shared,
    headers: &HeaderMap,
    target: Target,
    adjustment: Adjustment,
) -> Result<Response, Rejection> {
    let claims = shared.may_change(headers, &target.service)?;
    let precondition = precondition(headers)?;
    let wanted = target.clone();
    shared
        .registry
        .change(move |draft| endpoints::change(draft, &wanted, &adjustment, &precondition))
        .await?;
    let Target { service, id } = &target;
    tracing::info!(caller = %claims.sub, %service, endpoint = %id, ?adjustment, "an endpoint is changed");
    answer(shared, &target, StatusCode::OK).await
}

/// `DELETE /v1/services/{name}/endpoints/{id}`.
pub(super) async fn remove(
    State(shared): App,
    headers: HeaderMap,
    path: Named,
) -> Result<Response, Rejection> {
    let target = target(path)?;
    let claims = shared.may_change(&headers, &target.service)?;
    let precondition = precondition(&headers)?;
    let wanted = target.clone();
    shared.registry.change(move |draft| endpoints::remove(draft, &wanted, &precondition)).await?;
    let Target { service, id } = &target;
    tracing::info!(caller = %claims.sub, %service, endpoint = %id, "an endpoint is removed");
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `POST /v1/services/{name}/endpoints/{id}/heartbeat`.
pub(super) async fn heartbeat(
    State(shared): App,
    headers: HeaderMap,
    path: Named,
) -> Result<Response, Rejection> {
    let target = target(path)?;
    shared.may_change(&headers, &target.service)?;
    let version = shared.registry.current();
    let Target { service, id } = &target;
    let leased = version
        .book
        .leased(service, id)
        .ok_or_else(|| Rejection::UnknownEndpoint { service: service.clone(), id: id.clone() })?;
    shared.leases.heartbeat(&target, leased.ttl_seconds);
    let answer = Heartbeat { revision: version.revision, expires_in: leased.ttl_seconds };
    Ok(json(StatusCode::OK, "application/json", &answer))
}

/// `PUT /v1/proxies/{instance}`.
pub(super) async fn report(
    State(shared): App,
    headers: HeaderMap,
    Path(instance): Path<String>,
    body: Body,
) -> Result<Response, Rejection> {
    let claims = shared.admit(&headers, CATALOG_READ)?;
    let instance: Uuid = instance
        .parse()
        .map_err(|_text| Rejection::BadRequest { detail: "an instance is a UUID".to_owned() })?;
    let report: ProxyReport = read(body, BODY_LIMIT).await?;
    if report.role.len() > 16 || report.version.len() > 64 {
        return Err(Rejection::BadRequest {
            detail: "role has at most 16 bytes, version 64".to_owned(),
        });
    }
    shared.proxies.hear(instance, claims.sub, report);
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `GET /v1/proxies`.
pub(super) async fn proxies(State(shared): App, headers: HeaderMap) -> Result<Response, Rejection> {
    shared.admit(&headers, CATALOG_READ)?;
    let proxies = shared.proxies.list().await?;
    let list = ProxyList { revision: shared.registry.current().revision, proxies };
    Ok(json(StatusCode::OK, "application/json", &list))
}

/// `GET /v1/project`.
pub(super) async fn export(State(shared): App, headers: HeaderMap) -> Result<Response, Rejection> {
    shared.admit(&headers, PROJECT_WRITE)?;
    let version = shared.registry.current();
    let document = version.book.document().ok_or(Rejection::NoProject)?;
    let mut answer = json(StatusCode::OK, "application/json", document);
    dated(&mut answer, version.book.written_at().unwrap_or_default());
    Ok(answer)
}

/// `PUT /v1/project`.
pub(super) async fn import(
    State(shared): App,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Rejection> {
    let claims = shared.admit(&headers, PROJECT_WRITE)?;
    let document: ProjectDocument = read(body, PROJECT_LIMIT).await?;
    let wanted = precondition(&headers)?;
    let revision = shared
        .registry
        .change(move |draft| {
            let found = draft.book().written_at();
            let is = wanted.is.as_ref().is_none_or(|revisions| {
                found.is_some_and(|found| revisions.is_empty() || revisions.contains(&found))
            });
            if !is || (wanted.absent && found.is_some()) {
                return Err(Rejection::RevisionMismatch { found });
            }
            project::import(draft, &document, Past::Taken).map(drop)
        })
        .await?;
    tracing::info!(caller = %claims.sub, revision, "the project is replaced");
    let mut answer = StatusCode::NO_CONTENT.into_response();
    dated(&mut answer, shared.registry.current().book.written_at().unwrap_or_default());
    Ok(answer)
}

impl Shared {
    /// Lets those pass who may change endpoints of `service`: of its own name, or of any.
    fn may_change(
        &self,
        headers: &HeaderMap,
        service: &ServiceName,
    ) -> Result<OwnClaims, Rejection> {
        match self.admit(headers, REGISTRY_WRITE) {
            Err(Rejection::ScopeMissing { .. }) => {}
            outcome => return outcome,
        }
        let claims = self.admit(headers, ENDPOINTS_OWN)?;
        if claims.sub == *service {
            return Ok(claims);
        }
        Err(Rejection::ScopeMissing { scope: REGISTRY_WRITE })
    }
}

async fn answer(
    shared: &Shared,
    target: &Target,
    status: StatusCode,
) -> Result<Response, Rejection> {
    let version = shared.registry.current();
    let left = match version.book.leased(&target.service, &target.id) {
        Some(_) => shared.leases.left_of(target).await?,
        None => None,
    };
    told(&version, target, status, left)
}

fn told(
    version: &Version,
    target: &Target,
    status: StatusCode,
    expires_in: Option<u64>,
) -> Result<Response, Rejection> {
    let (answer, revision) = endpoints::answer(version, target, expires_in)?;
    let mut answer = json(status, "application/json", &answer);
    dated(&mut answer, revision);
    Ok(answer)
}

fn dated(answer: &mut Response, revision: u64) {
    if let Ok(etag) = HeaderValue::from_str(&format!("\"{revision}\"")) {
        answer.headers_mut().insert(ETAG, etag);
    }
}

fn target(Path((service, id)): Named) -> Result<Target, Rejection> {
    let service = services::name(&service)?;
    let id = id.parse().map_err(|error: crate::model::NameError| Rejection::BadRequest {
        detail: format!("the endpoint's id: {error}"),
    })?;
    Ok(Target { service, id })
}

/// The body, as JSON of one form; what is wrong with it is said with its place.
async fn read<T: DeserializeOwned>(body: Body, limit: usize) -> Result<T, Rejection> {
    let cut = |detail: &str| Rejection::BadRequest { detail: detail.to_owned() };
    let whole = timeout(BODY_TIME, Limited::new(body, limit).collect()).await;
    let whole = whole.map_err(|_elapsed| cut("the body did not arrive in time"))?;
    let body = whole.map_err(|error| {
        if error.is::<LengthLimitError>() {
            Rejection::BodyTooLarge
        } else {
            cut("the body did not arrive whole")
        }
    })?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|error| Rejection::BadRequest { detail: format!("the body: {error}") })
}

/// `if-match` and `if-none-match`, as far as endpoints have them: revisions in quotes, or `*`.
fn precondition(headers: &HeaderMap) -> Result<Precondition, Rejection> {
    let is = tags(headers, &IF_MATCH)?;
    let absent = match tags(headers, &IF_NONE_MATCH)? {
        None => false,
        Some(tags) if tags.is_empty() => true,
        Some(_) => {
            return Err(Rejection::BadRequest { detail: "if-none-match takes * only".to_owned() });
        }
    };
    Ok(Precondition { is, absent })
}

/// The revisions of a header of entity tags; none for `*`. Weak ones never match (RFC 9110 §13.1.1).
fn tags(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Vec<u64>>, Rejection> {
    let mut lines = headers.get_all(name).iter().peekable();
    if lines.peek().is_none() {
        return Ok(None);
    }
    let mut revisions = Vec::new();
    for tag in lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b',')) {
        let tag = std::str::from_utf8(tag).unwrap_or_default().trim();
        if tag == "*" {
            return Ok(Some(Vec::new()));
        }
        if tag.starts_with("W/") {
            // A revision that nothing has.
            revisions.push(u64::MAX);
            continue;
        }
        let revision = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
        let revision = revision.ok_or_else(|| Rejection::BadRequest {
            detail: format!("{name} takes entity tags in quotes, as answers carry them, or *"),
        })?;
        // A tag of something else is none of an endpoint.
        revisions.push(revision.parse().unwrap_or(u64::MAX));
    }
    Ok(Some(revisions))
}
