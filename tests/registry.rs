//! Stories of the registry: endpoints come, are looked after and go; every change is told as what it changes; and what
//! cannot be is refused with its reason.
#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a story may fail"
)]

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use http::StatusCode;
use infrar::{
    api::{
        Adjustment, CONTROL_AUDIENCE, Catalog, Client, ClientError, ClientSettings, Credential,
        Patch, ProxyReport, Registration, Source, Told, Watch,
    },
    control::{Control, Identities, Identity, Running, Settings},
    discovery::{self, Directory, Passes},
    model::{
        AuthMethod, EndpointId, EndpointState, Enforcement, NetworkMode, Networking, Project,
        Service, ServiceName,
    },
    runtime::{Supervisor, open_files},
};
use secrecy::SecretString;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

/// Far more than any step needs.
const LONG: Duration = Duration::from_secs(20);

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn id(text: &str) -> EndpointId {
    text.parse().unwrap()
}

/// A service with one endpoint of the project's own.
fn service(host: &str) -> Arc<Service> {
    let endpoint = serde_json::json!({"id": "home", "url": format!("https://{host}"), "internal_url": null,
        "private_url": null, "place": "azure/eastus", "zone": null, "auth_method": "bearer_token", "weight": 100,
        "state": "active"});
    Arc::new(Service {
        endpoints: vec![serde_json::from_value(endpoint).unwrap()],
        ..Service::default()
    })
}

fn project() -> Project {
    Project {
        name: name("shop"),
        networking: Networking {
            multi_cloud: true,
            default_mode: NetworkMode::Public,
            connections: Vec::new(),
        },
        services: BTreeMap::from([
            (name("data"), service("data.example")),
            (name("reports"), service("reports.example")),
        ]),
        permissions: BTreeMap::new(),
        issuers: Vec::new(),
        mode: Enforcement::Enforce,
    }
}

fn identities() -> Identities {
    Identities::from([(name("data"), Identity::ClientSecret("data".to_owned().into()))])
}

fn registration(url: &str) -> Registration {
    Registration {
        url: url.parse().unwrap(),
        internal_url: None,
        private_url: None,
        place: "aws_us_east_1".parse().unwrap(),
        zone: None,
        auth_method: AuthMethod::BearerToken,
        weight: 100,
        state: EndpointState::Active,
        ttl_seconds: 30,
    }
}

fn refused<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> (u16, String) {
    match outcome.unwrap_err() {
        ClientError::Refused { status, code, .. } => (status.as_u16(), code),
        other => panic!("{other:?}"),
    }
}

/// A control plane, somebody who may do everything, and the service `data`, which may look after itself.
struct Plane {
    running: Running,
    client: Client,
    admin: SecretString,
    data: SecretString,
}

impl Plane {
    async fn start(folder: &Path) -> Self {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let settings = Settings::new(listen, folder.join("data"));
        let mut running = Control::start(settings, Some((project(), identities()))).await.unwrap();
        let client = client(&running);
        let (client_id, secret) = running.first_admin().unwrap();
        let admin = Credential { client_id: name(client_id), secret };
        let admin = client.token(&admin, CONTROL_AUDIENCE, None).await.unwrap().access_token;
        let data = Credential { client_id: name("data"), secret: "data".to_owned().into() };
        let data = client.token(&data, CONTROL_AUDIENCE, None).await.unwrap().access_token;
        Self { running, client, admin, data }
    }

    async fn catalog(&self) -> Catalog {
        self.client.catalog(&self.admin, None).await.unwrap().unwrap().0
    }

    async fn watch(&self) -> Watch {
        let revision = self.catalog().await.revision;
        self.client.watch(&self.admin, revision).await.unwrap()
    }

    async fn register(
        &self,
        endpoint: &str,
        registration: &Registration,
    ) -> Result<Source, ClientError> {
        let answer =
            self.client.register(&self.data, &name("data"), &id(endpoint), registration).await?;
        Ok(answer.source)
    }

    async fn ids(&self) -> Vec<String> {
        let catalog = self.catalog().await;
        let endpoints = &catalog.project.services["data"].endpoints;
        endpoints.iter().map(|endpoint| endpoint.id.to_string()).collect()
    }
}

fn client(running: &Running) -> Client {
    let url = format!("http://{}", running.local_addr()).parse().unwrap();
    Client::new(ClientSettings::new(vec![url], None)).unwrap()
}

