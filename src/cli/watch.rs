//! Tells when the content of a file, or of one that it refers to, has changed, however it was put there: written, renamed
//! over, or swapped by a symbolic link as Kubernetes does. So folders are watched, and contents compared.
//!
//! Events are quick and not certain: some file systems give none. So now and then there is a look without one.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode};
use notify_debouncer_full::{DebounceEventResult, Debouncer, RecommendedCache, new_debouncer};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use crate::runtime::sha256;

/// Editors write a file in several steps; a change counts when they are done.
const SETTLE: Duration = Duration::from_millis(200);
/// How long a change may stay unnoticed where nothing tells of it.
const LOOK: Duration = Duration::from_secs(10);

/// A file whose content is watched until this is dropped, with those it refers to.
pub(crate) struct WatchedFile {
    /// The file itself comes first.
    files: Vec<Seen>,
    folders: BTreeSet<PathBuf>,
    /// When to try again what failed, whether anything was seen to change or not.
    again: Option<Instant>,
    events: mpsc::Receiver<()>,
    debouncer: Debouncer<RecommendedWatcher, RecommendedCache>,
}

/// A file, and the SHA-256 of what it said when it was last looked at; `None` while it could not be read. Some files are
/// secrets, so no content is held.
struct Seen {
    path: PathBuf,
    mark: Option<[u8; 32]>,
}

impl Seen {
    fn now(path: PathBuf) -> Self {
        let mark = std::fs::read(&path).ok().map(|content| sha256(&content));
        Self { path, mark }
    }
}

impl WatchedFile {
    /// Watches `path`; what it says now is no change.
    ///
    /// # Errors
    /// What the system says when it does not let the folder be watched.
    pub(crate) fn new(path: &Path) -> notify::Result<Self> {
        let path = std::path::absolute(path).map_err(notify::Error::io)?;
        // One place: a second event while the first is not looked at yet says nothing new.
        let (sender, events) = mpsc::channel(1);
        let mut debouncer = new_debouncer(SETTLE, None, move |seen: DebounceEventResult| {
            // Our own reading is an event too.
            let changes =
                seen.map_or(true, |events| events.iter().any(|event| !event.kind.is_access()));
            if changes {
                let _already_told = sender.try_send(());
            }
        })?;
        let folder = folder(&path);
        debouncer.watch(&folder, RecursiveMode::NonRecursive)?;
        let (files, folders) = (vec![Seen::now(path)], [folder].into());
        Ok(Self { files, folders, again: None, events, debouncer })
    }

    /// What the file says did not come into force. Whatever mends that may stand in one of these files as well, and may
    /// be no file at all, such as room on a disk: so it ends [`changed`](Self::changed) at the next look too.
    pub(crate) fn failed(&mut self, files: impl IntoIterator<Item = PathBuf>) {
        let referred = self.files.iter().skip(1).map(|seen| seen.path.clone());
        let all: BTreeSet<_> = referred.chain(files).collect();
        self.refers_to(all);
        self.again = Some(Instant::now() + LOOK);
    }

    /// Watches these files too, and no others any more that were referred to before; what new ones say now is no change.
    pub(crate) fn refers_to(&mut self, files: impl IntoIterator<Item = PathBuf>) {
        self.again = None;
        let mut before = std::mem::take(&mut self.files).into_iter();
        self.files.extend(before.next());
        let mut before: Vec<_> = before.collect();
        for path in files {
            let known = before.iter().position(|seen| seen.path == path);
            let seen = known.map(|at| before.swap_remove(at));
            self.files.push(seen.unwrap_or_else(|| Seen::now(path)));
        }
        let folders: BTreeSet<_> = self.files.iter().map(|seen| folder(&seen.path)).collect();
        for gone in self.folders.difference(&folders) {
            if let Err(error) = self.debouncer.unwatch(gone) {
                tracing::debug!(%error, folder = %gone.display(), "a folder is still watched");
            }
        }
        for new in folders.difference(&self.folders) {
            if let Err(error) = self.debouncer.watch(new, RecursiveMode::NonRecursive) {
                tracing::info!(%error, folder = %new.display(), "a folder is looked at now and then");
            }
        }
        self.folders = folders;
    }

    /// Ends when one of the files says something else than before, or when something [`failed`](Self::failed) a while ago;
    /// a file that cannot be read is no change. Cancel-safe: what is missed is found by the next look.
    pub(crate) async fn changed(&mut self) {
        loop {
            tokio::select! {
                told = self.events.recv() => if told.is_none() {
                    // The watcher's thread is gone.
                    sleep(LOOK).await;
                },
                () = sleep(LOOK) => {}
            }
            let due = self.again.is_some_and(|again| again <= Instant::now());
            if self.look().await || due {
                return;
            }
        }
    }

