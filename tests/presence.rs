//! A sidecar tells the control plane where its service is: it comes by itself, is called by name, leaves without a failed
//! request, and is gone within its lease when it dies.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a story may fail, and does what the product may not"
)]

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use infrar::{
    api::{CONTROL_AUDIENCE, Catalog, Client, ClientSettings, Credential},
    model::EndpointState,
};
use secrecy::SecretString;
use support::{Folder, Infrar, Origin, Pair, free_ports, get, readyz, until};
use tokio::time::Instant;

/// Services without an endpoint in the project: whoever is one says so.
const PROJECT: &str = "project: shop\nservices:\n  data: { scopes: [use] }\n  reports:\n    scopes: [use]\n    endpoints: \
                       [{ url: 'https://reports.example', provider: aws, region: us-east-1 }]\n\
                       permissions: { web: { data: [use] } }\n\
                       identities:\n  web: { client_secret_file: secrets/web }\n  data: { client_secret_file: secrets/data }\n";

/// A control plane and a caller; callees come and go.
struct Stage {
    folder: Folder,
    control: SocketAddr,
    plane: Infrar,
    out: SocketAddr,
    caller: Infrar,
    caller_admin: SocketAddr,
    client: Client,
    bearer: SecretString,
}

/// A sidecar of `data`.
struct Callee {
    infrar: Infrar,
    admin: SocketAddr,
}

impl Stage {
    async fn open() -> Self {
        let folder = Folder::new();
        let [control, out, admin] = free_ports();
        folder.write("secrets/web", "the caller's secret\n");
        folder.write("secrets/data", "the callee's secret\n");
        folder.write("project.yaml", PROJECT);
        folder.write(
            "caller.yaml",
            &format!(
                "service: web\nplace: aws_us_east_1\ncontrol: {{ url: 'http://{control}', state_dir: caller, \
                 credential: {{ client_secret_file: secrets/web }} }}\noutbound: {{ listen: '{out}' }}\n\
                 admin: {{ listen: '{admin}' }}\nlog: {{ format: json }}\n"
            ),
        );
        let mut plane = Pair::start_control(&folder, control);
        plane.ready(control).await;
        let mut caller = Pair::start_proxy(&folder, "caller");
        caller.ready(admin).await;
        let url = format!("http://{control}").parse().unwrap();
        let client = Client::new(ClientSettings::new(vec![url], None)).unwrap();
        let who = Credential {
            client_id: "web".parse().unwrap(),
            secret: "the caller's secret".to_owned().into(),
        };
        let bearer = client.token(&who, CONTROL_AUDIENCE, None).await.unwrap().access_token;
        Self { folder, control, plane, out, caller, caller_admin: admin, client, bearer }
    }

    /// Starts a sidecar of `data` that advertises `url`, or, without one, where it listens.
    async fn callee(&self, name: &str, app: SocketAddr, url: Option<&str>) -> Callee {
        let [inbound, admin] = free_ports();
        let here = format!("http://{inbound}");
        let url = url.unwrap_or(&here);
        self.folder.write(
            &format!("{name}.yaml"),
            &format!(
                "service: data\nplace: azure_eastus\ncontrol: {{ url: 'http://{}', state_dir: {name}, \
                 credential: {{ client_secret_file: secrets/data }} }}\n\
                 inbound: {{ listen: '{inbound}', app: 'http://{app}', tls: off, \
                 advertise: {{ id: {name}, url: '{url}', ttl: 5s }} }}\n\
                 admin: {{ listen: '{admin}' }}\nlog: {{ format: json }}\n",
                self.control
            ),
        );
        let mut infrar = Pair::start_proxy(&self.folder, name);
        infrar.ready(admin).await;
        Callee { infrar, admin }
    }

    async fn catalog(&self) -> Option<Catalog> {
        self.client.catalog(&self.bearer, None).await.ok()?.map(|(catalog, _)| catalog)
    }

    /// The endpoints of `data` and how they are.
    async fn endpoints(&self) -> Option<Vec<(String, EndpointState)>> {
        let catalog = self.catalog().await?;
        let endpoints = &catalog.project.services["data"].endpoints;
        let each = endpoints.iter().map(|endpoint| (endpoint.id.to_string(), endpoint.state));
        let mut all: Vec<_> = each.collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Some(all)
    }

    async fn are_there(&self, ids: &[&str]) {
        until(&format!("{ids:?} are there"), async || {
            let found = self.endpoints().await;
            found.is_some_and(|found| {
                found.iter().map(|(id, _)| id.as_str()).eq(ids.iter().copied())
            })
        })
        .await;
    }

