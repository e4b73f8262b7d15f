//! The outbound story: an application calls a service by its name.
//!
//! One port understands four ways of asking: an absolute target (`HTTP_PROXY`), a plain call with a `Host`, `CONNECT
//! name:port`, and a port that belongs to one service. Whatever the way, the walk is the same.

use std::{rc::Rc, sync::Arc};

use http::{HeaderValue, Method, StatusCode, header};
use tokio::time::Instant;

use crate::{
    identity::{Slot, TokenUnavailable},
    model::ServiceName,
    proxy::{
        forward::{Dispatch, Forward},
        headers,
        record::Record,
        reject::Rejection,
        route,
        settings::{OutboundSettings, UnknownHosts},
        view::{Cluster, View},
        worker::{Answer, Call, Worker, origin_of, refused, relayed},
    },
    upstream::Received,
    wire::{Body, Fields, Request, Response},
};

/// Answers calls of the local application.
pub(super) struct Outbound {
    worker: Rc<Worker>,
    settings: OutboundSettings,
    /// The service that this port belongs to; `None`: the request says which.
    only: Option<ServiceName>,
}

/// Who is called.
enum Route {
    /// A service of the project.
    Service(Rc<Cluster>),
    /// A host outside it.
    Outside(Rc<Cluster>),
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
        let desk = &self.worker.outbound_desk;
        let mut record = desk.open(&call.request.method, &call.request.uri, call.flow);
        let grpc = headers::is_grpc(&call.request.fields);
        let id = headers::identify(&mut call.request.fields);
        let walk = if call.request.method == Method::CONNECT {
            Box::pin(self.tunnel(&call, &mut record)).await
        } else {
            self.carry(call, &id, grpc, &mut record).await
        };
        match walk {
            Ok(received) => relayed(received, record),
            Err(rejection) => refused(&rejection, Some(&id), grpc, record),
        }
    }

    /// The walk itself. Each stage needs what the one before it found, so none can be skipped.
    async fn carry(
        &self,
        call: Call<'_>,
        id: &HeaderValue,
        grpc: bool,
        record: &mut Record,
    ) -> Result<Received, Rejection> {
        let Request { method, uri, version, mut fields, body } = call.request;
        // Known before anything can refuse it: its line in the log says which request that was.
        record.identified(id, headers::continue_trace(&mut fields));
        // Has it been here before?
        self.worker.via_out.pass(version, &mut fields)?;
        // Which service is meant, where does it live now, and may we speak to it?
        let asked = authority(&uri, &fields)?;
        let route = self.route(&uri, &asked, record)?;
        // What does the far side see?
        let upgrade = headers::upgrade(&method, version, &fields);
        headers::strip_hop_by_hop(&mut fields);
        headers::strip_identity(&mut fields);
        call.peer.forwarded.add(&mut fields, &asked);
        if let Some(protocol) = &upgrade {
            fields.set(header::CONNECTION, HeaderValue::from_static("upgrade"));
            fields.set(header::UPGRADE, protocol.clone());
        }
        let mut begun = record.started();
        let (cluster, bearer) = match &route {
            Route::Service(cluster) => (cluster, self.bearer(cluster, &fields, &mut begun).await?),
            Route::Outside(cluster) => (cluster, None),
        };
        // Try, retry, fail over.
        let dispatch = Dispatch {
            method,
            uri,
            fields,
            body,
            bearer,
            upgrade: upgrade.is_some(),
            grpc,
            interim: call.interim,
            alarm: call.alarm,
        };
        Forward::new(cluster, &self.worker.ward, dispatch, record, begun).send().await
    }

    /// `CONNECT name:port`: resolved and balanced, but the client speaks TLS with the endpoint itself and brings its
    /// own token.
    async fn tunnel(&self, call: &Call<'_>, record: &mut Record) -> Result<Received, Rejection> {
        let uri = &call.request.uri;
        let asked =
            uri.authority().ok_or(Rejection::BadRequest("CONNECT names host:port"))?.as_str();
        let cluster = match self.route(uri, asked, record)? {
            Route::Service(cluster) | Route::Outside(cluster) => cluster,
        };
        let stream = Forward::tunnel(&cluster, &self.worker.ward, record).await?;
        let response =
            Response { status: StatusCode::OK, fields: Fields::new(), body: Body::Empty };
        Ok(Received::Upgraded(response, stream))
    }

    fn route(&self, uri: &http::Uri, asked: &str, record: &mut Record) -> Result<Route, Rejection> {
        let found = self.worker.view();
        let host =
            self.only.as_ref().map_or_else(|| route::name(route::host(asked)), ServiceName::as_str);
        let known = found.as_ref().ok().and_then(|view| view.cluster(host));
        if let Some(cluster) = known {
            record.belongs_to(Rc::clone(&cluster.series));
            if let Err(missing) = &cluster.grant {
                return Err(Rejection::NotPermitted {
                    caller: missing.caller.to_string(),
                    callee: missing.callee.clone(),
                });
            }
            return Ok(Route::Service(Rc::clone(cluster)));
        }
        match self.settings.unknown_hosts {
            UnknownHosts::Allow if self.only.is_none() => {
                let origin =
                    origin_of(uri, asked).ok_or(Rejection::BadRequest("the host is no host"))?;
                Ok(Route::Outside(self.worker.outsider(&origin)?))
            }
            UnknownHosts::Allow | UnknownHosts::Deny => Err(self.unknown(asked, &*found?)),
        }
    }

    /// A name without a dot can only be a service; a host with dots was meant for the world.
    fn unknown(&self, asked: &str, view: &View) -> Rejection {
        let host = route::host(asked);
        let name = route::name(host);
        let nearest = route::nearest(host, view.names());
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
                caller: self.worker.settings.service.to_string(),
                callee: service(),
            }),
            Ok(Err(error)) => {
                tracing::warn!(
                    service = %cluster.service, error = &error as &dyn std::error::Error, "no token for a call"
                );
                Err(Rejection::TokenUnavailable { service: service(), why: why(&error) })
            }
            Err(_elapsed) => Err(Rejection::TokenUnavailable {
                service: service(),
                why: "the issuer did not answer in time",
            }),
        }
    }
}

fn why(_error: &TokenUnavailable) -> &'static str {
    "the issuer cannot be reached or refused; the proxy's log says more"
}

/// The host that the request is for: that of an absolute target, else of `host`.
fn authority(uri: &http::Uri, fields: &Fields) -> Result<String, Rejection> {
    if let Some(authority) = uri.authority() {
        return Ok(authority.as_str().to_owned());
    }
    let host = fields.get(&header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if host.is_empty() {
        return Err(Rejection::BadRequest("the request names no host"));
    }
    Ok(host.to_owned())
}
