//! Bearer → Claims.
//!
//! A token is looked at in the order of what each step costs: its shape, its header, what it claims, and only
//! then its signature. The issuer is compared to the letter before a key is chosen, and the key, not the
//! token, says which algorithm verifies it. Nothing that a token points at (`jku`, `x5u`) is ever fetched.
//!
//! Nothing here waits: an unknown key is a fault, and whoever may wait asks [`Verifier::refresh`] and tries
//! once more. `now` is an argument, so a test can replay any moment.

use std::{
    borrow::Cow,
    fmt,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::HeaderValue;
use quick_cache::{Weighter, unsync::Cache};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use smallvec::SmallVec;

use crate::{
    identity::{
        json::{Members, Seconds, Strings, Text, Unused},
        jwks::{Jwks, Refreshed},
        keys::{Algorithm, KeyFault, KeyId, MAX_KID},
        policy::scopes_header,
    },
    model::{Scope, ScopeSet, ServiceName},
    runtime::sha256,
};

/// The longest token that is looked at.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// How far clocks may be apart, for `exp` and `nbf`.
pub const LEEWAY_SECONDS: i64 = 30;
/// The longest subject of another issuer.
const MAX_SUBJECT: usize = 255;

/// Why a token proves nothing. Carries no part of the token but the id of a key that was not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenFault {
    /// There is no token.
    #[error("no bearer token")]
    Missing,
    /// More than 8 KiB.
    #[error("the token is too long")]
    Oversized,
    /// Not three base64url parts with strict JSON in them, or a claim of the wrong type.
    #[error("the token is malformed")]
    Malformed,
    /// The header asks for what is never done: `crit`, `b64`, or a key that the token brings itself.
    #[error("the token's header asks for what is not supported")]
    HeaderNotAllowed,
    /// Not one of ES256, ES384, RS256, PS256, EdDSA, or not the key's own.
    #[error("the token's algorithm is not allowed")]
    AlgorithmNotAllowed,
    /// The issuer has published no such key, as far as is known here.
    #[error("the token's key is not known")]
    UnknownKey {
        /// Whose key.
        issuer: Arc<str>,
        /// Its id; empty when the token names none.
        kid: String,
    },
    /// The signature is not the key's.
    #[error("the token's signature is wrong")]
    BadSignature,
    /// No issuer that is trusted here, or none named.
    #[error("the token is of another issuer")]
    WrongIssuer,
    /// Issued for somebody else, or for nobody.
    #[error("the token is for another audience")]
    WrongAudience,
    /// `exp` has passed.
    #[error("the token has expired")]
    Expired,
    /// There is no `exp`.
    #[error("the token has no expiry")]
    NoExpiry,
    /// `nbf` has not come.
    #[error("the token is not valid yet")]
    NotYetValid,
    /// No `sub`, or one that cannot be a name.
    #[error("the token names no subject")]
    NoSubject,
    /// Our own issuer's access tokens are `at+jwt` (RFC 9068 §2.1), and this is not.
    #[error("the token is no access token")]
    Type,
}

impl TokenFault {
    /// The fault in one word, for a metric's label.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Oversized => "oversized",
            Self::Malformed => "malformed",
            Self::HeaderNotAllowed => "header",
            Self::AlgorithmNotAllowed => "algorithm",
            Self::UnknownKey { .. } => "unknown_key",
            Self::BadSignature => "signature",
            Self::WrongIssuer => "issuer",
            Self::WrongAudience => "audience",
            Self::Expired => "expired",
            Self::NoExpiry => "no_expiry",
            Self::NotYetValid => "not_yet_valid",
            Self::NoSubject => "subject",
            Self::Type => "type",
        }
    }
}

/// Whom a token speaks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// A caller that `permissions` can name: the token is our own issuer's.
    Ours(ServiceName),
    /// Whoever another issuer says it is, as `ISSUER#SUBJECT`: its subjects may be named like our services, and are
    /// somebody else.
    Foreign(Box<str>),
}

impl Caller {
    /// A name that nobody else has: the service, or issuer and subject of another issuer's token. No service's name has
    /// a `#` in it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Ours(name) => name.as_str(),
            Self::Foreign(name) => name,
        }
    }

    /// The name under which `permissions` may have a row for it: those are for our own callers.
    #[must_use]
    pub fn ours(&self) -> Option<&ServiceName> {
        match self {
            Self::Ours(name) => Some(name),
            Self::Foreign(_) => None,
        }
    }
}

/// What a verified token says. Only [`Verifier`] builds one.
#[derive(Clone, Debug)]
pub struct Claims {
    issuer: Arc<str>,
    caller: Caller,
    audiences: SmallVec<[Box<str>; 1]>,
    for_everyone_here: bool,
    scopes: ScopeSet,
    expires_at: i64,
    not_before: Option<i64>,
    key: KeyId,
    caller_header: HeaderValue,
    scopes_header: HeaderValue,
    claims_header: HeaderValue,
}

