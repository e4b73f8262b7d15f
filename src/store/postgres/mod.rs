//! A store in a database that many processes share.
//!
//! Nothing is locked outside a transaction: the row of the head decides which of two commits was first. Answers come
//! from the database alone, never from memory, so every replica may serve any request. What others commit is heard by
//! LISTEN/NOTIFY and asked for every second; without the former only the latter is left.

mod ask;
mod commit;
mod connect;
mod fault;
mod news;
mod schema;

use std::{path::Path, sync::Arc, time::Duration};

use deadpool_postgres::{Client, Object, Pool};
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    time::{self, Instant},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use self::{
    ask::{
        After, Ask, Everything, Failure, Forget, Head, Lapsed, Leases, Load, Renew, Sight,
        Sightings, millis,
    },
    commit::{Attempt, Outcome},
    connect::Way,
    fault::{fault, is_broken, is_collision, is_unknown_there, of_pool},
};
use crate::{
    runtime::Supervisor,
    store::{
        DAY, DEADLINE, News, Settings,
        dump::Dump,
        entry::{Sighting, Since, State, Write},
        error::{CommitError, StoreError},
        location::Database,
        raise, sqlite,
    },
};

/// How long a copy of everything may take.
const COPY_LIMIT: Duration = Duration::from_secs(120);
/// Before what collided is done again: random within this, so that two do not collide again.
const AGAIN_WITHIN: Duration = Duration::from_millis(20);
/// Between two tries to learn what became of a commit.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Postgres {
    location: String,
    id: Uuid,
    id_text: String,
    pool: Pool,
    kept: u64,
    /// Whether the database passes calls on.
    calls: bool,
    revisions: watch::Sender<u64>,
    /// Ends what is done in the background, at the latest when the store is dropped.
    closed: CancellationToken,
    _end: DropGuard,
}

impl Postgres {
    pub(super) async fn open(
        database: &Database,
        supervisor: &Supervisor,
        settings: &Settings,
    ) -> Result<Arc<Self>, StoreError> {
        let way = Way::new(database, supervisor.handle().clone())?;
        let pool = way.pool()?;
        let location = database.to_string();
        prepare(&pool, database, settings).await?;
        let (id_text, revision) = put(&pool, &location, &Head, DEADLINE).await?;
        let id = id_text.parse().map_err(|error: uuid::Error| StoreError::Damaged {
            location: location.clone(),
            reason: format!("its identity is none: {error}"),
        })?;
        let closed = CancellationToken::new();
        let store = Arc::new(Self {
            calls: calls(&pool, &location).await?,
            location,
            id,
            id_text,
            pool,
            kept: settings.kept_commits,
            revisions: watch::Sender::new(revision),
            closed: closed.clone(),
            _end: closed.clone().drop_guard(),
        });
        let heard = Arc::new(Notify::new());
        let asking = news::ask(Arc::downgrade(&store), Arc::clone(&heard), closed.clone());
        supervisor.spawn_until_end("store-ask", asking);
        if store.calls && settings.news == News::CalledAndAsked {
            let listening = news::listen(Arc::downgrade(&store), way, heard, closed);
            supervisor.spawn_until_end("store-listen", listening);
        }
        Ok(store)
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
        let state = self.put(&Load).await?;
        raise(&self.revisions, state.revision);
        Ok(state)
    }

    pub(super) async fn since(&self, revision: u64) -> Result<Since, StoreError> {
        self.put(&After(revision)).await
    }

    pub(super) async fn renew(&self, leases: Vec<(String, Duration)>) -> Result<(), StoreError> {
        self.put(&Renew::new(leases)).await
    }

    pub(super) async fn forget(&self, keys: Vec<String>) -> Result<(), StoreError> {
        self.put(&Forget(keys.into_iter().map(String::into_bytes).collect())).await
    }

    pub(super) async fn lapsed(&self) -> Result<Vec<String>, StoreError> {
        self.put(&Lapsed).await
    }

    pub(super) async fn leases(&self) -> Result<Vec<(String, Duration)>, StoreError> {
        self.put(&Leases).await
    }

