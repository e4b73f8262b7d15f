//! The edge story: inbound checks for the service that is meant, then the outbound walk to where it lives.
//!
//! The service is the one whose endpoint has the host that the request names (or that its TLS handshake named); failing
//! both, the audience of its token. The token passes through unchanged: its audience is the service itself.

use std::rc::Rc;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderValue, Uri, header};
use serde::Deserialize;

use crate::{
    model::ServiceName,
    proxy::{
        forward::{Dispatch, Forward},
        headers,
        inbound::{Gate, arrived},
        record::Record,
        reject::Rejection,
        route,
        settings::InboundSettings,
        view::View,
        worker::{Answer, Call, Peer, Worker, refused, relayed},
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

    /// Answers one request; a refusal is an answer too.
    pub(super) async fn answer(&self, mut call: Call<'_>) -> Answer {
        let desk = &self.worker.inbound_desk;
        let mut record = desk.open(&call.request.method, &call.request.uri, call.flow);
        let grpc = headers::is_grpc(&call.request.fields);
        let id = headers::identify(&mut call.request.fields);
        match self.carry(call, &id, grpc, &mut record).await {
            Ok(received) => relayed(received, record),
            Err(rejection) => refused(&rejection, Some(&id), grpc, record),
        }
    }

    async fn carry(
        &self,
        call: Call<'_>,
        id: &HeaderValue,
        grpc: bool,
        record: &mut Record,
    ) -> Result<Received, Rejection> {
        let mut request = call.request;
        // Known before anything can refuse it: its line in the log says which request that was.
        record.identified(id, headers::continue_trace(&mut request.fields));
        // Has it been here before?
        self.worker.via_in.pass(request.version, &mut request.fields)?;
        // Which service is meant?
        let view = self.worker.view()?;
        let callee = callee(&view, &request.uri, &request.fields, call.peer)?;
        let cluster =
            view.cluster(callee.as_str()).ok_or_else(|| unknown(&view, callee.as_str()))?;
        // Who is it, and may it?
        let admitted = self.gate.admit(&request, &callee, Some(&view), record).await?;
        // What does the far side see? The token, and the host where the service is ours.
        let upgrade = headers::upgrade(&request.method, request.version, &request.fields);
        headers::strip_hop_by_hop(&mut request.fields);
        headers::strip_identity(&mut request.fields);
        drop(admitted);
        arrived(&request.uri, &mut request.fields, call.peer, upgrade.as_ref());
        let dispatch = Dispatch {
            method: request.method,
            uri: request.uri,
            fields: request.fields,
            body: request.body,
            bearer: None,
            upgrade: upgrade.is_some(),
            grpc,
            interim: call.interim,
            alarm: call.alarm,
        };
        let begun = record.started();
        Forward::new(cluster, &self.worker.ward, dispatch, record, begun).send().await
    }
}

fn unknown(view: &View, asked: &str) -> Rejection {
    Rejection::UnknownService {
        authority: asked.to_owned(),
        nearest: route::nearest(asked, view.names()),
    }
}

/// The service that a request is for.
fn callee(view: &View, uri: &Uri, fields: &Fields, peer: &Peer) -> Result<ServiceName, Rejection> {
    let named = uri.authority().map(http::uri::Authority::as_str);
    let host = fields.get(&header::HOST).and_then(|host| host.to_str().ok());
    let asked = named.or(host).unwrap_or_default();
    // An endpoint's authority leaves out the port of its scheme; a client may write it.
    let plain = asked.strip_suffix(":443").unwrap_or(asked);
    let sni = peer.server_name.as_deref();
    let by_host = [Some(plain), Some(route::host(asked)), sni].into_iter().flatten();
    if let Some(service) = by_host.filter_map(|host| view.service_of(host)).next() {
        return Ok(service.clone());
    }
    audience(view, fields).ok_or_else(|| unknown(view, asked))
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
fn audience(view: &View, fields: &Fields) -> Option<ServiceName> {
    let value = fields.get(&header::AUTHORIZATION)?.as_bytes();
    let payload = value.split(|b| *b == b'.').nth(1).filter(|part| part.len() <= 8192)?;
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let meant: Meant = serde_json::from_slice(&json).ok()?;
    let names = match meant.aud {
        OneOrMany::One(name) => vec![name],
        OneOrMany::Many(names) => names,
    };
    names.iter().find_map(|name| view.cluster(name)).map(|cluster| cluster.service.clone())
}
