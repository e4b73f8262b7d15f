//! The version in force, and the one way from it to the next.
//!
//! Whoever wants a change says how it follows from a draft of the next version; one task asks all who wait at once, and
//! commits what they want as one revision. A commit that another replica was faster than is decided anew on what that one
//! has written. So decisions are pure, none is lost, and readers take no lock.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Duration, sleep, timeout},
};

use crate::{
    api::{
        CATALOG_READ, CONTROL_AUDIENCE, Catalog, Change, ENDPOINTS_OWN, IdentityDocument,
        KEYS_WRITE, PROJECT_WRITE, Patch, REGISTRY_WRITE, USAGE_WRITE, differences,
    },
    control::{
        book::{self, Book, BookError},
        journal::Journal,
        reject::Rejection,
    },
    model::{Project, ScopeSet, ServiceName},
    runtime::{hex, sha256},
    store::{CommitError, Since, State, Store, StoreError, Write},
};

/// Changes that wait to be decided; more are refused.
const QUEUE: usize = 4096;
/// Changes that become one revision.
const BATCH: usize = 256;
/// How far a replica may be behind another, in time.
const BEHIND: Duration = Duration::from_secs(2);
/// How often a batch is decided anew because another replica was faster.
const TURNS: usize = 16;
/// When it is tried again to take over what others have committed.
const AGAIN: Duration = Duration::from_secs(1);

/// Why the registry could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The store.
    #[error("the registry cannot be read")]
    Store(#[from] StoreError),
    /// What it keeps.
    #[error(transparent)]
    Book(#[from] BookError),
}

/// One immutable version of everything that is served.
pub(super) struct Version {
    pub(super) revision: u64,
    pub(super) book: Book,
    issuer: Arc<str>,
    store: Arc<str>,
    /// The body of `GET /v1/catalog`, written when it is first asked for.
    catalog: OnceLock<Bytes>,
    /// SHA-256 of every secret; identities without a usable secret are not in it.
    secrets: BTreeMap<ServiceName, [u8; 32]>,
}

impl Version {
    fn new(book: Book, issuer: &Arc<str>, store: &Arc<str>) -> Self {
        Self {
            revision: book.revision,
            secrets: secrets(&book),
            book,
            issuer: Arc::clone(issuer),
            store: Arc::clone(store),
            catalog: OnceLock::new(),
        }
    }

    /// The project in force.
    ///
    /// # Errors
    /// [`Rejection::NoProject`] before the first one.
    pub(super) fn project(&self) -> Result<&Project, Rejection> {
        self.book.project().ok_or(Rejection::NoProject)
    }

    /// The digest that a caller's secret must have.
    pub(super) fn secret(&self, name: &ServiceName) -> Option<&[u8; 32]> {
        self.book.admin(name).or_else(|| self.secrets.get(name))
    }

    /// Whether `name` may ask for tokens at all.
    pub(super) fn knows(&self, name: &ServiceName) -> bool {
        self.book.admin(name).is_some() || self.book.is_identity(name)
    }

    /// What `permissions` grant `caller` at `callee`; `None`: nothing. At the control plane itself every identity may
    /// follow the catalog, report its usage and look after endpoints of its own name; whoever is none may do nothing.
    pub(super) fn grants(&self, caller: &ServiceName, callee: &str) -> Option<ScopeSet> {
        let row = self.book.project().and_then(|project| project.permissions.get(caller));
        let written = row.and_then(|row| row.get(callee));
        if callee != CONTROL_AUDIENCE {
            return written.cloned();
        }
        let own: &[&str] = match self.book.admin(caller) {
            Some(_) => &[CATALOG_READ, REGISTRY_WRITE, PROJECT_WRITE, KEYS_WRITE],
            None => &[CATALOG_READ, USAGE_WRITE, ENDPOINTS_OWN],
        };
        let own = own.iter().filter_map(|text| text.parse().ok());
        let written = written.into_iter().flat_map(ScopeSet::iter).cloned();
        self.knows(caller).then(|| own.chain(written).collect())
    }

    /// The body of `GET /v1/catalog`.
    ///
    /// # Errors
    /// [`Rejection::NoProject`].
    pub(super) fn catalog(&self) -> Result<Bytes, Rejection> {
        if let Some(body) = self.catalog.get() {
            return Ok(body.clone());
        }
        let project = self.project()?.clone();
        let catalog =
            Catalog { revision: self.revision, issuer: (*self.issuer).to_owned(), project };
        let body = serde_json::to_vec(&catalog).map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "no catalog was written");
            Rejection::Internal
        })?;
        Ok(self.catalog.get_or_init(|| body.into()).clone())
    }

    /// Its strong ETag, quotes included: the same at every replica, another at another store.
    pub(super) fn etag(&self) -> String {
        format!("\"{}-{}\"", self.revision, self.store)
    }
}

