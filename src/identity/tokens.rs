//! Audience → bearer: all outbound tokens of a process, one [`Slot`] per callee.
//!
//! What is true of all of them at once is said here: which come from a file, which are worth keeping over a restart, and
//! which nobody accepts any more although they have not expired.

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    api::TokenAnswer,
    identity::{
        bearer::{Bearer, MARGIN, StoredToken},
        keys::KeySet,
        slot::{Shared, Slot, watch_file},
        source::{TokenFile, TokenSource},
    },
    model::{Project, ServiceName},
    runtime::{Clock, Supervisor},
};

/// How often the wall clock is looked at.
const CLOCK_EVERY: Duration = Duration::from_secs(1);

/// Numbers for `infrar_token_*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenStats {
    /// Tokens received.
    pub received: u64,
    /// Questions without a token in the end, refusals included.
    pub failures: u64,
    /// For each callee how long its token may still be sent; `None` without one.
    pub left: Vec<(ServiceName, Option<Duration>)>,
}

/// All outbound tokens of this process.
pub struct Tokens {
    shared: Arc<Shared>,
    source: Arc<dyn TokenSource>,
    desk: Mutex<Desk>,
}

/// Which slots there are, and which of them read a file.
struct Desk {
    files: HashMap<ServiceName, PathBuf>,
    slots: HashMap<ServiceName, Arc<Slot>>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("slots", &self.lock().slots.len()).finish_non_exhaustive()
    }
}

