//! The data plane: how a request walks from the socket it came in on to the endpoint that answers it.
//!
//! One worker per core, each with its own listening sockets, view of the project, pools, caches and counters; they share
//! nothing on the path of a request but snapshots. Everything that may stall lives on the side runtime. The stories are
//! `outbound`, `inbound` and `edge`; each reads from top to bottom.

mod accept;
mod admin;
mod edge;
mod flow;
mod forward;
mod headers;
mod inbound;
mod outbound;
mod record;
mod reject;
mod route;
mod serve_h1;
mod serve_h2;
mod settings;
mod story;
mod tunnel;
mod view;
mod worker;

use std::{net::SocketAddr, num::NonZeroUsize, rc::Rc, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::{net::TcpListener, sync::mpsc};

use self::{
    accept::Door, edge::Edge, headers::Via, inbound::Inbound, outbound::Outbound, record::Desk,
    story::Story, view::Surveyor, worker::Worker,
};
pub use self::{
    admin::{Admin, AdminAddress, Ready},
    reject::Rejection,
    settings::{App, InboundSettings, Limits, OutboundSettings, Role, Settings, UnknownHosts},
    view::{Condition, Ward},
};
use crate::{
    cost::Meter,
    discovery::Directory,
    identity::{Tokens, Verifier},
    model::ServiceName,
    net::{self, BindError, ClientTls, Handover, Resolver, ServerTls, Spread},
    runtime::{self, Phase, RuntimeError, Shutdown, Watchdog, WorkerId, Workers},
    telemetry::{AccessLog, Direction, Registry},
};

/// How often pools are looked through for connections that are too old.
const PRUNE: Duration = Duration::from_secs(1);

/// Why the data plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener's address cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No thread could be had.
    #[error("the workers did not start")]
    Runtime(#[from] RuntimeError),
    /// The application behind an inbound listener cannot be dialled.
    #[error("inbound.app: {0} cannot be dialled")]
    App(String),
}

/// What the data plane is made of.
#[derive(Clone)]
pub struct Parts {
    /// What it should do.
    pub settings: Arc<Settings>,
    /// Where snapshots come from.
    pub directory: Arc<Directory>,
    /// Where outbound tokens come from.
    pub tokens: Arc<Tokens>,
    /// Who verifies inbound tokens.
    pub trust: Arc<ArcSwap<Verifier>>,
    /// Whom TLS trusts.
    pub tls: Arc<ClientTls>,
    /// Names to addresses.
    pub resolver: Resolver,
    /// Counts bytes.
    pub meter: Arc<Meter>,
    /// Counts requests.
    pub registry: Arc<Registry>,
    /// Writes a line per request, if anybody wants to read it.
    pub access: Option<AccessLog>,
    /// How far the end has come, each way.
    pub ends: Ends,
    /// What is known about endpoints.
    pub ward: Arc<Ward>,
    /// Further addresses of this process that calls must not go to (the admin listener).
    pub own: Vec<SocketAddr>,
}

/// How far the end has come, each way: a proxy that ends lets the application call out until that has ended too.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// The ways in.
    pub inbound: Shutdown,
    /// The ways out.
    pub outbound: Shutdown,
}

/// A data plane that runs.
pub struct Running {
    /// Where it listens.
    pub listeners: Vec<(Listener, SocketAddr)>,
    workers: Workers,
    spread: Spread<usize>,
}

impl Running {
    /// Waits until every worker has ended, which they do when [`Phase::Drain`] has come and nothing is left.
    ///
    /// # Errors
    /// [`RuntimeError`] when one of them broke.
    pub async fn join(self) -> Result<(), RuntimeError> {
        self.workers.join().await
    }

    /// Open connections of clients.
    #[must_use]
    pub fn connections(&self) -> Spread<usize> {
        self.spread.clone()
    }
}

/// What a listener is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listener {
    /// Calls out, by name.
    Outbound,
    /// Calls out, to one service.
    Port(ServiceName),
    /// Calls in; the place in `inbound`.
    Inbound(usize),
}