impl Claims {
    /// Who issued it.
    #[must_use]
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// Whether the project's own issuer did.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        matches!(self.caller, Caller::Ours(_))
    }

    /// For whom it speaks.
    #[must_use]
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// The names in its `aud`.
    pub fn audiences(&self) -> impl Iterator<Item = &str> {
        self.audiences.iter().map(AsRef::as_ref)
    }

    /// Whether it was issued for `audience`; the audiences that an issuer's own list accepts stand for every
    /// service here.
    #[must_use]
    pub fn is_for(&self, audience: &str) -> bool {
        self.for_everyone_here || self.audiences().any(|name| name == audience)
    }

    /// The scopes in the token; what counts of them is for the policy to say.
    #[must_use]
    pub fn scopes(&self) -> &ScopeSet {
        &self.scopes
    }

    /// `exp`, seconds since 1970.
    #[must_use]
    pub fn expires_at(&self) -> i64 {
        self.expires_at
    }

    /// The value of `infrar-caller`.
    #[must_use]
    pub fn caller_header(&self) -> &HeaderValue {
        &self.caller_header
    }

    /// The token's scopes, space separated. `infrar-scopes` is [`crate::identity::Grant::scopes`].
    #[must_use]
    pub fn scopes_header(&self) -> &HeaderValue {
        &self.scopes_header
    }

    /// The value of `infrar-claims`: the payload, base64url, as it was signed.
    #[must_use]
    pub fn claims_header(&self) -> &HeaderValue {
        &self.claims_header
    }

    /// What it takes in memory, about.
    fn bytes(&self) -> usize {
        let headers = [&self.caller_header, &self.scopes_header, &self.claims_header];
        let headers = headers.into_iter().map(HeaderValue::len).sum::<usize>();
        let audiences = self.audiences().map(str::len).sum::<usize>();
        let scopes = self.scopes.iter().map(|scope| scope.as_str().len() + 32).sum::<usize>();
        // Beside its own size, the fingerprint twice and what the cache notes of each entry.
        size_of::<Self>() + 128 + headers + self.caller.as_str().len() + audiences + scopes
    }

    /// Whether it may be used at `now`, seconds since 1970.
    fn in_time(&self, now: i64) -> Result<(), TokenFault> {
        in_time(self.expires_at, self.not_before, now)
    }
}

fn in_time(expires_at: i64, not_before: Option<i64>, now: i64) -> Result<(), TokenFault> {
    if now >= expires_at.saturating_add(LEEWAY_SECONDS) {
        return Err(TokenFault::Expired);
    }
    if not_before.is_some_and(|begin| begin > now.saturating_add(LEEWAY_SECONDS)) {
        return Err(TokenFault::NotYetValid);
    }
    Ok(())
}

/// An issuer whose tokens are accepted.
#[derive(Clone)]
pub struct Trusted {
    /// Its `iss`, to the letter.
    pub issuer: Arc<str>,
    /// Whether it is the project's own.
    pub ours: bool,
    /// Audiences that stand for every service here, besides the service's own name: `api://shop`, and never the name of
    /// a service, which stands for that service alone.
    pub audiences: Vec<String>,
    /// Its keys.
    pub keys: Arc<Jwks>,
}

impl Trusted {
    /// Whether one of the names in a token's `aud` stands for every service here.
    fn is_for_everyone<'a>(&self, mut audiences: impl Iterator<Item = &'a str>) -> bool {
        audiences.any(|name| self.audiences.iter().any(|own| own == name))
    }
}

/// Verifies tokens of the issuers that are trusted. Immutable; built anew when the list of issuers changes.
pub struct Verifier {
    trusted: Vec<Trusted>,
    serial: u64,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let issuers: Vec<&str> = self.trusted.iter().map(|one| one.issuer.as_ref()).collect();
        f.debug_struct("Verifier").field("issuers", &issuers).finish_non_exhaustive()
    }
}

impl Verifier {
    /// A verifier for these issuers; an issuer without a name is never trusted.
    #[must_use]
    pub fn new(trusted: Vec<Trusted>) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let trusted = trusted.into_iter().filter(|one| !one.issuer.is_empty()).collect();
        Self { trusted, serial: SERIAL.fetch_add(1, Ordering::Relaxed) }
    }

    /// The keys of an issuer, if it is trusted.
    #[must_use]
    pub fn keys_of(&self, issuer: &str) -> Option<&Arc<Jwks>> {
        self.trusted.iter().find(|one| *one.issuer == *issuer).map(|one| &one.keys)
    }

    /// Looks for a key that was not known: `true` when it is worth verifying once more. Waits for at most one
    /// fetch, which runs on the side runtime; see [`Jwks::refresh_for`]. Cancel-safe.
    pub async fn refresh(&self, fault: &TokenFault) -> bool {
        let TokenFault::UnknownKey { issuer, kid } = fault else { return false };
        let Some(keys) = self.keys_of(issuer) else { return false };
        keys.refresh_for(kid).await == Refreshed::Changed
    }

    /// Verifies a token (RFC 7515, RFC 7519, RFC 9068) for one of `audience` at `now`, seconds since 1970.
    ///
    /// # Errors
    /// [`TokenFault`], in the order of what each step costs; the signature comes last.
    pub fn verify(&self, token: &[u8], audience: &[&str], now: i64) -> Result<Claims, TokenFault> {
        if token.is_empty() {
            return Err(TokenFault::Missing);
        }
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenFault::Oversized);
        }
        let parts = Parts::split(token).ok_or(TokenFault::Malformed)?;
        let head_json = unbase64(parts.head)?;
        let head: Head<'_> = strict(&head_json)?;
        let algorithm = head.check()?;
        let body_json = unbase64(parts.payload)?;
        let body: Body<'_> = strict(&body_json)?;

        let issuer = body.issuer.as_ref().ok_or(TokenFault::WrongIssuer)?;
        let trusted = self.trusted.iter().find(|one| *one.issuer == *issuer.0);
        let trusted = trusted.ok_or(TokenFault::WrongIssuer)?;
        if trusted.ours && !head.is_access_token() {
            return Err(TokenFault::Type);
        }
        let subject = body.subject.as_ref().ok_or(TokenFault::NoSubject)?;
        let caller = read_caller(&subject.0, trusted)?;
        let named = |list: &[Cow<'_, str>]| list.iter().any(|name| audience.contains(&&**name));
        let for_everyone_here = trusted.is_for_everyone(body.audience.0.iter().map(AsRef::as_ref));
        if !for_everyone_here && !named(&body.audience.0) {
            return Err(TokenFault::WrongAudience);
        }
        let expires_at = body.expires_at.ok_or(TokenFault::NoExpiry)?;
        in_time(expires_at, body.not_before, now)?;

        let keys = trusted.keys.load();
        let kid = head.kid.as_ref().map(|Text(kid)| kid.as_ref());
        let key = keys.find(kid, algorithm).map_err(|fault| match fault {
            KeyFault::OtherAlgorithm => TokenFault::AlgorithmNotAllowed,
            KeyFault::Unknown => TokenFault::UnknownKey {
                issuer: trusted.issuer.clone(),
                kid: kid.unwrap_or_default().to_owned(),
            },
        })?;
        let signature = unbase64(parts.signature)?;
        if !key.verifies(parts.signed, &signature) {
            return Err(TokenFault::BadSignature);
        }

        let scopes = body.scopes(trusted.ours)?;
        let header =
            |text: &[u8]| HeaderValue::from_bytes(text).map_err(|_source| TokenFault::Malformed);
        Ok(Claims {
            issuer: trusted.issuer.clone(),
            caller_header: header(caller.as_str().as_bytes())?,
            scopes_header: scopes_header(&scopes),
            claims_header: header(parts.payload)?,
            caller,
            audiences: body.audience.0.iter().map(|name| Box::from(name.as_ref())).collect(),
            for_everyone_here,
            scopes,
            expires_at,
            not_before: body.not_before,
            key: key.id(),
        })
    }

    /// Changes whenever a token that was verified might no longer be.
    fn generation(&self) -> (u64, u64) {
        (self.serial, self.trusted.iter().map(|one| one.keys.generation()).sum())
    }

    /// Whether the key of `claims` is still one of its issuer's, and the issuer still trusted.
    fn still_trusts(&self, claims: &Claims) -> bool {
        self.trusted.iter().any(|one| {
            one.issuer == claims.issuer
                && one.ours == claims.is_ours()
                && one.keys.load().has(claims.key)
                && one.is_for_everyone(claims.audiences()) == claims.for_everyone_here
        })
    }
}