impl Tokens {
    /// Tokens from `source`, but those for services in `files` from their file.
    #[must_use]
    pub fn new(
        source: Arc<dyn TokenSource>,
        files: HashMap<ServiceName, PathBuf>,
        supervisor: Supervisor,
        clock: Clock,
    ) -> Self {
        let changes = watch::Sender::new(0);
        let (received, failures) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared { supervisor, clock, changes, received, failures });
        Self { shared, source, desk: Mutex::new(Desk { files, slots: HashMap::new() }) }
    }

    /// Takes the tokens for services in `files` from their file from now on, and those of all others from the source.
    /// Slots of services for which that is no change stay; of the others, whoever looks up the slot again gets a new
    /// one.
    pub fn read_from(&self, files: HashMap<ServiceName, PathBuf>) {
        let mut desk = self.lock();
        let before = std::mem::replace(&mut desk.files, files);
        let Desk { files, slots } = &mut *desk;
        slots.retain(|callee, _| before.get(callee) == files.get(callee));
    }

    /// The slot for a callee, until [`read_from`](Self::read_from) says where else its token comes from. Takes a lock:
    /// look it up when a snapshot is built, not for every request.
    #[must_use]
    pub fn slot(&self, callee: &ServiceName) -> Arc<Slot> {
        let mut desk = self.lock();
        if let Some(slot) = desk.slots.get(callee) {
            return slot.clone();
        }
        let file = desk.files.get(callee);
        let source = file
            .map_or_else(|| self.source.clone(), |path| Arc::new(TokenFile { path: path.clone() }));
        let slot = Slot::new(callee.clone(), source, file.is_some(), self.shared.clone());
        if let Some(path) = file {
            let watching = watch_file(Arc::downgrade(&slot), path.clone());
            self.shared.supervisor.spawn_until_end("token-file", watching);
        }
        desk.slots.insert(callee.clone(), slot.clone());
        slot
    }

    /// Renews at once every token that lacks a scope that `permissions` grants `me` now, so that a new grant does not
    /// wait for half a token's life. One that is taken away needs no renewal: it no longer counts at the callee.
    pub fn reconcile(&self, project: &Project, me: &ServiceName) {
        for slot in self.lock().slots.values() {
            let Some(bearer) = slot.bearer.load_full() else { continue };
            let granted = project.granted(me, &slot.callee);
            if !slot.from_file && granted.is_some_and(|granted| !bearer.scope.covers(granted)) {
                slot.ask();
            }
        }
    }

    /// Drops tokens of another issuer than `issuer`, which the project has now: nobody accepts them any more.
    pub fn issued_by(&self, issuer: &str) {
        self.discard("another issuer's", |bearer| {
            bearer.issuer.as_deref().is_some_and(|other| other != issuer)
        });
    }

    /// Drops tokens whose key is none of `keys`, if those are all the keys that the issuer had at `as_of` or later:
    /// nobody can verify them any more.
    pub fn signed_by(&self, keys: &KeySet, as_of: Instant) {
        self.discard("its key is gone", |bearer| {
            bearer.asked < as_of && bearer.unknown_key(keys).is_some()
        });
    }

    /// A key by which a token is signed and that `keys` do not have, if there is any.
    #[must_use]
    pub fn unknown_key(&self, keys: &KeySet) -> Option<String> {
        self.issued()
            .into_iter()
            .find_map(|(_, bearer)| bearer.unknown_key(keys).map(str::to_owned))
    }

    fn discard(&self, why: &'static str, is_worthless: impl Fn(&Bearer) -> bool) {
        for (slot, bearer) in self.issued() {
            if is_worthless(&bearer) {
                slot.discard(&bearer, why);
            }
        }
    }

    /// The tokens that the issuer gave, as far as any are there.
    fn issued(&self) -> Vec<(Arc<Slot>, Arc<Bearer>)> {
        let desk = self.lock();
        let slots = desk.slots.values().filter(|slot| !slot.from_file);
        slots.filter_map(|slot| Some((slot.clone(), slot.bearer.load_full()?))).collect()
    }

    /// Tells of every token that comes or is found worthless, so that they can be kept on disk as they are.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// The tokens that are worth keeping on disk: usable ones, and none that came from a file.
    #[must_use]
    pub fn snapshot(&self) -> Vec<StoredToken> {
        let now = Instant::now();
        let usable = self.issued().into_iter().filter(|(_, bearer)| bearer.is_usable(now));
        let stored = usable.map(|(slot, bearer)| StoredToken {
            callee: slot.callee.clone(),
            token: bearer.token().expose_secret().to_owned(),
            scope: bearer.scope.clone(),
            issued_at: bearer.issued_at,
            expires_at: bearer.expires_at,
        });
        stored.collect()
    }

    /// Takes tokens of an earlier run, but those that have expired since.
    pub fn restore(&self, stored: Vec<StoredToken>) {
        let (now, today) = (Instant::now(), self.shared.clock.unix_seconds());
        for token in stored {
            // A clock that was set back must not lengthen a life.
            let life = token.expires_at.saturating_sub(token.issued_at);
            let left = token.expires_at.saturating_sub(today).min(life);
            let answer = TokenAnswer {
                access_token: SecretString::from(token.token),
                expires_in: Some(Duration::from_secs(u64::try_from(left).unwrap_or(0))),
                scope: token.scope,
            };
            let slot = self.slot(&token.callee);
            if let Some(bearer) = Bearer::new(&answer, now, today).filter(|_| !slot.from_file) {
                slot.put(bearer);
            }
        }
    }

    /// Drops tokens that have expired by the wall clock, for as long as somebody holds them; to be run on the side
    /// runtime. Requests compare with a clock that costs nothing to read but stands still while the machine sleeps.
    pub fn follow_clock(self: &Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        let weak = Arc::downgrade(self);
        async move {
            while let Some(tokens) = weak.upgrade() {
                tokens.drop_expired(tokens.shared.clock.unix_seconds());
                drop(tokens);
                sleep(CLOCK_EVERY).await;
            }
        }
    }

    /// Drops the tokens that must not be sent any more at `now`, seconds since 1970.
    fn drop_expired(&self, now: i64) {
        let margin = i64::try_from(MARGIN.as_secs()).unwrap_or(i64::MAX);
        for slot in self.lock().slots.values() {
            let Some(bearer) = slot.bearer.load_full() else { continue };
            if bearer.expires_at.saturating_sub(margin) <= now {
                // Only this one: a fresh token may have come since the look.
                let _dropped = slot.bearer.compare_and_swap(&bearer, None);
            }
        }
    }

    /// Numbers for metrics.
    #[must_use]
    pub fn stats(&self) -> TokenStats {
        let now = Instant::now();
        let left = |slot: &Slot| {
            let bearer = slot.bearer.load();
            let bearer = bearer.as_ref().filter(|bearer| bearer.is_usable(now))?;
            Some(bearer.usable_until.duration_since(now))
        };
        TokenStats {
            received: self.shared.received.load(Ordering::Relaxed),
            failures: self.shared.failures.load(Ordering::Relaxed),
            left: self
                .lock()
                .slots
                .values()
                .map(|slot| (slot.callee.clone(), left(slot)))
                .collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::forge::{LIFE, Source, data, here, tokens},
        model::ScopeSet,
    };

    #[tokio::test(start_paused = true)]
    async fn tokens_survive_a_restart_until_they_expire() {
        let (first, issuer) = tokens(&[]);
        first.slot(&data()).bearer().await.unwrap();
        let written = serde_json::to_string(&first.snapshot()).unwrap();
        sleep(Duration::from_secs(600)).await;
        issuer.down.store(true, Ordering::SeqCst);

        let restart = |after: i64| {
            let start = jiff::Timestamp::from_second(1_800_000_000 + after).unwrap();
            let source = Arc::new(Source(issuer.clone()));
            let clock = Clock::starting_at(start);
            let tokens = Tokens::new(source, HashMap::new(), here(), clock);
            tokens.restore(serde_json::from_str(&written).unwrap());
            tokens
        };
        let soon = restart(600);
        let slot = soon.slot(&data());
        let bearer = slot.current(Instant::now()).unwrap();
        assert_eq!(bearer.header(), "Bearer data-1");
        assert_eq!(bearer.usable_until() - Instant::now(), Duration::from_secs(2995));
        assert_eq!(soon.snapshot().len(), 1);
        assert!(restart(3596).slot(&data()).current(Instant::now()).is_none());
        // A clock that was set back does not lengthen a life.
        let back = restart(-86_400).slot(&data()).current(Instant::now()).unwrap();
        assert_eq!(back.usable_until() - Instant::now(), LIFE - MARGIN);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_grant_does_not_wait_for_half_a_life() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        slot.bearer().await.unwrap();
        let me: ServiceName = "web".parse().unwrap();
        let project = |scopes: &str| Project {
            name: "shop".parse().unwrap(),
            networking: crate::model::Networking {
                multi_cloud: true,
                default_mode: crate::model::NetworkMode::Public,
                connections: Vec::new(),
            },
            services: std::collections::BTreeMap::new(),
            permissions: [(me.clone(), [(data(), ScopeSet::parse_list(scopes).unwrap())].into())]
                .into(),
            issuers: Vec::new(),
            mode: crate::model::Enforcement::Enforce,
        };
        tokens.reconcile(&project("read:data"), &me);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(issuer.asked(), 1);
        tokens.reconcile(&project("read:data write:data"), &me);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(issuer.asked(), 2);
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer data-2");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_expired_while_the_machine_slept_is_not_sent() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        let expires_at = slot.bearer().await.unwrap().expires_at();
        tokens.drop_expired(expires_at - 6);
        assert!(slot.current(Instant::now()).is_some());
        // The wall clock went on, the one that timers use did not.
        tokens.drop_expired(expires_at - 5);
        assert!(slot.current(Instant::now()).is_none());
        assert_eq!(slot.bearer().await.unwrap().header(), "Bearer data-2");
        assert_eq!(issuer.asked(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_goes_with_its_key_and_with_its_issuer() {
        let (tokens, issuer) = tokens(&[]);
        let keys = |kid: &str| {
            let key = crate::identity::forge::Forge::new(kid, crate::identity::Algorithm::EdDsa);
            KeySet::from_json(&crate::identity::forge::set(&[&key])).unwrap()
        };
        let slot = tokens.slot(&data());
        *issuer.kid.lock().unwrap() = Some("k1");
        let first = slot.bearer().await.unwrap();
        let received = Instant::now();
        assert_eq!(tokens.unknown_key(&keys("k1")), None);
        assert_eq!(tokens.unknown_key(&keys("k2")).as_deref(), Some("k1"));
        // Keys that are older than the token prove nothing against it.
        tokens.signed_by(&keys("k2"), received - LIFE / 2);
        tokens.signed_by(&keys("k1"), received);
        tokens.issued_by("https://i");
        assert!(Arc::ptr_eq(&slot.current(received).unwrap(), &first));
        *issuer.kid.lock().unwrap() = Some("k2");
        tokens.signed_by(&keys("k2"), received);
        assert!(slot.current(received).is_none());
        let second = slot.bearer().await.unwrap();
        assert_eq!((tokens.unknown_key(&keys("k2")), issuer.asked()), (None, 2));
        tokens.issued_by("https://moved");
        assert!(slot.current(received).is_none());
        assert!(!Arc::ptr_eq(&slot.bearer().await.unwrap(), &second));
    }

    #[tokio::test(start_paused = true)]
    async fn no_print_shows_a_token() {
        let (tokens, _issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        let bearer = slot.bearer().await.unwrap();
        let printed = format!("{tokens:?} {slot:?} {bearer:?} {:?}", bearer.header());
        assert!(!printed.contains("data-1"), "{printed}");
        assert_eq!(bearer.token().expose_secret(), "data-1");
    }
}
