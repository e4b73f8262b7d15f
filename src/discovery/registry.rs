//! Follows the control plane: catalog by ETag, changes by a stream, and a poll as a floor under both.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use http::StatusCode;
use secrecy::SecretString;
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    api::{Change, Client, ClientError, Told, Watch},
    discovery::Directory,
    model::ServiceName,
    runtime::Backoff,
};

/// The catalog is asked for at least this often, whatever the stream says: a difference that no revision shows, as after
/// a store was set back, is found so.
const POLL: Duration = Duration::from_secs(120);

/// When it is asked for again: apart from others that began with us.
fn ask_again() -> Duration {
    POLL.mul_f64(fastrand::f64().mul_add(0.5, 0.5))
}
/// Pauses after failures.
const RETRY: Backoff = Backoff::new(Duration::from_millis(200), LONGEST);
/// The longest of them.
const LONGEST: Duration = Duration::from_secs(5);

/// How often the log says again why the control plane is not followed.
const REMIND: Duration = Duration::from_secs(600);
/// Most reasons that it tells in that time.
const REASONS: usize = 8;

type Boxed = Box<dyn std::error::Error + Send + Sync>;

/// Bearers for the control plane's own API.
pub trait Passes: Send + Sync + 'static {
    /// A bearer; `Err` says why there is none.
    fn bearer(&self) -> BoxFuture<'static, Result<SecretString, Boxed>>;

    /// Told that the control plane refuses this one: it is not to be given again.
    fn refused(&self, bearer: &SecretString);
}

/// Why the control plane was not understood this time.
#[derive(Debug, thiserror::Error)]
pub(super) enum Interrupted {
    #[error("no token for the control plane")]
    Bearer(#[source] Boxed),
    #[error("the control plane did not answer as it should")]
    Client(#[from] ClientError),
    #[error(
        "the control plane serves the project {found}, this proxy belongs to {expected}; to have it follow {found}, \
         remove its state folder (control.state_dir) and start it again"
    )]
    OtherProject { expected: ServiceName, found: ServiceName },
}

/// The control plane as a source of snapshots.
pub struct Registry {
    client: Client,
    passes: Arc<dyn Passes>,
    directory: Arc<Directory>,
}

impl Registry {
    /// The control plane behind `client`.
    #[must_use]
    pub fn new(client: Client, passes: Arc<dyn Passes>, directory: Arc<Directory>) -> Self {
        Self { client, passes, directory }
    }

    /// Follows it until dropped; failures are waited out with growing, jittered pauses, so that a thousand proxies do not
    /// come back at once. The log tells when it is lost, when for another reason, and when it is found again; not of each
    /// attempt between.
    pub async fn follow(self) {
        let mut failures = 0u32;
        let (mut etag, mut lost) = (None, None);
        loop {
            let begun = Instant::now();
            let outcome = self.stay_current(&mut etag, &mut lost).await;
            if begun.elapsed() > LONGEST {
                failures = 0;
            }
            if let Err(error) = outcome {
                self.report(&error, lost.get_or_insert_default());
            }
            failures = failures.saturating_add(1);
            sleep(RETRY.pause(failures)).await;
        }
    }

    fn report(&self, error: &Interrupted, outage: &mut Outage) {
        let error = error as &dyn std::error::Error;
        if !outage.is_news(chain(error), Instant::now()) {
            return tracing::debug!(error, "the control plane is still not followed");
        }
        let age = self.directory.age().unwrap_or_default();
        tracing::warn!(
            error,
            snapshot_age_seconds = age.as_secs(),
            "the control plane is not followed; the last snapshot stays in force"
        );
    }

    /// Fetches the catalog, then again whenever the stream says that there is another; ends with the stream.
    async fn stay_current(
        &self,
        etag: &mut Option<String>,
        lost: &mut Option<Outage>,
    ) -> Result<(), Interrupted> {
        let revision = self.refresh(etag).await?;
        let client = &self.client;
        let mut watch =
            with_pass(&*self.passes, |pass| async move { client.watch(&pass, revision).await })
                .await?;
        if lost.take().is_some() {
            tracing::info!(revision, "the control plane is followed again");
        }
        let mut ask = Instant::now() + ask_again();
        loop {
            match self.next(&mut watch, ask).await? {
                // What was on its way while the whole was fetched is in it.
                Heard::Told(Told::Change(change)) if self.revision() >= change.revision => {}
                Heard::Told(Told::Change(change)) if self.apply(&change, etag) => {}
                Heard::Told(Told::Current(standing)) if self.revision() >= standing.revision => {
                    self.directory.confirm();
                }
                Heard::Told(Told::Change(_) | Told::Resync(_) | Told::Current(_))
                | Heard::Nothing => {
                    self.refresh(etag).await?;
                    ask = Instant::now() + ask_again();
                }
                Heard::End => return Ok(()),
            }
        }
    }