/// Our own subjects are names that `permissions` can hold; others any printable text behind their issuer's.
fn read_caller(subject: &str, trusted: &Trusted) -> Result<Caller, TokenFault> {
    if trusted.ours {
        return subject.parse().map(Caller::Ours).map_err(|_source| TokenFault::NoSubject);
    }
    let printable = subject.bytes().all(|byte| matches!(byte, 0x21..=0x7e));
    if subject.is_empty() || subject.len() > MAX_SUBJECT || !printable {
        return Err(TokenFault::NoSubject);
    }
    Ok(Caller::Foreign(format!("{}#{subject}", trusted.issuer).into()))
}

/// The three parts of a compact JWS (RFC 7515 §7.1).
pub(super) struct Parts<'a> {
    pub(super) head: &'a [u8],
    pub(super) payload: &'a [u8],
    signature: &'a [u8],
    signed: &'a [u8],
}

impl<'a> Parts<'a> {
    pub(super) fn split(token: &'a [u8]) -> Option<Self> {
        let mut parts = token.split(|byte| *byte == b'.');
        let (head, payload, signature) = (parts.next()?, parts.next()?, parts.next()?);
        let signed = token.get(..head.len() + 1 + payload.len())?;
        let whole = !head.is_empty() && !payload.is_empty() && !signature.is_empty();
        (whole && parts.next().is_none()).then_some(Self { head, payload, signature, signed })
    }
}

/// RFC 7515 §2: without padding; bits that belong to no byte must be zero.
fn unbase64(part: &[u8]) -> Result<Vec<u8>, TokenFault> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_source| TokenFault::Malformed)
}

fn strict<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, TokenFault> {
    serde_json::from_slice(json).map_err(|_source| TokenFault::Malformed)
}

/// The JOSE header, as far as it is looked at.
#[derive(Default)]
struct Head<'a> {
    algorithm: Option<Text<'a>>,
    kid: Option<Text<'a>>,
    kind: Option<Text<'a>>,
    forbidden: bool,
}

impl Head<'_> {
    fn check(&self) -> Result<Algorithm, TokenFault> {
        if self.forbidden {
            return Err(TokenFault::HeaderNotAllowed);
        }
        if self.kid.as_ref().is_some_and(|Text(kid)| kid.is_empty() || kid.len() > MAX_KID) {
            return Err(TokenFault::Malformed);
        }
        let Text(name) = self.algorithm.as_ref().ok_or(TokenFault::Malformed)?;
        Algorithm::named(name).ok_or(TokenFault::AlgorithmNotAllowed)
    }

    /// RFC 9068 §2.1, in either of the spellings of RFC 7515 §4.1.9.
    fn is_access_token(&self) -> bool {
        self.kind.as_ref().is_some_and(|Text(kind)| {
            kind.eq_ignore_ascii_case("at+jwt") || kind.eq_ignore_ascii_case("application/at+jwt")
        })
    }
}

impl<'de> Deserialize<'de> for Head<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeadVisitor)
    }
}

struct HeadVisitor;

impl<'de> Visitor<'de> for HeadVisitor {
    type Value = Head<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JOSE header")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut head, mut members) = (Head::default(), Members::default());
        while let Some(name) = members.next(&mut map)? {
            match name {
                "alg" => head.algorithm = Some(map.next_value()?),
                "kid" => head.kid = Some(map.next_value()?),
                "typ" => head.kind = Some(map.next_value()?),
                "crit" | "b64" | "jku" | "jwk" | "x5u" | "x5c" | "zip" | "enc" => {
                    head.forbidden = true;
                    map.next_value_seed(Unused)?;
                }
                _ => map.next_value_seed(Unused)?,
            }
        }
        Ok(head)
    }
}

