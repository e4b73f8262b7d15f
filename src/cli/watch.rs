//! Tells when the content of a file has changed, however it was put there: written, renamed over, or swapped by a
//! symbolic link as Kubernetes does. So the folder is watched, and the content compared.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode};
use notify_debouncer_full::{DebounceEventResult, Debouncer, RecommendedCache, new_debouncer};
use tokio::sync::mpsc;

/// Editors write a file in several steps; a change counts when they are done.
const SETTLE: Duration = Duration::from_millis(200);

/// A file whose content is watched until this is dropped.
pub(crate) struct WatchedFile {
    path: PathBuf,
    /// What the file said when it was last looked at; `None` while it could not be read.
    content: Option<Vec<u8>>,
    events: mpsc::Receiver<()>,
    _debouncer: Debouncer<RecommendedWatcher, RecommendedCache>,
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
        let folder = path.parent().unwrap_or(&path);
        debouncer.watch(folder, RecursiveMode::NonRecursive)?;
        let content = read(&path);
        Ok(Self { path, content, events, _debouncer: debouncer })
    }

    /// Ends when the file says something else than before; a file that cannot be read is no change. Cancel-safe.
    pub(crate) async fn changed(&mut self) {
        loop {
            if self.events.recv().await.is_none() {
                // The watcher's thread is gone: nothing will ever be told again.
                std::future::pending::<()>().await;
            }
            let now = read(&self.path);
            if now.is_some() && now != self.content {
                self.content = now;
                return;
            }
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

fn read(path: &Path) -> Option<Vec<u8>> {
    let read: io::Result<Vec<u8>> = fs::read(path);
    read.ok()
}

#[cfg(test)]
mod tests {
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
        assert_eq!(watched.content.as_deref(), Some(b"three".as_slice()));
    }

    #[tokio::test]
    async fn a_link_that_is_swapped_as_kubernetes_does_is_a_change() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        for version in ["one", "two"] {
            fs::create_dir(folder.path().join(version)).unwrap();
            fs::write(folder.path().join(version).join("project.yaml"), version).unwrap();
        }
        symlink("one", folder.path().join("..data")).unwrap();
        symlink("..data/project.yaml", folder.path().join("project.yaml")).unwrap();
        let mut watched = WatchedFile::new(&folder.path().join("project.yaml")).unwrap();
        symlink("two", folder.path().join("..data_tmp")).unwrap();
        fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
        timeout(PATIENCE, watched.changed()).await.unwrap();
        assert_eq!(watched.content.as_deref(), Some(b"two".as_slice()));
    }
}
