//! Who serves which revision: proxies tell it, and the store keeps it for every replica.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};
use uuid::Uuid;

use crate::{
    api::{ProxyReport, ProxyRow},
    model::ServiceName,
    store::{Sighting, Store, StoreError},
};

/// How often what was heard is handed on.
const HAND_ON: Duration = Duration::from_secs(1);
/// Proxies that were not heard of for longer are not listed; each reports every half a minute.
const WITHIN: Duration = Duration::from_secs(120);
/// Proxies that may report between two looks; further ones report again soon.
const MOST: usize = 100_000;

/// What is kept of one report.
#[derive(Serialize, Deserialize)]
struct Heard {
    service: ServiceName,
    #[serde(flatten)]
    report: ProxyReport,
}

/// What proxies have told.
pub(super) struct Proxies {
    store: Store,
    heard: Mutex<HashMap<Uuid, Heard>>,
}

impl Proxies {
    pub(super) fn new(store: Store) -> Self {
        Self { store, heard: Mutex::default() }
    }

    /// Notes what a proxy says of itself.
    pub(super) fn hear(&self, instance: Uuid, service: ServiceName, report: ProxyReport) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.len() < MOST {
            heard.insert(instance, Heard { service, report });
        }
    }

    /// Every proxy that was heard of lately, those of one service together.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) async fn list(&self) -> Result<Vec<ProxyRow>, StoreError> {
        self.hand_on().await?;
        let mut rows: Vec<ProxyRow> = self
            .store
            .sightings(WITHIN)
            .await?
            .into_iter()
            .filter_map(|Sighting { id, text, age }| {
                // What another release wrote in another form is none that could be shown.
                let Heard { service, report } = serde_json::from_str(&text).ok()?;
                Some(ProxyRow { instance: id, service, seen_seconds_ago: age.as_secs(), report })
            })
            .collect();
        rows.sort_by(|a, b| (&a.service, a.instance).cmp(&(&b.service, b.instance)));
        Ok(rows)
    }

    /// Hands on what was heard until dropped.
    pub(super) async fn tend(self: Arc<Self>) {
        let mut look = interval(HAND_ON);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            if let Err(error) = self.hand_on().await {
                // They report again; nothing is lost for longer than that.
                let error = &error as &dyn std::error::Error;
                tracing::debug!(error, "who serves which revision was not kept");
            }
        }
    }

    async fn hand_on(&self) -> Result<(), StoreError> {
        let heard = mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner));
        let sightings: Vec<Sighting> = heard
            .into_iter()
            .filter_map(|(id, heard)| {
                Some(Sighting {
                    id,
                    text: serde_json::to_string(&heard).ok()?,
                    age: Duration::ZERO,
                })
            })
            .collect();
        if sightings.is_empty() { Ok(()) } else { self.store.sight(sightings).await }
    }
}
