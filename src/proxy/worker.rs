//! What one worker has: its view, its caches, its counters. Nothing of it leaves its thread.

use std::{cell::RefCell, collections::HashMap, rc::Rc, sync::Arc};

use arc_swap::ArcSwap;
use http::Uri;

use crate::{
    discovery::Directory,
    identity::Verifier,
    model::{Host, Origin, Protocol, Scheme, ServiceName},
    net::Stream,
    proxy::{
        Ends,
        flow::Flow,
        headers::{self, Forwarded, Via},
        record::{Desk, Record},
        reject::Rejection,
        settings::{App, Limits, Settings},
        view::{Cluster, Surveyor, View, Ward},
    },
    runtime::{Alarm, Watchdog},
    wire::{Interim, Request, Response},
};

/// Who speaks to us on a connection.
pub(super) struct Peer {
    /// The host it asked for in the TLS handshake.
    pub server_name: Option<Box<str>>,
    /// What `forwarded` says of it.
    pub(super) forwarded: Forwarded,
}

/// What a story made of a request.
pub(super) enum Answer {
    /// A response to write.
    Response(Response, Record),
    /// A response to write, after which both sides speak to each other directly.
    Tunnel(Response, Stream, Record),
}

/// Hosts outside the project that one worker keeps connections to.
const MOST_OUTSIDERS: usize = 256;

/// One worker's possessions.
pub(super) struct Worker {
    /// The proxy's settings.
    pub settings: Arc<Settings>,
    /// What the workers share about endpoints.
    pub ward: Arc<Ward>,
    /// Makes views.
    pub surveyor: Surveyor,
    /// The view, once there is a snapshot.
    pub view: RefCell<Option<Rc<View>>>,
    /// Verifies tokens.
    pub trust: Arc<ArcSwap<Verifier>>,
    /// Opens records of calls out.
    pub outbound_desk: Desk,
    /// Opens records of calls in.
    pub inbound_desk: Desk,
    /// This process, on the way out.
    pub via_out: Via,
    /// This process, on the way in.
    pub via_in: Via,
    /// Coarse time-outs.
    pub watchdog: Watchdog,
    /// How far the end has come, each way.
    pub ends: Ends,
    /// Where snapshots come from.
    pub directory: Arc<Directory>,
    /// Hosts outside the project.
    pub outsiders: RefCell<HashMap<Origin, Rc<Cluster>>>,
}

impl Worker {
    /// The view of the project.
    ///
    /// # Errors
    /// [`Rejection::NotReady`] before the first snapshot.
    pub(super) fn view(&self) -> Result<Rc<View>, Rejection> {
        let view = self.view.borrow().clone();
        view.or_else(|| {
            // The first snapshot may be there before this worker was told of it.
            self.refresh();
            self.view.borrow().clone()
        })
        .ok_or(Rejection::NotReady)
    }

    /// Who verifies tokens right now.
    #[must_use]
    pub(super) fn verifier(&self) -> Arc<Verifier> {
        self.trust.load_full()
    }

    /// What clients may ask for.
    pub(super) fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    /// The cluster of a host outside the project.
    ///
    /// # Errors
    /// [`Rejection::AddressNotAllowed`] when the host cannot be dialled.
    pub(super) fn outsider(&self, origin: &Origin) -> Result<Rc<Cluster>, Rejection> {
        if let Some(known) = self.outsiders.borrow().get(origin) {
            return Ok(Rc::clone(known));
        }
        let refused = Rejection::AddressNotAllowed("the host cannot be dialled");
        // Reserved, so no service of the project has it.
        let name: ServiceName = "infrar-outside".parse().map_err(|_source| refused.clone())?;
        let app = App { origin: origin.clone(), protocol: Protocol::Auto };
        let cluster = Rc::new(self.surveyor.single(&app, &name, Some(origin)).ok_or(refused)?);
        let mut known = self.outsiders.borrow_mut();
        if known.len() >= MOST_OUTSIDERS {
            known.clear();
        }
        known.insert(origin.clone(), Rc::clone(&cluster));
        Ok(cluster)
    }

    /// Follows the snapshots until the worker ends.
    pub(super) async fn follow(self: Rc<Self>) {
        let mut changes = self.directory.changes();
        loop {
            self.refresh();
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes over the snapshot of the moment, if it is another than the one in use.
    pub(super) fn refresh(&self) {
        let Some(catalog) = self.directory.load() else { return };
        let same =
            self.view.borrow().as_ref().is_some_and(|view| Arc::ptr_eq(&view.catalog, &catalog));
        if !same {
            *self.view.borrow_mut() = Some(self.surveyor.survey(catalog));
        }
    }
}

/// What a handler of requests needs of each: the request, who sent it, and where interim responses go.
pub(super) struct Call<'a> {
    /// The request.
    pub request: Request,
    /// Who sent it.
    pub peer: &'a Peer,
    /// Where interim responses go.
    pub interim: &'a Interim,
    /// Bounds the attempts in time.
    pub alarm: &'a RefCell<Alarm>,
    /// What moves of the bodies.
    pub flow: &'a Rc<Flow>,
}

/// The answer to a request that was refused.
pub(super) fn refused(
    rejection: &Rejection,
    request_id: Option<&http::HeaderValue>,
    grpc: bool,
    mut record: Record,
) -> Answer {
    record.answered(rejection.status(), rejection.code());
    Answer::Response(rejection.answer(request_id, grpc), record)
}

/// The answer of an endpoint: its hop-by-hop headers end here.
pub(super) fn relayed(received: crate::upstream::Received, mut record: Record) -> Answer {
    match received {
        crate::upstream::Received::Response(mut response) => {
            record.answered(response.status, "");
            headers::strip_hop_by_hop(&mut response.fields);
            Answer::Response(response, record)
        }
        crate::upstream::Received::Upgraded(response, stream) => {
            record.answered(response.status, "");
            record.tunnelled();
            Answer::Tunnel(response, stream, record)
        }
    }
}

/// The origin of an absolute or authority-form target; plain HTTP unless it says otherwise.
pub(super) fn origin_of(uri: &Uri, authority: &str) -> Option<Origin> {
    let scheme = if uri.scheme_str() == Some("https") { Scheme::Https } else { Scheme::Http };
    let parsed: Origin = format!("{}://{authority}", scheme.as_str()).parse().ok()?;
    match parsed.host() {
        Host::Name(name) if name.is_empty() => None,
        Host::Name(_) | Host::Address(_) => Some(parsed),
    }
}
