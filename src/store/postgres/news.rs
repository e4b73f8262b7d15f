//! How this process hears of what others committed: the database calls, and is asked every second all the same.

use std::{
    future::poll_fn,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    sync::Notify,
    time::{self, Instant},
};
use tokio_postgres::AsyncMessage;
use tokio_util::sync::CancellationToken;

use super::{
    Postgres,
    ask::Head,
    commit::CHANNEL,
    connect::Way,
    fault::{fault, is_unknown_there},
};
use crate::store::{DEADLINE, error::StoreError, raise};

/// Between two questions.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// The first pause after a lost line, and the longest.
const REDIAL: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// Asks for the newest revision until the store is closed or dropped, and says when the database is gone and when it is
/// back.
pub(super) async fn ask(store: Weak<Postgres>, heard: Arc<Notify>, closed: CancellationToken) {
    let mut is_there = true;
    loop {
        // Not all replicas at once.
        let pause = ASK_EVERY.mul_f64(0.9 + 0.1 * fastrand::f64());
        let woken = time::timeout(pause, heard.notified());
        if closed.run_until_cancelled(woken).await.is_none() {
            return;
        }
        let Some(store) = store.upgrade() else { return };
        match store.catch_up().await {
            Ok(()) if is_there => {}
            Ok(()) => {
                is_there = true;
                tracing::info!(store = store.location(), "the database answers again");
            }
            Err(StoreError::Closed { .. }) => return,
            Err(error) if is_there => {
                is_there = false;
                tracing::warn!(
                    store = store.location(),
                    error = &error as &dyn std::error::Error,
                    "the database does not answer"
                );
            }
            Err(_) => {}
        }
    }
}

/// Listens until the store is closed or dropped, dialling again whenever the line breaks.
pub(super) async fn listen(
    store: Weak<Postgres>,
    way: Way,
    heard: Arc<Notify>,
    closed: CancellationToken,
) {
    let mut failures = 0_u32;
    loop {
        let begun = Instant::now();
        let line = closed.run_until_cancelled(hold_the_line(&store, &way, &heard)).await;
        match line {
            // Closed, dropped, or a database that does not call: asking is enough.
            None | Some(Line::Useless) => return,
            Some(Line::Broken) => {}
        }
        failures = if begun.elapsed() > REDIAL.1 { 1 } else { failures.saturating_add(1) };
        let doubled = REDIAL.0.saturating_mul(1 << failures.saturating_sub(1).min(16));
        let pause = doubled.min(REDIAL.1).mul_f64(0.5 + 0.5 * fastrand::f64());
        if closed.run_until_cancelled(time::sleep(pause)).await.is_none() {
            return;
        }
    }
}

/// How a line ended.
enum Line {
    Broken,
    Useless,
}

async fn hold_the_line(store: &Weak<Postgres>, way: &Way, heard: &Notify) -> Line {
    let dialling = time::timeout(DEADLINE, way.config.connect(way.tls.clone()));
    let Ok(Ok((client, mut connection))) = dialling.await else {
        return Line::Broken;
    };
    let sql = format!("LISTEN {CHANNEL}");
    let listening = client.batch_execute(&sql).fuse();
    let mut listening = std::pin::pin!(listening);
    loop {
        tokio::select! {
            begun = &mut listening => {
                let Some(store) = store.upgrade() else { return Line::Useless };
                if let Err(error) = begun {
                    let useless = is_unknown_there(&error);
                    let error = fault(store.location(), &error);
                    tracing::debug!(error = &error as &dyn std::error::Error, "no calls from the database");
                    return if useless { Line::Useless } else { Line::Broken };
                }
                // What was committed while nobody listened.
                heard.notify_one();
            }
            message = poll_fn(|context| connection.poll_message(context)) => match message {
                Some(Ok(AsyncMessage::Notification(call))) => {
                    let Some(store) = store.upgrade() else { return Line::Useless };
                    hear(&store, call.payload());
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Line::Broken,
            },
        }
    }
}

/// Other stores in the same database call on the same channel.
fn hear(store: &Arc<Postgres>, call: &str) {
    let said = call.split_once(' ').and_then(|(id, revision)| Some((id, revision.parse().ok()?)));
    if let Some((id, revision)) = said
        && id == store.id_text
    {
        raise(&store.revisions, revision);
    }
}

impl Postgres {
    /// Reads the head, and tells whoever watches when it is news.
    pub(super) async fn catch_up(&self) -> Result<(), StoreError> {
        let (id, revision) = self.put(&Head).await?;
        if id != self.id_text {
            return Err(StoreError::Damaged {
                location: self.location().to_owned(),
                reason: "another store is in its place".to_owned(),
            });
        }
        raise(&self.revisions, revision);
        Ok(())
    }
}
