//! Who may ask for tokens, and how it proves who it is.

use std::collections::BTreeMap;

use secrecy::SecretString;

use crate::model::ServiceName;

/// Every identity of the project by its name (`client_id`).
pub type Identities = BTreeMap<ServiceName, Identity>;

/// How one identity proves itself.
#[derive(Clone, Debug)]
pub enum Identity {
    /// By a shared secret (RFC 6749 §2.3.1).
    ClientSecret(SecretString),
    /// By a shared secret of which only the SHA-256 is known here, in hexadecimal.
    ClientSecretDigest(String),
    /// By an OIDC token of its platform (RFC 7523).
    Workload {
        /// The token's `iss`.
        issuer: String,
        /// The token's `sub`.
        subject: String,
    },
}
