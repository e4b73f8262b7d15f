//! The file itself: who may read it, and which process it belongs to.

use std::{
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::store::error::StoreError;

/// Takes the lock beside `path`, which ends with the process or the answer. The folder is made if it is missing.
pub(super) fn claim(path: &Path) -> Result<File, StoreError> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|source| refused(folder, source))?;
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let beside = PathBuf::from(name);
    // Never emptied and never removed: a lock on a file that is gone would keep nobody out.
    let lock =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&beside);
    let lock = lock.map_err(|source| refused(&beside, source))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(refused(&beside, source)),
    }
}

/// Makes the file if it is missing, for its owner alone. What SQLite puts beside it gets the same mode.
pub(super) fn make(path: &Path) -> Result<(), StoreError> {
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = opened.map_err(|source| refused(path, source))?;
    let mode = file.metadata().map_err(|source| refused(path, source))?.permissions().mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(0o600)).map_err(|source| refused(path, source))
}

pub(super) fn refused(path: &Path, source: io::Error) -> StoreError {
    let location = format!("sqlite:{}", path.display());
    let kind = source.kind();
    if kind == io::ErrorKind::ReadOnlyFilesystem {
        StoreError::ReadOnly { location, source: source.into() }
    } else if kind == io::ErrorKind::StorageFull || kind == io::ErrorKind::QuotaExceeded {
        StoreError::Full { location, source: source.into() }
    } else {
        StoreError::Files { path: path.to_owned(), source }
    }
}
