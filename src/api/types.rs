//! What travels between a proxy and the control plane.

use serde::{Deserialize, Serialize};

use crate::model::Project;

/// The audience of tokens for the control plane's own API.
pub const CONTROL_AUDIENCE: &str = "infrar-control";

/// `GET /v1/catalog`: one version of everything a proxy needs to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Catalog {
    /// Rises with every change; never reused by one control plane's data directory.
    pub revision: u64,
    /// The `iss` of the project's own tokens; empty for a proxy that runs from a file alone.
    pub issuer: String,
    /// The project itself.
    pub project: Project,
}

/// `GET /v1/watch`: the data of one `change` event; its `id` is the revision too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The revision that is now current; the catalog is fetched separately, with its ETag.
    pub revision: u64,
}
