//! What is asked of a database that may simply be asked again: everything but a commit.
//!
//! Each question is a value that knows its own SQL. It may be put several times, on several connections.

use std::time::Duration;

use tokio_postgres::{Client, Error, IsolationLevel, Row, Transaction, types::Type};
use uuid::Uuid;

use crate::store::{
    PAGE,
    dump::Dump,
    entry::{Commit, Entry, Sighting, Since, State, writes_from_text},
};

/// Milliseconds since 1970 by the database's clock.
const NOW: &str = "(extract(epoch FROM now()) * 1000)::BIGINT";

/// Why there is no answer: the database's own words, or rows that are not what was written.
#[derive(Debug)]
pub(super) enum Failure {
    Database(Error),
    Damaged(&'static str),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Database(error)
    }
}

/// A question, and its answer.
pub(super) trait Ask: Sync {
    type Answer: Send;

    fn ask(
        &self,
        client: &mut Client,
    ) -> impl Future<Output = Result<Self::Answer, Failure>> + Send;
}

pub(super) struct Load;
pub(super) struct After(pub(super) u64);
pub(super) struct Head;
/// Sorted by key, so that two who renew the same ones do not wait for each other in a circle.
pub(super) struct Renew {
    keys: Vec<Vec<u8>>,
    last: Vec<i64>,
}
pub(super) struct Forget(pub(super) Vec<Vec<u8>>);
pub(super) struct Lapsed;
pub(super) struct Leases;
/// Sorted by id, for the same reason.
pub(super) struct Sight {
    ids: Vec<String>,
    texts: Vec<Vec<u8>>,
    ages: Vec<i64>,
    oldest: i64,
}
pub(super) struct Sightings(pub(super) i64);
pub(super) struct Everything;

impl Renew {
    pub(super) fn new(leases: Vec<(String, Duration)>) -> Self {
        // Of several for one key the last counts.
        let sorted: std::collections::BTreeMap<_, _> = leases.into_iter().collect();
        let (keys, last) =
            sorted.into_iter().map(|(key, lasts)| (key.into_bytes(), millis(lasts))).unzip();
        Self { keys, last }
    }
}

impl Sight {
    pub(super) fn new(sightings: Vec<Sighting>, oldest: Duration) -> Self {
        let mut sorted = std::collections::BTreeMap::<Uuid, Sighting>::new();
        for seen in sightings {
            let newer = sorted.get(&seen.id).is_none_or(|known| seen.age <= known.age);
            if newer {
                sorted.insert(seen.id, seen);
            }
        }
        let mut sight =
            Self { ids: Vec::new(), texts: Vec::new(), ages: Vec::new(), oldest: millis(oldest) };
        for (id, seen) in sorted {
            sight.ids.push(id.to_string());
            sight.texts.push(seen.text.into_bytes());
            sight.ages.push(millis(seen.age));
        }
        sight
    }
}

impl Ask for Load {
    type Answer = State;

    async fn ask(&self, client: &mut Client) -> Result<State, Failure> {
        let transaction = moment(client).await?;
        let (_, revision) = head(&transaction).await?;
        let entries = entries(&transaction).await?;
        transaction.commit().await?;
        Ok(State { revision, entries })
    }
}

impl Ask for After {
    type Answer = Since;

    async fn ask(&self, client: &mut Client) -> Result<Since, Failure> {
        let transaction = moment(client).await?;
        let (_, newest) = head(&transaction).await?;
        let first = "SELECT min(revision) FROM infrar_commits";
        let rows = transaction.query_typed(first, &[]).await?;
        let first = rows.first().map(|row| row.try_get::<_, Option<i64>>(0)).transpose()?.flatten();
        let oldest = first.map_or(newest, |first| unsigned(first).saturating_sub(1));
        if self.0 < oldest || self.0 > newest {
            return Ok(Since::Forgotten { oldest });
        }
        let commits = commits(&transaction, self.0, PAGE).await?;
        transaction.commit().await?;
        let more = commits.last().is_some_and(|last| last.revision < newest);
        Ok(Since::Commits { commits, more })
    }
}

impl Ask for Head {
    type Answer = (String, u64);

    async fn ask(&self, client: &mut Client) -> Result<(String, u64), Failure> {
        let rows = client.query_typed(HEAD, &[]).await?;
        head_of(&rows)
    }
}

impl Ask for Renew {
    type Answer = ();

    async fn ask(&self, client: &mut Client) -> Result<(), Failure> {
        let sql = format!(
            "INSERT INTO infrar_leases (key, ends) \
             SELECT k, {NOW} + ms FROM unnest($1::BYTEA[], $2::BIGINT[]) AS t (k, ms) \
             ON CONFLICT (key) DO UPDATE SET ends = excluded.ends"
        );
        client
            .execute_typed(&sql, &[(&self.keys, Type::BYTEA_ARRAY), (&self.last, Type::INT8_ARRAY)])
            .await?;
        Ok(())
    }
}

impl Ask for Forget {
    type Answer = ();

    async fn ask(&self, client: &mut Client) -> Result<(), Failure> {
        let sql = "DELETE FROM infrar_leases WHERE key = ANY($1)";
        client.execute_typed(sql, &[(&self.0, Type::BYTEA_ARRAY)]).await?;
        Ok(())
    }
}

impl Ask for Lapsed {
    type Answer = Vec<String>;

    async fn ask(&self, client: &mut Client) -> Result<Vec<String>, Failure> {
        let sql = format!("SELECT key FROM infrar_leases WHERE ends <= {NOW} ORDER BY key");
        client.query_typed(&sql, &[]).await?.iter().map(|row| text(row, 0)).collect()
    }
}

