//! Where things run and how two places reach each other.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// Why a place was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Neither `provider_region` nor `provider/region`.
    #[error("a place is written aws_us_east_1 or aws/us-east-1")]
    Shape,
    /// A part has other characters than `a-z`, `0-9` and `-`.
    #[error("a provider, region or zone uses a-z, 0-9 and -")]
    Character,
}

fn check_part(text: &str) -> Result<(), PlaceError> {
    let plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if text.is_empty() || !plain { Err(PlaceError::Character) } else { Ok(()) }
}

macro_rules! part {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text as the provider writes it.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = PlaceError;
            fn from_str(text: &str) -> Result<Self, PlaceError> {
                check_part(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = PlaceError;
            fn try_from(text: String) -> Result<Self, PlaceError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(part: $name) -> Self {
                part.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

part! {
    /// A cloud provider: `aws`, `azure`, `gcp`, or any other the price book knows.
    Provider
}
part! {
    /// A provider's region, as the provider writes it: `us-east-1`.
    Region
}
part! {
    /// An availability zone within a region.
    Zone
}

/// Provider and region. Written `aws_us_east_1` (the first `_` ends the provider, the others are `-`) or
/// `aws/us-east-1`; printed in the first form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Place {
    provider: Provider,
    region: Region,
}

impl Place {
    /// The place of a provider's region.
    #[must_use]
    pub fn new(provider: Provider, region: Region) -> Self {
        Self { provider, region }
    }

    /// Who runs it.
    #[must_use]
    pub fn provider(&self) -> &Provider {
        &self.provider
    }

    /// Where.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// The place as one DNS label, the default id of an endpoint there: `aws-us-east-1`.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}-{}", self.provider, self.region)
    }
}

impl FromStr for Place {
    type Err = PlaceError;
    fn from_str(text: &str) -> Result<Self, PlaceError> {
        if let Some((provider, region)) = text.split_once('/') {
            return Ok(Self { provider: provider.parse()?, region: region.parse()? });
        }
        let (provider, region) = text.split_once('_').ok_or(PlaceError::Shape)?;
        Ok(Self { provider: provider.parse()?, region: region.replace('_', "-").parse()? })
    }
}

impl TryFrom<String> for Place {
    type Error = PlaceError;
    fn try_from(text: String) -> Result<Self, PlaceError> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.provider, self.region.as_str().replace('-', "_"))
    }
}

/// How two places reach each other. An endpoint has one address per mode.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// Over the internet, to `url`.
    #[default]
    Public,
    /// Through a VPN, to `internal_url`.
    Vpn,
    /// Over a private interconnect or peering, to `private_url`.
    PrivatePeering,
}

impl NetworkMode {
    /// The mode as files and metrics write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Vpn => "vpn",
            Self::PrivatePeering => "private_peering",
        }
    }
}

impl fmt::Display for NetworkMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_name_the_same_place() {
        let long: Place = "aws_us_east_1".parse().unwrap();
        let short: Place = "aws/us-east-1".parse().unwrap();
        assert_eq!(long, short);
        assert_eq!(long.to_string(), "aws_us_east_1");
        assert_eq!(long.label(), "aws-us-east-1");
        assert_eq!("azure_eastus".parse::<Place>().unwrap().region().as_str(), "eastus");
    }

    #[test]
    fn what_is_no_place_is_refused() {
        assert_eq!("aws".parse::<Place>(), Err(PlaceError::Shape));
        for bad in ["_x", "aws_", "AWS_us", "aws/us east", "/"] {
            assert!(bad.parse::<Place>().is_err(), "{bad:?}");
        }
    }
}
