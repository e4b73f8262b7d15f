//! The public keys of one issuer, parsed once.
//!
//! A key says which algorithm it may verify; a token never does. Keys that cannot or may not verify tokens
//! (other uses, other curves, RSA below 2048 bits, symmetric ones) are left out when the set is read.

use std::fmt;

use aws_lc_rs::{
    digest,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, ParsedPublicKey,
        RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, RsaPublicKeyComponents,
    },
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::jwk::{
    AlgorithmParameters, CommonParameters, EllipticCurve, Jwk, JwkSet, KeyAlgorithm, KeyOperations,
    PublicKeyUse, RSAKeyParameters,
};
use serde::Deserialize;

/// More keys than any issuer of the field publishes; what is beyond is not read.
const MAX_KEYS: usize = 64;
/// The longest key id that is accepted, in bytes.
pub(super) const MAX_KID: usize = 256;

/// The signature algorithms that are accepted: asymmetric, and none with SHA-1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// ECDSA on P-384 with SHA-384.
    Es384,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// The algorithm by the name that RFC 7518 and RFC 8037 give it; `None` for any other.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "RS256" => Self::Rs256,
            "PS256" => Self::Ps256,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }

    /// Its name in a header.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::Rs256 => "RS256",
            Self::Ps256 => "PS256",
            Self::EdDsa => "EdDSA",
        }
    }
}

/// Names one key beyond doubt: the SHA-256 of its id, algorithm and public part.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId([u8; 32]);

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyId(…)")
    }
}

/// One public key, and the one algorithm it verifies.
pub(super) struct VerifyingKey {
    kid: Option<Box<str>>,
    algorithm: Algorithm,
    id: KeyId,
    key: ParsedPublicKey,
}

impl VerifyingKey {
    pub(super) fn id(&self) -> KeyId {
        self.id
    }

    /// Whether `signature` is this key's over `message`.
    pub(super) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        self.key.verify_sig(message, signature).is_ok()
    }

    /// `None` when the key may not or cannot verify tokens.
    fn read(jwk: &Jwk) -> Option<Self> {
        let common = &jwk.common;
        if !is_for_signatures(common)
            || common.key_id.as_ref().is_some_and(|kid| kid.len() > MAX_KID)
        {
            return None;
        }
        let (algorithm, key) = parse(jwk)?;
        let kid = common.key_id.as_deref().filter(|kid| !kid.is_empty()).map(Box::from);
        let mut context = digest::Context::new(&digest::SHA256);
        for part in [kid.as_deref().unwrap_or_default(), algorithm.as_str()] {
            context.update(&part.len().to_be_bytes());
            context.update(part.as_bytes());
        }
        context.update(key.as_ref());
        let id = KeyId(context.finish().as_ref().try_into().ok()?);
        Some(Self { kid, algorithm, id, key })
    }
}

fn is_for_signatures(common: &CommonParameters) -> bool {
    let signs =
        common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature);
    let operations = common.key_operations.as_ref();
    signs && operations.is_none_or(|list| list.contains(&KeyOperations::Verify))
}

/// The type of the key decides the algorithm; its `alg`, where present, must agree.
fn parse(jwk: &Jwk) -> Option<(Algorithm, ParsedPublicKey)> {
    let named = match jwk.common.key_algorithm {
        None => None,
        Some(KeyAlgorithm::ES256) => Some(Algorithm::Es256),
        Some(KeyAlgorithm::ES384) => Some(Algorithm::Es384),
        Some(KeyAlgorithm::RS256) => Some(Algorithm::Rs256),
        Some(KeyAlgorithm::PS256) => Some(Algorithm::Ps256),
        Some(KeyAlgorithm::EdDSA) => Some(Algorithm::EdDsa),
        Some(_) => return None,
    };
    let (algorithm, key) = match &jwk.algorithm {
        AlgorithmParameters::EllipticCurve(curve) => {
            let (algorithm, verification, bytes) = match curve.curve {
                EllipticCurve::P256 => (Algorithm::Es256, &ECDSA_P256_SHA256_FIXED, 32),
                EllipticCurve::P384 => (Algorithm::Es384, &ECDSA_P384_SHA384_FIXED, 48),
                EllipticCurve::P521 | EllipticCurve::Ed25519 | _ => return None,
            };
            // The uncompressed point of SEC 1 §2.3.3; RFC 7518 §6.2.1.2 gives both parts in full length.
            let mut point = vec![4];
            for part in [&curve.x, &curve.y] {
                let part = unbase64(part).filter(|part| part.len() == bytes)?;
                point.extend_from_slice(&part);
            }
            (algorithm, ParsedPublicKey::new(verification, point).ok()?)
        }
        AlgorithmParameters::RSA(rsa) => {
            // A key that does not say which padding it wants gets the one that everybody uses.
            let algorithm = named.unwrap_or(Algorithm::Rs256);
            (algorithm, parse_rsa(rsa, algorithm)?)
        }
        AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => {
            let bytes = unbase64(&pair.x).filter(|bytes| bytes.len() == 32)?;
            (Algorithm::EdDsa, ParsedPublicKey::new(&ED25519, bytes).ok()?)
        }
        AlgorithmParameters::OctetKeyPair(_)
        | AlgorithmParameters::OctetKey(_)
        | AlgorithmParameters::Other(_)
        | _ => return None,
    };
    named.is_none_or(|named| named == algorithm).then_some((algorithm, key))
}

