//! Stories of the control plane, told through a really started one on a free port: tokens that any standard library
//! can check, a catalog that is fetched once, changes that arrive by themselves, and keys that outlive a restart.
#![allow(
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a story may fail, and starts what ends with it"
)]

mod support;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy, rt::TokioExecutor};
use infrar::{
    api::{CONTROL_AUDIENCE, Client, ClientError, ClientSettings, Credential},
    control::{Control, ControlError, Identities, Identity, Replaced, Running, Settings, TlsFiles},
    model::{
        AuthMethod, Circuit, Endpoint, EndpointState, Enforcement, HealthCheck, Limits,
        NetworkMode, Networking, Project, Protocol, Retries, Routing, ScopeSet, Service, Timeouts,
    },
};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, jwk::JwkSet};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use support::{Folder, Infrar, Pair, free_ports};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout},
};

const SECRET: &str = "a secret with + and % in it";

fn scopes(text: &str) -> ScopeSet {
    ScopeSet::parse_list(text).unwrap()
}

fn service(host: &str) -> Service {
    let endpoint = Endpoint {
        id: "azure-eastus".parse().unwrap(),
        url: format!("https://{host}").parse().unwrap(),
        internal_url: None,
        private_url: None,
        place: "azure_eastus".parse().unwrap(),
        zone: None,
        auth_method: AuthMethod::BearerToken,
        weight: 100,
        state: EndpointState::Active,
    };
    Service {
        endpoints: vec![endpoint],
        scopes: scopes("read:data write:data write:query"),
        protocol: Protocol::Auto,
        routing: Routing::default(),
        timeouts: Timeouts::default(),
        retries: Retries::default(),
        hedge: None,
        circuit: Circuit::default(),
        health: HealthCheck::default(),
        limits: Limits::default(),
    }
}

/// A shop: web-application may read and query data-intelligence, and nothing else.
fn project(host: &str) -> Project {
    let callee =
        BTreeMap::from([("data-intelligence".parse().unwrap(), scopes("read:data write:query"))]);
    Project {
        name: "shop".parse().unwrap(),
        networking: Networking {
            multi_cloud: true,
            default_mode: NetworkMode::Public,
            connections: Vec::new(),
        },
        services: BTreeMap::from([
            ("data-intelligence".parse().unwrap(), service(host)),
            ("reports".parse().unwrap(), service("reports.example")),
        ]),
        permissions: BTreeMap::from([("web-application".parse().unwrap(), callee)]),
        issuers: Vec::new(),
        mode: Enforcement::Enforce,
    }
}

fn identities() -> Identities {
    let workload =
        Identity::Workload { issuer: "https://oidc".to_owned(), subject: "w".to_owned() };
    Identities::from([
        ("web-application".parse().unwrap(), Identity::ClientSecret(SECRET.to_owned().into())),
        ("operator".parse().unwrap(), Identity::ClientSecret("operator".to_owned().into())),
        ("workers".parse().unwrap(), workload),
    ])
}

fn anywhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

async fn start(folder: &Path) -> Running {
    let settings = Settings::new(anywhere(), folder.join("data"));
    Control::start(settings, project("data.example"), identities()).await.unwrap()
}

fn client(running: &Running) -> Client {
    let url = format!("http://{}", running.local_addr()).parse().unwrap();
    Client::new(ClientSettings::new(vec![url], None)).unwrap()
}

fn web() -> Credential {
    Credential { client_id: "web-application".parse().unwrap(), secret: SECRET.to_owned().into() }
}

async fn bearer(client: &Client) -> SecretString {
    client.token(&web(), CONTROL_AUDIENCE, None).await.unwrap().access_token
}

/// One request as a stranger's client sends it.
async fn ask(running: &Running, request: http::request::Builder, body: &str) -> Response<Bytes> {
    let http = legacy::Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let (mut parts, body) =
        request.body(Full::new(Bytes::copy_from_slice(body.as_bytes()))).unwrap().into_parts();
    parts.uri = format!("http://{}{}", running.local_addr(), parts.uri).parse().unwrap();
    let (parts, body) = http.request(Request::from_parts(parts, body)).await.unwrap().into_parts();
    Response::from_parts(parts, body.collect().await.unwrap().to_bytes())
}

