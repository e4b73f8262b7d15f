//! The control plane's signing keys: claims → signed token, and the public keys to check it with.
//!
//! The one idea: a key carries the moment from which it signs, and everything else follows from that. It is
//! published from the moment it exists, signs until its successor's moment comes, and stays published until
//! the last token it may have signed has expired. So a verifier that caches keys for less than
//! [`MintSettings::lead`] never meets a token whose key it has not seen.
//!
//! Clocks are set wrong and right again. A key whose moment lies further ahead than any rotation at `now` would have put
//! it was made under a wrong clock, or `now` is wrong: which of both, nobody can know. So it is kept and published, as
//! it may have signed, but nothing waits for it.
//!
//! Keys lie in one folder as PKCS#8 PEM files of mode 0600; the moment is part of the file name, the key id
//! (RFC 7638 thumbprint) is computed. Nothing here reads a clock: callers pass `now`.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode,
    jwk::{Jwk, JwkSet, PublicKeyUse, ThumbprintHash},
};
use quick_cache::sync::Cache;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    model::{ScopeSet, ServiceName},
    runtime::{PrivateFault, clear_leftovers, read_private, sha256, write_private},
};

/// The `typ` of our tokens (RFC 9068 §2.1).
const TOKEN_TYPE: &str = "at+jwt";
/// A key file beyond this is none of ours.
const KEY_FILE_LIMIT: u64 = 64 * 1024;
/// How far a verifier's clock may be off before a retired key is missed.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// The clock difference that is forgiven when our own tokens come back.
const LEEWAY: Duration = Duration::from_secs(30);

/// Own tokens whose signature need not be verified again; the least used go first.
const KNOWN: usize = 16 * 1024;

/// Why a key or token could not be made, kept or accepted.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// The key folder cannot be read or written.
    #[error("the signing keys at {} cannot be kept", path.display())]
    Storage {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file in the key folder is no key of ours, or not the one that its name says.
    #[error("{} is no signing key; move it away or restore it", path.display())]
    BrokenKey {
        /// The file.
        path: PathBuf,
    },
    /// A key that others may have read signs nothing.
    #[error(
        "{} can be read by others than its owner; give it mode 0600 if nobody has, or remove it to have a new key made",
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// A key could not be made.
    #[error("no signing key could be made")]
    Generate(#[source] rcgen::Error),
    /// A token could not be signed.
    #[error("the token could not be signed")]
    Sign(#[source] jsonwebtoken::errors::Error),
    /// A token is not one of ours, or not for this audience.
    #[error("the token is not valid here")]
    Invalid(#[source] jsonwebtoken::errors::Error),
    /// A token of ours that is used too late.
    #[error("the token has expired")]
    Expired,
}

/// How long keys and tokens live.
#[derive(Clone, Debug)]
pub struct MintSettings {
    /// Where the keys lie; made with mode 0700 if it is not there.
    pub folder: PathBuf,
    /// How long a token is good.
    pub lifetime: Duration,
    /// How long a new key is published before it signs; at least as long as verifiers cache the key set.
    pub lead: Duration,
    /// How long a key signs before the next one takes over.
    pub period: Duration,
}

impl MintSettings {
    /// Tokens of an hour; keys of 30 days, published 15 minutes ahead (verifiers cache for 10).
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            lifetime: Duration::from_secs(3600),
            lead: Duration::from_secs(15 * 60),
            period: Duration::from_secs(30 * 86_400),
        }
    }
}

/// A signed token.
#[derive(Debug)]
pub struct Minted {
    /// The bearer.
    pub token: SecretString,
    /// How long it is good.
    pub expires_in: Duration,
    /// Its `jti`, for the log.
    pub id: String,
}

/// What our tokens say (RFC 9068 §2.2; DESIGN "Tokens").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnClaims {
    /// The control plane's public URL.
    pub iss: String,
    /// The caller.
    pub sub: ServiceName,
    /// The caller again.
    pub client_id: ServiceName,
    /// The callee.
    pub aud: String,
    /// Expiry in Unix seconds.
    pub exp: i64,
    /// Issue in Unix seconds.
    pub iat: i64,
    /// The same moment: valid from the start.
    pub nbf: i64,
    /// Unique per token.
    pub jti: String,
    /// The scopes, space-separated (RFC 8693 §4.2).
    pub scope: String,
    /// The scopes again, for verifiers that expect a list.
    pub scopes: ScopeSet,
}

