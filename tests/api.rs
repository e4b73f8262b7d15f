//! Stories of the API as a contract: what the document says is what is answered, by every route and to every fault.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "the helpers of a test may fail it"
)]

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{
    HeaderMap, Method, Request, StatusCode,
    header::{
        ALLOW, AUTHORIZATION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH,
        RETRY_AFTER, WWW_AUTHENTICATE,
    },
};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use infrar::{
    api::{self, CONTROL_AUDIENCE, ClientSettings, Credential},
    control::{Control, Identities, Identity, Running, Settings},
    model::{Enforcement, NetworkMode, Networking, Project, Service},
};
use secrecy::ExposeSecret;
use serde_json::Value;
use tempfile::TempDir;

/// The routes there are. A new one is a change of the contract, and written here too.
const ROUTES: &[(&str, &[&str])] = &[
    ("/.well-known/jwks.json", &["get"]),
    ("/.well-known/oauth-authorization-server", &["get"]),
    ("/.well-known/openid-configuration", &["get"]),
    ("/docs", &["get"]),
    ("/livez", &["get"]),
    ("/oauth2/token", &["post"]),
    ("/openapi.json", &["get"]),
    ("/readyz", &["get"]),
    ("/v1/catalog", &["get"]),
    ("/v1/keys/rotate", &["post"]),
    ("/v1/project", &["get", "put"]),
    ("/v1/proxies", &["get"]),
    ("/v1/proxies/{instance}", &["put"]),
    ("/v1/services", &["get"]),
    ("/v1/services/{name}", &["get"]),
    ("/v1/services/{name}/endpoints/{id}", &["delete", "get", "patch", "put"]),
    ("/v1/services/{name}/endpoints/{id}/drain", &["post"]),
    ("/v1/services/{name}/endpoints/{id}/heartbeat", &["post"]),
    ("/v1/watch", &["get"]),
];

/// A control plane with one service, and somebody who may do everything.
struct Plane {
    running: Running,
    client: Client<HttpConnector, Full<Bytes>>,
    admin: String,
    _folder: TempDir,
}

/// An answer, all of it.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The code of a problem that says everything a problem says.
    fn code(&self) -> String {
        assert_eq!(self.headers[CONTENT_TYPE], "application/problem+json", "{:?}", self.body);
        let problem = self.json();
        assert_eq!(problem["status"], self.status.as_u16());
        let code = problem["code"].as_str().unwrap();
        assert_eq!(problem["type"], format!("urn:infrar:problem:{code}"));
        assert!(problem["detail"].is_string() && problem["request_id"].is_string());
        code.to_owned()
    }
}

impl Plane {
    async fn start(rates: impl FnOnce(&mut Settings)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut settings = Settings::new(listen, folder.path().join("data"));
        rates(&mut settings);
        let project = Project {
            name: "shop".parse().unwrap(),
            networking: Networking {
                multi_cloud: true,
                default_mode: NetworkMode::Public,
                connections: Vec::new(),
            },
            services: BTreeMap::from([("data".parse().unwrap(), Service::default().into())]),
            permissions: BTreeMap::new(),
            issuers: Vec::new(),
            mode: Enforcement::Enforce,
        };
        let secret = Identity::ClientSecret("data".to_owned().into());
        let identities = Identities::from([("data".parse().unwrap(), secret)]);
        let mut running = Control::start(settings, Some((project, identities))).await.unwrap();
        let url = format!("http://{}", running.local_addr()).parse().unwrap();
        let asking = api::Client::new(ClientSettings::new(vec![url], None)).unwrap();
        let (client_id, secret) = running.first_admin().unwrap();
        let admin = Credential { client_id: client_id.parse().unwrap(), secret };
        let token = asking.token(&admin, CONTROL_AUDIENCE, None).await.unwrap().access_token;
        let admin = format!("Bearer {}", token.expose_secret());
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { running, client, admin, _folder: folder }
    }

    async fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(http::HeaderName, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let mut request = Request::builder()
            .method(Method::from_bytes(method.to_ascii_uppercase().as_bytes()).unwrap())
            .uri(format!("http://{}{path}", self.running.local_addr()));
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        let (head, body) = self.client.request(request).await.unwrap().into_parts();
        // The watch has no end.
        let endless =
            head.headers.get(CONTENT_TYPE).is_some_and(|kind| kind == "text/event-stream");
        let body = if endless { Bytes::new() } else { body.collect().await.unwrap().to_bytes() };
        Answer { status: head.status, headers: head.headers, body }
    }

