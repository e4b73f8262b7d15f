//! What holds where a proxy's settings say nothing, each with its reason.

use std::time::Duration;

/// Where the admin API listens: the field's own port for it, loopback only.
pub const ADMIN_LISTEN: &str = "127.0.0.1:15000";
/// Where the outbound listener listens: the field's own port for it, loopback only.
pub const OUTBOUND_LISTEN: &str = "127.0.0.1:15001";
/// Where an inbound listener listens: the field's own port for it, every address.
pub const INBOUND_LISTEN: &str = "0.0.0.0:15006";
/// How old a kept snapshot may be.
pub const MAX_SNAPSHOT_AGE: Duration = Duration::from_secs(7 * 86_400);
/// How long an answer of DNS holds at least: no name is asked for more often, whatever it says of itself.
pub const DNS_MIN_TTL: Duration = Duration::from_secs(1);
/// And at most, so that a time to live of days hides no move.
pub const DNS_MAX_TTL: Duration = Duration::from_secs(300);
/// Where a DNS server listens.
pub const DNS_PORT: u16 = 53;
/// Verified tokens kept per worker.
pub const TOKEN_CACHE: usize = 10_000;
/// Bytes of one request head: what Envoy allows.
pub const HEADER_BYTES: usize = 60 * 1024;
/// Fields of one request head: what Envoy allows.
pub const HEADERS: usize = 100;
/// Until a request head is there.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a request: what Envoy allows.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(3_600);
/// While nothing of a body moves (Envoy's stream idle time-out).
pub const STALL_TIMEOUT: Duration = Duration::from_secs(300);
/// HTTP/2 streams of one connection: what Envoy allows.
pub const STREAMS: u32 = 1_024;
/// Connections of one listener.
pub const CONNECTIONS: usize = 10_000;
/// Between being not ready and accepting no more.
pub const GRACE: Duration = Duration::from_secs(5);
/// When a proxy that was told to end ends; below the 30 s after which Kubernetes kills.
pub const DEADLINE: Duration = Duration::from_secs(25);
