//! What a verified token says: for whom it speaks, where, what for and until when.

use std::sync::Arc;

use http::HeaderValue;
use smallvec::SmallVec;

use crate::{
    identity::{
        keys::KeyId,
        policy::scopes_header,
        verify::{Checked, TokenFault, Trusted},
    },
    model::{ScopeSet, ServiceName},
};

/// How far clocks may be apart, for `exp` and `nbf`.
pub const LEEWAY_SECONDS: i64 = 30;
/// The longest subject of another issuer.
const MAX_SUBJECT: usize = 255;

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

/// What a verified token says. It is made of what was checked, and of nothing else.
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
    /// The claims of a token that was checked.
    pub(super) fn of(checked: Checked<'_, '_>) -> Result<Self, TokenFault> {
        let Checked { trusted, caller, body, payload, expires_at, for_everyone_here, key, .. } =
            checked;
        let scopes = body.scopes(trusted.ours)?;
        let header =
            |text: &[u8]| HeaderValue::from_bytes(text).map_err(|_source| TokenFault::Malformed);
        Ok(Self {
            issuer: trusted.issuer.clone(),
            caller_header: header(caller.as_str().as_bytes())?,
            scopes_header: scopes_header(&scopes),
            claims_header: header(payload)?,
            caller,
            audiences: body.audience.0.iter().map(|name| Box::from(name.as_ref())).collect(),
            for_everyone_here,
            scopes,
            expires_at,
            not_before: body.not_before,
            key,
        })
    }

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

    /// The key that has signed it.
    pub(super) fn key(&self) -> KeyId {
        self.key
    }

    /// Whether its issuer's list made it good for every service here when it was verified.
    pub(super) fn is_for_everyone_here(&self) -> bool {
        self.for_everyone_here
    }

    /// What it takes in memory, about.
    pub(super) fn bytes(&self) -> usize {
        let headers = [&self.caller_header, &self.scopes_header, &self.claims_header];
        let headers = headers.into_iter().map(HeaderValue::len).sum::<usize>();
        let audiences = self.audiences().map(str::len).sum::<usize>();
        let scopes = self.scopes.iter().map(|scope| scope.as_str().len() + 32).sum::<usize>();
        // Beside its own size, the fingerprint twice and what the cache notes of each entry.
        size_of::<Self>() + 128 + headers + self.caller.as_str().len() + audiences + scopes
    }

    /// Whether it may be used at `now`, seconds since 1970.
    pub(super) fn in_time(&self, now: i64) -> Result<(), TokenFault> {
        in_time(self.expires_at, self.not_before, now)
    }
}

/// Whether these bounds allow `now`.
pub(super) fn in_time(
    expires_at: i64,
    not_before: Option<i64>,
    now: i64,
) -> Result<(), TokenFault> {
    if now >= expires_at.saturating_add(LEEWAY_SECONDS) {
        return Err(TokenFault::Expired);
    }
    if not_before.is_some_and(|begin| begin > now.saturating_add(LEEWAY_SECONDS)) {
        return Err(TokenFault::NotYetValid);
    }
    Ok(())
}

/// Our own subjects are names that `permissions` can hold; others any printable text behind their issuer's.
pub(super) fn read_caller(subject: &str, trusted: &Trusted) -> Result<Caller, TokenFault> {
    if trusted.ours {
        return subject.parse().map(Caller::Ours).map_err(|_source| TokenFault::NoSubject);
    }
    let printable = subject.bytes().all(|byte| matches!(byte, 0x21..=0x7e));
    if subject.is_empty() || subject.len() > MAX_SUBJECT || !printable {
        return Err(TokenFault::NoSubject);
    }
    Ok(Caller::Foreign(format!("{}#{subject}", trusted.issuer).into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::identity::{
        forge::{Forge, HERE, ISSUER, NOW, body, set, trusting, verifier},
        jwks::Jwks,
        keys::{Algorithm, KeySet},
        verify::Verifier,
    };

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
}
