//! The folder that keeps what a proxy knows over a restart: which files there are, when each is written, and how old it
//! may be.
//!
//! The snapshot alone is refused when it is too old, and its age is told truly: a restart while the control plane is
//! down rewrites nothing, so it makes nothing young again. Tokens say themselves when they expire, and keys serve for
//! as long as nobody has newer ones; but both only beside a snapshot of the project and issuer that they are of.

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

use super::{
    trust::{Trust, own_name},
    world::lock,
};
use crate::{
    api::Catalog,
    discovery::{Directory, Origin, Seal, State, StateFault, Stored},
    identity::{KeySet, StoredToken, Tokens},
    model::ServiceName,
    runtime::{Clock, Supervisor},
};

/// The names of the kept files.
const SNAPSHOT: &str = "snapshot";
const JWKS: &str = "jwks";
const TOKENS: &str = "tokens";

/// How often it is noted that the snapshot is still current, at most.
const NOTE_EVERY: Duration = Duration::from_secs(60);
/// How often a large snapshot is written, at most.
const WRITE_EVERY: Duration = Duration::from_secs(5);
/// How many bytes are large.
const LARGE: usize = 1024 * 1024;

/// Reads what an earlier run has kept, and keeps what comes.
pub(super) struct Keeper {
    state: State,
    clock: Clock,
    /// The age from which a snapshot is refused.
    oldest: Duration,
    /// The snapshot that lies on disk.
    seal: Option<Seal>,
    /// Whose the snapshot is.
    origin: Option<Origin>,
    /// The keys that lie on disk, as [`Trust`] names them.
    keys: HashMap<String, Value>,
    /// When they were fetched, seconds since 1970.
    fetched: i64,
}

impl Keeper {
    pub(super) fn open(
        folder: &Path,
        service: ServiceName,
        oldest: Duration,
        clock: Clock,
    ) -> Result<Self, StateFault> {
        let state = State::open(folder, service, clock)?;
        let (seal, origin, keys) = (None, None, HashMap::new());
        Ok(Self { state, clock, oldest, seal, origin, keys, fetched: 0 })
    }

    /// The snapshot of an earlier run, and how long ago it was current.
    pub(super) fn snapshot(&mut self) -> Option<(Catalog, Duration)> {
        let found: Result<Option<Stored<Catalog>>, _> =
            self.state.kept(SNAPSHOT, Some(self.oldest));
        let Stored { content, age, seal } = usable(found)?;
        self.seal = Some(seal);
        self.origin = Some(Origin::of(&content));
        Some((content, age))
    }

    /// The public keys of an earlier run, as [`Trust`] names them; none without [`snapshot`](Self::snapshot).
    pub(super) fn keys(&mut self) -> HashMap<String, Value> {
        if let Some(Stored { content, age, .. }) = self.kept(JWKS) {
            let age = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
            self.fetched = self.clock.unix_seconds().saturating_sub(age);
            self.keys = content;
        }
        self.keys.clone()
    }

    /// The tokens of an earlier run but those whose key is not among [`keys`](Self::keys) any more; some may have expired.
    /// None without [`snapshot`](Self::snapshot).
    pub(super) fn tokens(&self) -> Vec<StoredToken> {
        let stored = self.kept::<Vec<StoredToken>>(TOKENS);
        let mut tokens = stored.map(|stored| stored.content).unwrap_or_default();
        let own = self.origin.as_ref().and_then(|origin| self.keys.get(&own_name(&origin.issuer)));
        if let Some(own) = own.and_then(|json| KeySet::from_json(json).ok()) {
            tokens.retain(|token| !token.is_orphan(&own, self.fetched));
        }
        tokens
    }

    fn kept<T: DeserializeOwned>(&self, name: &str) -> Option<Stored<T>> {
        usable(self.state.kept_of(name, self.origin.as_ref()?))
    }

    /// Keeps everything as it comes. Call it before anything can come.
    pub(super) fn live(
        self,
        supervisor: &Supervisor,
        directory: Arc<Directory>,
        trust: Arc<Mutex<Trust>>,
        tokens: Arc<Tokens>,
    ) {
        let Self { state, oldest, seal, keys, origin, .. } = self;
        let snapshot = keep_snapshot(state.clone(), Arc::clone(&directory), oldest, seal);
        supervisor.spawn_until_end("kept-snapshot", snapshot);
        let lying = (origin, keys);
        let secrets = keep_secrets(state, directory, trust, tokens, lying);
        supervisor.spawn_until_end("kept-secrets", secrets);
    }
}

/// What must not be used is reported and passed over.
fn usable<T>(found: Result<Option<T>, StateFault>) -> Option<T> {
    found.unwrap_or_else(|fault| {
        let error = &fault as &dyn std::error::Error;
        tracing::error!(error, "a kept file is not used");
        None
    })
}