async fn told(watch: &mut Watch) -> Vec<Patch> {
    loop {
        match timeout(LONG, watch.next()).await.unwrap().unwrap().unwrap() {
            Told::Change(change) => return change.patches,
            Told::Current(_) => {}
            resync @ Told::Resync(_) => panic!("{resync:?}"),
        }
    }
}

#[tokio::test]
async fn an_endpoint_registers_changes_and_is_removed_and_watchers_see_each_step() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let (data, east) = (name("data"), id("aws-east"));
    let mut watch = plane.watch().await;
    let registration = registration("https://east.data.example");
    assert_eq!(plane.register("aws-east", &registration).await.unwrap(), Source::Lease);
    let patches = told(&mut watch).await;
    assert!(
        matches!(&*patches, [Patch::Endpoint { id, endpoint: Some(_), .. }] if *id == east),
        "{patches:?}"
    );
    assert_eq!(plane.ids().await, ["home", "aws-east"]);

    // The same again changes nothing.
    let revision = plane.running.revision();
    plane.register("aws-east", &registration).await.unwrap();
    assert_eq!(plane.running.revision(), revision);

    let (answer, changed) = plane.client.endpoint(&plane.data, &data, &east).await.unwrap();
    assert!((25..=30).contains(&answer.expires_in.unwrap()), "{answer:?}");
    let draining = Adjustment { state: Some(EndpointState::Draining), weight: None };
    let drained = plane.client.adjust(&plane.data, &data, &east, &draining, changed).await.unwrap();
    assert_eq!(drained.endpoint.state, EndpointState::Draining);
    assert_eq!(told(&mut watch).await.len(), 1);
    // Whoever looked before that does not overwrite it.
    let late = plane.client.adjust(&plane.data, &data, &east, &draining, changed).await;
    assert_eq!(refused(late), (412, "revision-mismatch".to_owned()));

    plane.client.remove(&plane.data, &data, &east, None).await.unwrap();
    let patches = told(&mut watch).await;
    assert!(matches!(&*patches, [Patch::Endpoint { endpoint: None, .. }]), "{patches:?}");
    let gone = plane.client.heartbeat(&plane.data, &data, &east).await;
    assert_eq!(refused(gone), (404, "unknown-endpoint".to_owned()));
}

#[tokio::test]
async fn an_endpoint_that_is_not_heard_of_is_gone_within_its_lease_and_one_that_is_stays() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let data = name("data");
    let short = |url| Registration { ttl_seconds: 5, ..registration(url) };
    plane.register("quiet", &short("https://a.data.example")).await.unwrap();
    plane.register("alive", &short("https://b.data.example")).await.unwrap();
    let mut watch = plane.watch().await;
    let begun = tokio::time::Instant::now();
    let (client, bearer, at) = (plane.client.clone(), plane.data.clone(), data.clone());
    let heart = timeout(LONG, async move {
        loop {
            client.heartbeat(&bearer, &at, &id("alive")).await.unwrap();
            sleep(Duration::from_secs(1)).await;
        }
    });
    let patches = tokio::select! {
        patches = told(&mut watch) => patches,
        _elapsed = heart => panic!("nothing has gone"),
    };
    assert!(begun.elapsed() < Duration::from_millis(5500), "{:?}", begun.elapsed());
    assert!(
        matches!(&*patches, [Patch::Endpoint { id, endpoint: None, .. }] if id.as_str() == "quiet"),
        "{patches:?}"
    );
    assert_eq!(plane.ids().await, ["home", "alive"]);
}

#[tokio::test]
async fn what_cannot_be_registered_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let good = registration("https://east.data.example");
    let outcome = plane.register("home", &good).await;
    assert_eq!(refused(outcome), (409, "owned-by-project".to_owned()));
    let outcome = plane.register("x", &registration("https://reports.example:8443")).await;
    assert_eq!(refused(outcome), (409, "host-taken".to_owned()));
    let outcome = plane.register("x", &registration("http://plain.example")).await;
    assert_eq!(refused(outcome), (400, "bad-request".to_owned()));
    let outcome = plane.register("x", &Registration { ttl_seconds: 4, ..good.clone() }).await;
    assert_eq!(refused(outcome), (400, "bad-request".to_owned()));
    // Of another service, without the right to it; with it, but of none that there is.
    let client = &plane.client;
    let outcome = client.register(&plane.data, &name("reports"), &id("x"), &good).await;
    assert_eq!(refused(outcome), (403, "scope-missing".to_owned()));
    let outcome = client.register(&plane.admin, &name("report"), &id("x"), &good).await;
    assert_eq!(refused(outcome), (404, "unknown-service".to_owned()));
    assert_eq!(plane.running.revision(), 1, "nothing of it has changed anything");
    // Two services on one machine, told apart by ports, are no conflict.
    let local = |port| registration(&format!("http://127.0.0.1:{port}"));
    plane.register("local", &local(1)).await.unwrap();
    client.register(&plane.admin, &name("reports"), &id("local"), &local(2)).await.unwrap();
}

