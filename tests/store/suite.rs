//! What holds of a store, whichever engine it is. Each story is told to an empty place.

use std::time::Duration;

use infrar::store::{CommitError, Location, Settings, Sighting, Since, Store, StoreError, Write};
use tempfile::TempDir;
use uuid::Uuid;

use crate::{open, open_with, put, replay};

/// Tells every story to SQLite and to PostgreSQL.
macro_rules! on_both {
    ($($story:ident),+ $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $story() {
                let folder = tempfile::tempdir().expect("a folder");
                let location = crate::sqlite::file_in(&folder);
                super::$story(&location).await;
            })+
        }
        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $story() {
                let Some(server) = crate::database::shared() else { return };
                let location = server.new_database().await;
                super::$story(&location).await;
            })+
        }
    };
}

on_both!(
    a_commit_on_an_old_revision_changes_nothing,
    of_several_changes_of_one_key_the_last_counts,
    replaying_what_came_since_gives_the_next_state,
    what_is_too_long_ago_is_forgotten,
    many_commits_come_in_pages,
    leases_lapse_by_themselves_and_no_revision_tells,
    who_was_seen_is_known_for_a_while,
    any_text_comes_back_as_it_was,
    sixteen_writers_lose_nothing_and_leave_no_gap,
    a_store_that_is_opened_again_is_the_same,
    a_backup_restores_everything_and_a_later_revision,
    a_backup_under_load_is_one_moment,
    a_closed_store_says_so,
);

async fn a_commit_on_an_old_revision_changes_nothing(location: &Location) {
    let store = open(location).await;
    assert_eq!(store.load().await.expect("a state").revision, 0);
    let writes = |value: &str| vec![Write::put("a", value), Write::put(value, value)];
    assert_eq!(store.commit(0, writes("1"), "first".to_owned()).await.expect("made"), 1);
    assert_eq!(*store.revisions().borrow(), 1);
    let before = store.load().await.expect("a state");
    for expected in [0, 2, u64::MAX] {
        let refused = store.commit(expected, writes("2"), "second".to_owned()).await;
        assert!(matches!(refused, Err(CommitError::Conflict { revision: 1 })), "{refused:?}");
    }
    assert_eq!(store.load().await.expect("a state"), before);
    store.close().await;
}

async fn of_several_changes_of_one_key_the_last_counts(location: &Location) {
    let store = open(location).await;
    let writes = vec![
        Write::put("a", "1"),
        Write::put("b", "1"),
        Write::put("a", "2"),
        Write::remove("b"),
        Write::remove("never there"),
    ];
    store.commit(0, writes, String::new()).await.expect("made");
    let state = store.load().await.expect("a state");
    let entries: Vec<_> =
        state.entries.iter().map(|entry| (entry.key.as_str(), entry.value.as_str())).collect();
    assert_eq!(entries, [("a", "2")]);
    // Nothing at all is a commit too.
    assert_eq!(store.commit(1, Vec::new(), "why not".to_owned()).await.expect("made"), 2);
    store.close().await;
}

async fn replaying_what_came_since_gives_the_next_state(location: &Location) {
    let store = open(location).await;
    for seed in 0..8 {
        let mut random = fastrand::Rng::with_seed(seed);
        let before = store.load().await.expect("a state");
        for revision in before.revision..before.revision + random.u64(1..8) {
            let writes = (0..random.usize(0..6)).map(|_| {
                let key = format!("key/{}", random.u8(0..9));
                let value = random.u32(..).to_string();
                if random.bool() { Write::put(key, value) } else { Write::remove(key) }
            });
            let writes = writes.collect();
            store.commit(revision, writes, format!("seed {seed}")).await.expect("made");
        }
        let after = store.load().await.expect("a state");
        let since = store.since(before.revision).await.expect("an answer");
        let Since::Commits { commits, more: false } = since else { panic!("{since:?}") };
        assert!(commits.iter().all(|commit| commit.note == format!("seed {seed}")));
        assert_eq!(replay(before, commits), after);
    }
    store.close().await;
}

