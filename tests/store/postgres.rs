//! A database's own disasters: killed, cut off, read-only, full of others, and not who it says.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use infrar::store::{
    CommitError, Location, MigrationLock, News, Settings, Since, Store, StoreError, Write,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use crate::{
    database::{Life, Server, cluster, shared},
    hears_of, open, open_with, put,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_database_killed_under_load_keeps_what_it_acknowledged_and_the_rest_is_told_truly() {
    let Some(folder) = cluster() else { return };
    let mut server = Server::start(folder.path(), Life::OfItsOwn, &[]);
    let location = server.new_database().await;
    let store = open(&location).await;
    let is_over = AtomicBool::new(false);
    let writers = futures_util::future::join_all((0..8).map(|writer| {
        let (store, is_over) = (&store, &is_over);
        async move {
            let mut told: Vec<(String, Result<u64, CommitError>)> = Vec::new();
            for turn in 0_u32.. {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                let key = format!("{writer}/{turn}");
                let expected = *store.revisions().borrow();
                let writes = vec![Write::put(&key, "here")];
                told.push((key, store.commit(expected, writes, String::new()).await));
            }
            told
        }
    }));
    let disasters = async {
        for round in 1..=3_u64 {
            hears_of(&store, round * 40).await;
            let again = tokio::task::spawn_blocking(move || {
                server.kill();
                server.restart(&[]);
                server
            });
            server = again.await.expect("it came back");
        }
        let newest = *store.revisions().borrow();
        hears_of(&store, newest + 40).await;
        is_over.store(true, Ordering::Relaxed);
        server
    };
    let (told, _server) = tokio::join!(writers, disasters);

    let state = store.load().await.expect("a state");
    let there: BTreeMap<_, _> =
        state.entries.iter().map(|entry| (entry.key.as_str(), entry.revision)).collect();
    let mut unknown = 0;
    for (key, outcome) in told.iter().flatten() {
        match outcome {
            Ok(revision) => assert_eq!(there.get(key.as_str()), Some(revision), "{key} is lost"),
            Err(CommitError::Store(StoreError::Unknown { .. })) => unknown += 1,
            Err(error) => assert_eq!(there.get(key.as_str()), None, "{key} is there: {error:?}"),
        }
    }
    let failed =
        told.iter().flatten().filter(|(_, told)| matches!(told, Err(CommitError::Store(_))));
    eprintln!("{} revisions, {} failures, {unknown} unknown", state.revision, failed.count());
    // Each revision once, and each made by somebody.
    let since = store.since(0).await.expect("an answer");
    let Since::Commits { commits, .. } = since else { panic!("{since:?}") };
    assert!(commits.iter().zip(1..).all(|(commit, revision)| commit.revision == revision));
    assert_eq!(there.len() as u64, state.revision);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_commit_is_looked_up() {
    let Some(server) = shared() else { return };
    let name = server.new_database_name().await;
    let line = Line::to(server.port).await;
    let location = line.url(&name).parse().expect("a URL");
    let store = open(&location).await;
    put(&store, "a", "1").await;

    // The database made it, and its answer was lost.
    line.break_at_commit(Cut::AfterIt);
    let made = store.commit(1, vec![Write::put("a", "2")], String::new()).await;
    assert_eq!(made.expect("it was made"), 2);
    // It never heard of it.
    line.break_at_commit(Cut::BeforeIt);
    let lost = store.commit(2, vec![Write::put("a", "3")], String::new()).await;
    let Err(CommitError::Store(error @ StoreError::Unreachable { .. })) = lost else {
        panic!("{lost:?}")
    };
    assert!(error.is_temporary());
    let state = store.load().await.expect("a state");
    assert_eq!((state.revision, state.entries[0].value.as_str()), (2, "2"));
    assert_eq!(put(&store, "a", "4").await, 3);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_are_called_when_the_other_commits() {
    let Some(server) = shared() else { return };
    let location = server.new_database().await;
    let (one, other) = (open(&location).await, open(&location).await);
    assert_eq!(one.id(), other.id());
    // The first may come before anybody listens; then it is asked for.
    let first = put(&one, "a", "1").await;
    hears_of(&other, first).await;
    let mut shortest = Duration::MAX;
    for _ in 0..20 {
        let revision = put(&one, "a", "2").await;
        let committed = Instant::now();
        hears_of(&other, revision).await;
        shortest = shortest.min(committed.elapsed());
        assert_eq!(other.load().await.expect("a state").revision, revision);
    }
    assert!(shortest < Duration::from_millis(100), "{shortest:?}");
    one.close().await;
    other.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_see_each_other_when_nobody_calls() {
    let Some(server) = shared() else { return };
    let location = server.new_database().await;
    let one = open(&location).await;
    let asked = Settings { news: News::Asked, ..Settings::default() };
    let other = open_with(&location, asked).await.expect("a store");
    for _ in 0..2 {
        let revision = put(&one, "a", "1").await;
        hears_of(&other, revision).await;
    }
    // Each decides by what is there, not by what he heard.
    let refused = other.commit(0, Vec::new(), String::new()).await;
    assert!(matches!(refused, Err(CommitError::Conflict { revision: 2 })), "{refused:?}");
    one.close().await;
    other.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_at_a_time_makes_the_tables() {
    let Some(server) = shared() else { return };
    for migration_lock in [MigrationLock::Advisory, MigrationLock::Row] {
        let location = server.new_database().await;
        let settings = Settings { migration_lock, ..Settings::default() };
        let opening = (0..6).map(|_| open_with(&location, settings.clone()));
        let stores: Vec<Store> = futures_util::future::join_all(opening)
            .await
            .into_iter()
            .map(|store| store.expect("a store"))
            .collect();
        assert!(stores.iter().all(|store| store.id() == stores[0].id()));
        put(&stores[0], "a", "b").await;
        for store in stores {
            store.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_stores_share_a_database_by_schema() {
    let Some(server) = shared() else { return };
    let name = server.new_database_name().await;
    server.sql(&name, "CREATE SCHEMA theirs").await;
    let ours: Location = server.url(&name).parse().expect("a URL");
    let theirs = format!("{}?options=-c%20search_path%3Dtheirs", server.url(&name));
    let theirs: Location = theirs.parse().expect("a URL");
    let (ours, theirs) = (open(&ours).await, open(&theirs).await);
    assert_ne!(ours.id(), theirs.id());
    put(&ours, "a", "1").await;
    assert_eq!(theirs.load().await.expect("a state").revision, 0);
    server.sql(&name, "SELECT 1 FROM infrar.infrar_head, theirs.infrar_head").await;
    ours.close().await;
    theirs.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_and_the_server_must_prove_who_it_is() {
    let Some(folder) = cluster() else { return };
    let authority = |name: &str| {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA")
    };
    let (ours, strangers) = (authority("ours"), authority("a stranger's"));
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    let cert = params.signed_by(&key, &ours).expect("a certificate");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("ours");
        // Whoever the folder belongs to runs the server.
        let owner =
            std::os::unix::fs::MetadataExt::uid(&fs::metadata(folder.path()).expect("ours"));
        chown(&path, Some(owner), None).expect("root may, and others change nothing");
        path.display().to_string()
    };
    let (cert, key) = (write("cert.pem", &cert.pem()), write("key.pem", &key.serialize_pem()));
    let (ours, strangers) = (write("ca.pem", &ours.pem()), write("other.pem", &strangers.pem()));
    let (cert, key) = (format!("ssl_cert_file={cert}"), format!("ssl_key_file={key}"));
    let options = ["-c", "ssl=on", "-c", &cert, "-c", &key];
    let server = Server::start(folder.path(), Life::OfItsOwn, &options);
    // Only what is encrypted gets in.
    fs::write(folder.path().join("data/pg_hba.conf"), "hostssl all all 127.0.0.1/32 trust\n")
        .expect("a file");
    server.sql("postgres", "CREATE DATABASE shop").await;
    server.sql("postgres", "SELECT pg_reload_conf()").await;

    let location = |host: &str, tls: &str| -> Location {
        let url = format!("postgres://infrar@{host}:{}/shop?{tls}", server.port);
        url.parse().expect("a URL")
    };
    let verified = format!("sslmode=verify-full&sslrootcert={ours}");
    let store = open(&location("localhost", &verified)).await;
    put(&store, "a", "b").await;
    store.close().await;
    open(&location("127.0.0.1", "sslmode=require")).await.close().await;
    let stranger = format!("sslmode=verify-full&sslrootcert={strangers}");
    for (host, tls) in [
        // Another authority; another name than we called; nothing encrypted.
        ("localhost", stranger.as_str()),
        ("127.0.0.1", &verified),
        ("localhost", "sslmode=disable"),
    ] {
        let opened = open_with(&location(host, tls), Settings::default()).await;
        assert!(matches!(opened, Err(StoreError::Refused { .. })), "{host} {tls}: {opened:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_of_a_database_has_its_own_answer() {
    let Some(server) = shared() else { return };
    let opened = async |url: &str| {
        let location: Location = url.parse().expect("a URL");
        let opened = open_with(&location, Settings::default()).await;
        let error = opened.expect_err("refused");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
        error
    };
    let port = server.port;
    let error = opened(&format!("postgres://infrar:s3cret@127.0.0.1:{port}/nowhere")).await;
    assert!(matches!(error, StoreError::Refused { .. }) && !error.is_temporary(), "{error:?}");
    let error = opened(&format!("postgres://nobody:s3cret@127.0.0.1:{port}/postgres")).await;
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let nobody = listener.local_addr().expect("an address").port();
    drop(listener);
    let error = opened(&format!("postgres://infrar:s3cret@127.0.0.1:{nobody}/postgres")).await;
    assert!(matches!(error, StoreError::Unreachable { .. }) && error.is_temporary(), "{error:?}");

    let name = server.new_database_name().await;
    let location: Location = server.url(&name).parse().expect("a URL");
    let store = open(&location).await;
    put(&store, "a", "b").await;
    server.sql(&name, "INSERT INTO infrar.infrar_schema (version) VALUES (99)").await;
    let error = opened(&server.url(&name)).await;
    assert!(matches!(error, StoreError::Newer { found: 99, .. }), "{error:?}");

    // A standby, or a primary that has become one. Whoever was connected is thrown out.
    let read_only = format!(
        "ALTER DATABASE {name} SET default_transaction_read_only = on; \
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    );
    server.sql("postgres", &read_only).await;
    assert_eq!(store.load().await.expect("reading goes on").revision, 1);
    let refused = store.commit(1, Vec::new(), String::new()).await;
    assert!(matches!(refused, Err(CommitError::Store(StoreError::ReadOnly { .. }))), "{refused:?}");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_does_not_answer_is_slow_and_loses_nothing() {
    let Some(server) = shared() else { return };
    let name = server.new_database_name().await;
    let store = open(&server.url(&name).parse().expect("a URL")).await;
    put(&store, "a", "b").await;
    // Somebody holds the head, longer than anybody may wait.
    let (client, connection) =
        tokio_postgres::connect(&server.url(&name), tokio_postgres::NoTls).await.expect("a line");
    let holding = async {
        client.batch_execute("BEGIN; LOCK TABLE infrar.infrar_head").await.expect("locked");
        let begun = Instant::now();
        let refused = store.commit(1, Vec::new(), String::new()).await;
        assert!(matches!(refused, Err(CommitError::Store(StoreError::Slow { .. }))), "{refused:?}");
        assert!(begun.elapsed() < infrar::store::DEADLINE * 2, "{:?}", begun.elapsed());
        client.batch_execute("ROLLBACK").await.expect("let go");
    };
    tokio::select! {
        () = holding => {}
        ended = connection => panic!("{ended:?}"),
    }
    assert_eq!(put(&store, "a", "c").await, 2);
    store.close().await;
}

/// A line to the server that breaks where it is told to.
struct Line {
    port: u16,
    cut: Arc<AtomicU8>,
}

/// Where a line breaks.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Cut {
    BeforeIt = 1,
    AfterIt = 2,
}

impl Line {
    async fn to(server: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let cut = Arc::new(AtomicU8::new(0));
        let told = Arc::clone(&cut);
        #[expect(clippy::disallowed_methods, reason = "the line ends with its test")]
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", server)).await.expect("a server");
                tokio::spawn(carry(client, server, Arc::clone(&told)));
            }
        });
        Self { port, cut }
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://infrar@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    /// Once.
    fn break_at_commit(&self, cut: Cut) {
        self.cut.store(cut as u8, Ordering::Relaxed);
    }
}

async fn carry(client: TcpStream, server: TcpStream, told: Arc<AtomicU8>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let there = async {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = from_client.read(&mut buffer).await.unwrap_or(0);
            let bytes = &buffer[..read];
            let is_commit = bytes.windows(7).any(|window| window == b"COMMIT\0");
            let cut = if is_commit { told.swap(0, Ordering::Relaxed) } else { 0 };
            if read == 0 || cut == Cut::BeforeIt as u8 {
                return;
            }
            to_server.write_all(bytes).await.expect("a server");
            if cut == Cut::AfterIt as u8 {
                // Both ends of the line go, so its answer reaches nobody.
                return;
            }
        }
    };
    tokio::select! {
        () = there => {}
        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
    }
}
