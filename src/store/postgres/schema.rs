//! The tables of a database, and how one process at a time makes or changes them.
//!
//! Text lies in them as bytes: no encoding of a database can refuse it, no collation can change its order, and
//! `SET bytea_output = 'escape'` shows it to people. Plain SQL, so that CockroachDB and YugabyteDB understand it.

use std::time::Duration;

use tokio::time::{self, Instant};
use tokio_postgres::{Client, Error, error::SqlState, types::Type};
use uuid::Uuid;

use super::fault::{fault, is_collision, is_unknown_there};
use crate::store::{MigrationLock, error::StoreError};

/// What brings a database from schema N to N + 1. Once released, one of these never changes.
const MIGRATIONS: &[&str] = &["
CREATE TABLE infrar_head (
    one      BIGINT PRIMARY KEY CHECK (one = 1),
    id       TEXT   NOT NULL,
    revision BIGINT NOT NULL
);
CREATE TABLE infrar_entries (
    key      BYTEA  PRIMARY KEY,
    value    BYTEA  NOT NULL,
    revision BIGINT NOT NULL
);
CREATE TABLE infrar_commits (
    revision BIGINT PRIMARY KEY,
    token    TEXT   NOT NULL,
    writes   BYTEA  NOT NULL,
    note     BYTEA  NOT NULL
);
CREATE TABLE infrar_leases (
    key      BYTEA  PRIMARY KEY,
    ends     BIGINT NOT NULL
);
CREATE TABLE infrar_sightings (
    id       TEXT   PRIMARY KEY,
    text     BYTEA  NOT NULL,
    seen     BIGINT NOT NULL
);
CREATE INDEX infrar_sightings_seen ON infrar_sightings (seen);
"];

/// Any number that nobody else is likely to lock: `infrar` in ASCII.
const LOCK: i64 = 0x0069_6e66_7261_7200;
/// How long to wait for another process to finish.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a lock that another process holds.
const PAUSE: Duration = Duration::from_millis(100);

fn known() -> u64 {
    MIGRATIONS.len() as u64
}

/// Brings the database to our schema. One that is there already is only looked at, which needs no right to change
/// tables. The connection is of no use afterwards: its limits are off.
pub(super) async fn migrate(
    client: &mut Client,
    location: &str,
    own_schema: Option<&str>,
    lock: MigrationLock,
) -> Result<(), StoreError> {
    let failed = |error: &Error| fault(location, error);
    let version = version(client).await.map_err(|error| failed(&error))?;
    if is_current(version, location)? {
        return Ok(());
    }
    client.batch_execute("SET statement_timeout = 0").await.map_err(|error| failed(&error))?;
    make_schema(client, own_schema).await.map_err(|error| failed(&error))?;
    let held = Held::take(client, location, lock).await?;
    let migrated = steps(client, location).await;
    // Also given back with the connection, or by its end.
    held.give_back(client).await;
    migrated
}

async fn steps(client: &mut Client, location: &str) -> Result<(), StoreError> {
    let failed = |error: &Error| fault(location, error);
    let made = "CREATE TABLE IF NOT EXISTS infrar_schema (version BIGINT PRIMARY KEY)";
    match client.batch_execute(made).await {
        Err(error) if is_taken(&error) => {}
        outcome => outcome.map_err(|error| failed(&error))?,
    }
    loop {
        // Somebody else may have been here while we waited for the lock.
        let done = version(client).await.map_err(|error| failed(&error))?;
        if is_current(done, location)? {
            return Ok(());
        }
        let next = done + 1;
        match step(client, next).await {
            Ok(()) => {
                tracing::info!(store = location, schema = next, "the database has a new schema")
            }
            // Locks mean nothing here, and somebody else was first.
            Err(error) if is_collision(&error) || is_taken(&error) => time::sleep(PAUSE).await,
            Err(error) => return Err(failed(&error)),
        }
    }
}

/// Whether somebody else made the same at the same moment: `IF NOT EXISTS` does not see what is not committed yet.
fn is_taken(error: &Error) -> bool {
    error.code().is_some_and(|code| {
        *code == SqlState::UNIQUE_VIOLATION
            || *code == SqlState::DUPLICATE_OBJECT
            || *code == SqlState::DUPLICATE_TABLE
    })
}

async fn step(client: &mut Client, next: u64) -> Result<(), Error> {
    let sql = usize::try_from(next - 1).ok().and_then(|at| MIGRATIONS.get(at)).copied();
    let transaction = client.transaction().await?;
    // First the number: where locks mean nothing, it lets one through.
    let number = next.to_string();
    transaction
        .batch_execute(&format!("INSERT INTO infrar_schema (version) VALUES ({number})"))
        .await?;
    transaction.batch_execute(sql.unwrap_or_default()).await?;
    if next == 1 {
        transaction
            .execute_typed(
                "INSERT INTO infrar_head (one, id, revision) VALUES (1, $1, 0)",
                &[(&Uuid::now_v7().to_string(), Type::TEXT)],
            )
            .await?;
    }
    transaction.commit().await
}

/// 0 when nothing of ours is there.
async fn version(client: &Client) -> Result<u64, Error> {
    let asked = client.query_typed("SELECT max(version) FROM infrar_schema", &[]).await;
    match asked {
        Ok(rows) => {
            let newest = rows.first().map(|row| row.try_get::<_, Option<i64>>(0)).transpose()?;
            Ok(newest.flatten().and_then(|version| u64::try_from(version).ok()).unwrap_or(0))
        }
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(0),
        Err(error) => Err(error),
    }
}

fn is_current(found: u64, location: &str) -> Result<bool, StoreError> {
    if found > known() {
        let location = location.to_owned();
        return Err(StoreError::Newer { location, found, known: known() });
    }
    Ok(found == known())
}

/// Looks first: making needs a right even where there is nothing to make. Two who make it at once may both fail but
/// for one, so it is looked at again.
async fn make_schema(client: &Client, own_schema: Option<&str>) -> Result<(), Error> {
    let Some(schema) = own_schema else { return Ok(()) };
    let look = "SELECT 1 FROM information_schema.schemata WHERE schema_name = $1";
    if !client.query_typed(look, &[(&schema, Type::TEXT)]).await?.is_empty() {
        return Ok(());
    }
    let Err(error) = client.batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS {schema}")).await
    else {
        return Ok(());
    };
    if client.query_typed(look, &[(&schema, Type::TEXT)]).await?.is_empty() {
        return Err(error);
    }
    Ok(())
}

/// Whose turn it is to migrate.
enum Held {
    Advisory,
    Row { holder: String },
}

impl Held {
    async fn take(
        client: &Client,
        location: &str,
        lock: MigrationLock,
    ) -> Result<Self, StoreError> {
        let until = Instant::now() + PATIENCE;
        let holder = Uuid::now_v7().to_string();
        let mut lock = lock;
        loop {
            let taken = match lock {
                MigrationLock::Advisory => advisory(client).await,
                MigrationLock::Row => row(client, &holder).await,
            };
            match taken {
                Ok(true) if lock == MigrationLock::Advisory => return Ok(Self::Advisory),
                Ok(true) => return Ok(Self::Row { holder }),
                Ok(false) if Instant::now() >= until => {
                    let location = location.to_owned();
                    return Err(StoreError::Slow { location, limit: PATIENCE });
                }
                Ok(false) => time::sleep(PAUSE).await,
                Err(error) if lock == MigrationLock::Advisory && is_unknown_there(&error) => {
                    lock = MigrationLock::Row;
                }
                Err(error) => return Err(fault(location, &error)),
            }
        }
    }

    async fn give_back(self, client: &Client) {
        let given = match self {
            Self::Advisory => {
                let sql = "SELECT pg_advisory_unlock($1)";
                client.query_typed(sql, &[(&LOCK, Type::INT8)]).await.map(drop)
            }
            Self::Row { holder } => {
                let sql = "DELETE FROM infrar_lock WHERE holder = $1";
                client.execute_typed(sql, &[(&holder, Type::TEXT)]).await.map(drop)
            }
        };
        if let Err(error) = given {
            tracing::debug!(%error, "the lock of the migration ends by itself");
        }
    }
}

async fn advisory(client: &Client) -> Result<bool, Error> {
    let sql = "SELECT pg_try_advisory_lock($1)";
    let rows = client.query_typed(sql, &[(&LOCK, Type::INT8)]).await?;
    rows.first().map_or(Ok(false), |row| row.try_get(0))
}

/// A row that its holder may have for a minute; one that died is followed then.
async fn row(client: &Client, holder: &String) -> Result<bool, Error> {
    let table = "CREATE TABLE IF NOT EXISTS infrar_lock \
                 (one BIGINT PRIMARY KEY, holder TEXT NOT NULL, ends TIMESTAMPTZ NOT NULL)";
    match client.batch_execute(table).await {
        // Two made it at once, and this one was second.
        Err(error) if is_taken(&error) => return Ok(false),
        outcome => outcome?,
    }
    let sql = "INSERT INTO infrar_lock (one, holder, ends) \
               VALUES (1, $1, now() + INTERVAL '60 seconds') \
               ON CONFLICT (one) DO UPDATE SET holder = excluded.holder, ends = excluded.ends \
               WHERE infrar_lock.ends < now()";
    Ok(client.execute_typed(sql, &[(holder, Type::TEXT)]).await? == 1)
}
