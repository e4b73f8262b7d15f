//! Tokens, keys, and the paths that rules are about.

use std::{collections::BTreeSet, fmt, sync::Arc};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use infrar::identity::{
    Access, Action, Jwks, KeySet, LEEWAY_SECONDS, PathRule, Rule, Rules, Trusted, Verifier,
    normalise,
};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Value, json};

const ISSUER: &str = "https://issuer.example";
const NOW: i64 = 1_800_000_000;

pub const PATHS: &[&[u8]] = &[
    b"/",
    b"/query",
    b"/a/./b/../c//d/%2e%2E/e%2Ff/%7Eg",
    b"/%252e%252e/x",
    b"/a;x=1/..;/b",
    b"/\\..\\a",
    b"/open/a/b;c",
    b"/open/..\\closed",
    b"/open/%2e%2e%5cclosed",
    b"/open/..;x/..%2fclosed",
    b"/%6fpen/./x%2F..%2F..%2Fclosed",
    b"/healthz",
    b"//open/.",
    b"/opdn/..;/open/x/../opn/..;/ej/../op/..;/../opn/..;/ej/../op/..;/of",
];

pub const TOKENS: &[&[u8]] = &[
    b"{\"alg\":\"ES256\",\"kid\":\"k\",\"typ\":\"at+jwt\"}\0{\"iss\":\"https://issuer.example\",\"aud\":\"reports\",\"sub\":\"web\",\"exp\":4000000000}\0signature",
    b"{\"alg\":\"none\"}\0{\"iss\":\"https://issuer.example\"}\0",
    b"{\"alg\":\"HS256\",\"kid\":\"k\",\"jku\":\"https://elsewhere.example\"}\0{\"iss\":\"https://issuer.example\",\"aud\":[\"reports\",\"x\"],\"exp\":1e30}\0s",
];

/// `head NUL claims`, or the claims alone.
pub const CLAIMS: &[&[u8]] = &[
    b"{\"iss\":\"https://issuer.example\",\"aud\":\"reports\",\"sub\":\"web\",\"exp\":1800000060,\"nbf\":1800000000,\"scope\":\"read:data write:query\",\"scopes\":[\"read:data\"]}",
    b"{\"iss\":\"https://issuer.example\",\"aud\":[\"x\",\"reports\"],\"sub\":\"a-b\",\"exp\":1.8e9,\"x\":{\"a\":1,\"a\":2}}",
    b"{\"alg\":\"EdDSA\",\"kid\":\"k\",\"typ\":\"application/at+jwt\"}\0{\"iss\":\"https://issuer.example\",\"aud\":\"reports\",\"sub\":\"web\",\"exp\":1800000000}",
    b"{\"alg\":\"EdDSA\",\"typ\":\"at+jwt\",\"crit\":[\"exp\"]}\0{\"iss\":\"https://issuer.example\",\"aud\":\"reports\",\"sub\":\"w\\u0065b\",\"exp\":1800000000}",
];

/// Key sets as issuers publish them.
pub const KEYS: &[&[u8]] = &[
    b"{\"keys\":[{\"kty\":\"EC\",\"crv\":\"P-256\",\"kid\":\"k\",\"alg\":\"ES256\",\"use\":\"sig\",\"x\":\"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4\",\"y\":\"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM\"}]}",
    b"{\"keys\":[{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\",\"key_ops\":[\"verify\"]},{\"kty\":\"oct\",\"k\":\"AAAA\"},7]}",
    b"{\"keys\":[{\"kty\":\"RSA\",\"kid\":\"r\",\"n\":\"wQ\",\"e\":\"AQAB\",\"alg\":\"PS256\"}]}",
];

thread_local! {
    static SIGNER: (Ed25519KeyPair, Verifier) = signer();
    static RULES: Rules = rules();
}

fn verifier(keys: &Value) -> Verifier {
    let keys = KeySet::from_json(keys).expect("a key of ours");
    let issuer: Arc<str> = Arc::from(ISSUER);
    let keys = Jwks::fixed(Arc::clone(&issuer), keys);
    Verifier::new(vec![Trusted { issuer, ours: true, audiences: Vec::new(), keys }])
}

fn signer() -> (Ed25519KeyPair, Verifier) {
    let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("32 bytes are a seed");
    let x = BASE64_URL_SAFE_NO_PAD.encode(pair.public_key());
    let keys = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "k", "x": x}]});
    let verifier = verifier(&keys);
    (pair, verifier)
}

fn rules() -> Rules {
    let rule = |path: &str, access| Rule {
        path: path.parse::<PathRule>().expect("a plain path"),
        methods: None,
        access,
    };
    let scopes = Access::Scopes("admin".parse().into_iter().collect());
    let list =
        vec![rule("/open/*", Access::Public), rule("/healthz", Access::Public), rule("/*", scopes)];
    Rules::new(Some(list)).expect("plain rules")
}

/// A normal path is normal, and has no segment that another reader would resolve.
pub fn path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(normal) = normalise(text) else { return };
    assert_eq!(normalise(&normal).as_deref(), Ok(&*normal), "normalising twice");
    if normal != "*" {
        assert!(normal.starts_with('/'));
        assert!(!normal.contains("//"), "{normal}");
        assert!(normal.split('/').all(|part| part != "." && part != ".."), "{normal}");
    }

    RULES.with(|rules| {
        let action = rules.action(&http::Method::GET, text);
        // The normal form may be less clear: a `..` may have taken a `..;` with it that others would climb by.
        let plain = rules.action(&http::Method::GET, &normal);
        if !matches!(action, Action::Unclear(_)) && !matches!(plain, Action::Unclear(_)) {
            assert_eq!(action, plain, "{text} and {normal}");
        }
        if action == Action::Public {
            let liberal = liberal(text);
            let open = liberal.starts_with("/open/") || liberal == "/healthz";
            assert!(open, "{text} is open, and a liberal server reads {liberal}");
        }
    });
}

