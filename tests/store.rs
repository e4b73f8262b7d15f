//! What must survive, on both engines: one suite that both are told, and the disasters of each.
//!
//! The database is a real PostgreSQL of Debian's package, started here on a port of its own as nobody. Without the
//! package its stories say so and are skipped; under `CI=true` they fail instead.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "the helpers of a test may fail it"
)]

#[path = "store/database.rs"]
mod database;
#[path = "store/postgres.rs"]
mod postgres;
#[path = "store/sqlite.rs"]
mod sqlite;
#[path = "store/suite.rs"]
mod suite;

use std::{collections::BTreeMap, time::Duration};

use infrar::{
    runtime::Supervisor,
    store::{Commit, Location, Settings, State, Store, StoreError, Write},
};
use tokio::runtime::Handle;

/// Long enough for a debug build on a busy machine; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

async fn open(location: &Location) -> Store {
    open_with(location, Settings::default()).await.expect("a store that opens")
}

async fn open_with(location: &Location, settings: Settings) -> Result<Store, StoreError> {
    let supervisor = Supervisor::new(Handle::current());
    Store::open_with(location, &supervisor, settings).await
}

/// One commit on top of whatever is there.
async fn put(store: &Store, key: &str, value: &str) -> u64 {
    let revision = store.load().await.expect("a state").revision;
    store
        .commit(revision, vec![Write::put(key, value)], String::new())
        .await
        .expect("nobody else is here")
}

/// Waits until `store` knows of `revision`.
async fn hears_of(store: &Store, revision: u64) {
    let mut revisions = store.revisions();
    let heard = revisions.wait_for(|newest| *newest >= revision);
    tokio::time::timeout(PATIENCE, heard).await.expect("in time").expect("an open store");
}

/// What a follower makes of a state and the commits after it.
fn replay(state: State, commits: Vec<Commit>) -> State {
    let mut entries: BTreeMap<String, infrar::store::Entry> =
        state.entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
    let mut revision = state.revision;
    for commit in commits {
        assert_eq!(commit.revision, revision + 1, "a gap");
        revision = commit.revision;
        for Write { key, value } in commit.writes {
            match value {
                Some(value) => {
                    let entry = infrar::store::Entry { key: key.clone(), value, revision };
                    entries.insert(key, entry);
                }
                None => {
                    entries.remove(&key);
                }
            }
        }
    }
    State { revision, entries: entries.into_values().collect() }
}
