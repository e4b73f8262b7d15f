//! Bearer → Claims: is it good?
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
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::identity::{
    claims::{Caller, Claims, in_time, read_caller},
    json::Text,
    jwks::{Jwks, Refreshed},
    jws::{Body, Head, MAX_TOKEN_BYTES, Parts, strict, unbase64},
    keys::{KeyFault, KeyId},
};

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

/// A token whose every part was looked at and whose signature is right. Claims are made of one, and the seal keeps
/// everybody else from making one.
pub(super) struct Checked<'a, 'token> {
    pub(super) trusted: &'a Trusted,
    pub(super) caller: Caller,
    pub(super) body: &'a Body<'token>,
    pub(super) payload: &'a [u8],
    pub(super) expires_at: i64,
    pub(super) for_everyone_here: bool,
    pub(super) key: KeyId,
    #[expect(dead_code, reason = "its being there is what counts")]
    seal: Seal,
}

struct Seal;

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

        Claims::of(Checked {
            trusted,
            caller,
            body: &body,
            payload: parts.payload,
            expires_at,
            for_everyone_here,
            key: key.id(),
            seal: Seal,
        })
    }

    /// Changes whenever a token that was verified might no longer be.
    pub(super) fn generation(&self) -> (u64, u64) {
        (self.serial, self.trusted.iter().map(|one| one.keys.generation()).sum())
    }

    /// Whether the key of `claims` is still one of its issuer's, and the issuer still trusted.
    pub(super) fn still_trusts(&self, claims: &Claims) -> bool {
        self.trusted.iter().any(|one| {
            *one.issuer == *claims.issuer()
                && one.ours == claims.is_ours()
                && one.keys.load().has(claims.key())
                && one.is_for_everyone(claims.audiences()) == claims.is_for_everyone_here()
        })
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::hmac;
    use serde_json::json;

    use super::*;
    use crate::identity::{
        forge::{Forge, HERE, ISSUER, NOW, base64url, body, set, trusting},
        keys::{Algorithm, KeySet},
    };

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
    fn a_fault_shows_nothing_of_the_token() {
        let key = Forge::new("k1", Algorithm::EdDsa);
        let verifier = trusting(&[&key]);
        let fault = verifier.verify(b"c2VjcmV0.c2VjcmV0.c2VjcmV0", HERE, NOW).unwrap_err();
        assert!(!format!("{fault} {fault:?}").contains("secret"));
    }
}