impl Listener {
    /// The key of the settings that says where it listens.
    fn key(&self) -> String {
        match self {
            Self::Outbound => "outbound.listen".to_owned(),
            Self::Port(service) => format!("outbound.ports.{service}"),
            Self::Inbound(0) => "inbound.listen".to_owned(),
            Self::Inbound(index) => format!("inbound[{index}].listen"),
        }
    }
}

/// What one worker is given to start with.
struct Share {
    listeners: Vec<std::net::TcpListener>,
    handed: mpsc::Receiver<Handover<usize>>,
}

/// Which worker it is, and what it has in common with the others.
struct Site {
    id: WorkerId,
    own: Arc<[SocketAddr]>,
    /// This process on the way out and on the way in.
    vias: (Via, Via),
}

/// Opens the listeners and starts the workers.
///
/// # Errors
/// [`StartError`]; nothing runs then.
pub fn start(parts: Parts, count: NonZeroUsize) -> Result<Running, StartError> {
    let plan = plan(&parts.settings);
    let (spread, handed) = Spread::new(count);
    let mut shares: Vec<Share> =
        handed.into_iter().map(|handed| Share { listeners: Vec::new(), handed }).collect();
    let mut listeners = Vec::new();
    let mut own = parts.own.clone();
    for (listener, address) in plan {
        let sockets = net::bind(address, count.get(), &listener.key())?;
        let bound = sockets.first().and_then(|socket| socket.local_addr().ok()).unwrap_or(address);
        for (share, socket) in shares.iter_mut().zip(sockets) {
            share.listeners.push(socket);
        }
        own.push(bound);
        listeners.push((listener, bound));
    }
    let shares = Arc::new(std::sync::Mutex::new(shares.into_iter().map(Some).collect::<Vec<_>>()));
    let own: Arc<[SocketAddr]> = own.into();
    let kinds: Arc<[Listener]> = listeners.iter().map(|(kind, _)| kind.clone()).collect();
    let given = spread.clone();
    let vias = (Via::random(), Via::random());
    let workers = Workers::start(count, "infrar", move |id: WorkerId| {
        let share = shares.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let share = { share }.get_mut(id.index()).and_then(Option::take);
        let worker = Site { id, own: Arc::clone(&own), vias: (vias.0.copy(), vias.1.copy()) };
        run(worker, parts.clone(), Arc::clone(&kinds), given.clone(), share)
    })?;
    Ok(Running { listeners, workers, spread })
}

fn plan(settings: &Settings) -> Vec<(Listener, SocketAddr)> {
    let mut plan = Vec::new();
    if let Some(outbound) = &settings.outbound {
        plan.push((Listener::Outbound, outbound.listen));
        plan.extend(
            outbound.ports.iter().map(|(service, at)| (Listener::Port(service.clone()), *at)),
        );
    }
    plan.extend(
        settings
            .inbound
            .iter()
            .enumerate()
            .map(|(index, it)| (Listener::Inbound(index), it.listen)),
    );
    plan
}

/// One worker, from its first breath to its last.
async fn run(
    site: Site,
    parts: Parts,
    kinds: Arc<[Listener]>,
    spread: Spread<usize>,
    share: Option<Share>,
) {
    let Some(Share { listeners, handed }) = share else { return };
    let id = site.id;
    let worker = Rc::new(worker(parts, site));
    worker.refresh();
    let mut doors = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        match door(&worker, index, kind) {
            Ok(door) => doors.push(Rc::new(door)),
            Err(error) => return tracing::error!(%error, "a worker cannot serve"),
        }
    }
    runtime::spawn_local("snapshots", Rc::clone(&worker).follow());
    runtime::spawn_local("pools", prune(Rc::clone(&worker)));
    runtime::spawn_local(
        "handed-over",
        accept::take_over(doors.clone(), handed, Rc::clone(&worker)),
    );
    for (door, listener) in doors.iter().zip(listeners) {
        match TcpListener::from_std(listener) {
            Ok(listener) => {
                let listening = accept::listen(
                    Rc::clone(door),
                    listener,
                    Rc::clone(&worker),
                    id,
                    spread.clone(),
                );
                runtime::spawn_local("listener", listening);
            }
            Err(error) => tracing::error!(%error, "a listener was lost"),
        }
    }
    drop(doors);
    let Ends { inbound, outbound } = &worker.ends;
    // Idle connections look around and leave; the others answer what they have and leave then.
    tokio::join!(leave(&worker, inbound), leave(&worker, outbound));
}

