//! What must survive: entries by key, one revision for all of them, and the last commits.
//!
//! The one idea: every commit is a compare-and-swap on the revision of the whole store. Whoever decided by a state that
//! is no longer the newest is told so and decides anew; so any number of replicas on one database agree, and none
//! holds a lock while it thinks. What an entry says and who may change it is decided above: the engines know keys and
//! text.
//!
//! Two things move too often for a revision: leases, which end by the store's own clock, and sightings. They have
//! tables of their own and may be lost with a backup.
//!
//! Two engines stand behind one interface: SQLite for one node (`sqlite/`), PostgreSQL for many (`postgres/`).

mod dump;
mod entry;
mod error;
mod location;
mod postgres;
mod sqlite;

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{runtime::Handle, sync::watch};
use uuid::Uuid;

use self::{entry::last_of_each, postgres::Postgres, sqlite::Sqlite};
pub use self::{
    entry::{Commit, Entry, Sighting, Since, State, Write},
    error::{Cause, CommitError, StoreError},
    location::{Database, Location, LocationError},
};
use crate::runtime::{Clock, Supervisor};

/// How long one operation may take.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// How many commits are kept for those who catch up.
pub const KEPT_COMMITS: u64 = 10_000;
/// Most commits in one answer of [`Store::since`].
pub const PAGE: u64 = 1_000;
/// The longest key: PostgreSQL's index takes 2,704 bytes, others less.
pub const KEY_BYTES: usize = 1_024;
/// Sightings older than this are deleted.
const DAY: Duration = Duration::from_hours(24);

/// What a store may be told besides its place.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How many commits are kept.
    pub kept_commits: u64,
    /// Most bytes of an SQLite file; then it is full.
    pub size_limit: Option<u64>,
    /// The clock of leases and sightings in an SQLite file. A database has its own.
    pub clock: Clock,
    /// How this process hears of others' commits in a database.
    pub news: News,
    /// What keeps two processes from migrating a database at once.
    pub migration_lock: MigrationLock,
}

/// How a process hears of others' commits in a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// The database calls (LISTEN/NOTIFY), and is asked every second all the same.
    CalledAndAsked,
    /// It is asked every second: for databases, and poolers before them, that do not pass calls on.
    Asked,
}

/// What keeps two processes from migrating a database at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationLock {
    /// PostgreSQL's advisory lock, or a row where there is none.
    Advisory,
    /// A row with an end.
    Row,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kept_commits: KEPT_COMMITS,
            size_limit: None,
            clock: Clock::system(),
            news: News::CalledAndAsked,
            migration_lock: MigrationLock::Advisory,
        }
    }
}

/// A store that is open. Clones are the same store.
///
/// Every operation ends within [`DEADLINE`]; a commit whose answer was lost may take as long again to learn what
/// became of it. An SQLite file belongs to the process until the store is [closed](Self::close) or its last clone
/// dropped.
#[derive(Clone, Debug)]
pub struct Store(Engine);

#[derive(Clone, Debug)]
enum Engine {
    Sqlite(Arc<Sqlite>),
    Postgres(Arc<Postgres>),
}

/// The same question to whichever engine it is.
macro_rules! ask {
    ($store:expr, $engine:ident => $answer:expr) => {
        match &$store.0 {
            Engine::Sqlite($engine) => $answer,
            Engine::Postgres($engine) => $answer,
        }
    };
}

impl Store {
    /// Opens the store at `location`, makes it if it is not there, and brings it to this version's schema, one process
    /// at a time. What it does in the background is done under `supervisor`.
    ///
    /// # Errors
    /// [`StoreError`] says what is wrong there and what to do.
    pub async fn open(location: &Location, supervisor: &Supervisor) -> Result<Self, StoreError> {
        Self::open_with(location, supervisor, Settings::default()).await
    }