    async fn as_admin(&self, method: &str, path: &str, body: &str) -> Answer {
        let kind = (CONTENT_TYPE, "application/json");
        self.ask(method, path, &[(AUTHORIZATION, &self.admin), kind], body.to_owned()).await
    }

    async fn document(&self) -> Value {
        self.ask("get", "/openapi.json", &[], "").await.json()
    }
}

fn concrete(path: &str) -> String {
    path.replace("{name}", "data")
        .replace("{id}", "home")
        .replace("{instance}", "01890a5d-ac96-774b-bcce-b302099a8057")
}

#[tokio::test]
async fn the_document_names_every_route_and_every_route_answers_what_it_says() {
    let plane = Plane::start(|_| ()).await;
    let document = plane.document().await;
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["servers"][0]["url"], plane.running.issuer());
    let paths = document["paths"].as_object().unwrap();
    let said: Vec<(&str, Vec<&str>)> = paths
        .iter()
        .map(|(path, item)| {
            let mut methods: Vec<&str> =
                item.as_object().unwrap().keys().map(String::as_str).collect();
            methods.sort_unstable();
            (path.as_str(), methods)
        })
        .collect();
    let known: Vec<(&str, Vec<&str>)> =
        ROUTES.iter().map(|(path, methods)| (*path, methods.to_vec())).collect();
    assert_eq!(said, known);

    for (path, methods) in said {
        let at = concrete(path);
        // What it does not name is refused, and the answer says what would be taken.
        let refused = plane.ask("options", &at, &[], "").await;
        assert_eq!(
            (refused.status, &*refused.code()),
            (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed"),
            "{path}"
        );
        let mut allowed: Vec<String> = refused.headers[ALLOW]
            .to_str()
            .unwrap()
            .split(',')
            .map(|method| method.trim().to_ascii_lowercase())
            .filter(|method| method != "head")
            .collect();
        allowed.sort_unstable();
        assert_eq!(allowed, methods, "{path}");
        for method in methods {
            agrees(&plane, method, path, &paths[path][method]).await;
        }
    }
}

/// Asks one operation without a token, with half a body and with an empty one: each answer is one that is written.
async fn agrees(plane: &Plane, method: &str, path: &str, operation: &Value) {
    let at = concrete(path);
    for answer in [
        plane.ask(method, &at, &[], "").await,
        plane.as_admin(method, &at, "{").await,
        plane.as_admin(method, &at, "{}").await,
    ] {
        let said = &operation["responses"][answer.status.as_str()];
        assert!(said.is_object(), "{method} {path}: {} is not in the document", answer.status);
        let kind = answer.headers.get(CONTENT_TYPE).map(|kind| kind.to_str().unwrap());
        if let Some(kind) = kind.and_then(|kind| kind.split(';').next()) {
            assert!(said["content"][kind].is_object(), "{method} {path}: {} {kind}", answer.status);
        }
        for (header, _) in said["headers"].as_object().into_iter().flatten() {
            assert!(answer.headers.contains_key(header), "{method} {path}: no {header}");
        }
    }
    let guarded = path.starts_with("/v1/");
    let asked = plane.ask(method, &at, &[], "").await;
    assert_eq!(asked.status == StatusCode::UNAUTHORIZED, guarded, "{method} {path}");
    assert_eq!(operation["security"][0]["bearer"].is_array(), guarded, "{method} {path}");
}

