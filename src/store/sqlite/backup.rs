//! Copies of a store in one file: SQLite's own of a running file, and one of a dump for any other engine.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, backup::Backup, backup::StepResult};
use uuid::Uuid;

use super::{fault::fault, files::refused, open_file, open_reader, schema, tables, writing};
use crate::store::{dump::Dump, error::StoreError};

/// How long a copy waits for a lock that is held for moments only.
const PATIENCE: Duration = Duration::from_secs(30);

/// Copies the store at `from`, whoever writes it, into a new file.
pub(in crate::store) fn copy(from: &Path, to: &Path) -> Result<(), StoreError> {
    let location = format!("sqlite:{}", from.display());
    let source = open_reader(from).map_err(|error| fault(&location, &error))?;
    source.busy_timeout(PATIENCE).map_err(|error| fault(&location, &error))?;
    // What is damaged must not take the place of a good copy.
    schema::check(&source, &location)?;
    into_new_file(to, |target| pages(&source, target).map_err(|error| fault(&location, &error)))
}

/// Writes what another engine holds into a new file.
pub(in crate::store) fn write_backup(dump: &Dump, to: &Path) -> Result<(), StoreError> {
    let location = format!("sqlite:{}", to.display());
    into_new_file(to, |target| {
        let written = schema::migrate(target).and_then(|()| tables::fill(target, dump));
        written.map(drop).map_err(|error| fault(&location, &error))
    })
}

/// Reads a backup, after looking whether it is whole; one of an older schema is brought to ours in memory.
pub(in crate::store) fn read_backup(from: &Path) -> Result<Dump, StoreError> {
    let location = format!("sqlite:{}", from.display());
    let failed = |error: &rusqlite::Error| fault(&location, error);
    // Before SQLite looks, which calls a missing file one that it cannot open.
    File::open(from).map_err(|source| StoreError::Files { path: from.to_owned(), source })?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let file = Connection::open_with_flags(from, flags).map_err(|error| failed(&error))?;
    schema::check(&file, &location)?;
    let mut inside = Connection::open_in_memory().map_err(|error| failed(&error))?;
    pages(&file, &mut inside).map_err(|error| failed(&error))?;
    schema::check_whole(&inside, &location)?;
    schema::migrate(&mut inside).map_err(|error| failed(&error))?;
    tables::dump(&mut inside).map_err(|error| failed(&error))
}

/// Fills the file at `path`, which is empty or not there yet.
pub(in crate::store) fn restore(path: &Path, dump: &Dump) -> Result<(), StoreError> {
    let location = format!("sqlite:{}", path.display());
    let (mut connection, lock, _, _) = open_file(path, None)?;
    let filled = tables::fill(&mut connection, dump).map_err(|error| fault(&location, &error))?;
    drop((connection, lock));
    if filled { Ok(()) } else { Err(StoreError::NotEmpty { location }) }
}

/// In one step, which is one moment of the source: between two steps a commit would make SQLite begin anew, and under
/// load it would never end. Reading so long holds no writer up (WAL).
fn pages(from: &Connection, to: &mut Connection) -> rusqlite::Result<()> {
    to.busy_timeout(PATIENCE)?;
    let step = Backup::new(from, to)?.step(-1)?;
    if step == StepResult::Done {
        return Ok(());
    }
    let busy = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY);
    Err(rusqlite::Error::SqliteFailure(busy, None))
}

/// Lets `write` fill a file beside `to`, and gives it that name when it is whole and on disk. A file that is there
/// already is left alone.
fn into_new_file(
    to: &Path,
    write: impl FnOnce(&mut Connection) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    if to.symlink_metadata().is_ok() {
        return Err(StoreError::Exists { path: to.to_owned() });
    }
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let beside = folder.join(format!(".{}.tmp", Uuid::now_v7()));
    let written = fill(&beside, write)
        .and_then(|()| named(&beside, to))
        .and_then(|()| synced(folder).map_err(|source| refused(folder, source)));
    // After a success it has its name; after a failure the rest of it is of no use to anybody.
    drop(fs::remove_file(&beside));
    written
}

fn fill(
    path: &Path,
    write: impl FnOnce(&mut Connection) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let location = format!("sqlite:{}", path.display());
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    drop(made.map_err(|source| refused(path, source))?);
    let mut target =
        Connection::open_with_flags(path, writing()).map_err(|error| fault(&location, &error))?;
    write(&mut target)?;
    // One file, with nothing beside it.
    let single = target.query_row("PRAGMA journal_mode = DELETE", (), |_| Ok(()));
    single.map_err(|error| fault(&location, &error))?;
    drop(target);
    synced(path).map_err(|source| refused(path, source))
}

/// A second name for the same file, which fails where one is; without such names, a renaming after a last look.
fn named(beside: &Path, to: &Path) -> Result<(), StoreError> {
    let exists = || StoreError::Exists { path: PathBuf::from(to) };
    match fs::hard_link(beside, to) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(exists()),
        Err(_) if to.symlink_metadata().is_ok() => Err(exists()),
        Err(_) => fs::rename(beside, to).map_err(|source| refused(to, source)),
    }
}

fn synced(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