async fn get(running: &Running, path: &str) -> Response<Bytes> {
    ask(running, Request::get(path), "").await
}

/// Asks for a token with the right secret and these further fields.
async fn token_form(running: &Running, fields: &str) -> Response<Bytes> {
    let basic = STANDARD.encode(format!("web-application:{SECRET}"));
    let request = Request::post("/oauth2/token")
        .header("authorization", format!("Basic {basic}"))
        .header("content-type", "application/x-www-form-urlencoded");
    ask(running, request, &format!("grant_type=client_credentials&{fields}")).await
}

fn json(answer: &Response<Bytes>) -> Value {
    serde_json::from_slice(answer.body()).unwrap()
}

/// What a callee in any language does: keys from the published set, claims checked to the letter.
async fn checked(running: &Running, token: &str, audience: &str) -> Value {
    let jwks: JwkSet =
        serde_json::from_slice(get(running, "/.well-known/jwks.json").await.body()).unwrap();
    let header = decode_header(token).unwrap();
    assert_eq!((header.alg, header.typ.as_deref()), (Algorithm::ES256, Some("at+jwt")));
    let key = DecodingKey::from_jwk(jwks.find(&header.kid.unwrap()).unwrap()).unwrap();
    let mut validation = Validation::new(Algorithm::ES256);
    validation.set_audience(&[audience]);
    validation.set_issuer(&[running.issuer()]);
    validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
    validation.validate_nbf = true;
    decode::<Value>(token, &key, &validation).unwrap().claims
}

fn refused_with(outcome: Result<impl std::fmt::Debug, ClientError>) -> (StatusCode, String) {
    match outcome {
        Err(ClientError::Refused { status, code, .. }) => (status, code),
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_granted_caller_gets_a_token_that_any_library_can_check() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let answer = client(&running).token(&web(), "data-intelligence", None).await.unwrap();
    assert_eq!(answer.expires_in, Some(Duration::from_secs(3600)));
    assert_eq!(answer.scope, scopes("read:data write:query"));

    let claims = checked(&running, answer.access_token.expose_secret(), "data-intelligence").await;
    assert_eq!(claims["sub"], "web-application");
    assert_eq!(claims["client_id"], "web-application");
    assert_eq!(claims["scope"], "read:data write:query");
    assert_eq!(claims["scopes"], serde_json::json!(["read:data", "write:query"]));
    assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 3600);
    running.shutdown().await;
}

#[tokio::test]
async fn a_token_is_narrowed_to_the_scopes_that_were_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    let wanted = scopes("read:data");
    let answer = client.token(&web(), "data-intelligence", Some(&wanted)).await.unwrap();
    assert_eq!(answer.scope, wanted);
    // `write:data` exists, and is not granted.
    let more = client.token(&web(), "data-intelligence", Some(&scopes("write:data"))).await;
    assert_eq!(refused_with(more), (StatusCode::BAD_REQUEST, "invalid_scope".to_owned()));
}

#[tokio::test]
async fn the_callee_may_be_named_as_a_resource() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let fields = "resource=https%3A%2F%2Fdata-intelligence.infrar.internal";
    let answer = token_form(&running, fields).await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["cache-control"], "no-store");
    let reply = json(&answer);
    assert_eq!(reply["token_type"], "Bearer");
    checked(&running, reply["access_token"].as_str().unwrap(), "data-intelligence").await;
}

#[tokio::test]
async fn what_is_not_granted_is_refused_as_oauth_says() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    for (fields, error) in [
        // A service without a grant and a name that nobody bears look alike.
        ("audience=reports", "invalid_target"),
        ("audience=nobody", "invalid_target"),
        ("scope=read%3Adata", "invalid_target"),
        ("audience=data-intelligence&audience=reports", "invalid_target"),
        ("audience=data-intelligence&scope=%22", "invalid_scope"),
        ("audience=data-intelligence&client_secret=x", "invalid_request"),
        ("audience=data-intelligence&scope=a&scope=b", "invalid_request"),
    ] {
        let answer = token_form(&running, fields).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{fields}");
        assert_eq!(json(&answer)["error"], error, "{fields}");
        assert_eq!(answer.headers()["cache-control"], "no-store");
    }
    let form = "application/x-www-form-urlencoded";
    let other = Request::post("/oauth2/token").header("content-type", form);
    let answer = ask(&running, other, "grant_type=password&username=a&password=b").await;
    assert_eq!(json(&answer)["error"], "unsupported_grant_type");
}

