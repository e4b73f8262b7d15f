//! Which endpoints exist: sources feed one snapshot that the data plane reads without a lock.
