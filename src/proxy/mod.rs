//! The data plane: how a request walks from the socket it came in on to the endpoint that answers it.
//!
//! One worker per core, each with its own listening sockets, view of the project, pools, caches and counters; they share
//! nothing on the path of a request but snapshots. Everything that may stall lives on the side runtime. The stories are
//! `outbound`, `inbound` and `edge`; each reads from top to bottom.

mod accept;
mod admin;
mod answer_h2;
mod backlog;
mod complaint;
mod edge;
mod flow;
mod forward;
mod headers;
mod inbound;
mod live;
mod outbound;
mod patience;
mod record;
mod reject;
mod reload;
mod route;
mod running;
mod serve_h1;
mod serve_h2;
mod settings;
mod stages;
mod story;
mod trial;
mod tunnel;
mod view;
mod walk;
mod wire_h1;
mod worker;

use std::{net::SocketAddr, num::NonZeroUsize, rc::Rc, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};

use self::{
    accept::Doors,
    headers::Via,
    live::Live,
    record::Desk,
    reload::{Opening, open},
    running::OPENINGS,
    view::Surveyor,
    worker::Worker,
};
pub use self::{
    admin::{Admin, AdminAddress, Ready},
    reject::Rejection,
    running::{Bound, Listener, Running},
    settings::{App, InboundSettings, Limits, OutboundSettings, Role, Settings, UnknownHosts},
    stages::{Hop, Routes, service_named},
    view::{Condition, Ward},
};
use crate::{
    cost::Meter,
    discovery::Directory,
    identity::{Tokens, Verifier},
    net::{self, BindError, Handover, Resolver, Spread},
    runtime::{self, Phase, RuntimeError, Shutdown, Watchdog, WorkerId, Workers},
    telemetry::{Direction, Registry},
    upstream::OwnAddresses,
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
    /// What it should do, now and from then on.
    pub settings: watch::Receiver<Arc<Settings>>,
    /// Where snapshots come from.
    pub directory: Arc<Directory>,
    /// Where outbound tokens come from.
    pub tokens: Arc<Tokens>,
    /// Who verifies inbound tokens.
    pub trust: Arc<ArcSwap<Verifier>>,
    /// Names to addresses.
    pub resolver: Resolver,
    /// Counts bytes.
    pub meter: Arc<Meter>,
    /// Counts requests.
    pub registry: Arc<Registry>,
    /// How far the end has come, each way.
    pub ends: Ends,
    /// What is known about endpoints.
    pub ward: Arc<Ward>,
    /// Further addresses of this process that calls must not go to (the admin API and the probes).
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

/// What one worker is given to start with.
struct Share {
    openings: Vec<Opening>,
    handed: mpsc::Receiver<Handover<usize>>,
    later: mpsc::Receiver<Opening>,
}

/// Which worker it is, and what it has in common with the others.
struct Site {
    id: WorkerId,
    own: OwnAddresses,
    /// This process on the way out and on the way in.
    vias: (Via, Via),
}

/// Opens the listeners and starts the workers.
///
/// # Errors
/// [`StartError`]; nothing runs then.
pub fn start(parts: Parts, count: NonZeroUsize) -> Result<Running, StartError> {
    let plan = plan(&parts.settings.borrow());
    let (spread, handed) = Spread::new(count);
    let (ways, laters): (Vec<_>, Vec<_>) =
        (0..count.get()).map(|_| mpsc::channel(OPENINGS)).unzip();
    let ends = handed.into_iter().zip(laters);
    let mut shares: Vec<Share> =
        ends.map(|(handed, later)| Share { openings: Vec::new(), handed, later }).collect();
    let (mut listeners, mut asked) = (Vec::new(), Vec::new());
    for (id, (listener, address)) in plan.into_iter().enumerate() {
        let sockets = net::bind(address, count.get(), &listener.key())?;
        let bound = sockets.first().and_then(|socket| socket.local_addr().ok()).unwrap_or(address);
        for (share, socket) in shares.iter_mut().zip(sockets) {
            share.openings.push(Opening { id, listener: listener.clone(), asked: address, socket });
        }
        listeners.push((listener, bound));
        asked.push(address);
    }
    let (own, others) = (OwnAddresses::default(), parts.own.clone());
    let open = listeners.iter().map(|(_, at)| *at);
    own.set(open.chain(others.iter().copied()).collect());
    let shares = Arc::new(std::sync::Mutex::new(shares.into_iter().map(Some).collect::<Vec<_>>()));
    let (given, list) = (spread.clone(), own.clone());
    let vias = (Via::random(), Via::random());
    let workers = Workers::start(count, "infrar", move |id: WorkerId| {
        let share = shares.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let share = { share }.get_mut(id.index()).and_then(Option::take);
        let site = Site { id, own: list.clone(), vias: (vias.0.copy(), vias.1.copy()) };
        run(site, parts.clone(), given.clone(), share)
    })?;
    let next_id = listeners.len();
    Ok(Running { listeners, workers, spread, own, others, asked, ways, next_id })
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
async fn run(site: Site, parts: Parts, spread: Spread<usize>, share: Option<Share>) {
    let Some(Share { openings, handed, later }) = share else { return };
    let id = site.id;
    let settings = parts.settings.clone();
    let worker = Rc::new(worker(parts, site));
    worker.refresh();
    let doors = Rc::new(Doors::default());
    runtime::spawn_local("snapshots", Rc::clone(&worker).follow());
    runtime::spawn_local("pools", prune(Rc::clone(&worker)));
    runtime::spawn_local(
        "handed-over",
        accept::take_over(Rc::clone(&doors), handed, Rc::clone(&worker)),
    );
    let post = reload::Post { worker: Rc::clone(&worker), doors, id, spread };
    for opening in openings {
        if let Err(error) = open(&post, opening) {
            return tracing::error!(%error, "a worker cannot serve");
        }
    }
    runtime::spawn_local("settings", reload::follow(post, settings, later));
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
    let settings = Arc::clone(&parts.settings.borrow());
    let me = settings.service.clone();
    let desk = |direction| Desk::new(&parts.registry, settings.access.clone(), direction, &me);
    let (outbound_desk, inbound_desk) = (desk(Direction::Outbound), desk(Direction::Inbound));
    let limits = Live::new(settings.limits);
    let surveyor = Rc::new(Surveyor {
        settings: settings.into(),
        ward: Arc::clone(&parts.ward),
        tokens: parts.tokens,
        resolver: parts.resolver,
        own: site.own,
        meter: parts.meter,
        registry: parts.registry,
        pools: Default::default(),
        made: Default::default(),
        series: Default::default(),
    });
    Worker {
        me,
        limits,
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
        warned: Default::default(),
        outsiders: Default::default(),
        telling: Arc::new(tokio::sync::Semaphore::new(accept::TOLD_AT_ONCE)),
    }
}

/// Closes pooled connections that are too old or unused for too long.
async fn prune(worker: Rc<Worker>) {
    let mut ticks = tokio::time::interval(PRUNE);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        worker.surveyor.prune(tokio::time::Instant::now());
    }
}
