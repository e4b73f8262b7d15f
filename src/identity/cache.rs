//! What was verified is remembered, by one worker for itself.

use std::{fmt, rc::Rc};

use quick_cache::{Weighter, unsync::Cache};

use crate::{
    identity::{
        claims::Claims,
        jws::MAX_TOKEN_BYTES,
        verify::{TokenFault, Verifier},
    },
    runtime::sha256,
};

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
    use serde_json::json;

    use super::*;
    use crate::identity::{
        forge::{Forge, HERE, ISSUER, NOW, body, set, trusting, verifier},
        keys::{Algorithm, KeySet},
    };

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
}