/// The claims, as far as they are looked at.
#[derive(Default)]
struct Body<'a> {
    issuer: Option<Text<'a>>,
    subject: Option<Text<'a>>,
    audience: Strings<'a>,
    expires_at: Option<i64>,
    not_before: Option<i64>,
    /// `scope` (RFC 8693 §4.2): one string, space separated; some issuers write a list.
    scope: Strings<'a>,
    /// `scopes`: our own list.
    scopes: Strings<'a>,
    /// `scp`: the same elsewhere (Entra ID, Okta).
    scp: Strings<'a>,
}

impl Body<'_> {
    fn scopes(&self, ours: bool) -> Result<ScopeSet, TokenFault> {
        let foreign = if ours { &[][..] } else { self.scp.0.as_slice() };
        let texts = self.scope.0.iter().chain(&self.scopes.0).chain(foreign);
        let words = texts.flat_map(|text| text.split(' ')).filter(|word| !word.is_empty());
        words.map(|word| word.parse::<Scope>().map_err(|_source| TokenFault::Malformed)).collect()
    }
}

impl<'de> Deserialize<'de> for Body<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(BodyVisitor)
    }
}

struct BodyVisitor;

impl<'de> Visitor<'de> for BodyVisitor {
    type Value = Body<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the claims of a token")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut body, mut members) = (Body::default(), Members::default());
        while let Some(name) = members.next(&mut map)? {
            match name {
                "iss" => body.issuer = Some(map.next_value()?),
                "sub" => body.subject = Some(map.next_value()?),
                "aud" => body.audience = map.next_value()?,
                "exp" => body.expires_at = Some(map.next_value::<Seconds>()?.floor),
                "nbf" => body.not_before = Some(map.next_value::<Seconds>()?.ceiling),
                "scope" => body.scope = map.next_value()?,
                "scopes" => body.scopes = map.next_value()?,
                "scp" => body.scp = map.next_value()?,
                _ => map.next_value_seed(Unused)?,
            }
        }
        Ok(body)
    }
}

/// The SHA-256 of a token: what a cache knows of it, so that no bearer is kept in memory.
type Fingerprint = [u8; 32];

/// What a remembered token may take on average, or a cache of long tokens holds fewer of them.
const BYTES_PER_TOKEN: u64 = 1024;

/// What a remembered token takes: at least the average, so that a cache never holds more tokens than it was made for.
#[derive(Clone)]
struct Bytes;

impl Weighter<Fingerprint, Rc<Claims>> for Bytes {
    fn weight(&self, _: &Fingerprint, claims: &Rc<Claims>) -> u64 {
        u64::try_from(claims.bytes()).unwrap_or(u64::MAX).max(BYTES_PER_TOKEN)
    }
}

