//! Public keys of an issuer: fetched, cached, kept while the issuer is down.
//!
//! Workers read an immutable [`KeySet`] and never wait for one. Fetching happens on the side runtime: every
//! ten minutes, sooner after a failure, and once when a token names a key that is not known. That last way is
//! open to anybody who can send a request, so it is one fetch at a time, at most one per 30 seconds, and a key
//! id that the issuer did not have is remembered for a while.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};
use futures_util::{FutureExt, future::BoxFuture};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};
use url::Url;

use crate::{
    api::Client,
    identity::keys::{KeySet, KeySetError},
    runtime::{Backoff, Supervisor},
};

/// How long fetched keys are taken as they are.
const REFRESH_EVERY: Duration = Duration::from_secs(600);
/// Between two fetches for keys that are not known.
const UNKNOWN_EVERY: Duration = Duration::from_secs(30);
/// How long a key id stays unknown.
const UNKNOWN_FOR: Duration = Duration::from_secs(60);
/// How many unknown key ids are remembered; the oldest goes first.
const UNKNOWN_KEPT: usize = 256;
/// How long one fetch may take.
const FETCH_LIMIT: Duration = Duration::from_secs(10);
/// How long a request waits for a fetch.
const WAIT_LIMIT: Duration = Duration::from_secs(5);
/// Pauses after failures.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// Why keys could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchFault {
    /// The issuer did not answer, or not with a key set.
    #[error("the issuer's keys could not be fetched")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It answered with a set that cannot be used.
    #[error("the issuer's keys cannot be used")]
    Set(#[from] KeySetError),
    /// It took longer than ten seconds.
    #[error("the issuer gave no answer in time")]
    Deadline,
}

impl FetchFault {
    fn source(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Source(error.into())
    }
}

/// Asks an issuer for its keys, once: gives a JWK set as JSON.
pub type Fetch = Arc<dyn Fn() -> BoxFuture<'static, Result<Value, FetchFault>> + Send + Sync>;

/// The keys of the project's own issuer, from any replica of the control plane.
#[must_use]
pub fn control_keys(client: Client) -> Fetch {
    Arc::new(move || {
        let client = client.clone();
        async move { client.own_jwks().await.map_err(FetchFault::source) }.boxed()
    })
}

/// The keys at `jwks_uri`.
#[must_use]
pub fn keys_at(client: Client, jwks_uri: Url) -> Fetch {
    Arc::new(move || {
        let (client, url) = (client.clone(), jwks_uri.clone());
        async move { client.jwks(&url).await.map_err(FetchFault::source) }.boxed()
    })
}

/// What came of looking for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// The key is there now.
    Changed,
    /// It is not, and asking again would not help at the moment.
    NotNow,
}

/// Who began a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// Whoever waits for it: its answer is newer than the question.
    Ours,
    /// Somebody before.
    Others,
}

/// Numbers for `infrar_jwks_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JwksStats {
    /// Keys that can verify.
    pub keys: usize,
    /// Since the last fetch that worked; `None` when there was none in this process.
    pub age: Option<Duration>,
    /// Fetches that were begun.
    pub fetches: u64,
    /// Fetches that failed.
    pub failures: u64,
    /// Tokens that named a key which was not known.
    pub unknown: u64,
}

/// The keys of one issuer. Shared by all workers.
pub struct Jwks {
    issuer: Arc<str>,
    keys: ArcSwap<KeySet>,
    generation: AtomicU64,
    source: Option<(Fetch, Supervisor)>,
    state: Mutex<State>,
    /// Counts fetches that have ended, however they did.
    ended: watch::Sender<u64>,
    /// Counts changes of the keys.
    changes: watch::Sender<u64>,
    fetches: AtomicU64,
    failures: AtomicU64,
    unknown: AtomicU64,
}

#[derive(Default)]
struct State {
    fetching: bool,
    last_worked: bool,
    /// Whether the log has told that keys cannot be fetched.
    told: bool,
    fetched_at: Option<Instant>,
    /// When the last fetch that worked was begun.
    as_of: Option<Instant>,
    asked_at: Option<Instant>,
    unknown: VecDeque<(Box<str>, Instant)>,
}

impl fmt::Debug for Jwks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jwks").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

impl Jwks {
    /// Keys that come from a file and do not change.
    #[must_use]
    pub fn fixed(issuer: Arc<str>, keys: KeySet) -> Arc<Self> {
        Self::build(issuer, keys, None)
    }

    /// Keys that are fetched in tasks of `supervisor`; `initial` are those of an earlier run, or none. Nothing is
    /// fetched before [`Jwks::follow`] is run or a key is missed.
    #[must_use]
    pub fn fetched(
        issuer: Arc<str>,
        initial: KeySet,
        fetch: Fetch,
        supervisor: Supervisor,
    ) -> Arc<Self> {
        Self::build(issuer, initial, Some((fetch, supervisor)))
    }

