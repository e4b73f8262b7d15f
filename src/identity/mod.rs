//! Who is speaking, and what may they do: tokens, keys, verification, policy.

mod mint;

pub use mint::{Mint, MintError, MintSettings, Minted, OwnClaims, write_private};