/// One signing key. Holds a secret: no `Debug`.
struct Key {
    signs_from: Timestamp,
    id: String,
    path: PathBuf,
    encoding: EncodingKey,
    decoding: DecodingKey,
    public: Jwk,
}

/// A signing key as it is kept elsewhere too, so that several control planes sign with the same ones. Holds a secret: no
/// `Debug`.
pub struct KeptKey {
    /// The name of its file, without the ending; says from when on it signs, and its id.
    pub name: String,
    /// The key itself, PKCS#8 in PEM.
    pub pem: SecretString,
}

impl KeptKey {
    /// From when on the key of this name signs; `None` for a name that no key of ours has.
    #[must_use]
    pub fn signs_from(name: &str) -> Option<Timestamp> {
        moment(name).map(|(signs_from, _)| signs_from)
    }
}

/// The signing keys. Signing takes no lock; rotation does.
pub struct Mint {
    settings: MintSettings,
    /// Sorted by `signs_from`; never empty.
    keys: ArcSwap<Vec<Arc<Key>>>,
    changing: Mutex<()>,
    /// Tokens whose signature was found good under the keys of a round, by the SHA-256 of their text.
    known: Cache<[u8; 32], (u64, Arc<OwnClaims>)>,
    /// Counts the changes of the keys.
    round: AtomicU64,
}

