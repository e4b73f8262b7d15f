//! The current snapshot, read without a lock.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::{sync::watch, time::Instant};

use crate::api::Catalog;

/// The snapshot of the moment, and when it was last confirmed.
#[derive(Debug)]
pub struct Directory {
    current: ArcSwapOption<Catalog>,
    changes: watch::Sender<u64>,
    confirmations: watch::Sender<u64>,
    confirmed: Mutex<Option<(Instant, Duration)>>,
}

impl Default for Directory {
    fn default() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            changes: watch::Sender::new(0),
            confirmations: watch::Sender::new(0),
            confirmed: Mutex::default(),
        }
    }
}

impl Directory {
    /// The snapshot, once there is one.
    #[must_use]
    pub fn load(&self) -> Option<Arc<Catalog>> {
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
        if self.current.load().as_deref() == Some(&catalog) {
            return;
        }
        self.current.store(Some(Arc::new(catalog)));
        self.changes.send_modify(|count| *count += 1);
    }

    /// The source said that the present snapshot is still current.
    pub fn confirm(&self) {
        self.note(Duration::ZERO);
        self.confirmations.send_modify(|count| *count += 1);
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