impl Ask for Leases {
    type Answer = Vec<(String, Duration)>;

    async fn ask(&self, client: &mut Client) -> Result<Self::Answer, Failure> {
        let sql = format!("SELECT key, ends - {NOW} FROM infrar_leases ORDER BY key");
        let rows = client.query_typed(&sql, &[]).await?;
        rows.iter()
            .map(|row| Ok((text(row, 0)?, Duration::from_millis(unsigned(row.try_get(1)?)))))
            .collect()
    }
}

impl Ask for Sight {
    type Answer = ();

    async fn ask(&self, client: &mut Client) -> Result<(), Failure> {
        let sql = format!(
            "INSERT INTO infrar_sightings (id, text, seen) \
             SELECT i, x, {NOW} - ms FROM unnest($1::TEXT[], $2::BYTEA[], $3::BIGINT[]) AS t (i, x, ms) \
             ON CONFLICT (id) DO UPDATE SET text = excluded.text, seen = excluded.seen \
             WHERE excluded.seen >= infrar_sightings.seen"
        );
        client
            .execute_typed(
                &sql,
                &[
                    (&self.ids, Type::TEXT_ARRAY),
                    (&self.texts, Type::BYTEA_ARRAY),
                    (&self.ages, Type::INT8_ARRAY),
                ],
            )
            .await?;
        let sql = format!("DELETE FROM infrar_sightings WHERE seen < {NOW} - $1");
        client.execute_typed(&sql, &[(&self.oldest, Type::INT8)]).await?;
        Ok(())
    }
}

impl Ask for Sightings {
    type Answer = Vec<Sighting>;

    async fn ask(&self, client: &mut Client) -> Result<Vec<Sighting>, Failure> {
        let sql = format!(
            "SELECT id, text, {NOW} - seen FROM infrar_sightings WHERE seen >= {NOW} - $1 ORDER BY id"
        );
        let rows = client.query_typed(&sql, &[(&self.0, Type::INT8)]).await?;
        rows.iter()
            .map(|row| {
                let id = row.try_get::<_, &str>(0)?.parse().ok();
                let id = id.ok_or(Failure::Damaged("who was seen has no identity"))?;
                let age = Duration::from_millis(unsigned(row.try_get(2)?));
                Ok(Sighting { id, text: text(row, 1)?, age })
            })
            .collect()
    }
}

impl Ask for Everything {
    type Answer = Dump;

    async fn ask(&self, client: &mut Client) -> Result<Dump, Failure> {
        let transaction = moment(client).await?;
        let (id, revision) = head(&transaction).await?;
        let entries = entries(&transaction).await?;
        let commits = commits(&transaction, 0, u64::MAX).await?;
        let leases = transaction.query_typed("SELECT key, ends FROM infrar_leases", &[]).await?;
        let leases = leases
            .iter()
            .map(|row| Ok((text(row, 0)?, row.try_get(1)?)))
            .collect::<Result<_, Failure>>()?;
        let sightings =
            transaction.query_typed("SELECT id, text, seen FROM infrar_sightings", &[]).await?;
        let sightings = sightings
            .iter()
            .map(|row| Ok((row.try_get(0)?, text(row, 1)?, row.try_get(2)?)))
            .collect::<Result<_, Failure>>()?;
        transaction.commit().await?;
        Ok(Dump { id, revision, entries, commits, leases, sightings })
    }
}

const HEAD: &str = "SELECT id, revision FROM infrar_head WHERE one = 1";

/// One moment for all that is read in it.
async fn moment(client: &mut Client) -> Result<Transaction<'_>, Error> {
    client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await
}

pub(super) async fn head(transaction: &Transaction<'_>) -> Result<(String, u64), Failure> {
    head_of(&transaction.query_typed(HEAD, &[]).await?)
}

fn head_of(rows: &[Row]) -> Result<(String, u64), Failure> {
    let row = rows.first().ok_or(Failure::Damaged("the row of its head is missing"))?;
    Ok((row.try_get(0)?, unsigned(row.try_get(1)?)))
}

async fn entries(transaction: &Transaction<'_>) -> Result<Vec<Entry>, Failure> {
    let sql = "SELECT key, value, revision FROM infrar_entries ORDER BY key";
    let rows = transaction.query_typed(sql, &[]).await?;
    rows.iter()
        .map(|row| {
            let revision = unsigned(row.try_get(2)?);
            Ok(Entry { key: text(row, 0)?, value: text(row, 1)?, revision })
        })
        .collect()
}

async fn commits(
    transaction: &Transaction<'_>,
    after: u64,
    at_most: u64,
) -> Result<Vec<Commit>, Failure> {
    let sql = "SELECT revision, writes, note FROM infrar_commits \
               WHERE revision > $1 ORDER BY revision LIMIT $2";
    let (after, at_most) = (signed(after), signed(at_most));
    let rows =
        transaction.query_typed(sql, &[(&after, Type::INT8), (&at_most, Type::INT8)]).await?;
    rows.iter()
        .map(|row| {
            let writes = writes_from_text(&text(row, 1)?);
            let damaged = Failure::Damaged("the changes of a commit are not what was written");
            let writes = writes.ok_or(damaged)?;
            Ok(Commit { revision: unsigned(row.try_get(0)?), writes, note: text(row, 2)? })
        })
        .collect()
}

fn text(row: &Row, column: usize) -> Result<String, Failure> {
    let bytes: Vec<u8> = row.try_get(column)?;
    String::from_utf8(bytes).ok().ok_or(Failure::Damaged("a text in it is none"))
}

pub(super) fn millis(duration: Duration) -> i64 {
    // A thousandth of what fits, so that adding it to a moment fits too.
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).min(i64::MAX / 1000)
}

pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