/// What keeping the snapshot has to do next.
enum Due {
    /// There is another one.
    Changed,
    /// The last one was put off for long enough.
    PutOff,
    /// The one on disk is still current.
    Confirmed,
}

/// Keeps each new snapshot, and notes now and then that the last one is still current. Of a large one that keeps
/// changing, the last is written when the one before it has lain there for a while.
fn keep_snapshot(
    state: State,
    directory: Arc<Directory>,
    oldest: Duration,
    mut seal: Option<Seal>,
) -> impl Future<Output = ()> + Send + 'static {
    // The base alone: what other sources found is theirs to find again.
    let (mut changes, mut confirmations) = (directory.base_changes(), directory.confirmations());
    // Well within the age that is allowed, or a snapshot could be too old although it was just confirmed.
    let pause = NOTE_EVERY.min(oldest / 8);
    async move {
        let (mut next, mut next_large) = (Instant::now(), Instant::now());
        let mut put_off = false;
        loop {
            let confirmed = async {
                sleep_until(next).await;
                confirmations.changed().await
            };
            // In this order: what is confirmed is the snapshot in force, which must be on disk before.
            let due = tokio::select! {
                biased;
                () = sleep_until(next_large), if put_off => Ok(Due::PutOff),
                told = changes.changed() => told.map(|()| Due::Changed),
                told = confirmed, if !put_off => told.map(|()| Due::Confirmed),
            };
            let (Ok(due), Some(catalog)) = (due, directory.base()) else { continue };
            match (&seal, due) {
                (Some(seal), Due::Confirmed) => {
                    confirm(&state, seal.clone(), directory.age().unwrap_or_default()).await;
                }
                (_, Due::Changed) if Instant::now() < next_large && is_large(&catalog) => {
                    put_off = true;
                    continue;
                }
                // Also what could not be written when it came.
                (_, Due::Changed | Due::PutOff | Due::Confirmed) => {
                    put_off = false;
                    seal = keep_catalog(&state, catalog).await;
                    next_large = Instant::now() + WRITE_EVERY;
                }
            }
            next = Instant::now() + pause;
        }
    }
}

/// Whether a snapshot is large once it is written, as far as that can be told without doing it.
fn is_large(catalog: &Catalog) -> bool {
    let services = catalog.project.services.values();
    // What a service and an endpoint come to when they say little.
    services.map(|service| 600 + 250 * service.endpoints.len()).sum::<usize>() > LARGE
}

/// Keeps keys and tokens on disk as they come, once it is known whose they are. `lying` is what lies there.
async fn keep_secrets(
    state: State,
    directory: Arc<Directory>,
    trust: Arc<Mutex<Trust>>,
    tokens: Arc<Tokens>,
    lying: (Option<Origin>, HashMap<String, Value>),
) {
    let (mut origin, mut last) = lying;
    let mut changes = tokens.changes();
    let mut followed = lock(&trust).followed();
    let mut stale = false;
    loop {
        // Listened to before they are read, so that no change falls between.
        let sets = lock(&trust).sets();
        let mut listened: Vec<_> = sets.iter().map(|keys| keys.changes()).collect();
        let now = lock(&trust).to_remember();
        if let Some(of) = directory.load().map(|catalog| Origin::of(&catalog)) {
            let moved = origin.as_ref() != Some(&of);
            // An issuer whose keys were not fetched yet takes nothing away.
            let worth_it = !now.is_empty() && (moved || now != last);
            if worth_it && keep(&state, JWKS, now.clone(), of.clone()).await.is_some() {
                last = now;
            }
            if stale || moved {
                stale = keep(&state, TOKENS, tokens.snapshot(), of.clone()).await.is_none();
            }
            origin = Some(of);
        }
        let keys: FuturesUnordered<_> = listened.iter_mut().map(watch::Receiver::changed).collect();
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                stale = true;
            }
            Some(_changed) = keys.into_future().map(|(first, _)| first) => {}
            Ok(()) = followed.changed() => {}
        }
    }
}

async fn keep_catalog(state: &State, catalog: Arc<Catalog>) -> Option<Seal> {
    let state = state.clone();
    write(move || state.keep(SNAPSHOT, &*catalog, &Origin::of(&catalog))).await
}

