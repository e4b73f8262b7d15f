//! Why the store could not do it, and what to do about it.

use std::{io, path::PathBuf, time::Duration};

/// What an engine or a library said, in its words; never a value.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why the store could not do it. Nothing was written, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nobody answers, or the connection broke.
    #[error(
        "{location} cannot be reached; is the database up, and does the network let us through?"
    )]
    Unreachable {
        /// Which store.
        location: String,
        /// What was heard.
        #[source]
        source: Cause,
    },
    /// It answers, and says no: a wrong password, no such database, no right to write, a certificate that is not
    /// believed.
    #[error("{location} refuses us; look at user, password, rights and sslmode")]
    Refused {
        /// Which store.
        location: String,
        /// What was heard.
        #[source]
        source: Cause,
    },
    /// No answer within the limit.
    #[error(
        "{location} did not answer within {limit:?}; it is overloaded, or its disk or network is slow"
    )]
    Slow {
        /// Which store.
        location: String,
        /// How long was waited.
        limit: Duration,
    },
    /// The answer to a commit was lost, and asking again gave none: it is there, or it is not. Load the state to see.
    #[error(
        "{location} was lost while it committed; whether revision {revision} is ours is not known"
    )]
    Unknown {
        /// Which store.
        location: String,
        /// The one that the commit would have made.
        revision: u64,
    },
    /// No room. The store goes on by itself once there is some.
    #[error("{location} is full; make room on its disk, or raise its limit")]
    Full {
        /// Which store.
        location: String,
        /// What was heard.
        #[source]
        source: Cause,
    },
    /// It can be read only.
    #[error("{location} is read-only; it must be writable, and a database must be the primary")]
    ReadOnly {
        /// Which store.
        location: String,
        /// What was heard.
        #[source]
        source: Cause,
    },
    /// Another process has it open.
    #[error(
        "{} is in use by another process; stop that one, or share a PostgreSQL database instead",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// What lies there is not what was written.
    #[error("{location} is damaged ({reason}); move it away and restore a backup")]
    Damaged {
        /// Which store, or which backup.
        location: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A later version of infrar wrote it.
    #[error(
        "{location} has schema {found}, and this version knows {known} at most; run the newer version of infrar"
    )]
    Newer {
        /// Which store, or which backup.
        location: String,
        /// Its schema.
        found: u64,
        /// Ours.
        known: u64,
    },
    /// There is something in it already, so nothing is restored over it.
    #[error("{location} is not empty; restore into a new one")]
    NotEmpty {
        /// Which store.
        location: String,
    },
    /// A file lies where the backup should go.
    #[error("{} exists already; choose another name", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file system said no.
    #[error("{} cannot be used", path.display())]
    Files {
        /// What was touched.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// More than an index holds.
    #[error("a key of {bytes} bytes is too long; write {} at most", super::KEY_BYTES)]
    LongKey {
        /// How long it is.
        bytes: usize,
    },
    /// It was closed before.
    #[error("{location} has been closed")]
    Closed {
        /// Which store.
        location: String,
    },
    /// Anything else.
    #[error("{location} failed")]
    Other {
        /// Which store.
        location: String,
        /// What was heard.
        #[source]
        source: Cause,
    },
}

impl StoreError {
    /// Whether the same may succeed later, without anybody changing settings.
    #[must_use]
    pub const fn is_temporary(&self) -> bool {
        match self {
            // Read-only is what a database is while its standby takes over.
            Self::Unreachable { .. }
            | Self::Slow { .. }
            | Self::Unknown { .. }
            | Self::Full { .. }
            | Self::ReadOnly { .. } => true,
            Self::Refused { .. }
            | Self::InUse { .. }
            | Self::Damaged { .. }
            | Self::Newer { .. }
            | Self::NotEmpty { .. }
            | Self::Exists { .. }
            | Self::Files { .. }
            | Self::LongKey { .. }
            | Self::Closed { .. }
            | Self::Other { .. } => false,
        }
    }
}

/// Why a commit did not come about.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Somebody else was first. Nothing was written; look at what changed and decide anew.
    #[error("the store is at revision {revision} already")]
    Conflict {
        /// Where it stands.
        revision: u64,
    },
    /// The store failed; only after [`StoreError::Unknown`] may the commit be there all the same.
    #[error(transparent)]
    Store(#[from] StoreError),
}
