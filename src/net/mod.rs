//! The one seam to the network: dialling, listening, TLS.
//!
//! Everything here is about connections, nothing about requests. Each piece works on a worker's own thread; what may
//! stall (name look-ups) is done on the side runtime and only its answer comes back.

mod dial;
mod flowing;
mod gate;
mod listen;
mod own;
mod spread;
mod stream;
mod tls;

pub use dial::{Addresses, ResolveError, Resolver, connect, connect_any};
pub use flowing::{Cut, Flowing};
pub use gate::{Gate, Opening, Place, source};
pub use listen::{BindError, BindErrors, accept, accept_rest, bind, try_bind};
pub use own::is_own;
pub use spread::{Handover, Open, Placement, Spread};
pub use stream::{LANDING_BYTES, Stream, Tallied, Tally};
pub use tls::{
    Alpn, ClientTls, MinVersion, Reload, ServerTls, TlsError, install_provider,
    is_certificate_fault, is_tls_fault,
};
