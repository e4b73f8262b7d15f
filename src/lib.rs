//! infrar: a proxy beside each service, an edge gateway in each cloud, and the small control plane they share.
//!
//! The rooms, from the top floor to the ground. A room uses rooms below it, never one above or beside it;
//! `tests/architecture.rs` holds that.

// Floor 7: one file per subcommand; alone may print or exit.
pub mod cli;

// Floor 6: files and environment → validated settings.
pub mod config;

// Floor 5: how a request walks; and the control plane, which never meets `proxy` except over the wire.
pub mod control;
pub mod proxy;

// Floor 4: which endpoint, whose connection, who speaks, which endpoints exist, what it cost, what must survive.
pub mod balance;
pub mod cost;
pub mod discovery;
pub mod identity;
pub mod store;
pub mod upstream;

// Floor 3: the control plane's HTTP contract, shared by both ends.
pub mod api;

// Floor 2: HTTP/1.1 as bytes; the one seam to the network; logs and metrics.
pub mod http1;
pub mod net;
pub mod telemetry;

// Floor 1: how tasks live and end, what time it is; words peers exchange.
pub mod runtime;
pub mod wire;

// Floor 0: the vocabulary: no I/O, no async, no clock.
pub mod model;
