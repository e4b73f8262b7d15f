//! `infrar proxy`: the data plane as sidecar, edge or dev proxy; and the proxies of `up` and `demo`.
//!
//! This is where the rooms meet: settings become parts, sources feed the directory, and signals become the order in
//! which everything ends.

use std::{cell::Cell, net::SocketAddr, num::NonZeroUsize, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    flags::ProxyFlags,
    metrics::{conditions, discovery, expose, settings},
    reload::{Helm, Reloads},
    settings::{Workshop, reread},
    watch::{WatchedFile, changed},
    world::{World, lock},
};
use crate::{
    config::{self, Faults, ProxyFile},
    cost::Meter,
    discovery::{AskReady, Directory, Presence},
    net::{self, Resolver, ServerTls},
    proxy::{self, Admin, Ends, Parts},
    runtime::{Phase, RuntimeError, Signal, Signals, Supervisor, WorkerId, cpus},
    telemetry::Registry,
};

/// How often certificates and secrets are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// Between the closing of the doors and that of idle connections: whoever came in last has yet to shake hands and to say
/// what it wants, and the others are told with their answers to leave.
const LAST_CALLS: Duration = Duration::from_secs(1);
/// Without an inbound listener the application has ended when it holds no connection for so long.
const QUIET: Duration = Duration::from_secs(5);

/// The data plane: sidecar, edge or dev proxy.
#[derive(Debug, clap::Args)]
pub(crate) struct Proxy {
    #[command(flatten)]
    pub(super) flags: ProxyFlags,
}

impl Proxy {
    /// Runs until told to end.
    ///
    /// # Errors
    /// Whatever keeps it from beginning: faults of its settings, an address in use.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let load = || {
            config::load_proxy(
                self.flags.config.as_deref(),
                config::environment().into_iter(),
                &self.flags.pairs(),
            )
        };
        // Watched before it is read, so that no edit falls between.
        let mut watched = watch(self.flags.config.as_deref());
        let file = load()?;
        let mut signals = Signals::listen().context("signals cannot be listened to")?;
        let mut running = start(&file)?;
        let listeners = running.listeners().iter().map(|(what, at)| format!("{what} {at}"));
        let listeners = listeners.collect::<Vec<_>>().join(", ");
        tracing::info!(listeners, "the proxy serves");
        for note in file.notes() {
            tracing::warn!("{note}");
        }
        let drained = Arc::clone(&running.drained);
        let mut lost = None;
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Stop => break,
                    Signal::StopAtOnce => return {
                        let _: () = running.abort().await;
                        Ok(())
                    },
                    Signal::Reload => running.reload(load()),
                },
                () = changed(&mut watched) => running.reload(load()),
                () = drained.notified() => break,
                ended = running.running.lost() => {
                    lost = Some(lost_worker(ended));
                    break;
                }
            }
        }
        let ended = async {
            match &lost {
                None => {
                    tracing::info!("told to end");
                    running.end().await;
                }
                // The other workers finish what they have; whoever started the process starts a whole one.
                Some(error) => {
                    tracing::error!(%error, "a worker was lost: the proxy ends");
                    running.give_up().await;
                }
            }
        };
        tokio::select! {
            () = ended => {}
            () = stopped(&mut signals) => tracing::warn!("told twice: ending at once"),
        }
        running.abort().await;
        lost.map_or(Ok(()), Err)
    }
}

/// What it means that a worker ended which nobody told to.
fn lost_worker(ended: Result<WorkerId, RuntimeError>) -> anyhow::Error {
    match ended {
        Ok(worker) => anyhow::anyhow!("worker {worker} cannot serve"),
        Err(error) => error.into(),
    }
}

/// Watches the file of the settings; without one the environment says everything, and nobody edits that.
fn watch(file: Option<&Path>) -> Option<WatchedFile> {
    file.map(WatchedFile::new).transpose().unwrap_or_else(|error| {
        tracing::warn!(%error, "the settings cannot be watched; after an edit, send SIGHUP");
        None
    })
}

/// Ends when a signal says that the end does not come fast enough. The first one does not where the end began otherwise:
/// in Kubernetes it follows a preStop hook that drains.
async fn stopped(signals: &mut Signals) {
    loop {
        match signals.next().await {
            Signal::StopAtOnce => return,
            Signal::Stop => tracing::info!("told to end: it is ending already"),
            Signal::Reload => {}
        }
    }
}

