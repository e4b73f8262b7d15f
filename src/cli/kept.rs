//! The folder that keeps what a proxy knows over a restart: which files there are, when each is written, and how old it
//! may be.
//!
//! The snapshot alone is refused when it is too old, and its age is told truly: a restart while the control plane is
//! down rewrites nothing, so it makes nothing young again. Tokens say themselves when they expire, and keys serve for
//! as long as nobody has newer ones.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{trust::Trust, world::lock};
use crate::{
    api::Catalog,
    discovery::{Directory, Seal, State, StateFault, Stored},
    identity::{StoredToken, Tokens},
    model::ServiceName,
    runtime::{Clock, Supervisor},
};

/// The names of the kept files.
const SNAPSHOT: &str = "snapshot";
const JWKS: &str = "jwks";
const TOKENS: &str = "tokens";

/// How often it is noted that the snapshot is still current, at most.
const NOTE_EVERY: Duration = Duration::from_secs(60);

/// Reads what an earlier run has kept, and keeps what comes.
pub(super) struct Keeper {
    state: State,
    /// The age from which a snapshot is refused.
    oldest: Duration,
    /// The snapshot that lies on disk.
    seal: Option<Seal>,
    /// The keys that lie on disk, by issuer.
    keys: HashMap<String, Value>,
}

impl Keeper {
    pub(super) fn open(
        folder: &Path,
        service: ServiceName,
        oldest: Duration,
        clock: Clock,
    ) -> Result<Self, StateFault> {
        let state = State::open(folder, service, clock)?;
        Ok(Self { state, oldest, seal: None, keys: HashMap::new() })
    }

    /// The snapshot of an earlier run, and how long ago it was current.
    pub(super) fn snapshot(&mut self) -> Option<(Catalog, Duration)> {
        let Stored { content, age, seal } = self.kept(SNAPSHOT, Some(self.oldest))?;
        self.seal = Some(seal);
        Some((content, age))
    }

    /// The public keys of an earlier run, by issuer.
    pub(super) fn keys(&mut self) -> HashMap<String, Value> {
        self.keys = self.kept(JWKS, None).map(|stored| stored.content).unwrap_or_default();
        self.keys.clone()
    }

    /// The tokens of an earlier run; some may have expired.
    pub(super) fn tokens(&self) -> Vec<StoredToken> {
        self.kept(TOKENS, None).map(|stored| stored.content).unwrap_or_default()
    }

    /// What must not be used is reported and passed over.
    fn kept<T: DeserializeOwned>(&self, name: &str, oldest: Option<Duration>) -> Option<Stored<T>> {
        self.state.kept(name, oldest).unwrap_or_else(|fault| {
            let error = &fault as &dyn std::error::Error;
            tracing::error!(error, "a kept file is not used");
            None
        })
    }

    /// Keeps everything as it comes. Call it before anything can come.
    pub(super) fn live(
        self,
        supervisor: &Supervisor,
        directory: Arc<Directory>,
        trust: Arc<Mutex<Trust>>,
        tokens: Arc<Tokens>,
    ) {
        let Self { state, oldest, seal, keys } = self;
        let snapshot = keep_snapshot(state.clone(), directory, oldest, seal);
        supervisor.spawn_until_end("kept-snapshot", snapshot);
        let changes = tokens.changes();
        let secrets = keep_secrets(state, trust, tokens, changes, keys);
        supervisor.spawn_until_end("kept-secrets", secrets);
    }
}

/// Keeps each new snapshot, and notes now and then that the last one is still current.
fn keep_snapshot(
    state: State,
    directory: Arc<Directory>,
    oldest: Duration,
    mut seal: Option<Seal>,
) -> impl Future<Output = ()> + Send + 'static {
    let (mut changes, mut confirmations) = (directory.changes(), directory.confirmations());
    // Well within the age that is allowed, or a snapshot could be too old although it was just confirmed.
    let pause = NOTE_EVERY.min(oldest / 8);
    async move {
        let mut next = Instant::now();
        loop {
            let confirmed = async {
                sleep_until(next).await;
                confirmations.changed().await
            };
            // In this order: what is confirmed is the snapshot in force, which must be on disk before.
            let changed = tokio::select! {
                biased;
                told = changes.changed() => told.map(|()| true),
                told = confirmed => told.map(|()| false),
            };
            let (Ok(changed), Some(catalog)) = (changed, directory.load()) else { continue };
            match &seal {
                Some(seal) if !changed => {
                    confirm(&state, seal.clone(), directory.age().unwrap_or_default()).await;
                }
                // Also what could not be written when it came.
                Some(_) | None => seal = keep(&state, SNAPSHOT, (*catalog).clone()).await,
            }
            next = Instant::now() + pause;
        }
    }
}

/// Keeps keys and tokens on disk as they come.
async fn keep_secrets(
    state: State,
    trust: Arc<Mutex<Trust>>,
    tokens: Arc<Tokens>,
    mut changes: watch::Receiver<u64>,
    mut last: HashMap<String, Value>,
) {
    let mut followed = lock(&trust).followed();
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
        // Without a snapshot no issuer is known yet, and those on disk are still wanted.
        if !now.is_empty() && now != last && keep(&state, JWKS, now.clone()).await.is_some() {
            last = now;
        }
        let keys: FuturesUnordered<_> = listened.iter_mut().map(watch::Receiver::changed).collect();
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                keep(&state, TOKENS, tokens.snapshot()).await;
            }
            Some(_changed) = keys.into_future().map(|(first, _)| first) => {}
            Ok(()) = followed.changed() => {}
        }
    }
}

