//! The tables of a store file, how old ones become new ones, and whether a file is one at all.

use rusqlite::{Connection, TransactionBehavior};
use uuid::Uuid;

use crate::store::{error::StoreError, sqlite::fault::fault};

/// What brings a file from schema N to N + 1. Once released, one of these never changes.
const MIGRATIONS: &[&str] = &["
CREATE TABLE head (
    one      INTEGER PRIMARY KEY CHECK (one = 1),
    id       TEXT    NOT NULL,
    revision INTEGER NOT NULL
) STRICT;
CREATE TABLE entries (
    key      TEXT    NOT NULL PRIMARY KEY,
    value    TEXT    NOT NULL,
    revision INTEGER NOT NULL
) STRICT;
CREATE TABLE commits (
    revision INTEGER PRIMARY KEY,
    writes   TEXT    NOT NULL,
    note     TEXT    NOT NULL
) STRICT;
CREATE TABLE leases (
    key      TEXT    NOT NULL PRIMARY KEY,
    ends     INTEGER NOT NULL
) STRICT;
CREATE TABLE sightings (
    id       TEXT    NOT NULL PRIMARY KEY,
    text     TEXT    NOT NULL,
    seen     INTEGER NOT NULL
) STRICT;
CREATE INDEX leases_ends ON leases (ends);
CREATE INDEX sightings_seen ON sightings (seen);
"];

/// Stands in the header of every store file: `infr`.
const APPLICATION: i64 = 0x696e_6672;

/// The schema this version writes.
pub(super) fn known() -> u64 {
    MIGRATIONS.len() as u64
}

/// Whether this is a store, whole, and not of a later version. A file without any table is one to be.
pub(super) fn check(connection: &Connection, location: &str) -> Result<(), StoreError> {
    let damaged = |reason: String| StoreError::Damaged { location: location.to_owned(), reason };
    let number = |sql: &str| -> Result<i64, StoreError> {
        connection.query_row(sql, (), |row| row.get(0)).map_err(|error| fault(location, &error))
    };
    let tables = number("SELECT count(*) FROM sqlite_schema")?;
    let version = number("PRAGMA user_version")?;
    if tables == 0 && version == 0 {
        return Ok(());
    }
    if number("PRAGMA application_id")? != APPLICATION {
        return Err(damaged("it is a database of something else".to_owned()));
    }
    let found = u64::try_from(version).unwrap_or(0);
    if found > known() {
        return Err(StoreError::Newer { location: location.to_owned(), found, known: known() });
    }
    verdict(connection, location, "PRAGMA quick_check(1)")
}

/// The longer look at a backup: indexes too.
pub(super) fn check_whole(connection: &Connection, location: &str) -> Result<(), StoreError> {
    verdict(connection, location, "PRAGMA integrity_check(1)")
}

fn verdict(connection: &Connection, location: &str, check: &str) -> Result<(), StoreError> {
    let verdict: String = connection
        .query_row(check, (), |row| row.get(0))
        .map_err(|error| fault(location, &error))?;
    if verdict == "ok" {
        return Ok(());
    }
    Err(StoreError::Damaged { location: location.to_owned(), reason: verdict })
}

/// Brings the file to our schema, each step whole or not at all.
pub(super) fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = transaction.query_row("PRAGMA user_version", (), |row| row.get(0))?;
    let done = usize::try_from(version).unwrap_or(0);
    for step in MIGRATIONS.iter().skip(done) {
        transaction.execute_batch(step)?;
    }
    if done < MIGRATIONS.len() {
        transaction.pragma_update(None, "application_id", APPLICATION)?;
        transaction.pragma_update(None, "user_version", i64::try_from(known()).unwrap_or(0))?;
    }
    transaction.execute(
        "INSERT INTO head (one, id, revision) VALUES (1, ?1, 0) ON CONFLICT DO NOTHING",
        [Uuid::now_v7().to_string()],
    )?;
    transaction.commit()
}