/// A proxy that runs in this process.
pub(crate) struct RunningProxy {
    helm: Helm,
    /// Where its admin API listens.
    pub(crate) admin: SocketAddr,
    ends: Ends,
    supervisor: Arc<Supervisor>,
    running: proxy::Running,
    drained: Arc<Notify>,
    /// What tells the control plane of it.
    presence: Option<Presence>,
}

/// Starts a proxy on the current runtime; afterwards its listeners are open.
///
/// # Errors
/// Whatever keeps it from beginning.
pub(crate) fn start(file: &ProxyFile) -> anyhow::Result<RunningProxy> {
    net::try_bind(&file.addresses())?;
    let supervisor = Arc::new(Supervisor::new(Handle::current()));
    let admin_socket = bind(file.admin.listen, "admin.listen")?;
    let probes_socket = file.admin.probes.map(|at| bind(at, "admin.probes")).transpose()?;
    let admin_at = admin_socket.local_addr()?;
    let admins = [Some(&admin_socket), probes_socket.as_ref()].into_iter().flatten();
    let own = admins.map(TcpListener::local_addr).collect::<Result<_, _>>()?;
    let mut workshop = Workshop::default();
    let (sender, receiver) = watch::channel(Arc::new(workshop.settings(file)?));
    let directory = Arc::new(Directory::default());
    let world = World::open(file, &supervisor, &directory)?;
    let (ends, ward) = (Ends::default(), Arc::<proxy::Ward>::default());
    let (meter, registry) = (Arc::new(Meter::default()), Arc::new(Registry::default()));
    let parts = Parts {
        settings: receiver,
        directory: Arc::clone(&directory),
        tokens: Arc::clone(&world.tokens),
        trust: world.verifier(),
        resolver: Resolver::new(Supervisor::clone(&supervisor)),
        meter: Arc::clone(&meter),
        registry: Arc::clone(&registry),
        ends: ends.clone(),
        ward: Arc::clone(&ward),
        own,
    };
    let running = proxy::start(parts, workers(file))?;
    let helm = Helm {
        in_force: file.clone(),
        workshop,
        settings: sender,
        reins: world.reins(),
        certificates: Arc::default(),
        log: Arc::default(),
        reloads: Arc::<Reloads>::default(),
    };
    helm.note();
    let shared = Arc::clone(&ward);
    registry.register_collector(Box::new(move |found| conditions(found, &ward)));
    let reloads = Arc::clone(&helm.reloads);
    registry.register_collector(Box::new(move |found| settings(found, &reloads)));
    let sources = world.sources();
    registry.register_collector(Box::new(move |found| discovery(found, &sources)));
    expose(&registry, &world, &directory, &meter, &running, Arc::clone(&helm.log));
    let drained = Arc::new(Notify::new());
    let ready = world.readiness(!file.inbound.is_empty());
    let answering = answers(&ready);
    let admin = Admin {
        registry,
        directory: Arc::clone(&directory),
        ready,
        shutdown: ends.inbound.clone(),
        drain: Arc::clone(&drained),
        supervisor: Supervisor::clone(&supervisor),
    };
    serve(&supervisor, admin, admin_socket, probes_socket);
    let presence = world.presence();
    world.live(&supervisor, answering, Arc::new(move || shared.served()));
    watch_certificates(&supervisor, &helm);
    Ok(RunningProxy { helm, admin: admin_at, ends, supervisor, running, drained, presence })
}

fn workers(file: &ProxyFile) -> NonZeroUsize {
    match file.workers {
        config::Workers::Auto => cpus(),
        config::Workers::Count(count) => count,
    }
}

fn answers(ready: &proxy::Ready) -> AskReady {
    let ready = Arc::clone(ready);
    Arc::new(move || ready().is_ok())
}

fn bind(at: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    let mut sockets = net::bind(at, 1, key)?;
    let socket = sockets.pop().context("no socket")?;
    Ok(TcpListener::from_std(socket)?)
}

fn serve(supervisor: &Supervisor, admin: Admin, socket: TcpListener, probes: Option<TcpListener>) {
    if let Some(probes) = probes {
        supervisor.spawn_until_end("probes", admin.clone().serve_probes(probes));
    }
    supervisor.spawn_until_end("admin", admin.serve(socket));
}

impl RunningProxy {
    /// Where it listens.
    pub(crate) fn listeners(&self) -> &[(proxy::Listener, SocketAddr)] {
        &self.running.listeners
    }

