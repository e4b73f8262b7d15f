//! A token's text → header and claims, nothing believed.
//!
//! RFC 7515 and RFC 7519 read strictly: what could be understood in two ways is malformed.

use std::fmt;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use crate::{
    identity::{
        json::{Members, Seconds, Strings, Text, Unused},
        keys::{Algorithm, MAX_KID},
        verify::TokenFault,
    },
    model::{Scope, ScopeSet},
};

/// The longest token that is looked at.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// The three parts of a compact JWS (RFC 7515 §7.1).
pub(super) struct Parts<'a> {
    pub(super) head: &'a [u8],
    pub(super) payload: &'a [u8],
    pub(super) signature: &'a [u8],
    pub(super) signed: &'a [u8],
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
pub(super) fn unbase64(part: &[u8]) -> Result<Vec<u8>, TokenFault> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_source| TokenFault::Malformed)
}

/// JSON that can be read in one way only.
pub(super) fn strict<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, TokenFault> {
    serde_json::from_slice(json).map_err(|_source| TokenFault::Malformed)
}

/// The JOSE header, as far as it is looked at.
#[derive(Default)]
pub(super) struct Head<'a> {
    algorithm: Option<Text<'a>>,
    pub(super) kid: Option<Text<'a>>,
    kind: Option<Text<'a>>,
    forbidden: bool,
}

impl Head<'_> {
    /// The algorithm that it asks for, if it asks for nothing that is never done.
    pub(super) fn check(&self) -> Result<Algorithm, TokenFault> {
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
    pub(super) fn is_access_token(&self) -> bool {
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
pub(super) struct Body<'a> {
    pub(super) issuer: Option<Text<'a>>,
    pub(super) subject: Option<Text<'a>>,
    pub(super) audience: Strings<'a>,
    pub(super) expires_at: Option<i64>,
    pub(super) not_before: Option<i64>,
    /// `scope` (RFC 8693 §4.2): one string, space separated; some issuers write a list.
    scope: Strings<'a>,
    /// `scopes`: our own list.
    scopes: Strings<'a>,
    /// `scp`: the same elsewhere (Entra ID, Okta).
    scp: Strings<'a>,
}

impl Body<'_> {
    pub(super) fn scopes(&self, ours: bool) -> Result<ScopeSet, TokenFault> {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::identity::{
        forge::{
            Forge, HERE, ISSUER, NOW, base64url, body, set, trusting, trusting_nobody, verifier,
        },
        keys::KeySet,
    };

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
}