async fn what_is_too_long_ago_is_forgotten(location: &Location) {
    let settings = Settings { kept_commits: 5, ..Settings::default() };
    let store = open_with(location, settings).await.expect("a store");
    for revision in 0..12 {
        store.commit(revision, vec![Write::put("a", "b")], String::new()).await.expect("made");
    }
    let kept = |since| match since {
        Ok(Since::Commits { commits, .. }) => commits.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!(kept(store.since(7).await), 5);
    assert_eq!(kept(store.since(12).await), 0);
    // What is too long ago, and what never was.
    for revision in [0, 6, 13] {
        let since = store.since(revision).await.expect("an answer");
        assert_eq!(since, Since::Forgotten { oldest: 7 });
    }
    store.close().await;
}

async fn many_commits_come_in_pages(location: &Location) {
    let store = open(location).await;
    for revision in 0..1_003 {
        store.commit(revision, Vec::new(), String::new()).await.expect("made");
    }
    let since = store.since(1).await.expect("an answer");
    let Since::Commits { commits, more: true } = since else { panic!("{since:?}") };
    assert_eq!((commits.len(), commits[999].revision), (1_000, 1_001));
    let since = store.since(1_001).await.expect("an answer");
    let Since::Commits { commits, more: false } = since else { panic!("{since:?}") };
    assert_eq!(commits.len(), 2);
    store.close().await;
}

async fn leases_lapse_by_themselves_and_no_revision_tells(location: &Location) {
    let store = open(location).await;
    let hour = Duration::from_hours(1);
    let lease = |key: &str, lasts| (key.to_owned(), lasts);
    let short = Duration::from_millis(1);
    store
        .renew(vec![lease("long", hour), lease("short", hour), lease("short", short)])
        .await
        .expect("renewed");
    // By the store's own clock, which cannot be turned from here.
    let begun = tokio::time::Instant::now();
    while store.lapsed().await.expect("an answer") != ["short"] {
        assert!(begun.elapsed() < crate::PATIENCE, "it never lapsed");
    }
    let left = store.leases().await.expect("an answer");
    assert!(matches!(&left[..], [(_, long), (_, Duration::ZERO)] if *long <= hour), "{left:?}");
    assert!(left[0].1 > hour - crate::PATIENCE);
    // Renewed in time it goes on; forgotten it is no lease at all.
    store.renew(vec![lease("short", hour)]).await.expect("renewed");
    assert!(store.lapsed().await.expect("an answer").is_empty());
    store.forget(vec!["long".to_owned(), "unknown".to_owned()]).await.expect("forgotten");
    let left = store.leases().await.expect("an answer");
    assert_eq!(left.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["short"]);
    // Longer than any clock goes is as long as it goes.
    store.renew(vec![lease("for ever", Duration::MAX)]).await.expect("renewed");
    assert_eq!(store.lapsed().await.expect("an answer"), [""; 0]);
    assert_eq!(store.load().await.expect("a state").revision, 0);
    store.close().await;
}

async fn who_was_seen_is_known_for_a_while(location: &Location) {
    let store = open(location).await;
    let (minute, hour) = (Duration::from_mins(1), Duration::from_hours(1));
    let seen = |id: u128, text: &str, age| Sighting {
        id: Uuid::from_u128(id),
        text: text.to_owned(),
        age,
    };
    store
        .sight(vec![
            seen(1, "new", Duration::ZERO),
            seen(2, "old", 2 * hour),
            seen(3, "x", 48 * hour),
        ])
        .await
        .expect("noted");
    let texts = async |within| {
        let seen = store.sightings(within).await.expect("an answer");
        assert!(seen.iter().all(|seen| seen.age <= within));
        seen.into_iter().map(|seen| seen.text).collect::<Vec<_>>()
    };
    assert_eq!(texts(hour).await, ["new"]);
    assert_eq!(texts(Duration::MAX).await, ["new", "old"]);
    // Seen later it is newer; somebody who saw him earlier does not make him older.
    store.sight(vec![seen(2, "newer", minute), seen(1, "older", hour)]).await.expect("noted");
    assert_eq!(texts(2 * minute).await, ["new", "newer"]);
    assert_eq!(store.load().await.expect("a state").revision, 0);
    store.close().await;
}

async fn any_text_comes_back_as_it_was(location: &Location) {
    let store = open(location).await;
    let long = "x".repeat(300_000);
    let texts = ["", "\0", "a\0b", "'; DROP TABLE head; --", "\u{10ffff}ü\\x41\"\n\r", &long];
    let key = |text: &str| format!("k{}", text.get(..1_000).unwrap_or(text));
    let writes = texts.iter().map(|text| Write::put(key(text), *text)).collect();
    store.commit(0, writes, "\0\u{1}".to_owned()).await.expect("made");
    let mut entries = store.load().await.expect("a state").entries;
    let sorted = entries.windows(2).all(|pair| pair[0].key < pair[1].key);
    assert!(sorted, "by the bytes of the keys");
    entries.sort_by_key(|entry| texts.iter().position(|text| *text == entry.value));
    assert_eq!(entries.len(), texts.len());
    for (entry, text) in entries.iter().zip(texts) {
        assert!(entry.key == key(text) && entry.value == text);
    }
    let since = store.since(0).await.expect("an answer");
    let Since::Commits { commits, .. } = since else { panic!("{since:?}") };
    assert_eq!(commits[0].note, "\0\u{1}");
    assert_eq!(commits[0].writes.len(), texts.len());
    // But for keys, which an index must hold.
    let refused = store.commit(1, vec![Write::put(&long, "")], String::new()).await;
    assert!(
        matches!(refused, Err(CommitError::Store(StoreError::LongKey { bytes: 300_000 }))),
        "{refused:?}"
    );
    let refused = store.renew(vec![(long, Duration::ZERO)]).await;
    assert!(matches!(refused, Err(StoreError::LongKey { .. })), "{refused:?}");
    store.close().await;
}

async fn sixteen_writers_lose_nothing_and_leave_no_gap(location: &Location) {
    const EACH: usize = 8;
    let store = open(location).await;
    let writers = (0..16).map(|writer| {
        let store = store.clone();
        async move {
            for turn in 0..EACH {
                let key = format!("{writer}/{turn}");
                let mut expected = *store.revisions().borrow();
                loop {
                    let writes = vec![Write::put(&key, "here"), Write::put("last", &key)];
                    match store.commit(expected, writes, key.clone()).await {
                        Ok(_) => break,
                        Err(CommitError::Conflict { revision }) => expected = revision,
                        Err(error) => panic!("{error:?}"),
                    }
                }
            }
        }
    });
    futures_util::future::join_all(writers).await;
    let state = store.load().await.expect("a state");
    assert_eq!((state.revision, state.entries.len()), (16 * 8, 16 * EACH + 1));
    let since = store.since(0).await.expect("an answer");
    let Since::Commits { commits, more: false } = since else { panic!("{since:?}") };
    let empty = infrar::store::State { revision: 0, entries: Vec::new() };
    assert_eq!(replay(empty, commits), state);
    store.close().await;
}

async fn a_store_that_is_opened_again_is_the_same(location: &Location) {
    let store = open(location).await;
    let id = store.id();
    put(&store, "a", "1").await;
    let before = store.load().await.expect("a state");
    store.close().await;
    let store = open(location).await;
    assert_eq!((store.id(), *store.revisions().borrow()), (id, 1));
    assert_eq!(store.load().await.expect("a state"), before);
    store.close().await;
}

async fn a_backup_restores_everything_and_a_later_revision(location: &Location) {
    let folder = tempfile::tempdir().expect("a folder");
    let backup = folder.path().join("backup.db");
    let store = open(location).await;
    for at in 0..20 {
        put(&store, &format!("key/{at}"), "a\0value").await;
    }
    store.renew(vec![("lease".to_owned(), Duration::from_hours(1))]).await.expect("renewed");
    let seen = Sighting { id: Uuid::from_u128(7), text: "seen".into(), age: Duration::ZERO };
    store.sight(vec![seen]).await.expect("noted");
    let before = store.load().await.expect("a state");
    store.backup(&backup).await.expect("a backup");
    let again = store.backup(&backup).await;
    assert!(matches!(again, Err(StoreError::Exists { .. })), "{again:?}");

    // Another process may copy it meanwhile.
    let second = folder.path().join("store.db.copy");
    Store::copy(location, &second).await.expect("a backup");
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(&second).expect("it is there").permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);

    // Not over what is there, but into what is empty, whichever engine it is.
    let refused = match location {
        // A file has one owner.
        Location::Sqlite(_) => {
            store.clone().close().await;
            Store::restore(location, &backup).await
        }
        Location::Postgres(_) => Store::restore(location, &backup).await,
    };
    assert!(matches!(refused, Err(StoreError::NotEmpty { .. })), "{refused:?}");
    let mut places = vec![crate::sqlite::file_in(&folder)];
    if let Some(server) = crate::database::shared() {
        places.push(server.new_database().await);
    }
    for place in places {
        Store::restore(&place, &backup).await.expect("restored");
        let restored = open(&place).await;
        let state = restored.load().await.expect("a state");
        assert_eq!(restored.id(), store.id());
        assert_eq!(state.revision, before.revision + 1_000_000);
        assert_eq!(state.entries, before.entries);
        assert_eq!(restored.leases().await.expect("an answer")[0].0, "lease");
        assert_eq!(restored.sightings(Duration::MAX).await.expect("an answer")[0].text, "seen");
        // Nobody can catch up from the time before, and life goes on.
        let oldest = state.revision;
        let since = restored.since(before.revision).await.expect("an answer");
        assert_eq!(since, Since::Forgotten { oldest });
        let next = put(&restored, "key/0", "new").await;
        assert_eq!(next, oldest + 1);
        restored.close().await;
    }
    leaves_nothing_beside(&folder);
    store.close().await;
}

