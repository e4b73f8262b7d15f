//! What the registry's part of the API does, each operation from its request to its answer.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CONTENT_TYPE, ETAG, HeaderName, IF_MATCH, IF_NONE_MATCH},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::{
    api::{
        Adjustment, CATALOG_READ, ENDPOINTS_OWN, EndpointAnswer, Heartbeat, PROJECT_WRITE,
        ProjectDocument, ProxyList, ProxyReport, REGISTRY_WRITE, Registration, Source,
    },
    control::{
        asked::{BODY_LIMIT, IfAbsent, IfMatch, Instance, OneEndpoint, Reader, Writer},
        contract::{
            Adjusting, Changing, Guarded, Malformed, OfEndpoint, OfService, Reading, Registering,
            Replacing,
        },
        endpoints::{self, Precondition, Target},
        project::{self, Past},
        registry::Version,
        reject::{Rejection, json},
        router::Shared,
    },
    identity::OwnClaims,
    model::{EndpointState, ServiceName},
};

type App = State<Arc<Shared>>;

/// The largest project that is taken.
const PROJECT_LIMIT: usize = 32 * 1024 * 1024;
/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(5);

/// One endpoint.
#[utoipa::path(
    get, path = "/v1/services/{name}/endpoints/{id}", operation_id = "show_endpoint", tag = "registry",
    params(OneEndpoint),
    responses((status = 200, description = "The endpoint", body = EndpointAnswer, headers(("etag" = String, description = "The revision of its last change"))), OfEndpoint, Guarded),
    security(("bearer" = ["infrar:catalog:read"])),
)]
pub(super) async fn show(
    State(shared): App,
    Reader(claims): Reader,
    target: Target,
) -> Result<Response, Rejection> {
    shared.admit(&claims, CATALOG_READ)?;
    answer(&shared, &target, StatusCode::OK).await
}

/// Registers an endpoint, or renews and changes what is registered.
#[utoipa::path(
    put, path = "/v1/services/{name}/endpoints/{id}", operation_id = "register_endpoint", tag = "registry",
    params(OneEndpoint, IfMatch, IfAbsent),
    request_body = Registration,
    responses(
        (status = 200, description = "It was registered before; its lease begins anew", body = EndpointAnswer, headers(("etag" = String, description = "The revision of its last change"))),
        (status = 201, description = "It is registered", body = EndpointAnswer, headers(("etag" = String, description = "The revision of its last change"))),
        OfService, Registering, Reading, Guarded,
    ),
    security(("bearer" = ["infrar:registry:write"]), ("bearer" = ["infrar:endpoints:own"])),
)]
pub(super) async fn register(
    State(shared): App,
    Writer(claims): Writer,
    headers: HeaderMap,
    target: Target,
    body: Body,
) -> Result<Response, Rejection> {
    shared.may_change(&claims, &target.service)?;
    let registration: Registration = read(&headers, body, BODY_LIMIT).await?;
    let faults = endpoints::faults(&target.id, &registration);
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

/// Changes state or weight; what is left out stays.
#[utoipa::path(
    patch, path = "/v1/services/{name}/endpoints/{id}", operation_id = "adjust_endpoint", tag = "registry",
    params(OneEndpoint, IfMatch),
    request_body = Adjustment,
    responses((status = 200, description = "As it is now", body = EndpointAnswer, headers(("etag" = String, description = "The revision of its last change"))), OfEndpoint, Adjusting, Reading, Guarded),
    security(("bearer" = ["infrar:registry:write"]), ("bearer" = ["infrar:endpoints:own"])),
)]
pub(super) async fn adjust(
    State(shared): App,
    Writer(claims): Writer,
    headers: HeaderMap,
    target: Target,
    body: Body,
) -> Result<Response, Rejection> {
    // Only from those who may is a body waited for.
    shared.may_change(&claims, &target.service)?;
    let adjustment: Adjustment = read(&headers, body, BODY_LIMIT).await?;
    change(&shared, &claims, &headers, target, adjustment).await
}

