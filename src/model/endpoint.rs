//! One deployment of a service.

use serde::{Deserialize, Serialize};

use crate::model::{EndpointId, NetworkMode, Origin, Place, Zone};

/// Whether an endpoint takes part in the choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointState {
    /// Takes its share of requests.
    #[default]
    Active,
    /// Chosen only when no active endpoint is left.
    Standby,
    /// Finishes what it has, gets nothing new while another is left.
    Draining,
    /// As `draining`, and on its way out.
    Deprecated,
}

impl EndpointState {
    /// The state as files write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Standby => "standby",
            Self::Draining => "draining",
            Self::Deprecated => "deprecated",
        }
    }
}

/// How a caller proves itself to an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthMethod {
    /// A token of the project in `authorization`.
    #[default]
    BearerToken,
    /// Not at all.
    None,
}

/// One deployment of a service: id, one address per network mode, place, state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Unique within the service.
    pub id: EndpointId,
    /// The address in mode `public`, and the host, SNI and certificate name in every mode.
    pub url: Origin,
    /// Where `url` leads, when a source has looked its host up itself: what is dialled in its place. Host, SNI and
    /// certificate name stay those of `url`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found_at: Option<Origin>,
    /// The address in mode `vpn`.
    pub internal_url: Option<Origin>,
    /// The address in mode `private_peering`.
    pub private_url: Option<Origin>,
    /// Provider and region.
    pub place: Place,
    /// Availability zone, where it is known.
    pub zone: Option<Zone>,
    /// How a caller proves itself.
    pub auth_method: AuthMethod,
    /// Share among unequal weights; equal weights leave the choice to the policy.
    pub weight: u32,
    /// Whether it takes part in the choice.
    pub state: EndpointState,
}

impl Endpoint {
    /// The address that another place uses in `mode`, if the endpoint has one.
    #[must_use]
    pub fn address(&self, mode: NetworkMode) -> Option<&Origin> {
        match mode {
            NetworkMode::Public => Some(self.public_address()),
            NetworkMode::Vpn => self.internal_url.as_ref(),
            NetworkMode::PrivatePeering => self.private_url.as_ref(),
        }
    }

    /// What is dialled in mode `public`.
    #[must_use]
    pub fn public_address(&self) -> &Origin {
        self.found_at.as_ref().unwrap_or(&self.url)
    }

    /// The address and the mode it belongs to for a caller in the same place: `private_url`, else `internal_url`,
    /// else `url`.
    #[must_use]
    pub fn local_address(&self) -> (&Origin, NetworkMode) {
        let private = self.private_url.as_ref().map(|origin| (origin, NetworkMode::PrivatePeering));
        let internal = || self.internal_url.as_ref().map(|origin| (origin, NetworkMode::Vpn));
        private.or_else(internal).unwrap_or_else(|| (self.public_address(), NetworkMode::Public))
    }
}
