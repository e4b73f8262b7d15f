//! Whom the proxies trust: hostile tokens at a real inbound listener, TLS, and where a token may go.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, crypto::sign, encode};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, pki_types::ServerName};
use serde_json::{Value, json};
use support::{Folder, Infrar, Line, Origin, Pair, Said, free_ports, get, header, talk, until};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

const ISSUER: &str = "https://issuer.example";

/// A callee's sidecar that trusts one issuer whose keys are in a file, and the app behind it.
struct Callee {
    infrar: Infrar,
    inbound: SocketAddr,
    admin: SocketAddr,
    app: Origin,
    issuer: KeyPair,
    folder: Folder,
}

impl Callee {
    async fn open(tls: &str, keys: &str) -> Self {
        let folder = Folder::new();
        let [inbound, admin] = free_ports();
        let issuer = KeyPair::generate().expect("a key");
        folder.write("jwks.json", &json!({"keys": [jwk(&issuer, "k1")]}).to_string());
        folder.write(
            "project.yaml",
            &format!(
                "project: shop\nservices:\n  data:\n    scopes: [read:data, write:query]\n    endpoints:\n      \
                 - {{ url: 'https://localhost:{}', provider: aws, region: us-east-1 }}\n\
                 \x20 reports: {{ scopes: [read:all], endpoints: [{{ url: 'https://reports.example', provider: aws, region: us-east-1 }}] }}\n\
                 issuers:\n  - {{ issuer: '{ISSUER}', jwks_file: jwks.json, audiences: [reports, 'api://shop'] }}\n\
                 permissions: {{ web: {{ data: [read:data, write:query] }} }}\n",
                inbound.port()
            ),
        );
        let certificates = Certificates::new();
        certificates.write(&folder);
        folder.write("ca.pem", &certificates.ca.pem());
        let app = Origin::plain("reached").await;
        folder.write(
            "proxy.yaml",
            &format!(
                "service: data\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
                 inbound:\n  listen: '{inbound}'\n  app: 'http://{}'\n  tls: {tls}\n{keys}  rules:\n    \
                 - {{ path: /healthz, public: true }}\n    - {{ path: /any, scopes: [] }}\n    \
                 - {{ methods: [POST], path: /query, scopes: [write:query] }}\n",
                app.at
            ),
        );
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, inbound, admin, app, issuer, folder }
    }

    async fn asks(&self, method: &str, path: &str, further: &str) -> Said {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: data\r\ncontent-length: 0\r\nconnection: close\r\n{further}\r\n"
        );
        talk(self.inbound, request).await
    }

    fn token(&self, header: &Header, claims: &Value) -> String {
        encode(header, claims, &signer(&self.issuer)).expect("a token")
    }
}

/// A CA of the story's own, which makes certificates for `localhost`.
struct Certificates {
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Certificates {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "the story's CA");
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key"));
        Self { ca: ca.expect("a CA") }
    }

    /// A new leaf in `folder`; its certificate in DER.
    fn write(&self, folder: &Folder) -> Vec<u8> {
        let key = KeyPair::generate().expect("a key");
        let leaf = CertificateParams::new(["localhost".to_owned()]).expect("names");
        let leaf = leaf.signed_by(&key, &self.ca).expect("a leaf");
        folder.write("leaf.key", &key.serialize_pem());
        folder.write("leaf.pem", &leaf.pem());
        leaf.der().to_vec()
    }
}

fn signer(key: &KeyPair) -> EncodingKey {
    EncodingKey::from_ec_der(&key.serialize_der())
}

fn jwk(key: &KeyPair, kid: &str) -> Value {
    let point = key.public_key_raw();
    let part = |from: usize| URL_SAFE_NO_PAD.encode(&point[from..from + 32]);
    json!({"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": kid, "x": part(1), "y": part(33)})
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_secs()).expect("this century")
}

fn claims() -> Value {
    json!({"iss": ISSUER, "sub": "web", "aud": "data", "exp": now() + 600, "nbf": now() - 1, "iat": now() - 1,
           "scope": "read:data write:query"})
}

fn with(change: &Value) -> Value {
    changed(claims(), change)
}

fn changed(mut claims: Value, change: &Value) -> Value {
    for (key, value) in change.as_object().expect("an object") {
        claims[key] = value.clone();
    }
    claims
}

