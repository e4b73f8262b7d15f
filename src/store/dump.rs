//! A whole store in memory, on its way into a backup or out of one.

use crate::store::entry::{Commit, Entry};

/// How far a restored store is ahead of the backup it came from. Whoever knew the time after the backup then knows
/// no revision that could come again, and loads the whole.
pub(super) const RESTORED_AHEAD: u64 = 1_000_000;

/// Everything in every table. Moments are milliseconds since 1970 by the store's clock.
pub(super) struct Dump {
    pub(super) id: String,
    pub(super) revision: u64,
    pub(super) entries: Vec<Entry>,
    pub(super) commits: Vec<Commit>,
    pub(super) leases: Vec<(String, i64)>,
    pub(super) sightings: Vec<(String, String, i64)>,
}

impl Dump {
    /// As it is restored: beyond every revision that anybody can have seen, and with no past to catch up from.
    pub(super) fn restored(mut self) -> Self {
        self.revision = self.revision.saturating_add(RESTORED_AHEAD);
        self.commits.clear();
        self
    }
}
