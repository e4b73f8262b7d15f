//! Follows the control plane: catalog by ETag, changes by a stream, and a poll as a floor under both.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use secrecy::SecretString;
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    api::{Client, ClientError, Watch},
    discovery::Directory,
    model::ServiceName,
};

/// The catalog is asked for at least this often, whatever the stream says.
const POLL: Duration = Duration::from_secs(30);
/// The pause after the first failure; it doubles up to [`LONGEST`], with full jitter.
const SHORTEST: Duration = Duration::from_millis(200);
/// The longest pause after a failure.
const LONGEST: Duration = Duration::from_secs(5);

/// Asks for a bearer for the control plane's own API; `Err` says why there is none.
pub type AskBearer =
    Arc<dyn Fn() -> BoxFuture<'static, Result<SecretString, String>> + Send + Sync>;

/// Why the control plane was not understood this time.
#[derive(Debug, thiserror::Error)]
enum Interrupted {
    #[error("no token for the control plane: {0}")]
    Bearer(String),
    #[error("the control plane did not answer as it should")]
    Client(#[from] ClientError),
    #[error("the control plane serves the project {found}, this proxy belongs to {expected}")]
    OtherProject { expected: ServiceName, found: ServiceName },
}

/// The control plane as a source of snapshots.
pub struct Registry {
    client: Client,
    bearer: AskBearer,
    directory: Arc<Directory>,
}

impl Registry {
    /// The control plane behind `client`.
    #[must_use]
    pub fn new(client: Client, bearer: AskBearer, directory: Arc<Directory>) -> Self {
        Self { client, bearer, directory }
    }

    /// Follows it until dropped; failures are logged once per spell and waited out with growing, jittered pauses, so
    /// that a thousand proxies do not come back at once.
    pub async fn follow(self) {
        let mut pause = SHORTEST;
        let mut etag = None;
        loop {
            let begun = Instant::now();
            let outcome = self.stay_current(&mut etag).await;
            if begun.elapsed() > LONGEST {
                pause = SHORTEST;
            }
            if let Err(error) = outcome {
                let age = self.directory.age().unwrap_or_default();
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    snapshot_age_seconds = age.as_secs(),
                    "the control plane is not followed; the last snapshot stays in force"
                );
            }
            sleep(pause.mul_f64(fastrand::f64().mul_add(0.5, 0.5))).await;
            pause = (pause * 2).min(LONGEST);
        }
    }

    /// Fetches the catalog, then again whenever the stream says that there is another; ends with the stream.
    async fn stay_current(&self, etag: &mut Option<String>) -> Result<(), Interrupted> {
        let revision = self.refresh(etag).await?;
        let bearer = (self.bearer)().await.map_err(Interrupted::Bearer)?;
        let mut watch = self.client.watch(&bearer, revision).await?;
        loop {
            match self.next(&mut watch).await? {
                Heard::Change | Heard::Nothing => {
                    self.refresh(etag).await?;
                }
                Heard::End => return Ok(()),
            }
        }
    }

    async fn next(&self, watch: &mut Watch) -> Result<Heard, Interrupted> {
        match timeout_at(Instant::now() + POLL, watch.next()).await {
            Ok(Ok(Some(_change))) => Ok(Heard::Change),
            Ok(Ok(None)) => Ok(Heard::End),
            Ok(Err(error)) => Err(error.into()),
            Err(_elapsed) => Ok(Heard::Nothing),
        }
    }

    /// Fetches the catalog if it is another than the last; says which revision is current.
    async fn refresh(&self, etag: &mut Option<String>) -> Result<u64, Interrupted> {
        let bearer = (self.bearer)().await.map_err(Interrupted::Bearer)?;
        let known = self.directory.load();
        // An ETag says nothing about a snapshot that another source has put in force meanwhile.
        let answer = self.client.catalog(&bearer, known.as_ref().and(etag.as_deref())).await?;
        if let Some((catalog, new)) = answer {
            if let Some(known) = known.filter(|known| known.project.name != catalog.project.name) {
                return Err(Interrupted::OtherProject {
                    expected: known.project.name.clone(),
                    found: catalog.project.name,
                });
            }
            tracing::info!(revision = catalog.revision, "a new snapshot is in force");
            *etag = Some(new);
            self.directory.publish(catalog);
        } else {
            self.directory.confirm();
        }
        Ok(self.directory.load().map_or(0, |catalog| catalog.revision))
    }
}

/// What the stream of changes said.
enum Heard {
    Change,
    /// Nothing for so long that asking is due.
    Nothing,
    End,
}