fn secrets(book: &Book) -> BTreeMap<ServiceName, [u8; 32]> {
    let usable = |identity: &IdentityDocument| match identity {
        IdentityDocument::Secret { client_secret_sha256 } => book::digest(client_secret_sha256),
        IdentityDocument::Workload { .. } => None,
    };
    book.identities()
        .filter_map(|(name, identity)| Some((name.clone(), usable(identity)?)))
        .collect()
}

/// The next version as far as it has been decided.
pub(super) struct Draft {
    book: Book,
    writes: Vec<Write>,
    /// Which service each host belongs to; made when first asked for.
    hosts: Option<HashMap<String, ServiceName>>,
}

impl Draft {
    fn new(mut book: Book) -> Self {
        // What is decided is dated as it will be: whoever is next in the batch finds it changed.
        book.revision += 1;
        Self { book, writes: Vec::new(), hosts: None }
    }

    /// What it is so far.
    pub(super) fn book(&self) -> &Book {
        &self.book
    }

    /// The service that a host belongs to.
    pub(super) fn owner_of(&mut self, host: &str) -> Option<&ServiceName> {
        let book = &self.book;
        self.hosts.get_or_insert_with(|| book.hosts()).get(host)
    }

    /// Adds writes; what is decided after this sees them.
    ///
    /// # Errors
    /// [`Rejection::Internal`] for a write that nobody could read again.
    pub(super) fn add(&mut self, writes: Vec<Write>) -> Result<(), Rejection> {
        self.book.apply(&writes).map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "a change made no sense");
            Rejection::Internal
        })?;
        self.hosts = None;
        self.writes.extend(writes);
        Ok(())
    }

    /// As [`add`](Self::add), where only a host is new: what is known of hosts stays.
    pub(super) fn add_at(
        &mut self,
        host: String,
        service: &ServiceName,
        writes: Vec<Write>,
    ) -> Result<(), Rejection> {
        let mut hosts = self.hosts.take();
        self.add(writes)?;
        if let Some(hosts) = &mut hosts {
            hosts.insert(host, service.clone());
        }
        self.hosts = hosts;
        Ok(())
    }
}

type Decide = Box<dyn FnMut(&mut Draft) -> Result<(), Rejection> + Send>;

/// A change that waits to be decided.
struct Order {
    decide: Decide,
    done: oneshot::Sender<Result<u64, Rejection>>,
}

/// Holds the version in force.
pub(super) struct Registry {
    issuer: Arc<str>,
    current: watch::Sender<Arc<Version>>,
    journal: Journal,
    orders: mpsc::Sender<Order>,
}

/// The task that decides and commits; run it.
pub(super) struct Committer {
    registry: Arc<Registry>,
    store: Store,
    store_id: Arc<str>,
    orders: mpsc::Receiver<Order>,
}

impl Registry {
    /// The version that the store has.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub(super) async fn open(
        issuer: &str,
        store: Store,
    ) -> Result<(Arc<Self>, Committer), RegistryError> {
        let (issuer, store_id) =
            (Arc::<str>::from(issuer), Arc::<str>::from(&*store_id(&store, issuer)));
        let book = Book::read(&store.load().await?)?;
        let version = Version::new(book, &issuer, &store_id);
        let (orders, waiting) = mpsc::channel(QUEUE);
        let current = watch::Sender::new(Arc::new(version));
        let registry = Arc::new(Self { issuer, current, journal: Journal::default(), orders });
        let committer =
            Committer { registry: Arc::clone(&registry), store, store_id, orders: waiting };
        Ok((registry, committer))
    }

    /// The `iss` of the project's tokens.
    pub(super) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The version in force.
    pub(super) fn current(&self) -> Arc<Version> {
        Arc::clone(&self.current.borrow())
    }

    /// The version in force and those that follow.
    pub(super) fn follow(&self) -> watch::Receiver<Arc<Version>> {
        self.current.subscribe()
    }

    /// Waits a moment for a revision that another replica has told of and this one has not heard of yet; never long, for
    /// it may be of another store.
    pub(super) async fn reach(&self, revision: u64) {
        let mut versions = self.follow();
        let there = versions.wait_for(|version| version.revision >= revision);
        let _late = timeout(BEHIND, there).await;
    }

    /// The revision of an ETag of this store's catalogs.
    pub(super) fn tagged(&self, tag: &str) -> Option<u64> {
        let tag = tag.trim();
        let tag = tag.strip_prefix("W/").unwrap_or(tag);
        let (revision, store) = tag.strip_prefix('"')?.strip_suffix('"')?.split_once('-')?;
        (*self.current().store == *store).then_some(())?;
        revision.parse().ok()
    }

    /// What watchers are told.
    pub(super) fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Has a change decided and committed; gives the revision by which it is in force. `decide` may be asked several times,
    /// each time of another draft.
    ///
    /// # Errors
    /// What `decide` said, or that the store did not take it.
    pub(super) async fn change<F>(&self, decide: F) -> Result<u64, Rejection>
    where
        F: FnMut(&mut Draft) -> Result<(), Rejection> + Send + 'static,
    {
        let (done, outcome) = oneshot::channel();
        let order = Order { decide: Box::new(decide), done };
        self.orders.try_send(order).map_err(|_full| Rejection::Overloaded)?;
        outcome.await.unwrap_or(Err(Rejection::Internal))
    }

    fn install(&self, version: Version, patches: Option<Vec<Patch>>) {
        let revision = version.revision;
        match patches {
            Some(patches) => {
                self.journal.tell(&Change { revision, etag: version.etag(), patches });
            }
            None => self.journal.forget(),
        }
        self.current.send_replace(Arc::new(version));
    }
}

