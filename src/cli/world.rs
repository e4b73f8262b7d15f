//! What a proxy knows of the world beyond its listeners: where the project comes from, its tokens and keys.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};
use zeroize::Zeroizing;

use super::{
    kept::Keeper,
    trust::Trust,
    watch::{Told, WatchedFile, changed},
};
use crate::{
    api::{CONTROL_AUDIENCE, Catalog, Client, ClientSettings, Credential, TokenAnswer},
    config::{self, ProxyFile},
    discovery::{Directory, Passes, Registry as Source},
    identity::{ControlTokens, NoTokens, Slot, TokenSource, TokenUnavailable, Tokens},
    model::{Project, ServiceName},
    proxy,
    runtime::{Clock, Supervisor},
};

/// How often `control.ca_file` is looked at.
const CA_LOOK: Duration = Duration::from_secs(5);
/// When keys are asked for again while a token names one that nobody knows: just after that is allowed again.
const KEYS_AGAIN: Duration = Duration::from_secs(31);

/// What a proxy knows of the world beyond its listeners: the project, tokens, keys, and the folder that keeps them.
pub(super) struct World {
    me: ServiceName,
    directory: Arc<Directory>,
    pub(super) tokens: Arc<Tokens>,
    pub(super) trust: Arc<Mutex<Trust>>,
    keeper: Option<Keeper>,
    source: Option<Source>,
    /// A project that is read from a file, and its watch unless the system gives none.
    file: Option<(PathBuf, Option<WatchedFile>)>,
    /// The way to the control plane, if the project comes from there.
    control: Option<Client>,
    /// Told when that file is to be read although nobody edited it: what it points at may have changed.
    again: Arc<Notify>,
}

/// What of the world follows the settings of the proxy.
pub(super) struct Reins {
    directory: Arc<Directory>,
    tokens: Arc<Tokens>,
    trust: Arc<Mutex<Trust>>,
    control: Option<Client>,
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

