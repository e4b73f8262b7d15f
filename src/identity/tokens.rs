//! Audience → bearer, renewed early.
//!
//! One [`Slot`] per callee. A request looks into its slot without a lock; only when nothing usable lies there
//! does it wait, together with everybody else, for the one question that is asked on the side runtime.
//! Nobody who gives up waiting takes that question along. From half of its life a token that is in use is
//! renewed behind the requests' back, and while the issuer is down the old one serves until five seconds
//! before it expires: an expired token is never handed out.

use std::{
    collections::HashMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use futures_util::{FutureExt, future::BoxFuture};
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    api::{Client, ClientError, Credential, TokenAnswer},
    identity::{json::Seconds, keys::KeySet, verify::Parts},
    model::{Project, ScopeSet, ServiceName},
    runtime::{Backoff, Clock, Supervisor},
};

/// A token is not used in its last seconds: it must still be good when it arrives.
const MARGIN: Duration = Duration::from_secs(5);
/// How long one question may take, all replicas included.
const ASK_LIMIT: Duration = Duration::from_secs(20);
/// Pauses after failures.
const RETRY: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
/// Keys that were kept so many seconds after a token was issued, were fetched after it was.
const ORPHANED_AFTER: i64 = 60;
/// How often the wall clock is looked at.
const CLOCK_EVERY: Duration = Duration::from_secs(1);
/// How often a token file is looked at.
const FILE_EVERY: Duration = Duration::from_secs(1);
/// The life of a bearer that nobody says anything about: short, so that it is asked for again before it can have ended.
const UNSAID: Duration = Duration::from_secs(300);
/// The life of a bearer from a file that does not say when it ends; the file is watched anyway.
const NO_EXPIRY: Duration = Duration::from_secs(365 * 86_400);
/// The largest token file that is read.
const FILE_LIMIT: u64 = 64 * 1024;

/// Why there is no token. Shared by all who waited for it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenUnavailable {
    /// The issuer says no: `invalid_target` when the callee is not granted (RFC 8707 §2), `invalid_client`.
    #[error("the issuer refuses a token ({code})")]
    Refused {
        /// The `error` of RFC 6749 §5.2.
        code: String,
        /// Status and detail.
        #[source]
        source: Arc<ClientError>,
    },
    /// The issuer gave no usable answer.
    #[error("the issuer cannot be asked for a token")]
    Unreachable(#[source] Arc<ClientError>),
    /// It gave none in time.
    #[error("the issuer gave no answer in time")]
    Deadline,
    /// What came cannot be sent, or has expired already.
    #[error("the token cannot be used")]
    Unusable,
    /// The file with the token, or with the secret to ask for one, cannot be read.
    #[error("{} cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Nothing is set up that could issue one.
    #[error("no control plane and no token file gives tokens for this service")]
    NoSource,
}

impl TokenUnavailable {
    /// Whether the issuer said that the callee is not granted: no failure, but a missing permission.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if matches!(code.as_str(), "invalid_target" | "access_denied"))
    }

    /// What it comes down to, for whoever called: no address, path or code.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused { code, .. } if code == "invalid_client" => {
                "wrong credential: the issuer does not accept this proxy's own"
            }
            Self::Refused { .. } => "the issuer refuses a token for it",
            Self::Unreachable(error) => match &**error {
                ClientError::Refused { .. } => "the issuer is out of order or too busy",
                ClientError::Unreachable { .. } => "the issuer cannot be reached",
                ClientError::Malformed { .. } => "the issuer's answer cannot be used",
                ClientError::Settings { .. } => "the issuer cannot be asked with these settings",
            },
            Self::Deadline => "the issuer cannot be reached: it gave no answer in time",
            Self::Unusable => "the token cannot be used: it has expired or is malformed",
            Self::File { .. } => "no credential: the file that holds it cannot be read",
            Self::NoSource => "no credential: nothing is set up that gives tokens for it",
        }
    }
}

impl From<ClientError> for TokenUnavailable {
    fn from(error: ClientError) -> Self {
        match &error {
            ClientError::Refused { code, .. } if !error.is_temporary() => {
                Self::Refused { code: code.clone(), source: Arc::new(error) }
            }
            ClientError::Refused { .. }
            | ClientError::Unreachable { .. }
            | ClientError::Malformed { .. }
            | ClientError::Settings { .. } => Self::Unreachable(Arc::new(error)),
        }
    }
}

/// Whoever issues bearers.
pub trait TokenSource: Send + Sync + 'static {
    /// Asks for a bearer for `audience`, once. Awaited on the side runtime.
    fn ask(
        &self,
        audience: &ServiceName,
    ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>>;
}

/// The project's own token endpoint.
#[derive(Clone, Debug)]
pub struct ControlTokens {
    client: Client,
    credential: Credential,
}

impl ControlTokens {
    /// Tokens for the bearer of `credential`, with all scopes that are granted to it.
    #[must_use]
    pub fn new(client: Client, credential: Credential) -> Self {
        Self { client, credential }
    }
}

impl TokenSource for ControlTokens {
    fn ask(
        &self,
        audience: &ServiceName,
    ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
        let (asker, audience) = (self.clone(), audience.clone());
        async move { Ok(asker.client.token(&asker.credential, audience.as_str(), None).await?) }
            .boxed()
    }
}

/// No issuer at all: a proxy that has only token files.
#[derive(Clone, Copy, Debug)]
pub struct NoTokens;

impl TokenSource for NoTokens {
    fn ask(&self, _: &ServiceName) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
        std::future::ready(Err(TokenUnavailable::NoSource)).boxed()
    }
}

/// A bearer from elsewhere, in a file. Its life is that of the JWT in it, if it is one.
struct TokenFile {
    path: PathBuf,
}

impl TokenSource for TokenFile {
    fn ask(&self, _: &ServiceName) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
        let path = self.path.clone();
        async move {
            let fault = |source: io::Error| TokenUnavailable::File {
                path: path.clone(),
                source: Arc::new(source),
            };
            let text = read_small(&path).await.map_err(fault)?;
            let access_token = SecretString::from(text.trim());
            Ok(TokenAnswer {
                access_token,
                expires_in: Some(NO_EXPIRY),
                scope: ScopeSet::default(),
            })
        }
        .boxed()
    }
}