#[tokio::test]
async fn a_project_that_learns_grants_what_exists_and_says_what_it_would_refuse() {
    let folder = tempfile::tempdir().unwrap();
    let learning = |until: jiff::Timestamp| Project {
        mode: Enforcement::LearnUntil(until),
        ..project("data.example")
    };
    let now = jiff::Timestamp::now();
    let hour = jiff::SignedDuration::from_hours(1);
    let settings = Settings::new(anywhere(), folder.path().join("data"));
    let running = Control::start(settings, learning(now + hour), identities()).await.unwrap();
    let client = client(&running);
    let scope = async |audience: &str, wanted: Option<&str>| {
        let wanted = wanted.map(scopes);
        client.token(&web(), audience, wanted.as_ref()).await.map(|token| token.scope.to_string())
    };
    // Nobody granted this; what exists there is given, or what of it was asked for.
    assert_eq!(scope("reports", None).await.unwrap(), "read:data write:data write:query");
    assert_eq!(scope("reports", Some("write:data no:such")).await.unwrap(), "write:data");
    assert_eq!(scope("data-intelligence", Some("write:data")).await.unwrap(), "write:data");
    // What is granted is given as ever; a service that is none, and the control plane itself, are not learned.
    assert_eq!(scope("data-intelligence", None).await.unwrap(), "read:data write:query");
    for (audience, wanted) in [("nowhere", None), (CONTROL_AUDIENCE, Some("infrar:keys:write"))] {
        let (status, _) = refused_with(scope(audience, wanted).await);
        assert_eq!(status, StatusCode::BAD_REQUEST, "{audience}");
    }
    // Its time is over.
    running.replace(learning(now - hour), &identities()).unwrap();
    assert_eq!(refused_with(scope("reports", None).await).1, "invalid_target");
    assert_eq!(
        refused_with(scope("data-intelligence", Some("write:data")).await).1,
        "invalid_scope"
    );
    running.shutdown().await;
}

#[tokio::test]
async fn who_cannot_prove_who_it_is_gets_no_token() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    for (name, secret) in [
        ("web-application", "wrong"),
        ("web-application", ""),
        ("nobody", SECRET),
        // It proves itself by its platform's token, never by a secret.
        ("workers", ""),
    ] {
        let credential =
            Credential { client_id: name.parse().unwrap(), secret: secret.to_owned().into() };
        let refused = client.token(&credential, CONTROL_AUDIENCE, None).await;
        let expected = (StatusCode::UNAUTHORIZED, "invalid_client".to_owned());
        assert_eq!(refused_with(refused), expected, "{name}");
    }
    let form = "application/x-www-form-urlencoded";
    let bare = Request::post("/oauth2/token").header("content-type", form);
    let answer = ask(&running, bare, "grant_type=client_credentials&audience=x").await;
    assert!(answer.headers()["www-authenticate"].to_str().unwrap().starts_with("Basic"));
}

fn wrong() -> Credential {
    Credential { secret: "wrong".to_owned().into(), ..web() }
}

fn operator() -> Credential {
    Credential { client_id: "operator".parse().unwrap(), secret: "operator".to_owned().into() }
}

/// Guesses, each after the answer to the one before; every answer says the same.
async fn guess(client: &Client, times: usize) -> Duration {
    let begun = Instant::now();
    for _ in 0..times {
        let refused = refused_with(client.token(&wrong(), "data-intelligence", None).await);
        assert_eq!(refused, (StatusCode::UNAUTHORIZED, "invalid_client".to_owned()));
    }
    begun.elapsed()
}

