//! The control plane as a running thing: how it starts, listens and ends.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use axum::Router;
use http::Request;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use secrecy::SecretString;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;
use url::Url;

use crate::{
    control::{
        BookError, Identities, RegistryError,
        begin::{FIRST_ADMIN, begin},
        intake::Intake,
        keys::{Keys, KeysError},
        leases::Leases,
        project::{self, Past},
        proxies::Proxies,
        rates::Rates,
        registry::Registry,
        reject::Rejection,
        router::{Peer, Shared, router},
        throttle::Throttle,
    },
    identity::{Mint, MintError, MintSettings},
    model::Project,
    net::{self, BindError, Flowing, Gate, MinVersion, Opening, Reload, ServerTls, TlsError},
    runtime::{Clock, Supervisor, open_files},
    store::{Location, Store, StoreError},
};

/// Connections at a time, where so many files may be open.
const CONNECTIONS: usize = 8192;
/// How long a TLS handshake may take, and from then on the first byte.
const OPENING: Duration = Duration::from_secs(10);
/// How long a request head may take, and an idle HTTP/1.1 connection may stay.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long what is written to a connection may get nowhere: whoever never reads does not keep its place.
const STALL: Duration = Duration::from_secs(10);
/// Requests at a time on one HTTP/2 connection: a watch and some tokens.
const STREAMS: u32 = 32;
/// How long requests may finish after the end was asked for.
const DRAIN: Duration = Duration::from_secs(5);
/// Questions and changes per second of one caller.
const READ_RATE: u32 = 2_000;
const WRITE_RATE: u32 = 100;
/// How often the certificate files are looked at.
const CERTIFICATE_LOOK: Duration = Duration::from_secs(10);

/// Why the control plane did not start, or did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Secrets and tokens would cross a network unprotected.
    #[error(
        "{listen} is not loopback, and without a certificate everything would go in plaintext; give --cert-file and \
         --key-file, or listen on 127.0.0.1"
    )]
    Plaintext {
        /// The address that was asked for.
        listen: SocketAddr,
    },
    /// The public URL cannot be an issuer (RFC 8414 §2).
    #[error(
        "{url} cannot be the --public-url: write http(s)://host[:port][/path] without query and fragment"
    )]
    PublicUrl {
        /// What was given.
        url: Url,
    },
    /// The address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Certificate and key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The data directory cannot be used.
    #[error("the --data-dir {} cannot be used", path.display())]
    DataDir {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Two would overwrite each other's keys and give one revision to two contents.
    #[error(
        "another control plane runs on the --data-dir {}; stop it, or give this one a --data-dir of its own",
        path.display()
    )]
    DataDirTaken {
        /// Which.
        path: PathBuf,
    },
    /// The system refused a socket operation.
    #[error("the listening socket cannot be used")]
    Socket(#[source] io::Error),
    /// The signing keys.
    #[error(transparent)]
    Keys(#[from] MintError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the store keeps is not understood.
    #[error(transparent)]
    Registry(#[from] BookError),
    /// The project cannot come into force; the one before it then stays.
    #[error("{detail}")]
    Project {
        /// Why not, and what to write instead.
        detail: String,
        /// Whether that is the project's fault.
        wrong: bool,
    },
}

impl From<RegistryError> for ControlError {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Store(error) => error.into(),
            RegistryError::Book(error) => error.into(),
        }
    }
}

impl From<KeysError> for ControlError {
    fn from(error: KeysError) -> Self {
        match error {
            KeysError::Mint(error) => error.into(),
            KeysError::Store(rejection) => rejection.into(),
        }
    }
}

impl From<Rejection> for ControlError {
    fn from(rejection: Rejection) -> Self {
        let wrong = matches!(
            rejection,
            Rejection::Reserved { .. } | Rejection::Renamed { .. } | Rejection::BadRequest { .. }
        );
        Self::Project { detail: rejection.to_string(), wrong }
    }
}

impl ControlError {
    /// Whether whoever started it can mend it by writing something else (exit code 2).
    #[must_use]
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Plaintext { .. }
            | Self::PublicUrl { .. }
            | Self::Bind(_)
            | Self::Tls(_)
            | Self::DataDir { .. }
            | Self::DataDirTaken { .. } => true,
            Self::Project { wrong, .. } => *wrong,
            // One that others may mend meanwhile is worth another try by whoever starts us.
            Self::Store(error) => !error.is_temporary(),
            Self::Socket(_) | Self::Keys(_) | Self::Registry(_) => false,
        }
    }
}

