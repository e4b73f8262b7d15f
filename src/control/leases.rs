//! Heartbeats in, endpoints out: leases are renewed together once a second, and those that ended are taken away.
//!
//! A lease counts by the store's clock, so that replicas whose clocks disagree agree about it. When the control plane was
//! away, or its store was, nobody could renew: every lease then begins anew before any is taken away.

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};

use crate::{
    control::{
        book::{Key, named},
        endpoints::{self, Target},
        registry::Registry,
        reject::Rejection,
    },
    store::{Store, StoreError},
};

/// How often leases are looked after.
const LOOK: Duration = Duration::from_secs(1);

/// The leases of everything that was registered.
pub(super) struct Leases {
    store: Store,
    /// Heartbeats that the store has not been told of.
    heard: Mutex<HashMap<String, Duration>>,
    /// Whether the store has not answered lately.
    away: AtomicBool,
}

/// Where the lease of an endpoint lies: where the endpoint itself does.
pub(super) fn lease_of(target: &Target) -> String {
    Key::Leased(&target.service, &target.id).text()
}

/// How long the store waits: a sixth less than was promised, so that an endpoint that died with its last heartbeat is gone
/// within what it asked for, the look included.
fn kept_for(ttl_seconds: u64) -> Duration {
    Duration::from_secs(ttl_seconds) * 5 / 6
}

impl Leases {
    pub(super) fn new(store: Store) -> Self {
        Self { store, heard: Mutex::default(), away: AtomicBool::new(false) }
    }

    /// Begins a lease before its endpoint is there: whatever happens between, no endpoint is without one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) async fn begin(&self, target: &Target, ttl_seconds: u64) -> Result<(), StoreError> {
        self.store.renew(vec![(lease_of(target), kept_for(ttl_seconds))]).await
    }

    /// Notes a heartbeat; the store is told within a second.
    ///
    /// # Errors
    /// [`Rejection::StoreUnavailable`] when the store does not answer us: another replica may be heard by it.
    pub(super) fn heartbeat(&self, target: &Target, ttl_seconds: u64) -> Result<(), Rejection> {
        if self.away.load(Ordering::Relaxed) {
            return Err(Rejection::StoreUnavailable);
        }
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.insert(lease_of(target), kept_for(ttl_seconds));
        Ok(())
    }

    /// What is left of a lease, in seconds, as its owner was promised it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) async fn left_of(&self, target: &Target) -> Result<Option<u64>, StoreError> {
        self.tell().await?;
        let wanted = lease_of(target);
        let leases = self.store.leases().await?;
        let left = leases.into_iter().find(|(key, _)| *key == wanted);
        Ok(left.map(|(_, left)| (left * 6 / 5).as_secs()))
    }

    /// Looks after leases until dropped.
    pub(super) async fn tend(self: Arc<Self>, registry: Arc<Registry>) {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut away = true;
        loop {
            look.tick().await;
            let looked = if away { self.begin_all(&registry).await } else { Ok(()) };
            let looked = match looked {
                Ok(()) => self.look(&registry).await,
                Err(error) => Err(error),
            };
            if let (Err(error), false) = (&looked, away) {
                let error = error as &dyn std::error::Error;
                tracing::warn!(error, "leases are not looked after; none ends meanwhile");
            }
            away = looked.is_err();
            self.away.store(away, Ordering::Relaxed);
        }
    }

    /// Every lease begins anew.
    async fn begin_all(&self, registry: &Registry) -> Result<(), StoreError> {
        let version = registry.current();
        let all = version.book.leases().map(|(service, id, leased)| {
            (Key::Leased(service, id).text(), kept_for(leased.ttl_seconds))
        });
        let all: Vec<_> = all.collect();
        if all.is_empty() { Ok(()) } else { self.store.renew(all).await }
    }

    async fn look(&self, registry: &Registry) -> Result<(), StoreError> {
        self.tell().await?;
        let mut lapsed = self.store.lapsed().await?;
        // Heard of since.
        lapsed.retain(|key| {
            !self.heard.lock().unwrap_or_else(PoisonError::into_inner).contains_key(key)
        });
        if lapsed.is_empty() {
            return Ok(());
        }
        let ended: Vec<Target> = lapsed
            .iter()
            .filter_map(|key| named(key, "endpoint/"))
            .map(|(service, id)| Target { service, id })
            .collect();
        let version = registry.current();
        // A registration that was refused leaves a lease of nothing.
        let there = ended.iter().filter(|one| version.book.leased(&one.service, &one.id).is_some());
        for Target { service, id } in there {
            tracing::info!(%service, endpoint = %id, "an endpoint was not heard of for the time of its lease");
        }
        let gone = registry.change(move |draft| endpoints::expire(draft, &ended)).await;
        if gone.is_ok() {
            // One that has registered anew meanwhile has a lease of its own.
            let version = registry.current();
            lapsed.retain(|key| {
                named(key, "endpoint/")
                    .is_none_or(|(service, id)| version.book.leased(&service, &id).is_none())
            });
            self.store.forget(lapsed).await?;
        }
        Ok(())
    }

    /// Tells the store what was heard; what it does not take is told again.
    async fn tell(&self) -> Result<(), StoreError> {
        let heard = mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner));
        if heard.is_empty() {
            return Ok(());
        }
        let told = self.store.renew(heard.clone().into_iter().collect()).await;
        if told.is_err() {
            let mut since = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            for (key, ttl) in heard {
                since.entry(key).or_insert(ttl);
            }
        }
        told
    }
}