fn es256() -> Header {
    Header { kid: Some("k1".to_owned()), ..Header::new(Algorithm::ES256) }
}

/// A token with a header that no library would write, signed with `key` as if it were right.
fn signed(key: &EncodingKey, header: &str, claims: &Value) -> String {
    let [header, claims] =
        [header.to_owned(), claims.to_string()].map(|part| URL_SAFE_NO_PAD.encode(part));
    let message = format!("{header}.{claims}");
    let signature = sign(message.as_bytes(), key, Algorithm::ES256).expect("a signature");
    format!("{message}.{signature}")
}

/// Tokens that nothing but their header betrays: `key`, which is accepted as `kid`, has signed each. `kind` is the member
/// that says what they are.
fn betrayed_by_their_header(
    key: &EncodingKey,
    [kid, kind]: [&str; 2],
    claims: &Value,
    (jwk, elsewhere): (&Value, SocketAddr),
) -> Vec<(String, String)> {
    let usual = format!(r#""alg":"ES256",{kind}"#);
    let named = format!(r#"{usual}"kid":"{kid}""#);
    let headers = [
        format!(r#"{named},"kid":"{kid}""#),
        format!(r#"{named},"kid":"k9""#),
        format!(r#""kid":"k9",{named}"#),
        format!(r#"{named},"\u006bid":"{kid}""#),
        format!(r#"{usual}"kid":"""#),
        format!(r#"{usual}"kid":null"#),
        format!(r#"{usual}"kid":1"#),
        format!(r#"{usual}"kid":["{kid}"]"#),
        format!(r#"{usual}"kid":"../../{kid}""#),
        format!(r#"{usual}"kid":"k2""#),
        format!(r#""alg":"none",{named}"#),
        format!(r#"{named},"alg":"ES256""#),
        named.replace("ES256", "none"),
        named.replace("ES256", "es256"),
        named.replace("ES256", "ES384"),
        named.replace("ES256", "HS256"),
        named.replace(r#""ES256""#, "256"),
        named.replace(r#""ES256""#, r#"["ES256"]"#),
        named.replace(r#""alg":"ES256","#, ""),
        format!(r#"{named},"jku":"http://{elsewhere}/jwks""#),
        format!(r#"{named},"x5u":"http://{elsewhere}/chain""#),
        format!(r#"{named},"jwk":{jwk}"#),
        format!(r#"{named},"x5c":["MIIB"]"#),
        format!(r#"{named},"crit":["exp"]"#),
        format!(r#"{named},"crit":[]"#),
        format!(r#"{named},"crit":["b64"],"b64":true"#),
        format!(r#"{named},"b64":false"#),
        format!(r#"{named},"x":{{"a":1,"a":2}}"#),
    ];
    let mut cases = Vec::from(headers.map(|header| {
        let header = format!("{{{header}}}");
        let token = signed(key, &header, claims);
        (header, token)
    }));
    // The same without anything amiss is let in, so it is the header that each is refused for.
    cases.push((String::new(), signed(key, &format!("{{{named}}}"), claims)));
    cases
}

/// What the claims of a token must not say.
fn wrong_claims() -> Vec<Value> {
    vec![
        json!({"exp": now() - 31}),
        json!({"exp": -62_135_596_800_i64}),
        json!({"exp": null}),
        json!({"exp": "9999999999"}),
        json!({"nbf": now() + 60}),
        json!({"aud": "reports"}),
        json!({"aud": ["reports", "web"]}),
        json!({"aud": null}),
        json!({"iss": "https://issuer.example.evil.example"}),
        json!({"iss": "https://issuer.example/"}),
        json!({"iss": null}),
        json!({"sub": null}),
        json!({"sub": ""}),
        json!({"scope": {}}),
    ]
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

#[tokio::test]
async fn hostile_tokens_are_refused_and_never_reach_the_app() {
    let callee = Callee::open("off", "").await;
    let good = callee.token(&es256(), &claims());
    let said = callee.asks("POST", "/query", &bearer(&good)).await;
    assert_eq!((said.status(), &*said.body), (200, "reached"), "{said:?}\n{}", callee.infrar.log());
    let seen = callee.app.heads().len();

    let stranger = KeyPair::generate().expect("a key");
    let strangers =
        |header: &Header| encode(header, &claims(), &signer(&stranger)).expect("a token");
    let (head, rest) = good.split_once('.').expect("three parts");
    let (payload, signature) = rest.split_once('.').expect("three parts");
    let signature = URL_SAFE_NO_PAD.decode(signature).expect("base64url");
    let public = callee.issuer.public_key_pem();
    let hs256 = |secret: &[u8]| {
        let header = Header { kid: Some("k1".to_owned()), ..Header::new(Algorithm::HS256) };
        encode(&header, &claims(), &EncodingKey::from_secret(secret)).expect("a token")
    };
    let tampered = URL_SAFE_NO_PAD.encode(with(&json!({"sub": "root"})).to_string());
    let mut flipped = signature.clone();
    flipped[10] ^= 1;
    let mut cases: Vec<(&str, String)> = vec![
        ("no algorithm", format!("{}.{payload}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#))),
        ("HS256 with the public key in PEM", hs256(public.as_bytes())),
        ("HS256 with the public key in raw", hs256(callee.issuer.public_key_raw())),
        ("HS256 with nothing", hs256(b"")),
        ("another key under this name", strangers(&es256())),
        ("another key without a name", strangers(&Header::new(Algorithm::ES256))),
        (
            "an empty kid",
            strangers(&Header { kid: Some(String::new()), ..Header::new(Algorithm::ES256) }),
        ),
        (
            "an unknown kid",
            strangers(&Header { kid: Some("k2".to_owned()), ..Header::new(Algorithm::ES256) }),
        ),
        (
            "a kid that is a path",
            strangers(&Header {
                kid: Some("../../jwks.json".to_owned()),
                ..Header::new(Algorithm::ES256)
            }),
        ),
        ("changed claims", format!("{head}.{tampered}.{}", URL_SAFE_NO_PAD.encode(&signature))),
        ("a changed signature", format!("{head}.{payload}.{}", URL_SAFE_NO_PAD.encode(&flipped))),
        ("a signature of zeros", format!("{head}.{payload}.{}", URL_SAFE_NO_PAD.encode([0; 64]))),
        ("no signature", format!("{head}.{payload}.")),
        ("two parts", format!("{head}.{payload}")),
        ("four parts", format!("{good}.x")),
        ("no base64", "a.b!.c".to_owned()),
        ("nothing", String::new()),
        ("oversized", callee.token(&es256(), &with(&json!({"x": "x".repeat(20_000)})))),
    ];
    let (key, own) = (signer(&callee.issuer), jwk(&callee.issuer, "k1"));
    let mut others = betrayed_by_their_header(&key, ["k1", ""], &claims(), (&own, callee.app.at));
    let (_, sound) = others.pop().expect("the sound one comes last");
    let said = callee.asks("POST", "/query", &bearer(&sound)).await;
    assert_eq!(said.status(), 200, "{said:?}");
    let seen = seen + 1;
    cases.extend(others.iter().map(|(what, token)| (what.as_str(), token.clone())));
    let wrong = wrong_claims();
    let wrong: Vec<_> = wrong.iter().map(|change| (change.to_string(), with(change))).collect();
    let of = |claims: &Value| callee.token(&es256(), claims);
    cases.extend(wrong.iter().map(|(what, claims)| (what.as_str(), of(claims))));
    for (what, token) in cases {
        let said = callee.asks("POST", "/query", &bearer(&token)).await;
        assert_eq!(said.status(), 401, "{what}: {said:?}");
        assert!(
            ["token-invalid", "token-expired", "token-missing"].contains(&said.code()),
            "{what}: {said:?}"
        );
        assert!(
            said.header("www-authenticate").is_some_and(|it| it.starts_with("Bearer")),
            "{what}: {said:?}"
        );
        if token.len() > 20 {
            assert!(!callee.infrar.log().contains(&token), "{what}: a token is in the log");
        }
    }
    let said = callee.asks("POST", "/query", &format!("{}{}", bearer(&good), bearer(&good))).await;
    assert_eq!(said.status(), 401, "two tokens: {said:?}");
    let said = callee.asks("POST", "/query", "authorization: Basic d2ViOng=\r\n").await;
    assert_eq!(said.status(), 401, "{said:?}");
    assert_eq!(callee.app.heads().len(), seen, "{:?}", callee.app.heads().last());
}

#[tokio::test]
async fn tokens_of_the_projects_own_issuer_are_access_tokens_or_refused() {
    let app = Origin::plain("reached").await;
    let pair = Pair::open(app.at, "", "").await;
    let issuer = format!("http://{}", pair.control);
    let published = get(pair.control, &pair.control.to_string(), "/.well-known/jwks.json").await;
    let published: Value = serde_json::from_str(&published.body).expect("a key set");
    let own = &published["keys"][0];
    let kid = own["kid"].as_str().expect("a name");
    let files = std::fs::read_dir(pair.folder.path("control/keys")).expect("keys");
    let pem = files.flatten().map(|file| std::fs::read(file.path()).expect("our own file")).next();
    let key = EncodingKey::from_ec_pem(&pem.expect("a key")).expect("a key");
    let claims = json!({"iss": issuer, "sub": "web", "client_id": "web", "aud": "data", "exp": now() + 600,
        "nbf": now() - 1, "iat": now() - 1, "jti": "1", "scope": "use", "scopes": ["use"]});
    let status = async |token: &str| {
        let token = bearer(token);
        let said = talk(
            pair.inbound,
            format!("GET / HTTP/1.1\r\nhost: data\r\nconnection: close\r\n{token}\r\n"),
        )
        .await;
        (said.status(), said.code().to_owned())
    };
    let kind = r#""typ":"at+jwt","#;
    let mut cases = betrayed_by_their_header(&key, [kid, kind], &claims, (own, app.at));
    let (_, sound) = cases.pop().expect("the sound one comes last");
    assert_eq!(status(&sound).await.0, 200, "{}", pair.logs());
    for kind in ["", r#""typ":"JWT","#, r#""typ":"dpop+jwt","#, r#""typ":["at+jwt"],"#] {
        let header = format!(r#"{{"alg":"ES256",{kind}"kid":"{kid}"}}"#);
        let token = signed(&key, &header, &claims);
        cases.push((header, token));
    }
    let header = format!(r#"{{"alg":"ES256",{kind}"kid":"{kid}"}}"#);
    for change in wrong_claims().into_iter().chain([json!({"sub": "Not A Name"})]) {
        let token = signed(&key, &header, &changed(claims.clone(), &change));
        cases.push((change.to_string(), token));
    }
    for (what, token) in &cases {
        let (status, code) = status(token).await;
        assert_eq!(status, 401, "{what}: {code}");
    }
    // A caller that nothing is granted to is who it is, and may not.
    let stranger = signed(&key, &header, &changed(claims.clone(), &json!({"sub": "stranger"})));
    assert_eq!(status(&stranger).await, (403, "not-permitted".to_owned()));
    assert_eq!(app.heads().len(), 1, "{:?}", app.heads().last());
}

#[tokio::test]
async fn an_audience_that_is_a_services_name_opens_that_service_alone() {
    let callee = Callee::open("off", "").await;
    let status = async |audience: &str| {
        let token = callee.token(&es256(), &with(&json!({"aud": audience})));
        callee.asks("POST", "/query", &bearer(&token)).await.status()
    };
    assert_eq!(status("data").await, 200);
    assert_eq!(status("reports").await, 401);
    assert_eq!(status("api://shop").await, 200);
}

#[tokio::test]
async fn keys_in_a_file_change_with_it() {
    let callee = Callee::open("off", "").await;
    let next = KeyPair::generate().expect("a key");
    let header = Header { kid: Some("k2".to_owned()), ..Header::new(Algorithm::ES256) };
    let token = bearer(&encode(&header, &claims(), &signer(&next)).expect("a token"));
    assert_eq!(callee.asks("POST", "/query", &token).await.status(), 401);
    callee.folder.write("jwks.json", &json!({"keys": [jwk(&next, "k2")]}).to_string());
    until("the new key is believed", async || {
        callee.asks("POST", "/query", &token).await.status() == 200
    })
    .await;
    let old = bearer(&callee.token(&es256(), &claims()));
    assert_eq!(callee.asks("POST", "/query", &old).await.status(), 401);
}

#[tokio::test]
async fn rules_decide_and_the_app_learns_who_calls_from_the_proxy_alone() {
    let callee = Callee::open("off", "  forward_authorization: false\n").await;
    let reader = bearer(&callee.token(&es256(), &with(&json!({"scope": "read:data"}))));
    let writer = bearer(&callee.token(&es256(), &claims()));
    let status = async |method: &str, path: &str, further: &str| {
        let said = callee.asks(method, path, further).await;
        (said.status(), said.code().to_owned())
    };
    assert_eq!(status("POST", "/query", "").await, (401, "token-missing".to_owned()));
    assert_eq!(status("POST", "/query", &reader).await, (403, "scope-missing".to_owned()));
    assert_eq!(status("GET", "/query", &writer).await, (403, "not-permitted".to_owned()));
    assert_eq!(status("GET", "/nowhere", &writer).await, (403, "not-permitted".to_owned()));
    assert_eq!(status("GET", "/any", &reader).await.0, 200);
    assert_eq!(status("GET", "/healthz", "").await.0, 200);
    // Names for the same path are the same path, and never a way around a rule.
    for path in [
        "/healthz/../query",
        "/healthz/%2e%2e/query",
        "//query",
        "/./query",
        "/%71uery",
        "/healthz/..%2fquery",
    ] {
        let (status, code) = status("POST", path, "").await;
        assert!(matches!(status, 400 | 401 | 403), "{path}: {status} {code}");
    }
    let forged = format!(
        "{writer}infrar-caller: root\r\ninfrar-scopes: all\r\ninfrar-claims: e30\r\nInfrar-Caller: root\r\n"
    );
    assert_eq!(status("POST", "/query", &forged).await.0, 200);
    let head = callee.app.heads().pop().expect("a request");
    // Not `web`, which is a service of ours: the token is another issuer's.
    assert_eq!(header(&head, "infrar-caller"), Some("https://issuer.example#web"), "{head}");
    assert!(!head.contains("root") && header(&head, "infrar-scopes") != Some("all"), "{head}");
    assert_eq!(header(&head, "authorization"), None, "{head}");
    assert_eq!(status("GET", "/healthz", "infrar-caller: root\r\n").await.0, 200);
    let head = callee.app.heads().pop().expect("a request");
    assert_eq!(header(&head, "infrar-caller"), None, "{head}");
}

#[tokio::test]
async fn a_subject_of_another_issuer_is_never_taken_for_the_service_of_that_name() {
    let callee = Callee::open("off", "").await;
    // `permissions` grant the service `web` what this token does not carry.
    let stranger = bearer(&callee.token(&es256(), &with(&json!({"scope": "", "scopes": []}))));
    let said = callee.asks("POST", "/query", &stranger).await;
    assert_eq!((said.status(), said.code()), (403, "scope-missing"), "{said:?}");
    assert!(said.body.contains("https://issuer.example#web lacks"), "{said:?}");
    assert_eq!(callee.asks("GET", "/any", &stranger).await.status(), 200);
    let head = callee.app.heads().pop().expect("a request");
    assert_eq!(header(&head, "infrar-caller"), Some("https://issuer.example#web"), "{head}");
    let metrics = get(callee.admin, &callee.admin.to_string(), "/metrics").await.body;
    assert!(metrics.contains("caller=\"https://issuer.example#web\""), "{metrics}");
    assert!(!metrics.contains("caller=\"web\""), "{metrics}");
}

/// A handshake with the callee, with these versions of TLS alone.
async fn handshake(
    callee: &Callee,
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    let ca =
        rustls::pki_types::pem::PemObject::from_pem_slice(callee.folder.read("ca.pem").as_bytes());
    roots.add(ca.expect("a certificate")).expect("a CA");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .expect("versions of this provider")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(callee.inbound).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

#[tokio::test]
async fn tls_1_2_is_refused_and_a_new_certificate_is_used_without_a_restart() {
    let callee = Callee::open("{ cert_file: leaf.pem, key_file: leaf.key }", "").await;
    assert!(handshake(&callee, &[&rustls::version::TLS12]).await.is_err());
    let stream = handshake(&callee, &[&rustls::version::TLS13]).await.expect("TLS 1.3");
    let before = stream.get_ref().1.peer_certificates().expect("a certificate")[0].to_vec();
    let mut line = Line::over(stream);
    line.say("GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
    assert!(line.rest().await.ends_with("reached"));

    let certificates = Certificates::new();
    callee.folder.write("ca.pem", &certificates.ca.pem());
    let leaf = certificates.write(&callee.folder);
    assert_ne!(leaf, before);
    callee.infrar.signal("HUP");
    until("the new certificate is shown", async || {
        handshake(&callee, &[&rustls::version::TLS13]).await.is_ok_and(|stream| {
            stream.get_ref().1.peer_certificates().is_some_and(|shown| *shown[0] == *leaf)
        })
    })
    .await;
}

#[tokio::test]
async fn the_oldest_tls_and_the_ca_that_is_believed_change_while_it_runs() {
    let callee = Callee::open("{ cert_file: leaf.pem, key_file: leaf.key }", "").await;
    let mut kept = Line::over(handshake(&callee, &[&rustls::version::TLS13]).await.expect("1.3"));
    assert!(handshake(&callee, &[&rustls::version::TLS12]).await.is_err());
    let file = callee.folder.read("proxy.yaml");
    let older = "key_file: leaf.key, min_version: \"1.2\" }";
    callee.folder.write("proxy.yaml", &file.replace("key_file: leaf.key }", older));
    until("TLS 1.2 is spoken", async || {
        handshake(&callee, &[&rustls::version::TLS12]).await.is_ok()
    })
    .await;
    kept.say("GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
    assert!(kept.rest().await.ends_with("reached"));

    // A caller that believes somebody else's CA, until the file it names says otherwise.
    let [out, admin] = free_ports();
    let folder = Folder::new();
    let project =
        callee.folder.read("project.yaml").replace("us-east-1 }", "us-east-1, auth_method: none }");
    // However often it fails until then.
    let project = project.replace(
        "    scopes:",
        "    circuit: { failure_threshold: 1000, recovery_timeout: 1s }\n    scopes:",
    );
    let project = project.split("issuers:").next().expect("a beginning");
    folder.write(
        "project.yaml",
        &format!("{project}permissions: {{ web: {{ data: [read:data] }} }}\n"),
    );
    folder.write("ca.pem", &Certificates::new().ca.pem());
    folder.write(
        "proxy.yaml",
        &format!(
            "service: web\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             outbound: {{ listen: '{out}' }}\ntrust: {{ ca_file: ca.pem }}\n"
        ),
    );
    let mut caller = Infrar::start(&folder, "caller", &["proxy", "--config", "proxy.yaml"]);
    caller.ready(admin).await;
    let said = get(out, "data", "/healthz").await;
    assert_eq!((said.status(), said.code()), (502, "tls-failed"), "{said:?}");
    folder.write("ca.pem", &callee.folder.read("ca.pem"));
    caller.signal("HUP");
    until("the CA is believed", async || get(out, "data", "/healthz").await.body == "reached")
        .await;
}

#[tokio::test]
async fn a_token_goes_to_no_plaintext_address_and_to_no_stranger() {
    let folder = Folder::new();
    let [out, admin] = free_ports();
    let origin = Origin::plain("ok").await;
    folder.write("token", "the-secret-token\n");
    folder.write(
        "project.yaml",
        &format!(
            "project: shop\nservices:\n  near:\n    scopes: [use]\n    endpoints: [{{ url: 'http://{}', provider: aws, region: us-east-1 }}]\n\
             permissions: {{ web: {{ near: [use] }} }}\n",
            origin.at
        ),
    );
    folder.write(
        "proxy.yaml",
        &format!(
            "service: web\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             outbound: {{ listen: '{out}', unknown_hosts: allow, token_files: {{ near: token }} }}\n"
        ),
    );
    let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
    infrar.ready(admin).await;
    assert_eq!(get(out, "near", "/").await.status(), 200, "{}", infrar.log());
    let head = origin.heads().pop().expect("a request");
    assert_eq!(header(&head, "authorization"), Some("Bearer the-secret-token"), "{head}");
    // The same server, called as a host of the world.
    let said = get(out, &format!("localhost:{}", origin.at.port()), "/").await;
    assert_eq!(said.status(), 200, "{said:?}");
    let head = origin.heads().pop().expect("a request");
    assert_eq!(header(&head, "authorization"), None, "{head}");
    assert!(!infrar.log().contains("the-secret-token"));
    let metrics = get(admin, &admin.to_string(), "/metrics").await;
    assert!(!metrics.body.contains("the-secret-token"));
}

/// An address of this machine that is not loopback, where there is one; nothing is sent to find it.
fn outer_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

#[tokio::test]
async fn a_token_is_taken_off_again_when_the_next_attempt_goes_where_it_may_not() {
    let Some(outer) = outer_address() else {
        return eprintln!("skipped: this machine has no address but loopback");
    };
    let folder = Folder::new();
    let [out, admin] = free_ports();
    // The first endpoint takes tokens and fails; the second is reached in plaintext over a network. Unequal weights are
    // exact shares: the first is tried whatever is known of its latency.
    let near = Origin::scripted(|mut visit| async move {
        while visit.head().await.is_some() {
            visit.say("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await;
        }
    })
    .await;
    let far = Origin::on(outer, |visit| visit.plainly("far")).await;
    folder.write("token", "the-secret-token\n");
    let project = |far_keys: &str| {
        format!(
            "project: shop\nservices:\n  data:\n    scopes: [use]\n    endpoints:\n      \
             - {{ url: 'http://{}', provider: aws, region: us-east-1, weight: 60 }}\n      \
             - {{ url: 'http://{}', provider: aws, region: us-east-1, weight: 40{far_keys} }}\n\
             permissions: {{ web: {{ data: [use] }} }}\n",
            near.at, far.at
        )
    };
    folder.write(
        "proxy.yaml",
        &format!(
            "service: web\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             outbound: {{ listen: '{out}', token_files: {{ data: token }} }}\n"
        ),
    );
    // An endpoint that would get a token there is a fault of the project.
    folder.write("project.yaml", &project(""));
    let mut refused = Infrar::start(&folder, "refused", &["proxy", "--config", "proxy.yaml"]);
    assert_eq!(refused.ended().await.code(), Some(2), "{}", refused.log());
    assert!(refused.log().contains("tokens travel over TLS only"), "{}", refused.log());

    folder.write("project.yaml", &project(", auth_method: none"));
    let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
    infrar.ready(admin).await;
    until("both endpoints were tried", async || {
        let said = get(out, "data", "/").await;
        assert_eq!((said.status(), &*said.body), (200, "far"), "{said:?}\n{}", infrar.log());
        !near.heads().is_empty()
    })
    .await;
    for head in near.heads() {
        assert_eq!(header(&head, "authorization"), Some("Bearer the-secret-token"), "{head}");
    }
    for head in far.heads() {
        assert_eq!(header(&head, "authorization"), None, "{head}");
    }
    // What the application says itself is its own.
    let said = talk(
        out,
        "GET / HTTP/1.1\r\nhost: data\r\nauthorization: Basic eA==\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert_eq!(said.status(), 200, "{said:?}");
    assert_eq!(header(&far.heads().pop().expect("a request"), "authorization"), Some("Basic eA=="));
}

#[tokio::test]
async fn a_redirect_is_the_applications_to_follow() {
    let folder = Folder::new();
    let [out, admin] = free_ports();
    let elsewhere = Origin::plain("elsewhere").await;
    let target = elsewhere.at;
    let service = Origin::scripted(move |mut visit| async move {
        while let Some(head) = visit.head().await {
            let status = head.split(['/', ' ']).nth(2).unwrap_or("302").to_owned();
            visit
                .say(format!(
                    "HTTP/1.1 {status} Elsewhere\r\nlocation: http://{target}/there?x=1\r\ncontent-length: 4\r\n\r\nover"
                ))
                .await;
        }
    })
    .await;
    folder.write("token", "the-secret-token\n");
    folder.write(
        "project.yaml",
        &format!(
            "project: shop\nservices:\n  data:\n    scopes: [use]\n    endpoints: [{{ url: 'http://{}', provider: aws, region: us-east-1 }}]\n\
             permissions: {{ web: {{ data: [use] }} }}\n",
            service.at
        ),
    );
    folder.write(
        "proxy.yaml",
        &format!(
            "service: web\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             outbound: {{ listen: '{out}', unknown_hosts: allow, token_files: {{ data: token }} }}\n"
        ),
    );
    let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
    infrar.ready(admin).await;
    for status in [301, 302, 303, 307, 308] {
        let said = get(out, "data", &format!("/{status}")).await;
        assert_eq!((said.status(), &*said.body), (status, "over"), "{said:?}");
        let location = format!("http://{target}/there?x=1");
        assert_eq!(said.header("location"), Some(&*location), "{said:?}");
    }
    assert_eq!(elsewhere.heads(), Vec::<String>::new());
    assert_eq!(service.heads().len(), 5);
    // The application follows, through the same port: a host outside the project gets no token.
    let said = get(out, &target.to_string(), "/there?x=1").await;
    assert_eq!(said.body, "elsewhere", "{said:?}");
    assert_eq!(header(&elsewhere.heads()[0], "authorization"), None, "{:?}", elsewhere.heads());
}

#[tokio::test]
async fn certificates_that_change_are_taken_up_by_themselves_while_connections_stand() {
    let callee = Callee::open("{ cert_file: leaf.pem, key_file: leaf.key }", "").await;
    let stream = handshake(&callee, &[&rustls::version::TLS13]).await.expect("TLS 1.3");
    let before = stream.get_ref().1.peer_certificates().expect("a certificate")[0].to_vec();
    let call = "GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut old = Line::over(stream);
    old.say(call).await;
    assert_eq!(old.answer().await.body, "reached");

    // A file that is none, and a certificate without its key: the old one stays, and the log says why.
    let whole = callee.folder.read("leaf.pem");
    callee.folder.write("leaf.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n");
    until("the fault is said", async || {
        callee.infrar.log().contains("a new certificate cannot be used; the old one stays")
    })
    .await;
    let shown = async || {
        let stream = handshake(&callee, &[&rustls::version::TLS13]).await.expect("TLS 1.3");
        stream.get_ref().1.peer_certificates().expect("a certificate")[0].to_vec()
    };
    assert_eq!(shown().await, before);
    let key = KeyPair::generate().expect("a key");
    callee.folder.write("leaf.pem", &whole);
    callee.folder.write("leaf.key", &key.serialize_pem());
    let faults = || callee.infrar.log().matches("the old one stays").count();
    let said = faults();
    until("the other fault is said", async || faults() > said).await;
    assert_eq!(shown().await, before);

    let certificates = Certificates::new();
    callee.folder.write("ca.pem", &certificates.ca.pem());
    let leaf = certificates.write(&callee.folder);
    until("the new certificate is shown", async || {
        handshake(&callee, &[&rustls::version::TLS13]).await.is_ok_and(|stream| {
            stream.get_ref().1.peer_certificates().is_some_and(|shown| *shown[0] == *leaf)
        })
    })
    .await;
    until("the new certificate is told of", async || {
        callee.infrar.log().contains("a new certificate is in use")
    })
    .await;
    // Whoever was connected all the time has noticed nothing.
    old.say(call).await;
    assert_eq!(old.answer().await.body, "reached");
}

#[tokio::test]
async fn an_edge_passes_a_token_on_over_loopback_and_not_in_plaintext_over_a_network() {
    let Some(outer) = outer_address() else {
        return eprintln!("skipped: this machine has no address but loopback");
    };
    let folder = Folder::new();
    let [inbound, admin] = free_ports();
    let issuer = KeyPair::generate().expect("a key");
    let near = Origin::plain("near").await;
    let far = Origin::on(outer, |visit| visit.plainly("far")).await;
    folder.write("jwks.json", &json!({"keys": [jwk(&issuer, "k1")]}).to_string());
    folder.write(
        "project.yaml",
        &format!(
            "project: shop\nservices:\n  near:\n    scopes: [use]\n    endpoints: [{{ url: 'https://near.example', \
             private_url: 'http://{}', provider: aws, region: us-east-1 }}]\n  far:\n    scopes: [use]\n    endpoints: \
             [{{ url: 'https://far.example', private_url: 'http://{}', provider: aws, region: us-east-1, auth_method: none }}]\n\
             issuers:\n  - {{ issuer: '{ISSUER}', jwks_file: jwks.json, audiences: [] }}\n",
            near.at, far.at
        ),
    );
    folder.write(
        "proxy.yaml",
        &format!(
            "role: edge\nservice: edge\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             inbound: {{ listen: '{inbound}', tls: off }}\n"
        ),
    );
    let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
    infrar.ready(admin).await;
    for (name, origin) in [("near", &near), ("far", &far)] {
        let claims = with(&json!({"aud": name, "scope": "use"}));
        let token = bearer(&encode(&es256(), &claims, &signer(&issuer)).expect("a token"));
        let said = talk(
            inbound,
            format!("GET / HTTP/1.1\r\nhost: {name}.example\r\nconnection: close\r\n{token}\r\n"),
        )
        .await;
        assert_eq!((said.status(), &*said.body), (200, name), "{said:?}\n{}", infrar.log());
        let head = origin.heads().pop().expect("a request");
        assert_eq!(head.contains(&token), name == "near", "{head}");
        assert_eq!(header(&head, "authorization").is_some(), name == "near", "{head}");
    }
}