    fn build(issuer: Arc<str>, keys: KeySet, source: Option<(Fetch, Supervisor)>) -> Arc<Self> {
        Arc::new(Self {
            issuer,
            keys: ArcSwap::from_pointee(keys),
            generation: AtomicU64::new(0),
            source,
            state: Mutex::default(),
            ended: watch::Sender::new(0),
            changes: watch::Sender::new(0),
            fetches: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        })
    }

    /// Whose keys.
    #[must_use]
    pub fn issuer(&self) -> &Arc<str> {
        &self.issuer
    }

    /// The keys now. Not to be held over an `.await`.
    #[must_use]
    pub fn load(&self) -> Guard<Arc<KeySet>> {
        self.keys.load()
    }

    /// A moment at or after which the issuer had the keys that [`load`](Self::load) gives afterwards, and no others;
    /// `None` before the first fetch that worked.
    #[must_use]
    pub fn as_of(&self) -> Option<Instant> {
        self.lock().as_of
    }

    /// Rises with every change of the keys. Cheap enough for every request.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Tells of every change of the keys, so that they can be kept on disk when received.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Numbers for metrics.
    #[must_use]
    pub fn stats(&self) -> JwksStats {
        JwksStats {
            keys: self.load().len(),
            age: self.lock().fetched_at.map(|at| at.elapsed()),
            fetches: self.fetches.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            unknown: self.unknown.load(Ordering::Relaxed),
        }
    }

    /// Keeps the keys fresh for as long as somebody holds them; to be run on the side runtime.
    pub fn follow(self: &Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        let weak = Arc::downgrade(self);
        async move {
            let mut failed = 0;
            while let Some(pause) = Self::round(&weak, &mut failed).await {
                sleep(pause).await;
            }
        }
    }

    /// One fetch, and how long to wait for the next; `None` when nobody needs the keys any more.
    async fn round(weak: &Weak<Self>, failed: &mut u32) -> Option<Duration> {
        let keys = weak.upgrade()?;
        keys.fetch().await?;
        if keys.lock().last_worked {
            *failed = 0;
            // ±10 %, so that proxies that started together do not ask together.
            return Some(REFRESH_EVERY.mul_f64(0.9 + 0.2 * fastrand::f64()));
        }
        *failed = failed.saturating_add(1);
        Some(RETRY.pause(*failed))
    }

    /// Fetches now, or joins the fetch that is under way; `None` for fixed keys.
    pub async fn fetch(self: &Arc<Self>) -> Option<()> {
        let (fetch, supervisor) = self.source.as_ref()?;
        let mut ended = {
            let mut state = self.lock();
            let ended = self.ended.subscribe();
            if !state.fetching {
                self.begin(&mut state, fetch, supervisor);
            }
            ended
        };
        ended.changed().await.ok()
    }

    /// Looks for a key that a token names and nobody here knows. May be called from any runtime; cancelling it
    /// does not cancel the fetch. Waits five seconds at most.
    pub async fn refresh_for(self: &Arc<Self>, kid: &str) -> Refreshed {
        self.unknown.fetch_add(1, Ordering::Relaxed);
        let before = self.generation();
        // A token without a key id is helped by any change.
        let found = || match kid {
            "" => self.generation() != before,
            _ => self.load().knows(kid),
        };
        if found() {
            return Refreshed::Changed;
        }
        let waited = timeout(WAIT_LIMIT, async {
            // A fetch that was under way may have been answered before the key was there, and proves nothing.
            while let Some((mut ended, whose)) = self.ask(kid) {
                // The other end lives in this set, so it cannot be gone.
                let _told = ended.changed().await;
                if found() || whose == Whose::Ours {
                    return whose;
                }
            }
            Whose::Others
        });
        let waited = waited.await;
        if found() {
            return Refreshed::Changed;
        }
        if waited == Ok(Whose::Ours) {
            self.lock().remember_unknown(kid, Instant::now());
        }
        Refreshed::NotNow
    }

    /// A fetch to wait for, unless it is too early for one or the key is known to be unknown.
    fn ask(self: &Arc<Self>, kid: &str) -> Option<(watch::Receiver<u64>, Whose)> {
        let (fetch, supervisor) = self.source.as_ref()?;
        let now = Instant::now();
        let mut state = self.lock();
        if state.is_unknown(kid, now) {
            return None;
        }
        let ended = self.ended.subscribe();
        if state.fetching {
            return Some((ended, Whose::Others));
        }
        if state.asked_at.is_some_and(|at| now.duration_since(at) < UNKNOWN_EVERY) {
            return None;
        }
        state.asked_at = Some(now);
        self.begin(&mut state, fetch, supervisor);
        Some((ended, Whose::Ours))
    }

