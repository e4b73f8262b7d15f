//! How one worker comes to its listeners and settings, and takes over others while it serves.
//!
//! Settings are exchanged whole. Requests that have begun end on those they began with, kept connections are asked by
//! the new ones from their next request on, and a listener that is no longer wanted finishes what it has.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};

use crate::{
    net::Spread,
    proxy::{
        Listener, StartError,
        accept::{self, Door, Doors, Terms},
        edge::Edge,
        inbound::Inbound,
        live::Live,
        outbound::Outbound,
        running::owner_of,
        settings::{App, InboundSettings, Settings},
        story::{Story, Tale},
        view::Cluster,
        worker::Worker,
    },
    runtime::{self, Phase, WorkerId},
};

/// A listener that a worker is to open: its own socket of it.
pub(super) struct Opening {
    /// Tells it from the others; the same on every worker.
    pub(super) id: usize,
    /// What it is for.
    pub(super) listener: Listener,
    /// The address that the settings give it.
    pub(super) asked: SocketAddr,
    /// The socket.
    pub(super) socket: std::net::TcpListener,
}

/// A worker with its listeners.
pub(super) struct Post {
    pub(super) worker: Rc<Worker>,
    pub(super) doors: Rc<Doors>,
    pub(super) id: WorkerId,
    pub(super) spread: Spread<usize>,
}

/// Opens a listener, with the settings of the moment.
///
/// # Errors
/// [`StartError`] when the application behind it cannot be dialled.
pub(super) fn open(post: &Post, opening: Opening) -> Result<(), StartError> {
    let Opening { id, listener, asked, socket } = opening;
    let worker = &post.worker;
    let settings = worker.surveyor.settings();
    let (tale, terms) = begin(worker, &settings, &listener)?;
    let end = match &listener {
        Listener::Outbound => worker.ends.outbound.clone(),
        // It may end before the others do.
        Listener::Port(_) => worker.ends.outbound.child(),
        Listener::Inbound(_) => worker.ends.inbound.clone(),
    };
    let story = Rc::new(Story::new(Rc::clone(worker), end, tale));
    let door = Rc::new(Door { id, listener, address: asked, story, terms: Live::new(terms) });
    post.doors.add(Rc::clone(&door));
    match TcpListener::from_std(socket) {
        Ok(socket) => {
            let listening =
                accept::listen(door, socket, Rc::clone(worker), post.id, post.spread.clone());
            runtime::spawn_local("listener", listening);
        }
        Err(error) => tracing::error!(%error, "a listener was lost"),
    }
    Ok(())
}

/// What a listener that opens does.
fn begin(
    worker: &Rc<Worker>,
    settings: &Settings,
    listener: &Listener,
) -> Result<(Tale, Terms), StartError> {
    let none = || StartError::App(String::new());
    match listener {
        Listener::Outbound | Listener::Port(_) => {
            let outbound = settings.outbound.clone().ok_or_else(none)?;
            let only = match listener {
                Listener::Port(service) => Some(service.clone()),
                Listener::Outbound | Listener::Inbound(_) => None,
            };
            Ok((Tale::Outbound(Outbound::new(Rc::clone(worker), outbound, only)), Terms::default()))
        }
        Listener::Inbound(at) => {
            let inbound = settings.inbound.get(*at).cloned().ok_or_else(none)?;
            let terms = terms(&inbound);
            let tale = match inbound.app.clone() {
                None => Tale::Edge(Edge::new(Rc::clone(worker), inbound)),
                Some(app) => {
                    let cluster = behind(worker, &app)?;
                    Tale::Inbound(Inbound::new(Rc::clone(worker), inbound, cluster))
                }
            };
            Ok((tale, terms))
        }
    }
}

fn terms(inbound: &InboundSettings) -> Terms {
    Terms { tls: inbound.tls.clone(), allow_from: inbound.allow_from.clone() }
}

/// The way to the application.
fn behind(worker: &Worker, app: &App) -> Result<Rc<Cluster>, StartError> {
    let cluster = worker.surveyor.single(app, &worker.me, None);
    cluster.map(Rc::new).ok_or_else(|| StartError::App(app.origin.to_string()))
}

