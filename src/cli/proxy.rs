//! `infrar proxy`: the data plane as sidecar, edge or dev proxy; and the proxies of `up` and `demo`.
//!
//! This is where the rooms meet: settings become parts, sources feed the directory, and signals become the order in
//! which everything ends.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use secrecy::SecretString;
use serde_json::Value;
use tokio::{net::TcpListener, runtime::Handle, sync::Notify, time::Instant};

use super::{flags::ProxyFlags, trust::Trust, watch::WatchedFile};
use crate::{
    api::{CONTROL_AUDIENCE, Catalog, Client, ClientSettings, Credential, TokenAnswer},
    balance::CircuitState,
    config::{self, ProxyFile},
    cost::{Meter, PriceBook},
    discovery::{AskBearer, Directory, Registry as Source, State},
    identity::{
        Access, ControlTokens, NoTokens, PathRule, Rule, Rules, StoredToken, TokenSource,
        TokenUnavailable, Tokens,
    },
    model::{Protocol, ServiceName},
    net::{self, ClientTls, MinVersion, Reload, Resolver, ServerTls},
    proxy::{self, Admin, Ends, Parts},
    runtime::{Clock, Phase, Signal, Signals, Supervisor, cpus},
    telemetry::{AccessLog, Flushing, Format, Registry, names},
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

/// What a proxy knows of the world beyond its listeners: the project, tokens, keys, and the folder that keeps them.
struct World {
    directory: Arc<Directory>,
    tokens: Arc<Tokens>,
    trust: Arc<Mutex<Trust>>,
    state: Option<State>,
    source: Option<Source>,
    /// A project that is read from a file.
    file: Option<PathBuf>,
}

/// The names of the kept files.
const SNAPSHOT: &str = "snapshot";
const JWKS: &str = "jwks";
const TOKENS: &str = "tokens";

impl World {
    fn open(
        file: &ProxyFile,
        supervisor: &Arc<Supervisor>,
        directory: &Arc<Directory>,
    ) -> anyhow::Result<Self> {
        match &file.registry {
            config::Registry::File(path) => Self::from_file(file, path, supervisor, directory),
            config::Registry::Control(control) => {
                Self::from_control(file, control, supervisor, directory)
            }
        }
    }

    fn token_files(file: &ProxyFile) -> HashMap<ServiceName, PathBuf> {
        let files = file.outbound.as_ref().map(|outbound| outbound.token_files.clone());
        files.unwrap_or_default().into_iter().collect()
    }

    fn from_file(
        file: &ProxyFile,
        path: &Path,
        supervisor: &Supervisor,
        directory: &Arc<Directory>,
    ) -> anyhow::Result<Self> {
        let catalog =
            Catalog { revision: 1, issuer: String::new(), project: config::load_registry(path)? };
        let client = Client::new(ClientSettings::new(Vec::new(), file.trust_ca_file.clone()))?;
        let mut trust = Trust::new(client, false, HashMap::new());
        trust.follow(&catalog, supervisor);
        directory.publish(catalog);
        let tokens = Tokens::new(
            Arc::new(NoTokens),
            Self::token_files(file),
            Handle::current(),
            Clock::system(),
        );
        Ok(Self {
            directory: Arc::clone(directory),
            tokens: Arc::new(tokens),
            trust: Arc::new(Mutex::new(trust)),
            state: None,
            source: None,
            file: Some(path.to_owned()),
        })
    }

    fn from_control(
        file: &ProxyFile,
        control: &config::Control,
        supervisor: &Arc<Supervisor>,
        directory: &Arc<Directory>,
    ) -> anyhow::Result<Self> {
        let client =
            Client::new(ClientSettings::new(control.urls.clone(), control.ca_file.clone()))?;
        let secret = match &control.credential {
            config::Credential::ClientSecretFile(path) => path.clone(),
            config::Credential::TokenFile(_) | config::Credential::PrivateKeyFile(_) => {
                anyhow::bail!("control.credential: this release knows client_secret_file only")
            }
        };
        let source = SecretFile { client: client.clone(), me: file.service.clone(), path: secret };
        let tokens = Tokens::new(
            Arc::new(source),
            Self::token_files(file),
            Handle::current(),
            Clock::system(),
        );
        let tokens = Arc::new(tokens);
        let state = control
            .state_dir
            .as_ref()
            .map(|folder| State::open(folder, file.service.clone(), Clock::system()))
            .transpose()?;
        let mut remembered = HashMap::new();
        let mut catalog = None;
        if let Some(state) = &state {
            let oldest = control.max_snapshot_age;
            remembered = kept(state, JWKS, oldest).map(|found| found.0).unwrap_or_default();
            if let Some((tokens_of_old, _)) = kept::<Vec<StoredToken>>(state, TOKENS, oldest) {
                tokens.restore(tokens_of_old);
            }
            catalog = kept::<Catalog>(state, SNAPSHOT, oldest);
        }
        let mut trust = Trust::new(client.clone(), true, remembered);
        if let Some((catalog, age)) = catalog {
            trust.follow(&catalog, supervisor);
            directory.adopt(catalog, age);
        }
        let name: ServiceName = CONTROL_AUDIENCE.parse()?;
        let slot = tokens.slot(&name);
        let bearer: AskBearer = Arc::new(move || {
            let slot = Arc::clone(&slot);
            async move {
                slot.bearer().await.map(|bearer| bearer.token()).map_err(|error| error.to_string())
            }
            .boxed()
        });
        let source = Source::new(client, bearer, Arc::clone(directory));
        Ok(Self {
            directory: Arc::clone(directory),
            tokens,
            trust: Arc::new(Mutex::new(trust)),
            state,
            source: Some(source),
            file: None,
        })
    }

    fn verifier(&self) -> Arc<arc_swap::ArcSwap<crate::identity::Verifier>> {
        lock(&self.trust).verifier()
    }

    /// Ready: there is a snapshot, and keys wherever tokens are to be verified.
    fn readiness(&self, inbound: bool) -> proxy::Ready {
        let (directory, trust) = (Arc::clone(&self.directory), Arc::clone(&self.trust));
        Arc::new(move || {
            if directory.load().is_none() {
                return Err("there is no snapshot of the project yet");
            }
            let sets = lock(&trust).sets();
            if inbound && sets.iter().any(|keys| keys.load().is_empty()) {
                return Err("the public keys of an issuer are not there yet");
            }
            Ok(())
        })
    }

    /// Starts everything that keeps it current.
    fn live(self, supervisor: &Arc<Supervisor>) {
        let Self { directory, tokens, trust, state, source, file } = self;
        if let Some(source) = source {
            supervisor.spawn_until_end("registry", source.follow());
        }
        if let Some(path) = file {
            supervisor.spawn_until_end("project-file", follow_file(path, Arc::clone(&directory)));
        }
        if let Some(state) = &state {
            let secrets = keep_secrets(state.clone(), Arc::clone(&trust), tokens);
            supervisor.spawn_until_end("kept-secrets", secrets);
        }
        let keeper = Arc::clone(supervisor);
        supervisor.spawn_until_end("trust", async move {
            let mut changes = directory.changes();
            changes.mark_changed();
            while changes.changed().await.is_ok() {
                let Some(catalog) = directory.load() else { continue };
                lock(&trust).follow(&catalog, &keeper);
                if let Some(state) = &state {
                    keep(state, SNAPSHOT, (*catalog).clone()).await;
                }
            }
        });
    }
}

/// Keeps keys and tokens on disk as they come.
async fn keep_secrets(state: State, trust: Arc<Mutex<Trust>>, tokens: Arc<Tokens>) {
    let followed = lock(&trust).followed();
    let mut changes = tokens.changes();
    changes.mark_changed();
    let mut last: HashMap<String, Value> = HashMap::new();
    loop {
        // Listened to before they are read, so that no change falls between.
        let sets = lock(&trust).sets();
        let mut listened: Vec<_> = sets.iter().map(|keys| keys.changes()).collect();
        let now: HashMap<String, Value> = sets
            .iter()
            .filter(|keys| !keys.load().is_empty())
            .filter_map(|keys| {
                Some((keys.issuer().to_string(), serde_json::to_value(keys.load().source()).ok()?))
            })
            .collect();
        if now != last {
            keep(&state, JWKS, now.clone()).await;
            last = now;
        }
        let keys: FuturesUnordered<_> =
            listened.iter_mut().map(tokio::sync::watch::Receiver::changed).collect();
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                keep(&state, TOKENS, tokens.snapshot()).await;
            }
            Some(_changed) = keys.into_future().map(|(first, _)| first) => {}
            () = followed.notified() => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an earlier run kept, or nothing: what must not be used is reported and passed over.
fn kept<T: serde::de::DeserializeOwned>(
    state: &State,
    name: &str,
    oldest: Duration,
) -> Option<(T, Duration)> {
    match state.kept(name, oldest) {
        Ok(found) => found.map(|stored| (stored.content, stored.age)),
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "a kept file is not used");
            None
        }
    }
}

