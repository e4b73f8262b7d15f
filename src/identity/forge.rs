//! Issuers for tests: real keys, and tokens signed over whatever a test wants signed; a token endpoint without a network.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::{
    rand::SystemRandom,
    rsa,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
        Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaKeyPair,
        RsaPublicKeyComponents,
    },
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::{FutureExt, future::BoxFuture};
use serde_json::{Value, json};
use tokio::{runtime::Handle, time::sleep};

use crate::{
    api::TokenAnswer,
    identity::{
        TokenSource, TokenUnavailable, Tokens,
        jwks::Jwks,
        keys::{Algorithm, KeySet},
        verify::{Trusted, Verifier},
    },
    model::{ScopeSet, ServiceName},
    runtime::{Clock, Supervisor},
};

pub(super) fn base64url(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

enum Pair {
    Ec(EcdsaKeyPair),
    Rsa(RsaKeyPair),
    Ed(Ed25519KeyPair),
}

/// A private key with an id.
pub(super) struct Forge {
    pub(super) kid: String,
    pub(super) algorithm: Algorithm,
    pair: Pair,
}

impl Forge {
    pub(super) fn new(kid: &str, algorithm: Algorithm) -> Self {
        let rsa = || Pair::Rsa(RsaKeyPair::generate(rsa::KeySize::Rsa2048).unwrap());
        let pair = match algorithm {
            Algorithm::Es256 => {
                Pair::Ec(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
            }
            Algorithm::Es384 => {
                Pair::Ec(EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap())
            }
            Algorithm::Rs256 | Algorithm::Ps256 => rsa(),
            Algorithm::EdDsa => Pair::Ed(Ed25519KeyPair::generate().unwrap()),
        };
        Self { kid: kid.to_owned(), algorithm, pair }
    }

    /// The public part as it is published.
    pub(super) fn jwk(&self) -> Value {
        let mut jwk = match &self.pair {
            Pair::Ec(pair) => {
                let point = &pair.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                let curve = if x.len() == 32 { "P-256" } else { "P-384" };
                json!({"kty": "EC", "crv": curve, "x": base64url(x), "y": base64url(y)})
            }
            Pair::Rsa(pair) => {
                let parts = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
                json!({"kty": "RSA", "n": base64url(parts.n), "e": base64url(parts.e)})
            }
            Pair::Ed(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": base64url(pair.public_key())})
            }
        };
        jwk["kid"] = self.kid.clone().into();
        jwk["alg"] = self.algorithm.as_str().into();
        jwk["use"] = "sig".into();
        jwk
    }

    /// The public part as bytes: what a confused verifier would take for a shared secret.
    pub(super) fn public_bytes(&self) -> Vec<u8> {
        match &self.pair {
            Pair::Ec(pair) => pair.public_key().as_ref().to_vec(),
            Pair::Rsa(pair) => pair.public_key().as_ref().to_vec(),
            Pair::Ed(pair) => pair.public_key().as_ref().to_vec(),
        }
    }

    /// Signs exactly these texts as header and payload.
    pub(super) fn sign(&self, header: &str, payload: &str) -> String {
        let message = format!("{}.{}", base64url(header), base64url(payload));
        let random = SystemRandom::new();
        let signature = match &self.pair {
            Pair::Ec(pair) => pair.sign(&random, message.as_bytes()).unwrap().as_ref().to_vec(),
            Pair::Ed(pair) => pair.sign(message.as_bytes()).as_ref().to_vec(),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                let padding: &'static dyn aws_lc_rs::signature::RsaEncoding =
                    if self.algorithm == Algorithm::Ps256 {
                        &RSA_PSS_SHA256
                    } else {
                        &RSA_PKCS1_SHA256
                    };
                pair.sign(padding, &random, message.as_bytes(), &mut signature).unwrap();
                signature
            }
        };
        format!("{message}.{}", base64url(signature))
    }

    /// A proper header for this key.
    pub(super) fn header(&self) -> Value {
        json!({"alg": self.algorithm.as_str(), "typ": "at+jwt", "kid": self.kid})
    }
}

/// A set of these keys.
pub(super) fn set(keys: &[&Forge]) -> Value {
    json!({"keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>()})
}

/// How long a token of the test issuer lives.
pub(super) const LIFE: Duration = Duration::from_secs(3600);

/// A token endpoint whose answers a test decides.
#[derive(Default)]
pub(super) struct Issuer {
    asked: AtomicU32,
    pub(super) down: AtomicBool,
    /// The life of its tokens, if it is not the usual one.
    pub(super) seconds: AtomicU64,
    /// The key that signs, for tokens that are JWTs.
    pub(super) kid: Mutex<Option<&'static str>>,
}

impl Issuer {
    /// How often it was asked.
    pub(super) fn asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }
}

/// Asks the issuer.
pub(super) struct Source(pub(super) Arc<Issuer>);

impl TokenSource for Source {
    fn ask(
        &self,
        audience: &ServiceName,
    ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
        let turn = self.0.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let issuer = self.0.clone();
        let text = match *issuer.kid.lock().unwrap() {
            None => format!("{audience}-{turn}"),
            Some(kid) => {
                let head = base64url(format!(r#"{{"kid":"{kid}"}}"#));
                let claims = format!(r#"{{"iss":"https://i","jti":"{turn}","exp":1900000000}}"#);
                format!("{head}.{}.AA", base64url(claims))
            }
        };
        async move {
            sleep(Duration::from_millis(50)).await;
            if issuer.down.load(Ordering::SeqCst) {
                return Err(TokenUnavailable::Deadline);
            }
            let scope = ScopeSet::parse_list("read:data").unwrap();
            let life = match issuer.seconds.load(Ordering::SeqCst) {
                0 => LIFE,
                seconds => Duration::from_secs(seconds),
            };
            Ok(TokenAnswer { access_token: text.into(), expires_in: Some(life), scope })
        }
        .boxed()
    }
}

/// A supervisor of tasks on the current runtime.
pub(super) fn here() -> Supervisor {
    Supervisor::new(Handle::current())
}

/// Tokens of an issuer, but of these services from a file.
pub(super) fn tokens(files: &[(&str, PathBuf)]) -> (Tokens, Arc<Issuer>) {
    let issuer = Arc::new(Issuer::default());
    let files = files.iter().map(|(name, path)| (name.parse().unwrap(), path.clone())).collect();
    let clock = Clock::starting_at(jiff::Timestamp::from_second(1_800_000_000).unwrap());
    let source = Arc::new(Source(issuer.clone()));
    (Tokens::new(source, files, here(), clock), issuer)
}

/// The callee of most tests.
pub(super) fn data() -> ServiceName {
    "data".parse().unwrap()
}

/// Who issues what [`body`] says.
pub(super) const ISSUER: &str = "https://control.example:7070";
/// When it does.
pub(super) const NOW: i64 = 1_800_000_000;
/// For whom.
pub(super) const HERE: &[&str] = &["data-intelligence"];

/// Proper claims.
pub(super) fn body() -> Value {
    json!({
        "iss": ISSUER, "sub": "web-application", "aud": "data-intelligence",
        "exp": NOW + 3600, "iat": NOW, "nbf": NOW, "jti": "1",
        "scope": "write:query read:data", "scopes": ["read:data", "write:query"],
    })
}

/// Trusts the issuer with these keys, as the project's own.
pub(super) fn trusting(keys: &[&Forge]) -> Verifier {
    let keys = KeySet::from_json(&set(keys)).unwrap();
    verifier(ISSUER, true, keys, &[])
}

/// Trusts one issuer.
pub(super) fn verifier(issuer: &str, ours: bool, keys: KeySet, audiences: &[&str]) -> Verifier {
    let issuer: Arc<str> = issuer.into();
    Verifier::new(vec![Trusted {
        issuer: issuer.clone(),
        ours,
        audiences: audiences.iter().map(|&name| name.to_owned()).collect(),
        keys: Jwks::fixed(issuer, keys),
    }])
}

/// Has no keys at all.
pub(super) fn trusting_nobody() -> Verifier {
    verifier(ISSUER, true, KeySet::default(), &[])
}