#[tokio::test]
async fn guessing_a_secret_is_slowed_down() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    // The first few cost nothing, the next are held for 100, 200, 400 and 800 ms.
    guess(&client, 5).await;
    let took = guess(&client, 4).await;
    assert!(took >= Duration::from_millis(1500), "{took:?}");
    // Nor is it quicker to ask many at once, or to try with the right one whether it comes back sooner.
    let begun = Instant::now();
    let guesses = (0..20).map(|_| guess(&client, 1));
    let right = async { client.token(&web(), "data-intelligence", None).await.unwrap() };
    tokio::join!(futures_util::future::join_all(guesses), right);
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(2), "{took:?}");
    // Another name from the same address is not held up.
    let begun = Instant::now();
    assert!(client.token(&operator(), CONTROL_AUDIENCE, None).await.is_ok());
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn nobody_locks_a_caller_out_by_guessing_at_its_secret() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    // Strangers behind the same address, as behind a NAT or on the same host, who do not stop.
    let strangers = async {
        loop {
            futures_util::future::join_all((0..50).map(|_| guess(&client, 1))).await;
        }
    };
    let owner = async {
        for _ in 0..2 {
            // Well within the ten seconds that a client waits.
            assert!(client.token(&web(), "data-intelligence", None).await.is_ok());
        }
    };
    tokio::select! {
        () = strangers => {}
        () = owner => {}
    }
}

/// A connection over HTTP/2 to `running`, driven until it ends.
async fn h2(running: &Running) -> h2::client::SendRequest<Bytes> {
    let stream = TcpStream::connect(running.local_addr()).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    send
}

#[tokio::test]
async fn slow_bodies_at_the_token_endpoint_keep_nobody_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    // More of them than were ever served at once, from the address of everybody else in this story.
    let mut slow = Vec::new();
    for _ in 0..40 {
        let mut send = h2(&running).await;
        for _ in 0..30 {
            send = send.ready().await.unwrap();
            let request = Request::post(format!("http://{}/oauth2/token", running.local_addr()))
                .header("content-type", "application/x-www-form-urlencoded")
                .header("content-length", "100");
            let (answer, mut body) = send.send_request(request.body(()).unwrap(), false).unwrap();
            body.send_data(Bytes::from_static(b"g"), false).unwrap();
            slow.push((answer, body));
        }
    }
    assert_eq!(get(&running, "/.well-known/jwks.json").await.status(), StatusCode::OK);
    assert!(client(&running).token(&web(), "data-intelligence", None).await.is_ok());
    let bearer = bearer(&client(&running)).await;
    assert!(client(&running).catalog(&bearer, None).await.is_ok());
    // Whoever dawdles is told so; those of one address above its share at once, when others come after them.
    for (answer, _body) in slow {
        let answer = timeout(Duration::from_secs(20), answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), StatusCode::REQUEST_TIMEOUT);
    }
}

#[tokio::test]
async fn whoever_never_reads_its_answers_loses_its_connection() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = Settings::new(anywhere(), folder.path().join("data"));
    // One place for each address.
    settings.connections = 2;
    settings.stall = Duration::from_millis(300);
    let running = Control::start(settings, project("data.example"), identities()).await.unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    // Little room, so that the answers are soon in nobody's way but the server's.
    socket.set_recv_buffer_size(4096).unwrap();
    let mut greedy = socket.connect(running.local_addr()).await.unwrap();
    let request = "GET /.well-known/openid-configuration HTTP/1.1\r\nhost: c\r\n\r\n".repeat(100);
    let closed = async { while greedy.write_all(request.as_bytes()).await.is_ok() {} };
    timeout(Duration::from_secs(30), closed).await.unwrap();
    assert_eq!(get(&running, "/livez").await.status(), StatusCode::OK, "its place is free again");
}

#[tokio::test]
async fn the_catalog_is_sent_once_per_revision() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    let bearer = bearer(&client).await;
    let (catalog, etag) = client.catalog(&bearer, None).await.unwrap().unwrap();
    assert_eq!(catalog.revision, 1);
    assert_eq!(catalog.issuer, running.issuer());
    assert_eq!(catalog.project, project("data.example"));
    assert!(etag.starts_with('"'), "strong: {etag}");

    assert_eq!(client.catalog(&bearer, Some(&etag)).await.unwrap(), None);
    running.replace(project("moved.example"), &identities()).unwrap();
    let (catalog, newer) = client.catalog(&bearer, Some(&etag)).await.unwrap().unwrap();
    assert_eq!(catalog.project, project("moved.example"));
    assert_ne!(newer, etag);
}

