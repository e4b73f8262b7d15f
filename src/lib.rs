//! infrar: a proxy beside each service, an edge gateway in each cloud, and the small control plane they share.
//!
//! The rooms, from the top floor to the ground. A room uses rooms below it, never one above or beside it;
//! `tests/architecture.rs` holds that.

pub mod api; // floor 3: the control plane's HTTP contract, shared by both ends
pub mod balance; // floor 4: which endpoint serves this attempt: arithmetic only
pub mod cli; // floor 7: one file per subcommand; alone may print or exit
pub mod config; // floor 6: files and environment → validated settings
pub mod control; // floor 5: the control plane; never meets `proxy` except over the wire
pub mod cost; // floor 4: what the traffic cost
pub mod discovery; // floor 4: which endpoints exist: sources feed one snapshot
pub mod http1; // floor 2: HTTP/1.1 as bytes: heads, framing, chunks
pub mod identity; // floor 4: who is speaking, and what may they do
pub mod model;
pub mod net; // floor 2: the one seam to the network
pub mod proxy; // floor 5: the data plane: how a request walks
pub mod runtime; // floor 1: how tasks live and end, what time it is
pub mod telemetry; // floor 2: logs and metrics; the one list of metric names
pub mod upstream; // floor 4: connections to endpoints
pub mod wire; // floor 2: words peers exchange: body type, problem, proxy-status, request id // floor 0: the vocabulary: no I/O, no async, no clock