#[tokio::test]
async fn whatever_is_wrong_with_a_request_is_answered_with_a_problem() {
    let plane = Plane::start(|_| ()).await;
    let endpoint = "/v1/services/data/endpoints/home";
    let large = "x".repeat(20_000);
    for (method, path, body, status, code) in [
        ("get", "/nowhere", "", 404, "not-found"),
        ("get", "/v1/services/%FF", "", 400, "bad-request"),
        ("get", "/v1/services/none", "", 404, "unknown-service"),
        ("get", "/v1/services/UPPER/endpoints/home", "", 400, "bad-request"),
        ("get", endpoint, "", 404, "unknown-endpoint"),
        ("get", "/v1/watch?from=soon", "", 400, "bad-request"),
        ("get", "/v1/watch?from=1&from=2", "", 400, "bad-request"),
        ("put", "/v1/proxies/me", "{}", 400, "bad-request"),
        ("put", endpoint, "", 400, "bad-request"),
        ("put", endpoint, r#"{"url": 1}"#, 400, "bad-request"),
        ("put", endpoint, &large, 413, "body-too-large"),
        ("post", "/v1/keys/rotate", &large, 413, "body-too-large"),
        ("patch", endpoint, r#"{"weight": 4000000000}"#, 404, "unknown-endpoint"),
    ] {
        let answer = plane.as_admin(method, path, body).await;
        assert_eq!((answer.status.as_u16(), &*answer.code()), (status, code), "{method} {path}");
    }
    let text = [(AUTHORIZATION, &*plane.admin), (CONTENT_TYPE, "text/plain")];
    let answer = plane.ask("put", endpoint, &text, "{}").await;
    assert_eq!((answer.status.as_u16(), &*answer.code()), (415, "unsupported-media-type"));
    let answer = plane.ask("get", "/v1/catalog", &[(AUTHORIZATION, "Bearer none")], "").await;
    assert_eq!((answer.status.as_u16(), &*answer.code()), (401, "token-invalid"));
    assert!(answer.headers.contains_key(WWW_AUTHENTICATE));

    let register = r#"{"url": "https://home.example", "place": "aws_us_east_1"}"#;
    let registered = plane.as_admin("put", endpoint, register).await;
    assert_eq!(registered.status, StatusCode::CREATED);
    assert!(registered.headers.contains_key(ETAG));
    let heavy = plane.as_admin("patch", endpoint, r#"{"weight": 4000000000}"#).await;
    assert_eq!(heavy.code(), "bad-request");
    let again = [(AUTHORIZATION, &*plane.admin), (IF_NONE_MATCH, "*")];
    let again = plane.ask("put", endpoint, &again, register).await;
    assert_eq!((again.status.as_u16(), &*again.code()), (412, "revision-mismatch"));
}

#[tokio::test]
async fn whoever_asks_too_often_is_told_when_to_come_again_and_others_are_not() {
    let plane = Plane::start(|settings| {
        settings.read_rate = 1;
        settings.write_rate = 1;
    })
    .await;
    let mut last = plane.as_admin("get", "/v1/services", "").await;
    for _ in 0..10 {
        if last.status != StatusCode::OK {
            break;
        }
        last = plane.as_admin("get", "/v1/services", "").await;
    }
    assert_eq!((last.status.as_u16(), &*last.code()), (429, "rate-limited"));
    assert_eq!(last.headers[RETRY_AFTER], "1");
    // Its changes, and the rest of the world, have buckets of their own.
    assert_eq!(plane.as_admin("post", "/v1/keys/rotate", "").await.status, StatusCode::OK);
    assert_eq!(plane.ask("get", "/livez", &[], "").await.status, StatusCode::OK);

    // From one address that proves nothing, until it is empty; whoever proves something is not turned away with it.
    let mut refused = None;
    for _ in 0..5_000 {
        let answer = plane.ask("post", "/oauth2/token", &[], "").await;
        if answer.status == StatusCode::TOO_MANY_REQUESTS {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.unwrap();
    assert_eq!(refused.json()["error"], "temporarily_unavailable");
    assert_eq!(refused.headers[RETRY_AFTER], "1");
    assert_ne!(
        plane.as_admin("post", "/v1/keys/rotate", "").await.status,
        StatusCode::UNAUTHORIZED
    );
}

#[tokio::test]
async fn the_page_for_people_may_run_its_own_script_and_nothing_else() {
    let plane = Plane::start(|_| ()).await;
    let page = plane.ask("get", "/docs", &[], "").await;
    assert_eq!(page.headers[CONTENT_TYPE], "text/html; charset=utf-8");
    let html = std::str::from_utf8(&page.body).unwrap();
    let policy = page.headers[CONTENT_SECURITY_POLICY].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; "), "{policy}");
    for element in ["script", "style"] {
        let parts: Vec<&str> = html.split(&format!("<{element}>")).collect();
        let [_, rest] = *parts else { panic!("one {element}, without attributes") };
        let text = rest.split(&format!("</{element}>")).next().unwrap();
        let hash = STANDARD.encode(digest(&SHA256, text.as_bytes()));
        assert!(policy.contains(&format!("{element}-src 'sha256-{hash}'")), "{policy}");
    }
    // Nothing from elsewhere, and nothing that the policy would keep from working.
    for foreign in ["http://", "https://", "//cdn", " src=", " style=", " onclick=", "innerHTML"] {
        assert!(!html.contains(foreign), "{foreign}");
    }
    assert!(html.lines().count() < 300);
}