async fn keep<T>(state: &State, name: &'static str, content: T, origin: Origin) -> Option<Seal>
where
    T: Serialize + Send + 'static,
{
    let state = state.clone();
    write(move || state.keep(name, &content, &origin)).await
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
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use serde_json::json;
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

    /// The snapshot of a project that is large when written.
    fn large(revision: u64) -> Catalog {
        let mut catalog = catalog(revision);
        let service = Arc::<crate::model::Service>::default();
        let names = (0..2000).map(|number| format!("service-{number}").parse().unwrap());
        catalog.project.services = names.map(|name| (name, Arc::clone(&service))).collect();
        catalog
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_snapshot_that_keeps_changing_is_written_now_and_then_and_at_last() {
        let runs = Runs::new();
        let (directory, _running, _) = runs.start();
        let on_disk = || runs.keeper().snapshot().map(|(catalog, _)| catalog.revision);
        directory.publish(large(1));
        sleep(Duration::from_secs(1)).await;
        assert_eq!(on_disk(), Some(1), "the first is written at once");
        for revision in 2..=4 {
            directory.publish(large(revision));
            directory.confirm();
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(on_disk(), Some(1));
        sleep(Duration::from_secs(3)).await;
        assert_eq!(on_disk(), Some(4), "the last is written soon");
        directory.publish(large(5));
        sleep(Duration::from_secs(1)).await;
        directory.publish(catalog(6));
        sleep(Duration::from_secs(1)).await;
        assert_eq!(on_disk(), Some(6), "one that is not large is written at once");
        sleep(Duration::from_secs(10)).await;
        assert_eq!(on_disk(), Some(6));
    }

    #[tokio::test(start_paused = true)]
    async fn keys_and_tokens_are_never_too_old() {
        let runs = Runs::new();
        let state = runs.keeper().state;
        let (keys, origin) = (keys("k1"), Origin::of(&catalog(1)));
        state.keep(JWKS, &keys, &origin).unwrap();
        state.keep(TOKENS, &[token("k1", &runs.clock)], &origin).unwrap();
        sleep(30 * DAY).await;
        state.keep(SNAPSHOT, &catalog(1), &origin).unwrap();
        let mut keeper = runs.keeper();
        keeper.snapshot().unwrap();
        assert_eq!(keeper.keys(), keys);
        assert_eq!(keeper.tokens().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn keys_and_tokens_serve_only_beside_a_snapshot_of_the_same_project_and_issuer() {
        let runs = Runs::new();
        let state = runs.keeper().state;
        let found = |keeper: &mut Keeper| {
            keeper.snapshot();
            (keeper.keys().len(), keeper.tokens().len())
        };
        let origin = Origin::of(&catalog(1));
        state.keep(JWKS, &keys("k1"), &origin).unwrap();
        state.keep(TOKENS, &[token("k1", &runs.clock)], &origin).unwrap();
        assert_eq!(found(&mut runs.keeper()), (0, 0), "whose they are is not known");
        state.keep(SNAPSHOT, &catalog(1), &origin).unwrap();
        assert_eq!(found(&mut runs.keeper()), (1, 1));
        let moved = Catalog { issuer: "moved".to_owned(), ..catalog(2) };
        state.keep(SNAPSHOT, &moved, &Origin::of(&moved)).unwrap();
        assert_eq!(found(&mut runs.keeper()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_whose_key_is_gone_is_not_taken_up_again() {
        let runs = Runs::new();
        let (state, origin) = (runs.keeper().state, Origin::of(&catalog(1)));
        state.keep(SNAPSHOT, &catalog(1), &origin).unwrap();
        let issued = [token("k1", &runs.clock), token("k2", &runs.clock)];
        state.keep(TOKENS, &issued, &origin).unwrap();
        let left = |keeper: &mut Keeper| {
            keeper.snapshot();
            keeper.keys();
            keeper.tokens().len()
        };
        // Keys that are as old as the tokens prove nothing.
        state.keep(JWKS, &keys("k2"), &origin).unwrap();
        assert_eq!(left(&mut runs.keeper()), 2);
        sleep(Duration::from_secs(300)).await;
        state.keep(JWKS, &keys("k2"), &origin).unwrap();
        assert_eq!(left(&mut runs.keeper()), 1);
    }

    /// What the project's own issuer publishes.
    fn keys(kid: &str) -> HashMap<String, Value> {
        // The public key of RFC 7515, appendix A.3.
        let jwk = json!({"kty": "EC", "crv": "P-256", "kid": kid, "alg": "ES256",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"});
        [(own_name("x"), json!({"keys": [jwk]}))].into()
    }

    fn token(kid: &str, clock: &Clock) -> Value {
        let head = URL_SAFE_NO_PAD.encode(format!(r#"{{"kid":"{kid}"}}"#));
        let now = clock.unix_seconds();
        json!({"callee": "data", "token": format!("{head}.e30.AA"), "scope": [],
            "issued_at": now, "expires_at": now + 3600})
    }
}