/// A short name for this store and what its catalogs say besides: another issuer is another catalog.
fn store_id(store: &Store, issuer: &str) -> String {
    let both = format!("{}{issuer}", store.id());
    hex(&sha256(both.as_bytes())).get(..16).unwrap_or_default().to_owned()
}

impl Committer {
    /// Decides, commits, and follows what others commit, until nobody can ask any more.
    pub(super) async fn run(mut self) {
        let mut revisions = self.store.revisions();
        let mut behind = false;
        loop {
            let mut batch = Vec::new();
            tokio::select! {
                count = self.orders.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        return;
                    }
                    self.commit(batch).await;
                }
                told = revisions.changed() => {
                    if told.is_err() {
                        return;
                    }
                    revisions.mark_unchanged();
                    behind = !self.follows().await;
                }
                () = sleep(AGAIN), if behind => behind = !self.follows().await,
            }
        }
    }

    async fn commit(&self, mut batch: Vec<Order>) {
        for _ in 0..TURNS {
            let before = self.registry.current();
            let mut draft = Draft::new(before.book.clone());
            let outcomes: Vec<_> =
                batch.iter_mut().map(|order| (order.decide)(&mut draft)).collect();
            if draft.writes.is_empty() {
                return answer(batch, outcomes, before.revision);
            }
            let patches = patches(&before.book, &draft.book);
            let note = serde_json::to_string(&patches).unwrap_or_default();
            let writes = mem::take(&mut draft.writes);
            match self.store.commit(before.revision, writes.clone(), note).await {
                Ok(revision) => {
                    // Read as everybody else reads it, so that what is served is what was kept.
                    match before.book.after(revision, &writes) {
                        Ok(book) => self.install(book, patches),
                        Err(error) => report(&error),
                    }
                    return answer(batch, outcomes, revision);
                }
                Err(CommitError::Conflict { .. }) => {
                    if let Err(error) = self.catch_up().await {
                        report(&error);
                        return refuse(batch);
                    }
                }
                Err(CommitError::Store(error)) => {
                    report(&error);
                    return refuse(batch);
                }
            }
        }
        tracing::warn!("other replicas were faster each time; a change is given up");
        refuse(batch);
    }

    /// Takes over what others have committed; `false` when that failed.
    async fn follows(&self) -> bool {
        let caught_up = self.catch_up().await;
        caught_up.as_ref().err().into_iter().for_each(|error| report(error));
        caught_up.is_ok()
    }

    /// Takes over what other replicas have committed.
    async fn catch_up(&self) -> Result<(), RegistryError> {
        loop {
            let current = self.registry.current();
            let (commits, more) = match self.store.since(current.revision).await? {
                Since::Commits { commits, more } => (commits, more),
                Since::Forgotten { .. } => {
                    let state: State = self.store.load().await?;
                    let book = Book::read(&state)?;
                    self.registry.install(self.version(book), None);
                    return Ok(());
                }
            };
            let mut book = current.book.clone();
            for commit in commits {
                book = book.after(commit.revision, &commit.writes)?;
                let patches = serde_json::from_str::<Option<Vec<Patch>>>(&commit.note);
                self.install(book.clone(), patches.ok().flatten());
            }
            if !more {
                return Ok(());
            }
        }
    }

    fn install(&self, book: Book, patches: Option<Vec<Patch>>) {
        self.registry.install(self.version(book), patches);
    }

    fn version(&self, book: Book) -> Version {
        Version::new(book, &self.registry.issuer, &self.store_id)
    }
}

/// What proxies are told of a step; `None`: they must fetch everything.
fn patches(before: &Book, after: &Book) -> Option<Vec<Patch>> {
    match (before.project(), after.project()) {
        (Some(before), Some(after)) if before.name == after.name => {
            Some(differences(before, after))
        }
        (None, None) => Some(Vec::new()),
        (Some(_) | None, Some(_) | None) => None,
    }
}

fn answer(batch: Vec<Order>, outcomes: Vec<Result<(), Rejection>>, revision: u64) {
    for (order, outcome) in batch.into_iter().zip(outcomes) {
        // Whoever asked may have left; the change is made all the same.
        let _left = order.done.send(outcome.map(|()| revision));
    }
}

fn refuse(batch: Vec<Order>) {
    for order in batch {
        let _left = order.done.send(Err(Rejection::StoreUnavailable));
    }
}

fn report(error: &(dyn std::error::Error + 'static)) {
    tracing::error!(error, "the registry is not changed; what is in force is served on");
}