    /// Reads again what the settings point at: the project, where that is a file, or whom the control plane's client
    /// trusts.
    pub(super) fn look_again(&self) {
        self.again.notify_one();
        if let Some(control) = &self.control {
            reread(control);
        }
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
        let mut watched = WatchedFile::new(path)
            .inspect_err(|error| {
                tracing::warn!(%error, "the project cannot be watched; after an edit, send SIGHUP");
            })
            .ok();
        let loaded = config::load_registry(path)?;
        if let Some(watched) = &mut watched {
            watched.refers_to(loaded.referred_files());
        }
        let catalog = Catalog { revision: 1, issuer: String::new(), project: loaded.project };
        let client = Client::new(ClientSettings::new(Vec::new(), file.trust_ca_file.clone()))?;
        let mut trust = Trust::new(client, false, HashMap::new());
        trust.follow(&catalog, supervisor);
        directory.publish(catalog);
        let tokens = Tokens::new(
            Arc::new(NoTokens),
            Self::token_files(file),
            Supervisor::clone(supervisor),
            Clock::system(),
        );
        Ok(Self {
            me: file.service.clone(),
            directory: Arc::clone(directory),
            tokens: Arc::new(tokens),
            trust: Arc::new(Mutex::new(trust)),
            keeper: None,
            source: None,
            control: None,
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
            Supervisor::clone(supervisor),
            Clock::system(),
        );
        let tokens = Arc::new(tokens);
        let mut keeper = control
            .state_dir
            .as_ref()
            .map(|folder| {
                let (me, oldest) = (file.service.clone(), control.max_snapshot_age);
                Keeper::open(folder, me, oldest, Clock::system())
            })
            .transpose()?;
        let (mut remembered, mut catalog) = (HashMap::new(), None);
        if let Some(keeper) = &mut keeper {
            // In this order: whose the snapshot is says whose the others must be.
            catalog = keeper.snapshot();
            remembered = keeper.keys();
            tokens.restore(keeper.tokens());
        }
        let mut trust = Trust::new(client.clone(), true, remembered);
        if let Some((catalog, age)) = catalog {
            trust.follow(&catalog, supervisor);
            directory.adopt(catalog, age);
        }
        let name: ServiceName = CONTROL_AUDIENCE.parse()?;
        let passes = Arc::new(ControlPasses(tokens.slot(&name)));
        let source = Source::new(client.clone(), passes, Arc::clone(directory));
        Ok(Self {
            me: file.service.clone(),
            directory: Arc::clone(directory),
            tokens,
            trust: Arc::new(Mutex::new(trust)),
            keeper,
            source: Some(source),
            control: Some(client),
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
            control: self.control.clone(),
            again: Arc::clone(&self.again),
        }
    }

    /// Ready: there is a snapshot, and wherever tokens are to be verified, keys for those that everybody has. An issuer
    /// of the project's list that cannot be reached takes nobody down but its own callers; metrics and log tell of it.
    pub(super) fn readiness(&self, inbound: bool) -> proxy::Ready {
        let (directory, trust) = (Arc::clone(&self.directory), Arc::clone(&self.trust));
        Arc::new(move || {
            if directory.load().is_none() {
                return Err("there is no snapshot of the project yet");
            }
            if inbound && !lock(&trust).can_verify() {
                return Err("the public keys of the issuer are not there yet");
            }
            Ok(())
        })
    }

    /// Starts everything that keeps it current.
    pub(super) fn live(self, supervisor: &Arc<Supervisor>) {
        let Self { me, directory, tokens, trust, keeper, source, control, file, again } = self;
        // Whoever listens comes before whoever speaks.
        let mut changes = directory.changes();
        let (keeping, follower) = (Arc::clone(supervisor), Arc::clone(&trust));
        let (known, granted) = (Arc::clone(&directory), Arc::clone(&tokens));
        if let Some(catalog) = known.load() {
            granted.reconcile(&catalog.project, &me);
        }
        supervisor.spawn_until_end("trust", async move {
            while changes.changed().await.is_ok() {
                if let Some(catalog) = known.load() {
                    lock(&follower).follow(&catalog, &keeping);
                    granted.issued_by(&catalog.issuer);
                    granted.reconcile(&catalog.project, &me);
                }
            }
        });
        supervisor.spawn_until_end("token-clock", tokens.follow_clock());
        if source.is_some() {
            let following = follow_keys(Arc::clone(&trust), Arc::clone(&tokens));
            supervisor.spawn_until_end("token-keys", following);
        }
        if let Some(keeper) = keeper {
            keeper.live(supervisor, Arc::clone(&directory), trust, tokens);
        }
        if let Some(source) = source {
            supervisor.spawn_until_end("registry", source.follow());
        }
        if let Some(control) = control {
            supervisor.spawn_until_end("control-ca", follow_ca(control));
        }
        if let Some((path, watched)) = file {
            let following = follow_file(path, watched, directory, again);
            supervisor.spawn_until_end("project-file", following);
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes up other certificates in `control.ca_file` by itself.
async fn follow_ca(control: Client) {
    loop {
        sleep(CA_LOOK).await;
        let control = control.clone();
        if tokio::task::spawn_blocking(move || reread(&control)).await.is_err() {
            return;
        }
    }
}

fn reread(control: &Client) {
    match control.reread() {
        Ok(true) => tracing::info!("new certificates in control.ca_file are trusted"),
        Ok(false) => {}
        Err(error) => tracing::error!(
            error = &error as &dyn std::error::Error,
            "control.ca_file cannot be used; the old certificates stay trusted"
        ),
    }
}

/// Bearers for the control plane, from the slot that has its name.
struct ControlPasses(Arc<Slot>);

impl Passes for ControlPasses {
    fn bearer(
        &self,
    ) -> BoxFuture<'static, Result<SecretString, Box<dyn std::error::Error + Send + Sync>>> {
        let slot = Arc::clone(&self.0);
        async move { Ok(slot.bearer().await?.token()) }.boxed()
    }

    fn refused(&self, bearer: &SecretString) {
        let current = self.0.current(Instant::now());
        let same =
            current.filter(|current| current.token().expose_secret() == bearer.expose_secret());
        if let Some(bearer) = same {
            self.0.refused(&bearer);
        }
    }
}

/// Drops tokens whose key the project's own issuer has no more: after it has lost its keys nobody can verify them,
/// however long they may live. A token that names a key which is not known here has the keys fetched, so that the older
/// of both is told apart.
async fn follow_keys(trust: Arc<Mutex<Trust>>, tokens: Arc<Tokens>) {
    // Listened to before they are looked at, so that no change falls between.
    let mut received = tokens.changes();
    let mut followed = lock(&trust).followed();
    loop {
        let own = lock(&trust).own();
        let mut changed = own.as_ref().map(|own| own.changes());
        let mut again = None;
        // Before the first fetch nothing is known of any key.
        if let Some(own) = own.filter(|own| !own.load().is_empty()) {
            let unknown = tokens.unknown_key(&own.load());
            if let Some(kid) = unknown {
                let _told_by_the_keys = own.refresh_for(&kid).await;
            }
            // In this order, as its doc says.
            if let Some(as_of) = own.as_of() {
                tokens.signed_by(&own.load(), as_of);
            }
            again = tokens.unknown_key(&own.load()).map(|_kid| KEYS_AGAIN);
        }
        let keys_changed = async {
            match &mut changed {
                Some(changed) => changed.changed().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        let due = async {
            match again {
                Some(again) => sleep(again).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Ok(()) = received.changed() => {}
            Ok(()) = followed.changed() => {}
            true = keys_changed => {}
            () = due => {}
            else => return,
        }
    }
}

/// Re-reads a project file when it changes, or when told to; one with faults changes nothing.
async fn follow_file(
    path: PathBuf,
    mut watched: Option<WatchedFile>,
    directory: Arc<Directory>,
    again: Arc<Notify>,
) {
    let mut told = Told::default();
    loop {
        tokio::select! {
            () = changed(&mut watched) => {}
            () = again.notified() => told = Told::default(),
        }
        match config::load_registry(&path) {
            Ok(file) => {
                if let Some(watched) = &mut watched {
                    watched.refers_to(file.referred_files());
                }
                told = Told::default();
                take_over(&directory, file.project);
            }
            Err(faults) => {
                if let Some(watched) = &mut watched {
                    watched.failed(faults.referred_files());
                }
                told.not_taken_over(faults.to_string());
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
        let (client, client_id) = (self.client.clone(), self.me.clone());
        let (path, audience) = (self.path.clone(), audience.clone());
        async move {
            let secret = read_secret(&path)
                .await
                .map_err(|source| TokenUnavailable::File { path, source: Arc::new(source) })?;
            let credential = Credential { client_id, secret };
            ControlTokens::new(client, credential).ask(&audience).await
        }
        .boxed()
    }
}

/// The text of a secret file without the white space at its end; an empty one is no secret.
async fn read_secret(path: &Path) -> io::Result<SecretString> {
    let text = Zeroizing::new(tokio::fs::read_to_string(path).await?);
    let secret = text.trim_end();
    if secret.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty"));
    }
    Ok(SecretString::from(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_secret_that_is_not_there_is_never_sent_as_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        // Whoever were asked would not be found: what is reported is the file.
        let client = Client::new(ClientSettings::new(Vec::new(), None)).unwrap();
        let source = SecretFile { client, me: "web".parse().unwrap(), path: path.clone() };
        let audience: ServiceName = "data".parse().unwrap();
        let fault = source.ask(&audience).await.unwrap_err();
        assert!(matches!(&fault, TokenUnavailable::File { path: named, .. } if *named == path));
        std::fs::write(&path, " \n").unwrap();
        let fault = source.ask(&audience).await.unwrap_err();
        assert!(matches!(&fault, TokenUnavailable::File { .. }), "{fault:?}");
        std::fs::write(&path, "the secret\n").unwrap();
        let fault = source.ask(&audience).await.unwrap_err();
        assert!(matches!(&fault, TokenUnavailable::Unreachable(_)), "{fault:?}");
    }
}