async fn a_backup_under_load_is_one_moment(location: &Location) {
    let folder = tempfile::tempdir().expect("a folder");
    let backup = folder.path().join("backup.db");
    let store = open(location).await;
    let filled: Vec<_> =
        (0..64).map(|at| Write::put(format!("{at}"), "x".repeat(40_000))).collect();
    store.commit(0, filled, String::new()).await.expect("made");
    let writing = async {
        for revision in 1.. {
            let writes = vec![
                Write::put("one", revision.to_string()),
                Write::put("two", revision.to_string()),
            ];
            store.commit(revision, writes, String::new()).await.expect("made");
        }
    };
    // The writer never rests; the backup ends all the same.
    tokio::select! {
        () = writing => {}
        done = store.backup(&backup) => done.expect("a backup"),
    }
    let place = crate::sqlite::file_in(&folder);
    Store::restore(&place, &backup).await.expect("restored");
    let restored = open(&place).await;
    let state = restored.load().await.expect("a state");
    let value = |key: &str| {
        let entry = state.entries.iter().find(|entry| entry.key == key);
        entry.map(|entry| (entry.value.as_str(), entry.revision))
    };
    assert_eq!(value("one"), value("two"));
    let newest = state.entries.iter().map(|entry| entry.revision).max();
    assert_eq!(newest.map(|newest| newest + 1_000_000), Some(state.revision));
    restored.close().await;
    store.close().await;
}

/// A backup is one file.
fn leaves_nothing_beside(folder: &TempDir) {
    let names: Vec<_> = std::fs::read_dir(folder.path())
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name())
        .filter(|name| !name.to_string_lossy().starts_with("store.db"))
        .collect();
    assert_eq!(names, ["backup.db"]);
}

async fn a_closed_store_says_so(location: &Location) {
    let store = open(location).await;
    store.clone().close().await;
    let loaded = store.load().await;
    assert!(matches!(loaded, Err(StoreError::Closed { .. })), "{loaded:?}");
    let made = store.commit(0, Vec::new(), String::new()).await;
    assert!(matches!(made, Err(CommitError::Store(StoreError::Closed { .. }))), "{made:?}");
}