async fn keep<T: serde::Serialize + Send + 'static>(state: &State, name: &'static str, content: T) {
    let state = state.clone();
    let kept = tokio::task::spawn_blocking(move || state.keep(name, &content)).await;
    if let Ok(Err(error)) = kept {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "what must survive a restart could not be written"
        );
    }
}

/// Re-reads a project file when it changes; one with faults changes nothing.
async fn follow_file(path: PathBuf, directory: Arc<Directory>) {
    let mut watched = match WatchedFile::new(&path) {
        Ok(watched) => watched,
        Err(error) => {
            return tracing::error!(%error, path = %path.display(), "the project file cannot be watched");
        }
    };
    loop {
        watched.changed().await;
        match config::load_registry(&path) {
            Ok(project) => {
                let revision = directory.load().map_or(1, |catalog| catalog.revision + 1);
                directory.publish(Catalog { revision, issuer: String::new(), project });
            }
            Err(faults) => {
                tracing::error!("the project was not taken over, the old one stays:\n{faults}")
            }
        }
    }
}

/// Tokens from the control plane; the secret is read each time, so one that was exchanged is found.
struct SecretFile {
    client: Client,
    me: ServiceName,
    path: PathBuf,
}

impl TokenSource for SecretFile {
    fn ask(
        &self,
        audience: &ServiceName,
    ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
        let secret = std::fs::read_to_string(&self.path).unwrap_or_default();
        let secret = SecretString::from(secret.trim_end().to_owned());
        let credential = Credential { client_id: self.me.clone(), secret };
        ControlTokens::new(self.client.clone(), credential).ask(audience)
    }
}

