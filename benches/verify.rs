//! What an inbound token costs: a hit in a worker's memory, and a full verification per algorithm.
//!
//! `signature` is the bare check with a parsed key, so that `miss` less `signature` is what parsing, claims and
//! prepared headers cost.

#![expect(clippy::expect_used, reason = "a bench that cannot be set up should end")]

use std::{hint::black_box, sync::Arc};

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
        ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair,
        RsaPublicKeyComponents,
    },
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use criterion::{Criterion, criterion_group, criterion_main};
use infrar::identity::{Jwks, KeySet, TokenCache, Trusted, Verifier};
use serde_json::{Value, json};

const ISSUER: &str = "https://control.example:7070";
const NOW: i64 = 1_800_000_000;
const HERE: &[&str] = &["data-intelligence"];

struct Case {
    name: &'static str,
    verifier: Verifier,
    token: String,
    key: ParsedPublicKey,
}

fn base64url(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// What is signed: header and claims as our own issuer writes them.
fn message(algorithm: &str) -> String {
    let header = json!({"typ": "at+jwt", "alg": algorithm, "kid": "bench"}).to_string();
    let payload = json!({
        "iss": ISSUER, "sub": "web-application", "aud": "data-intelligence", "exp": NOW + 3600,
        "iat": NOW, "nbf": NOW, "jti": "0199d3f0-7c1e-7d52-9c1f-6f1f5a3a2b10",
        "client_id": "web-application", "scope": "read:data write:query",
        "scopes": ["read:data", "write:query"],
    });
    format!("{}.{}", base64url(header), base64url(payload.to_string()))
}

fn case(
    name: &'static str,
    message: &str,
    signature: &[u8],
    jwk: &Value,
    key: ParsedPublicKey,
) -> Case {
    let keys = KeySet::from_json(&json!({"keys": [jwk]})).expect("the key was just made");
    let issuer: Arc<str> = ISSUER.into();
    let keys = Jwks::fixed(issuer.clone(), keys);
    let trusted = Trusted { issuer, ours: true, audiences: Vec::new(), keys };
    let token = format!("{message}.{}", base64url(signature));
    Case { name, verifier: Verifier::new(vec![trusted]), token, key }
}

fn es256() -> Case {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key can be made");
    let message = message("ES256");
    let signature = pair.sign(&SystemRandom::new(), message.as_bytes()).expect("it can sign");
    let point = pair.public_key().as_ref();
    let (x, y) = point.split_at(1).1.split_at(32);
    let jwk =
        json!({"kty": "EC", "crv": "P-256", "kid": "bench", "x": base64url(x), "y": base64url(y)});
    let key = ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).expect("the key was just made");
    case("es256", &message, signature.as_ref(), &jwk, key)
}

fn rs256() -> Case {
    let pair = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key can be made");
    let message = message("RS256");
    let mut signature = vec![0; pair.public_modulus_len()];
    pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature)
        .expect("it can sign");
    let parts = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
    let jwk =
        json!({"kty": "RSA", "kid": "bench", "n": base64url(&parts.n), "e": base64url(&parts.e)});
    let key =
        parts.to_parsed_public_key(&RSA_PKCS1_2048_8192_SHA256).expect("the key was just made");
    case("rs256", &message, &signature, &jwk, key)
}

fn verify(criterion: &mut Criterion) {
    for case in [es256(), rs256()] {
        let token = case.token.as_bytes();
        let mut group = criterion.benchmark_group(case.name);
        let mut cache = TokenCache::new(10_000);
        cache.verify(&case.verifier, token, HERE, NOW).expect("the token is valid");
        group.bench_function("hit", |bench| {
            bench.iter(|| cache.verify(&case.verifier, black_box(token), HERE, NOW));
        });
        group.bench_function("miss", |bench| {
            bench.iter(|| case.verifier.verify(black_box(token), HERE, NOW));
        });
        let (message, signature) = case.token.rsplit_once('.').expect("a token has dots");
        let signature = URL_SAFE_NO_PAD.decode(signature).expect("it was just encoded");
        group.bench_function("signature", |bench| {
            bench.iter(|| case.key.verify_sig(black_box(message.as_bytes()), &signature));
        });
        group.finish();
    }
}

criterion_group!(benches, verify);
criterion_main!(benches);