    fn begin(self: &Arc<Self>, state: &mut State, fetch: &Fetch, supervisor: &Supervisor) {
        state.fetching = true;
        self.fetches.fetch_add(1, Ordering::Relaxed);
        let (running, answer) =
            (Running { keys: self.clone(), began: Instant::now(), worked: false }, fetch());
        // On the side runtime whoever asked, so that a worker that goes away does not take the fetch along.
        supervisor.spawn_until_end("jwks-fetch", running.carry(answer));
    }

    fn take(&self, fetched: Result<Value, FetchFault>, began: Instant) -> Result<(), FetchFault> {
        let fresh = KeySet::from_json(&fetched?)?;
        let changed = !self.load().same_as(&fresh);
        if changed {
            info!(issuer = %self.issuer, keys = fresh.len(), "the issuer's keys changed");
            self.keys.store(Arc::new(fresh));
            self.generation.fetch_add(1, Ordering::Release);
        }
        // After the keys: whoever reads this first and the keys then never takes old ones for new.
        {
            let mut state = self.lock();
            (state.fetched_at, state.as_of) = (Some(Instant::now()), Some(began));
        }
        if changed {
            self.changes.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_unknown(&mut self, kid: &str, now: Instant) -> bool {
        while self.unknown.front().is_some_and(|(_, until)| *until <= now) {
            self.unknown.pop_front();
        }
        self.unknown.iter().any(|(known, _)| **known == *kid)
    }

    /// Only what an answer did not contain is unknown; after a failure nothing is.
    fn remember_unknown(&mut self, kid: &str, now: Instant) {
        if !self.last_worked || self.is_unknown(kid, now) {
            return;
        }
        if self.unknown.len() >= UNKNOWN_KEPT {
            self.unknown.pop_front();
        }
        self.unknown.push_back((kid.into(), now + UNKNOWN_FOR));
    }
}

/// A fetch under way; whatever ends it, those who wait are told.
struct Running {
    keys: Arc<Jwks>,
    began: Instant,
    worked: bool,
}

impl Running {
    async fn carry(mut self, answer: BoxFuture<'static, Result<Value, FetchFault>>) {
        let fetched = timeout(FETCH_LIMIT, answer).await.unwrap_or(Err(FetchFault::Deadline));
        let (issuer, outcome) = (&self.keys.issuer, self.keys.take(fetched, self.began));
        let told = std::mem::replace(&mut self.keys.lock().told, outcome.is_err());
        match outcome {
            Ok(()) if told => info!(%issuer, "keys are fetched again"),
            Ok(()) => {}
            Err(ref fault) => {
                let error = fault as &dyn std::error::Error;
                if told {
                    debug!(%issuer, error, "keys still not fetched");
                } else {
                    warn!(%issuer, error, "keys not fetched, the old ones stay");
                }
            }
        }
        self.worked = outcome.is_ok();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.worked {
            self.keys.failures.fetch_add(1, Ordering::Relaxed);
        }
        let mut state = self.keys.lock();
        state.fetching = false;
        state.last_worked = self.worked;
        self.keys.ended.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use tokio::{runtime::Handle, time::advance};

    use super::*;
    use crate::identity::{
        forge::{Forge, set},
        keys::Algorithm,
    };

    /// An issuer whose answers a test decides.
    #[derive(Default)]
    struct Issuer {
        asked: AtomicU64,
        down: AtomicBool,
        keys: Mutex<Vec<Forge>>,
    }

    fn here() -> Supervisor {
        Supervisor::new(Handle::current())
    }

    impl Issuer {
        fn with(kids: &[&str]) -> Arc<Self> {
            let issuer = Arc::new(Self::default());
            kids.iter().for_each(|kid| issuer.add(kid));
            issuer
        }

        fn add(&self, kid: &str) {
            self.keys.lock().unwrap().push(Forge::new(kid, Algorithm::EdDsa));
        }

        fn jwks(self: &Arc<Self>) -> Arc<Jwks> {
            let issuer = self.clone();
            let fetch: Fetch = Arc::new(move || {
                let issuer = issuer.clone();
                async move {
                    issuer.asked.fetch_add(1, Ordering::SeqCst);
                    let answer = set(&issuer.keys.lock().unwrap().iter().collect::<Vec<_>>());
                    sleep(Duration::from_millis(20)).await;
                    if issuer.down.load(Ordering::SeqCst) {
                        return Err(FetchFault::source("down"));
                    }
                    Ok(answer)
                }
                .boxed()
            });
            Jwks::fetched("https://i".into(), KeySet::default(), fetch, here())
        }

        fn asked(&self) -> u64 {
            self.asked.load(Ordering::SeqCst)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_requests_with_an_unknown_key_cost_one_fetch() {
        let issuer = Issuer::with(&["a"]);
        let jwks = issuer.jwks();
        let requests = (0..1000).map(|_| jwks.refresh_for("a"));
        let found = futures_util::future::join_all(requests).await;
        assert!(found.iter().all(|one| *one == Refreshed::Changed));
        assert_eq!((issuer.asked(), jwks.stats().keys), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_appears_while_a_fetch_is_under_way_is_found_by_the_next() {
        let issuer = Issuer::with(&["a"]);
        let jwks = issuer.jwks();
        let late = async {
            sleep(Duration::from_millis(5)).await;
            issuer.add("b");
            let requests = (0..100).map(|_| jwks.refresh_for("b"));
            futures_util::future::join_all(requests).await
        };
        let (_fetched, found) = tokio::join!(jwks.fetch(), late);
        assert!(found.iter().all(|one| *one == Refreshed::Changed), "{found:?}");
        assert_eq!((issuer.asked(), jwks.stats().keys), (2, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_keys_cost_one_fetch_in_thirty_seconds_however_many_are_named() {
        let issuer = Issuer::with(&["a"]);
        let jwks = issuer.jwks();
        for at in 0..300 {
            assert_eq!(jwks.refresh_for(&format!("k{at}")).await, Refreshed::NotNow);
        }
        assert_eq!(issuer.asked(), 1);
        advance(Duration::from_secs(30)).await;
        issuer.add("new");
        // Known to be unknown: not even asked for.
        assert_eq!(jwks.refresh_for("k0").await, Refreshed::NotNow);
        assert_eq!(issuer.asked(), 1);
        assert_eq!(jwks.refresh_for("new").await, Refreshed::Changed);
        assert_eq!(jwks.refresh_for("later").await, Refreshed::NotNow);
        assert_eq!(issuer.asked(), 2);
        advance(Duration::from_secs(61)).await;
        assert_eq!(jwks.refresh_for("k0").await, Refreshed::NotNow);
        assert_eq!(issuer.asked(), 3);
        assert!(jwks.lock().unknown.len() <= UNKNOWN_KEPT);
    }

    #[tokio::test(start_paused = true)]
    async fn keys_stay_while_the_issuer_is_down_and_come_back_with_it() {
        let issuer = Issuer::with(&["a"]);
        let jwks = issuer.jwks();
        let (supervisor, following) = (here(), jwks.follow());
        supervisor.spawn("jwks", following);
        sleep(Duration::from_secs(1)).await;
        assert_eq!((issuer.asked(), jwks.stats().keys), (1, 1));
        issuer.down.store(true, Ordering::SeqCst);
        issuer.add("b");
        sleep(Duration::from_secs(1200)).await;
        let stats = jwks.stats();
        assert_eq!(stats.keys, 1);
        assert!(stats.failures > 3 && stats.age.unwrap() > Duration::from_secs(1100));
        issuer.down.store(false, Ordering::SeqCst);
        sleep(Duration::from_secs(31)).await;
        assert_eq!(jwks.stats().keys, 2);
        drop(jwks);
        // Nobody needs the keys any more, so nobody fetches them.
        sleep(Duration::from_secs(700)).await;
        assert_eq!(supervisor.running(), [""; 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_issuer_that_is_down_is_one_line_in_the_log() {
        let (paper, _guard) = crate::telemetry::overhear("warn");
        let issuer = Issuer::with(&["a"]);
        issuer.down.store(true, Ordering::SeqCst);
        let jwks = issuer.jwks();
        for _ in 0..10 {
            jwks.fetch().await.unwrap();
        }
        let log = paper.text();
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("could not be fetched: down"), "{log}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_gives_up_does_not_take_the_fetch_along() {
        let issuer = Issuer::with(&["a"]);
        let jwks = issuer.jwks();
        let given_up = timeout(Duration::from_millis(1), jwks.refresh_for("a")).await;
        assert!(given_up.is_err());
        sleep(Duration::from_millis(50)).await;
        assert_eq!((issuer.asked(), jwks.stats().keys), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_keys_again_are_no_change_and_an_empty_set_takes_nothing_away() {
        let issuer = Issuer::with(&["a"]);
        let jwks = issuer.jwks();
        jwks.fetch().await.unwrap();
        jwks.fetch().await.unwrap();
        assert_eq!(jwks.generation(), 1);
        issuer.keys.lock().unwrap().clear();
        jwks.fetch().await.unwrap();
        assert_eq!((jwks.generation(), jwks.stats().keys, jwks.stats().failures), (1, 1, 1));
    }
}