/// One worker's verified tokens. Bounded in number and in bytes; when it is full the rarely used go first.
///
/// A token that was refused is not remembered, so each time it comes its signature is looked at again. That is decided:
/// whoever wants to spend our time sends another token each time, which no memory helps against, and limits on requests
/// and connections are what does. A memory of bad tokens would be filled by strangers, and would have to forget at
/// every change of keys what it knew.
pub struct TokenCache {
    cache: Option<Cache<Fingerprint, Rc<Claims>, Bytes, foldhash::fast::RandomState>>,
    generation: (u64, u64),
}

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCache").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl TokenCache {
    /// A cache for at most `capacity` tokens, and as many KiB of them; 0 verifies every time.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        // Room for the first few; it grows with use, so that an idle proxy stays small.
        let first = capacity.min(64);
        let cache = (capacity > 0).then(|| {
            Cache::with(
                first,
                (capacity as u64).saturating_mul(BYTES_PER_TOKEN),
                Bytes,
                foldhash::fast::RandomState::default(),
                quick_cache::unsync::DefaultLifecycle::default(),
            )
        });
        Self { cache, generation: (0, 0) }
    }

    /// As [`Verifier::verify`], remembering what was verified until it expires, its key goes, or there is no
    /// more room.
    ///
    /// # Errors
    /// [`TokenFault`]; faults are not remembered.
    pub fn verify(
        &mut self,
        verifier: &Verifier,
        token: &[u8],
        audience: &[&str],
        now: i64,
    ) -> Result<Rc<Claims>, TokenFault> {
        let Some(cache) = &mut self.cache else {
            return verifier.verify(token, audience, now).map(Rc::new);
        };
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenFault::Oversized);
        }
        let generation = verifier.generation();
        if self.generation != generation {
            cache.retain(|_, claims| verifier.still_trusts(claims));
            self.generation = generation;
        }
        let fingerprint: Fingerprint = sha256(token);
        if let Some(claims) = cache.get(&fingerprint) {
            if !audience.iter().any(|name| claims.is_for(name)) {
                return Err(TokenFault::WrongAudience);
            }
            return match claims.in_time(now) {
                Ok(()) => Ok(claims.clone()),
                Err(fault) => {
                    cache.remove(&fingerprint);
                    Err(fault)
                }
            };
        }
        let claims = Rc::new(verifier.verify(token, audience, now)?);
        cache.insert(fingerprint, claims.clone());
        Ok(claims)
    }

    /// How many tokens are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cache.as_ref().map_or(0, Cache::len)
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::hmac;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::identity::{
        forge::{Forge, base64url, set},
        keys::KeySet,
    };

    const ISSUER: &str = "https://control.example:7070";
    const NOW: i64 = 1_800_000_000;
    const HERE: &[&str] = &["data-intelligence"];

    fn body() -> Value {
        json!({
            "iss": ISSUER, "sub": "web-application", "aud": "data-intelligence",
            "exp": NOW + 3600, "iat": NOW, "nbf": NOW, "jti": "1",
            "scope": "write:query read:data", "scopes": ["read:data", "write:query"],
        })
    }

    fn trusting(keys: &[&Forge]) -> Verifier {
        let keys = KeySet::from_json(&set(keys)).unwrap();
        verifier(ISSUER, true, keys, &[])
    }

    fn verifier(issuer: &str, ours: bool, keys: KeySet, audiences: &[&str]) -> Verifier {
        let issuer: Arc<str> = issuer.into();
        Verifier::new(vec![Trusted {
            issuer: issuer.clone(),
            ours,
            audiences: audiences.iter().map(|&name| name.to_owned()).collect(),
            keys: Jwks::fixed(issuer, keys),
        }])
    }

    #[test]
    fn a_token_of_every_allowed_algorithm_is_understood() {
        for algorithm in [
            Algorithm::Es256,
            Algorithm::Es384,
            Algorithm::Rs256,
            Algorithm::Ps256,
            Algorithm::EdDsa,
        ] {
            let key = Forge::new("k1", algorithm);
            let token = key.sign(&key.header().to_string(), &body().to_string());
            let claims = trusting(&[&key]).verify(token.as_bytes(), HERE, NOW).unwrap();
            assert!(claims.is_ours() && claims.is_for("data-intelligence"));
            assert!(!claims.is_for("reports"));
            assert_eq!(claims.issuer(), ISSUER);
            assert_eq!(claims.caller_header(), "web-application");
            assert_eq!(claims.scopes_header(), "read:data write:query");
            assert_eq!(claims.claims_header(), token.split('.').nth(1).unwrap());
            assert_eq!(claims.expires_at(), NOW + 3600);
        }
    }

    #[test]
    fn a_stranger_with_the_name_of_a_service_is_somebody_else() {
        let (own, other) = (Forge::new("k1", Algorithm::Es256), Forge::new("k1", Algorithm::Es256));
        let trusted = |issuer: &str, ours, key: &Forge| Trusted {
            issuer: issuer.into(),
            ours,
            audiences: Vec::new(),
            keys: Jwks::fixed(issuer.into(), KeySet::from_json(&set(&[key])).unwrap()),
        };
        let elsewhere = "https://elsewhere.example/realms/a";
        let verifier =
            Verifier::new(vec![trusted(ISSUER, true, &own), trusted(elsewhere, false, &other)]);
        let ours = own.sign(&own.header().to_string(), &body().to_string());
        let ours = verifier.verify(ours.as_bytes(), HERE, NOW).unwrap();
        let mut claims = body();
        claims["iss"] = elsewhere.into();
        let theirs = other.sign(&other.header().to_string(), &claims.to_string());
        let theirs = verifier.verify(theirs.as_bytes(), HERE, NOW).unwrap();
        assert_eq!(ours.caller().ours().map(ServiceName::as_str), Some("web-application"));
        assert_eq!(theirs.caller().ours(), None);
        assert_eq!(theirs.caller_header(), "https://elsewhere.example/realms/a#web-application");
        assert_ne!(ours.caller().as_str(), theirs.caller().as_str());
        // Nor can a subject of theirs be written so that it is one of ours: the first # ends the issuer.
        assert!("a#b".parse::<ServiceName>().is_err());
    }

    #[test]
    fn hostile_headers_are_refused() {
        let key = Forge::new("k1", Algorithm::Es256);
        let verifier = trusting(&[&key]);
        let payload = body().to_string();
        let malformed = TokenFault::Malformed;
        let unknown = |kid: &str| TokenFault::UnknownKey { issuer: ISSUER.into(), kid: kid.into() };
        let long = format!(r#"{{"alg":"ES256","typ":"at+jwt","kid":"{}"}}"#, "k".repeat(300));
        let table = [
            (r#"{"alg":"none","typ":"at+jwt","kid":"k1"}"#, TokenFault::AlgorithmNotAllowed),
            (r#"{"alg":"None","typ":"at+jwt","kid":"k1"}"#, TokenFault::AlgorithmNotAllowed),
            (r#"{"alg":"es256","typ":"at+jwt","kid":"k1"}"#, TokenFault::AlgorithmNotAllowed),
            (r#"{"alg":"HS256","typ":"at+jwt","kid":"k1"}"#, TokenFault::AlgorithmNotAllowed),
            (r#"{"alg":"RS512","typ":"at+jwt","kid":"k1"}"#, TokenFault::AlgorithmNotAllowed),
            (r#"{"alg":"RS256","typ":"at+jwt","kid":"k1"}"#, TokenFault::AlgorithmNotAllowed),
            (r#"{"alg":"ES384","typ":"at+jwt","kid":"k1"}"#, TokenFault::AlgorithmNotAllowed),
            (r#"{"typ":"at+jwt","kid":"k1"}"#, malformed.clone()),
            (r#"{"alg":["ES256"],"typ":"at+jwt","kid":"k1"}"#, malformed.clone()),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":""}"#, malformed.clone()),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":7}"#, malformed.clone()),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":null}"#, malformed.clone()),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k1","kid":"k1"}"#, malformed.clone()),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k1","\u006bid":"k2"}"#, malformed.clone()),
            (r#"{"alg":"none","alg":"ES256","typ":"at+jwt","kid":"k1"}"#, malformed.clone()),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k1","x":{"a":1,"a":2}}"#, malformed.clone()),
            (&long, malformed.clone()),
            (r#"["ES256"]"#, malformed.clone()),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k1"} {}"#, malformed.clone()),
            ("", malformed),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"k2"}"#, unknown("k2")),
            (r#"{"alg":"ES256","typ":"at+jwt","kid":"../k1"}"#, unknown("../k1")),
            (r#"{"alg":"ES256","typ":"JWT","kid":"k1"}"#, TokenFault::Type),
            (r#"{"alg":"ES256","typ":"dpop+jwt","kid":"k1"}"#, TokenFault::Type),
            (r#"{"alg":"ES256","kid":"k1"}"#, TokenFault::Type),
        ];
        for (header, fault) in table {
            let token = key.sign(header, &payload);
            assert_eq!(verifier.verify(token.as_bytes(), HERE, NOW).err(), Some(fault), "{header}");
        }
        for (name, value) in [
            ("crit", json!(["exp"])),
            ("b64", json!(false)),
            ("jku", json!("https://evil.example/jwks.json")),
            ("x5u", json!("https://evil.example/chain.pem")),
            ("jwk", key.jwk()),
            ("x5c", json!(["MIIB"])),
        ] {
            let mut header = key.header();
            header[name] = value;
            let token = key.sign(&header.to_string(), &payload);
            let fault = verifier.verify(token.as_bytes(), HERE, NOW).err();
            assert_eq!(fault, Some(TokenFault::HeaderNotAllowed), "{name}");
        }
    }

    #[test]
    fn hostile_claims_are_refused() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let remove = json!("remove");
        let table = [
            ("iss", json!("https://control.example:7070/"), TokenFault::WrongIssuer),
            ("iss", json!("https://CONTROL.example:7070"), TokenFault::WrongIssuer),
            ("iss", json!(""), TokenFault::WrongIssuer),
            ("iss", remove.clone(), TokenFault::WrongIssuer),
            ("iss", json!([ISSUER]), TokenFault::Malformed),
            ("aud", json!("reports"), TokenFault::WrongAudience),
            ("aud", json!(["reports", "data-intelligence-2"]), TokenFault::WrongAudience),
            ("aud", json!("data-intelligence "), TokenFault::WrongAudience),
            ("aud", json!([]), TokenFault::WrongAudience),
            ("aud", remove.clone(), TokenFault::WrongAudience),
            ("aud", json!({"data-intelligence": 1}), TokenFault::Malformed),
            ("sub", remove.clone(), TokenFault::NoSubject),
            ("sub", json!(""), TokenFault::NoSubject),
            ("sub", json!("web-application\r\ninfrar-scopes: admin"), TokenFault::NoSubject),
            ("sub", json!(1), TokenFault::Malformed),
            ("exp", json!(NOW - 31), TokenFault::Expired),
            ("exp", json!(-1), TokenFault::Expired),
            ("exp", json!(i64::MIN), TokenFault::Expired),
            ("exp", remove, TokenFault::NoExpiry),
            ("exp", json!(u64::MAX), TokenFault::Malformed),
            ("exp", json!("1900000000"), TokenFault::Malformed),
            ("exp", json!(1_700_000_000.5), TokenFault::Expired),
            ("exp", json!(1e300), TokenFault::Malformed),
            ("exp", json!(null), TokenFault::Malformed),
            ("nbf", json!(NOW + 31), TokenFault::NotYetValid),
            ("nbf", json!(1_800_000_030.5), TokenFault::NotYetValid),
            ("nbf", json!(-1e19), TokenFault::Malformed),
            ("nbf", json!(i64::MAX), TokenFault::NotYetValid),
            ("nbf", json!("0"), TokenFault::Malformed),
            ("scope", json!("read:data \"quoted\""), TokenFault::Malformed),
            ("scope", json!({}), TokenFault::Malformed),
        ];
        for (name, value, fault) in table {
            let mut payload = body();
            if value == json!("remove") {
                payload.as_object_mut().unwrap().remove(name);
            } else {
                payload[name] = value.clone();
            }
            let token = key.sign(&key.header().to_string(), &payload.to_string());
            let found = verifier.verify(token.as_bytes(), HERE, NOW).err();
            assert_eq!(found, Some(fault), "{name}: {value}");
        }
    }

    #[test]
    fn claims_that_can_be_read_in_two_ways_are_refused() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let text = body().to_string();
        let inner = text.strip_prefix('{').unwrap();
        for payload in [
            format!(r#"{{"sub":"admin",{inner}"#),
            format!(r#"{{"\u0073ub":"admin",{inner}"#),
            format!(r#"{{"x":[{{"a":1,"a":1}}],{inner}"#),
            format!(r#"{{"x":1e999,{inner}"#),
            format!(r#"{{"x":{}{},{inner}"#, "[".repeat(500), "]".repeat(500)),
            format!("{text}x"),
            "null".to_owned(),
            "[]".to_owned(),
        ] {
            let token = key.sign(&key.header().to_string(), &payload);
            let found = verifier.verify(token.as_bytes(), HERE, NOW).err();
            assert_eq!(found, Some(TokenFault::Malformed), "{payload}");
        }
    }

    #[test]
    fn clocks_may_differ_by_half_a_minute() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let token = key.sign(&key.header().to_string(), &body().to_string());
        for (now, fault) in [
            (NOW - 30, None),
            (NOW - 31, Some(TokenFault::NotYetValid)),
            (NOW + 3600 + 29, None),
            (NOW + 3600 + 30, Some(TokenFault::Expired)),
            (i64::MAX, Some(TokenFault::Expired)),
            (i64::MIN, Some(TokenFault::NotYetValid)),
        ] {
            assert_eq!(verifier.verify(token.as_bytes(), HERE, now).err(), fault, "{now}");
        }
    }

    #[test]
    fn times_may_have_fractions_and_are_taken_for_the_narrower_span() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let mut payload = body();
        payload["exp"] = json!(1_800_000_100.75);
        payload["nbf"] = json!(1_799_999_999.25);
        let token = key.sign(&key.header().to_string(), &payload.to_string());
        let at = |now: i64| verifier.verify(token.as_bytes(), HERE, now);
        assert_eq!(at(NOW).unwrap().expires_at(), NOW + 100);
        assert_eq!(at(NOW - 31).err(), Some(TokenFault::NotYetValid));
        assert!(at(NOW - 30).is_ok());
    }

    #[test]
    fn the_public_key_is_no_shared_secret() {
        for algorithm in [Algorithm::Rs256, Algorithm::Es256] {
            let key = Forge::new("k1", algorithm);
            let header = json!({"alg": "HS256", "typ": "at+jwt", "kid": "k1"}).to_string();
            let message = format!("{}.{}", base64url(header), base64url(body().to_string()));
            let secret = hmac::Key::new(hmac::HMAC_SHA256, &key.public_bytes());
            let token = format!("{message}.{}", base64url(hmac::sign(&secret, message.as_bytes())));
            let fault = trusting(&[&key]).verify(token.as_bytes(), HERE, NOW).err();
            assert_eq!(fault, Some(TokenFault::AlgorithmNotAllowed));
        }
    }

    #[test]
    fn hostile_shapes_are_refused() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let token = key.sign(&key.header().to_string(), &body().to_string());
        let (message, signature) = token.rsplit_once('.').unwrap();
        let stranger = Forge::new("k1", Algorithm::EdDsa);
        let foreign = stranger.sign(&stranger.header().to_string(), &body().to_string());
        let zeros = base64url([0; 64]);
        for (token, fault) in [
            (String::new(), TokenFault::Missing),
            ("a".repeat(MAX_TOKEN_BYTES + 1), TokenFault::Oversized),
            ("..".to_owned(), TokenFault::Malformed),
            (message.to_owned(), TokenFault::Malformed),
            (format!("{message}."), TokenFault::Malformed),
            (format!("{token}."), TokenFault::Malformed),
            (format!("{token}.{signature}"), TokenFault::Malformed),
            (format!("{token}=="), TokenFault::Malformed),
            (format!(" {token}"), TokenFault::Malformed),
            (format!("{token}\n"), TokenFault::Malformed),
            (token.replace('.', ":"), TokenFault::Malformed),
            (format!("{message}.{}", &signature[..signature.len() - 6]), TokenFault::BadSignature),
            (format!("{message}.AA"), TokenFault::BadSignature),
            (format!("{message}.{zeros}"), TokenFault::BadSignature),
            (foreign, TokenFault::BadSignature),
        ] {
            assert_eq!(verifier.verify(token.as_bytes(), HERE, NOW).err(), Some(fault), "{token}");
        }
        // Bits after the last byte of the signature must be zero, or one token had many spellings.
        let last = signature.as_bytes()[signature.len() - 1];
        let other = if last == b'A' { 'B' } else { 'h' };
        let respelt = format!("{message}.{}{other}", &signature[..signature.len() - 1]);
        let fault = verifier.verify(respelt.as_bytes(), HERE, NOW).err();
        assert_eq!(fault, Some(TokenFault::Malformed));
        let payload = base64url(body().to_string().replace("web-application", "administrator"));
        let (head, _) = message.split_once('.').unwrap();
        let swapped = format!("{head}.{payload}.{signature}");
        let fault = verifier.verify(swapped.as_bytes(), HERE, NOW).err();
        assert_eq!(fault, Some(TokenFault::BadSignature));
    }

    #[test]
    fn another_issuer_may_name_subjects_scopes_and_audiences_its_own_way() {
        let key = Forge::new("k1", Algorithm::Rs256);
        let keys = KeySet::from_json(&set(&[&key])).unwrap();
        let issuer = "https://login.example/tenant/v2.0";
        let verifier = verifier(issuer, false, keys, &["api://shop"]);
        let payload = json!({
            "iss": issuer, "sub": "system:serviceaccount:shop:Workers", "exp": NOW + 60,
            "aud": ["api://shop"], "scp": "read:data",
        });
        let header = json!({"alg": "RS256", "typ": "JWT", "kid": "k1"}).to_string();
        let token = key.sign(&header, &payload.to_string());
        let claims = verifier.verify(token.as_bytes(), HERE, NOW).unwrap();
        assert!(!claims.is_ours() && claims.is_for("data-intelligence"));
        assert_eq!(claims.scopes().to_string(), "read:data");
        assert_eq!(
            claims.caller().as_str(),
            "https://login.example/tenant/v2.0#system:serviceaccount:shop:Workers"
        );
        for bad in ["two words", "ä", "a\r\nb", &"x".repeat(MAX_SUBJECT + 1)] {
            let mut payload = payload.clone();
            payload["sub"] = bad.into();
            let token = key.sign(&header, &payload.to_string());
            let fault = verifier.verify(token.as_bytes(), HERE, NOW).err();
            assert_eq!(fault, Some(TokenFault::NoSubject), "{bad:?}");
        }
    }

    #[test]
    fn a_remembered_token_follows_what_its_audiences_mean_now() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let keys = || KeySet::from_json(&set(&[&key])).unwrap();
        let mut payload = body();
        payload["aud"] = json!("reports");
        let token = key.sign(&key.header().to_string(), &payload.to_string());
        let mut cache = TokenCache::new(8);
        let mut at = |audiences: &[&str], service: &str| {
            let verifier = verifier(ISSUER, false, keys(), audiences);
            cache.verify(&verifier, token.as_bytes(), &[service], NOW).map(drop)
        };
        // While no service has that name, it is one that the issuer's list accepts everywhere.
        assert_eq!(at(&["reports"], "data"), Ok(()));
        assert_eq!(at(&[], "data"), Err(TokenFault::WrongAudience));
        assert_eq!(at(&[], "reports"), Ok(()));
        assert_eq!(at(&["reports"], "data"), Ok(()));
    }

    #[test]
    fn one_issuers_key_signs_nothing_for_another() {
        let (ours, theirs) =
            (Forge::new("k1", Algorithm::EdDsa), Forge::new("k1", Algorithm::EdDsa));
        let jwks = |issuer: &str, key: &Forge| Trusted {
            issuer: issuer.into(),
            ours: issuer == ISSUER,
            audiences: Vec::new(),
            keys: Jwks::fixed(issuer.into(), KeySet::from_json(&set(&[key])).unwrap()),
        };
        let verifier =
            Verifier::new(vec![jwks(ISSUER, &ours), jwks("https://other.example", &theirs)]);
        let token = theirs.sign(&theirs.header().to_string(), &body().to_string());
        let fault = verifier.verify(token.as_bytes(), HERE, NOW).err();
        assert_eq!(fault, Some(TokenFault::BadSignature));
    }

    #[test]
    fn a_remembered_token_is_still_judged_by_time_and_audience() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let token = key.sign(&key.header().to_string(), &body().to_string());
        let mut cache = TokenCache::new(10);
        let first = cache.verify(&verifier, token.as_bytes(), HERE, NOW).unwrap();
        let again = cache.verify(&verifier, token.as_bytes(), HERE, NOW).unwrap();
        assert!(Rc::ptr_eq(&first, &again), "remembered, not verified anew");
        let elsewhere = cache.verify(&verifier, token.as_bytes(), &["reports"], NOW);
        assert_eq!(elsewhere.err(), Some(TokenFault::WrongAudience));
        let late = cache.verify(&verifier, token.as_bytes(), HERE, NOW + 3630);
        assert_eq!(late.err(), Some(TokenFault::Expired));
        assert!(cache.is_empty());
    }

    #[test]
    fn a_remembered_token_goes_with_its_key_or_its_issuer() {
        let (old, new) = (Forge::new("k1", Algorithm::EdDsa), Forge::new("k2", Algorithm::EdDsa));
        let token = |key: &Forge| key.sign(&key.header().to_string(), &body().to_string());
        let (first, second) = (token(&old), token(&new));
        let both = trusting(&[&old, &new]);
        let mut cache = TokenCache::new(10);
        cache.verify(&both, first.as_bytes(), HERE, NOW).unwrap();
        let before = cache.verify(&both, second.as_bytes(), HERE, NOW).unwrap();
        let rotated = trusting(&[&new]);
        let after = cache.verify(&rotated, second.as_bytes(), HERE, NOW).unwrap();
        assert!(Rc::ptr_eq(&before, &after), "what is still trusted is not verified anew");
        assert_eq!(cache.len(), 1);
        let gone = cache.verify(&rotated, first.as_bytes(), HERE, NOW).err();
        assert!(matches!(gone, Some(TokenFault::UnknownKey { .. })));
        let nobody = Verifier::new(Vec::new());
        let gone = cache.verify(&nobody, second.as_bytes(), HERE, NOW).err();
        assert_eq!((gone, cache.len()), (Some(TokenFault::WrongIssuer), 0));
    }

    #[test]
    fn the_memory_is_bounded_and_can_be_off() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let (mut small, mut off) = (TokenCache::new(8), TokenCache::new(0));
        for at in 0..50 {
            let mut payload = body();
            payload["jti"] = at.into();
            let token = key.sign(&key.header().to_string(), &payload.to_string());
            small.verify(&verifier, token.as_bytes(), HERE, NOW).unwrap();
            off.verify(&verifier, token.as_bytes(), HERE, NOW).unwrap();
        }
        assert!(small.len() <= 8, "{}", small.len());
        assert!(off.is_empty());
        assert!(off.verify(&verifier, b"x.y.z", HERE, NOW).is_err());
    }

    #[test]
    fn long_tokens_take_no_more_memory_than_short_ones() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let mut cache = TokenCache::new(64);
        for at in 0..80 {
            let mut payload = body();
            payload["jti"] = at.into();
            payload["groups"] = "g".repeat(4096).into();
            let token = key.sign(&key.header().to_string(), &payload.to_string());
            cache.verify(&verifier, token.as_bytes(), HERE, NOW).unwrap();
        }
        assert!((1..=64 / 5).contains(&cache.len()), "{}", cache.len());
    }

    #[test]
    fn a_fault_shows_nothing_of_the_token() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let fault = verifier.verify(b"c2VjcmV0.c2VjcmV0.c2VjcmV0", HERE, NOW).unwrap_err();
        assert!(!format!("{fault} {fault:?}").contains("secret"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(token in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(trusting_nobody().verify(&token, HERE, NOW).is_err());
        }

        #[test]
        fn no_json_panics(header in "\\PC{0,60}", payload in "\\PC{0,120}") {
            let token = format!("{}.{}.AAAA", base64url(header), base64url(payload));
            prop_assert!(trusting_nobody().verify(token.as_bytes(), HERE, NOW).is_err());
        }

        #[test]
        fn a_changed_token_is_refused(at in 0usize..1000, to in any::<u8>()) {
            use std::sync::LazyLock;
            static SIGNED: LazyLock<(String, Value)> = LazyLock::new(|| {
                let key = Forge::new("k1", Algorithm::EdDsa);
                (key.sign(&key.header().to_string(), &body().to_string()), set(&[&key]))
            });
            let keys = KeySet::from_json(&SIGNED.1).unwrap();
            let mut token = SIGNED.0.clone().into_bytes();
            let at = at % token.len();
            prop_assume!(token[at] != to);
            token[at] = to;
            prop_assert!(verifier(ISSUER, true, keys, &[]).verify(&token, HERE, NOW).is_err());
        }
    }

    fn trusting_nobody() -> Verifier {
        verifier(ISSUER, true, KeySet::default(), &[])
    }
}