async fn read_small(path: &Path) -> io::Result<String> {
    if tokio::fs::metadata(path).await?.len() > FILE_LIMIT {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    tokio::fs::read_to_string(path).await
}

/// One token, ready to be sent.
pub struct Bearer {
    header: HeaderValue,
    scope: ScopeSet,
    /// Whose it says it is.
    issuer: Option<Box<str>>,
    /// The key by which it says it is signed.
    kid: Option<Box<str>>,
    /// When the question for it left.
    asked: Instant,
    renew_at: Instant,
    usable_until: Instant,
    issued_at: i64,
    expires_at: i64,
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scope, expires_at, .. } = self;
        f.debug_struct("Bearer")
            .field("scope", scope)
            .field("expires_at", expires_at)
            .finish_non_exhaustive()
    }
}

impl Bearer {
    /// The value of `authorization`, marked sensitive.
    #[must_use]
    pub fn header(&self) -> &HeaderValue {
        &self.header
    }

    /// The token alone, for the admin API.
    #[must_use]
    pub fn token(&self) -> SecretString {
        let text = self.header.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        SecretString::from(text.unwrap_or_default())
    }

    /// The scopes it carries, as the issuer said.
    #[must_use]
    pub fn scope(&self) -> &ScopeSet {
        &self.scope
    }

    /// Until when it may be sent: five seconds before it expires.
    #[must_use]
    pub fn usable_until(&self) -> Instant {
        self.usable_until
    }

    /// When it expires, seconds since 1970 by this machine's clock.
    #[must_use]
    pub fn expires_at(&self) -> i64 {
        self.expires_at
    }

    /// When it was received, likewise.
    #[must_use]
    pub fn issued_at(&self) -> i64 {
        self.issued_at
    }

    /// The key by which it is signed, if `keys` have no such key.
    fn unknown_key(&self, keys: &KeySet) -> Option<&str> {
        self.kid.as_deref().filter(|kid| !keys.knows(kid))
    }

    fn is_usable(&self, now: Instant) -> bool {
        now < self.usable_until
    }

    /// `None` when it cannot stand in a header, is in its last seconds already, or is a JWT of which nobody can read
    /// when it ends. `asked` and `issued_at` are the same moment, before the question left, so that its way is not
    /// counted as life.
    ///
    /// It lives as long as the answer and the token itself both say.
    fn new(answer: &TokenAnswer, asked: Instant, issued_at: i64) -> Option<Self> {
        let text = answer.access_token.expose_secret();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return None;
        }
        let mut header = HeaderValue::try_from(format!("Bearer {text}")).ok()?;
        header.set_sensitive(true);
        let Peeked { end, issuer, kid } = peek(text.as_bytes()).ok()?;
        let left = end.map(|end| u64::try_from(end.saturating_sub(issued_at)).unwrap_or(0));
        let said = [answer.expires_in, left.map(Duration::from_secs)];
        let life = said.into_iter().flatten().min().unwrap_or(UNSAID).min(NO_EXPIRY);
        let usable_until = asked + life.checked_sub(MARGIN).filter(|left| !left.is_zero())?;
        // From half of its life, a little later for some, so that proxies do not renew together.
        let renew_at = asked + life.mul_f64(0.5 + 0.1 * fastrand::f64());
        let expires_at =
            issued_at.saturating_add(i64::try_from(life.as_secs()).unwrap_or(i64::MAX));
        let scope = answer.scope.clone();
        let (issuer, kid) = (issuer.map(Into::into), kid.map(Into::into));
        Some(Self {
            header,
            scope,
            issuer,
            kid,
            asked,
            renew_at,
            usable_until,
            issued_at,
            expires_at,
        })
    }
}

/// A JWT whose claims cannot be read.
#[derive(Debug, PartialEq, Eq)]
struct Unreadable;

/// Other implementations may fill up with `=` or leave bits behind the last byte.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What a token that is about to be sent says of itself: unverified, for its own bearer's planning and nothing else.
#[derive(Debug, Default, PartialEq, Eq)]
struct Peeked {
    /// `exp`, the earliest if there are several.
    end: Option<i64>,
    issuer: Option<String>,
    /// The key that has signed it.
    kid: Option<String>,
}

/// Nothing is known of what is no JWT. Everything but these members is passed over, whatever it is: what this reader
/// does not understand its audience may.
fn peek(token: &[u8]) -> Result<Peeked, Unreadable> {
    let Some(parts) = Parts::split(token) else { return Ok(Peeked::default()) };
    // Three parts alone make no JWT: other tokens have dots too.
    let Some(head) = read::<HashMap<String, Value>>(parts.head) else {
        return Ok(Peeked::default());
    };
    let kid = head.get("kid").and_then(Value::as_str).map(str::to_owned);
    let claims = read::<Peeked>(parts.payload).ok_or(Unreadable)?;
    Ok(Peeked { kid, ..claims })
}

fn read<T: DeserializeOwned>(part: &[u8]) -> Option<T> {
    serde_json::from_slice(&LENIENT.decode(part).ok()?).ok()
}

impl<'de> Deserialize<'de> for Peeked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PeekedVisitor)
    }
}

struct PeekedVisitor;

impl<'de> Visitor<'de> for PeekedVisitor {
    type Value = Peeked;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the claims of a token")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Peeked, A::Error> {
        let mut peeked = Peeked::default();
        while let Some(name) = map.next_key::<String>()? {
            match name.as_str() {
                "exp" => {
                    let end = map.next_value::<Seconds>()?.floor;
                    peeked.end = Some(peeked.end.map_or(end, |known| known.min(end)));
                }
                "iss" => peeked.issuer = map.next_value::<Value>()?.as_str().map(str::to_owned),
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(peeked)
    }
}

/// A token on disk. It holds a secret: no `Debug`.
#[derive(Clone, Serialize, Deserialize)]
pub struct StoredToken {
    callee: ServiceName,
    token: String,
    scope: ScopeSet,
    issued_at: i64,
    expires_at: i64,
}

impl StoredToken {
    /// Whether it was signed by a key that is none of `keys`, which its issuer had long after it was issued: nobody can
    /// verify it any more. `fetched` is when, seconds since 1970.
    #[must_use]
    pub fn is_orphan(&self, keys: &KeySet, fetched: i64) -> bool {
        let Ok(Peeked { kid: Some(kid), .. }) = peek(self.token.as_bytes()) else { return false };
        self.issued_at.saturating_add(ORPHANED_AFTER) < fetched && !keys.knows(&kid)
    }
}

/// Numbers for `infrar_token_*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenStats {
    /// Tokens received.
    pub received: u64,
    /// Questions without a token in the end, refusals included.
    pub failures: u64,
    /// For each callee how long its token may still be sent; `None` without one.
    pub left: Vec<(ServiceName, Option<Duration>)>,
}