/// Where the certificate lies; both files are PEM and re-read when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain, leaf first.
    pub cert_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// Where the registry is kept when nobody says.
#[must_use]
pub fn usual_store(data_dir: &Path) -> Location {
    Location::Sqlite(data_dir.join("registry.db"))
}

/// What the control plane needs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where it listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The `iss` of its tokens and the way to it for others; `None`: scheme and address of `listen`.
    pub public_url: Option<Url>,
    /// Without a certificate only loopback is listened on.
    pub tls: Option<TlsFiles>,
    /// Keys and, unless `store` says otherwise, the registry; made with mode 0700 if it is not there.
    pub data_dir: PathBuf,
    /// Where the registry is kept.
    pub store: Location,
    /// How long a token is good.
    pub token_lifetime: Duration,
    /// How long a new key is published before it signs; at least as long as verifiers cache the key set.
    pub key_lead: Duration,
    /// How long a key signs.
    pub key_period: Duration,
    /// Connections at a time, of them half from one address; more are closed at once.
    pub connections: usize,
    /// How long what is written to a connection may get nowhere before that is closed.
    pub stall: Duration,
    /// Questions per second of one caller that cost no commit; 0: no limit, and none for addresses either.
    pub read_rate: u32,
    /// Changes per second of one caller; 0: no limit.
    pub write_rate: u32,
    /// What time it is.
    pub clock: Clock,
}

impl Settings {
    /// Plaintext, with the usual lifetimes: tokens 1 h, keys 30 d and 15 min ahead; as many connections as leave a
    /// quarter of the open files to everything else.
    #[must_use]
    pub fn new(listen: SocketAddr, data_dir: PathBuf) -> Self {
        let usual = MintSettings::new(PathBuf::new());
        Self {
            listen,
            public_url: None,
            tls: None,
            store: usual_store(&data_dir),
            data_dir,
            token_lifetime: usual.lifetime,
            key_lead: usual.lead,
            key_period: usual.period,
            connections: CONNECTIONS.min(open_files() / 4 * 3),
            stall: STALL,
            read_rate: READ_RATE,
            write_rate: WRITE_RATE,
            clock: Clock::system(),
        }
    }
}

/// The control plane, not yet running.
#[derive(Clone, Copy, Debug)]
pub struct Control;

impl Control {
    /// Starts it on the current tokio runtime; afterwards it answers. `project` has been checked by whoever read it; without
    /// one the store's is served.
    ///
    /// # Errors
    /// [`ControlError`]; nothing runs then.
    pub async fn start(
        settings: Settings,
        project: Option<(Project, Identities)>,
    ) -> Result<Running, ControlError> {
        if settings.tls.is_none() && !settings.listen.ip().is_loopback() {
            return Err(ControlError::Plaintext { listen: settings.listen });
        }
        let tls = settings.tls.as_ref().map(certificate).transpose()?;
        let (listener, local_addr) = listen(settings.listen)?;
        let issuer = issuer(&settings, local_addr)?;
        let data_dir = take(&settings.data_dir)?;
        let mint = mint(&settings)?;
        let supervisor = Supervisor::new(Handle::current());
        let store = Store::open(&settings.store, &supervisor).await?;
        let (registry, committer) = Registry::open(&issuer, store.clone()).await?;
        supervisor.spawn_until_end("control-registry", committer.run());
        let first_admin = begin(&registry, project, past(&settings.store), mint.kept()?).await?;
        let mint = Arc::new(mint);
        let keys = Keys::open(Arc::clone(&mint), Arc::clone(&registry), settings.clock).await?;
        let leases = Arc::new(Leases::new(store.clone()));
        let proxies = Arc::new(Proxies::new(store.clone()));
        supervisor
            .spawn_until_end("control-leases", Arc::clone(&leases).tend(Arc::clone(&registry)));
        supervisor.spawn_until_end("control-proxies", Arc::clone(&proxies).tend());
        let shared = Arc::new(Shared {
            registry,
            leases,
            proxies,
            mint,
            keys,
            intake: Intake::new(),
            throttle: Throttle::new(),
            rates: Rates::new(settings.read_rate, settings.write_rate),
            clock: settings.clock,
            end: supervisor.token(),
        });
        supervisor.spawn_restarting("control-keys", {
            let keys = Arc::clone(&shared.keys);
            move || Arc::clone(&keys).tend()
        });
        if let Some(tls) = &tls {
            let tls = Arc::clone(tls);
            supervisor.spawn_restarting("control-certificate", move || reread(Arc::clone(&tls)));
        }
        let door = Door {
            router: router(Arc::clone(&shared)),
            tls,
            gate: Gate::new(settings.connections, settings.connections.div_ceil(2)),
            stall: settings.stall,
            supervisor: supervisor.clone(),
        };
        supervisor.spawn_until_end("control-accept", door.open(listener));
        let revision = shared.registry.current().revision;
        tracing::info!(%local_addr, issuer, revision, "the control plane answers");
        Ok(Running { local_addr, issuer, shared, supervisor, data_dir, first_admin, store })
    }
}