/// A path as the most obliging of servers reads it: decoded, `\\` as `/`, parameters dropped, dots resolved.
fn liberal(path: &str) -> String {
    let mut bytes = path.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let hex: String = bytes.by_ref().take(2).map(char::from).collect();
                u8::from_str_radix(&hex, 16).expect("it was decoded before")
            }
            other => other,
        };
        decoded.push(if byte == b'\\' { b'/' } else { byte });
    }
    let (mut kept, mut open) = (Vec::new(), true);
    for segment in decoded.split(|byte| *byte == b'/') {
        let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
        open = matches!(name, b"" | b"." | b"..");
        match name {
            b"" | b"." => {}
            b".." => drop(kept.pop()),
            name => kept.push(String::from_utf8_lossy(name).into_owned()),
        }
    }
    let end = if open && !kept.is_empty() { "/" } else { "" };
    format!("/{}{end}", kept.join("/"))
}

/// Whatever a token says: without the key nobody makes one that is accepted. `head NUL claims NUL signature`, or the token itself.
pub fn token(data: &[u8]) {
    let verifier = verifier(&json!({ "keys": [{
        "kty": "EC", "crv": "P-256", "kid": "k", "alg": "ES256", "use": "sig",
        "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
    }] }));
    assert!(verifier.verify(data, &["reports"], NOW).is_err(), "a token out of thin air");
    let assembled: Vec<String> =
        data.splitn(3, |byte| *byte == 0).map(|part| BASE64_URL_SAFE_NO_PAD.encode(part)).collect();
    let assembled = assembled.join(".");
    assert!(verifier.verify(assembled.as_bytes(), &["reports"], NOW).is_err(), "{assembled}");
}

/// A `NumericDate`, which may have a fraction, in whole seconds.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a whole number within i64, as an accepted one is"
)]
fn seconds(date: &Value, whole: impl Fn(f64) -> f64) -> i64 {
    date.as_i64().unwrap_or_else(|| whole(date.as_f64().expect("a number")) as i64)
}

/// A token that is signed and accepted says what any other JSON parser reads in it, and nothing twice.
pub fn claims(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let (first, second) = (parts.next().unwrap_or_default(), parts.next());
    let usual: &[u8] = b"{\"alg\":\"EdDSA\",\"kid\":\"k\",\"typ\":\"at+jwt\"}";
    let (head, payload) = second.map_or((usual, first), |payload| (first, payload));
    let encode = |part: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(part);
    let message = format!("{}.{}", encode(head), encode(payload));
    let accepted = SIGNER.with(|(pair, verifier)| {
        let signature = pair.sign(message.as_bytes());
        let token = format!("{message}.{}", encode(signature.as_ref()));
        verifier.verify(token.as_bytes(), &["reports"], NOW)
    });
    let Ok(claims) = accepted else { return };
    let head = members(head);
    assert_eq!(head["alg"], "EdDSA");
    let kind = head["typ"].as_str().unwrap_or_default().to_ascii_lowercase();
    assert!(kind == "at+jwt" || kind == "application/at+jwt", "{kind}");
    assert!(head.get("crit").is_none() && head.get("jwk").is_none() && head.get("jku").is_none());
    let said = members(payload);
    assert_eq!(said["iss"], ISSUER);
    assert_eq!(said["sub"], claims.caller().as_str());
    assert_eq!(seconds(&said["exp"], f64::floor), claims.expires_at());
    assert!(claims.expires_at() > NOW - LEEWAY_SECONDS);
    let begin = said.get("nbf").map(|begin| seconds(begin, f64::ceil));
    assert!(begin.is_none_or(|begin| begin <= NOW + LEEWAY_SECONDS));
    assert!(strings(&said["aud"]).contains("reports"));
    assert!(claims.is_for("reports"));
    let scopes = ["scope", "scopes"].map(|name| strings(said.get(name).unwrap_or(&Value::Null)));
    let scopes: BTreeSet<&str> = scopes
        .iter()
        .flatten()
        .flat_map(|text| text.split(' '))
        .filter(|it| !it.is_empty())
        .collect();
    assert_eq!(scopes, claims.scopes().iter().map(|scope| scope.as_str()).collect());
    assert_eq!(claims.claims_header(), encode(payload).as_str());
}

/// The members of a JSON object, none of which may be there twice.
fn members(json: &[u8]) -> Value {
    struct Names(BTreeSet<String>);
    impl<'de> Visitor<'de> for &mut Names {
        type Value = ();
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                assert!(self.0.insert(name), "a member twice");
            }
            Ok(())
        }
    }
    let mut names = Names(BTreeSet::new());
    let mut reader = serde_json::Deserializer::from_slice(json);
    reader.deserialize_map(&mut names).expect("what is accepted is an object");
    serde_json::from_slice(json).expect("what is accepted is JSON")
}

fn strings(value: &Value) -> BTreeSet<String> {
    let one = value.as_str().map(str::to_owned);
    let many = value.as_array().into_iter().flatten();
    one.into_iter().chain(many.filter_map(|it| it.as_str().map(str::to_owned))).collect()
}

/// A key set that is accepted has as many keys when it was kept on disk and is read again.
pub fn keys(data: &[u8]) {
    let Ok(json) = serde_json::from_slice::<Value>(data) else { return };
    let Ok(keys) = KeySet::from_json(&json) else { return };
    assert!(!keys.is_empty() && keys.len() <= 64);
    let kept = serde_json::to_value(keys.source()).expect("keys are JSON");
    assert_eq!(KeySet::from_json(&kept).map(|again| again.len()), Ok(keys.len()), "{kept}");
}
