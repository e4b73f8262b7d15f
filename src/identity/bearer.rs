//! One token, ready to be sent: as a header, with the moments from which it is renewed and no longer used.
//!
//! What a token says of itself is read unverified and with forgiveness, for planning alone: its audience judges it.

use std::{collections::HashMap, fmt, time::Duration};

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;
use tokio::time::Instant;

use crate::{
    api::TokenAnswer,
    identity::{json::Seconds, jws::Parts, keys::KeySet},
    model::{ScopeSet, ServiceName},
};

/// A token is not used in its last seconds: it must still be good when it arrives.
pub(super) const MARGIN: Duration = Duration::from_secs(5);
/// Keys that were kept so many seconds after a token was issued, were fetched after it was.
const ORPHANED_AFTER: i64 = 60;
/// The life of a bearer that nobody says anything about: short, so that it is asked for again before it can have ended.
const UNSAID: Duration = Duration::from_secs(300);
/// The life of a bearer from a file that does not say when it ends; the file is watched anyway.
pub(super) const NO_EXPIRY: Duration = Duration::from_secs(365 * 86_400);

/// One token, ready to be sent.
pub struct Bearer {
    header: HeaderValue,
    pub(super) scope: ScopeSet,
    /// Whose it says it is.
    pub(super) issuer: Option<Box<str>>,
    /// The key by which it says it is signed.
    kid: Option<Box<str>>,
    /// When the question for it left.
    pub(super) asked: Instant,
    pub(super) renew_at: Instant,
    pub(super) usable_until: Instant,
    pub(super) issued_at: i64,
    pub(super) expires_at: i64,
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
    pub(super) fn unknown_key(&self, keys: &KeySet) -> Option<&str> {
        self.kid.as_deref().filter(|kid| !keys.knows(kid))
    }

    pub(super) fn is_usable(&self, now: Instant) -> bool {
        now < self.usable_until
    }

    /// `None` when it cannot stand in a header, is in its last seconds already, or is a JWT of which nobody can read
    /// when it ends. `asked` and `issued_at` are the same moment, before the question left, so that its way is not
    /// counted as life.
    ///
    /// It lives as long as the answer and the token itself both say.
    pub(super) fn new(answer: &TokenAnswer, asked: Instant, issued_at: i64) -> Option<Self> {
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
    pub(super) callee: ServiceName,
    pub(super) token: String,
    pub(super) scope: ScopeSet,
    pub(super) issued_at: i64,
    pub(super) expires_at: i64,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::forge::base64url;

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
}
