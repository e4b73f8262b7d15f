//! A commit: one transaction, in which one row decides.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio_postgres::{Client, Error, Transaction, types::Type};

use super::ask::{Failure, head, signed, unsigned};
use crate::store::{
    dump::Dump,
    entry::{Write, writes_to_text},
};

/// The channel of the database on which commits are told: `ID REVISION`. It is one for all stores of a database.
pub(super) const CHANNEL: &str = "infrar_revision";

/// One commit to be. Its token tells it from any other that would make the same revision.
pub(super) struct Attempt<'a> {
    pub(super) token: &'a str,
    pub(super) expected: u64,
    pub(super) writes: &'a [Write],
    pub(super) note: &'a str,
    pub(super) kept: u64,
    /// What is told on the channel; nothing where the database has none.
    pub(super) call: Option<String>,
    /// Set before the last word is sent. From then on a lost connection says nothing about what became of it.
    pub(super) sent: AtomicBool,
}

/// What came of it.
pub(super) enum Outcome {
    Made(u64),
    Conflict(u64),
}

impl Attempt<'_> {
    pub(super) async fn make(&self, client: &mut Client) -> Result<Outcome, Failure> {
        self.sent.store(false, Ordering::Release);
        let transaction = client.transaction().await?;
        let raise =
            "UPDATE infrar_head SET revision = revision + 1 WHERE one = 1 AND revision = $1";
        let expected = signed(self.expected);
        if transaction.execute_typed(raise, &[(&expected, Type::INT8)]).await? == 0 {
            let (_, revision) = head(&transaction).await?;
            transaction.rollback().await?;
            return Ok(Outcome::Conflict(revision));
        }
        let revision = self.revision();
        // All on the way at once; the row of the head holds everybody else up for one round trip.
        tokio::try_join!(
            apply(&transaction, self.writes, revision),
            self.note_down(&transaction),
            self.prune(&transaction),
            self.tell(&transaction),
        )?;
        self.sent.store(true, Ordering::Release);
        transaction.commit().await?;
        Ok(Outcome::Made(revision))
    }

    pub(super) const fn revision(&self) -> u64 {
        self.expected.saturating_add(1)
    }

    pub(super) fn was_sent(&self) -> bool {
        self.sent.load(Ordering::Acquire)
    }

    async fn note_down(&self, transaction: &Transaction<'_>) -> Result<(), Error> {
        let sql =
            "INSERT INTO infrar_commits (revision, token, writes, note) VALUES ($1, $2, $3, $4)";
        let writes = writes_to_text(self.writes);
        transaction
            .execute_typed(
                sql,
                &[
                    (&signed(self.revision()), Type::INT8),
                    (&self.token, Type::TEXT),
                    (&writes.as_bytes(), Type::BYTEA),
                    (&self.note.as_bytes(), Type::BYTEA),
                ],
            )
            .await
            .map(drop)
    }

    async fn prune(&self, transaction: &Transaction<'_>) -> Result<(), Error> {
        let sql = "DELETE FROM infrar_commits WHERE revision <= $1";
        let oldest = signed(self.revision().saturating_sub(self.kept));
        transaction.execute_typed(sql, &[(&oldest, Type::INT8)]).await.map(drop)
    }

    async fn tell(&self, transaction: &Transaction<'_>) -> Result<(), Error> {
        let Some(call) = &self.call else { return Ok(()) };
        let sql = "SELECT pg_notify($1, $2)";
        transaction.query_typed(sql, &[(&CHANNEL, Type::TEXT), (call, Type::TEXT)]).await.map(drop)
    }

    /// What became of it, asked on another connection. The row of the head is locked for the question: if the first
    /// connection still has it, its transaction ends first, one way or the other, and cannot end otherwise later.
    pub(super) async fn look(&self, client: &mut Client) -> Result<Outcome, Failure> {
        let transaction = client.transaction().await?;
        let lock = "SELECT revision FROM infrar_head WHERE one = 1 FOR UPDATE";
        let rows = transaction.query_typed(lock, &[]).await?;
        let row = rows.first().ok_or(Failure::Damaged("the row of its head is missing"))?;
        let stands = unsigned(row.try_get(0)?);
        let look = "SELECT token FROM infrar_commits WHERE revision = $1";
        let rows = transaction.query_typed(look, &[(&signed(self.revision()), Type::INT8)]).await?;
        transaction.rollback().await?;
        match rows.first() {
            Some(row) if row.try_get::<_, &str>(0)? == self.token => {
                Ok(Outcome::Made(self.revision()))
            }
            _ => Ok(Outcome::Conflict(stands)),
        }
    }
}

