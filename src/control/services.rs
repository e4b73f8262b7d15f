//! What proxies and people read: catalog, changes, services.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures_util::{StreamExt, stream};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{CATALOG_READ, Change, ServiceAnswer, ServiceList, ServiceSummary},
    control::{
        guard,
        registry::Version,
        reject::{Rejection, json},
    },
    model::{EndpointState, Place, Project, ServiceName},
};

/// A silent watch says this often that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How many near names an unknown one is answered with.
const NEAREST: usize = 3;

/// `GET /v1/catalog`: the catalog, or 304 when the caller has it (RFC 9110 §13.1.2).
pub(super) fn catalog(version: &Version, headers: &HeaderMap) -> Response {
    let etag = HeaderValue::from_str(&version.etag);
    let fresh = headers.get_all(IF_NONE_MATCH).iter().any(|value| {
        let text = value.to_str().unwrap_or_default();
        // The comparison is the weak one: `W/` does not count.
        text.split(',')
            .map(str::trim)
            .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == version.etag)
    });
    let mut answer = if fresh {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        let kind = HeaderValue::from_static("application/json");
        ([(CONTENT_TYPE, kind)], version.catalog.clone()).into_response()
    };
    let headers = answer.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    if let Ok(etag) = etag {
        headers.insert(ETAG, etag);
    }
    answer
}

/// Who watches, and until when.
pub(super) struct Watcher {
    pub(super) name: ServiceName,
    /// The end of its token.
    pub(super) until: Instant,
    /// The end of the control plane.
    pub(super) end: CancellationToken,
}

/// `GET /v1/watch`: every revision after `from`, the current one at once when it is another. Ends with the
/// token, with the right to the catalog and with the control plane; the caller then asks again.
pub(super) fn watch(
    versions: watch::Receiver<Arc<Version>>,
    from: Option<u64>,
    watcher: Watcher,
) -> Response {
    let Watcher { name, until, end } = watcher;
    let changes = stream::unfold((versions, from, name), async |(mut versions, seen, name)| {
        loop {
            let version = Arc::clone(&versions.borrow_and_update());
            if !guard::may(&version, &name, CATALOG_READ) {
                return None;
            }
            let revision = version.revision;
            if Some(revision) != seen {
                return Some((revision, (versions, Some(revision), name)));
            }
            drop(version);
            // An error means that nobody can change it any more: the control plane is gone.
            versions.changed().await.ok()?;
        }
    });
    let events = changes
        .map(|revision| {
            let event = Event::default().event("change").id(revision.to_string());
            Ok::<_, Infallible>(event.json_data(Change { revision }).unwrap_or_default())
        })
        .take_until(async move {
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = end.cancelled_owned() => {}
            }
        });
    Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)).into_response()
}

/// `GET /v1/services`.
pub(super) fn list(version: &Version) -> Response {
    let services = version.project.services.iter().map(|(name, service)| {
        let mut places: Vec<Place> =
            service.endpoints.iter().map(|endpoint| endpoint.place.clone()).collect();
        places.sort_unstable();
        places.dedup();
        let active = |state| state == EndpointState::Active;
        ServiceSummary {
            name: name.clone(),
            endpoints: service.endpoints.len(),
            active: service.endpoints.iter().filter(|one| active(one.state)).count(),
            places,
            scopes: service.scopes.clone(),
        }
    });
    let list = ServiceList { revision: version.revision, services: services.collect() };
    json(StatusCode::OK, "application/json", &list)
}

/// `GET /v1/services/{name}`.
pub(super) fn show(version: &Version, name: &str) -> Result<Response, Rejection> {
    let project = &version.project;
    let Some((name, service)) = project.services.get_key_value(name) else {
        return Err(unknown(project, name));
    };
    let callers = project
        .permissions
        .iter()
        .filter_map(|(caller, row)| row.get(name).map(|scopes| (caller.clone(), scopes.clone())));
    let answer = ServiceAnswer {
        revision: version.revision,
        name: name.clone(),
        service: service.clone(),
        callers: callers.collect(),
    };
    Ok(json(StatusCode::OK, "application/json", &answer))
}

fn unknown(project: &Project, name: &str) -> Rejection {
    let name: String = name.chars().take(63).collect();
    let mut near: Vec<(usize, &ServiceName)> = project
        .services
        .keys()
        .map(|known| (strsim::damerau_levenshtein(&name, known.as_str()), known))
        // Further away it would be a guess.
        .filter(|(distance, known)| *distance <= known.as_str().len() / 2)
        .collect();
    near.sort_unstable();
    let nearest = near.into_iter().take(NEAREST).map(|(_, known)| known.clone()).collect();
    Rejection::UnknownService { name, nearest }
}
