//! `infrar proxy`: the data plane as sidecar, edge or dev proxy; and the proxies of `up` and `demo`.
//!
//! This is where the rooms meet: settings become parts, sources feed the directory, and signals become the order in
//! which everything ends.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{net::TcpListener, runtime::Handle, sync::Notify, time::Instant};

use super::{
    flags::ProxyFlags,
    metrics::{conditions, expose},
    settings::settings,
    world::World,
};
use crate::{
    config::{self, ProxyFile},
    cost::Meter,
    discovery::Directory,
    net::{self, ClientTls, Reload, Resolver, ServerTls},
    proxy::{self, Admin, Ends, Parts},
    runtime::{Phase, Signal, Signals, Supervisor, cpus},
    telemetry::{AccessLog, Flushing, Format, Registry},
};

/// How often certificates and secrets are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// Without an inbound listener the application has ended when it holds no connection for so long.
const QUIET: Duration = Duration::from_secs(5);

/// The data plane: sidecar, edge or dev proxy.
#[derive(Debug, clap::Args)]
pub(crate) struct Proxy {
    #[command(flatten)]
    flags: ProxyFlags,
}

impl Proxy {
    /// Runs until told to end.
    ///
    /// # Errors
    /// Whatever keeps it from beginning: faults of its settings, an address in use.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let load = move || {
            config::load_proxy(
                self.flags.config.as_deref(),
                config::environment().into_iter(),
                &self.flags.pairs(),
            )
        };
        let file = load()?;
        let mut signals = Signals::listen().context("signals cannot be listened to")?;
        let settings = file.shutdown.clone();
        let running = start(&file)?;
        tracing::info!(listeners = ?running.listeners, "the proxy serves");
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Stop => break,
                    Signal::StopAtOnce => return {
                        let _: () = running.abort().await;
                        Ok(())
                    },
                    Signal::Reload => match load() {
                        Ok(_same_shape) => running.reload(),
                        Err(faults) => tracing::error!("the settings were not taken over, the old ones stay:\n{faults}"),
                    },
                },
                () = running.drained.notified() => break,
            }
        }
        tracing::info!("told to end");
        tokio::select! {
            () = running.end(settings.grace, settings.deadline) => {}
            () = stopped(&mut signals) => tracing::warn!("told twice: ending at once"),
        }
        running.abort().await;
        Ok(())
    }
}

async fn stopped(signals: &mut Signals) {
    loop {
        match signals.next().await {
            Signal::Stop | Signal::StopAtOnce => return,
            Signal::Reload => {}
        }
    }
}

/// A proxy that runs in this process.
pub(crate) struct RunningProxy {
    /// Where it listens.
    pub(crate) listeners: Vec<(proxy::Listener, SocketAddr)>,
    ends: Ends,
    supervisor: Arc<Supervisor>,
    running: proxy::Running,
    apps: Vec<crate::model::Origin>,
    certificates: Vec<Arc<ServerTls>>,
    drained: Arc<Notify>,
    #[expect(dead_code, reason = "held for its Drop, which writes the lines that wait")]
    flushing: Option<Flushing>,
}

/// Starts a proxy on the current runtime; afterwards its listeners are open.
///
/// # Errors
/// Whatever keeps it from beginning.
pub(crate) fn start(file: &ProxyFile) -> anyhow::Result<RunningProxy> {
    let supervisor = Arc::new(Supervisor::new(Handle::current()));
    let admin_socket = bind(file.admin.listen, "admin.listen")?;
    let probes_socket = file.admin.probes.map(|at| bind(at, "admin.probes")).transpose()?;
    let admin_at = admin_socket.local_addr()?;
    let tls = trusted(file)?;
    let directory = Arc::new(Directory::default());
    let world = World::open(file, &supervisor, &directory)?;
    let log = file.log.access.then(|| AccessLog::stdout(format(file.log.format)));
    let (access, flushing) = log.unzip();
    let settings = Arc::new(settings(file)?);
    let certificates: Vec<_> = settings.inbound.iter().filter_map(|it| it.tls.clone()).collect();
    let (ends, ward) = (Ends::default(), Arc::<proxy::Ward>::default());
    let (meter, registry) = (Arc::new(Meter::default()), Arc::new(Registry::default()));
    let parts = Parts {
        settings: Arc::clone(&settings),
        directory: Arc::clone(&directory),
        tokens: Arc::clone(&world.tokens),
        trust: world.verifier(),
        tls,
        resolver: Resolver::new(Handle::current()),
        meter: Arc::clone(&meter),
        registry: Arc::clone(&registry),
        access: access.clone(),
        ends: ends.clone(),
        ward: Arc::clone(&ward),
        own: vec![admin_at],
    };
    let count = match file.workers {
        config::Workers::Auto => cpus(),
        config::Workers::Count(count) => count,
    };
    let running = proxy::start(parts, count)?;
    registry.register_collector(Box::new(move |found| conditions(found, &ward)));
    expose(&registry, &world, &directory, &meter, &running, access);
    let drained = Arc::new(Notify::new());
    let inbound = !settings.inbound.is_empty();
    let admin = Admin {
        registry,
        directory: Arc::clone(&directory),
        ready: world.readiness(inbound),
        shutdown: ends.inbound.clone(),
        drain: Arc::clone(&drained),
    };
    serve(&supervisor, admin, admin_socket, probes_socket)?;
    world.live(&supervisor);
    watch_certificates(&supervisor, &certificates);
    Ok(RunningProxy {
        listeners: running.listeners.clone(),
        ends,
        supervisor,
        running,
        apps: settings
            .inbound
            .iter()
            .filter_map(|it| Some(it.app.as_ref()?.origin.clone()))
            .collect(),
        certificates,
        drained,
        flushing,
    })
}