impl std::fmt::Debug for Mint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mint").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Mint {
    /// Reads the keys of the folder, or makes the first one. Blocks on the disk for a moment.
    ///
    /// # Errors
    /// [`MintError::Storage`], [`MintError::BrokenKey`] and [`MintError::Exposed`].
    pub fn open(settings: MintSettings, now: Timestamp) -> Result<Self, MintError> {
        let storage = |source| MintError::Storage { path: settings.folder.clone(), source };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&settings.folder)
            .map_err(storage)?;
        clear_leftovers(&settings.folder);
        let mut keys = Vec::new();
        for entry in fs::read_dir(&settings.folder).map_err(storage)? {
            let path = entry.map_err(storage)?.path();
            if path.extension().is_some_and(|extension| extension == "pem") {
                keys.push(Arc::new(Key::read(path)?));
            }
        }
        if keys.is_empty() {
            // Nobody has cached anything yet, so the first key signs at once; whichever comes next comes after it, were it
            // in the same second.
            let moment = sub(now, Duration::from_secs(1));
            keys.push(Arc::new(Key::make(&settings.folder, moment)?));
        }
        keys.sort_by_key(|key| key.signs_from);
        let mint = Self {
            settings,
            keys: ArcSwap::from_pointee(keys),
            changing: Mutex::new(()),
            known: Cache::new(KNOWN),
            round: AtomicU64::new(0),
        };
        mint.tend(now)?;
        Ok(mint)
    }

    /// Signs a token of `issuer` that lets `caller` use `scopes` at `audience`.
    ///
    /// # Errors
    /// [`MintError::Sign`].
    pub fn sign(
        &self,
        issuer: &str,
        caller: &ServiceName,
        audience: &str,
        scopes: &ScopeSet,
        now: Timestamp,
    ) -> Result<Minted, MintError> {
        let issued = now.as_second();
        let claims = OwnClaims {
            iss: issuer.to_owned(),
            sub: caller.clone(),
            client_id: caller.clone(),
            aud: audience.to_owned(),
            exp: add(now, self.settings.lifetime).as_second(),
            iat: issued,
            nbf: issued,
            jti: Uuid::now_v7().to_string(),
            scope: scopes.to_string(),
            scopes: scopes.clone(),
        };
        let keys = self.keys.load_full();
        let key = self.signing(&keys, now);
        let mut header = Header::new(Algorithm::ES256);
        header.typ = Some(TOKEN_TYPE.to_owned());
        header.kid = Some(key.id.clone());
        let token = encode(&header, &claims, &key.encoding).map_err(MintError::Sign)?;
        Ok(Minted { token: token.into(), expires_in: self.settings.lifetime, id: claims.jti })
    }

    /// Accepts a token that this mint has signed for `audience`, and nothing else.
    ///
    /// # Errors
    /// [`MintError::Invalid`] and [`MintError::Expired`].
    pub fn check(
        &self,
        token: &SecretString,
        issuer: &str,
        audience: &str,
        now: Timestamp,
    ) -> Result<OwnClaims, MintError> {
        let round = self.round.load(Ordering::Acquire);
        let mark = sha256(token.expose_secret().as_bytes());
        let claims = match self.known.get(&mark) {
            Some((found_in, claims)) if found_in == round => claims,
            Some(_) | None => {
                let claims = Arc::new(self.signed(token, issuer, audience)?);
                self.known.insert(mark, (round, Arc::clone(&claims)));
                claims
            }
        };
        // One that is known may be meant for others.
        if claims.iss != issuer || claims.aud != audience {
            return Err(MintError::Invalid(
                jsonwebtoken::errors::ErrorKind::InvalidAudience.into(),
            ));
        }
        if claims.exp <= sub(now, LEEWAY).as_second() {
            return Err(MintError::Expired);
        }
        if claims.nbf > add(now, LEEWAY).as_second() {
            return Err(MintError::Invalid(
                jsonwebtoken::errors::ErrorKind::ImmatureSignature.into(),
            ));
        }
        Ok(OwnClaims::clone(&claims))
    }

    /// What a token says that one of our keys has signed, whenever it is good.
    fn signed(
        &self,
        token: &SecretString,
        issuer: &str,
        audience: &str,
    ) -> Result<OwnClaims, MintError> {
        use jsonwebtoken::errors::ErrorKind;
        let refuse = |kind: ErrorKind| MintError::Invalid(kind.into());
        let token = token.expose_secret();
        let header = decode_header(token).map_err(MintError::Invalid)?;
        if header.typ.as_deref() != Some(TOKEN_TYPE) {
            return Err(refuse(ErrorKind::InvalidToken));
        }
        let keys = self.keys.load_full();
        let key = keys.iter().find(|key| header.kid.as_deref() == Some(&key.id));
        let key = key.ok_or_else(|| refuse(ErrorKind::InvalidSignature))?;
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[issuer]);
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
        // Compared by whoever asks, with its `now`.
        validation.validate_exp = false;
        let claims = decode::<OwnClaims>(token, &key.decoding, &validation);
        Ok(claims.map_err(MintError::Invalid)?.claims)
    }

    /// The public keys that a verifier needs now and until its next look.
    #[must_use]
    pub fn jwks(&self, now: Timestamp) -> JwkSet {
        let keys = self.keys.load_full();
        let retired = self.retired(&keys, now);
        JwkSet { keys: keys.iter().skip(retired).map(|key| key.public.clone()).collect() }
    }

    /// Publishes a new key that signs after [`MintSettings::lead`]; while one is waiting to sign, another
    /// rotation changes nothing. Returns the id of the key that will sign.
    ///
    /// # Errors
    /// [`MintError::Storage`] and [`MintError::Generate`]; the old keys then stay in force.
    pub fn rotate(&self, now: Timestamp) -> Result<String, MintError> {
        let changing = self.change();
        self.rotate_locked(now, &changing)
    }

    /// Every key, to be kept elsewhere. Blocks on the disk for a moment.
    ///
    /// # Errors
    /// [`MintError::Storage`], [`MintError::BrokenKey`] and [`MintError::Exposed`].
    pub fn kept(&self) -> Result<Vec<KeptKey>, MintError> {
        let keys = self.keys.load_full();
        keys.iter()
            .map(|key| Ok(KeptKey { name: name(&key.path), pem: content(&key.path)? }))
            .collect()
    }

    /// Has these keys and no others from now on; an empty list changes nothing. Blocks on the disk for a moment.
    ///
    /// # Errors
    /// [`MintError`]; the keys it has stay in force then.
    pub fn adopt(&self, kept: &[KeptKey]) -> Result<(), MintError> {
        let _changing = self.change();
        let before = self.keys.load_full();
        let mut keys = Vec::with_capacity(kept.len());
        for KeptKey { name: wanted, pem } in kept {
            let known = before.iter().find(|key| name(&key.path) == *wanted);
            if let Some(known) = known {
                keys.push(Arc::clone(known));
                continue;
            }
            let path = self.settings.folder.join(format!("{wanted}.pem"));
            write_private(&path, pem.expose_secret().as_bytes())
                .map_err(|source| MintError::Storage { path: path.clone(), source })?;
            keys.push(Arc::new(Key::read(path)?));
        }
        let same = keys.len() == before.len()
            && keys.iter().all(|key| before.iter().any(|known| Arc::ptr_eq(known, key)));
        if keys.is_empty() || same {
            return Ok(());
        }
        keys.sort_by_key(|key| key.signs_from);
        let staying: Vec<PathBuf> = keys.iter().map(|key| key.path.clone()).collect();
        self.put(Arc::new(keys));
        for key in before.iter().filter(|key| !staying.contains(&key.path)) {
            fs::remove_file(&key.path)
                .map_err(|source| MintError::Storage { path: key.path.clone(), source })?;
        }
        Ok(())
    }

    /// Whether the key of this name is published and about to sign.
    #[must_use]
    pub fn is_waiting(&self, name: &str, now: Timestamp) -> bool {
        moment(name).is_some_and(|(signs_from, _)| self.is_near(signs_from, now))
    }

    /// The id of the key that is about to sign, or that signs when none is.
    #[must_use]
    pub fn coming(&self, now: Timestamp) -> String {
        let keys = self.keys.load_full();
        let waiting = keys.iter().find(|key| self.waits(key, now));
        waiting.map_or_else(|| self.signing(&keys, now).id.clone(), |key| key.id.clone())
    }

    /// Whether the key of this name is older than all that are still needed.
    #[must_use]
    pub fn has_outlived(&self, name: &str) -> bool {
        let oldest = self.keys.load().first().map(|key| key.signs_from);
        moment(name).zip(oldest).is_some_and(|((signs_from, _), oldest)| signs_from < oldest)
    }

    /// Rotates when it is time, and forgets keys whose last token has expired. Call it every minute or so.
    ///
    /// # Errors
    /// [`MintError::Storage`] and [`MintError::Generate`]; the old keys then stay in force.
    pub fn tend(&self, now: Timestamp) -> Result<(), MintError> {
        let changing = self.change();
        let keys = self.keys.load_full();
        let newest = keys.iter().rev().find(|key| key.signs_from <= now);
        // Where no moment has come yet, the clock was wrong when the first key was made, or is now.
        let due = newest.is_none_or(|key| {
            let next = add(key.signs_from, self.settings.period.saturating_sub(self.settings.lead));
            next <= now
        });
        if due {
            self.rotate_locked(now, &changing)?;
        }
        let keys = self.keys.load_full();
        let retired = self.retired(&keys, now);
        if retired > 0 {
            self.put(Arc::new(keys.iter().skip(retired).cloned().collect()));
            for key in keys.iter().take(retired) {
                fs::remove_file(&key.path)
                    .map_err(|source| MintError::Storage { path: key.path.clone(), source })?;
            }
        }
        Ok(())
    }

    fn put(&self, keys: Arc<Vec<Arc<Key>>>) {
        self.keys.store(keys);
        // After the keys: whoever still verified by the old ones has found nothing for the new round.
        self.round.fetch_add(1, Ordering::Release);
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        // Nothing is left half done under this lock, so a panic of another holder does not matter.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rotate_locked(
        &self,
        now: Timestamp,
        _changing: &MutexGuard<'_, ()>,
    ) -> Result<String, MintError> {
        let keys = self.keys.load_full();
        if let Some(waiting) = keys.iter().find(|key| self.waits(key, now)) {
            return Ok(waiting.id.clone());
        }
        for key in keys.iter().filter(|key| key.signs_from > now) {
            tracing::warn!(
                key = key.id,
                signs_from = %key.signs_from,
                "a signing key is for a time far ahead: the clock is wrong now, or was when it was made; it is not waited for"
            );
        }
        // On disk before anybody sees it: a key that was published must survive a crash.
        let key = Key::make(&self.settings.folder, add(now, self.settings.lead))?;
        let id = key.id.clone();
        let mut grown = keys.as_ref().clone();
        grown.push(Arc::new(key));
        grown.sort_by_key(|key| key.signs_from);
        self.put(Arc::new(grown));
        Ok(id)
    }

    /// The key that signs at `now`: the newest whose moment has come. When the clock was set back before all of
    /// them, the oldest that is not just about to sign: verifiers have known it longest.
    fn signing<'a>(&self, keys: &'a [Arc<Key>], now: Timestamp) -> &'a Key {
        let come = keys.iter().rev().find(|key| key.signs_from <= now);
        let signing =
            come.or_else(|| keys.iter().find(|key| !self.waits(key, now))).or_else(|| keys.first());
        #[expect(
            clippy::expect_used,
            reason = "the list begins with one key and only ever drops keys that have a successor"
        )]
        signing.expect("a mint has at least one key")
    }

    /// Whether the key is published and about to sign: its moment is as near as a rotation puts it.
    fn waits(&self, key: &Key, now: Timestamp) -> bool {
        self.is_near(key.signs_from, now)
    }

    fn is_near(&self, signs_from: Timestamp, now: Timestamp) -> bool {
        signs_from > now && signs_from <= add(now, self.settings.lead + CLOCK_SKEW)
    }

    /// How many of the oldest keys have signed nothing that could still be valid.
    fn retired(&self, keys: &[Arc<Key>], now: Timestamp) -> usize {
        let kept = self.settings.lifetime + CLOCK_SKEW;
        keys.iter().skip(1).take_while(|successor| add(successor.signs_from, kept) <= now).count()
    }
}

