//! The signing keys of all replicas: the store says which there are, each replica has them in its folder too.
//!
//! A replica that rotates makes a key and has it committed; when another was faster, that one's key stands and this one is
//! forgotten before it could sign. So verifiers who ask any replica know every key that any replica signs with.

use std::sync::Arc;

use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::Mutex,
    time::{Duration, MissedTickBehavior, interval},
};

use crate::{
    control::{
        book::{Book, Key},
        registry::Registry,
        reject::Rejection,
    },
    identity::{KeptKey, Mint, MintError},
    runtime::Clock,
    store::Write,
};

/// How often the keys are looked after.
const LOOK: Duration = Duration::from_secs(60);

/// Why the keys were not looked after.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeysError {
    #[error(transparent)]
    Mint(#[from] MintError),
    #[error("the store did not take the keys: {0}")]
    Store(Rejection),
}

/// The signing keys, here and in the store.
pub(super) struct Keys {
    mint: Arc<Mint>,
    registry: Arc<Registry>,
    clock: Clock,
    /// Held from the making of a key until the store has it or it is forgotten: following the store in between would
    /// forget it too early.
    busy: Mutex<()>,
}

impl Keys {
    /// Agrees with the store: its keys are ours, or ours its own when it has none.
    ///
    /// # Errors
    /// [`KeysError`].
    pub(super) async fn open(
        mint: Arc<Mint>,
        registry: Arc<Registry>,
        clock: Clock,
    ) -> Result<Arc<Self>, KeysError> {
        let keys = Arc::new(Self { mint, registry, clock, busy: Mutex::default() });
        if keys.are_strangers()? {
            keys.follow()?;
        }
        keys.publish().await?;
        Ok(keys)
    }

    /// Publishes a new key, which signs after the lead; gives the id of the key that will.
    ///
    /// # Errors
    /// [`KeysError`]; the old keys then stay in force.
    pub(super) async fn rotate(&self) -> Result<String, KeysError> {
        let _busy = self.busy.lock().await;
        self.mint.rotate(self.clock.now())?;
        self.publish().await?;
        // Another replica's, when that was faster.
        Ok(self.mint.coming(self.clock.now()))
    }

    /// Rotates when it is time and follows what other replicas do, until dropped.
    pub(super) async fn tend(self: Arc<Self>) {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut versions = self.registry.follow();
        loop {
            let tended = tokio::select! {
                _now = look.tick() => self.look().await,
                changed = versions.changed() => match changed {
                    Ok(()) => {
                        let _busy = self.busy.lock().await;
                        self.follow().map_err(KeysError::from)
                    }
                    Err(_gone) => return,
                },
            };
            if let Err(error) = tended {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "the signing keys were not looked after");
            }
        }
    }

    async fn look(&self) -> Result<(), KeysError> {
        let _busy = self.busy.lock().await;
        self.mint.tend(self.clock.now())?;
        self.publish().await
    }

    /// Whether the store has keys, and none of them is here: this folder is new, or of another store's past. What lies in
    /// it no verifier of this store knows, and a first key would sign at once.
    fn are_strangers(&self) -> Result<bool, MintError> {
        let version = self.registry.current();
        let known = version.book.keys();
        let ours = self.mint.kept()?;
        Ok(!known.is_empty() && ours.iter().all(|key| !known.contains_key(&key.name)))
    }

    /// Has the store agree with what is here, as far as it does not know better; afterwards this is what the store has.
    async fn publish(&self) -> Result<(), KeysError> {
        let ours = self.mint.kept()?;
        let (mint, now) = (Arc::clone(&self.mint), self.clock.now());
        let published = self
            .registry
            .change(move |draft| {
                let writes = differences(draft.book(), &ours, &mint, now);
                if writes.is_empty() { Ok(()) } else { draft.add(writes) }
            })
            .await;
        // Whatever came of it: a key that the store does not have must not come to sign.
        self.follow()?;
        published.map(drop).map_err(KeysError::Store)
    }

    /// Has here what the store has.
    fn follow(&self) -> Result<(), MintError> {
        let version = self.registry.current();
        let theirs = version.book.keys().iter();
        let theirs: Vec<KeptKey> = theirs
            .map(|(name, pem)| KeptKey {
                name: name.clone(),
                pem: SecretString::from(pem.expose_secret()),
            })
            .collect();
        self.mint.adopt(&theirs)
    }
}

/// A key, as the store keeps it.
pub(super) fn entry(key: &KeptKey) -> Write {
    Write::put(Key::Signing(&key.name).text(), key.pem.expose_secret())
}

/// What the store does not have yet, and what nobody needs any more.
fn differences(book: &Book, ours: &[KeptKey], mint: &Mint, now: Timestamp) -> Vec<Write> {
    let known = book.keys();
    let waiting = known.keys().any(|name| mint.is_waiting(name, now));
    // One for a time far ahead is of a clock that was wrong: nobody waits for it.
    let near = |name: &&String| {
        mint.is_waiting(name, now) || KeptKey::signs_from(name).is_some_and(|from| from <= now)
    };
    let newest = known.keys().filter(near).filter_map(|name| KeptKey::signs_from(name)).max();
    let new = ours.iter().filter(|key| {
        let second = waiting && mint.is_waiting(&key.name, now);
        // An older one that is not known was forgotten by another replica.
        let newer = KeptKey::signs_from(&key.name) > newest;
        !known.contains_key(&key.name) && !second && newer
    });
    let new = new.map(entry);
    let old = known.keys().filter(|name| mint.has_outlived(name));
    new.chain(old.map(|name| Write::remove(Key::Signing(name).text()))).collect()
}