fn certificate(files: &TlsFiles) -> Result<Arc<ServerTls>, TlsError> {
    ServerTls::from_files(&files.cert_file, &files.key_file, MinVersion::Tls13).map(Arc::new)
}

fn mint(settings: &Settings) -> Result<Mint, MintError> {
    let keys = MintSettings {
        folder: settings.data_dir.join("keys"),
        lifetime: settings.token_lifetime,
        lead: settings.key_lead,
        period: settings.key_period,
    };
    Mint::open(keys, settings.clock.now())
}

/// One node has one file, and what that says is meant. Of several, one may be old.
fn past(store: &Location) -> Past {
    match store {
        Location::Sqlite(_) => Past::Taken,
        Location::Postgres(_) => Past::Left,
    }
}

/// A control plane that answers. Dropping it ends it at once; [`shutdown`](Self::shutdown) lets requests finish.
pub struct Running {
    local_addr: SocketAddr,
    issuer: String,
    shared: Arc<Shared>,
    supervisor: Supervisor,
    first_admin: Option<SecretString>,
    store: Store,
    #[expect(dead_code, reason = "the directory is ours until this is dropped")]
    data_dir: fs::File,
}

/// What a replacement did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// The revision by which the project is in force.
    pub revision: u64,
    /// Whether that is another than before.
    pub changed: bool,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("local_addr", &self.local_addr)
            .field("issuer", &self.issuer)
            .finish_non_exhaustive()
    }
}

impl Running {
    /// Where it listens, with the port that was taken.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The `iss` of its tokens.
    #[must_use]
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The revision in force.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.shared.registry.current().revision
    }

    /// The name and the secret of the first admin credential, if this start has made it. Told once.
    pub fn first_admin(&mut self) -> Option<(&'static str, SecretString)> {
        self.first_admin.take().map(|secret| (FIRST_ADMIN, secret))
    }

    /// Puts the next version of the project in force and tells the proxies.
    ///
    /// # Errors
    /// [`ControlError::Project`]; the old version then stays in force.
    pub async fn replace(
        &self,
        project: Project,
        identities: &Identities,
    ) -> Result<Replaced, ControlError> {
        let registry = &self.shared.registry;
        let before = registry.current().book.written_at();
        let document = project::document(project, identities);
        registry
            .change(move |draft| project::import(draft, &document, Past::Taken).map(drop))
            .await?;
        let after = registry.current();
        let changed = after.book.written_at() != before;
        Ok(Replaced { revision: after.revision, changed })
    }

    /// Publishes a new signing key, which signs after the lead; gives its id.
    ///
    /// # Errors
    /// [`ControlError::Keys`]; the old keys then stay in force.
    pub async fn rotate_keys(&self) -> Result<String, ControlError> {
        Ok(self.shared.keys.rotate().await?)
    }

    /// Stops listening, ends watches, lets requests finish for a few seconds.
    pub async fn shutdown(self) {
        if let Err(error) = self.supervisor.shutdown(DRAIN + Duration::from_secs(1)).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the control plane ended late"
            );
        }
        self.store.clone().close().await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.supervisor.token().cancel();
    }
}

