//! The outbound story: an application calls a service by its name.
//!
//! One port understands four ways of asking: an absolute target (`HTTP_PROXY`), a plain call with a `Host`, `CONNECT
//! name:port`, and a port that belongs to one service. Whatever the way, the walk is the same.

use std::{borrow::Cow, rc::Rc, sync::Arc};

use http::{HeaderValue, Method, StatusCode, header};
use tokio::time::Instant;

use crate::{
    identity::{Grant, Slot},
    model::ServiceName,
    proxy::{
        forward::Forward,
        record::Record,
        reject::Rejection,
        route,
        settings::{OutboundSettings, UnknownHosts},
        view::{Cluster, View},
        walk::{self, Walk},
        worker::{Answer, Call, Worker, origin_of},
    },
    upstream::Received,
    wire::{Body, Fields, Response},
};

/// Answers calls of the local application.
pub(super) struct Outbound {
    worker: Rc<Worker>,
    settings: OutboundSettings,
    /// The service that this port belongs to; `None`: the request says which.
    only: Option<ServiceName>,
}

impl Outbound {
    /// The way out of `worker`; on a port of its own when `only` is given.
    #[must_use]
    pub(super) fn new(
        worker: Rc<Worker>,
        settings: OutboundSettings,
        only: Option<ServiceName>,
    ) -> Self {
        Self { worker, settings, only }
    }

    /// Answers one request of the local application; a refusal is an answer too.
    pub(super) async fn answer(&self, mut call: Call<'_>) -> Answer {
        let mut walk = Walk::begin(&self.worker.outbound_desk, &mut call.request, call.flow);
        let outcome = if call.request.method == Method::CONNECT {
            Box::pin(self.tunnel(&call, &mut walk)).await
        } else {
            self.carry(call, &mut walk).await
        };
        walk.end(outcome)
    }

    /// The walk itself. Each stage needs what the one before it found, so none can be skipped.
    async fn carry(&self, mut call: Call<'_>, walk: &mut Walk) -> Result<Received, Rejection> {
        // Has it been here before?
        let host = walk::enter(&self.worker.via_out, &mut call.request)?;
        // Which service is meant, where does it live now, and may we speak to it?
        let cluster = self.route(&call.request.uri, asked(&host)?, &mut walk.record)?;
        let grant = granted(&cluster)?;
        if let Some(answer) = walk::last_stop(&mut call.request) {
            return Ok(answer);
        }
        // With which token, and what does the far side see?
        let mut begun = walk.record.started();
        let bearer = self.bearer(&cluster, &call.request.fields, &mut begun).await?;
        let dispatch = walk.dispatch(call, &host, bearer);
        // Try, retry, fail over.
        let (ward, record) = (&self.worker.ward, &mut walk.record);
        Forward::new(&cluster, ward, dispatch, record, begun, grant).send().await
    }

    /// `CONNECT name:port`: resolved and balanced, but the client speaks TLS with the endpoint itself and brings its
    /// own token.
    async fn tunnel(&self, call: &Call<'_>, walk: &mut Walk) -> Result<Received, Rejection> {
        let uri = &call.request.uri;
        if uri.authority().is_none() {
            return Err(Rejection::BadRequest("CONNECT names host:port"));
        }
        let host = route::authority(uri, &call.request.fields)?;
        let cluster = self.route(uri, asked(&host)?, &mut walk.record)?;
        let grant = granted(&cluster)?;
        let stream = Forward::tunnel(&cluster, &self.worker.ward, &mut walk.record, grant).await?;
        let response =
            Response { status: StatusCode::OK, fields: Fields::new(), body: Body::Empty };
        Ok(Received::Upgraded(response, stream))
    }

    pub(super) fn route(
        &self,
        uri: &http::Uri,
        asked: &str,
        record: &mut Record,
    ) -> Result<Rc<Cluster>, Rejection> {
        let found = self.worker.view();
        let named = self
            .only
            .as_ref()
            .map_or_else(|| route::service(asked), |only| Cow::Borrowed(only.as_str()));
        let known = found.as_ref().ok().and_then(|view| view.cluster(&named));
        let cluster = match (known, self.settings.unknown_hosts) {
            (Some(cluster), _) => self.worker.latest(cluster),
            (None, UnknownHosts::Allow) if self.only.is_none() => {
                let origin =
                    origin_of(uri, asked).ok_or(Rejection::BadRequest("the host is no host"))?;
                record.leaves_for(&origin.authority());
                self.worker.outsider(&origin)?
            }
            (None, UnknownHosts::Allow | UnknownHosts::Deny) => {
                return Err(self.unknown(asked, &*found?));
            }
        };
        record.belongs_to(Rc::clone(&cluster.series));
        Ok(cluster)
    }

    /// A name without a dot can only be a service; a host with dots was meant for the world.
    fn unknown(&self, asked: &str, view: &View) -> Rejection {
        let name = route::service(asked);
        let nearest = route::nearest(&name, view.names_near(&name));
        if name.contains('.') && nearest.is_empty() {
            return Rejection::HostNotAllowed { authority: asked.to_owned() };
        }
        Rejection::UnknownService { authority: asked.to_owned(), nearest }
    }

    /// The token for a call, and the time when it was there; `None` where the application brings its own, or no endpoint takes one.
    async fn bearer(
        &self,
        cluster: &Rc<Cluster>,
        fields: &Fields,
        now: &mut Instant,
    ) -> Result<Option<HeaderValue>, Rejection> {
        if fields.contains(&header::AUTHORIZATION) && !self.settings.override_authorization {
            return Ok(None);
        }
        let Some(slot) = &cluster.token else { return Ok(None) };
        if let Some(header) = slot.with_current(*now, |bearer| bearer.header().clone()) {
            return Ok(Some(header));
        }
        let first = Box::pin(self.first_bearer(cluster, slot)).await?;
        *now = Instant::now();
        Ok(Some(first))
    }

    /// Waits for a token that is not there yet.
    async fn first_bearer(
        &self,
        cluster: &Cluster,
        slot: &Arc<Slot>,
    ) -> Result<HeaderValue, Rejection> {
        let limit = cluster.timeouts.request.unwrap_or(std::time::Duration::from_secs(30));
        let service = || cluster.service.clone();
        match tokio::time::timeout(limit, slot.bearer()).await {
            Ok(Ok(bearer)) => Ok(bearer.header().clone()),
            Ok(Err(error)) if error.is_permission() => Err(Rejection::NotPermitted {
                caller: self.worker.me.to_string(),
                callee: service(),
            }),
            Ok(Err(error)) => {
                tracing::debug!(
                    service = %cluster.service, error = &error as &dyn std::error::Error, "no token for a call"
                );
                Err(Rejection::TokenUnavailable { service: service(), why: error.reason() })
            }
            Err(_elapsed) => Err(Rejection::TokenUnavailable {
                service: service(),
                why: "the issuer did not answer in time",
            }),
        }
    }
}

/// Whether this proxy's service may speak to a cluster.
pub(super) fn granted(cluster: &Cluster) -> Result<&Grant, Rejection> {
    cluster.grant.as_ref().map_err(|missing| Rejection::NotPermitted {
        caller: missing.caller.to_string(),
        callee: missing.callee.clone(),
    })
}

/// The host that a request asks for; the way out needs one.
pub(super) fn asked(host: &HeaderValue) -> Result<&str, Rejection> {
    let text = host.to_str().unwrap_or_default();
    if text.is_empty() { Err(Rejection::BadRequest("the request names no host")) } else { Ok(text) }
}
