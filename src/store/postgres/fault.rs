//! What PostgreSQL says → what the store says. Details of an error may hold values, so code and message alone go on.

use std::{error::Error as _, io};

use deadpool_postgres::PoolError;
use tokio_postgres::{Error, error::SqlState};

use crate::{
    net::is_tls_fault,
    store::{
        DEADLINE,
        error::{Cause, StoreError},
    },
};

/// Of an error of the database or of the way to it.
pub(super) fn fault(location: &str, error: &Error) -> StoreError {
    let location = location.to_owned();
    let Some(said) = error.as_db_error() else { return of_the_way(location, error) };
    let source: Cause = format!("{} (SQLSTATE {})", said.message(), said.code().code()).into();
    let code = said.code();
    // Classes and codes: PostgreSQL's manual, appendix A.
    if *code == SqlState::DISK_FULL {
        StoreError::Full { location, source }
    } else if *code == SqlState::READ_ONLY_SQL_TRANSACTION {
        StoreError::ReadOnly { location, source }
    } else if *code == SqlState::QUERY_CANCELED || *code == SqlState::LOCK_NOT_AVAILABLE {
        StoreError::Slow { location, limit: DEADLINE }
    } else if *code == SqlState::INSUFFICIENT_PRIVILEGE {
        StoreError::Refused { location, source }
    } else if *code == SqlState::DATA_CORRUPTED || *code == SqlState::INDEX_CORRUPTED {
        StoreError::Damaged { location, reason: source.to_string() }
    } else {
        match code.code().get(..2) {
            // Connections, too many of them, and an operator who stops the server.
            Some("08" | "53" | "57") => StoreError::Unreachable { location, source },
            Some("28" | "3D" | "3F") => StoreError::Refused { location, source },
            _ => StoreError::Other { location, source },
        }
    }
}

/// The database did not speak: no connection, one that broke, or one that TLS would not have.
fn of_the_way(location: String, error: &Error) -> StoreError {
    let words = chain(error);
    let cause = error.source();
    let is_tls =
        cause.and_then(|cause| cause.downcast_ref::<io::Error>()).is_some_and(is_tls_fault)
            || words.starts_with("error performing TLS handshake");
    let is_ours = words.starts_with("authentication error") || words.starts_with("invalid conf");
    let source: Cause = words.into();
    if is_tls || is_ours {
        StoreError::Refused { location, source }
    } else {
        StoreError::Unreachable { location, source }
    }
}

/// Of the pool: no connection was to be had.
pub(super) fn of_pool(location: &str, error: &PoolError) -> StoreError {
    let location = location.to_owned();
    match error {
        PoolError::Backend(error) => fault(&location, error),
        PoolError::Timeout(_) => StoreError::Slow { location, limit: DEADLINE },
        PoolError::Closed => StoreError::Closed { location },
        PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            StoreError::Other { location, source: error.to_string().into() }
        }
    }
}

/// Whether the same would succeed when it is simply done again: another transaction was in the way.
pub(super) fn is_collision(error: &Error) -> bool {
    error.code().is_some_and(|code| {
        *code == SqlState::T_R_SERIALIZATION_FAILURE || *code == SqlState::T_R_DEADLOCK_DETECTED
    })
}

/// Whether the connection is of no use any more.
pub(super) fn is_broken(error: &Error) -> bool {
    match error.code() {
        Some(code) => {
            *code == SqlState::ADMIN_SHUTDOWN
                || *code == SqlState::CRASH_SHUTDOWN
                || *code == SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT
                || code.code().starts_with("08")
        }
        None => true,
    }
}

/// Whether the database does not know what was asked for: a function, a statement, a table.
pub(super) fn is_unknown_there(error: &Error) -> bool {
    error.code().is_some_and(|code| {
        matches!(code.code().get(..2), Some("42" | "0A"))
            && *code != SqlState::INSUFFICIENT_PRIVILEGE
    })
}

/// What an error says, and what lies beneath it.
fn chain(error: &Error) -> String {
    let mut words = error.to_string();
    let mut beneath = error.source();
    while let Some(cause) = beneath {
        let more = cause.to_string();
        if !words.ends_with(&more) {
            words.push_str(": ");
            words.push_str(&more);
        }
        beneath = cause.source();
    }
    words
}