fn parse_rsa(rsa: &RSAKeyParameters, algorithm: Algorithm) -> Option<ParsedPublicKey> {
    let parameters = match algorithm {
        Algorithm::Rs256 => &RSA_PKCS1_2048_8192_SHA256,
        Algorithm::Ps256 => &RSA_PSS_2048_8192_SHA256,
        Algorithm::Es256 | Algorithm::Es384 | Algorithm::EdDsa => return None,
    };
    let (modulus, exponent) = (unbase64(&rsa.n)?, unbase64(&rsa.e)?);
    let strip = |bytes: &[u8]| {
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        bytes.get(zeros..).map(<[u8]>::to_vec).unwrap_or_default()
    };
    let (n, e) = (strip(&modulus), strip(&exponent));
    let bits = n.len() * 8 - n.first().map_or(0, |first| first.leading_zeros() as usize);
    if !(2048..=8192).contains(&bits) {
        return None;
    }
    RsaPublicKeyComponents { n, e }.to_parsed_public_key(parameters).ok()
}

fn unbase64(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// Why a key set cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// It is no JWK set (RFC 7517 §5).
    #[error("not a JSON Web Key set")]
    Shape,
    /// No key in it may verify tokens.
    #[error("no key for ES256, ES384, RS256, PS256 or EdDSA signatures in the set")]
    Empty,
}

/// Why a token's key was not found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyFault {
    /// No key has this id.
    Unknown,
    /// The key is there and is for another algorithm.
    OtherAlgorithm,
}

/// The keys of one issuer at one moment.
pub struct KeySet {
    keys: Vec<VerifyingKey>,
    source: JwkSet,
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySet").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

impl Default for KeySet {
    /// No keys: nothing verifies.
    fn default() -> Self {
        Self { keys: Vec::new(), source: JwkSet { keys: Vec::new() } }
    }
}

impl KeySet {
    /// Reads a set; keys that may not verify tokens are left out, of two with the same id and algorithm the
    /// first stays, and what is beyond 64 keys is not read.
    ///
    /// # Errors
    /// [`KeySetError::Empty`] when none is left.
    pub fn read(source: JwkSet) -> Result<Self, KeySetError> {
        let mut keys: Vec<VerifyingKey> = Vec::new();
        for key in source.keys.iter().take(MAX_KEYS).filter_map(VerifyingKey::read) {
            let same = |other: &VerifyingKey| {
                other.id == key.id
                    || (key.kid.is_some()
                        && other.kid == key.kid
                        && other.algorithm == key.algorithm)
            };
            if !keys.iter().any(same) {
                keys.push(key);
            }
        }
        if keys.is_empty() { Err(KeySetError::Empty) } else { Ok(Self { keys, source }) }
    }

    /// Reads a set from JSON, as `jwks_uri` and `jwks_file` have it; a key that cannot be read is left out.
    ///
    /// # Errors
    /// [`KeySetError`].
    pub fn from_json(json: &serde_json::Value) -> Result<Self, KeySetError> {
        let keys = json.get("keys").and_then(serde_json::Value::as_array);
        let keys = keys.ok_or(KeySetError::Shape)?.iter().take(MAX_KEYS);
        Self::read(JwkSet { keys: keys.filter_map(|key| Jwk::deserialize(key).ok()).collect() })
    }

    /// How many keys can verify.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether nothing can be verified.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The set as it was published, to be kept on disk.
    #[must_use]
    pub fn source(&self) -> &JwkSet {
        &self.source
    }

    /// Whether this very key is in the set.
    #[must_use]
    pub fn has(&self, id: KeyId) -> bool {
        self.keys.iter().any(|key| key.id == id)
    }

    /// Whether a key has this id.
    pub(super) fn knows(&self, kid: &str) -> bool {
        self.keys.iter().any(|key| key.kid.as_deref() == Some(kid))
    }