/// Has an endpoint finish what it has.
#[utoipa::path(
    post, path = "/v1/services/{name}/endpoints/{id}/drain", operation_id = "drain_endpoint", tag = "registry",
    params(OneEndpoint, IfMatch),
    responses((status = 200, description = "As it is now", body = EndpointAnswer, headers(("etag" = String, description = "The revision of its last change"))), OfEndpoint, Adjusting, Guarded),
    security(("bearer" = ["infrar:registry:write"]), ("bearer" = ["infrar:endpoints:own"])),
)]
pub(super) async fn drain(
    State(shared): App,
    Writer(claims): Writer,
    headers: HeaderMap,
    target: Target,
) -> Result<Response, Rejection> {
    shared.may_change(&claims, &target.service)?;
    let adjustment = Adjustment { state: Some(EndpointState::Draining), weight: None };
    change(&shared, &claims, &headers, target, adjustment).await
}

async fn change(
    shared: &Shared,
    claims: &OwnClaims,
    headers: &HeaderMap,
    target: Target,
    adjustment: Adjustment,
) -> Result<Response, Rejection> {
    let precondition = precondition(headers)?;
    let wanted = target.clone();
    // What the project itself says is not for the service alone to change.
    let found = shared.registry.current();
    let of_project = found.book.endpoint(&target.service, &target.id);
    if of_project.is_some_and(|(_, source, _)| source == Source::Project) {
        shared.admit(claims, REGISTRY_WRITE)?;
    }
    shared
        .registry
        .change(move |draft| endpoints::change(draft, &wanted, &adjustment, &precondition))
        .await?;
    let Target { service, id } = &target;
    tracing::info!(caller = %claims.sub, %service, endpoint = %id, ?adjustment, "an endpoint is changed");
    answer(shared, &target, StatusCode::OK).await
}

/// Takes a registered endpoint away.
#[utoipa::path(
    delete, path = "/v1/services/{name}/endpoints/{id}", operation_id = "remove_endpoint", tag = "registry",
    params(OneEndpoint, IfMatch),
    responses((status = 204, description = "It is gone"), OfEndpoint, Changing, Guarded),
    security(("bearer" = ["infrar:registry:write"]), ("bearer" = ["infrar:endpoints:own"])),
)]
pub(super) async fn remove(
    State(shared): App,
    Writer(claims): Writer,
    headers: HeaderMap,
    target: Target,
) -> Result<Response, Rejection> {
    shared.may_change(&claims, &target.service)?;
    let precondition = precondition(&headers)?;
    let wanted = target.clone();
    shared.registry.change(move |draft| endpoints::remove(draft, &wanted, &precondition)).await?;
    let Target { service, id } = &target;
    tracing::info!(caller = %claims.sub, %service, endpoint = %id, "an endpoint is removed");
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Keeps a lease.
#[utoipa::path(
    post, path = "/v1/services/{name}/endpoints/{id}/heartbeat", operation_id = "heartbeat", tag = "registry",
    params(OneEndpoint),
    responses((status = 200, description = "The lease begins anew", body = Heartbeat), OfEndpoint, Guarded),
    security(("bearer" = ["infrar:registry:write"]), ("bearer" = ["infrar:endpoints:own"])),
)]
pub(super) async fn heartbeat(
    State(shared): App,
    Reader(claims): Reader,
    target: Target,
) -> Result<Response, Rejection> {
    shared.may_change(&claims, &target.service)?;
    let version = shared.registry.current();
    let Target { service, id } = &target;
    let leased = version
        .book
        .leased(service, id)
        .ok_or_else(|| Rejection::UnknownEndpoint { service: service.clone(), id: id.clone() })?;
    shared.leases.heartbeat(&target, leased.ttl_seconds)?;
    let answer = Heartbeat { revision: version.revision, expires_in: leased.ttl_seconds };
    Ok(json(StatusCode::OK, "application/json", &answer))
}

