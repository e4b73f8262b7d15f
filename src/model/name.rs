//! Names that people give: of services and of their endpoints.
//!
//! Both are DNS labels, because a service name is used as one (`http://data-intelligence/query`) and an
//! endpoint's id appears in metrics and URLs.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The name has no characters.
    #[error("a name cannot be empty")]
    Empty,
    /// RFC 1035 §2.3.4 limits a label to 63 octets.
    #[error("a name has at most 63 characters")]
    TooLong,
    /// Outside `a-z`, `0-9` and `-`, or a `-` at an end (RFC 1123 §2.1).
    #[error("a name uses a-z, 0-9 and -, and neither begins nor ends with -")]
    Character,
}

/// Accepts exactly the DNS labels of RFC 1123 §2.1 in lower case.
fn check_label(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > 63 {
        return Err(NameError::TooLong);
    }
    let plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if !plain || text.starts_with('-') || text.ends_with('-') {
        return Err(NameError::Character);
    }
    Ok(())
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                check_label(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

label! {
    /// A service as the registry knows it, or a caller that `permissions` and `identities` name: a DNS
    /// label, so `reports` and not `Reports_v2`.
    ServiceName
}

label! {
    /// One deployment of a service: a DNS label, unique within its service.
    EndpointId
}

impl ServiceName {
    /// Whether the name belongs to infrar itself (`infrar-control`): no service may take it.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with("infrar")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn labels_are_accepted_and_anything_else_is_not() {
        for good in ["a", "data-intelligence", "x9", &"a".repeat(63)] {
            assert_eq!(good.parse::<ServiceName>().unwrap().as_str(), good);
        }
        assert_eq!("".parse::<ServiceName>(), Err(NameError::Empty));
        assert_eq!("a".repeat(64).parse::<ServiceName>(), Err(NameError::TooLong));
        for bad in ["-a", "a-", "A", "a.b", "a_b", "ä", "a b"] {
            assert_eq!(bad.parse::<ServiceName>(), Err(NameError::Character), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_name_that_parses_prints_as_it_was_written(text in ".{0,70}") {
            if let Ok(name) = text.parse::<EndpointId>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