#[tokio::test]
async fn the_api_is_closed_without_a_token_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    let elsewhere = client.token(&web(), "data-intelligence", None).await.unwrap().access_token;
    for path in ["/v1/catalog", "/v1/watch?from=0", "/v1/services", "/v1/services/reports"] {
        let answer = get(&running, path).await;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(answer.headers()["content-type"], "application/problem+json");
        assert!(answer.headers()["www-authenticate"].to_str().unwrap().starts_with("Bearer"));
        assert_eq!(json(&answer)["code"], "token-missing");

        for token in [elsewhere.expose_secret(), "a.b.c", "eyJhbGciOiJub25lIn0.e30."] {
            let request = Request::get(path).header("authorization", format!("Bearer {token}"));
            let answer = ask(&running, request, "").await;
            assert_eq!(json(&answer)["code"], "token-invalid", "{path}");
        }
    }
}

#[tokio::test]
async fn a_token_without_the_scope_is_not_enough() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    let narrow = scopes("infrar:usage:write");
    let narrow = client.token(&web(), CONTROL_AUDIENCE, Some(&narrow)).await.unwrap();
    let refused = client.catalog(&narrow.access_token, None).await;
    assert_eq!(refused_with(refused), (StatusCode::FORBIDDEN, "scope-missing".to_owned()));
}

#[tokio::test]
async fn a_watcher_hears_of_the_current_revision_and_of_every_change() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    let bearer = bearer(&client).await;
    let mut watch = client.watch(&bearer, 0).await.unwrap();
    let limit = Duration::from_secs(10);
    let change = timeout(limit, watch.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(change.revision, 1);

    assert_eq!(
        running.replace(project("moved.example"), &identities()).unwrap(),
        Replaced::Changed { revision: 2 }
    );
    let change = timeout(limit, watch.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(change.revision, 2);

    // A watcher that is up to date hears nothing until there is something; the end closes its stream.
    let mut watch = client.watch(&bearer, 2).await.unwrap();
    running.shutdown().await;
    assert_eq!(timeout(limit, watch.next()).await.unwrap().unwrap_or(None), None);
}

#[tokio::test]
async fn services_are_listed_and_an_unknown_one_is_answered_with_near_names() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    let bearer = bearer(&client).await;
    let list = client.services(&bearer).await.unwrap();
    let names: Vec<_> = list.services.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["data-intelligence", "reports"]);
    assert_eq!((list.services[0].endpoints, list.services[0].active), (1, 1));

    let name = "data-intelligence".parse().unwrap();
    let shown = client.service(&bearer, &name).await.unwrap();
    assert_eq!(shown.service, service("data.example"));
    assert_eq!(shown.callers["web-application"], scopes("read:data write:query"));

    let request = Request::get("/v1/services/data-inteligence")
        .header("authorization", format!("Bearer {}", bearer.expose_secret()));
    let answer = ask(&running, request, "").await;
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    assert_eq!(json(&answer)["nearest"], serde_json::json!(["data-intelligence"]));
    let detail = json(&answer)["detail"].to_string();
    assert!(detail.contains("did you mean data-intelligence?"), "{detail}");
}

#[tokio::test]
async fn keys_and_revision_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let token = client(&running).token(&web(), "data-intelligence", None).await.unwrap();
    running.replace(project("moved.example"), &identities()).unwrap();
    running.shutdown().await;

    let mut private = 0;
    for file in std::fs::read_dir(folder.path().join("data/keys")).unwrap() {
        let mode = file.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        private += 1;
    }
    assert_eq!(private, 1);

    let settings = Settings::new(anywhere(), folder.path().join("data"));
    let moved = Control::start(settings, project("moved.example"), identities()).await.unwrap();
    // On another port the issuer is another, so the catalog is too; back it never goes.
    assert!(moved.revision() >= 2);
    let kid = decode_header(token.access_token.expose_secret()).unwrap().kid.unwrap();
    let jwks: JwkSet =
        serde_json::from_slice(get(&moved, "/.well-known/jwks.json").await.body()).unwrap();
    assert!(jwks.find(&kid).is_some(), "a token from before is still good");
}