/// Waits until one way has come to its end.
async fn leave(worker: &Worker, end: &Shutdown) {
    end.wait(Phase::Drain).await;
    worker.watchdog.rouse();
    tokio::select! {
        () = end.wait_idle() => {}
        () = end.wait(Phase::Abort) => {}
    }
}

fn worker(parts: Parts, site: Site) -> Worker {
    let me = parts.settings.service.clone();
    let desk = |direction| Desk::new(&parts.registry, parts.access.clone(), direction, &me);
    let (outbound_desk, inbound_desk) = (desk(Direction::Outbound), desk(Direction::Inbound));
    let surveyor = Surveyor {
        settings: Arc::clone(&parts.settings),
        ward: Arc::clone(&parts.ward),
        tokens: parts.tokens,
        tls: parts.tls,
        resolver: parts.resolver,
        own: site.own,
        meter: parts.meter,
        registry: parts.registry,
        pools: Default::default(),
        series: Default::default(),
    };
    Worker {
        settings: parts.settings,
        ward: parts.ward,
        surveyor,
        view: Default::default(),
        trust: parts.trust,
        outbound_desk,
        inbound_desk,
        via_out: site.vias.0,
        via_in: site.vias.1,
        watchdog: Watchdog::new(),
        ends: parts.ends,
        directory: parts.directory,
        outsiders: Default::default(),
    }
}

fn door(worker: &Rc<Worker>, index: usize, kind: &Listener) -> Result<Door, StartError> {
    let (mut tls, mut allow_from): (Option<Arc<ServerTls>>, _) = (None, Vec::new());
    let story = match kind {
        Listener::Outbound | Listener::Port(_) => {
            let settings = worker.settings.outbound.clone();
            let only = match kind {
                Listener::Port(service) => Some(service.clone()),
                Listener::Outbound | Listener::Inbound(_) => None,
            };
            let Some(settings) = settings else { return Err(StartError::App(String::new())) };
            Story::Outbound(Rc::clone(worker), Outbound::new(Rc::clone(worker), settings, only))
        }
        Listener::Inbound(at) => {
            let settings = worker.settings.inbound.get(*at).cloned();
            let Some(settings) = settings else { return Err(StartError::App(String::new())) };
            tls.clone_from(&settings.tls);
            allow_from.clone_from(&settings.allow_from);
            match settings.app.clone() {
                None => Story::Edge(Rc::clone(worker), Edge::new(Rc::clone(worker), settings)),
                Some(app) => {
                    let me = &worker.settings.service;
                    let cluster = worker.surveyor.single(&app, me, None);
                    let cluster = cluster.ok_or_else(|| StartError::App(app.origin.to_string()))?;
                    let inbound = Inbound::new(Rc::clone(worker), settings, Rc::new(cluster));
                    Story::Inbound(Rc::clone(worker), inbound)
                }
            }
        }
    };
    Ok(Door { index, story: Rc::new(story), tls, allow_from })
}

/// Closes pooled connections that are too old or unused for too long.
async fn prune(worker: Rc<Worker>) {
    let mut ticks = tokio::time::interval(PRUNE);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = tokio::time::Instant::now();
        let view = worker.view.borrow().clone();
        if let Some(view) = view {
            view.prune(now);
        }
        for cluster in worker.outsiders.borrow().values() {
            cluster.targets.iter().for_each(|target| target.pool.prune(now));
        }
    }
}
