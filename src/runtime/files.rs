//! Files that hold secrets or must survive a crash.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use uuid::Uuid;

/// Why a private file was not read.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFault {
    /// The file system said no.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// Others than its owner can read it.
    #[error("it can be read by others than its owner; it should have mode 0600")]
    Exposed,
    /// It is longer than any file of ours.
    #[error("it is larger than it can be")]
    TooLarge,
}

/// Reads a file that only its owner may read, of at most `limit` bytes.
///
/// # Errors
/// [`PrivateFault`]; nothing of a file that others can read is taken.
pub fn read_private(path: &Path, limit: u64) -> Result<Vec<u8>, PrivateFault> {
    let file = fs::File::open(path)?;
    let facts = file.metadata()?;
    if facts.permissions().mode() & 0o077 != 0 {
        return Err(PrivateFault::Exposed);
    }
    let mut content = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut content)?;
    if u64::try_from(content.len()).is_ok_and(|length| length > limit) {
        return Err(PrivateFault::TooLarge);
    }
    Ok(content)
}

/// Removes what a [`write_private`] into `folder` left behind when its process was killed: a half-written file may hold
/// a secret. Only for a folder into which no other process writes. What cannot be removed is told, and keeps nobody from
/// going on.
pub fn clear_leftovers(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str());
        let id = name.and_then(|name| name.strip_prefix('.')?.strip_suffix(".tmp"));
        if id.is_none_or(|id| Uuid::try_parse(id).is_err()) {
            continue;
        }
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(%error, path = %path.display(), "a half-written file cannot be removed");
        }
    }
}

/// Writes a file that only its owner may read, whole or not at all: beside its place first, synced, then
/// renamed over it.
///
/// Once it is renamed it counts as written. That the folder could not be synced is passed over: after a power cut the
/// old file may then be there again, whole.
///
/// # Errors
/// Those of the file system; the old file is then untouched.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    // One name per write, so that two writers never share a temporary file.
    let temporary = folder.join(format!(".{}.tmp", Uuid::now_v7()));
    let written = write_synced(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // Nothing more can be done about the rest of a failed write; its own fault matters.
        drop(fs::remove_file(&temporary));
        return Err(error);
    }
    // The rename itself should survive a power cut. It has happened, so it is no failure when that cannot be had.
    drop(fs::File::open(folder).and_then(|folder| folder.sync_all()));
    Ok(())
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_file_is_its_owners_alone_and_replaces_the_old_one_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        write_private(&path, b"first").unwrap();
        write_private(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(read_private(&path, 6).unwrap(), b"second");
        assert!(matches!(read_private(&path, 5), Err(PrivateFault::TooLarge)));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(read_private(&path, 6), Err(PrivateFault::Exposed)));
        let gone = read_private(&folder.path().join("none"), 6);
        assert!(
            matches!(gone, Err(PrivateFault::Io(error)) if error.kind() == io::ErrorKind::NotFound)
        );
    }

    #[test]
    fn what_a_killed_writer_left_behind_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let leftover = format!(".{}.tmp", Uuid::now_v7());
        for name in [leftover.as_str(), "secret", ".hidden", ".other.tmp", "x.tmp"] {
            fs::write(folder.path().join(name), "secret").unwrap();
        }
        clear_leftovers(folder.path());
        assert!(!folder.path().join(leftover).exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
    }
}