#[tokio::test]
async fn unchanged_content_keeps_its_revision_through_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    for revision in [1, 1, 2] {
        let mut settings = Settings::new(anywhere(), folder.path().join("data"));
        settings.public_url = Some("https://control.example:7070/".parse().unwrap());
        let host = if revision == 1 { "data.example" } else { "moved.example" };
        let running = Control::start(settings, project(host), identities()).await.unwrap();
        assert_eq!(running.revision(), revision);
        assert_eq!(running.issuer(), "https://control.example:7070");
        running.shutdown().await;
    }
}

#[tokio::test]
async fn a_wrong_project_is_refused_and_the_old_one_stays() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let mut wrong = project("moved.example");
    wrong.services.insert("infrar-control".parse().unwrap(), service("fake.example"));
    let refused = running.replace(wrong, &identities()).unwrap_err();
    assert!(refused.is_configuration(), "{refused}");
    let client = client(&running);
    let (catalog, _) = client.catalog(&bearer(&client).await, None).await.unwrap().unwrap();
    assert_eq!((catalog.revision, catalog.project), (1, project("data.example")));
}

#[tokio::test]
async fn a_rotated_key_is_published_before_it_signs() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let client = client(&running);
    let kid = running.rotate_keys().unwrap();
    let jwks = get(&running, "/.well-known/jwks.json").await;
    let set: JwkSet = serde_json::from_slice(jwks.body()).unwrap();
    assert_eq!(set.keys.len(), 2);
    assert!(set.find(&kid).is_some());
    assert!(!String::from_utf8_lossy(jwks.body()).contains("\"d\""), "no private part");
    let token = client.token(&web(), "data-intelligence", None).await.unwrap().access_token;
    assert_ne!(decode_header(token.expose_secret()).unwrap().kid.unwrap(), kid);
    checked(&running, token.expose_secret(), "data-intelligence").await;

    let mut settings = Settings::new(anywhere(), folder.path().join("other"));
    settings.key_lead = Duration::ZERO;
    let quick = Control::start(settings, project("data.example"), identities()).await.unwrap();
    let before = self::client(&quick).token(&web(), "data-intelligence", None).await.unwrap();
    let kid = quick.rotate_keys().unwrap();
    let after = self::client(&quick).token(&web(), "data-intelligence", None).await.unwrap();
    assert_eq!(decode_header(after.access_token.expose_secret()).unwrap().kid.unwrap(), kid);
    for token in [before, after] {
        checked(&quick, token.access_token.expose_secret(), "data-intelligence").await;
    }
}