/// Tells which revision a proxy serves.
#[utoipa::path(
    put, path = "/v1/proxies/{instance}", operation_id = "report", tag = "proxies",
    params(Instance),
    request_body = ProxyReport,
    responses((status = 204, description = "It is heard"), Malformed, Reading, Guarded),
    security(("bearer" = ["infrar:catalog:read"])),
)]
pub(super) async fn report(
    State(shared): App,
    Reader(claims): Reader,
    headers: HeaderMap,
    Instance { instance }: Instance,
    body: Body,
) -> Result<Response, Rejection> {
    shared.admit(&claims, CATALOG_READ)?;
    let report: ProxyReport = read(&headers, body, BODY_LIMIT).await?;
    let short = |text: &str, most| text.chars().count() <= most;
    if !short(&report.role, 16) || !short(&report.version, 64) {
        return Err(Rejection::BadRequest {
            detail: "role has at most 16 characters, version 64".to_owned(),
        });
    }
    if i64::try_from(report.revision).is_err() {
        return Err(Rejection::BadRequest { detail: "no revision is so large".to_owned() });
    }
    shared.proxies.hear(instance, claims.sub, report);
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Who serves which revision.
#[utoipa::path(
    get, path = "/v1/proxies", operation_id = "list_proxies", tag = "proxies",
    responses((status = 200, description = "Those heard of lately", body = ProxyList), Guarded),
    security(("bearer" = ["infrar:catalog:read"])),
)]
pub(super) async fn proxies(
    State(shared): App,
    Reader(claims): Reader,
) -> Result<Response, Rejection> {
    shared.admit(&claims, CATALOG_READ)?;
    let proxies = shared.proxies.list().await?;
    let list = ProxyList { revision: shared.registry.current().revision, proxies };
    Ok(json(StatusCode::OK, "application/json", &list))
}

/// The project, without what was registered beside it and without secrets.
#[utoipa::path(
    get, path = "/v1/project", operation_id = "export_project", tag = "project",
    responses(
        (status = 200, description = "As it was written", body = ProjectDocument, headers(("etag" = String))),
        Guarded,
    ),
    security(("bearer" = ["infrar:project:write"])),
)]
pub(super) async fn export(
    State(shared): App,
    Reader(claims): Reader,
) -> Result<Response, Rejection> {
    shared.admit(&claims, PROJECT_WRITE)?;
    let version = shared.registry.current();
    let document = version.book.document().ok_or(Rejection::NoProject)?;
    let mut answer = json(StatusCode::OK, "application/json", document);
    dated(&mut answer, version.book.written_at().unwrap_or_default());
    Ok(answer)
}

/// Replaces the project. What was registered and finds no place in it any more goes.
#[utoipa::path(
    put, path = "/v1/project", operation_id = "import_project", tag = "project",
    params(IfMatch, IfAbsent),
    request_body = ProjectDocument,
    responses((status = 204, description = "It is in force", headers(("etag" = String))), Replacing, Reading, Guarded),
    security(("bearer" = ["infrar:project:write"])),
)]
pub(super) async fn import(
    State(shared): App,
    Writer(claims): Writer,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Rejection> {
    shared.admit(&claims, PROJECT_WRITE)?;
    let document: ProjectDocument = read(&headers, body, PROJECT_LIMIT).await?;
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
    fn may_change(&self, claims: &OwnClaims, service: &ServiceName) -> Result<(), Rejection> {
        match self.admit(claims, REGISTRY_WRITE) {
            Err(Rejection::ScopeMissing { .. }) => {}
            outcome => return outcome,
        }
        self.admit(claims, ENDPOINTS_OWN)?;
        if claims.sub == *service {
            return Ok(());
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
        // The change is made, whether the store can be asked for this or not.
        Some(_) => shared.leases.left_of(target).await.ok().flatten(),
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

/// Whether the body is said to be JSON, or nothing is said about it.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(CONTENT_TYPE) else { return true };
    let kind = kind.to_str().ok().and_then(|kind| kind.split(';').next());
    kind.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

/// The body, as JSON of one form; what is wrong with it is said with its place.
async fn read<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
) -> Result<T, Rejection> {
    if !is_json(headers) {
        return Err(Rejection::MediaType);
    }
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