impl Key {
    /// Makes a key and writes it down as `es256-SECONDS-ID.pem`.
    fn make(folder: &Path, signs_from: Timestamp) -> Result<Self, MintError> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(MintError::Generate)?;
        let pem = SecretString::from(pair.serialize_pem());
        // Whole seconds, as the file name keeps them.
        let seconds = signs_from.as_second();
        let signs_from = Timestamp::from_second(seconds).unwrap_or(signs_from);
        let mut key = Self::parse(PathBuf::new(), &pem, signs_from).map_err(MintError::Sign)?;
        key.path = folder.join(format!("es256-{seconds}-{}.pem", key.id));
        write_private(&key.path, pem.expose_secret().as_bytes())
            .map_err(|source| MintError::Storage { path: key.path.clone(), source })?;
        Ok(key)
    }

    fn read(path: PathBuf) -> Result<Self, MintError> {
        let pem = content(&path)?;
        let stem = name(&path);
        let key = moment(&stem).and_then(|(signs_from, id)| {
            let key = Self::parse(path.clone(), &pem, signs_from).ok()?;
            (key.id == id).then_some(key)
        });
        key.ok_or(MintError::BrokenKey { path })
    }

    fn parse(
        path: PathBuf,
        pem: &SecretString,
        signs_from: Timestamp,
    ) -> Result<Self, jsonwebtoken::errors::Error> {
        let encoding = EncodingKey::from_ec_pem(pem.expose_secret().as_bytes())?;
        let mut public = Jwk::from_encoding_key(&encoding, Algorithm::ES256)?;
        let id = public.thumbprint(ThumbprintHash::SHA256)?;
        public.common.key_id = Some(id.clone());
        public.common.public_key_use = Some(PublicKeyUse::Signature);
        let decoding = DecodingKey::from_jwk(&public)?;
        Ok(Self { signs_from, id, path, encoding, decoding, public })
    }
}