#[tokio::test]
async fn an_endpoint_of_the_project_is_adjusted_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let (data, home) = (name("data"), id("home"));
    let heavy = Adjustment { state: None, weight: Some(7) };
    let answer = plane.client.adjust(&plane.admin, &data, &home, &heavy, None).await.unwrap();
    assert_eq!((answer.source, answer.endpoint.weight), (Source::Project, 7));
    let outcome = plane.client.remove(&plane.admin, &data, &home, None).await;
    assert_eq!(refused(outcome), (409, "owned-by-project".to_owned()));
    // The project says it anew: what was adjusted at an endpoint that stays, stays.
    let mut edited = project();
    edited.services.remove("reports");
    plane.running.replace(edited, &identities()).await.unwrap();
    assert_eq!(plane.catalog().await.project.services["data"].endpoints[0].weight, 7);
}

#[tokio::test]
async fn of_two_who_want_the_same_to_be_unchanged_one_comes_too_late() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let (data, home) = (name("data"), id("home"));
    for round in 1..20 {
        let (_, at) = plane.client.endpoint(&plane.admin, &data, &home).await.unwrap();
        let weight = |weight| Adjustment { state: None, weight: Some(weight) };
        // At once, so that they become one revision if they can.
        let (a, b) = (weight(2 * round), weight(2 * round + 1));
        let (a, b) = tokio::join!(
            plane.client.adjust(&plane.admin, &data, &home, &a, at),
            plane.client.adjust(&plane.admin, &data, &home, &b, at),
        );
        assert_eq!(u8::from(a.is_ok()) + u8::from(b.is_ok()), 1, "{a:?} {b:?}");
    }
}

#[tokio::test]
async fn what_the_project_says_of_an_endpoint_is_not_for_its_service_to_change() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let light = Adjustment { state: None, weight: Some(0) };
    let outcome = plane.client.adjust(&plane.data, &name("data"), &id("home"), &light, None).await;
    assert_eq!(refused(outcome), (403, "scope-missing".to_owned()));
}

#[tokio::test]
async fn a_project_that_no_file_could_say_does_not_come_over_the_api_either() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let (good, _) = plane.client.project(&plane.admin).await.unwrap();
    let import = async |document| refused(plane.client.import(&plane.admin, &document, None).await);
    let mut one_host = good.clone();
    one_host.project.services.insert(name("reports"), service("data.example"));
    assert_eq!(import(one_host).await, (400, "bad-request".to_owned()));
    let mut twice = good.clone();
    let mut data = Service::clone(&service("data.example"));
    data.endpoints.extend(data.endpoints.clone());
    twice.project.services.insert(name("data"), Arc::new(data));
    assert_eq!(import(twice).await, (400, "bad-request".to_owned()));
    let mut reserved = good.clone();
    let somebody = reserved.identities.values().next().cloned().unwrap();
    reserved.identities.insert(name("infrar-admin"), somebody);
    assert_eq!(import(reserved).await, (400, "reserved-name".to_owned()));
    assert_eq!(plane.client.project(&plane.admin).await.unwrap().0, good);
}

#[tokio::test]
async fn registered_endpoints_adjustments_and_revisions_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    plane.register("east", &registration("https://east.data.example")).await.unwrap();
    let before = plane.catalog().await;
    plane.running.shutdown().await;
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let settings = Settings::new(listen, folder.path().join("data"));
    let mut again = Control::start(settings, Some((project(), identities()))).await.unwrap();
    assert!(again.first_admin().is_none(), "told once");
    let client = client(&again);
    let data = Credential { client_id: name("data"), secret: "data".to_owned().into() };
    let bearer = client.token(&data, CONTROL_AUDIENCE, None).await.unwrap().access_token;
    let (after, _) = client.catalog(&bearer, None).await.unwrap().unwrap();
    assert_eq!((after.revision, after.project), (before.revision, before.project));
}