/// All outbound tokens of this process.
pub struct Tokens {
    shared: Arc<Shared>,
    source: Arc<dyn TokenSource>,
    desk: Mutex<Desk>,
}

/// Which slots there are, and which of them read a file.
struct Desk {
    files: HashMap<ServiceName, PathBuf>,
    slots: HashMap<ServiceName, Arc<Slot>>,
}

struct Shared {
    supervisor: Supervisor,
    clock: Clock,
    changes: watch::Sender<u64>,
    received: AtomicU64,
    failures: AtomicU64,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("slots", &self.lock().slots.len()).finish_non_exhaustive()
    }
}

impl Tokens {
    /// Tokens from `source`, but those for services in `files` from their file.
    #[must_use]
    pub fn new(
        source: Arc<dyn TokenSource>,
        files: HashMap<ServiceName, PathBuf>,
        supervisor: Supervisor,
        clock: Clock,
    ) -> Self {
        let changes = watch::Sender::new(0);
        let (received, failures) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared { supervisor, clock, changes, received, failures });
        Self { shared, source, desk: Mutex::new(Desk { files, slots: HashMap::new() }) }
    }

    /// Takes the tokens for services in `files` from their file from now on, and those of all others from the source.
    /// Slots of services for which that is no change stay; of the others, whoever looks up the slot again gets a new
    /// one.
    pub fn read_from(&self, files: HashMap<ServiceName, PathBuf>) {
        let mut desk = self.lock();
        let before = std::mem::replace(&mut desk.files, files);
        let Desk { files, slots } = &mut *desk;
        slots.retain(|callee, _| before.get(callee) == files.get(callee));
    }

    /// The slot for a callee, until [`read_from`](Self::read_from) says where else its token comes from. Takes a lock:
    /// look it up when a snapshot is built, not for every request.
    #[must_use]
    pub fn slot(&self, callee: &ServiceName) -> Arc<Slot> {
        let mut desk = self.lock();
        if let Some(slot) = desk.slots.get(callee) {
            return slot.clone();
        }
        let file = desk.files.get(callee);
        let source = file
            .map_or_else(|| self.source.clone(), |path| Arc::new(TokenFile { path: path.clone() }));
        let slot = Slot::new(callee.clone(), source, file.is_some(), self.shared.clone());
        if let Some(path) = file {
            let watching = watch_file(Arc::downgrade(&slot), path.clone());
            self.shared.supervisor.spawn_until_end("token-file", watching);
        }
        desk.slots.insert(callee.clone(), slot.clone());
        slot
    }

    /// Renews at once every token that lacks a scope that `permissions` grants `me` now, so that a new grant does not
    /// wait for half a token's life. One that is taken away needs no renewal: it no longer counts at the callee.
    pub fn reconcile(&self, project: &Project, me: &ServiceName) {
        for slot in self.lock().slots.values() {
            let Some(bearer) = slot.bearer.load_full() else { continue };
            let granted = project.granted(me, &slot.callee);
            if !slot.from_file && granted.is_some_and(|granted| !bearer.scope.covers(granted)) {
                slot.ask();
            }
        }
    }

    /// Drops tokens of another issuer than `issuer`, which the project has now: nobody accepts them any more.
    pub fn issued_by(&self, issuer: &str) {
        self.discard("another issuer's", |bearer| {
            bearer.issuer.as_deref().is_some_and(|other| other != issuer)
        });
    }

    /// Drops tokens whose key is none of `keys`, if those are all the keys that the issuer had at `as_of` or later:
    /// nobody can verify them any more.
    pub fn signed_by(&self, keys: &KeySet, as_of: Instant) {
        self.discard("its key is gone", |bearer| {
            bearer.asked < as_of && bearer.unknown_key(keys).is_some()
        });
    }

    /// A key by which a token is signed and that `keys` do not have, if there is any.
    #[must_use]
    pub fn unknown_key(&self, keys: &KeySet) -> Option<String> {
        self.issued()
            .into_iter()
            .find_map(|(_, bearer)| bearer.unknown_key(keys).map(str::to_owned))
    }

    fn discard(&self, why: &'static str, is_worthless: impl Fn(&Bearer) -> bool) {
        for (slot, bearer) in self.issued() {
            if is_worthless(&bearer) {
                slot.discard(&bearer, why);
            }
        }
    }

    /// The tokens that the issuer gave, as far as any are there.
    fn issued(&self) -> Vec<(Arc<Slot>, Arc<Bearer>)> {
        let desk = self.lock();
        let slots = desk.slots.values().filter(|slot| !slot.from_file);
        slots.filter_map(|slot| Some((slot.clone(), slot.bearer.load_full()?))).collect()
    }

    /// Tells of every token that comes or is found worthless, so that they can be kept on disk as they are.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// The tokens that are worth keeping on disk: usable ones, and none that came from a file.
    #[must_use]
    pub fn snapshot(&self) -> Vec<StoredToken> {
        let now = Instant::now();
        let usable = self.issued().into_iter().filter(|(_, bearer)| bearer.is_usable(now));
        let stored = usable.map(|(slot, bearer)| StoredToken {
            callee: slot.callee.clone(),
            token: bearer.token().expose_secret().to_owned(),
            scope: bearer.scope.clone(),
            issued_at: bearer.issued_at,
            expires_at: bearer.expires_at,
        });
        stored.collect()
    }

    /// Takes tokens of an earlier run, but those that have expired since.
    pub fn restore(&self, stored: Vec<StoredToken>) {
        let (now, today) = (Instant::now(), self.shared.clock.unix_seconds());
        for token in stored {
            // A clock that was set back must not lengthen a life.
            let life = token.expires_at.saturating_sub(token.issued_at);
            let left = token.expires_at.saturating_sub(today).min(life);
            let answer = TokenAnswer {
                access_token: SecretString::from(token.token),
                expires_in: Some(Duration::from_secs(u64::try_from(left).unwrap_or(0))),
                scope: token.scope,
            };
            let slot = self.slot(&token.callee);
            if let Some(bearer) = Bearer::new(&answer, now, today).filter(|_| !slot.from_file) {
                slot.put(bearer);
            }
        }
    }

    /// Drops tokens that have expired by the wall clock, for as long as somebody holds them; to be run on the side
    /// runtime. Requests compare with a clock that costs nothing to read but stands still while the machine sleeps.
    pub fn follow_clock(self: &Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        let weak = Arc::downgrade(self);
        async move {
            while let Some(tokens) = weak.upgrade() {
                tokens.drop_expired(tokens.shared.clock.unix_seconds());
                drop(tokens);
                sleep(CLOCK_EVERY).await;
            }
        }
    }

    /// Drops the tokens that must not be sent any more at `now`, seconds since 1970.
    fn drop_expired(&self, now: i64) {
        let margin = i64::try_from(MARGIN.as_secs()).unwrap_or(i64::MAX);
        for slot in self.lock().slots.values() {
            let Some(bearer) = slot.bearer.load_full() else { continue };
            if bearer.expires_at.saturating_sub(margin) <= now {
                // Only this one: a fresh token may have come since the look.
                let _dropped = slot.bearer.compare_and_swap(&bearer, None);
            }
        }
    }

    /// Numbers for metrics.
    #[must_use]
    pub fn stats(&self) -> TokenStats {
        let now = Instant::now();
        let left = |slot: &Slot| {
            let bearer = slot.bearer.load();
            let bearer = bearer.as_ref().filter(|bearer| bearer.is_usable(now))?;
            Some(bearer.usable_until.duration_since(now))
        };
        TokenStats {
            received: self.shared.received.load(Ordering::Relaxed),
            failures: self.shared.failures.load(Ordering::Relaxed),
            left: self
                .lock()
                .slots
                .values()
                .map(|slot| (slot.callee.clone(), left(slot)))
                .collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The token for one callee. Shared by all workers.
pub struct Slot {
    callee: ServiceName,
    source: Arc<dyn TokenSource>,
    from_file: bool,
    shared: Arc<Shared>,
    bearer: ArcSwapOption<Bearer>,
    /// Whether anybody looked at the present token: only those are renewed.
    used: AtomicBool,
    state: Mutex<State>,
    /// Counts questions that have ended, however they did.
    ended: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    asking: bool,
    keeping: bool,
    failures: u32,
    /// The last failure, and until when it is the answer to everybody.
    failed: Option<(TokenUnavailable, Instant)>,
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("callee", &self.callee).finish_non_exhaustive()
    }
}

impl Slot {
    fn new(
        callee: ServiceName,
        source: Arc<dyn TokenSource>,
        from_file: bool,
        shared: Arc<Shared>,
    ) -> Arc<Self> {
        Arc::new(Self {
            callee,
            source,
            from_file,
            shared,
            bearer: ArcSwapOption::empty(),
            used: AtomicBool::new(false),
            state: Mutex::default(),
            ended: watch::Sender::new(0),
        })
    }

    /// For whom.
    #[must_use]
    pub fn callee(&self) -> &ServiceName {
        &self.callee
    }

    /// The token, if one lies ready. No lock, no wait.
    #[must_use]
    pub fn current(&self, now: Instant) -> Option<Arc<Bearer>> {
        self.with_current(now, Arc::clone)
    }

    /// As [`Slot::current`], lending the token instead of counting a reference, which all cores would share.
    pub fn with_current<T>(&self, now: Instant, read: impl FnOnce(&Arc<Bearer>) -> T) -> Option<T> {
        let bearer = self.bearer.load();
        let bearer = bearer.as_ref().filter(|bearer| bearer.is_usable(now))?;
        // Written once per token: a store for each request would share the line between cores.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(read(bearer))
    }

    /// The token, waited for when none lies ready. Whoever waits shares one question, and its failure; for a
    /// moment after a failure it is the answer at once. Cancel-safe; the question goes on without the asker.
    /// May be awaited on any runtime.
    ///
    /// # Errors
    /// [`TokenUnavailable`].
    pub async fn bearer(self: &Arc<Self>) -> Result<Arc<Bearer>, TokenUnavailable> {
        if let Some(bearer) = self.current(Instant::now()) {
            return Ok(bearer);
        }
        let mut ended = {
            let mut state = self.lock();
            let ended = self.ended.subscribe();
            // A question may have ended between the look and the lock.
            if let Some(bearer) = self.current(Instant::now()) {
                return Ok(bearer);
            }
            if !state.asking {
                state.refuse_early(Instant::now())?;
                self.begin(&mut state);
            }
            ended
        };
        // The other end lives in this slot, so it cannot be gone.
        let _told = ended.changed().await;
        if let Some(bearer) = self.current(Instant::now()) {
            return Ok(bearer);
        }
        let failed = self.lock().failed.clone();
        Err(failed.map_or(TokenUnavailable::Unusable, |(fault, _)| fault))
    }

    /// Told that its audience refuses this very token: it is dropped, and another one asked for. A token that has taken
    /// its place meanwhile stays.
    pub fn refused(self: &Arc<Self>, bearer: &Arc<Bearer>) {
        if self.discard(bearer, "its audience refuses it") {
            self.ask();
        }
    }

    /// Drops this very token, and asks for another if it was in use; says whether it was still there.
    fn discard(self: &Arc<Self>, bearer: &Arc<Bearer>, why: &'static str) -> bool {
        let found = self.bearer.compare_and_swap(bearer, None);
        let dropped = found.as_ref().is_some_and(|found| Arc::ptr_eq(found, bearer));
        if dropped {
            info!(callee = %self.callee, why, "a token is dropped before its end");
            self.shared.changes.send_modify(|count| *count += 1);
            if self.used.load(Ordering::Relaxed) {
                self.ask();
            }
        }
        dropped
    }

    /// Asks for a fresh token now, unless a question is under way.
    fn ask(self: &Arc<Self>) {
        let mut state = self.lock();
        if !state.asking {
            self.begin(&mut state);
        }
    }

    fn begin(self: &Arc<Self>, state: &mut State) {
        state.asking = true;
        // On the side runtime whoever asked, so that a worker or request that goes away does not take it along.
        let asking = Asking { slot: self.clone(), outcome: None };
        self.shared.supervisor.spawn_until_end("token", asking.carry());
    }

    fn put(self: &Arc<Self>, bearer: Bearer) {
        self.bearer.store(Some(Arc::new(bearer)));
        self.used.store(false, Ordering::Relaxed);
        let mut state = self.lock();
        (state.failures, state.failed) = (0, None);
        if !state.keeping && !self.from_file {
            state.keeping = true;
            self.shared.supervisor.spawn_until_end("token-keeper", keep(Arc::downgrade(self)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the keeper should do, or `None` when there is nothing left to keep.
    fn next_step(self: &Arc<Self>) -> Option<Step> {
        let now = Instant::now();
        // Listened to before the token is looked at, so that none falls between.
        let ended = self.ended.subscribe();
        let sleep = |until: Instant| Some(Step { ended: ended.clone(), until: Some(until) });
        let Some(bearer) = self.bearer.load_full().filter(|bearer| bearer.is_usable(now)) else {
            let mut state = self.lock();
            // Another token may have come before the lock.
            if self.bearer.load().as_ref().is_some_and(|bearer| bearer.is_usable(now)) {
                return sleep(now);
            }
            self.bearer.store(None);
            state.keeping = false;
            return None;
        };
        if now < bearer.renew_at {
            return sleep(bearer.renew_at.min(bearer.usable_until));
        }
        if !self.used.load(Ordering::Relaxed) {
            let look = bearer.usable_until.duration_since(now) / 8;
            let look = look.clamp(Duration::from_millis(250), Duration::from_secs(15));
            return sleep((now + look).min(bearer.usable_until));
        }
        let mut state = self.lock();
        if !state.asking {
            let early = state.failed.as_ref().map(|(_, until)| *until).filter(|until| now < *until);
            if let Some(until) = early {
                return sleep(until.min(bearer.usable_until));
            }
            self.begin(&mut state);
        }
        Some(Step { ended, until: None })
    }
}

impl State {
    fn refuse_early(&self, now: Instant) -> Result<(), TokenUnavailable> {
        match &self.failed {
            Some((fault, until)) if now < *until => Err(fault.clone()),
            _ => Ok(()),
        }
    }
}

/// What keeps a token fresh does next: it waits for a question to end, or no longer than until then.
struct Step {
    ended: watch::Receiver<u64>,
    until: Option<Instant>,
}

/// Renews a slot's token while it is used; ends when there is nothing left to renew.
async fn keep(slot: Weak<Slot>) {
    loop {
        let Some(step) = slot.upgrade().and_then(|slot| slot.next_step()) else { return };
        let Step { mut ended, until } = step;
        let due = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        // Another token may have come that must be renewed sooner than the one before.
        tokio::select! {
            _told = ended.changed() => {}
            () = due => {}
        }
    }
}

/// Reads a token file again whenever it is another one: content, or the link that a projected volume swaps.
async fn watch_file(slot: Weak<Slot>, path: PathBuf) {
    let mut seen = None;
    loop {
        let now = stamp(&path).await;
        let Some(slot) = slot.upgrade() else { return };
        if now.is_some() && now != seen {
            slot.ask();
        }
        drop(slot);
        seen = now;
        sleep(FILE_EVERY).await;
    }
}

async fn stamp(path: &Path) -> Option<(u64, u64, i64, i64)> {
    use std::os::unix::fs::MetadataExt;
    let file = tokio::fs::metadata(path).await.ok()?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
}

/// A question under way; whatever ends it, those who wait are told.
struct Asking {
    slot: Arc<Slot>,
    outcome: Option<Result<Bearer, TokenUnavailable>>,
}

impl Asking {
    async fn carry(mut self) {
        let shared = self.slot.shared.clone();
        let (asked, today) = (Instant::now(), shared.clock.unix_seconds());
        let answer = timeout(ASK_LIMIT, self.slot.source.ask(&self.slot.callee)).await;
        let answer = answer.unwrap_or(Err(TokenUnavailable::Deadline));
        let bearer = answer.and_then(|answer| {
            Bearer::new(&answer, asked, today).ok_or(TokenUnavailable::Unusable)
        });
        self.outcome = Some(bearer);
    }

    fn settle(&mut self) {
        let (slot, shared) = (&self.slot, &self.slot.shared);
        // Without an outcome the source panicked or the runtime ends.
        match self.outcome.take().unwrap_or(Err(TokenUnavailable::Unusable)) {
            Ok(bearer) => {
                if slot.lock().failures > 0 {
                    info!(callee = %slot.callee, "there are tokens again");
                }
                debug!(callee = %slot.callee, expires_at = bearer.expires_at, "token received");
                slot.put(bearer);
                shared.received.fetch_add(1, Ordering::Relaxed);
                shared.changes.send_modify(|count| *count += 1);
            }
            Err(fault) => {
                shared.failures.fetch_add(1, Ordering::Relaxed);
                let error = &fault as &dyn std::error::Error;
                let mut state = slot.lock();
                // Once per spell: it is asked for again every few seconds.
                if state.failures == 0 {
                    warn!(callee = %slot.callee, error, "no token");
                } else {
                    debug!(callee = %slot.callee, error, "still no token");
                }
                state.failures = state.failures.saturating_add(1);
                let until = Instant::now() + RETRY.pause(state.failures);
                state.failed = Some((fault, until));
            }
        }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.settle();
        self.slot.lock().asking = false;
        self.slot.ended.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use tokio::{runtime::Handle, time::advance};

    use super::*;
    use crate::identity::forge::base64url;

    const LIFE: Duration = Duration::from_secs(3600);

    #[derive(Default)]
    struct Issuer {
        asked: AtomicU32,
        down: AtomicBool,
        /// The life of its tokens, if it is not the usual one.
        seconds: AtomicU64,
        /// The key that signs, for tokens that are JWTs.
        kid: Mutex<Option<&'static str>>,
    }

    impl Issuer {
        fn asked(&self) -> u32 {
            self.asked.load(Ordering::SeqCst)
        }
    }

    struct Source(Arc<Issuer>);

    impl TokenSource for Source {
        fn ask(
            &self,
            audience: &ServiceName,
        ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
            let turn = self.0.asked.fetch_add(1, Ordering::SeqCst) + 1;
            let issuer = self.0.clone();
            let text = match *issuer.kid.lock().unwrap() {
                None => format!("{audience}-{turn}"),
                Some(kid) => {
                    let head = base64url(format!(r#"{{"kid":"{kid}"}}"#));
                    let claims =
                        format!(r#"{{"iss":"https://i","jti":"{turn}","exp":1900000000}}"#);
                    format!("{head}.{}.AA", base64url(claims))
                }
            };
            async move {
                sleep(Duration::from_millis(50)).await;
                if issuer.down.load(Ordering::SeqCst) {
                    return Err(TokenUnavailable::Deadline);
                }
                let scope = ScopeSet::parse_list("read:data").unwrap();
                let life = match issuer.seconds.load(Ordering::SeqCst) {
                    0 => LIFE,
                    seconds => Duration::from_secs(seconds),
                };
                Ok(TokenAnswer { access_token: text.into(), expires_in: Some(life), scope })
            }
            .boxed()
        }
    }

    fn here() -> Supervisor {
        Supervisor::new(Handle::current())
    }

    fn tokens(files: &[(&str, PathBuf)]) -> (Tokens, Arc<Issuer>) {
        let issuer = Arc::new(Issuer::default());
        let files =
            files.iter().map(|(name, path)| (name.parse().unwrap(), path.clone())).collect();
        let clock = Clock::starting_at(jiff::Timestamp::from_second(1_800_000_000).unwrap());
        let source = Arc::new(Source(issuer.clone()));
        (Tokens::new(source, files, here(), clock), issuer)
    }

    fn data() -> ServiceName {
        "data".parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_first_calls_cost_one_token() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        assert!(slot.current(Instant::now()).is_none());
        let calls = (0..10_000).map(|_| slot.bearer());
        let bearers = futures_util::future::join_all(calls).await;
        assert!(bearers.iter().all(|one| one.as_ref().unwrap().header() == "Bearer data-1"));
        assert_eq!(issuer.asked(), 1);
        assert!(slot.current(Instant::now()).unwrap().header().is_sensitive());
    }

    #[test]
    fn callers_on_other_threads_wait_for_the_same_token() {
        let side = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let _entered = side.enter();
        let (tokens, issuer) = tokens(&[]);
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let slot = tokens.slot(&data());
                std::thread::spawn(move || {
                    let worker =
                        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    worker.block_on(slot.bearer()).unwrap().header().clone()
                })
            })
            .collect();
        for worker in workers {
            assert_eq!(worker.join().unwrap(), "Bearer data-1");
        }
        assert_eq!(issuer.asked(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_in_use_is_renewed_from_half_its_life_and_an_idle_one_is_not() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        slot.bearer().await.unwrap();
        sleep(LIFE.mul_f64(0.49)).await;
        assert_eq!(issuer.asked(), 1);
        sleep(LIFE.mul_f64(0.12)).await;
        assert_eq!(issuer.asked(), 2);
        // Nobody has looked at the second one, so nobody needs a third. It was received after half a life at the earliest.
        sleep(LIFE.mul_f64(0.8)).await;
        assert_eq!(issuer.asked(), 2);
        // One look is enough, however late.
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer data-2");
        sleep(Duration::from_secs(20)).await;
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer data-3");
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_issuer_is_down_a_token_serves_until_five_seconds_before_its_end() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        let begun = Instant::now();
        slot.bearer().await.unwrap();
        issuer.down.store(true, Ordering::SeqCst);
        sleep_until(begun + LIFE - Duration::from_millis(5001)).await;
        assert_eq!(slot.bearer().await.unwrap().header(), "Bearer data-1");
        assert!(issuer.asked() > 10, "it must have tried: {}", issuer.asked());
        sleep_until(begun + LIFE - MARGIN).await;
        assert!(slot.current(Instant::now()).is_none());
        assert!(matches!(slot.bearer().await, Err(TokenUnavailable::Deadline)));
        issuer.down.store(false, Ordering::SeqCst);
        sleep(Duration::from_secs(6)).await;
        assert!(slot.bearer().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_shared_and_not_asked_for_again_at_once() {
        let (tokens, issuer) = tokens(&[]);
        issuer.down.store(true, Ordering::SeqCst);
        let slot = tokens.slot(&data());
        let calls = (0..100).map(|_| slot.bearer());
        let all = futures_util::future::join_all(calls).await;
        assert!(all.iter().all(Result::is_err));
        for _ in 0..100 {
            assert!(slot.bearer().await.is_err());
        }
        assert_eq!(issuer.asked(), 1);
        advance(Duration::from_millis(200)).await;
        assert!(slot.bearer().await.is_err());
        assert_eq!(issuer.asked(), 2);
        assert_eq!(tokens.stats().failures, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_gives_up_does_not_take_the_question_along() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        assert!(timeout(Duration::from_millis(1), slot.bearer()).await.is_err());
        sleep(Duration::from_millis(60)).await;
        assert!(slot.current(Instant::now()).is_some());
        assert_eq!(issuer.asked(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_panics_leaves_nobody_waiting() {
        struct Broken;
        impl TokenSource for Broken {
            fn ask(
                &self,
                _: &ServiceName,
            ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
                async { panic!("on purpose") }.boxed()
            }
        }
        let clock = Clock::system();
        let tokens = Tokens::new(Arc::new(Broken), HashMap::new(), here(), clock);
        let answer = tokens.slot(&data()).bearer().await;
        assert!(matches!(answer, Err(TokenUnavailable::Unusable)));
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_survive_a_restart_until_they_expire() {
        let (first, issuer) = tokens(&[]);
        first.slot(&data()).bearer().await.unwrap();
        let written = serde_json::to_string(&first.snapshot()).unwrap();
        sleep(Duration::from_secs(600)).await;
        issuer.down.store(true, Ordering::SeqCst);

        let restart = |after: i64| {
            let start = jiff::Timestamp::from_second(1_800_000_000 + after).unwrap();
            let source = Arc::new(Source(issuer.clone()));
            let clock = Clock::starting_at(start);
            let tokens = Tokens::new(source, HashMap::new(), here(), clock);
            tokens.restore(serde_json::from_str(&written).unwrap());
            tokens
        };
        let soon = restart(600);
        let slot = soon.slot(&data());
        let bearer = slot.current(Instant::now()).unwrap();
        assert_eq!(bearer.header(), "Bearer data-1");
        assert_eq!(bearer.usable_until() - Instant::now(), Duration::from_secs(2995));
        assert_eq!(soon.snapshot().len(), 1);
        assert!(restart(3596).slot(&data()).current(Instant::now()).is_none());
        // A clock that was set back does not lengthen a life.
        let back = restart(-86_400).slot(&data()).current(Instant::now()).unwrap();
        assert_eq!(back.usable_until() - Instant::now(), LIFE - MARGIN);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_grant_does_not_wait_for_half_a_life() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        slot.bearer().await.unwrap();
        let me: ServiceName = "web".parse().unwrap();
        let project = |scopes: &str| Project {
            name: "shop".parse().unwrap(),
            networking: crate::model::Networking {
                multi_cloud: true,
                default_mode: crate::model::NetworkMode::Public,
                connections: Vec::new(),
            },
            services: std::collections::BTreeMap::new(),
            permissions: [(me.clone(), [(data(), ScopeSet::parse_list(scopes).unwrap())].into())]
                .into(),
            issuers: Vec::new(),
            mode: crate::model::Enforcement::Enforce,
        };
        tokens.reconcile(&project("read:data"), &me);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(issuer.asked(), 1);
        tokens.reconcile(&project("read:data write:data"), &me);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(issuer.asked(), 2);
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer data-2");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_lives_shorter_than_the_one_before_is_renewed_ahead_too() {
        let (tokens, issuer) = tokens(&[]);
        issuer.seconds.store(86_400, Ordering::SeqCst);
        let slot = tokens.slot(&data());
        slot.bearer().await.unwrap();
        issuer.seconds.store(300, Ordering::SeqCst);
        slot.ask();
        sleep(Duration::from_secs(1)).await;
        // In use without a gap, as requests see it.
        for _ in 0..600 {
            assert!(slot.current(Instant::now()).is_some(), "{} were asked for", issuer.asked());
            sleep(Duration::from_secs(1)).await;
        }
        assert!(issuer.asked() > 4, "{}", issuer.asked());
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_expired_while_the_machine_slept_is_not_sent() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        let expires_at = slot.bearer().await.unwrap().expires_at();
        tokens.drop_expired(expires_at - 6);
        assert!(slot.current(Instant::now()).is_some());
        // The wall clock went on, the one that timers use did not.
        tokens.drop_expired(expires_at - 5);
        assert!(slot.current(Instant::now()).is_none());
        assert_eq!(slot.bearer().await.unwrap().header(), "Bearer data-2");
        assert_eq!(issuer.asked(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_spell_without_tokens_is_two_lines_in_the_log() {
        let (paper, _guard) = crate::telemetry::overhear("info");
        let (tokens, issuer) = tokens(&[]);
        issuer.down.store(true, Ordering::SeqCst);
        let slot = tokens.slot(&data());
        for _ in 0..10 {
            assert!(slot.bearer().await.is_err());
            sleep(Duration::from_secs(5)).await;
        }
        issuer.down.store(false, Ordering::SeqCst);
        slot.bearer().await.unwrap();
        let log = paper.text();
        assert_eq!(log.lines().count(), 2, "{log}");
        assert!(log.contains("no token callee=data error=the issuer gave no answer"), "{log}");
        assert!(log.contains("there are tokens again callee=data"), "{log}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_file_is_read_again_when_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "first\n").unwrap();
        let (tokens, issuer) = tokens(&[("data", path.clone())]);
        let slot = tokens.slot(&data());
        assert_eq!(slot.bearer().await.unwrap().header(), "Bearer first");
        let swap = folder.path().join("new");
        std::fs::write(&swap, "second").unwrap();
        std::fs::rename(&swap, &path).unwrap();
        sleep(Duration::from_secs(3)).await;
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer second");
        assert_eq!((issuer.asked(), tokens.snapshot().len()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn an_expired_token_in_a_file_is_not_sent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = |exp: i64| {
            format!("{}.{}.AA", base64url("{}"), base64url(format!(r#"{{"exp":{exp}}}"#)))
        };
        std::fs::write(&path, token(1_800_000_000 + 4)).unwrap();
        let (tokens, _issuer) = tokens(&[("data", path.clone())]);
        let slot = tokens.slot(&data());
        assert!(matches!(slot.bearer().await, Err(TokenUnavailable::Unusable)));
        let gone: ServiceName = "gone".parse().unwrap();
        assert_eq!(slot.callee(), &data());
        std::fs::write(&path, token(1_800_000_000 + 600)).unwrap();
        sleep(Duration::from_secs(6)).await;
        let left = slot.bearer().await.unwrap().usable_until() - Instant::now();
        assert!(left < Duration::from_secs(600), "{left:?}");
        assert!(tokens.slot(&gone).bearer().await.is_ok());
    }

    #[test]
    fn what_is_odd_in_a_token_makes_it_not_eternal() {
        let jwt = |payload: &str| format!("{}.{}.AA", base64url("{}"), base64url(payload));
        for (payload, end) in [
            (r#"{"exp":1700000000}"#, Ok(Some(1_700_000_000))),
            (r#"{"exp":1700000000.5}"#, Ok(Some(1_700_000_000))),
            (r#"{"exp":1.7e9,"scope":42,"aud":{}}"#, Ok(Some(1_700_000_000))),
            (r#"{"exp":1900000000,"exp":1700000000}"#, Ok(Some(1_700_000_000))),
            (r#"{"scope":42}"#, Ok(None)),
            (r#"{"exp":"1700000000"}"#, Err(Unreadable)),
            (r#"{"exp":null}"#, Err(Unreadable)),
            (r#"{"exp":1700000000"#, Err(Unreadable)),
            ("[]", Err(Unreadable)),
        ] {
            assert_eq!(peek(jwt(payload).as_bytes()).map(|said| said.end), end, "{payload}");
        }
        let padded = format!("{}.eyJleHAiOjF9Cg==.AA", base64url("{}"));
        assert_eq!(peek(padded.as_bytes()).unwrap().end, Some(1));
        // Not JWTs, although there are dots.
        for opaque in ["first", "v4.public.eyJleHAiOjF9", "a.b.c", "a..b", &base64url("{}")] {
            assert_eq!(peek(opaque.as_bytes()), Ok(Peeked::default()), "{opaque}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_lives_as_long_as_its_issuer_and_the_token_itself_both_say() {
        let issued = 1_800_000_000;
        let jwt = |left: i64| {
            let payload = format!(r#"{{"exp":{}}}"#, issued + left);
            format!("{}.{}.AA", base64url("{}"), base64url(payload))
        };
        let life = |token: String, said: Option<u64>| {
            let answer = TokenAnswer {
                access_token: token.into(),
                expires_in: said.map(Duration::from_secs),
                scope: ScopeSet::default(),
            };
            Bearer::new(&answer, Instant::now(), issued).map(|bearer| bearer.expires_at - issued)
        };
        assert_eq!(life(jwt(600), Some(3600)), Some(600));
        assert_eq!(life(jwt(3600), Some(600)), Some(600));
        assert_eq!(life(jwt(600), None), Some(600));
        assert_eq!(life("opaque".to_owned(), Some(600)), Some(600));
        assert_eq!(life("opaque".to_owned(), None), Some(300));
        assert_eq!(life(jwt(-1), Some(3600)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_its_audience_refuses_is_given_to_nobody_again() {
        let (tokens, issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        let dead = slot.bearer().await.unwrap();
        let mut changes = tokens.changes();
        for _ in 0..100 {
            slot.refused(&dead);
        }
        assert!(changes.has_changed().unwrap(), "what lies on disk is no longer right");
        changes.mark_unchanged();
        assert!(slot.current(Instant::now()).is_none() && tokens.snapshot().is_empty());
        let fresh = slot.bearer().await.unwrap();
        assert_eq!((fresh.header().to_str().unwrap(), issuer.asked()), ("Bearer data-2", 2));
        // Whoever still holds the old one says nothing about the new one.
        slot.refused(&dead);
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer data-2");
        assert_eq!(issuer.asked(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_goes_with_its_key_and_with_its_issuer() {
        let (tokens, issuer) = tokens(&[]);
        let keys = |kid: &str| {
            let key = crate::identity::forge::Forge::new(kid, crate::identity::Algorithm::EdDsa);
            KeySet::from_json(&crate::identity::forge::set(&[&key])).unwrap()
        };
        let slot = tokens.slot(&data());
        *issuer.kid.lock().unwrap() = Some("k1");
        let first = slot.bearer().await.unwrap();
        let received = Instant::now();
        assert_eq!(tokens.unknown_key(&keys("k1")), None);
        assert_eq!(tokens.unknown_key(&keys("k2")).as_deref(), Some("k1"));
        // Keys that are older than the token prove nothing against it.
        tokens.signed_by(&keys("k2"), received - LIFE / 2);
        tokens.signed_by(&keys("k1"), received);
        tokens.issued_by("https://i");
        assert!(Arc::ptr_eq(&slot.current(received).unwrap(), &first));
        *issuer.kid.lock().unwrap() = Some("k2");
        tokens.signed_by(&keys("k2"), received);
        assert!(slot.current(received).is_none());
        let second = slot.bearer().await.unwrap();
        assert_eq!((tokens.unknown_key(&keys("k2")), issuer.asked()), (None, 2));
        tokens.issued_by("https://moved");
        assert!(slot.current(received).is_none());
        assert!(!Arc::ptr_eq(&slot.bearer().await.unwrap(), &second));
    }

    #[tokio::test(start_paused = true)]
    async fn no_print_shows_a_token() {
        let (tokens, _issuer) = tokens(&[]);
        let slot = tokens.slot(&data());
        let bearer = slot.bearer().await.unwrap();
        let printed = format!("{tokens:?} {slot:?} {bearer:?} {:?}", bearer.header());
        assert!(!printed.contains("data-1"), "{printed}");
        assert_eq!(bearer.token().expose_secret(), "data-1");
    }

    #[test]
    fn questions_that_nobody_answers_hold_up_nothing_else() {
        let side = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        side.block_on(async {
            // Accepts, and says nothing.
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
            let client = Client::new(crate::api::ClientSettings::new(vec![url], None)).unwrap();
            let credential = Credential { client_id: data(), secret: "secret".into() };
            let source = Arc::new(ControlTokens::new(client, credential));
            let tokens = Tokens::new(source, HashMap::new(), here(), Clock::system());
            let (first, second) = (tokens.slot(&data()), tokens.slot(&"reports".parse().unwrap()));
            let looking_up_a_name = async {
                // Both questions have arrived, so both wait for their answers.
                let _held = (listener.accept().await.unwrap(), listener.accept().await.unwrap());
                tokio::task::spawn_blocking(|| "found").await.unwrap()
            };
            tokio::select! {
                found = looking_up_a_name => assert_eq!(found, "found"),
                _ = first.bearer() => unreachable!("nobody answers"),
                _ = second.bearer() => unreachable!("nobody answers"),
            }
        });
        side.shutdown_background();
    }

    #[test]
    fn a_missing_grant_is_told_apart_from_an_issuer_that_is_down() {
        let refused = |status: u16, code: &str| {
            TokenUnavailable::from(ClientError::Refused {
                status: http::StatusCode::from_u16(status).unwrap(),
                code: code.to_owned(),
                detail: None,
            })
        };
        assert!(refused(400, "invalid_target").is_permission());
        assert!(!refused(401, "invalid_client").is_permission());
        assert!(matches!(refused(503, "invalid_target"), TokenUnavailable::Unreachable(_)));
        let missing = TokenUnavailable::File {
            path: "/run/secrets/infrar".into(),
            source: Arc::new(io::ErrorKind::NotFound.into()),
        };
        assert!(missing.to_string().contains("/run/secrets/infrar"), "the log names the file");
        for (fault, begins) in [
            (refused(401, "invalid_client"), "wrong credential"),
            (refused(400, "invalid_target"), "the issuer refuses"),
            (refused(503, "temporarily_unavailable"), "the issuer is out of order"),
            (TokenUnavailable::Deadline, "the issuer cannot be reached"),
            (TokenUnavailable::NoSource, "no credential"),
            (missing, "no credential"),
        ] {
            let reason = fault.reason();
            assert!(reason.starts_with(begins), "{fault:?}: {reason}");
            assert!(!reason.contains('/') && !reason.contains("401"), "{reason}");
        }
    }
}