/// The name of a key's file, without the ending.
fn name(path: &Path) -> String {
    path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned()
}

/// From when on the key of this name signs, and its id. A negative moment would begin with the separator; no key is that old.
fn moment(name: &str) -> Option<(Timestamp, &str)> {
    let (seconds, id) = name.strip_prefix("es256-")?.split_once('-')?;
    Some((Timestamp::from_second(seconds.parse().ok()?).ok()?, id))
}

fn content(path: &Path) -> Result<SecretString, MintError> {
    let path = path.to_owned();
    let content = read_private(&path, KEY_FILE_LIMIT).map_err(|fault| match fault {
        PrivateFault::Io(source) => MintError::Storage { path: path.clone(), source },
        PrivateFault::Exposed => MintError::Exposed { path: path.clone() },
        PrivateFault::TooLarge => MintError::BrokenKey { path: path.clone() },
    })?;
    String::from_utf8(content)
        .map(SecretString::from)
        .map_err(|_binary| MintError::BrokenKey { path })
}

/// `now` and `span`; at the end of time, the end of time.
fn add(now: Timestamp, span: Duration) -> Timestamp {
    let span = SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX);
    now.checked_add(span).unwrap_or(Timestamp::MAX)
}

/// `now` less `span`; at the beginning of time, the beginning.
fn sub(now: Timestamp, span: Duration) -> Timestamp {
    let span = SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX);
    now.checked_sub(span).unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ISSUER: &str = "https://control.example:7070";

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn mint(folder: &Path) -> Mint {
        Mint::open(MintSettings::new(folder.join("keys")), at(0)).unwrap()
    }

    fn token(mint: &Mint, now: Timestamp) -> SecretString {
        let caller = "web-application".parse().unwrap();
        let scopes = ScopeSet::parse_list("write:query read:data").unwrap();
        mint.sign(ISSUER, &caller, "data-intelligence", &scopes, now).unwrap().token
    }

    fn kid(token: &SecretString) -> String {
        decode_header(token.expose_secret()).unwrap().kid.unwrap()
    }

    fn published(mint: &Mint, now: Timestamp) -> Vec<String> {
        let keys = mint.jwks(now).keys;
        keys.into_iter().map(|key| key.common.key_id.unwrap()).collect()
    }

    #[test]
    fn a_token_says_who_may_do_what_where_and_until_when() {
        let folder = tempfile::tempdir().unwrap();
        let mint = mint(folder.path());
        let token = token(&mint, at(0));
        let claims = mint.check(&token, ISSUER, "data-intelligence", at(10)).unwrap();
        assert_eq!(claims.sub.as_str(), "web-application");
        assert_eq!(claims.client_id, claims.sub);
        assert_eq!(claims.scope, "read:data write:query");
        assert_eq!((claims.iat, claims.nbf), (at(0).as_second(), at(0).as_second()));
        assert_eq!(claims.exp, at(3600).as_second());
        let header = decode_header(token.expose_secret()).unwrap();
        assert_eq!((header.alg, header.typ.as_deref()), (Algorithm::ES256, Some("at+jwt")));
    }

    #[test]
    fn a_token_for_somebody_else_or_from_another_time_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mint = mint(folder.path());
        let token = token(&mint, at(0));
        let audience = "data-intelligence";
        for (issuer, audience) in [("https://other", audience), (ISSUER, "reports")] {
            let refused = mint.check(&token, issuer, audience, at(0));
            assert!(matches!(refused, Err(MintError::Invalid(_))));
        }
        assert!(mint.check(&token, ISSUER, audience, at(3629)).is_ok());
        let late = mint.check(&token, ISSUER, audience, at(3630));
        assert!(matches!(late, Err(MintError::Expired)));
        let early = mint.check(&token, ISSUER, audience, at(-31));
        assert!(matches!(early, Err(MintError::Invalid(_))));
    }

    #[test]
    fn a_token_of_another_mint_is_refused() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let token = token(&mint(one.path()), at(0));
        let refused = mint(two.path()).check(&token, ISSUER, "data-intelligence", at(0));
        assert!(matches!(refused, Err(MintError::Invalid(_))));
    }

    #[test]
    fn keys_survive_a_restart_and_are_readable_by_their_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let token = token(&mint(folder.path()), at(0));
        let again = mint(folder.path());
        assert!(again.check(&token, ISSUER, "data-intelligence", at(0)).is_ok());
        let files: Vec<_> = fs::read_dir(folder.path().join("keys")).unwrap().collect();
        assert_eq!(files.len(), 1);
        for file in files {
            let mode = file.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn a_new_key_is_published_before_it_signs_and_the_old_one_after() {
        let folder = tempfile::tempdir().unwrap();
        let mint = mint(folder.path());
        let old = kid(&token(&mint, at(0)));
        let new = mint.rotate(at(100)).unwrap();
        assert_eq!(mint.rotate(at(101)).unwrap(), new, "one key waits at a time");
        assert_eq!(published(&mint, at(100)), [old.clone(), new.clone()]);

        let lead = 15 * 60;
        assert_eq!(kid(&token(&mint, at(100 + lead - 1))), old);
        assert_eq!(kid(&token(&mint, at(100 + lead))), new);

        // The old key's last token was signed just before, and lives an hour.
        let last = 100 + lead + 3600;
        assert_eq!(published(&mint, at(last)), [old, new.clone()]);
        mint.tend(at(last + 300)).unwrap();
        assert_eq!(published(&mint, at(last + 300)), [new]);
        assert_eq!(fs::read_dir(folder.path().join("keys")).unwrap().count(), 1);
    }

    #[test]
    fn keys_rotate_by_themselves_after_their_period() {
        let folder = tempfile::tempdir().unwrap();
        let mint = mint(folder.path());
        let old = kid(&token(&mint, at(0)));
        let period = 30 * 86_400;
        mint.tend(at(period - 15 * 60 - 2)).unwrap();
        assert_eq!(published(&mint, at(0)).len(), 1);
        mint.tend(at(period - 15 * 60)).unwrap();
        assert_eq!(kid(&token(&mint, at(period - 1))), old);
        assert_ne!(kid(&token(&mint, at(period))), old);
    }

    #[test]
    fn a_clock_that_was_set_back_still_signs() {
        let folder = tempfile::tempdir().unwrap();
        let mint = mint(folder.path());
        let token = token(&mint, at(-86_400));
        assert!(mint.check(&token, ISSUER, "data-intelligence", at(-86_400)).is_ok());
    }

    #[test]
    fn a_glimpse_of_a_clock_far_ahead_does_not_end_the_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let mint = mint(folder.path());
        let old = kid(&token(&mint, at(0)));
        let (lead, century) = (15 * 60, 100 * 365 * 86_400);
        mint.tend(at(century)).unwrap();
        assert_eq!(fs::read_dir(folder.path().join("keys")).unwrap().count(), 2);
        // Right again: the key of that day is no answer to whoever asks for another one.
        let again = |mint: &Mint, now: i64| {
            mint.tend(at(now)).unwrap();
            let new = mint.rotate(at(now)).unwrap();
            assert_eq!(mint.rotate(at(now + 60)).unwrap(), new, "one key waits at a time");
            assert_eq!(kid(&token(mint, at(now + lead))), new);
            new
        };
        let first = again(&mint, 100);
        assert_ne!(first, old);
        // Nor is it after a restart, and time rotates keys by itself.
        let reopened = Mint::open(MintSettings::new(folder.path().join("keys")), at(5000)).unwrap();
        let second = again(&reopened, 6000);
        let period = 30 * 86_400;
        reopened.tend(at(6000 + lead + period - lead)).unwrap();
        assert_ne!(kid(&token(&reopened, at(6000 + lead + period))), second);
    }

    #[test]
    fn a_first_key_that_was_made_under_a_clock_far_ahead_signs_until_the_next_has_been_published() {
        let folder = tempfile::tempdir().unwrap();
        let settings = || MintSettings::new(folder.path().join("keys"));
        let century = 100 * 365 * 86_400;
        let first = kid(&token(&Mint::open(settings(), at(century)).unwrap(), at(century)));
        let mint = Mint::open(settings(), at(0)).unwrap();
        assert_eq!(published(&mint, at(0)).len(), 2);
        assert_eq!(kid(&token(&mint, at(15 * 60 - 1))), first);
        assert_ne!(kid(&token(&mint, at(15 * 60))), first);
    }

    #[test]
    fn a_glimpse_of_a_clock_far_behind_takes_no_key_away() {
        let folder = tempfile::tempdir().unwrap();
        let mint = mint(folder.path());
        mint.rotate(at(0)).unwrap();
        let (before, lead) = (token(&mint, at(1000)), 15 * 60);
        mint.tend(at(-20 * 86_400)).unwrap();
        mint.tend(at(1000)).unwrap();
        assert!(mint.check(&before, ISSUER, "data-intelligence", at(1000)).is_ok());
        assert_eq!(kid(&token(&mint, at(lead + 1))), kid(&before));
    }

    #[test]
    fn a_file_that_is_no_key_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("keys");
        fs::create_dir(&keys).unwrap();
        write_private(&keys.join("es256-1800000000-x.pem"), b"nothing").unwrap();
        let error = Mint::open(MintSettings::new(keys), at(0)).unwrap_err();
        assert!(error.to_string().contains("es256-1800000000-x.pem"), "{error}");
    }

    #[test]
    fn a_key_that_others_can_read_or_under_a_wrong_name_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("keys");
        drop(mint(folder.path()));
        let path = fs::read_dir(&keys).unwrap().next().unwrap().unwrap().path();
        let open = || Mint::open(MintSettings::new(keys.clone()), at(0));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = open().unwrap_err();
        assert!(matches!(&error, MintError::Exposed { path: named } if *named == path), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(open().is_ok());
        // Somebody else's key put in its place.
        let other = tempfile::tempdir().unwrap();
        drop(mint(other.path()));
        let theirs = fs::read_dir(other.path().join("keys")).unwrap().next().unwrap().unwrap();
        fs::copy(theirs.path(), &path).unwrap();
        let error = open().unwrap_err();
        assert!(
            matches!(&error, MintError::BrokenKey { path: named } if *named == path),
            "{error}"
        );
    }

    #[test]
    fn what_a_killed_process_left_half_written_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        drop(mint(folder.path()));
        let leftover = folder.path().join("keys").join(format!(".{}.tmp", Uuid::now_v7()));
        fs::write(&leftover, "half a key").unwrap();
        drop(mint(folder.path()));
        assert!(!leftover.exists());
    }
}