/// Follows the settings, and opens the listeners that come with them, until nobody sends any more.
pub(super) async fn follow(
    post: Post,
    mut settings: watch::Receiver<Arc<Settings>>,
    mut later: mpsc::Receiver<Opening>,
) {
    loop {
        // In this order: a listener comes behind the settings that name it.
        tokio::select! {
            biased;
            changed = settings.changed() => {
                if changed.is_err() {
                    return;
                }
                let new = Arc::clone(&settings.borrow_and_update());
                adopt(&post, &new);
            }
            Some(opening) = later.recv() => {
                if let Err(error) = open(&post, opening) {
                    tracing::error!(%error, "a listener was lost");
                }
            }
        }
    }
}

/// Puts other settings in force.
fn adopt(post: &Post, new: &Arc<Settings>) {
    let worker = &post.worker;
    let old = worker.surveyor.survey_by(Arc::clone(new));
    worker.limits.put(new.limits);
    worker.outbound_desk.log_to(new.access.clone());
    worker.inbound_desk.log_to(new.access.clone());
    let anew = is_other_world(&old, new);
    if anew {
        worker.surveyor.begin_anew();
        let _old = worker.outsiders.take();
    }
    worker.look_again();
    let mut closed = false;
    for door in post.doors.all() {
        match renew(worker, &door, new, anew) {
            Ok(true) => {}
            Ok(false) => {
                post.doors.remove(door.id);
                door.story.end().advance(Phase::Drain);
                closed = true;
            }
            Err(error) => tracing::error!(%error, "a listener goes on with its old settings"),
        }
    }
    if closed {
        // Its idle connections look around and leave; all others find that nothing happened.
        worker.watchdog.rouse();
    }
}

/// Whether connections to endpoints that stand were made for something else: another trust, another place, other limits.
fn is_other_world(old: &Settings, new: &Settings) -> bool {
    !Arc::ptr_eq(&old.tls, &new.tls)
        || old.place != new.place
        || old.zone != new.zone
        || old.limits.head != new.limits.head
}

/// Has a listener do what the new settings say; `false` when they say nothing of it, and it is to close.
fn renew(worker: &Rc<Worker>, door: &Door, new: &Settings, anew: bool) -> Result<bool, StartError> {
    let tale = match &door.listener {
        Listener::Outbound | Listener::Port(_) => {
            // The listener itself stays open whatever the settings say.
            let Some(outbound) = new.outbound.clone() else { return Ok(true) };
            let only = match &door.listener {
                Listener::Port(service) => match owner_of(&outbound.ports, service, door.address) {
                    Some(owner) => Some(owner.clone()),
                    None => return Ok(false),
                },
                Listener::Outbound | Listener::Inbound(_) => None,
            };
            Tale::Outbound(Outbound::new(Rc::clone(worker), outbound, only))
        }
        Listener::Inbound(at) => {
            let Some(inbound) = new.inbound.get(*at).cloned() else { return Ok(true) };
            let terms = terms(&inbound);
            let tale = answered(worker, &door.story.tale(), inbound, anew)?;
            door.terms.put(terms);
            tale
        }
    };
    door.story.retell(tale);
    Ok(true)
}

/// How calls in are answered by the new settings; what is worth keeping of the old way is kept.
fn answered(
    worker: &Rc<Worker>,
    before: &Tale,
    inbound: InboundSettings,
    anew: bool,
) -> Result<Tale, StartError> {
    let Some(app) = inbound.app.clone() else {
        return Ok(Tale::Edge(match before {
            Tale::Edge(edge) => edge.with(inbound),
            Tale::Inbound(_) | Tale::Outbound(_) => Edge::new(Rc::clone(worker), inbound),
        }));
    };
    Ok(Tale::Inbound(match before {
        Tale::Inbound(before) => {
            let kept = before.leads_to(&app).filter(|_| !anew);
            let cluster = kept.map_or_else(|| behind(worker, &app), Ok)?;
            before.with(inbound, cluster)
        }
        Tale::Edge(_) | Tale::Outbound(_) => {
            Inbound::new(Rc::clone(worker), inbound, behind(worker, &app)?)
        }
    }))
}