fn listen(addr: SocketAddr) -> Result<(TcpListener, SocketAddr), ControlError> {
    let mut listeners = net::bind(addr, 1, "--listen")?;
    let none = || ControlError::Socket(io::Error::other("no socket was opened"));
    let listener = listeners.pop().ok_or_else(none)?;
    let listener = TcpListener::from_std(listener).map_err(ControlError::Socket)?;
    let local_addr = listener.local_addr().map_err(ControlError::Socket)?;
    Ok((listener, local_addr))
}

/// The `iss`: the public URL without a slash at its end, as verifiers compare it to the letter.
fn issuer(settings: &Settings, local_addr: SocketAddr) -> Result<String, ControlError> {
    let Some(url) = &settings.public_url else {
        let scheme = if settings.tls.is_some() { "https" } else { "http" };
        if local_addr.ip().is_unspecified() {
            tracing::warn!(%local_addr, "others cannot reach the issuer by this address; set --public-url");
        }
        return Ok(format!("{scheme}://{local_addr}"));
    };
    let good = matches!(url.scheme(), "http" | "https")
        && url.host().is_some()
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none();
    if !good {
        return Err(ControlError::PublicUrl { url: url.clone() });
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// Makes the data directory and takes it for this process alone. The system gives it back when the process ends,
/// however it ends.
fn take(path: &Path) -> Result<fs::File, ControlError> {
    let unusable = |source| ControlError::DataDir { path: path.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(unusable)?;
    let mut options = fs::OpenOptions::new();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    let lock = options.open(path.join("lock")).map_err(unusable)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => {
            Err(ControlError::DataDirTaken { path: path.to_owned() })
        }
        Err(fs::TryLockError::Error(source)) => Err(unusable(source)),
    }
}

/// Takes over a new certificate; a wrong one is reported once and the old one stays.
async fn reread(tls: Arc<ServerTls>) {
    let mut look = interval(CERTIFICATE_LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reported = String::new();
    loop {
        look.tick().await;
        let files = Arc::clone(&tls);
        let Ok(outcome) = tokio::task::spawn_blocking(move || files.reload()).await else { return };
        match outcome {
            Ok(Reload::Changed) => tracing::info!("the new certificate is in use"),
            Ok(Reload::Unchanged) => reported.clear(),
            Err(error) if error.to_string() == reported => {}
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the old certificate stays"
                );
                reported = error.to_string();
            }
        }
    }
}

/// What a connection meets first.
struct Door {
    router: Router,
    tls: Option<Arc<ServerTls>>,
    gate: Gate,
    stall: Duration,
    supervisor: Supervisor,
}

impl Door {
    async fn open(self, listener: TcpListener) {
        let door = Arc::new(self);
        loop {
            let (stream, peer) = net::accept(&listener).await;
            let Some(place) = door.gate.enter(peer.ip()) else { continue };
            let one = Arc::clone(&door);
            door.supervisor.spawn("control-connection", async move {
                one.greet(stream, peer).await;
                drop(place);
            });
        }
    }

    async fn greet(&self, stream: TcpStream, peer: SocketAddr) {
        let stream = Flowing::new(stream, self.stall);
        let Some(tls) = &self.tls else { return self.converse(stream, peer).await };
        let acceptor = TlsAcceptor::from(tls.current());
        match timeout(OPENING, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => self.converse(stream, peer).await,
            Ok(Err(error)) => {
                tracing::debug!(%peer, error = &error as &dyn std::error::Error, "no TLS came about");
            }
            Err(_elapsed) => tracing::debug!(%peer, "no TLS came about in time"),
        }
    }

    async fn converse<S>(&self, stream: S, peer: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let router = self.router.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            router.clone().oneshot(request)
        });
        let protocol = protocol();
        // hyper waits without end for the first bytes, by which it tells HTTP/1.1 from HTTP/2.
        let stream = TokioIo::new(Opening::new(stream, OPENING));
        let mut connection = pin!(protocol.serve_connection(stream, service));
        let outcome = tokio::select! {
            outcome = connection.as_mut() => outcome,
            () = self.supervisor.ending() => {
                connection.as_mut().graceful_shutdown();
                timeout(DRAIN, connection).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(%peer, error, "a connection broke");
        }
    }
}

/// HTTP/1.1 and HTTP/2 with every limit named.
fn protocol() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(100)
        .max_buf_size(64 * 1024);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(32 * 1024)
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(100);
    builder
}