    /// The revision of the snapshot in force; 0 without one.
    fn revision(&self) -> u64 {
        self.directory.base().map_or(0, |catalog| catalog.revision)
    }

    /// Puts in force what a change leads to; `false` when it does not follow on the snapshot in force.
    fn apply(&self, change: &Change, etag: &mut Option<String>) -> bool {
        let next = self.directory.base().map(|catalog| change.apply(&catalog));
        let Some(Ok(catalog)) = next else { return false };
        tracing::debug!(
            revision = catalog.revision,
            changes = change.patches.len(),
            "a new snapshot is in force"
        );
        *etag = Some(change.etag.clone());
        self.directory.publish(catalog);
        true
    }

    /// What the stream says until `ask`.
    async fn next(&self, watch: &mut Watch, ask: Instant) -> Result<Heard, Interrupted> {
        match timeout_at(ask, watch.next()).await {
            Ok(Ok(Some(told))) => Ok(Heard::Told(told)),
            Ok(Ok(None)) => Ok(Heard::End),
            Ok(Err(error)) => Err(error.into()),
            Err(_elapsed) => Ok(Heard::Nothing),
        }
    }

    /// Fetches the catalog if it is another than the last; says which revision is current.
    async fn refresh(&self, etag: &mut Option<String>) -> Result<u64, Interrupted> {
        let known = self.directory.load();
        // An ETag says nothing about a snapshot that another source has put in force meanwhile.
        let (client, tag) = (&self.client, known.as_ref().and(etag.as_deref()));
        let answer =
            with_pass(&*self.passes, |pass| async move { client.catalog(&pass, tag).await })
                .await?;
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

/// Asks with a bearer, and once more with another when that one is refused: the control plane may have lost its keys
/// or have another name now, and then no bearer from before is good there, however long it may live.
pub(super) async fn with_pass<T, F>(
    passes: &dyn Passes,
    ask: impl Fn(SecretString) -> F,
) -> Result<T, Interrupted>
where
    F: Future<Output = Result<T, ClientError>>,
{
    let pass = passes.bearer().await.map_err(Interrupted::Bearer)?;
    match ask(pass.clone()).await {
        Err(ClientError::Refused { status, .. }) if status == StatusCode::UNAUTHORIZED => {
            passes.refused(&pass);
        }
        outcome => return Ok(outcome?),
    }
    let pass = passes.bearer().await.map_err(Interrupted::Bearer)?;
    Ok(ask(pass).await?)
}

/// The reasons that the log has told in an outage.
#[derive(Default)]
pub(super) struct Outage {
    reasons: Vec<String>,
    since: Option<Instant>,
}

impl Outage {
    /// Whether the log does not say so yet, or said it long ago. Reasons that take turns are told once each.
    pub(super) fn is_news(&mut self, reason: String, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.duration_since(since) >= REMIND) {
            (self.since, self.reasons) = (Some(now), Vec::new());
        }
        let news = !self.reasons.contains(&reason) && self.reasons.len() < REASONS;
        if news {
            self.reasons.push(reason);
        }
        news
    }
}

/// An error with all its causes, as one text.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What the stream of changes said.
enum Heard {
    Told(Told),
    /// Nothing for so long that asking is due.
    Nothing,
    End,
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        sync::atomic::{AtomicU32, Ordering},
    };

    use axum::{
        Router,
        body::Body,
        extract::State,
        http::{HeaderMap, StatusCode, header},
        response::{IntoResponse, Response},
        routing::get,
    };
    use futures_util::{FutureExt, stream};
    use secrecy::ExposeSecret;
    use tokio::{runtime::Handle, sync::watch, time::timeout};

    use super::*;
    use crate::{
        api::{Catalog, ClientSettings},
        runtime::Supervisor,
        telemetry::overhear,
    };

    /// Real sockets, so real time: far more than any step needs.
    const LONG: Duration = Duration::from_secs(20);