    /// Whether both sets hold the same keys, in any order.
    pub(super) fn same_as(&self, other: &Self) -> bool {
        self.keys.len() == other.keys.len() && self.keys.iter().all(|key| other.has(key.id))
    }

    /// The key for a token. Without an id in the token, or with one that no key has while a key has none, the
    /// only key for the algorithm is meant; if there are several, none is.
    pub(super) fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<&VerifyingKey, KeyFault> {
        if let Some(kid) = kid {
            let mut named =
                self.keys.iter().filter(|key| key.kid.as_deref() == Some(kid)).peekable();
            if named.peek().is_some() {
                return named
                    .find(|key| key.algorithm == algorithm)
                    .ok_or(KeyFault::OtherAlgorithm);
            }
        }
        let mut able = self.keys.iter().filter(|key| key.algorithm == algorithm);
        match (able.next(), able.next()) {
            (Some(only), None) if kid.is_none() || only.kid.is_none() => Ok(only),
            // Asking the issuer again would not make its keys fit.
            (None, _) if kid.is_none() && !self.is_empty() => Err(KeyFault::OtherAlgorithm),
            _ => Err(KeyFault::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::identity::forge::{Forge, base64url, set};

    #[test]
    fn keys_that_may_not_verify_tokens_are_left_out() {
        let good = Forge::new("good", Algorithm::Es256);
        let mut bad = Vec::new();
        for (name, value) in [
            ("use", json!("enc")),
            ("key_ops", json!(["encrypt"])),
            ("alg", json!("ES384")),
            ("alg", json!("HS256")),
            ("crv", json!("P-521")),
            ("x", json!("AAAA")),
            ("x", json!("not base64url!")),
            ("kid", json!("k".repeat(MAX_KID + 1))),
            ("kid", json!(7)),
        ] {
            let mut jwk = Forge::new("bad", Algorithm::Es256).jwk();
            jwk[name] = value;
            bad.push(jwk);
        }
        let small = [0xc1; 128];
        bad.push(json!({"kty": "RSA", "kid": "small", "n": base64url(small), "e": "AQAB"}));
        // Zeros in front make no key longer.
        let padded = [&[0; 200][..], &small].concat();
        bad.push(json!({"kty": "RSA", "kid": "padded", "n": base64url(padded), "e": "AQAB"}));
        bad.push(json!({"kty": "oct", "kid": "shared", "k": "c2VjcmV0"}));
        bad.push(json!("no object"));
        for jwk in &bad {
            let keys = json!({"keys": [jwk]});
            assert_eq!(KeySet::from_json(&keys).err(), Some(KeySetError::Empty), "{jwk}");
        }
        bad.push(good.jwk());
        assert_eq!(KeySet::from_json(&json!({"keys": bad})).unwrap().len(), 1);
        assert_eq!(KeySet::from_json(&json!([])).err(), Some(KeySetError::Shape));
    }

    #[test]
    fn a_set_is_read_up_to_a_bound() {
        let key = Forge::new("k", Algorithm::EdDsa).jwk();
        let many = (0..MAX_KEYS + 10).map(|at| {
            let mut jwk = key.clone();
            jwk["kid"] = at.to_string().into();
            jwk
        });
        let keys = json!({"keys": many.collect::<Vec<_>>()});
        assert_eq!(KeySet::from_json(&keys).unwrap().len(), MAX_KEYS);
    }

    #[test]
    fn without_an_id_only_a_key_that_is_alone_is_meant() {
        let (one, two) = (Forge::new("1", Algorithm::Es256), Forge::new("2", Algorithm::Es256));
        let alone = KeySet::from_json(&set(&[&one])).unwrap();
        assert!(alone.find(None, Algorithm::Es256).is_ok());
        assert_eq!(alone.find(None, Algorithm::Rs256).err(), Some(KeyFault::OtherAlgorithm));
        assert_eq!(alone.find(Some("other"), Algorithm::Es256).err(), Some(KeyFault::Unknown));
        assert_eq!(alone.find(Some("1"), Algorithm::Es384).err(), Some(KeyFault::OtherAlgorithm));
        let both = KeySet::from_json(&set(&[&one, &two])).unwrap();
        assert_eq!(both.find(None, Algorithm::Es256).err(), Some(KeyFault::Unknown));
    }

    #[test]
    fn the_same_id_with_other_material_is_another_key() {
        let (one, two) = (Forge::new("1", Algorithm::Es256), Forge::new("1", Algorithm::Es256));
        let (one, two) = (set(&[&one]), set(&[&two]));
        let (one, two) = (KeySet::from_json(&one).unwrap(), KeySet::from_json(&two).unwrap());
        assert!(!one.same_as(&two));
        assert!(one.same_as(&KeySet::read(one.source().clone()).unwrap()));
    }
}
