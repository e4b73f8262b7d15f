//! A file's own disasters: a second process, a crash, a full disk, damage, and a version from the future.

use std::{
    fs,
    io::{BufRead, BufReader, Write as _},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use infrar::{
    runtime::Clock,
    store::{CommitError, Location, Settings, Store, StoreError, Write},
};
use tempfile::TempDir;

use crate::{open, open_with, put};

/// Names the file to the process that is to be killed.
const VICTIM: &str = "INFRAR_STORE_OF_THE_VICTIM";

pub(crate) fn file_in(folder: &TempDir) -> Location {
    Location::Sqlite(path_in(folder))
}

fn path_in(folder: &TempDir) -> PathBuf {
    folder.path().join("store.db")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_belongs_to_one_process_and_to_one_user() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("new/folder/store.db");
    let location = Location::Sqlite(path.clone());
    let store = open(&location).await;
    put(&store, "a", "b").await;
    let second = open_with(&location, Settings::default()).await;
    assert!(matches!(second, Err(StoreError::InUse { .. })), "{second:?}");
    let restored = Store::restore(&location, &path).await;
    assert!(matches!(restored, Err(StoreError::InUse { .. })), "{restored:?}");
    let mode = |path: &std::path::Path| {
        fs::metadata(path).expect("it is there").permissions().mode() & 0o777
    };
    assert_eq!(mode(path.parent().expect("a folder")), 0o700);
    let files: Vec<_> = fs::read_dir(path.parent().expect("a folder"))
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert_eq!(files.len(), 4, "the store, its journal, its index and its lock: {files:?}");
    assert!(files.iter().all(|file| mode(file) == 0o600), "{files:?}");
    store.close().await;
    open(&location).await.close().await;
}

#[tokio::test(start_paused = true)]
async fn leases_follow_the_clock_that_the_store_was_given() {
    let folder = tempfile::tempdir().expect("a folder");
    let clock = Clock::starting_at("2026-11-24T09:00:00Z".parse().expect("a moment"));
    let settings = Settings { clock, ..Settings::default() };
    let store = open_with(&file_in(&folder), settings).await.expect("a store");
    let lasts = Duration::from_secs(30);
    store.renew(vec![("a".to_owned(), lasts)]).await.expect("renewed");
    tokio::time::advance(lasts - Duration::from_millis(1)).await;
    assert!(store.lapsed().await.expect("an answer").is_empty());
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(store.lapsed().await.expect("an answer"), ["a"]);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_in_the_middle_of_a_write_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().expect("a folder");
    for round in 1..=3_u64 {
        let mut victim = Command::new(std::env::current_exe().expect("ourselves"))
            .args(["--exact", "sqlite::writes_until_it_is_killed", "--nocapture"])
            .env(VICTIM, path_in(&folder))
            .stdout(Stdio::piped())
            .spawn()
            .expect("ourselves again");
        let output = victim.stdout.take().expect("a pipe");
        let mut lines = BufReader::new(output).lines().map_while(Result::ok);
        let acknowledged = |line: String| line.strip_prefix("made ")?.parse::<u64>().ok();
        let mut last = lines.by_ref().filter_map(acknowledged).nth(30).expect("acknowledged");
        victim.kill().expect("SIGKILL");
        victim.wait().expect("its end");
        // What it still said before it died.
        last = lines.filter_map(acknowledged).last().unwrap_or(last);

        let store = open(&file_in(&folder)).await;
        let state = store.load().await.expect("a state");
        assert!(state.revision >= last, "{} of {last}", state.revision);
        for entry in &state.entries {
            assert_eq!(entry.value, format!("{}{}", entry.key, "x".repeat(5_000)));
        }
        assert_eq!(state.entries.len() as u64, state.revision, "each revision has made one");
        assert!(last > round * 30);
        store.close().await;
    }
}

/// Not a story of its own: the process that the story above kills.
#[tokio::test(flavor = "multi_thread")]
async fn writes_until_it_is_killed() {
    let Some(path) = std::env::var_os(VICTIM) else { return };
    let store = open(&Location::Sqlite(path.into())).await;
    let mut revision = *store.revisions().borrow();
    loop {
        let key = (revision + 1).to_string();
        let value = format!("{key}{}", "x".repeat(5_000));
        let made = store.commit(revision, vec![Write::put(key, value)], String::new()).await;
        revision = made.expect("nobody else is here");
        let mut output = std::io::stdout();
        writeln!(output, "made {revision}").and_then(|()| output.flush()).expect("a reader");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_says_so_and_goes_on_once_there_is_room() {
    let folder = tempfile::tempdir().expect("a folder");
    let settings = Settings { size_limit: Some(1024 * 1024), ..Settings::default() };
    let store = open_with(&file_in(&folder), settings).await.expect("a store");
    let mut revision = 0;
    let refusal = loop {
        let writes = vec![Write::put(revision.to_string(), "x".repeat(40_000))];
        match store.commit(revision, writes, String::new()).await {
            Ok(made) => revision = made,
            Err(error) => break error,
        }
        assert!(revision < 100, "it never was full");
    };
    let CommitError::Store(error @ StoreError::Full { .. }) = refusal else {
        panic!("{refusal:?}")
    };
    assert!(error.is_temporary());
    let state = store.load().await.expect("reading needs no room");
    assert_eq!((state.revision, state.entries.len() as u64), (revision, revision));
    store.commit(revision, vec![Write::remove("0")], String::new()).await.expect("room");
    store.commit(revision + 1, vec![Write::put("a", "b")], String::new()).await.expect("room");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_says_so_and_goes_on_once_there_is_room() {
    let folder = tempfile::tempdir().expect("a folder");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(folder.path())
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: only root may make a small disk");
        return;
    }
    let disk = Mounted(folder);
    let store = open(&file_in(&disk.0)).await;
    put(&store, "a", "b").await;
    let filler = disk.0.path().join("filler");
    // Until nothing is left.
    drop(fs::write(&filler, vec![0; 2 * 1024 * 1024]));
    let mut revision = 1;
    let refusal = loop {
        let writes = vec![Write::put(revision.to_string(), "x".repeat(4_000))];
        match store.commit(revision, writes, String::new()).await {
            Ok(made) => revision = made,
            Err(error) => break error,
        }
        assert!(revision < 1_000, "it never was full");
    };
    assert!(matches!(refusal, CommitError::Store(StoreError::Full { .. })), "{refusal:?}");
    assert_eq!(store.load().await.expect("reading needs no room").revision, revision);
    fs::remove_file(filler).expect("a file of ours");
    assert_eq!(put(&store, "a", "c").await, revision + 1);
    store.close().await;
}

struct Mounted(TempDir);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a failed story may still have files open.
        drop(Command::new("umount").arg("--lazy").arg(self.0.path()).status());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_a_newer_version_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    open(&file_in(&folder)).await.close().await;
    let file = rusqlite::Connection::open(path_in(&folder)).expect("a database");
    file.pragma_update(None, "user_version", 99).expect("written");
    drop(file);
    let before = fs::read(path_in(&folder)).expect("a file");
    let opened = open_with(&file_in(&folder), Settings::default()).await;
    assert!(matches!(opened, Err(StoreError::Newer { found: 99, .. })), "{opened:?}");
    assert!(opened.is_err_and(|error| error.to_string().contains("run the newer version")));
    assert!(fs::read(path_in(&folder)).expect("a file") == before);
    // As a backup too.
    let elsewhere = Location::Sqlite(folder.path().join("elsewhere.db"));
    let restored = Store::restore(&elsewhere, &path_in(&folder)).await;
    assert!(matches!(restored, Err(StoreError::Newer { found: 99, .. })), "{restored:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_store_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = open(&file_in(&folder)).await;
    for at in 0..50 {
        put(&store, &format!("key/{at}"), &"x".repeat(1_000)).await;
    }
    store.close().await;
    let whole = fs::read(path_in(&folder)).expect("a file");
    let refused = async |bytes: &[u8]| {
        fs::write(path_in(&folder), bytes).expect("a file");
        let reason = |refusal| {
            let StoreError::Damaged { reason, .. } = refusal else { panic!("{refusal:?}") };
            reason
        };
        let opened = open_with(&file_in(&folder), Settings::default()).await;
        let elsewhere = Location::Sqlite(folder.path().join("elsewhere.db"));
        let restored = Store::restore(&elsewhere, &path_in(&folder)).await;
        reason(restored.expect_err("damaged"));
        reason(opened.expect_err("damaged"))
    };
    let reason = refused(&b"something else entirely ".repeat(100)).await;
    assert!(reason.contains("not a database"), "{reason}");
    let mut torn = whole.clone();
    torn[4096..].chunks_mut(4096).for_each(|page| page[..64].fill(0xff));
    let reason = refused(&torn).await;
    assert!(!reason.is_empty());
    let other = folder.path().join("other.db");
    let file = rusqlite::Connection::open(&other).expect("a database");
    file.execute_batch("CREATE TABLE theirs (a)").expect("a table");
    drop(file);
    let reason = refused(&fs::read(other).expect("a file")).await;
    assert!(reason.contains("something else"), "{reason}");
}