#[tokio::test]
async fn a_new_project_takes_away_what_has_no_place_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    plane.register("east", &registration("https://east.data.example")).await.unwrap();
    plane.register("west", &registration("https://west.data.example")).await.unwrap();
    let mut edited = project();
    // The host of `east` now belongs to another service.
    edited.services.insert(name("reports"), service("east.data.example"));
    plane.running.replace(edited, &identities()).await.unwrap();
    assert_eq!(plane.ids().await, ["home", "west"]);
}

#[tokio::test]
async fn a_project_is_exported_and_imported_by_whoever_may_and_nobody_overwrites_another() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let client = &plane.client;
    assert_eq!(refused(client.project(&plane.data).await).0, 403);
    let (mut document, at) = client.project(&plane.admin).await.unwrap();
    assert_eq!(document.project, project());
    document.project.services.remove("reports");
    client.import(&plane.admin, &document, at).await.unwrap();
    assert!(!plane.catalog().await.project.services.contains_key("reports"));
    document.project.networking.multi_cloud = false;
    let outcome = client.import(&plane.admin, &document, at).await;
    assert_eq!(refused(outcome), (412, "revision-mismatch".to_owned()));
    document.project.name = name("bank");
    let outcome = client.import(&plane.admin, &document, None).await;
    assert_eq!(refused(outcome), (409, "project-renamed".to_owned()));
}

#[tokio::test]
async fn proxies_tell_which_revision_they_serve() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let report = |revision| ProxyReport {
        revision,
        place: Some("aws_us_east_1".parse().unwrap()),
        role: "sidecar".to_owned(),
        version: "0.1.0".to_owned(),
    };
    let instance = Uuid::now_v7();
    plane.client.report(&plane.data, instance, &report(1)).await.unwrap();
    plane.client.report(&plane.data, instance, &report(2)).await.unwrap();
    let list = plane.client.proxies(&plane.admin).await.unwrap();
    assert_eq!(list.proxies.len(), 1);
    assert_eq!((&list.proxies[0].service, list.proxies[0].report.revision), (&name("data"), 2));
}

#[tokio::test]
async fn a_hundred_that_register_at_once_need_few_revisions_and_all_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Arc::new(Plane::start(folder.path()).await);
    let all = (0..100).map(|n| {
        let plane = Arc::clone(&plane);
        async move {
            let registration = registration(&format!("https://n{n}.data.example"));
            plane.register(&format!("n{n}"), &registration).await.unwrap();
        }
    });
    futures_util::future::join_all(all).await;
    assert_eq!(plane.ids().await.len(), 101);
    assert!(plane.running.revision() < 100, "{}", plane.running.revision());
}

#[tokio::test]
async fn requests_that_make_no_sense_are_told_what_would() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let url = format!("http://{}/v1/services/data/endpoints/x", plane.running.local_addr());
    let http = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .build_http::<http_body_util::Full<bytes::Bytes>>();
    let ask = async |method: &str, headers: &[(&str, &str)], body: &str| {
        use secrecy::ExposeSecret;
        let bearer = format!("Bearer {}", plane.admin.expose_secret());
        let mut request =
            http::Request::builder().method(method).uri(&url).header("authorization", bearer);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body.to_owned().into()).unwrap();
        let answer = http.request(request).await.unwrap();
        let status = answer.status();
        let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    };
    let (status, text) = ask("PUT", &[], "{").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("line 1"), "{text}");
    let (status, text) =
        ask("PUT", &[], r#"{"url":"https://a.example","place":"aws_x_1","tll":3}"#).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("tll"), "{text}");
    let (status, text) = ask("PATCH", &[("if-match", "3")], "{}").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("quotes"), "{text}");
    let (status, _) = ask(
        "PUT",
        &[("if-none-match", "*")],
        r#"{"url":"https://a.data.example","place":"aws/us-east-1"}"#,
    )
    .await;
    assert_eq!(status, StatusCode::CREATED);
    let (status, _) = ask(
        "PUT",
        &[("if-none-match", "*")],
        r#"{"url":"https://a.data.example","place":"aws/us-east-1"}"#,
    )
    .await;
    assert_eq!(status, StatusCode::PRECONDITION_FAILED);
}

