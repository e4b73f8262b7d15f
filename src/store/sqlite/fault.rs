//! What SQLite says → what the store says.

use rusqlite::{Error, ErrorCode, ffi};

use crate::store::{
    DEADLINE,
    error::{Cause, StoreError},
};

/// Of an error of SQLite, which names tables and files but no values.
pub(super) fn fault(location: &str, error: &Error) -> StoreError {
    let location = location.to_owned();
    let source: Cause = error.to_string().into();
    let Some(said) = error.sqlite_error() else { return StoreError::Other { location, source } };
    if said.extended_code == ffi::SQLITE_IOERR_SHMSIZE {
        // The shared index beside the file could not grow.
        return StoreError::Full { location, source };
    }
    let code = said.code;
    if code == ErrorCode::DiskFull {
        StoreError::Full { location, source }
    } else if code == ErrorCode::ReadOnly || code == ErrorCode::PermissionDenied {
        StoreError::ReadOnly { location, source }
    } else if code == ErrorCode::DatabaseCorrupt || code == ErrorCode::NotADatabase {
        StoreError::Damaged { location, reason: error.to_string() }
    } else if code == ErrorCode::DatabaseBusy || code == ErrorCode::DatabaseLocked {
        StoreError::Slow { location, limit: DEADLINE }
    } else if code == ErrorCode::CannotOpen || code == ErrorCode::SystemIoFailure {
        StoreError::Unreachable { location, source }
    } else {
        StoreError::Other { location, source }
    }
}
