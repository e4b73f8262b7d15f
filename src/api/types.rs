//! What travels between a proxy and the control plane.

use std::{collections::BTreeMap, time::Duration};

use secrecy::SecretString;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use crate::model::{Place, Project, ScopeSet, Service, ServiceName};

/// The audience of tokens for the control plane's own API.
pub const CONTROL_AUDIENCE: &str = "infrar-control";

/// The scope at [`CONTROL_AUDIENCE`] that reads catalog, services and changes; every identity has it.
pub const CATALOG_READ: &str = "infrar:catalog:read";

/// The scope at [`CONTROL_AUDIENCE`] that reports usage; every identity has it.
pub const USAGE_WRITE: &str = "infrar:usage:write";

/// The scope at [`CONTROL_AUDIENCE`] that rotates the signing keys; only `permissions` grants it.
pub const KEYS_WRITE: &str = "infrar:keys:write";

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

/// `GET /v1/services`: every service in brief, by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceList {
    /// The revision that was read.
    pub revision: u64,
    /// One row per service.
    pub services: Vec<ServiceSummary>,
}

/// One row of [`ServiceList`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceSummary {
    /// The service.
    pub name: ServiceName,
    /// How many endpoints it has.
    pub endpoints: usize,
    /// How many of them are active.
    pub active: usize,
    /// Where they are, each place once.
    pub places: Vec<Place>,
    /// The scopes that exist at it.
    pub scopes: ScopeSet,
}

/// `GET /v1/services/{name}`: one service in full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceAnswer {
    /// The revision that was read.
    pub revision: u64,
    /// The service.
    pub name: ServiceName,
    /// Everything that is said about it.
    #[serde(flatten)]
    pub service: Service,
    /// Who may call it, and with which scopes.
    pub callers: BTreeMap<ServiceName, ScopeSet>,
}

/// What an identity proves itself with at the token endpoint.
#[derive(Clone, Debug)]
pub struct Credential {
    /// The identity's name in `identities`.
    pub client_id: ServiceName,
    /// Its secret (RFC 6749 §2.3.1).
    pub secret: SecretString,
}

/// A token as its caller keeps it.
#[derive(Clone, Debug)]
pub struct TokenAnswer {
    /// The bearer.
    pub access_token: SecretString,
    /// How long it is good, from the moment of the answer; `None` when the answer did not say.
    pub expires_in: Option<Duration>,
    /// The scopes that it carries.
    pub scope: ScopeSet,
}

/// The token endpoint's answer on the wire (RFC 6749 §5.1). It holds a secret: no `Debug`.
#[derive(Serialize, Deserialize)]
pub struct TokenReply {
    /// The bearer.
    pub access_token: String,
    /// `Bearer`.
    pub token_type: String,
    /// Seconds. RFC 6749 only recommends it, and some issuers write it as text.
    #[serde(default, deserialize_with = "seconds", skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<u64>,
    /// Space-separated; may be left out when it is what was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
}

/// A number of seconds, as a number or as text; a fraction is cut off.
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Whole(u64),
        Number(f64),
        Text(String),
    }
    let bad = || D::Error::custom("expires_in is no number of seconds");
    let Some(written) = Option::<Written>::deserialize(deserializer)? else { return Ok(None) };
    match written {
        Written::Whole(seconds) => Ok(Some(seconds)),
        Written::Number(seconds) => {
            let whole = Duration::try_from_secs_f64(seconds).map_err(|_range| bad())?;
            Ok(Some(whole.as_secs()))
        }
        Written::Text(text) => text.trim().parse().map(Some).map_err(|_syntax| bad()),
    }
}

/// The token endpoint's refusal on the wire (RFC 6749 §5.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OauthRefusal {
    /// `invalid_client`, `invalid_scope`, `invalid_target` …
    pub error: String,
    /// A sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_description: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_answer_need_not_say_how_long_it_is_good_and_may_say_it_as_text() {
        let read = |further: &str| {
            let text = format!(r#"{{"access_token":"t","token_type":"Bearer"{further}}}"#);
            serde_json::from_str::<TokenReply>(&text).map(|reply| reply.expires_in).ok()
        };
        assert_eq!(read(""), Some(None));
        assert_eq!(read(r#","expires_in":null"#), Some(None));
        assert_eq!(read(r#","expires_in":3599"#), Some(Some(3599)));
        assert_eq!(read(r#","expires_in":3599.9"#), Some(Some(3599)));
        assert_eq!(read(r#","expires_in":"3599""#), Some(Some(3599)));
        for bad in [r#""soon""#, "-1", "[]", "1e99"] {
            assert_eq!(read(&format!(r#","expires_in":{bad}"#)), None, "{bad}");
        }
    }
}