#[tokio::test]
async fn a_watcher_that_fell_behind_is_told_what_it_missed_or_to_begin_anew() {
    let folder = tempfile::tempdir().unwrap();
    let plane = Plane::start(folder.path()).await;
    let mut behind = plane.catalog().await;
    for n in 0..3 {
        let registration = registration(&format!("https://n{n}.data.example"));
        plane.register(&format!("n{n}"), &registration).await.unwrap();
    }
    let end = plane.catalog().await;
    // What is still known is told in its order, and leads to what is in force.
    let mut watch = plane.client.watch(&plane.admin, behind.revision).await.unwrap();
    while behind.revision < end.revision {
        match timeout(LONG, watch.next()).await.unwrap().unwrap().unwrap() {
            Told::Change(change) => behind = change.apply(&behind).unwrap(),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(behind, end);
    // After a restart nobody can tell what came between, nor ever of a past that is not this one's.
    plane.running.shutdown().await;
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let settings = Settings::new(listen, folder.path().join("data"));
    let running = Control::start(settings, Some((project(), identities()))).await.unwrap();
    let client = client(&running);
    let data = Credential { client_id: name("data"), secret: "data".to_owned().into() };
    let data = client.token(&data, CONTROL_AUDIENCE, None).await.unwrap().access_token;
    let mut watch = client.watch(&data, 1).await.unwrap();
    let told = timeout(LONG, watch.next()).await.unwrap().unwrap().unwrap();
    let Told::Resync(standing) = told else { panic!("{told:?}") };
    assert_eq!(standing.revision, end.revision);
    // What it is told from here on follows on what the catalog says.
    let mut caught_up = client.catalog(&data, None).await.unwrap().unwrap().0;
    let (endpoint, host) = (id("late"), "https://late.data.example");
    client.register(&data, &name("data"), &endpoint, &registration(host)).await.unwrap();
    match timeout(LONG, watch.next()).await.unwrap().unwrap().unwrap() {
        Told::Change(change) => caught_up = change.apply(&caught_up).unwrap(),
        other => panic!("{other:?}"),
    }
    assert_eq!(caught_up, client.catalog(&data, None).await.unwrap().unwrap().0);
    let mut ahead = client.watch(&data, end.revision + 100).await.unwrap();
    let told = timeout(LONG, ahead.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(told, Told::Resync(_)), "{told:?}");
}

/// The same bearer for ever.
struct Pass(SecretString);

impl Passes for Pass {
    fn bearer(
        &self,
    ) -> BoxFuture<'static, Result<SecretString, Box<dyn std::error::Error + Send + Sync>>> {
        std::future::ready(Ok(self.0.clone())).boxed()
    }

    fn refused(&self, _: &SecretString) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_that_come_back_at_once_are_caught_up_within_five_seconds() {
    let folder = tempfile::tempdir().unwrap();
    // Both ends of each connection are in this process, and a control plane takes half of its connections from one address.
    let count = (open_files() / 4).min(1000);
    let start = async |listen: SocketAddr, project: Project| {
        let settings = Settings {
            connections: 4 * count,
            ..Settings::new(listen, folder.path().join("data"))
        };
        Control::start(settings, Some((project, identities()))).await.unwrap()
    };
    let running = start((Ipv4Addr::LOCALHOST, 0).into(), project()).await;
    let at = running.local_addr();
    let client = client(&running);
    let data = Credential { client_id: name("data"), secret: "data".to_owned().into() };
    let bearer = client.token(&data, CONTROL_AUDIENCE, None).await.unwrap().access_token;
    let supervisor = Supervisor::new(tokio::runtime::Handle::current());
    let passes = Arc::new(Pass(bearer));
    let directories: Vec<Arc<Directory>> = (0..count).map(|_| Arc::default()).collect();
    for directory in &directories {
        let following =
            discovery::Registry::new(client.clone(), passes.clone(), Arc::clone(directory));
        supervisor.spawn_until_end("follower", following.follow());
    }
    let all_have = async |revision| {
        let mut arrived = Vec::new();
        for directory in &directories {
            let mut changes = directory.changes();
            while directory.load().is_none_or(|catalog| catalog.revision < revision) {
                timeout(LONG, changes.changed()).await.unwrap().unwrap();
            }
            arrived.push(tokio::time::Instant::now());
        }
        arrived
    };
    all_have(1).await;
    // A change reaches all.
    let mut edited = project();
    edited.services.remove("reports");
    let begun = tokio::time::Instant::now();
    running.replace(edited.clone(), &identities()).await.unwrap();
    all_have(2).await;
    eprintln!("a change at the last of {count}: {:?}", begun.elapsed());

    running.shutdown().await;
    edited.services.insert(name("late"), Arc::default());
    let _running = start(at, edited).await;
    let begun = tokio::time::Instant::now();
    all_have(3).await;
    eprintln!("caught up, the last of {count}: {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}