    /// A control plane whose catalog a test decides.
    struct Plane {
        catalog: watch::Sender<Catalog>,
        fetched: watch::Sender<u32>,
        unchanged: AtomicU32,
        streams: watch::Sender<u32>,
        /// The `authorization` that it takes.
        accepts: watch::Sender<&'static str>,
        /// Raised to end the streams that are open.
        hang_up: watch::Sender<u32>,
    }

    fn catalog(project: &str, revision: u64) -> Catalog {
        let json = format!(
            r#"{{"revision":{revision},"issuer":"x","project":{{"name":"{project}","networking":
            {{"multi_cloud":true,"default_mode":"public","connections":[]}},"services":{{}},
            "permissions":{{}},"issuers":[],"mode":"enforce"}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    async fn serve_catalog(State(plane): State<Arc<Plane>>, headers: HeaderMap) -> Response {
        plane.fetched.send_modify(|count| *count += 1);
        if headers[header::AUTHORIZATION] != *plane.accepts.borrow() {
            return StatusCode::UNAUTHORIZED.into_response();
        }
        let catalog = plane.catalog.borrow().clone();
        let etag = format!("\"{}-{}\"", catalog.project.name, catalog.revision);
        if headers.get(header::IF_NONE_MATCH).is_some_and(|known| *known == *etag) {
            plane.unchanged.fetch_add(1, Ordering::SeqCst);
            return StatusCode::NOT_MODIFIED.into_response();
        }
        let body = serde_json::to_string(&catalog).unwrap();
        ([(header::ETAG, etag), (header::CONTENT_TYPE, "application/json".into())], body)
            .into_response()
    }

    async fn serve_watch(State(plane): State<Arc<Plane>>) -> Response {
        let listening = (plane.catalog.subscribe(), plane.hang_up.subscribe());
        plane.streams.send_modify(|count| *count += 1);
        let events = stream::unfold(listening, |(mut catalog, mut end)| async move {
            tokio::select! {
                _ = end.changed() => return None,
                changed = catalog.changed() => changed.ok()?,
            }
            let revision = catalog.borrow_and_update().revision;
            let event =
                format!("event: resync\nid: {revision}\ndata: {{\"revision\":{revision}}}\n\n");
            Some((Ok::<_, std::convert::Infallible>(event), (catalog, end)))
        });
        ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
    }

    fn client(address: std::net::SocketAddr) -> Client {
        let url = format!("http://{address}").parse().unwrap();
        Client::new(ClientSettings::new(vec![url], None)).unwrap()
    }

    /// Gives `pass-0` until it is refused, then `pass-1`, and so on.
    #[derive(Default)]
    struct Numbered(AtomicU32);

    impl Passes for Numbered {
        fn bearer(&self) -> BoxFuture<'static, Result<SecretString, Boxed>> {
            let pass = format!("pass-{}", self.0.load(Ordering::SeqCst));
            std::future::ready(Ok(pass.into())).boxed()
        }

        fn refused(&self, bearer: &SecretString) {
            let given = format!("pass-{}", self.0.fetch_add(1, Ordering::SeqCst));
            assert_eq!(bearer.expose_secret(), given);
        }
    }

    fn pass() -> Arc<Numbered> {
        Arc::default()
    }