/// The settings of the data plane, out of those of the file.
fn settings(file: &ProxyFile) -> anyhow::Result<proxy::Settings> {
    let outbound = file.outbound.as_ref().map(|outbound| proxy::OutboundSettings {
        listen: outbound.listen,
        ports: outbound.ports.clone(),
        unknown_hosts: match outbound.unknown_hosts {
            config::UnknownHosts::Deny => proxy::UnknownHosts::Deny,
            config::UnknownHosts::Allow => proxy::UnknownHosts::Allow,
        },
        via: outbound.via.clone(),
        override_authorization: outbound.override_authorization,
    });
    let limits = &file.limits;
    Ok(proxy::Settings {
        role: match file.role {
            config::Role::Sidecar => proxy::Role::Sidecar,
            config::Role::Edge => proxy::Role::Edge,
            config::Role::Dev => proxy::Role::Dev,
        },
        service: file.service.clone(),
        place: file.place.clone(),
        zone: file.zone.clone(),
        outbound,
        inbound: file.inbound.iter().map(inbound).collect::<anyhow::Result<_>>()?,
        limits: proxy::Limits {
            head: crate::http1::HeadLimits { bytes: limits.header_bytes, headers: limits.headers },
            header_timeout: limits.header_timeout,
            idle_timeout: limits.idle_timeout,
            streams: limits.streams,
            connections: limits.connections,
            body_bytes: limits.body_bytes,
            ..proxy::Limits::default()
        },
    })
}

fn inbound(file: &config::Inbound) -> anyhow::Result<proxy::InboundSettings> {
    let tls = match &file.tls {
        config::Tls::Files { cert_file, key_file, min_version } => {
            let min = match min_version {
                config::TlsVersion::V12 => MinVersion::Tls12,
                config::TlsVersion::V13 => MinVersion::Tls13,
            };
            Some(Arc::new(ServerTls::from_files(cert_file, key_file, min)?))
        }
        config::Tls::Platform | config::Tls::Off => None,
    };
    let rules =
        file.rules.as_ref().map(|rules| rules.iter().map(rule).collect::<anyhow::Result<Vec<_>>>());
    let rules = Rules::new(rules.transpose()?)
        .map_err(|(index, fault)| anyhow::anyhow!("inbound.rules[{index}].path: {fault}"))?;
    let app = file.app.as_ref().map(|app| proxy::App {
        origin: app.origin.clone(),
        protocol: match app.protocol {
            config::AppProtocol::Auto => Protocol::Auto,
            config::AppProtocol::H2c => Protocol::H2,
        },
    });
    Ok(proxy::InboundSettings {
        listen: file.listen,
        app,
        tls,
        rules,
        allow_from: file.allow_from.clone(),
        forward_authorization: file.forward_authorization,
        token_cache: file.token_cache,
    })
}

fn rule(rule: &config::Rule) -> anyhow::Result<Rule> {
    let path = match &rule.path {
        config::RulePath::Exact(path) => path.clone(),
        config::RulePath::Below(path) => format!("{path}/*"),
    };
    Ok(Rule {
        path: path
            .parse::<PathRule>()
            .map_err(|fault| anyhow::anyhow!("inbound.rules: {path}: {fault}"))?,
        methods: rule.methods.clone(),
        access: match &rule.access {
            config::Access::Public => Access::Public,
            config::Access::Scopes(scopes) => Access::Scopes(scopes.clone()),
        },
    })
}

