//! The token for one callee: asked for once however many wait, kept fresh while it is used.
//!
//! A request looks without a lock; only when nothing usable lies there does it wait, together with everybody else, for
//! the one question that is asked on the side runtime. Nobody who gives up waiting takes that question along. From half of
//! its life a token that is in use is renewed behind the requests' back, and while the issuer is down the old one serves
//! until five seconds before it expires: an expired token is never handed out.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    identity::{
        bearer::Bearer,
        source::{FILE_EVERY, TokenSource, TokenUnavailable, stamp},
    },
    model::ServiceName,
    runtime::{Backoff, Clock, Supervisor},
};

/// How long one question may take, all replicas included.
const ASK_LIMIT: Duration = Duration::from_secs(20);
/// Pauses after failures.
const RETRY: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));

/// The token for one callee. Shared by all workers.
pub struct Slot {
    pub(super) callee: ServiceName,
    source: Arc<dyn TokenSource>,
    pub(super) from_file: bool,
    shared: Arc<Shared>,
    pub(super) bearer: ArcSwapOption<Bearer>,
    /// Whether anybody looked at the present token: only those are renewed.
    used: AtomicBool,
    state: Mutex<State>,
    /// Counts questions that have ended, however they did.
    ended: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    asking: bool,
    keeping: bool,
    failures: u32,
    /// The last failure, and until when it is the answer to everybody.
    failed: Option<(TokenUnavailable, Instant)>,
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("callee", &self.callee).finish_non_exhaustive()
    }
}

impl Slot {
    pub(super) fn new(
        callee: ServiceName,
        source: Arc<dyn TokenSource>,
        from_file: bool,
        shared: Arc<Shared>,
    ) -> Arc<Self> {
        Arc::new(Self {
            callee,
            source,
            from_file,
            shared,
            bearer: ArcSwapOption::empty(),
            used: AtomicBool::new(false),
            state: Mutex::default(),
            ended: watch::Sender::new(0),
        })
    }

    /// For whom.
    #[must_use]
    pub fn callee(&self) -> &ServiceName {
        &self.callee
    }

    /// The token, if one lies ready. No lock, no wait.
    #[must_use]
    pub fn current(&self, now: Instant) -> Option<Arc<Bearer>> {
        self.with_current(now, Arc::clone)
    }

    /// As [`Slot::current`], lending the token instead of counting a reference, which all cores would share.
    pub fn with_current<T>(&self, now: Instant, read: impl FnOnce(&Arc<Bearer>) -> T) -> Option<T> {
        let bearer = self.bearer.load();
        let bearer = bearer.as_ref().filter(|bearer| bearer.is_usable(now))?;
        // Written once per token: a store for each request would share the line between cores.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(read(bearer))
    }

    /// The token, waited for when none lies ready. Whoever waits shares one question, and its failure; for a
    /// moment after a failure it is the answer at once. Cancel-safe; the question goes on without the asker.
    /// May be awaited on any runtime.
    ///
    /// # Errors
    /// [`TokenUnavailable`].
    pub async fn bearer(self: &Arc<Self>) -> Result<Arc<Bearer>, TokenUnavailable> {
        if let Some(bearer) = self.current(Instant::now()) {
            return Ok(bearer);
        }
        let mut ended = {
            let mut state = self.lock();
            let ended = self.ended.subscribe();
            // A question may have ended between the look and the lock.
            if let Some(bearer) = self.current(Instant::now()) {
                return Ok(bearer);
            }
            if !state.asking {
                state.refuse_early(Instant::now())?;
                self.begin(&mut state);
            }
            ended
        };
        // The other end lives in this slot, so it cannot be gone.
        let _told = ended.changed().await;
        if let Some(bearer) = self.current(Instant::now()) {
            return Ok(bearer);
        }
        let failed = self.lock().failed.clone();
        Err(failed.map_or(TokenUnavailable::Unusable, |(fault, _)| fault))
    }

    /// Told that its audience refuses this very token: it is dropped, and another one asked for. A token that has taken
    /// its place meanwhile stays.
    pub fn refused(self: &Arc<Self>, bearer: &Arc<Bearer>) {
        if self.discard(bearer, "its audience refuses it") {
            self.ask();
        }
    }

    /// Drops this very token, and asks for another if it was in use; says whether it was still there.
    pub(super) fn discard(self: &Arc<Self>, bearer: &Arc<Bearer>, why: &'static str) -> bool {
        let found = self.bearer.compare_and_swap(bearer, None);
        let dropped = found.as_ref().is_some_and(|found| Arc::ptr_eq(found, bearer));
        if dropped {
            info!(callee = %self.callee, why, "a token is dropped before its end");
            self.shared.changes.send_modify(|count| *count += 1);
            if self.used.load(Ordering::Relaxed) {
                self.ask();
            }
        }
        dropped
    }

