//! What one worker has: its view, its caches, its counters. Nothing of it leaves its thread.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use http::Uri;
use tokio::time::Instant;

use crate::{
    discovery::{Directory, Snapshot},
    identity::Verifier,
    model::{Host, Origin, Scheme, ServiceName},
    net::Stream,
    proxy::{
        Ends,
        flow::Flow,
        headers::{Forwarded, Via},
        live::Live,
        record::{Desk, Record},
        reject::Rejection,
        settings::Limits,
        view::{Cluster, Surveyor, View, Ward},
    },
    runtime::{Alarm, Clock, Watchdog},
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

/// How often a project that learns is looked at, in case the wall clock was set.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// Hosts outside the project that one worker keeps connections to.
const MOST_OUTSIDERS: usize = 256;

/// One worker's possessions.
pub(super) struct Worker {
    /// The service of this proxy.
    pub me: ServiceName,
    /// What clients may ask for.
    pub limits: Live<Limits>,
    /// What the workers share about endpoints.
    pub ward: Arc<Ward>,
    /// Makes views.
    pub surveyor: Rc<Surveyor>,
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
    pub outsiders: RefCell<Outsiders>,
    /// Seats for clients that are told why they are turned away.
    pub telling: Arc<tokio::sync::Semaphore>,
    /// When the log was last told that somebody was turned away.
    pub warned: Cell<Option<Instant>>,
}

/// Hosts outside the project that a worker calls; when there are too many, the one not called for longest is forgotten.
#[derive(Default)]
pub(super) struct Outsiders {
    /// Each with the call that it was last used for.
    known: HashMap<Origin, (Rc<Cluster>, u64)>,
    calls: u64,
}

impl Outsiders {
    fn call(&mut self, origin: &Origin) -> Option<Rc<Cluster>> {
        self.calls += 1;
        let (cluster, last) = self.known.get_mut(origin)?;
        *last = self.calls;
        Some(Rc::clone(cluster))
    }

    fn add(&mut self, origin: Origin, cluster: Rc<Cluster>) {
        if self.known.len() >= MOST_OUTSIDERS {
            let oldest = self.known.iter().min_by_key(|(_, (_, last))| *last);
            if let Some(oldest) = oldest.map(|(origin, _)| origin.clone()) {
                self.known.remove(&oldest);
            }
        }
        self.known.insert(origin, (cluster, self.calls));
    }
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

    /// The same cluster, or what has become of one that leads nowhere: its endpoints may be there before this worker was
    /// told of them.
    pub(super) fn latest(&self, cluster: Rc<Cluster>) -> Rc<Cluster> {
        if !cluster.targets.is_empty() {
            return cluster;
        }
        self.refresh();
        let view = self.view.borrow().clone();
        let latest = view.as_ref().and_then(|view| view.cluster(cluster.service.as_str()));
        latest.unwrap_or(cluster)
    }

    /// Who verifies tokens right now.
    #[must_use]
    pub(super) fn verifier(&self) -> Arc<Verifier> {
        self.trust.load_full()
    }

    /// What clients may ask for.
    pub(super) fn limits(&self) -> Rc<Limits> {
        self.limits.now()
    }

    /// The cluster of a host outside the project.
    ///
    /// # Errors
    /// [`Rejection::AddressNotAllowed`] when the host cannot be dialled.
    pub(super) fn outsider(&self, origin: &Origin) -> Result<Rc<Cluster>, Rejection> {
        if let Some(known) = self.outsiders.borrow_mut().call(origin) {
            return Ok(known);
        }
        let cluster = self.surveyor.outside(origin);
        let cluster =
            Rc::new(cluster.ok_or(Rejection::AddressNotAllowed("the host cannot be dialled"))?);
        self.outsiders.borrow_mut().add(origin.clone(), Rc::clone(&cluster));
        Ok(cluster)
    }

    /// Follows the snapshots until the worker ends.
    pub(super) async fn follow(self: Rc<Self>) {
        let mut changes = self.directory.changes();
        loop {
            self.refresh();
            tokio::select! {
                changed = changes.changed() => if changed.is_err() {
                    return;
                },
                () = self.learned() => {}
            }
        }
    }

    /// Ends when the view in use may take the project to be learning although it no longer is; never when it is not.
    async fn learned(&self) {
        let view = self.view.borrow().clone();
        match view.and_then(|view| view.learns_for(Clock::system().now())) {
            // The wall clock may be set meanwhile: it is asked again and again.
            Some(left) => tokio::time::sleep(left.min(LOOK_AGAIN)).await,
            None => std::future::pending().await,
        }
    }

    /// Takes over the snapshot of the moment, if it is another than the one in use or means something else by now.
    pub(super) fn refresh(&self) {
        let Some(snapshot) = self.directory.snapshot() else { return };
        let now = Clock::system().now();
        let same = self.view.borrow().as_ref().is_some_and(|view| {
            Arc::ptr_eq(&view.snapshot, &snapshot) && view.is_as_strict_as_at(now)
        });
        if !same {
            self.survey(snapshot);
        }
    }

    /// Looks at the snapshot of the moment with other settings.
    pub(super) fn look_again(&self) {
        if let Some(snapshot) = self.directory.snapshot() {
            self.survey(snapshot);
        }
    }

    fn survey(&self, snapshot: Arc<Snapshot>) {
        let revision = snapshot.catalog().revision;
        let before = self.view.borrow().clone();
        let view = self.surveyor.survey(snapshot, before.as_deref());
        // Dropped after the borrow: what goes with the old view may look at the new one.
        let old = self.view.replace(Some(view));
        drop((old, before));
        self.ward.serves(revision);
        self.ward.sweep();
    }
}

/// What a handler of requests needs of each: the request, who sent it, and where interim responses go.
pub(super) struct Call<'a> {
    /// The request.
    pub request: Box<Request>,
    /// Who sent it.
    pub peer: &'a Peer,
    /// Where interim responses go.
    pub interim: &'a Interim,
    /// Bounds the attempts in time.
    pub alarm: &'a RefCell<Alarm>,
    /// What moves of the bodies.
    pub flow: &'a Rc<Flow>,
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