#[tokio::test]
async fn rotation_over_the_api_takes_a_scope_that_permissions_grant() {
    let folder = tempfile::tempdir().unwrap();
    let mut granting = project("data.example");
    let keys = BTreeMap::from([(CONTROL_AUDIENCE.parse().unwrap(), scopes("infrar:keys:write"))]);
    granting.permissions.insert("operator".parse().unwrap(), keys);
    let settings = Settings::new(anywhere(), folder.path().join("data"));
    let running = Control::start(settings, granting, identities()).await.unwrap();
    let client = client(&running);
    for (credential, status) in [(web(), StatusCode::FORBIDDEN), (operator(), StatusCode::OK)] {
        let token = client.token(&credential, CONTROL_AUDIENCE, None).await.unwrap().access_token;
        let request = Request::post("/v1/keys/rotate")
            .header("authorization", format!("Bearer {}", token.expose_secret()));
        assert_eq!(ask(&running, request, "").await.status(), status);
    }
    assert_eq!(client.own_jwks().await.unwrap()["keys"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_revoked_right_ends_at_once_also_for_tokens_that_are_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut granting = project("data.example");
    let keys = BTreeMap::from([(CONTROL_AUDIENCE.parse().unwrap(), scopes("infrar:keys:write"))]);
    granting.permissions.insert("operator".parse().unwrap(), keys);
    let settings = Settings::new(anywhere(), folder.path().join("data"));
    let running = Control::start(settings, granting, identities()).await.unwrap();
    let client = client(&running);
    let token = client.token(&operator(), CONTROL_AUDIENCE, None).await.unwrap().access_token;
    let rotate = async || {
        let request = Request::post("/v1/keys/rotate")
            .header("authorization", format!("Bearer {}", token.expose_secret()));
        let answer = ask(&running, request, "").await;
        (answer.status(), json(&answer)["code"].as_str().unwrap_or_default().to_owned())
    };
    let limit = Duration::from_secs(10);
    let mut of_operator = client.watch(&token, 0).await.unwrap();
    let mut of_web = client.watch(&bearer(&client).await, 0).await.unwrap();
    for watch in [&mut of_operator, &mut of_web] {
        assert_eq!(timeout(limit, watch.next()).await.unwrap().unwrap().unwrap().revision, 1);
    }
    assert_eq!(rotate().await.0, StatusCode::OK);

    // The row goes. What every identity may do stays.
    running.replace(project("data.example"), &identities()).unwrap();
    assert_eq!(rotate().await, (StatusCode::FORBIDDEN, "scope-missing".to_owned()));
    assert!(client.catalog(&token, None).await.is_ok());
    for watch in [&mut of_operator, &mut of_web] {
        assert_eq!(timeout(limit, watch.next()).await.unwrap().unwrap().unwrap().revision, 2);
    }

    // The identity goes, which no proxy can see; its watch ends all the same, and nobody else's.
    let mut fewer = identities();
    fewer.remove("operator");
    let unchanged = running.replace(project("data.example"), &fewer).unwrap();
    assert_eq!(unchanged, Replaced::Unchanged { revision: 2 });
    let gone = (StatusCode::UNAUTHORIZED, "token-invalid".to_owned());
    assert_eq!(rotate().await, gone);
    assert_eq!(refused_with(client.catalog(&token, None).await), gone);
    assert!(timeout(limit, of_operator.next()).await.unwrap().unwrap_or(None).is_none());
    running.replace(project("moved.example"), &fewer).unwrap();
    assert_eq!(timeout(limit, of_web.next()).await.unwrap().unwrap().unwrap().revision, 3);
}

#[tokio::test]
async fn two_control_planes_never_share_a_data_directory() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let settings = Settings::new(anywhere(), folder.path().join("data"));
    let fault = Control::start(settings, project("data.example"), identities()).await.unwrap_err();
    assert!(fault.is_configuration() && fault.to_string().contains("--data-dir"), "{fault}");
    assert!(client(&running).token(&web(), "data-intelligence", None).await.is_ok());
    running.shutdown().await;
    start(folder.path()).await.shutdown().await;
}

#[tokio::test]
async fn a_second_process_on_a_data_directory_ends_with_advice_and_a_killed_one_gives_it_back() {
    let folder = Folder::new();
    let [first_at, second_at] = free_ports();
    folder.write("secrets/web", "the caller's secret\n");
    folder.write("secrets/data", "the callee's secret\n");
    folder.write("project.yaml", &Pair::project(anywhere(), ""));
    let begin = |name: &str, at: SocketAddr| {
        let at = at.to_string();
        let place = ["--listen", at.as_str(), "--data-dir", "control"];
        Infrar::start(
            &folder,
            name,
            &[&["control", "--project", "project.yaml"][..], &place].concat(),
        )
    };
    let mut first = begin("first", first_at);
    first.ready(first_at).await;
    let mut second = begin("second", second_at);
    assert_eq!(second.ended().await.code(), Some(2), "{}", second.log());
    let advice = "another control plane runs on the --data-dir control; stop it, or give this one";
    assert!(second.log().contains(advice), "{}", second.log());
    assert!(first.runs());
    first.kill().await;
    begin("third", second_at).ready(second_at).await;
}

#[tokio::test]
async fn strangers_find_their_way_by_the_discovery_document() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    for path in ["/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"] {
        let document = json(&get(&running, path).await);
        let issuer = running.issuer();
        assert_eq!(document["issuer"], issuer);
        assert_eq!(document["token_endpoint"], format!("{issuer}/oauth2/token"));
        assert_eq!(document["jwks_uri"], format!("{issuer}/.well-known/jwks.json"));
        assert_eq!(document["grant_types_supported"], serde_json::json!(["client_credentials"]));
    }
    for path in ["/livez", "/readyz"] {
        assert_eq!(get(&running, path).await.status(), StatusCode::OK);
    }
    assert_eq!(json(&get(&running, "/nothing").await)["code"], "not-found");
    let deleted = ask(&running, Request::delete("/v1/catalog"), "").await;
    assert_eq!(json(&deleted)["code"], "method-not-allowed");
}

