//! Who is speaking, and what may they do: tokens, keys, verification, policy.
//!
//! The one idea: whatever may wait (fetching keys, asking for tokens) runs on the side runtime and leaves an
//! immutable snapshot behind; a worker reads snapshots and decides with arithmetic alone. Nothing here knows
//! HTTP messages, and no secret is ever printed.

mod bearer;
mod cache;
mod claims;
#[cfg(test)]
mod forge;
mod json;
mod jwks;
mod jws;
mod keys;
mod mint;
mod policy;
mod slot;
mod source;
mod tokens;
mod verify;

pub use bearer::{Bearer, StoredToken};
pub use cache::TokenCache;
pub use claims::{Caller, Claims, LEEWAY_SECONDS};
pub use jwks::{Fetch, FetchFault, Jwks, JwksStats, Refreshed, control_keys, keys_at};
pub use jws::MAX_TOKEN_BYTES;
pub use keys::{Algorithm, KeyId, KeySet, KeySetError};
pub use mint::{Mint, MintError, MintSettings, Minted, OwnClaims};
pub use policy::{
    Access, Action, Grant, NotPermitted, PathFault, PathRule, Refused, Rule, RuleFault, Rules,
    Strictness, admit, normalise, outside, permits,
};
pub use slot::Slot;
pub use source::{ControlTokens, NoTokens, TokenSource, TokenUnavailable};
pub use tokens::{TokenStats, Tokens};
pub use verify::{TokenFault, Trusted, Verifier};
