//! Several control planes on one database, and a database that dies: whoever is asked knows the same, keys are the same,
//! and nothing that was acknowledged is lost.
//!
//! The database is a real PostgreSQL, as in `store.rs`.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    clippy::unwrap_used,
    reason = "a story may fail, may be long, and does what the product may not"
)]

#[path = "store/database.rs"]
#[allow(dead_code, reason = "each story file uses a part of it")]
mod database;
mod support;

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use database::{Life, Server, cluster, shared};
use futures_util::{FutureExt, future::BoxFuture};
use infrar::{
    api::{
        CONTROL_AUDIENCE, Catalog, Client, ClientError, ClientSettings, Credential, Registration,
        Told,
    },
    control::{Control, Running, Settings},
    discovery::{self, Directory, Passes},
    runtime::{Clock, Supervisor},
};
use secrecy::SecretString;
use support::{Folder, Infrar, free_ports, until};
use tokio::{runtime::Handle, time::timeout};

/// Far more than any step needs.
const LONG: Duration = Duration::from_secs(30);

const PROJECT: &str = "project: shop\nservices:\n  data: { scopes: [use] }\npermissions: { web: { data: [use] } }\n\
                       identities:\n  web: { client_secret_file: secrets/web }\n  data: { client_secret_file: secrets/data }\n";

/// A control plane of its own folder on a database that others share.
struct Replica {
    infrar: Infrar,
    client: Client,
}

impl Replica {
    fn start(folder: &Folder, name: &str, at: SocketAddr, issuer: &str, store: &str) -> Self {
        let listen = at.to_string();
        let arguments = [
            "control",
            "--project",
            "project.yaml",
            "--listen",
            &listen,
            "--public-url",
            issuer,
            "--store",
            store,
            "--data-dir",
            name,
            "--log-format",
            "json",
        ];
        let infrar = Infrar::start(folder, name, &arguments);
        Self { infrar, client: client(&[at]) }
    }

    async fn catalog(&self, bearer: &SecretString) -> Catalog {
        self.client.catalog(bearer, None).await.unwrap().unwrap().0
    }
}

fn client(at: &[SocketAddr]) -> Client {
    let urls = at.iter().map(|at| format!("http://{at}").parse().unwrap()).collect();
    let settings =
        ClientSettings { timeout: Duration::from_secs(5), ..ClientSettings::new(urls, None) };
    Client::new(settings).unwrap()
}

fn folder() -> Folder {
    let folder = Folder::new();
    folder.write("secrets/web", "the caller's secret\n");
    folder.write("secrets/data", "the callee's secret\n");
    folder.write("project.yaml", PROJECT);
    folder
}

async fn bearer(client: &Client, who: &str, secret: &str) -> SecretString {
    let credential =
        Credential { client_id: who.parse().unwrap(), secret: secret.to_owned().into() };
    client.token(&credential, CONTROL_AUDIENCE, None).await.unwrap().access_token
}

fn registration(n: usize) -> Registration {
    let text = format!(
        r#"{{"url":"https://n{n}.data.example","place":"aws/us-east-1","ttl_seconds":300}}"#
    );
    serde_json::from_str(&text).unwrap()
}

