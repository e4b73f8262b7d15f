//! A store in one file, for one process.
//!
//! One task owns the connection that writes and takes its work from a bounded channel; each piece of it runs on a
//! thread for blocking calls, so that no runtime waits for a disk. Readers have connections of their own and see the
//! last commit (WAL). A lock on the file beside it keeps a second process out for as long as the writer lives.

mod backup;
mod fault;
mod files;
mod schema;
mod tables;
mod writer;

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rusqlite::{Connection, OpenFlags};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc, oneshot, watch},
    time,
};
use uuid::Uuid;

pub(super) use self::backup::{copy, read_backup, restore, write_backup};
use self::{
    fault::fault,
    tables::Touch,
    writer::{Claim, Job, Writer},
};
use crate::{
    runtime::{Clock, Supervisor},
    store::{
        DAY, DEADLINE, Settings,
        entry::{Sighting, Since, State, Write},
        error::{CommitError, StoreError},
    },
};

/// Work that may wait for the writer; then whoever brings more waits, within his deadline.
const QUEUE: usize = 1024;
/// Reads at once, and connections kept open for them.
const READERS: u32 = 4;
/// What the file of past changes is cut back to when it has been written into the store.
const JOURNAL_BYTES: u32 = 16 * 1024 * 1024;

#[derive(Debug)]
pub(super) struct Sqlite {
    path: PathBuf,
    location: String,
    id: Uuid,
    clock: Clock,
    side: Handle,
    jobs: mpsc::Sender<Job>,
    readers: Readers,
    revisions: watch::Sender<u64>,
}

#[derive(Debug)]
struct Readers {
    turns: Semaphore,
    idle: Mutex<Vec<Connection>>,
}

impl Sqlite {
    pub(super) async fn open(
        path: &Path,
        supervisor: &Supervisor,
        settings: &Settings,
    ) -> Result<Self, StoreError> {
        let location = format!("sqlite:{}", path.display());
        let (at, size_limit) = (path.to_owned(), settings.size_limit);
        let opening = supervisor.handle().spawn_blocking(move || open_file(&at, size_limit));
        let (connection, lock, id, revision) = joined(&location, opening.await)??;
        let (jobs, queue) = mpsc::channel(QUEUE);
        let revisions = watch::Sender::new(revision);
        let writer = Writer {
            location: location.clone(),
            connection,
            lock,
            queue,
            kept: settings.kept_commits,
            revisions: revisions.clone(),
            side: supervisor.handle().clone(),
        };
        supervisor.spawn("store-writer", writer.work(supervisor.ending()));
        Ok(Self {
            path: path.to_owned(),
            location,
            id,
            clock: settings.clock,
            side: supervisor.handle().clone(),
            jobs,
            readers: Readers {
                turns: Semaphore::new(READERS as usize),
                idle: Mutex::new(Vec::new()),
            },
            revisions,
        })
    }

    pub(super) const fn id(&self) -> Uuid {
        self.id
    }

    pub(super) fn location(&self) -> &str {
        &self.location
    }

    pub(super) fn revisions(&self) -> watch::Receiver<u64> {
        self.revisions.subscribe()
    }

    pub(super) async fn load(&self) -> Result<State, StoreError> {
        self.read(tables::load).await
    }

    pub(super) async fn since(&self, revision: u64) -> Result<Since, StoreError> {
        self.read(move |connection| tables::since(connection, revision)).await
    }