/// The values that are worked out when somebody scrapes.
fn expose(
    registry: &Registry,
    world: &World,
    directory: &Arc<Directory>,
    meter: &Arc<Meter>,
    running: &proxy::Running,
    access: Option<AccessLog>,
) {
    let (directory, meter, spread) =
        (Arc::clone(directory), Arc::clone(meter), running.connections());
    let (tokens, trust) = (Arc::clone(&world.tokens), Arc::clone(&world.trust));
    registry.register_collector(Box::new(move |found| {
        found.gauge(names::CONNECTIONS, &[], to_f64(spread.total()));
        if let Some(age) = directory.age() {
            found.gauge(names::SNAPSHOT_AGE, &[], age.as_secs_f64());
        }
        if let Some(catalog) = directory.load() {
            found.gauge(
                names::SNAPSHOT_REVISION,
                &[],
                to_f64(usize::try_from(catalog.revision).unwrap_or(usize::MAX)),
            );
        }
        let stats = tokens.stats();
        found.counter(
            names::TOKENS_RECEIVED,
            &[],
            to_f64(usize::try_from(stats.received).unwrap_or(usize::MAX)),
        );
        found.counter(
            names::TOKEN_FAILURES,
            &[],
            to_f64(usize::try_from(stats.failures).unwrap_or(usize::MAX)),
        );
        for keys in lock(&trust).sets() {
            let stats = keys.stats();
            let labels = [("issuer", &**keys.issuer())];
            found.counter(
                names::JWKS_FETCHES,
                &labels,
                to_f64(usize::try_from(stats.fetches).unwrap_or(usize::MAX)),
            );
            found.counter(
                names::JWKS_FAILURES,
                &labels,
                to_f64(usize::try_from(stats.failures).unwrap_or(usize::MAX)),
            );
            if let Some(age) = stats.age {
                found.gauge(names::JWKS_AGE, &labels, age.as_secs_f64());
            }
        }
        if let Some(access) = &access {
            found.counter(names::LOG_DROPPED, &[], to_f64(access.dropped().dropped_lines()));
        }
        egress(found, &meter);
    }));
}

/// Circuits and latencies by endpoint.
fn conditions(found: &mut crate::telemetry::Families, ward: &proxy::Ward) {
    for condition in ward.conditions() {
        let labels =
            [("service", condition.service.as_str()), ("endpoint", condition.endpoint.as_str())];
        let state = match condition.circuit {
            CircuitState::Closed => 0.0,
            CircuitState::HalfOpen => 1.0,
            CircuitState::Open => 2.0,
        };
        found.gauge(names::CIRCUIT_STATE, &labels, state);
        if let Some(latency) = condition.latency {
            found.gauge(names::ENDPOINT_LATENCY, &labels, latency.as_secs_f64());
        }
    }
}

/// Bytes by path, and what they cost in the marginal band.
fn egress(found: &mut crate::telemetry::Families, meter: &Meter) {
    use crate::cost::Leg;
    let mut sums: std::collections::BTreeMap<[String; 6], (u64, i64)> =
        std::collections::BTreeMap::new();
    for row in meter.read() {
        // Whoever sends pays: the answer's bytes are priced at the callee's place.
        let (from, to) = match row.leg {
            Leg::Request => (&row.path.from, &row.path.to),
            Leg::Response => (&row.path.to, &row.path.from),
        };
        let rate = PriceBook::shipped().rate(row.path.class, from, Some(to));
        let cost = rate.map_or(0, |rate| rate.cost(row.bytes).0);
        let labels = [
            row.path.callee.to_string(),
            row.path.from.to_string(),
            row.path.to.to_string(),
            row.path.mode.to_string(),
            row.leg.as_str().to_owned(),
            row.kind.as_str().to_owned(),
        ];
        let sum = sums.entry(labels).or_default();
        *sum = (sum.0 + row.bytes.0, sum.1 + cost);
    }
    for (values, (bytes, cost)) in &sums {
        let names_of = ["callee", "from", "to", "mode", "leg", "kind"];
        let labels: Vec<_> = names_of.into_iter().zip(values.iter().map(String::as_str)).collect();
        found.counter(
            names::EGRESS_BYTES,
            &labels,
            to_f64(usize::try_from(*bytes).unwrap_or(usize::MAX)),
        );
        let dollars = to_f64(usize::try_from(*cost).unwrap_or(0)) / 1e9;
        found.counter(names::EGRESS_USD, &labels, dollars);
    }
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus samples are floats")]
fn to_f64(count: usize) -> f64 {
    count as f64
}
