//! What is asked of the tables: each function is one statement or one transaction, and knows no other thread.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use uuid::Uuid;

use crate::store::{
    PAGE,
    dump::Dump,
    entry::{Commit, Entry, Sighting, Since, State, Write, writes_from_text, writes_to_text},
};

/// What came of a commit.
pub(super) enum Outcome {
    Made(u64),
    Conflict(u64),
}

/// A change that makes no revision. Moments are milliseconds since 1970.
pub(super) enum Touch {
    Renew(Vec<(String, i64)>),
    Forget(Vec<String>),
    Sight { seen: Vec<(Uuid, String, i64)>, oldest: i64 },
}

pub(super) fn identity(connection: &Connection) -> rusqlite::Result<(String, u64)> {
    connection.query_row("SELECT id, revision FROM head WHERE one = 1", (), |row| {
        Ok((row.get(0)?, unsigned(row.get(1)?)))
    })
}

pub(super) fn load(connection: &mut Connection) -> rusqlite::Result<State> {
    let transaction = connection.transaction()?;
    let (_, revision) = identity(&transaction)?;
    Ok(State { revision, entries: entries(&transaction)? })
}

fn entries(transaction: &Transaction<'_>) -> rusqlite::Result<Vec<Entry>> {
    transaction
        .prepare("SELECT key, value, revision FROM entries ORDER BY key")?
        .query_map((), |row| {
            Ok(Entry { key: row.get(0)?, value: row.get(1)?, revision: unsigned(row.get(2)?) })
        })?
        .collect()
}

/// Makes revision `expected + 1` if the store stands at `expected`, and drops what is older than `kept` commits.
pub(super) fn commit(
    connection: &mut Connection,
    expected: u64,
    writes: &[Write],
    note: &str,
    kept: u64,
) -> rusqlite::Result<Outcome> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let raised = transaction.execute(
        "UPDATE head SET revision = revision + 1 WHERE one = 1 AND revision = ?1",
        [signed(expected)],
    )?;
    if raised == 0 {
        return identity(&transaction).map(|(_, revision)| Outcome::Conflict(revision));
    }
    let revision = expected.saturating_add(1);
    // First what goes: in a full store its room is what the rest needs.
    transaction.execute(
        "DELETE FROM commits WHERE revision <= ?1",
        [signed(revision.saturating_sub(kept))],
    )?;
    apply(&transaction, writes, revision)?;
    transaction.execute(
        "INSERT INTO commits (revision, writes, note) VALUES (?1, ?2, ?3)",
        params![signed(revision), writes_to_text(writes), note],
    )?;
    transaction.commit()?;
    Ok(Outcome::Made(revision))
}

fn apply(transaction: &Transaction<'_>, writes: &[Write], revision: u64) -> rusqlite::Result<()> {
    let mut remove = transaction.prepare("DELETE FROM entries WHERE key = ?1")?;
    for write in writes.iter().filter(|write| write.value.is_none()) {
        remove.execute([&write.key])?;
    }
    let mut put = transaction.prepare(
        "INSERT INTO entries (key, value, revision) VALUES (?1, ?2, ?3) \
         ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision",
    )?;
    for write in writes {
        if let Some(value) = &write.value {
            put.execute(params![write.key, value, signed(revision)])?;
        }
    }
    Ok(())
}

pub(super) fn since(connection: &mut Connection, revision: u64) -> rusqlite::Result<Since> {
    let transaction = connection.transaction()?;
    let (_, newest) = identity(&transaction)?;
    let first: Option<i64> =
        transaction.query_row("SELECT min(revision) FROM commits", (), |row| row.get(0))?;
    let oldest = first.map_or(newest, |first| unsigned(first).saturating_sub(1));
    if revision < oldest || revision > newest {
        return Ok(Since::Forgotten { oldest });
    }
    let commits = commits(&transaction, revision, PAGE)?;
    let more = commits.last().is_some_and(|last| last.revision < newest);
    Ok(Since::Commits { commits, more })
}

fn commits(
    transaction: &Transaction<'_>,
    after: u64,
    at_most: u64,
) -> rusqlite::Result<Vec<Commit>> {
    transaction
        .prepare(
            "SELECT revision, writes, note FROM commits WHERE revision > ?1 ORDER BY revision LIMIT ?2",
        )?
        .query_map([signed(after), signed(at_most)], |row| {
            let text: String = row.get(1)?;
            let writes = writes_from_text(&text)
                .ok_or_else(|| corrupt("the changes of a commit are not what was written"))?;
            Ok(Commit { revision: unsigned(row.get(0)?), writes, note: row.get(2)? })
        })?
        .collect()
}