    /// As [`open`](Self::open), told more.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_with(
        location: &Location,
        supervisor: &Supervisor,
        settings: Settings,
    ) -> Result<Self, StoreError> {
        Ok(Self(match location {
            Location::Sqlite(path) => {
                Engine::Sqlite(Arc::new(Sqlite::open(path, supervisor, &settings).await?))
            }
            Location::Postgres(database) => {
                let opening = Postgres::open(database, supervisor, &settings);
                Engine::Postgres(Box::pin(opening).await?)
            }
        }))
    }

    /// Made when the store was made, kept by backups, and the same for every replica.
    #[must_use]
    pub fn id(&self) -> Uuid {
        ask!(self, engine => engine.id())
    }

    /// Where it is, for people; without a password.
    #[must_use]
    pub fn location(&self) -> &str {
        ask!(self, engine => engine.location())
    }

    /// Everything, as it was at one moment.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn load(&self) -> Result<State, StoreError> {
        ask!(self, engine => engine.load().await)
    }

    /// Makes revision `expected + 1` of `changes`, all of them or none, and answers it once it is on disk. Of several
    /// changes of one key the last counts. No changes make a revision too. The note is for people.
    ///
    /// Not cancel-safe: dropped while it waits, the commit may be there or not.
    ///
    /// # Errors
    /// [`CommitError::Conflict`] when the store is not at `expected`; nothing was written then. After
    /// [`StoreError::Unknown`] it may be there, after any other it is not.
    pub async fn commit(
        &self,
        expected: u64,
        changes: Vec<Write>,
        note: String,
    ) -> Result<u64, CommitError> {
        let writes = last_of_each(changes);
        short(writes.iter().map(|write| &write.key))?;
        ask!(self, engine => engine.commit(expected, writes, note).await)
    }

    /// What came after `revision`, at most [`PAGE`] commits at a time.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn since(&self, revision: u64) -> Result<Since, StoreError> {
        ask!(self, engine => engine.since(revision).await)
    }

    /// The newest revision this process knows of: its own at once, those of others when the database calls, or within
    /// a second.
    #[must_use]
    pub fn revisions(&self) -> watch::Receiver<u64> {
        ask!(self, engine => engine.revisions())
    }

    /// Lets the lease of each key end that long from now, by the store's clock. All of them or none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn renew(&self, leases: Vec<(String, Duration)>) -> Result<(), StoreError> {
        if leases.is_empty() {
            return Ok(());
        }
        short(leases.iter().map(|(key, _)| key))?;
        ask!(self, engine => engine.renew(leases).await)
    }

    /// The keys whose lease has ended. They stay until they are [forgotten](Self::forget) or renewed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn lapsed(&self) -> Result<Vec<String>, StoreError> {
        ask!(self, engine => engine.lapsed().await)
    }

    /// Drops the leases of these keys.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget(&self, keys: Vec<String>) -> Result<(), StoreError> {
        if keys.is_empty() {
            return Ok(());
        }
        ask!(self, engine => engine.forget(keys).await)
    }

    /// What is left of each lease; nothing of one that has ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn leases(&self) -> Result<Vec<(String, Duration)>, StoreError> {
        ask!(self, engine => engine.leases().await)
    }

    /// Notes who was seen. An older sighting does not replace a newer one; those older than a day are deleted.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn sight(&self, sightings: Vec<Sighting>) -> Result<(), StoreError> {
        if sightings.is_empty() {
            return Ok(());
        }
        ask!(self, engine => engine.sight(sightings).await)
    }

    /// Who was seen within so long, a day at most.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn sightings(&self, within: Duration) -> Result<Vec<Sighting>, StoreError> {
        ask!(self, engine => engine.sightings(within).await)
    }

    /// Copies the whole store into a new file, which SQLite can read and [`restore`](Self::restore) takes. Others go on
    /// meanwhile. The deadline does not count here.
    ///
    /// # Errors
    /// [`StoreError::Exists`] when a file of that name is there; and any other.
    pub async fn backup(&self, to: &Path) -> Result<(), StoreError> {
        ask!(self, engine => engine.backup(to).await)
    }

    /// As [`backup`](Self::backup), of a store that need not be open here: beside the process that has the file, or of
    /// a database that others use.
    ///
    /// # Errors
    /// As [`backup`](Self::backup).
    pub async fn copy(location: &Location, to: &Path) -> Result<(), StoreError> {
        match location {
            Location::Sqlite(path) => {
                let (path, to) = (path.clone(), to.to_owned());
                blocking(location, move || sqlite::copy(&path, &to)).await
            }
            Location::Postgres(database) => Box::pin(postgres::copy(database, to)).await,
        }
    }

    /// Fills the store at `location`, which must be empty, from a backup. Identity and entries are as they were; the
    /// revision is a million higher, so that nobody takes the restored past for what he knows already.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`]; [`StoreError::Damaged`] or [`StoreError::Newer`] when the backup is not usable; and
    /// any other.
    pub async fn restore(location: &Location, from: &Path) -> Result<(), StoreError> {
        let from = from.to_owned();
        let dump = blocking(location, move || sqlite::read_backup(&from)).await?.restored();
        match location {
            Location::Sqlite(path) => {
                let path = path.clone();
                blocking(location, move || sqlite::restore(&path, &dump)).await
            }
            Location::Postgres(database) => Box::pin(postgres::restore(database, &dump)).await,
        }
    }

    /// Finishes what was asked and closes it for all clones. An SQLite file is then one file again, and free for
    /// another process.
    pub async fn close(self) {
        ask!(self, engine => engine.close().await);
    }
}

fn short<'a>(mut keys: impl Iterator<Item = &'a String>) -> Result<(), StoreError> {
    match keys.find(|key| key.len() > KEY_BYTES) {
        Some(key) => Err(StoreError::LongKey { bytes: key.len() }),
        None => Ok(()),
    }
}

/// The watch shows the highest revision that anybody told it.
fn raise(revisions: &watch::Sender<u64>, revision: u64) {
    revisions.send_if_modified(|newest| {
        let is_news = revision > *newest;
        *newest = revision.max(*newest);
        is_news
    });
}

async fn blocking<T: Send + 'static>(
    location: &Location,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match Handle::current().spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(StoreError::Other {
            location: location.to_string(),
            source: error.to_string().into(),
        }),
    }
}
