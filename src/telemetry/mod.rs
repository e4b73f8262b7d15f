//! Logs and metrics, and the one list of metric names.