    async fn look(&mut self) -> bool {
        let mut marks = Vec::with_capacity(self.files.len());
        for seen in &self.files {
            let read: io::Result<Vec<u8>> = tokio::fs::read(&seen.path).await;
            marks.push(read.ok().map(|content| sha256(&content)));
        }
        // Only now, in one go: whoever gives up waiting meanwhile has lost no change.
        let mut changed = false;
        for (seen, mark) in self.files.iter_mut().zip(marks) {
            if mark.is_some() && mark != seen.mark {
                seen.mark = mark;
                changed = true;
            }
        }
        changed
    }
}

/// Why a project is not in force, as the log has told last: the same reason is found again at every look.
#[derive(Default)]
pub(crate) struct Told(Option<String>);

impl Told {
    /// Tells it, unless that is known.
    pub(crate) fn not_taken_over(&mut self, why: String) {
        if self.0.as_ref() != Some(&why) {
            tracing::error!("the project was not taken over, the old one stays:\n{why}");
            self.0 = Some(why);
        }
    }
}

/// As [`WatchedFile::changed`]; never ends where nothing is watched.
pub(crate) async fn changed(watched: &mut Option<WatchedFile>) {
    match watched {
        Some(watched) => watched.changed().await,
        None => std::future::pending().await,
    }
}

fn folder(path: &Path) -> PathBuf {
    path.parent().unwrap_or(path).to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::time::timeout;

    use super::*;

    /// Long enough for a busy machine; a test that passes does not wait for it.
    const PATIENCE: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn writing_and_renaming_over_are_both_changes_and_the_same_content_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("project.yaml");
        fs::write(&file, "one").unwrap();
        let mut watched = WatchedFile::new(&file).unwrap();
        fs::write(&file, "two").unwrap();
        timeout(PATIENCE, watched.changed()).await.unwrap();
        // The same again, then another by rename: only the second counts, and it is seen.
        fs::write(&file, "two").unwrap();
        fs::write(folder.path().join("next"), "three").unwrap();
        fs::rename(folder.path().join("next"), &file).unwrap();
        timeout(PATIENCE, watched.changed()).await.unwrap();
        assert_eq!(watched.files[0].mark, Some(sha256(b"three")));
    }

    #[tokio::test]
    async fn files_that_are_referred_to_are_watched_wherever_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("project.yaml");
        let [first, second] = ["first", "second"].map(|name| folder.path().join(name).join("key"));
        for path in [&first, &second] {
            fs::create_dir(path.parent().unwrap()).unwrap();
            fs::write(path, "old").unwrap();
        }
        fs::write(&file, "one").unwrap();
        let mut watched = WatchedFile::new(&file).unwrap();
        watched.refers_to([first.clone(), second.clone()]);
        fs::write(&second, "new").unwrap();
        timeout(PATIENCE, watched.changed()).await.unwrap();
        watched.refers_to([second.clone()]);
        // No longer of interest.
        fs::write(&first, "new").unwrap();
        assert!(!watched.look().await);
        fs::write(&second, "newer").unwrap();
        timeout(PATIENCE, watched.changed()).await.unwrap();
        fs::remove_file(&second).unwrap();
        assert!(!watched.look().await, "what cannot be read is no change");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_word_from_the_system_a_change_is_found_by_looking() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("project.yaml");
        fs::write(&file, "one").unwrap();
        let mut watched = WatchedFile::new(&file).unwrap();
        watched.debouncer.unwatch(folder.path()).unwrap();
        fs::write(&file, "two").unwrap();
        timeout(2 * LOOK, watched.changed()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_tried_again_at_each_look_and_by_every_file_that_was_missed() {
        let folder = tempfile::tempdir().unwrap();
        let [file, known, missing] =
            ["project.yaml", "known", "missing"].map(|name| folder.path().join(name));
        fs::write(&file, "one").unwrap();
        fs::write(&known, "old").unwrap();
        let mut watched = WatchedFile::new(&file).unwrap();
        watched.refers_to([known.clone()]);
        for _ in 0..3 {
            watched.failed([missing.clone()]);
            timeout(2 * LOOK, watched.changed()).await.unwrap();
        }
        // Both those that count if it succeeds and those that count while it does not.
        for path in [&missing, &known] {
            fs::write(path, "new").unwrap();
            assert!(watched.look().await, "{}", path.display());
        }
        watched.refers_to([known, missing]);
        assert!(timeout(10 * LOOK, watched.changed()).await.is_err(), "it is in force");
    }
}