    /// Asks for a fresh token now, unless a question is under way.
    pub(super) fn ask(self: &Arc<Self>) {
        let mut state = self.lock();
        if !state.asking {
            self.begin(&mut state);
        }
    }

    fn begin(self: &Arc<Self>, state: &mut State) {
        state.asking = true;
        // On the side runtime whoever asked, so that a worker or request that goes away does not take it along.
        let asking = Asking { slot: self.clone(), outcome: None };
        self.shared.supervisor.spawn_until_end("token", asking.carry());
    }

    pub(super) fn put(self: &Arc<Self>, bearer: Bearer) {
        self.bearer.store(Some(Arc::new(bearer)));
        self.used.store(false, Ordering::Relaxed);
        let mut state = self.lock();
        (state.failures, state.failed) = (0, None);
        if !state.keeping && !self.from_file {
            state.keeping = true;
            self.shared.supervisor.spawn_until_end("token-keeper", keep(Arc::downgrade(self)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the keeper should do, or `None` when there is nothing left to keep.
    fn next_step(self: &Arc<Self>) -> Option<Step> {
        let now = Instant::now();
        // Listened to before the token is looked at, so that none falls between.
        let ended = self.ended.subscribe();
        let sleep = |until: Instant| Some(Step { ended: ended.clone(), until: Some(until) });
        let Some(bearer) = self.bearer.load_full().filter(|bearer| bearer.is_usable(now)) else {
            let mut state = self.lock();
            // Another token may have come before the lock.
            if self.bearer.load().as_ref().is_some_and(|bearer| bearer.is_usable(now)) {
                return sleep(now);
            }
            self.bearer.store(None);
            state.keeping = false;
            return None;
        };
        if now < bearer.renew_at {
            return sleep(bearer.renew_at.min(bearer.usable_until));
        }
        if !self.used.load(Ordering::Relaxed) {
            let look = bearer.usable_until.duration_since(now) / 8;
            let look = look.clamp(Duration::from_millis(250), Duration::from_secs(15));
            return sleep((now + look).min(bearer.usable_until));
        }
        let mut state = self.lock();
        if !state.asking {
            let early = state.failed.as_ref().map(|(_, until)| *until).filter(|until| now < *until);
            if let Some(until) = early {
                return sleep(until.min(bearer.usable_until));
            }
            self.begin(&mut state);
        }
        Some(Step { ended, until: None })
    }
}

impl State {
    fn refuse_early(&self, now: Instant) -> Result<(), TokenUnavailable> {
        match &self.failed {
            Some((fault, until)) if now < *until => Err(fault.clone()),
            _ => Ok(()),
        }
    }
}

/// What all slots of a process share.
pub(super) struct Shared {
    pub(super) supervisor: Supervisor,
    pub(super) clock: Clock,
    /// Counts tokens that came, and those that were dropped before their end.
    pub(super) changes: watch::Sender<u64>,
    pub(super) received: AtomicU64,
    pub(super) failures: AtomicU64,
}

/// What keeps a token fresh does next: it waits for a question to end, or no longer than until then.
struct Step {
    ended: watch::Receiver<u64>,
    until: Option<Instant>,
}

/// Renews a slot's token while it is used; ends when there is nothing left to renew.
async fn keep(slot: Weak<Slot>) {
    loop {
        let Some(step) = slot.upgrade().and_then(|slot| slot.next_step()) else { return };
        let Step { mut ended, until } = step;
        let due = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        // Another token may have come that must be renewed sooner than the one before.
        tokio::select! {
            _told = ended.changed() => {}
            () = due => {}
        }
    }
}

/// Reads a token file again whenever it is another one: content, or the link that a projected volume swaps.
pub(super) async fn watch_file(slot: Weak<Slot>, path: PathBuf) {
    let mut seen = None;
    loop {
        let now = stamp(&path).await;
        let Some(slot) = slot.upgrade() else { return };
        if now.is_some() && now != seen {
            slot.ask();
        }
        drop(slot);
        seen = now;
        sleep(FILE_EVERY).await;
    }
}

/// A question under way; whatever ends it, those who wait are told.
struct Asking {
    slot: Arc<Slot>,
    outcome: Option<Result<Bearer, TokenUnavailable>>,
}

impl Asking {
    async fn carry(mut self) {
        let shared = self.slot.shared.clone();
        let (asked, today) = (Instant::now(), shared.clock.unix_seconds());
        let answer = timeout(ASK_LIMIT, self.slot.source.ask(&self.slot.callee)).await;
        let answer = answer.unwrap_or(Err(TokenUnavailable::Deadline));
        let bearer = answer.and_then(|answer| {
            Bearer::new(&answer, asked, today).ok_or(TokenUnavailable::Unusable)
        });
        self.outcome = Some(bearer);
    }

    fn settle(&mut self) {
        let (slot, shared) = (&self.slot, &self.slot.shared);
        // Without an outcome the source panicked or the runtime ends.
        match self.outcome.take().unwrap_or(Err(TokenUnavailable::Unusable)) {
            Ok(bearer) => {
                if slot.lock().failures > 0 {
                    info!(callee = %slot.callee, "there are tokens again");
                }
                debug!(callee = %slot.callee, expires_at = bearer.expires_at, "token received");
                slot.put(bearer);
                shared.received.fetch_add(1, Ordering::Relaxed);
                shared.changes.send_modify(|count| *count += 1);
            }
            Err(fault) => {
                shared.failures.fetch_add(1, Ordering::Relaxed);
                let error = &fault as &dyn std::error::Error;
                let mut state = slot.lock();
                // Once per spell: it is asked for again every few seconds.
                if state.failures == 0 {
                    warn!(callee = %slot.callee, error, "no token");
                } else {
                    debug!(callee = %slot.callee, error, "still no token");
                }
                state.failures = state.failures.saturating_add(1);
                let until = Instant::now() + RETRY.pause(state.failures);
                state.failed = Some((fault, until));
            }
        }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.settle();
        self.slot.lock().asking = false;
        self.slot.ended.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use futures_util::{FutureExt, future::BoxFuture};
    use tokio::time::advance;

    use super::*;
    use crate::{
        api::{Client, Credential, TokenAnswer},
        identity::{
            ControlTokens, Tokens,
            bearer::MARGIN,
            forge::{LIFE, data, here, tokens},
        },
    };

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_first_calls_cost_one_token() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        assert!(slot.current(Instant::now()).is_none());
        let calls = (0..10_000).map(|_| slot.bearer());
        let bearers = futures_util::future::join_all(calls).await;
        assert!(bearers.iter().all(|one| one.as_ref().unwrap().header() == "Bearer data-1"));
        assert_eq!(issuer.asked(), 1);
        assert!(slot.current(Instant::now()).unwrap().header().is_sensitive());
    }

    #[test]
    fn callers_on_other_threads_wait_for_the_same_token() {
        let side = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let _entered = side.enter();
        let (tokens, issuer) = tokens(&[]);
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let slot = tokens.slot(&data());
                std::thread::spawn(move || {
                    let worker =
                        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    worker.block_on(slot.bearer()).unwrap().header().clone()
                })
            })
            .collect();
        for worker in workers {
            assert_eq!(worker.join().unwrap(), "Bearer data-1");
        }
        assert_eq!(issuer.asked(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_in_use_is_renewed_from_half_its_life_and_an_idle_one_is_not() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        slot.bearer().await.unwrap();
        sleep(LIFE.mul_f64(0.49)).await;
        assert_eq!(issuer.asked(), 1);
        sleep(LIFE.mul_f64(0.12)).await;
        assert_eq!(issuer.asked(), 2);
        // Nobody has looked at the second one, so nobody needs a third. It was received after half a life at the earliest.
        sleep(LIFE.mul_f64(0.8)).await;
        assert_eq!(issuer.asked(), 2);
        // One look is enough, however late.
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer data-2");
        sleep(Duration::from_secs(20)).await;
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer data-3");
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_issuer_is_down_a_token_serves_until_five_seconds_before_its_end() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        let begun = Instant::now();
        slot.bearer().await.unwrap();
        issuer.down.store(true, Ordering::SeqCst);
        sleep_until(begun + LIFE - Duration::from_millis(5001)).await;
        assert_eq!(slot.bearer().await.unwrap().header(), "Bearer data-1");
        assert!(issuer.asked() > 10, "it must have tried: {}", issuer.asked());
        sleep_until(begun + LIFE - MARGIN).await;
        assert!(slot.current(Instant::now()).is_none());
        assert!(matches!(slot.bearer().await, Err(TokenUnavailable::Deadline)));
        issuer.down.store(false, Ordering::SeqCst);
        sleep(Duration::from_secs(6)).await;
        assert!(slot.bearer().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_shared_and_not_asked_for_again_at_once() {
        let (tokens, issuer) = tokens(&[]);
        issuer.down.store(true, Ordering::SeqCst);
        let slot = tokens.slot(&data());
        let calls = (0..100).map(|_| slot.bearer());
        let all = futures_util::future::join_all(calls).await;
        assert!(all.iter().all(Result::is_err));
        for _ in 0..100 {
            assert!(slot.bearer().await.is_err());
        }
        assert_eq!(issuer.asked(), 1);
        advance(Duration::from_millis(200)).await;
        assert!(slot.bearer().await.is_err());
        assert_eq!(issuer.asked(), 2);
        assert_eq!(tokens.stats().failures, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_gives_up_does_not_take_the_question_along() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        assert!(timeout(Duration::from_millis(1), slot.bearer()).await.is_err());
        sleep(Duration::from_millis(60)).await;
        assert!(slot.current(Instant::now()).is_some());
        assert_eq!(issuer.asked(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_panics_leaves_nobody_waiting() {
        struct Broken;
        impl TokenSource for Broken {
            fn ask(
                &self,
                _: &ServiceName,
            ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
                async { panic!("on purpose") }.boxed()
            }
        }
        let clock = Clock::system();
        let tokens = Tokens::new(Arc::new(Broken), HashMap::new(), here(), clock);
        let answer = tokens.slot(&data()).bearer().await;
        assert!(matches!(answer, Err(TokenUnavailable::Unusable)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_lives_shorter_than_the_one_before_is_renewed_ahead_too() {
        let (tokens, issuer) = tokens(&[]);
        issuer.seconds.store(86_400, Ordering::SeqCst);
        let slot = tokens.slot(&data());
        slot.bearer().await.unwrap();
        issuer.seconds.store(300, Ordering::SeqCst);
        slot.ask();
        sleep(Duration::from_secs(1)).await;
        // In use without a gap, as requests see it.
        for _ in 0..600 {
            assert!(slot.current(Instant::now()).is_some(), "{} were asked for", issuer.asked());
            sleep(Duration::from_secs(1)).await;
        }
        assert!(issuer.asked() > 4, "{}", issuer.asked());
    }

    #[tokio::test(start_paused = true)]
    async fn a_spell_without_tokens_is_two_lines_in_the_log() {
        let (paper, _guard) = crate::telemetry::overhear("info");
        let (tokens, issuer) = tokens(&[]);
        issuer.down.store(true, Ordering::SeqCst);
        let slot = tokens.slot(&data());
        for _ in 0..10 {
            assert!(slot.bearer().await.is_err());
            sleep(Duration::from_secs(5)).await;
        }
        issuer.down.store(false, Ordering::SeqCst);
        slot.bearer().await.unwrap();
        let log = paper.text();
        assert_eq!(log.lines().count(), 2, "{log}");
        assert!(log.contains("no token callee=data error=the issuer gave no answer"), "{log}");
        assert!(log.contains("there are tokens again callee=data"), "{log}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_its_audience_refuses_is_given_to_nobody_again() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        let dead = slot.bearer().await.unwrap();
        let mut changes = tokens.changes();
        for _ in 0..100 {
            slot.refused(&dead);
        }
        assert!(changes.has_changed().unwrap(), "what lies on disk is no longer right");
        changes.mark_unchanged();
        assert!(slot.current(Instant::now()).is_none() && tokens.snapshot().is_empty());
        let fresh = slot.bearer().await.unwrap();
        assert_eq!((fresh.header().to_str().unwrap(), issuer.asked()), ("Bearer data-2", 2));
        // Whoever still holds the old one says nothing about the new one.
        slot.refused(&dead);
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer data-2");
        assert_eq!(issuer.asked(), 2);
    }

    #[test]
    fn questions_that_nobody_answers_hold_up_nothing_else() {
        let side = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        side.block_on(async {
            // Accepts, and says nothing.
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
            let client = Client::new(crate::api::ClientSettings::new(vec![url], None)).unwrap();
            let credential = Credential { client_id: data(), secret: "secret".into() };
            let source = Arc::new(ControlTokens::new(client, credential));
            let tokens = Tokens::new(source, HashMap::new(), here(), Clock::system());
            let (first, second) = (tokens.slot(&data()), tokens.slot(&"reports".parse().unwrap()));
            let looking_up_a_name = async {
                // Both questions have arrived, so both wait for their answers.
                let _held = (listener.accept().await.unwrap(), listener.accept().await.unwrap());
                tokio::task::spawn_blocking(|| "found").await.unwrap()
            };
            tokio::select! {
                found = looking_up_a_name => assert_eq!(found, "found"),
                _ = first.bearer() => unreachable!("nobody answers"),
                _ = second.bearer() => unreachable!("nobody answers"),
            }
        });
        side.shutdown_background();
    }
}