#[tokio::test]
async fn a_body_that_is_too_large_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let answer = token_form(&running, &"x".repeat(20_000)).await;
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    // Its clients read OAuth errors, whatever went wrong.
    assert_eq!(json(&answer)["error"], "invalid_request");
    assert_eq!(answer.headers()["content-type"], "application/json");
}

#[tokio::test]
async fn many_silent_connections_of_one_address_leave_places_for_others() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = Settings::new(anywhere(), folder.path().join("data"));
    settings.connections = 8;
    let running = Control::start(settings, project("data.example"), identities()).await.unwrap();
    let connect = async || TcpStream::connect(running.local_addr()).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(connect().await);
    }
    // The half of this address is taken: another is told so at once instead of waiting behind them.
    let told = timeout(Duration::from_secs(5), connect().await.read_u8()).await.unwrap();
    assert!(told.is_err(), "closed or reset");
    // Another address of this machine is another address.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut other = socket.connect(running.local_addr()).await.unwrap();
    other.write_all(b"GET /livez HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    other.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
}

#[tokio::test]
async fn plaintext_is_spoken_on_loopback_only() {
    let folder = tempfile::tempdir().unwrap();
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7070"] {
        let settings = Settings::new(listen.parse().unwrap(), folder.path().join("data"));
        let refused = Control::start(settings, project("data.example"), identities()).await;
        let refused = refused.unwrap_err();
        assert!(matches!(refused, ControlError::Plaintext { .. }), "{refused}");
        assert!(refused.is_configuration() && refused.to_string().contains("--cert-file"));
    }
    assert!(!folder.path().join("data").exists(), "nothing was begun");
}

#[tokio::test]
async fn a_port_in_use_is_a_fault_that_names_the_flag() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let settings = Settings::new(running.local_addr(), folder.path().join("other"));
    let fault = Control::start(settings, project("data.example"), identities()).await.unwrap_err();
    assert!(fault.is_configuration() && fault.to_string().contains("--listen"), "{fault}");
}

#[tokio::test]
async fn with_a_certificate_the_same_is_spoken_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let cert_file = folder.path().join("tls.pem");
    let key_file = folder.path().join("tls.key");
    std::fs::write(&cert_file, made.cert.pem()).unwrap();
    std::fs::write(&key_file, made.signing_key.serialize_pem()).unwrap();
    let mut settings = Settings::new(anywhere(), folder.path().join("data"));
    settings.tls = Some(TlsFiles { cert_file: cert_file.clone(), key_file });
    let running = Control::start(settings, project("data.example"), identities()).await.unwrap();
    assert!(running.issuer().starts_with("https://127.0.0.1:"));

    let url: url::Url =
        format!("https://localhost:{}", running.local_addr().port()).parse().unwrap();
    let trusting = Client::new(ClientSettings::new(vec![url.clone()], Some(cert_file))).unwrap();
    assert!(trusting.token(&web(), "data-intelligence", None).await.is_ok());
    let strange = Client::new(ClientSettings::new(vec![url], None)).unwrap();
    let refused = strange.token(&web(), "data-intelligence", None).await;
    assert!(matches!(refused, Err(ClientError::Unreachable { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_dead_replica_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path()).await;
    let dead = std::net::TcpListener::bind(anywhere()).unwrap().local_addr().unwrap();
    let urls = [dead, running.local_addr()].map(|addr| format!("http://{addr}").parse().unwrap());
    let client = Client::new(ClientSettings::new(urls.to_vec(), None)).unwrap();
    assert!(client.token(&web(), "data-intelligence", None).await.is_ok());
}