    async fn follow(first: Catalog) -> (Arc<Plane>, Arc<Directory>) {
        let plane = Arc::new(Plane {
            catalog: watch::Sender::new(first),
            fetched: watch::Sender::new(0),
            unchanged: AtomicU32::new(0),
            streams: watch::Sender::new(0),
            accepts: watch::Sender::new("Bearer pass-0"),
            hang_up: watch::Sender::new(0),
        });
        let router = Router::new()
            .route("/v1/catalog", get(serve_catalog))
            .route("/v1/watch", get(serve_watch))
            .with_state(plane.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = client(listener.local_addr().unwrap());
        let here = Supervisor::new(Handle::current());
        here.spawn("plane", async move { axum::serve(listener, router).await.unwrap() });
        let directory = Arc::new(Directory::default());
        here.spawn("registry", Registry::new(client, pass(), directory.clone()).follow());
        (plane, directory)
    }

    async fn reaches(directory: &Directory, revision: u64) {
        let mut changes = directory.changes();
        let there = async {
            while directory.load().is_none_or(|catalog| catalog.revision != revision) {
                changes.changed().await.unwrap();
            }
        };
        timeout(LONG, there).await.unwrap();
    }

    async fn fetches(plane: &Plane, count: u32) {
        let mut fetched = plane.fetched.subscribe();
        timeout(LONG, fetched.wait_for(|seen| *seen >= count)).await.unwrap().unwrap();
    }

    /// As many streams have been opened as were ended, and one more.
    async fn stream_stands(plane: &Plane) {
        let ended = *plane.hang_up.borrow();
        let mut streams = plane.streams.subscribe();
        timeout(LONG, streams.wait_for(|opened| *opened > ended)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_change_that_the_stream_tells_of_is_in_force_at_once() {
        let (plane, directory) = follow(catalog("shop", 1)).await;
        reaches(&directory, 1).await;
        for revision in 2..5 {
            stream_stands(&plane).await;
            plane.catalog.send_replace(catalog("shop", revision));
            reaches(&directory, revision).await;
        }
    }

    #[tokio::test]
    async fn a_stream_that_ends_is_opened_again_and_the_same_catalog_is_not_sent_twice() {
        let (plane, directory) = follow(catalog("shop", 1)).await;
        reaches(&directory, 1).await;
        for round in 1..4 {
            stream_stands(&plane).await;
            plane.hang_up.send_modify(|count| *count += 1);
            fetches(&plane, round + 1).await;
        }
        assert!(plane.unchanged.load(Ordering::SeqCst) >= 3);
        assert_eq!(directory.load().unwrap().revision, 1);
    }

    #[tokio::test]
    async fn the_catalog_of_another_project_never_comes_into_force() {
        let (plane, directory) = follow(catalog("shop", 1)).await;
        reaches(&directory, 1).await;
        stream_stands(&plane).await;
        let seen = *plane.fetched.borrow();
        plane.catalog.send_replace(catalog("bank", 2));
        // The second question after it shows that the first answer was looked at and refused.
        fetches(&plane, seen + 2).await;
        assert_eq!(directory.load().unwrap().project.name.as_str(), "shop");
        plane.catalog.send_replace(catalog("shop", 3));
        reaches(&directory, 3).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_one_line_in_the_log_and_says_why() {
        let (paper, _guard) = overhear("warn");
        // Bound and dropped: nobody listens there. So every attempt fails, and the clock goes from pause to pause.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = client(listener.local_addr().unwrap());
        drop(listener);
        let following = Registry::new(client, pass(), Arc::default()).follow();
        assert!(timeout(Duration::from_secs(60), following).await.is_err());
        let log = paper.text();
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("cannot be reached: "), "{log}");

        // Without a token, the reason for that is said too.
        let (paper, _guard) = overhear("warn");
        let secret = Arc::new(Missing(std::sync::Mutex::new("/run/secrets/infrar cannot be read")));
        let client = Client::new(ClientSettings::new(Vec::new(), None)).unwrap();
        let mut following = pin!(Registry::new(client, secret.clone(), Arc::default()).follow());
        let minute = Duration::from_secs(60);
        assert!(timeout(minute, following.as_mut()).await.is_err());
        let log = paper.text();
        assert!(log.contains("control plane: /run/secrets/infrar cannot be read"), "{log}");
        // Another reason is news, the first one again is not, and after ten minutes either is.
        for (reason, lines) in [("it is empty", 2), ("/run/secrets/infrar cannot be read", 2)] {
            *secret.0.lock().unwrap() = reason;
            assert!(timeout(minute, following.as_mut()).await.is_err());
            assert_eq!(paper.text().lines().count(), lines, "{}", paper.text());
        }
        assert!(timeout(10 * minute, following).await.is_err());
        assert_eq!(paper.text().lines().count(), 3, "{}", paper.text());
    }

    /// Has no bearer, and says why.
    struct Missing(std::sync::Mutex<&'static str>);

    impl Passes for Missing {
        fn bearer(&self) -> BoxFuture<'static, Result<SecretString, Boxed>> {
            let missing = std::io::Error::other(*self.0.lock().unwrap());
            std::future::ready(Err(missing.into())).boxed()
        }

        fn refused(&self, _: &SecretString) {
            unreachable!("none was given");
        }
    }

    #[tokio::test]
    async fn a_bearer_that_the_control_plane_refuses_is_exchanged_for_another() {
        let (plane, directory) = follow(catalog("shop", 1)).await;
        reaches(&directory, 1).await;
        stream_stands(&plane).await;
        // It has lost its keys: what was signed before is worth nothing.
        plane.accepts.send_replace("Bearer pass-1");
        plane.catalog.send_replace(catalog("shop", 2));
        reaches(&directory, 2).await;
    }
}