async fn apply(
    transaction: &Transaction<'_>,
    writes: &[Write],
    revision: u64,
) -> Result<(), Error> {
    let gone: Vec<&[u8]> = writes
        .iter()
        .filter(|write| write.value.is_none())
        .map(|write| write.key.as_bytes())
        .collect();
    let (keys, values): (Vec<&[u8]>, Vec<&[u8]>) = writes
        .iter()
        .filter_map(|write| Some((write.key.as_bytes(), write.value.as_ref()?.as_bytes())))
        .unzip();
    if !gone.is_empty() {
        let sql = "DELETE FROM infrar_entries WHERE key = ANY($1)";
        transaction.execute_typed(sql, &[(&gone, Type::BYTEA_ARRAY)]).await?;
    }
    if !keys.is_empty() {
        let sql = "INSERT INTO infrar_entries (key, value, revision) \
                   SELECT k, v, $3::BIGINT FROM unnest($1::BYTEA[], $2::BYTEA[]) AS t (k, v) \
                   ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision";
        transaction
            .execute_typed(
                sql,
                &[
                    (&keys, Type::BYTEA_ARRAY),
                    (&values, Type::BYTEA_ARRAY),
                    (&signed(revision), Type::INT8),
                ],
            )
            .await?;
    }
    Ok(())
}

/// Fills an empty store; `false` when something is in it.
pub(super) async fn fill(client: &mut Client, dump: &Dump) -> Result<bool, Failure> {
    let transaction = client.transaction().await?;
    let raise = "UPDATE infrar_head SET id = $1, revision = $2 WHERE one = 1 AND revision = 0 \
                 AND NOT EXISTS (SELECT 1 FROM infrar_entries) \
                 AND NOT EXISTS (SELECT 1 FROM infrar_leases) \
                 AND NOT EXISTS (SELECT 1 FROM infrar_sightings)";
    let raised = transaction
        .execute_typed(raise, &[(&dump.id, Type::TEXT), (&signed(dump.revision), Type::INT8)])
        .await?;
    if raised == 0 {
        return Ok(false);
    }
    let keys: Vec<&[u8]> = dump.entries.iter().map(|entry| entry.key.as_bytes()).collect();
    let values: Vec<&[u8]> = dump.entries.iter().map(|entry| entry.value.as_bytes()).collect();
    let revisions: Vec<i64> = dump.entries.iter().map(|entry| signed(entry.revision)).collect();
    let sql = "INSERT INTO infrar_entries (key, value, revision) \
               SELECT k, v, r FROM unnest($1::BYTEA[], $2::BYTEA[], $3::BIGINT[]) AS t (k, v, r)";
    transaction
        .execute_typed(
            sql,
            &[
                (&keys, Type::BYTEA_ARRAY),
                (&values, Type::BYTEA_ARRAY),
                (&revisions, Type::INT8_ARRAY),
            ],
        )
        .await?;
    fill_moving(&transaction, dump).await?;
    transaction.commit().await?;
    Ok(true)
}

/// What has no revision. A restored store has no commits.
async fn fill_moving(transaction: &Transaction<'_>, dump: &Dump) -> Result<(), Failure> {
    let keys: Vec<&[u8]> = dump.leases.iter().map(|(key, _)| key.as_bytes()).collect();
    let ends: Vec<i64> = dump.leases.iter().map(|(_, ends)| *ends).collect();
    let sql = "INSERT INTO infrar_leases (key, ends) \
               SELECT k, e FROM unnest($1::BYTEA[], $2::BIGINT[]) AS t (k, e)";
    transaction
        .execute_typed(sql, &[(&keys, Type::BYTEA_ARRAY), (&ends, Type::INT8_ARRAY)])
        .await?;
    let ids: Vec<&str> = dump.sightings.iter().map(|(id, ..)| id.as_str()).collect();
    let texts: Vec<&[u8]> = dump.sightings.iter().map(|(_, text, _)| text.as_bytes()).collect();
    let seen: Vec<i64> = dump.sightings.iter().map(|(.., seen)| *seen).collect();
    let sql = "INSERT INTO infrar_sightings (id, text, seen) \
               SELECT i, x, s FROM unnest($1::TEXT[], $2::BYTEA[], $3::BIGINT[]) AS t (i, x, s)";
    transaction
        .execute_typed(
            sql,
            &[(&ids, Type::TEXT_ARRAY), (&texts, Type::BYTEA_ARRAY), (&seen, Type::INT8_ARRAY)],
        )
        .await?;
    Ok(())
}