    /// Takes over other settings, or says why not and keeps the old ones.
    fn reload(&mut self, loaded: Result<ProxyFile, Faults>) {
        self.helm.follow(loaded, &mut self.running, &self.supervisor);
    }

    /// Ends it quickly, in order: for `up` and `demo`.
    pub(crate) async fn shutdown(self) {
        self.take_leave().await;
        self.ends.inbound.advance(Phase::Drain);
        self.ends.outbound.advance(Phase::Drain);
        let idle =
            async { tokio::join!(self.ends.inbound.wait_idle(), self.ends.outbound.wait_idle()) };
        if tokio::time::timeout(Duration::from_secs(2), idle).await.is_err() {
            tracing::debug!("connections were still open at the end");
        }
        self.abort().await;
    }

    /// The order of the end: not ready; no new connections in; what is in flight in ends; then the way out closes, once
    /// the application has ended.
    async fn end(&self) {
        self.end_in_order(self.application_ended()).await;
    }

    /// The same of a proxy that is not whole, whose application was told nothing: calls out end with those that came in.
    async fn give_up(&self) {
        self.end_in_order(std::future::ready(())).await;
    }

    async fn end_in_order(&self, called_out: impl Future<Output = ()>) {
        let config::ShutdownTimes { grace, deadline } = self.helm.in_force.shutdown;
        let deadline = Instant::now() + deadline;
        let Ends { inbound, outbound } = &self.ends;
        inbound.advance(Phase::NotReady);
        if let Some(presence) = &self.presence {
            presence.leave();
        }
        let awaited = Cell::new("requests of callers");
        let ended = async {
            tokio::time::sleep(grace).await;
            inbound.advance(Phase::StopAccepting);
            tokio::time::sleep(LAST_CALLS).await;
            inbound.advance(Phase::Drain);
            inbound.wait_idle().await;
            self.take_leave().await;
            awaited.set("the application to end: it still accepts connections, or calls out");
            called_out.await;
            awaited.set("calls of the application");
            outbound.advance(Phase::Drain);
            outbound.wait_idle().await;
        };
        if tokio::time::timeout_at(deadline, ended).await.is_err() {
            tracing::warn!(
                awaited = awaited.get(),
                calls_in = inbound.in_flight(),
                calls_out = outbound.in_flight(),
                "shutdown.deadline has passed: ending without what was awaited"
            );
        }
    }

    /// What others may call goes before what answers them is gone.
    async fn take_leave(&self) {
        if let Some(presence) = &self.presence {
            presence.gone().await;
        }
    }

    /// Ends when the application behind us refuses connections; without one, when nobody has called out for a while.
    async fn application_ended(&self) {
        let file = &self.helm.in_force;
        if file.outbound.is_none() {
            return;
        }
        let apps: Vec<_> =
            file.inbound.iter().filter_map(|it| Some(it.app.as_ref()?.origin.clone())).collect();
        let mut ticks = tokio::time::interval(Duration::from_millis(250));
        let mut quiet_since = Instant::now();
        loop {
            ticks.tick().await;
            if apps.is_empty() {
                if self.ends.outbound.in_flight() > 0 {
                    quiet_since = Instant::now();
                }
                if quiet_since.elapsed() >= QUIET {
                    return;
                }
                continue;
            }
            let mut alive = false;
            for app in &apps {
                let at = (app.host().to_string(), app.port());
                alive |= tokio::net::TcpStream::connect((at.0.trim_matches(['[', ']']), at.1))
                    .await
                    .is_ok();
            }
            if !alive {
                return;
            }
        }
    }

    /// Ends what is left.
    async fn abort(self) {
        self.ends.inbound.advance(Phase::Abort);
        self.ends.outbound.advance(Phase::Abort);
        if let Err(error) = self.running.join().await {
            tracing::error!(error = &error as &dyn std::error::Error, "a worker did not end well");
        }
        if let Err(error) = self.supervisor.shutdown(Duration::from_secs(2)).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "a task did not end in time");
        }
    }
}

fn watch_certificates(supervisor: &Supervisor, helm: &Helm) {
    let in_use = Arc::clone(&helm.certificates);
    supervisor.spawn_until_end("certificates", async move {
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            ticks.tick().await;
            let certificates = lock(&in_use).clone();
            let looking = move || reread(&certificates, ServerTls::look);
            if tokio::task::spawn_blocking(looking).await.is_err() {
                return;
            }
        }
    });
}