/// All of them, or none.
pub(super) fn touch<'a>(
    connection: &mut Connection,
    touches: impl Iterator<Item = &'a Touch>,
) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for touch in touches {
        match touch {
            Touch::Renew(leases) => put_leases(&transaction, leases)?,
            Touch::Forget(keys) => {
                let mut forget = transaction.prepare("DELETE FROM leases WHERE key = ?1")?;
                for key in keys {
                    forget.execute([key])?;
                }
            }
            Touch::Sight { seen, oldest } => {
                let seen = seen.iter().map(|(id, text, at)| (id.to_string(), text.as_str(), *at));
                put_sightings(&transaction, seen)?;
                transaction.execute("DELETE FROM sightings WHERE seen < ?1", [oldest])?;
            }
        }
    }
    transaction.commit()
}

fn put_leases(transaction: &Transaction<'_>, leases: &[(String, i64)]) -> rusqlite::Result<()> {
    let mut renew = transaction.prepare(
        "INSERT INTO leases (key, ends) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET ends = excluded.ends",
    )?;
    for (key, ends) in leases {
        renew.execute(params![key, ends])?;
    }
    Ok(())
}

fn put_sightings<'a>(
    transaction: &Transaction<'_>,
    seen: impl Iterator<Item = (String, &'a str, i64)>,
) -> rusqlite::Result<()> {
    let mut sight = transaction.prepare(
        "INSERT INTO sightings (id, text, seen) VALUES (?1, ?2, ?3) \
         ON CONFLICT (id) DO UPDATE SET text = excluded.text, seen = excluded.seen \
         WHERE excluded.seen >= sightings.seen",
    )?;
    for (id, text, at) in seen {
        sight.execute(params![id, text, at])?;
    }
    Ok(())
}

pub(super) fn lapsed(connection: &Connection, now: i64) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare("SELECT key FROM leases WHERE ends <= ?1 ORDER BY key")?
        .query_map([now], |row| row.get(0))?
        .collect()
}

pub(super) fn leases(connection: &Connection) -> rusqlite::Result<Vec<(String, i64)>> {
    connection
        .prepare("SELECT key, ends FROM leases ORDER BY key")?
        .query_map((), |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

pub(super) fn sightings(
    connection: &Connection,
    since: i64,
    now: i64,
) -> rusqlite::Result<Vec<Sighting>> {
    connection
        .prepare("SELECT id, text, seen FROM sightings WHERE seen >= ?1 ORDER BY id")?
        .query_map([since], |row| {
            let id: String = row.get(0)?;
            let id = id.parse().ok().ok_or_else(|| corrupt("who was seen has no identity"))?;
            let age = now.saturating_sub(row.get(2)?);
            let age = Duration::from_millis(unsigned(age));
            Ok(Sighting { id, text: row.get(1)?, age })
        })?
        .collect()
}

/// Every table, at one moment.
pub(super) fn dump(connection: &mut Connection) -> rusqlite::Result<Dump> {
    let transaction = connection.transaction()?;
    let (id, revision) = identity(&transaction)?;
    let sightings = transaction
        .prepare("SELECT id, text, seen FROM sightings")?
        .query_map((), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<Result<_, _>>()?;
    Ok(Dump {
        id,
        revision,
        entries: entries(&transaction)?,
        commits: commits(&transaction, 0, i64::MAX.unsigned_abs())?,
        leases: leases(&transaction)?,
        sightings,
    })
}

/// Fills an empty store; `false` when something is in it.
pub(super) fn fill(connection: &mut Connection, dump: &Dump) -> rusqlite::Result<bool> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let (_, revision) = identity(&transaction)?;
    if revision != 0 || !is_empty(&transaction)? {
        return Ok(false);
    }
    transaction.execute(
        "UPDATE head SET id = ?1, revision = ?2 WHERE one = 1",
        params![dump.id, signed(dump.revision)],
    )?;
    let mut put =
        transaction.prepare("INSERT INTO entries (key, value, revision) VALUES (?1, ?2, ?3)")?;
    for entry in &dump.entries {
        put.execute(params![entry.key, entry.value, signed(entry.revision)])?;
    }
    let mut note =
        transaction.prepare("INSERT INTO commits (revision, writes, note) VALUES (?1, ?2, ?3)")?;
    for commit in &dump.commits {
        let writes = writes_to_text(&commit.writes);
        note.execute(params![signed(commit.revision), writes, commit.note])?;
    }
    put_leases(&transaction, &dump.leases)?;
    let seen = dump.sightings.iter().map(|(id, text, at)| (id.clone(), text.as_str(), *at));
    put_sightings(&transaction, seen)?;
    drop((put, note));
    transaction.commit()?;
    Ok(true)
}

fn is_empty(transaction: &Transaction<'_>) -> rusqlite::Result<bool> {
    let rows: Option<i64> = transaction
        .query_row(
            "SELECT 1 FROM entries UNION ALL SELECT 1 FROM leases UNION ALL SELECT 1 FROM sightings LIMIT 1",
            (),
            |row| row.get(0),
        )
        .optional()?;
    Ok(rows.is_none())
}

/// Says it as SQLite would: the file is not what was written.
fn corrupt(reason: &str) -> rusqlite::Error {
    let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
    rusqlite::Error::SqliteFailure(code, Some(reason.to_owned()))
}

/// Revisions fit: at a thousand a second they would last for 292 million years.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