async fn keep<T>(state: &State, name: &'static str, content: T) -> Option<Seal>
where
    T: Serialize + Send + 'static,
{
    let state = state.clone();
    write(move || state.keep(name, &content)).await
}

async fn confirm(state: &State, seal: Seal, age: Duration) {
    let state = state.clone();
    write(move || state.confirm(SNAPSHOT, &seal, age)).await;
}

/// Writes where that may take its time.
async fn write<T: Send + 'static>(
    writing: impl FnOnce() -> Result<T, StateFault> + Send + 'static,
) -> Option<T> {
    match tokio::task::spawn_blocking(writing).await {
        Ok(Ok(written)) => Some(written),
        Ok(Err(fault)) => {
            let error = &fault as &dyn std::error::Error;
            tracing::error!(error, "what must survive a restart could not be written");
            None
        }
        // The process ends.
        Err(_ended) => None,
    }
}

#[cfg(test)]
mod tests {
    use tokio::{runtime::Handle, time::sleep};

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn catalog(revision: u64) -> Catalog {
        let json = format!(
            r#"{{"revision":{revision},"issuer":"x","project":{{"name":"shop","networking":{{"multi_cloud":true,
            "default_mode":"public","connections":[]}},"services":{{}},"permissions":{{}},"issuers":[],
            "mode":"enforce"}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    /// The proxies that run one after the other on one folder.
    struct Runs {
        folder: tempfile::TempDir,
        clock: Clock,
    }

    impl Runs {
        fn new() -> Self {
            let start = jiff::Timestamp::from_second(1_800_000_000).unwrap();
            Self { folder: tempfile::tempdir().unwrap(), clock: Clock::starting_at(start) }
        }

        fn keeper(&self) -> Keeper {
            let me = "web".parse().unwrap();
            Keeper::open(self.folder.path(), me, 7 * DAY, self.clock).unwrap()
        }

        /// A proxy with what the last one left; and how old that is.
        fn start(&self) -> (Arc<Directory>, Supervisor, Option<Duration>) {
            let (mut keeper, directory) = (self.keeper(), Arc::<Directory>::default());
            let found = keeper.snapshot();
            let age = found.as_ref().map(|(_, age)| *age);
            if let Some((catalog, age)) = found {
                directory.adopt(catalog, age);
            }
            let supervisor = Supervisor::new(Handle::current());
            let Keeper { state, oldest, seal, .. } = keeper;
            let keeping = keep_snapshot(state, Arc::clone(&directory), oldest, seal);
            supervisor.spawn_until_end("kept-snapshot", keeping);
            (directory, supervisor, age)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_quiet_week_makes_no_snapshot_too_old_for_a_restart() {
        let runs = Runs::new();
        let (directory, _killed, _) = runs.start();
        directory.publish(catalog(1));
        for _ in 0..10 * 24 {
            sleep(DAY / 24).await;
            directory.confirm();
        }
        sleep(Duration::from_secs(90)).await;
        let (found, age) = runs.keeper().snapshot().unwrap();
        assert_eq!(found, catalog(1));
        assert_eq!(age.as_secs(), 90);
    }

    #[tokio::test(start_paused = true)]
    async fn restarts_while_the_control_plane_is_down_make_nothing_young_again() {
        let runs = Runs::new();
        let (directory, killed, age) = runs.start();
        assert_eq!(age, None);
        directory.publish(catalog(1));
        sleep(Duration::from_secs(1)).await;
        drop(killed);
        for day in 1..=6 {
            sleep(DAY).await;
            let (directory, killed, age) = runs.start();
            assert_eq!(age.unwrap().as_secs() / 86_400, day);
            assert_eq!(directory.age().unwrap().as_secs() / 86_400, day);
            sleep(Duration::from_secs(600)).await;
            drop(killed);
        }
        sleep(DAY).await;
        assert_eq!(runs.start().2, None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_confirmation_after_a_restart_is_noted_at_once_and_further_ones_now_and_then()
    {
        let runs = Runs::new();
        let (directory, killed, _) = runs.start();
        directory.publish(catalog(1));
        sleep(DAY).await;
        drop(killed);
        let (directory, _running, _) = runs.start();
        // The same again, as a control plane says it to whoever has no ETag yet.
        directory.publish(catalog(1));
        sleep(Duration::from_secs(1)).await;
        assert_eq!(runs.keeper().snapshot().unwrap().1.as_secs(), 1);
        for _ in 0..30 {
            directory.confirm();
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(runs.keeper().snapshot().unwrap().1.as_secs(), 31);
        sleep(Duration::from_secs(60)).await;
        // The last confirmation counts from when it came, not from when it was noted.
        assert_eq!(runs.keeper().snapshot().unwrap().1.as_secs(), 61);
    }

    #[tokio::test(start_paused = true)]
    async fn keys_and_tokens_are_never_too_old() {
        let runs = Runs::new();
        let keeper = runs.keeper();
        let keys: HashMap<String, Value> = [("i".to_owned(), "keys".into())].into();
        keeper.state.keep(JWKS, &keys).unwrap();
        keeper.state.keep(TOKENS, &[0u8; 0]).unwrap();
        sleep(30 * DAY).await;
        assert_eq!(runs.keeper().keys(), keys);
        assert!(runs.keeper().tokens().is_empty());
    }
}
