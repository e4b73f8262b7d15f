//! What a proxy knows of the world beyond its listeners: where the project comes from, its tokens and keys, and the folder
//! that keeps them over a restart.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use secrecy::SecretString;
use serde_json::Value;
use tokio::{runtime::Handle, sync::Notify};

use super::{
    trust::Trust,
    watch::{WatchedFile, changed},
};
use crate::{
    api::{CONTROL_AUDIENCE, Catalog, Client, ClientSettings, Credential, TokenAnswer},
    config::{self, ProxyFile},
    discovery::{AskBearer, Directory, Registry as Source, State},
    identity::{ControlTokens, NoTokens, StoredToken, TokenSource, TokenUnavailable, Tokens},
    model::{Project, ServiceName},
    proxy,
    runtime::{Clock, Supervisor},
};

/// What a proxy knows of the world beyond its listeners: the project, tokens, keys, and the folder that keeps them.
pub(super) struct World {
    me: ServiceName,
    directory: Arc<Directory>,
    pub(super) tokens: Arc<Tokens>,
    pub(super) trust: Arc<Mutex<Trust>>,
    state: Option<State>,
    source: Option<Source>,
    /// A project that is read from a file, and its watch unless the system gives none.
    file: Option<(PathBuf, Option<WatchedFile>)>,
    /// Told when that file is to be read although nobody edited it: what it points at may have changed.
    again: Arc<Notify>,
}

/// What of the world follows the settings of the proxy.
pub(super) struct Reins {
    directory: Arc<Directory>,
    tokens: Arc<Tokens>,
    trust: Arc<Mutex<Trust>>,
    again: Arc<Notify>,
}

impl Reins {
    /// Has it follow another file.
    pub(super) fn follow(&self, next: &ProxyFile, trust_changed: bool, supervisor: &Supervisor) {
        self.tokens.read_from(World::token_files(next));
        if trust_changed && matches!(next.registry, config::Registry::File(_)) {
            self.believe(next.trust_ca_file.clone(), supervisor);
        }
    }

    /// Reads the project again, where that is a file.
    pub(super) fn look_again(&self) {
        self.again.notify_one();
    }

    /// Without a control plane, the keys of issuers are fetched from whoever `trust.ca_file` vouches for.
    fn believe(&self, ca_file: Option<PathBuf>, supervisor: &Supervisor) {
        let Some(catalog) = self.directory.load() else { return };
        match Client::new(ClientSettings::new(Vec::new(), ca_file)) {
            Ok(client) => lock(&self.trust).fetch_by(client, &catalog, supervisor),
            Err(error) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "keys are fetched by the old trust.ca_file"
            ),
        }
    }
}

/// The names of the kept files.
const SNAPSHOT: &str = "snapshot";
const JWKS: &str = "jwks";
const TOKENS: &str = "tokens";

impl World {
    pub(super) fn open(
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
        // Watched before it is read, so that no edit falls between.
        let watched = WatchedFile::new(path)
            .inspect_err(|error| {
                tracing::warn!(%error, "the project cannot be watched; after an edit, send SIGHUP");
            })
            .ok();
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
            me: file.service.clone(),
            directory: Arc::clone(directory),
            tokens: Arc::new(tokens),
            trust: Arc::new(Mutex::new(trust)),
            state: None,
            source: None,
            file: Some((path.to_owned(), watched)),
            again: Arc::default(),
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
            me: file.service.clone(),
            directory: Arc::clone(directory),
            tokens,
            trust: Arc::new(Mutex::new(trust)),
            state,
            source: Some(source),
            file: None,
            again: Arc::default(),
        })
    }

    pub(super) fn verifier(&self) -> Arc<arc_swap::ArcSwap<crate::identity::Verifier>> {
        lock(&self.trust).verifier()
    }

    /// What of it follows the settings.
    pub(super) fn reins(&self) -> Reins {
        Reins {
            directory: Arc::clone(&self.directory),
            tokens: Arc::clone(&self.tokens),
            trust: Arc::clone(&self.trust),
            again: Arc::clone(&self.again),
        }
    }

    /// Ready: there is a snapshot, and keys wherever tokens are to be verified.
    pub(super) fn readiness(&self, inbound: bool) -> proxy::Ready {
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
    pub(super) fn live(self, supervisor: &Arc<Supervisor>) {
        let Self { me, directory, tokens, trust, state, source, file, again } = self;
        if let Some(source) = source {
            supervisor.spawn_until_end("registry", source.follow());
        }
        if let Some((path, watched)) = file {
            let following = follow_file(path, watched, Arc::clone(&directory), again);
            supervisor.spawn_until_end("project-file", following);
        }
        if let Some(state) = &state {
            let secrets = keep_secrets(state.clone(), Arc::clone(&trust), Arc::clone(&tokens));
            supervisor.spawn_until_end("kept-secrets", secrets);
        }
        let keeper = Arc::clone(supervisor);
        supervisor.spawn_until_end("trust", async move {
            let mut changes = directory.changes();
            changes.mark_changed();
            while changes.changed().await.is_ok() {
                let Some(catalog) = directory.load() else { continue };
                lock(&trust).follow(&catalog, &keeper);
                tokens.reconcile(&catalog.project, &me);
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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
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

/// Re-reads a project file when it changes, or when told to; one with faults changes nothing.
async fn follow_file(
    path: PathBuf,
    mut watched: Option<WatchedFile>,
    directory: Arc<Directory>,
    again: Arc<Notify>,
) {
    loop {
        tokio::select! {
            () = changed(&mut watched) => {}
            () = again.notified() => {}
        }
        match config::load_registry(&path) {
            Ok(project) => take_over(&directory, project),
            Err(faults) => {
                tracing::error!("the project was not taken over, the old one stays:\n{faults}")
            }
        }
    }
}

fn take_over(directory: &Directory, project: Project) {
    let before = directory.load();
    if before.as_ref().is_some_and(|before| before.project == project) {
        return directory.confirm();
    }
    let revision = before.map_or(1, |catalog| catalog.revision + 1);
    directory.publish(Catalog { revision, issuer: String::new(), project });
    tracing::info!(revision, "the project is in force");
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