    pub(super) async fn sight(&self, sightings: Vec<Sighting>) -> Result<(), StoreError> {
        self.put(&Sight::new(sightings, DAY)).await
    }

    pub(super) async fn sightings(&self, within: Duration) -> Result<Vec<Sighting>, StoreError> {
        self.put(&Sightings(millis(within.min(DAY)))).await
    }

    pub(super) async fn backup(&self, to: &Path) -> Result<(), StoreError> {
        copy_all(&self.pool, &self.location, to).await
    }

    pub(super) async fn close(&self) {
        self.closed.cancel();
        self.pool.close();
        std::future::ready(()).await;
    }

    pub(super) async fn commit(
        &self,
        expected: u64,
        writes: Vec<Write>,
        note: String,
    ) -> Result<u64, CommitError> {
        let token = Uuid::now_v7().to_string();
        let revision = expected.saturating_add(1);
        let attempt = Attempt {
            token: &token,
            expected,
            writes: &writes,
            note: &note,
            kept: self.kept,
            call: self.calls.then(|| format!("{} {revision}", self.id_text)),
            sent: false.into(),
        };
        let outcome = match self.make(&attempt).await {
            Ok(outcome) => outcome,
            // The last word was not sent, so it is not there, and will not be.
            Err(error) if !attempt.was_sent() => return Err(error.into()),
            Err(error) => self.learn(&attempt, error).await?,
        };
        match outcome {
            Outcome::Made(revision) => {
                raise(&self.revisions, revision);
                Ok(revision)
            }
            Outcome::Conflict(revision) => {
                raise(&self.revisions, revision);
                Err(CommitError::Conflict { revision })
            }
        }
    }

    /// Tries until it is done, refused, or its time is over; anew only what certainly came to nothing.
    async fn make(&self, attempt: &Attempt<'_>) -> Result<Outcome, StoreError> {
        let until = Instant::now() + DEADLINE;
        loop {
            let mut client = client(&self.pool, &self.location).await?;
            let making = time::timeout_at(until, attempt.make(&mut client)).await;
            match settle(client, making, &self.location) {
                Settled::Answer(outcome) => return Ok(outcome),
                // The database itself said that it rolled back.
                Settled::Collision(_) if Instant::now() < until => pause(AGAIN_WITHIN).await,
                Settled::Broken(_) if !attempt.was_sent() && Instant::now() < until => {}
                Settled::Collision(error) | Settled::Broken(error) | Settled::Failed(error) => {
                    return Err(error);
                }
            }
        }
    }

    /// What became of a commit whose answer was lost because of `lost`.
    async fn learn(&self, attempt: &Attempt<'_>, lost: StoreError) -> Result<Outcome, CommitError> {
        let until = Instant::now() + DEADLINE;
        while Instant::now() < until {
            if let Ok(mut client) = client(&self.pool, &self.location).await {
                let looking = time::timeout_at(until, attempt.look(&mut client)).await;
                match settle(client, looking, &self.location) {
                    Settled::Answer(Outcome::Conflict(stands)) if stands == attempt.expected => {
                        return Err(lost.into());
                    }
                    Settled::Answer(outcome) => return Ok(outcome),
                    Settled::Collision(_) | Settled::Broken(_) | Settled::Failed(_) => {}
                }
            }
            pause(LOOK_AGAIN).await;
        }
        let location = self.location.clone();
        Err(StoreError::Unknown { location, revision: attempt.revision() }.into())
    }

    async fn put<A: Ask>(&self, question: &A) -> Result<A::Answer, StoreError> {
        put(&self.pool, &self.location, question, DEADLINE).await
    }
}

/// Copies what is in the database into a new file, and changes nothing in it.
pub(super) async fn copy(database: &Database, to: &Path) -> Result<(), StoreError> {
    let pool = Way::new(database, Handle::current())?.pool()?;
    copy_all(&pool, &database.to_string(), to).await
}

async fn copy_all(pool: &Pool, location: &str, to: &Path) -> Result<(), StoreError> {
    let dump = put(pool, location, &Everything, COPY_LIMIT).await?;
    let to = to.to_owned();
    let writing = Handle::current().spawn_blocking(move || sqlite::write_backup(&dump, &to));
    writing.await.unwrap_or_else(|error| {
        let location = location.to_owned();
        Err(StoreError::Other { location, source: error.to_string().into() })
    })
}

