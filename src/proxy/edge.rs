//! The edge story: inbound checks for the service that is meant, then the outbound walk to where it lives.
//!
//! The service is the one whose endpoint has the host that the request names (or that its TLS handshake named); failing
//! both, the audience of its token. The token passes through unchanged: its audience is the service itself.

use std::rc::Rc;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderValue, header};
use serde::Deserialize;

use crate::{
    proxy::{
        forward::Forward,
        inbound::{Gate, keep_host},
        reject::Rejection,
        route,
        settings::InboundSettings,
        view::{Cluster, View},
        walk::{self, Walk},
        worker::{Answer, Call, Peer, Worker},
    },
    upstream::Received,
    wire::Fields,
};

/// Answers calls for all services of a place.
pub(super) struct Edge {
    worker: Rc<Worker>,
    gate: Gate,
}

impl Edge {
    /// The public listener of an edge.
    #[must_use]
    pub(super) fn new(worker: Rc<Worker>, settings: InboundSettings) -> Self {
        let gate = Gate::new(Rc::clone(&worker), settings);
        Self { worker, gate }
    }

    /// The same with other settings.
    #[must_use]
    pub(super) fn with(&self, settings: InboundSettings) -> Self {
        Self { worker: Rc::clone(&self.worker), gate: self.gate.with(settings) }
    }

    /// Answers one request; a refusal is an answer too.
    pub(super) async fn answer(&self, mut call: Call<'_>) -> Answer {
        let mut walk = Walk::begin(&self.worker.inbound_desk, &mut call.request, call.flow);
        let outcome = self.carry(call, &mut walk).await;
        walk.end(outcome)
    }

    async fn carry(&self, mut call: Call<'_>, walk: &mut Walk) -> Result<Received, Rejection> {
        // Has it been here before?
        let host = walk::enter(&self.worker.via_in, &mut call.request)?;
        // Which service is meant?
        let view = self.worker.view()?;
        let cluster = callee(&view, &host, &call.request.fields, call.peer)?;
        // Who is it, and may it?
        let (callee, record) = (&cluster.service, &mut walk.record);
        let admitted = self.gate.admit(&call.request, callee, Some(&view), record).await?;
        if let Some(answer) = walk::last_stop(&mut call.request) {
            return Ok(answer);
        }
        // What does the far side see? The host where the service is ours, and the token where the way there is fit for one.
        keep_host(&mut call.request, &host);
        let token = call.request.fields.get(&header::AUTHORIZATION).cloned();
        let dispatch = walk.dispatch(call, &host, token);
        let (ward, record, grant) = (&self.worker.ward, &mut walk.record, &admitted.grant);
        let begun = record.started();
        Forward::new(&cluster, ward, dispatch, record, begun, grant).send().await
    }
}

/// The service that a request is for.
fn callee(
    view: &View,
    host: &HeaderValue,
    fields: &Fields,
    peer: &Peer,
) -> Result<Rc<Cluster>, Rejection> {
    let asked = host.to_str().unwrap_or_default();
    // An endpoint's authority leaves out the port of its scheme; a client may write it.
    let lower = route::lower(asked);
    let plain = lower.strip_suffix(":443").unwrap_or(&lower);
    let sni = peer.server_name.as_deref();
    let by_host = [Some(plain), Some(route::host(&lower)), sni].into_iter().flatten();
    let named = by_host.filter_map(|host| view.service_of(host)).next();
    let named = named.and_then(|service| view.cluster(service.as_str()));
    // Nobody has shown who they are yet, so nobody is told what other names there are.
    let unknown = || Rejection::UnknownService { authority: asked.to_owned(), nearest: Vec::new() };
    named.or_else(|| audience(view, fields)).ok_or_else(unknown)
}

/// The claims, as far as they say for whom the token is.
#[derive(Deserialize)]
struct Meant {
    aud: OneOrMany,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// The audience that an unverified token names, if it is a service. It only says which checks to run: the gate then
/// verifies the token for exactly this service.
fn audience(view: &View, fields: &Fields) -> Option<Rc<Cluster>> {
    let value = fields.get(&header::AUTHORIZATION)?.as_bytes();
    let payload = value.split(|b| *b == b'.').nth(1).filter(|part| part.len() <= 8192)?;
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let meant: Meant = serde_json::from_slice(&json).ok()?;
    let names = match meant.aud {
        OneOrMany::One(name) => vec![name],
        OneOrMany::Many(names) => names,
    };
    names.iter().find_map(|name| view.cluster(name))
}