/// Whom TLS believes.
fn trusted(file: &ProxyFile) -> anyhow::Result<Arc<ClientTls>> {
    let tls = Arc::new(ClientTls::new(file.trust_ca_file.as_deref())?);
    if file.trust_ca_file.is_none() {
        let tls = Arc::clone(&tls);
        // Reading the system's roots takes long; nobody waits for it.
        drop(Handle::current().spawn_blocking(move || tls.preload()));
    }
    Ok(tls)
}

fn bind(at: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    let mut sockets = net::bind(at, 1, key)?;
    let socket = sockets.pop().context("no socket")?;
    Ok(TcpListener::from_std(socket)?)
}

fn serve(
    supervisor: &Supervisor,
    admin: Admin,
    socket: TcpListener,
    probes: Option<TcpListener>,
) -> anyhow::Result<()> {
    if let Some(probes) = probes {
        let admin = admin.clone();
        supervisor.spawn_until_end("probes", async move {
            if let Err(error) = admin.serve_probes(probes).await {
                tracing::error!(%error, "the probes ended");
            }
        });
    }
    supervisor.spawn_until_end("admin", async move {
        if let Err(error) = admin.serve(socket).await {
            tracing::error!(%error, "the admin API ended");
        }
    });
    Ok(())
}

impl RunningProxy {
    /// Ends it quickly, in order: for `up` and `demo`.
    pub(crate) async fn shutdown(self) {
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
    async fn end(&self, grace: Duration, deadline: Duration) {
        let deadline = Instant::now() + deadline;
        let Ends { inbound, outbound } = &self.ends;
        inbound.advance(Phase::NotReady);
        let ended = async {
            tokio::time::sleep(grace).await;
            inbound.advance(Phase::Drain);
            inbound.wait_idle().await;
            self.application_ended().await;
            outbound.advance(Phase::Drain);
            outbound.wait_idle().await;
        };
        if tokio::time::timeout_at(deadline, ended).await.is_err() {
            tracing::warn!("shutdown.deadline has passed with connections still open");
        }
    }

    /// Ends when the application behind us refuses connections; without one, when nobody has called out for a while.
    async fn application_ended(&self) {
        let calls_out = self.listeners.iter().any(|(listener, _)| match listener {
            proxy::Listener::Outbound | proxy::Listener::Port(_) => true,
            proxy::Listener::Inbound(_) => false,
        });
        if !calls_out {
            return;
        }
        let mut ticks = tokio::time::interval(Duration::from_millis(250));
        let mut quiet_since = Instant::now();
        loop {
            ticks.tick().await;
            if self.apps.is_empty() {
                if self.ends.outbound.in_flight() > 0 {
                    quiet_since = Instant::now();
                }
                if quiet_since.elapsed() >= QUIET {
                    return;
                }
                continue;
            }
            let mut alive = false;
            for app in &self.apps {
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

    /// Looks at certificates now.
    fn reload(&self) {
        reload(&self.certificates);
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

fn reload(certificates: &[Arc<ServerTls>]) {
    for certificate in certificates {
        match certificate.reload() {
            Ok(Reload::Changed) => tracing::info!("a new certificate is in use"),
            Ok(Reload::Unchanged) => {}
            Err(error) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "a new certificate cannot be used; the old one stays"
            ),
        }
    }
}

fn watch_certificates(supervisor: &Supervisor, certificates: &[Arc<ServerTls>]) {
    if certificates.is_empty() {
        return;
    }
    let certificates = certificates.to_vec();
    supervisor.spawn_until_end("certificates", async move {
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            ticks.tick().await;
            let certificates = certificates.clone();
            if tokio::task::spawn_blocking(move || reload(&certificates)).await.is_err() {
                return;
            }
        }
    });
}

fn format(format: config::LogFormat) -> Format {
    match format {
        config::LogFormat::Auto => Format::Auto,
        config::LogFormat::Text => Format::Text,
        config::LogFormat::Json => Format::Json,
    }
}