/// Registers until it is acknowledged.
async fn register(client: &Client, bearer: &SecretString, n: usize) {
    let (data, id) = ("data".parse().unwrap(), format!("n{n}").parse().unwrap());
    let asked = async {
        while client.register(bearer, &data, &id, &registration(n)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LONG, asked).await.expect("it is registered");
}

fn ids(catalog: &Catalog) -> BTreeSet<String> {
    catalog.project.services["data"].endpoints.iter().map(|it| it.id.to_string()).collect()
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

/// The secret that exactly one of them told.
async fn admin_secret(replicas: &[&Replica]) -> String {
    let told = |replica: &&Replica| replica.infrar.log().contains("client_secret  ");
    until("it is told", async || replicas.iter().any(told)).await;
    let logs: Vec<_> = replicas.iter().map(|replica| replica.infrar.log()).collect();
    let secrets: Vec<&str> = logs
        .iter()
        .flat_map(|log| log.lines())
        .filter_map(|line| line.trim().strip_prefix("client_secret  "))
        .collect();
    assert_eq!(secrets.len(), 1, "told once, by one of them\n{}", logs.join("\n---\n"));
    secrets[0].to_owned()
}

async fn keys(replica: &Replica) -> serde_json::Value {
    replica.client.own_jwks().await.unwrap()["keys"].clone()
}

async fn rotated(at: SocketAddr, bearer: &SecretString) -> String {
    use secrecy::ExposeSecret;
    let said = support::talk(
        at,
        format!(
            "POST /v1/keys/rotate HTTP/1.1\r\nhost: {at}\r\ncontent-length: 0\r\nauthorization: Bearer {}\r\nconnection: close\r\n\r\n",
            bearer.expose_secret()
        ),
    )
    .await;
    assert_eq!(said.status(), 200, "{said:?}");
    said.body
}

/// Follows the stream change by change, at whichever replica answers; ends at `last`. Every revision came exactly once.
async fn every_change(
    client: Client,
    bearer: SecretString,
    mut seen: u64,
    last: Arc<Mutex<Option<u64>>>,
) -> u64 {
    let done = |seen: u64| last.lock().unwrap().is_some_and(|last| seen >= last);
    while !done(seen) {
        let Ok(mut watch) = client.watch(&bearer, seen).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        while !done(seen) {
            match timeout(Duration::from_millis(200), watch.next()).await {
                Ok(Ok(Some(Told::Change(change)))) => {
                    assert_eq!(change.revision, seen + 1, "a gap");
                    seen = change.revision;
                }
                Ok(Ok(Some(Told::Current(standing)))) => assert_eq!(standing.revision, seen),
                Ok(Ok(Some(Told::Resync(standing)))) => panic!("resync to {standing:?} at {seen}"),
                Ok(Ok(None) | Err(_)) => break,
                Err(_elapsed) => {}
            }
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_replica_serves_any_request_and_keys_rotate_once() {
    let Some(server) = shared() else { return };
    let store = server.url(&server.new_database_name().await);
    let folder = folder();
    let [a, b] = free_ports();
    let issuer = format!("http://{a}");
    // Both at once on an empty database.
    let mut one = Replica::start(&folder, "one", a, &issuer, &store);
    let mut two = Replica::start(&folder, "two", b, &issuer, &store);
    one.infrar.ready(a).await;
    two.infrar.ready(b).await;
    let secret = admin_secret(&[&one, &two]).await;
    let by_one = bearer(&one.client, "infrar-admin", &secret).await;
    let by_two = bearer(&two.client, "infrar-admin", &secret).await;
    // Each takes what the other has signed, and there is one key for both.
    assert_eq!(one.catalog(&by_two).await, two.catalog(&by_one).await);
    assert_eq!(keys(&one).await, keys(&two).await);
    assert_eq!(
        keys(&one).await.as_array().unwrap().len(),
        1,
        "the second has made no key of its own"
    );

    // A third that comes later with an empty folder takes theirs.
    let [c] = free_ports();
    let mut three = Replica::start(&folder, "three", c, &issuer, &store);
    three.infrar.ready(c).await;
    assert_eq!(keys(&three).await, keys(&one).await);
    assert!(!three.infrar.log().contains("client_secret "), "{}", three.infrar.log());

    // Whoever watches one sees what is changed at the other.
    let revision = two.catalog(&by_one).await.revision;
    let mut watch = two.client.watch(&by_one, revision).await.unwrap();
    register(&one.client, &by_one, 1).await;
    let told = timeout(LONG, watch.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(&told, Told::Change(change) if change.patches.len() == 1), "{told:?}");
    let data = "data".parse().unwrap();
    two.client.heartbeat(&by_one, &data, &"n1".parse().unwrap()).await.unwrap();
    three.client.remove(&by_two, &data, &"n1".parse().unwrap(), None).await.unwrap();
    until("it is gone at the first", async || ids(&one.catalog(&by_one).await).is_empty()).await;

    // All are asked to rotate at the same time: one new key.
    let asked = tokio::join!(rotated(a, &by_one), rotated(b, &by_one), rotated(c, &by_one));
    assert_eq!((&asked.0, &asked.0), (&asked.1, &asked.2));
    until("all publish it", async || {
        let all = [keys(&one).await, keys(&two).await, keys(&three).await];
        all.iter().all(|keys| *keys == all[0] && keys.as_array().unwrap().len() == 2)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_dies_under_load_costs_nobody_a_change() {
    let Some(server) = shared() else { return };
    let store = server.url(&server.new_database_name().await);
    let folder = folder();
    let [a, b] = free_ports();
    let issuer = format!("http://{a}");
    let mut one = Replica::start(&folder, "one", a, &issuer, &store);
    one.infrar.ready(a).await;
    let mut two = Replica::start(&folder, "two", b, &issuer, &store);
    two.infrar.ready(b).await;
    let pass = bearer(&one.client, "data", "the callee's secret").await;
    let begun = one.catalog(&pass).await.revision;

    // One proxy follows as proxies do, one counts every change; both know both addresses and begin at the one that dies.
    let directory = Arc::new(Directory::default());
    let supervisor = Supervisor::new(Handle::current());
    let following =
        discovery::Registry::new(client(&[a, b]), Arc::new(Pass(pass.clone())), directory.clone());
    supervisor.spawn_until_end("registry", following.follow());
    let last = Arc::new(Mutex::new(None));
    let counting =
        tokio::spawn(every_change(client(&[a, b]), pass.clone(), begun, Arc::clone(&last)));

    let count = 120;
    let registering = (0..4).map(|lane| {
        let (client, pass) = (client(&[a, b]), pass.clone());
        tokio::spawn(async move {
            for n in (lane..count).step_by(4) {
                register(&client, &pass, n).await;
            }
        })
    });
    let registering: Vec<_> = registering.collect();
    until("a third is there", async || ids(&two.catalog(&pass).await).len() > count / 3).await;
    one.infrar.kill().await;
    for lane in registering {
        timeout(LONG, lane).await.unwrap().unwrap();
    }
    let end = two.catalog(&pass).await;
    assert_eq!(ids(&end).len(), count);
    *last.lock().unwrap() = Some(end.revision);
    assert_eq!(timeout(LONG, counting).await.unwrap().unwrap(), end.revision);
    until("the proxy has it too", async || {
        directory.load().is_some_and(|catalog| {
            catalog.project == end.project && catalog.revision == end.revision
        })
    })
    .await;
    // The one that died finds everything again.
    let mut one = Replica::start(&folder, "one", a, &issuer, &store);
    one.infrar.ready(a).await;
    assert_eq!(one.catalog(&pass).await, end);
}

/// A control plane in this process on that database.
async fn plane(folder: &Path, name: &str, store: &str) -> Running {
    plane_by(Clock::system(), folder, name, store).await
}

/// The same by another clock.
async fn plane_by(clock: Clock, folder: &Path, name: &str, store: &str) -> Running {
    let mut settings = Settings::new((Ipv4Addr::LOCALHOST, 0).into(), folder.join(name));
    settings.store = store.parse().unwrap();
    settings.clock = clock;
    settings.public_url = Some("http://127.0.0.1:9".parse().unwrap());
    let file = infrar::config::load_project(&folder.join("project.yaml")).unwrap();
    Control::start(settings, Some((file.project, file.identities))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_dies_in_mid_write_loses_nothing_that_was_acknowledged() {
    let Some(cluster) = cluster() else { return };
    let mut server = Server::start(cluster.path(), Life::OfItsOwn, &[]);
    let store = server.url(&server.new_database_name().await);
    let folder = folder();
    let running = plane(&folder.path(""), "one", &store).await;
    let at = running.local_addr();
    let pass = bearer(&client(&[at]), "data", "the callee's secret").await;

    let directory = Arc::new(Directory::default());
    let supervisor = Supervisor::new(Handle::current());
    let following =
        discovery::Registry::new(client(&[at]), Arc::new(Pass(pass.clone())), directory.clone());
    supervisor.spawn_until_end("registry", following.follow());

    let acknowledged: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let lanes: Vec<_> = (0..4)
        .map(|lane| {
            let (client, pass) = (client(&[at]), pass.clone());
            let (acknowledged, stop) = (Arc::clone(&acknowledged), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut failures = Vec::new();
                for n in (lane..).step_by(4) {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let (data, id) = ("data".parse().unwrap(), format!("n{n}").parse().unwrap());
                    match client.register(&pass, &data, &id, &registration(n)).await {
                        Ok(_) => drop(acknowledged.lock().unwrap().insert(format!("n{n}"))),
                        Err(error) => {
                            failures.push(error);
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                    }
                }
                failures
            })
        })
        .collect();
    let known = || acknowledged.lock().unwrap().len();
    until("some are registered", async || known() > 40).await;
    server.kill();
    // What is known is served on: the catalog, and every name in it.
    let client = client(&[at]);
    for _ in 0..10 {
        let (catalog, _) = client.catalog(&pass, None).await.unwrap().unwrap();
        assert!(ids(&catalog).len() >= 40);
        assert!(directory.load().is_some_and(|catalog| !ids(&catalog).is_empty()));
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    server.restart(&[]);
    let before = known();
    until("registering goes on", async || known() > before + 20).await;
    stop.store(true, Ordering::Relaxed);
    for lane in lanes {
        for failure in timeout(LONG, lane).await.unwrap().unwrap() {
            // Said as what it is: try again.
            assert!(
                matches!(&failure, ClientError::Refused { status, code, .. }
                    if status.as_u16() == 503 && code == "store-unavailable"),
                "{failure:?}"
            );
        }
    }
    let wanted = acknowledged.lock().unwrap().clone();
    let (catalog, _) = client.catalog(&pass, None).await.unwrap().unwrap();
    assert!(ids(&catalog).is_superset(&wanted), "{:?}", wanted.difference(&ids(&catalog)));
    // Another one that reads the database anew knows the same.
    let other = plane(&folder.path(""), "two", &store).await;
    let theirs = self::client(&[other.local_addr()]).catalog(&pass, None).await.unwrap().unwrap().0;
    assert!(ids(&theirs).is_superset(&wanted));
    until("the proxy is where they are", async || {
        directory.load().is_some_and(|catalog| catalog.project == theirs.project)
    })
    .await;
    // Leases count on, and nobody was taken away.
    let (data, id) = ("data".parse().unwrap(), wanted.first().unwrap().parse().unwrap());
    let (answer, _) = client.endpoint(&pass, &data, &id).await.unwrap();
    assert!(answer.expires_in.unwrap() > 200, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_clock_is_minutes_off_ends_no_lease_and_keeps_none() {
    let Some(server) = shared() else { return };
    let store = server.url(&server.new_database_name().await);
    let folder = folder();
    let right = plane(&folder.path(""), "right", &store).await;
    let ahead = Clock::starting_at(Clock::system().now() + Duration::from_mins(5));
    let ahead = plane_by(ahead, &folder.path(""), "ahead", &store).await;
    let (right, ahead) = (client(&[right.local_addr()]), client(&[ahead.local_addr()]));
    let pass = bearer(&right, "data", "the callee's secret").await;
    let data = "data".parse().unwrap();
    let [one, two] = ["one", "two"].map(|id| id.parse().unwrap());
    let short = Registration { ttl_seconds: 5, ..registration(1) };
    right.register(&pass, &data, &one, &short).await.unwrap();
    ahead
        .register(&pass, &data, &two, &Registration { ttl_seconds: 5, ..registration(2) })
        .await
        .unwrap();
    let begun = tokio::time::Instant::now();
    // One is looked after, at either replica in turn; the other is not.
    while begun.elapsed() < Duration::from_secs(8) {
        for client in [&right, &ahead] {
            client.heartbeat(&pass, &data, &one).await.unwrap();
            let left = client.endpoint(&pass, &data, &one).await.unwrap().0.expires_in;
            assert!(left.is_some_and(|left| (3..=5).contains(&left)), "{left:?}");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let there = client_ids(&ahead, &pass).await;
        assert!(there.contains("one"));
        let early = begun.elapsed() < Duration::from_secs(3);
        assert!(!early || there.contains("two"), "gone after {:?}", begun.elapsed());
    }
    for client in [&right, &ahead] {
        until("only one is left", async || client_ids(client, &pass).await.len() == 1).await;
    }
}

async fn client_ids(client: &Client, bearer: &SecretString) -> BTreeSet<String> {
    ids(&client.catalog(bearer, None).await.unwrap().unwrap().0)
}
