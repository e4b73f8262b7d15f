//! The current snapshot, read without a lock: the base that the registry's source has published, and over it what
//! further sources have found.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::{sync::watch, time::Instant};

use super::{
    overlay::{Layer, Layers, is_same},
    snapshot::Snapshot,
};
use crate::api::Catalog;

/// The snapshot of the moment, and when it was last confirmed.
#[derive(Debug)]
pub struct Directory {
    current: ArcSwapOption<Snapshot>,
    layers: Mutex<Layers>,
    changes: watch::Sender<u64>,
    base_changes: watch::Sender<u64>,
    confirmations: watch::Sender<u64>,
    confirmed: Mutex<Option<(Instant, Duration)>>,
}

impl Default for Directory {
    fn default() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            layers: Mutex::default(),
            changes: watch::Sender::new(0),
            base_changes: watch::Sender::new(0),
            confirmations: watch::Sender::new(0),
            confirmed: Mutex::default(),
        }
    }
}

impl Directory {
    /// The snapshot, once there is one.
    #[must_use]
    pub fn load(&self) -> Option<Arc<Catalog>> {
        self.current.load().as_ref().map(|snapshot| Arc::clone(snapshot.catalog()))
    }

    /// The same with what is derived from it.
    #[must_use]
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.current.load_full()
    }

    /// Tells of each new snapshot; the number is of no further meaning.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Tells each time that a source has said that the snapshot is current; the number is of no further meaning.
    #[must_use]
    pub fn confirmations(&self) -> watch::Receiver<u64> {
        self.confirmations.subscribe()
    }

    /// Puts a snapshot in force that its source says is current. One that equals the present one changes nothing.
    pub fn publish(&self, catalog: Catalog) {
        self.adopt(catalog, Duration::ZERO);
        self.confirmations.send_modify(|count| *count += 1);
    }

    /// Puts a snapshot of an earlier run in force, that was current `age` ago.
    pub fn adopt(&self, catalog: Catalog, age: Duration) {
        self.note(age);
        if self.edit(|layers| layers.lay(catalog)) {
            self.base_changes.send_modify(|count| *count += 1);
        }
    }

    /// The source said that the present snapshot is still current.
    pub fn confirm(&self) {
        self.note(Duration::ZERO);
        self.confirmations.send_modify(|count| *count += 1);
    }

    /// The snapshot as its source published it, without what further sources found: what is to survive a restart.
    #[must_use]
    pub fn base(&self) -> Option<Arc<Catalog>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).base()
    }

    /// Tells of each new [`base`](Self::base); the number is of no further meaning.
    #[must_use]
    pub fn base_changes(&self) -> watch::Receiver<u64> {
        self.base_changes.subscribe()
    }

    /// A place for what a further source finds; without effect until it says something, and gone when dropped.
    #[must_use]
    pub fn layer(self: &Arc<Self>) -> Layer {
        let id = self.layers.lock().unwrap_or_else(PoisonError::into_inner).open();
        Layer::new(Arc::clone(self), id)
    }

    /// Whether a further source has not said anything yet.
    #[must_use]
    pub fn is_awaiting(&self) -> bool {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).is_awaiting()
    }

    pub(super) fn leads_somewhere(&self, layer: u64) -> bool {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).leads_somewhere(layer)
    }

    /// Changes the layers; what they then amount to is in force before anybody else may change them. `false`: nothing
    /// was changed.
    pub(super) fn edit(&self, edit: impl FnOnce(&mut Layers) -> bool) -> bool {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if !edit(&mut layers) {
            return false;
        }
        let before = self.current.load_full();
        let known = before.as_ref().map(|snapshot| snapshot.catalog());
        let Some(composed) = layers.composed(known) else { return true };
        if known.is_none_or(|known| !is_same(known, &composed)) {
            let next = Snapshot::after(before.as_deref(), composed);
            self.current.store(Some(Arc::new(next)));
            self.changes.send_modify(|count| *count += 1);
        }
        true
    }

    fn note(&self, age: Duration) {
        *self.confirmed.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((Instant::now(), age));
    }

    /// How long ago a source last said that the snapshot is current; `None` before the first one.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let confirmed = *self.confirmed.lock().unwrap_or_else(PoisonError::into_inner);
        confirmed.map(|(at, age)| at.elapsed() + age)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(revision: u64) -> Catalog {
        let json = format!(
            r#"{{"revision":{revision},"issuer":"x","project":{{"name":"shop","networking":{{"multi_cloud":true,
            "default_mode":"public","connections":[]}},"services":{{}},"permissions":{{}},"issuers":[],
            "mode":"enforce"}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_age_counts_from_the_last_confirmation() {
        let directory = Directory::default();
        assert_eq!((directory.load(), directory.age()), (None, None));
        directory.adopt(catalog(1), Duration::from_secs(60));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(directory.age(), Some(Duration::from_secs(65)));
        directory.confirm();
        assert_eq!(directory.age(), Some(Duration::ZERO));
    }

    #[test]
    fn only_another_snapshot_is_a_change() {
        let directory = Directory::default();
        let (mut changes, mut confirmations) = (directory.changes(), directory.confirmations());
        directory.publish(catalog(1));
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        confirmations.mark_unchanged();
        directory.publish(catalog(1));
        assert!(!changes.has_changed().unwrap());
        assert!(confirmations.has_changed().unwrap());
        directory.publish(catalog(2));
        assert!(changes.has_changed().unwrap());
    }
}