    async fn is_answered_by(&self, whom: &str) {
        let asked = async || get(self.out, "data", "/").await.body == whom;
        until(&format!("{whom} answers"), asked).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_comes_by_itself_is_called_by_name_and_leaves_without_a_failed_request() {
    let stage = Stage::open().await;
    let (first, second) = (Origin::plain("first").await, Origin::plain("second").await);
    let mut one = stage.callee("one", first.at, None).await;
    stage.are_there(&["one"]).await;
    stage.is_answered_by("first").await;
    let _two = stage.callee("two", second.at, None).await;
    stage.are_there(&["one", "two"]).await;
    stage.is_answered_by("second").await;

    // Callers go on while the first one leaves.
    let (out, on) = (stage.out, Arc::new(AtomicBool::new(true)));
    let calling = tokio::spawn({
        let on = Arc::clone(&on);
        async move {
            let mut statuses = Vec::new();
            while on.load(Ordering::Relaxed) {
                let said = get(out, "data", "/").await;
                statuses.push((said.status(), said.body));
            }
            statuses
        }
    });
    one.infrar.signal("TERM");
    assert_eq!(one.infrar.ended().await.code(), Some(0), "{}", one.infrar.log());
    stage.are_there(&["two"]).await;
    on.store(false, Ordering::Relaxed);
    let statuses = calling.await.unwrap();
    let failed: Vec<_> = statuses.iter().filter(|(status, _)| *status != 200).collect();
    assert!(
        failed.is_empty() && !statuses.is_empty(),
        "{failed:?} of {}\n{}\n{}",
        statuses.len(),
        stage.caller.log(),
        one.infrar.log()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_dies_is_gone_within_its_lease_and_one_that_was_mute_comes_back() {
    let stage = Stage::open().await;
    let app = Origin::plain("here").await;
    let mut dies = stage.callee("dies", app.at, None).await;
    let mute = stage.callee("mute", app.at, None).await;
    stage.are_there(&["dies", "mute"]).await;
    dies.infrar.kill().await;
    let died = Instant::now();
    stage.are_there(&["mute"]).await;
    assert!(died.elapsed() < Duration::from_millis(5_500), "{:?}", died.elapsed());
    assert!(stage.plane.log().contains("was not heard of"), "{}", stage.plane.log());

    mute.infrar.signal("STOP");
    stage.are_there(&[]).await;
    mute.infrar.signal("CONT");
    stage.are_there(&["mute"]).await;
    stage.is_answered_by("here").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_lost_when_the_control_plane_was_away_for_longer_than_the_lease() {
    let mut stage = Stage::open().await;
    let app = Origin::plain("here").await;
    let callee = stage.callee("one", app.at, None).await;
    stage.are_there(&["one"]).await;
    stage.is_answered_by("here").await;
    stage.plane.kill().await;
    let away = Instant::now();
    // Calls go on meanwhile, well past the lease.
    while away.elapsed() < Duration::from_secs(6) {
        assert_eq!(get(stage.out, "data", "/").await.status(), 200, "{}", stage.caller.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stage.plane = Pair::start_control(&stage.folder, stage.control);
    stage.plane.ready(stage.control).await;
    // From the first answer on and beyond another lease: it is there all the time.
    let back = Instant::now();
    while back.elapsed() < Duration::from_secs(6) {
        let found = stage.endpoints().await.unwrap();
        assert_eq!(found, [("one".to_owned(), EndpointState::Active)], "{}", callee.infrar.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!stage.plane.log().contains("was not heard of"), "{}", stage.plane.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_host_of_another_service_is_refused_and_the_log_says_so_once() {
    let stage = Stage::open().await;
    let app = Origin::plain("here").await;
    let thief = stage.callee("thief", app.at, Some("https://reports.example")).await;
    until("it is refused", async || thief.infrar.log().contains("this endpoint is not registered"))
        .await;
    let line = |log: &str| log.lines().filter(|line| line.contains("is not registered")).count();
    let log = thief.infrar.log();
    assert!(log.contains("409") && log.contains("host-taken"), "{log}");
    // It serves all the same.
    let said = get(thief.admin, &thief.admin.to_string(), "/readyz").await;
    assert_eq!(said.status(), 200);
    assert_eq!(stage.endpoints().await.unwrap(), []);
    assert_eq!(line(&thief.infrar.log()), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_snapshot_that_is_not_what_was_written_is_refused_by_name() {
    use std::os::unix::fs::PermissionsExt;
    let mut stage = Stage::open().await;
    let app = Origin::plain("here").await;
    let _callee = stage.callee("one", app.at, None).await;
    stage.is_answered_by("here").await;
    let kept = || {
        let entries = std::fs::read_dir(stage.folder.path("caller")).unwrap();
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect::<Vec<_>>()
    };
    let holds = |what: &str| {
        kept().iter().any(|path| path.file_name().unwrap().to_string_lossy().starts_with(what))
    };
    until("all is kept", async || holds("snapshot") && holds("tokens")).await;
    for path in kept() {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{} is for its owner alone", path.display());
    }
    stage.plane.kill().await;
    stage.caller.kill().await;
    // Whoever edits it, to send calls elsewhere, finds it refused.
    let snapshot = "caller/snapshot.json";
    let before = stage.folder.read(snapshot);
    assert!(before.contains("127.0.0.1"), "{before}");
    stage.folder.write(snapshot, &before.replace("127.0.0.1", "127.0.0.2"));
    stage.caller = Pair::start_proxy(&stage.folder, "caller");
    until("it is refused", async || stage.caller.log().contains("a kept file is not used")).await;
    let log = stage.caller.log();
    let line = log.lines().find(|line| line.contains("a kept file is not used")).unwrap();
    assert!(line.contains("snapshot.json") && line.contains("damaged"), "{line}");
    until("it answers", async || readyz(stage.caller_admin).await.is_some()).await;
    assert_ne!(readyz(stage.caller_admin).await, Some(200), "{log}");
    // As it was, it serves.
    stage.caller.kill().await;
    stage.folder.write(snapshot, &before);
    stage.caller = Pair::start_proxy(&stage.folder, "caller");
    stage.caller.ready(stage.caller_admin).await;
    stage.is_answered_by("here").await;
    // And it may be too old for whoever says so.
    stage.caller.kill().await;
    let settings = stage.folder.read("caller.yaml");
    stage.folder.write(
        "caller.yaml",
        &settings.replace("state_dir: caller", "state_dir: caller, max_snapshot_age: 1s"),
    );
    // Ages are counted in whole seconds.
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    stage.caller = Pair::start_proxy(&stage.folder, "caller");
    until("it is refused", async || {
        stage.caller.log().contains("older than control.max_snapshot_age allows")
    })
    .await;
}