    pub(super) async fn commit(
        &self,
        expected: u64,
        writes: Vec<Write>,
        note: String,
    ) -> Result<u64, CommitError> {
        let (answer, outcome) = oneshot::channel();
        let claim = Claim::default();
        let job = Job::Commit { expected, writes, note, claim: claim.clone(), answer };
        let waited = time::timeout(DEADLINE, async {
            self.jobs.send(job).await.ok()?;
            outcome.await.ok()
        });
        match waited.await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(self.closed().into()),
            // Whoever claims it first decides: the writer that begins, or we who give up.
            Err(_) if claim.take() => Err(self.slow().into()),
            Err(_) => Err(StoreError::Unknown {
                location: self.location.clone(),
                revision: expected.saturating_add(1),
            }
            .into()),
        }
    }

    pub(super) async fn renew(&self, leases: Vec<(String, Duration)>) -> Result<(), StoreError> {
        let now = self.now();
        let ends = |lasts: Duration| now.saturating_add(millis(lasts));
        self.touch(Touch::Renew(
            leases.into_iter().map(|(key, lasts)| (key, ends(lasts))).collect(),
        ))
        .await
    }

    pub(super) async fn forget(&self, keys: Vec<String>) -> Result<(), StoreError> {
        self.touch(Touch::Forget(keys)).await
    }

    pub(super) async fn lapsed(&self) -> Result<Vec<String>, StoreError> {
        let now = self.now();
        self.read(move |connection| tables::lapsed(connection, now)).await
    }

    pub(super) async fn leases(&self) -> Result<Vec<(String, Duration)>, StoreError> {
        let now = self.now();
        let leases = self.read(|connection| tables::leases(connection)).await?;
        let left =
            |ends: i64| Duration::from_millis(ends.saturating_sub(now).max(0).unsigned_abs());
        Ok(leases.into_iter().map(|(key, ends)| (key, left(ends))).collect())
    }

    pub(super) async fn sight(&self, sightings: Vec<Sighting>) -> Result<(), StoreError> {
        let now = self.now();
        let at = |age: Duration| now.saturating_sub(millis(age));
        let seen = sightings.into_iter().map(|seen| (seen.id, seen.text, at(seen.age))).collect();
        self.touch(Touch::Sight { seen, oldest: at(DAY) }).await
    }

    pub(super) async fn sightings(&self, within: Duration) -> Result<Vec<Sighting>, StoreError> {
        let now = self.now();
        let since = now.saturating_sub(millis(within.min(DAY)));
        self.read(move |connection| tables::sightings(connection, since, now)).await
    }

    /// Without a deadline: it takes as long as the disk needs, and holds nobody up.
    pub(super) async fn backup(&self, to: &Path) -> Result<(), StoreError> {
        let (from, to) = (self.path.clone(), to.to_owned());
        let copying = self.side.spawn_blocking(move || copy(&from, &to));
        joined(&self.location, copying.await)?
    }

    /// What was asked before is done first; then the file is closed, and its lock given back.
    pub(super) async fn close(&self) {
        // Readers first: only the last connection to a file tidies up behind itself, and they may not write.
        drop(time::timeout(DEADLINE, self.readers.turns.acquire_many(READERS)).await);
        self.readers.turns.close();
        lock(&self.readers.idle).clear();
        let (answer, closed) = oneshot::channel();
        if self.jobs.send(Job::Close(answer)).await.is_ok() {
            // No answer means that the writer has gone already, which is what was asked for.
            drop(closed.await);
        }
    }

    async fn touch(&self, touch: Touch) -> Result<(), StoreError> {
        let (answer, outcome) = oneshot::channel();
        let waited = time::timeout(DEADLINE, async {
            self.jobs.send(Job::Touch { touch, answer }).await.ok()?;
            outcome.await.ok()
        });
        match waited.await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(self.closed()),
            Err(_) => Err(self.slow()),
        }
    }

    async fn read<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let reading = async {
            let turn = self.readers.turns.acquire().await;
            let Ok(_turn) = turn else { return Err(self.closed()) };
            let idle = lock(&self.readers.idle).pop();
            let (path, location) = (self.path.clone(), self.location.clone());
            let reading = self.side.spawn_blocking(move || {
                let mut connection = match idle {
                    Some(connection) => connection,
                    None => open_reader(&path).map_err(|error| fault(&location, &error))?,
                };
                let answer = ask(&mut connection).map_err(|error| fault(&location, &error))?;
                Ok((answer, connection))
            });
            let (answer, connection) = joined(&self.location, reading.await)??;
            // A connection that failed is not used again.
            if !self.readers.turns.is_closed() {
                lock(&self.readers.idle).push(connection);
            }
            Ok(answer)
        };
        time::timeout(DEADLINE, reading).await.unwrap_or_else(|_| Err(self.slow()))
    }

    fn now(&self) -> i64 {
        self.clock.now().as_millisecond()
    }

    fn slow(&self) -> StoreError {
        StoreError::Slow { location: self.location.clone(), limit: DEADLINE }
    }

    fn closed(&self) -> StoreError {
        StoreError::Closed { location: self.location.clone() }
    }
}

/// The file for writing, whole and of our schema; the lock that keeps others out; whose it is and where it stands.
fn open_file(
    path: &Path,
    size_limit: Option<u64>,
) -> Result<(Connection, File, Uuid, u64), StoreError> {
    let location = format!("sqlite:{}", path.display());
    let lock = files::claim(path)?;
    files::make(path)?;
    let opened = |error: &rusqlite::Error| fault(&location, error);
    let mut connection =
        Connection::open_with_flags(path, writing()).map_err(|error| opened(&error))?;
    schema::check(&connection, &location)?;
    prepare(&connection, size_limit).map_err(|error| opened(&error))?;
    schema::migrate(&mut connection).map_err(|error| opened(&error))?;
    let (id, revision) = tables::identity(&connection).map_err(|error| opened(&error))?;
    let id = id.parse().map_err(|error: uuid::Error| StoreError::Damaged {
        location: location.clone(),
        reason: format!("its identity is none: {error}"),
    })?;
    Ok((connection, lock, id, revision))
}

fn writing() -> OpenFlags {
    OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX
}

/// `FULL`, so that what was acknowledged outlives a power cut.
fn prepare(connection: &Connection, size_limit: Option<u64>) -> rusqlite::Result<()> {
    connection.busy_timeout(DEADLINE)?;
    connection.query_row("PRAGMA journal_mode = WAL", (), |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.query_row(
        &format!("PRAGMA journal_size_limit = {JOURNAL_BYTES}"),
        (),
        |_| Ok(()),
    )?;
    if let Some(bytes) = size_limit {
        let page: i64 = connection.query_row("PRAGMA page_size", (), |row| row.get(0))?;
        let pages = bytes / page.max(1).unsigned_abs();
        connection.query_row(&format!("PRAGMA max_page_count = {pages}"), (), |_| Ok(()))?;
    }
    Ok(())
}

fn open_reader(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(DEADLINE)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    Ok(connection)
}

/// What a thread for blocking calls brought back; nothing comes when it panicked or the runtime has ended.
fn joined<T>(location: &str, outcome: Result<T, tokio::task::JoinError>) -> Result<T, StoreError> {
    outcome.map_err(|error| StoreError::Other {
        location: location.to_owned(),
        source: error.to_string().into(),
    })
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
