//! What proxies and people read: catalog, changes, services.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{CATALOG_READ, ServiceAnswer, ServiceList, ServiceSummary},
    control::{
        guard, journal,
        registry::{Registry, Version},
        reject::{Rejection, json},
    },
    model::{EndpointState, Place, Project, ServiceName},
};

/// A silent watch says this often that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How many near names an unknown one is answered with.
const NEAREST: usize = 3;

/// `GET /v1/catalog`: the catalog, or 304 when the caller has it (RFC 9110 §13.1.2).
pub(super) fn catalog(version: &Version, headers: &HeaderMap) -> Result<Response, Rejection> {
    let etag = version.etag();
    let fresh = headers.get_all(IF_NONE_MATCH).iter().any(|value| {
        let text = value.to_str().unwrap_or_default();
        // The comparison is the weak one: `W/` does not count.
        text.split(',')
            .map(str::trim)
            .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
    });
    let mut answer = if fresh {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        let kind = HeaderValue::from_static("application/json");
        ([(CONTENT_TYPE, kind)], version.catalog()?).into_response()
    };
    let headers = answer.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        headers.insert(ETAG, etag);
    }
    Ok(answer)
}

/// Who watches, and until when.
pub(super) struct Watcher {
    pub(super) name: ServiceName,
    /// The end of its token.
    pub(super) until: Instant,
    /// The end of the control plane.
    pub(super) end: CancellationToken,
}

/// How far one who watches has come.
struct Watching {
    name: ServiceName,
    registry: Arc<Registry>,
    versions: watch::Receiver<Arc<Version>>,
    seen: Option<u64>,
    /// Whether it was waited for what another replica has told of.
    waited: bool,
    /// When it next is told that the stream is alive.
    heartbeat: Instant,
}

impl Watching {
    /// What comes next, in whole events; `None` when the right to it is gone, or the control plane.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let version = Arc::clone(&self.versions.borrow_and_update());
            if !guard::may(&version, &self.name, CATALOG_READ) {
                return None;
            }
            let current = version.revision;
            drop(version);
            // Another replica has told of more than this one has heard of.
            if let Some(seen) = self.seen.filter(|seen| *seen > current && !self.waited) {
                self.waited = true;
                self.registry.reach(seen).await;
                continue;
            }
            let frames = self.seen.and_then(|seen| self.registry.journal().after(seen, current));
            self.seen = Some(current);
            match frames.as_deref() {
                Some([]) => {}
                Some([one]) => return Some(one.clone()),
                Some(many) => return Some(many.concat().into()),
                None => return Some(journal::resync(current)),
            }
            tokio::select! {
                changed = self.versions.changed() => changed.ok()?,
                () = sleep_until(self.heartbeat) => {
                    self.heartbeat = Instant::now() + HEARTBEAT;
                    return Some(journal::current(current));
                }
            }
        }
    }
}

/// `GET /v1/watch`: every change after `from` in its order, or that the catalog is to be fetched. Ends with the token, with
/// the right to the catalog and with the control plane; the caller then asks again.
pub(super) fn watch(registry: &Arc<Registry>, from: Option<u64>, watcher: Watcher) -> Response {
    // Not all at once: a thousand that came together would for ever be told together that nothing happens.
    let first = HEARTBEAT.mul_f64(fastrand::f64().mul_add(0.5, 0.5));
    let Watcher { name, until, end } = watcher;
    let watching = Watching {
        name,
        registry: Arc::clone(registry),
        versions: registry.follow(),
        seen: from,
        waited: false,
        heartbeat: Instant::now() + first,
    };
    let frames = stream::unfold(watching, |mut watching| async move {
        let frame = watching.next().await?;
        Some((Ok::<_, Infallible>(frame), watching))
    });
    let frames = frames.take_until(async move {
        tokio::select! {
            () = sleep_until(until) => {}
            () = end.cancelled_owned() => {}
        }
    });
    let kind = HeaderValue::from_static("text/event-stream");
    let cache = HeaderValue::from_static("no-store");
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, cache)], Body::from_stream(frames)).into_response()
}

/// `GET /v1/services`.
pub(super) fn list(version: &Version) -> Result<Response, Rejection> {
    let services = version.project()?.services.iter().map(|(name, service)| {
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
    Ok(json(StatusCode::OK, "application/json", &list))
}

/// `GET /v1/services/{name}`.
pub(super) fn show(version: &Version, name: &str) -> Result<Response, Rejection> {
    let project = version.project()?;
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
        service: (**service).clone(),
        callers: callers.collect(),
    };
    Ok(json(StatusCode::OK, "application/json", &answer))
}

/// A name, as it stands in a path.
pub(super) fn name(text: &str) -> Result<ServiceName, Rejection> {
    text.parse().map_err(|error: crate::model::NameError| Rejection::BadRequest {
        detail: format!("the service's name: {error}"),
    })
}

/// That a service is not known, and which ones are near.
pub(super) fn unknown(project: &Project, name: &str) -> Rejection {
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