/// Fills the database, which must hold nothing yet.
pub(super) async fn restore(database: &Database, dump: &Dump) -> Result<(), StoreError> {
    let location = database.to_string();
    let pool = Way::new(database, Handle::current())?.pool()?;
    prepare(&pool, database, &Settings::default()).await?;
    let mut client = client(&pool, &location).await?;
    let filling = time::timeout(COPY_LIMIT, commit::fill(&mut client, dump)).await;
    match settle(client, filling, &location) {
        Settled::Answer(true) => Ok(()),
        Settled::Answer(false) => Err(StoreError::NotEmpty { location }),
        Settled::Collision(error) | Settled::Broken(error) | Settled::Failed(error) => Err(error),
    }
}

/// Brings the database to our schema, on a connection that is not used again.
async fn prepare(pool: &Pool, database: &Database, settings: &Settings) -> Result<(), StoreError> {
    let location = database.to_string();
    let mut client = Object::take(client(pool, &location).await?);
    schema::migrate(&mut client, &location, database.own_schema, settings.migration_lock).await
}

/// Whether the database passes calls on; CockroachDB does not.
async fn calls(pool: &Pool, location: &str) -> Result<bool, StoreError> {
    let client = client(pool, location).await?;
    let asked = time::timeout(DEADLINE, client.batch_execute("SELECT pg_notify('infrar', '')"));
    match asked.await {
        Ok(Ok(())) => Ok(true),
        Ok(Err(error)) if is_unknown_there(&error) => Ok(false),
        Ok(Err(error)) => Err(fault(location, &error)),
        Err(_) => Err(StoreError::Slow { location: location.to_owned(), limit: DEADLINE }),
    }
}

/// Puts a question until it is answered or its time is over.
async fn put<A: Ask>(
    pool: &Pool,
    location: &str,
    question: &A,
    limit: Duration,
) -> Result<A::Answer, StoreError> {
    let until = Instant::now() + limit;
    loop {
        let mut client = client(pool, location).await?;
        let asking = time::timeout_at(until, question.ask(&mut client)).await;
        match settle(client, asking, location) {
            Settled::Answer(answer) => return Ok(answer),
            Settled::Collision(_) if Instant::now() < until => pause(AGAIN_WITHIN).await,
            // A kept connection that had died meanwhile; a new one says whether the database is there.
            Settled::Broken(_) if Instant::now() < until => {}
            Settled::Collision(error) | Settled::Broken(error) | Settled::Failed(error) => {
                return Err(error);
            }
        }
    }
}

async fn client(pool: &Pool, location: &str) -> Result<Client, StoreError> {
    pool.get().await.map_err(|error| of_pool(location, &error))
}

/// How a try ended.
enum Settled<T> {
    Answer(T),
    Collision(StoreError),
    Broken(StoreError),
    Failed(StoreError),
}

/// Gives the connection back, unless it is broken or still busy with what nobody waits for.
fn settle<T>(
    client: Client,
    outcome: Result<Result<T, Failure>, time::error::Elapsed>,
    location: &str,
) -> Settled<T> {
    match outcome {
        Ok(Ok(answer)) => Settled::Answer(answer),
        Ok(Err(Failure::Damaged(reason))) => Settled::Failed(StoreError::Damaged {
            location: location.to_owned(),
            reason: reason.to_owned(),
        }),
        Ok(Err(Failure::Database(error))) if is_collision(&error) => {
            Settled::Collision(fault(location, &error))
        }
        Ok(Err(Failure::Database(error))) if is_broken(&error) => {
            drop(Object::take(client));
            Settled::Broken(fault(location, &error))
        }
        Ok(Err(Failure::Database(error))) => Settled::Failed(fault(location, &error)),
        Err(_) => {
            drop(Object::take(client));
            let location = location.to_owned();
            Settled::Failed(StoreError::Slow { location, limit: DEADLINE })
        }
    }
}

async fn pause(within: Duration) {
    time::sleep(within.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
}
