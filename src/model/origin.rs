//! A network address as people write it: scheme, host and port, without a path.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use url::Url;

/// Why an address was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OriginError {
    /// Not an absolute URL.
    #[error("an address is written https://host or https://host:port")]
    Shape,
    /// Neither `http` nor `https`.
    #[error("the scheme is http or https")]
    Scheme,
    /// A path, query, fragment or user name.
    #[error("an address has no path, query, fragment or user")]
    Extra,
}

/// Whether TLS is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    /// Plaintext.
    Http,
    /// TLS.
    Https,
}

impl Scheme {
    /// `http` or `https`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// The port that is meant when none is written.
    #[must_use]
    pub fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// A host: a name to resolve, or an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// A DNS name in lower case.
    Name(Arc<str>),
    /// An IP address.
    Address(IpAddr),
}

impl Host {
    /// Whether it can only be this machine.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Name(name) => name.as_ref() == "localhost" || name.ends_with(".localhost"),
            Self::Address(address) => address.is_loopback(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// Scheme, host and port of an endpoint. Printed without the scheme's own port, as a `Host` header is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Origin {
    scheme: Scheme,
    host: Host,
    port: u16,
}

impl Origin {
    /// An address from its parts.
    #[must_use]
    pub fn new(scheme: Scheme, host: Host, port: u16) -> Self {
        Self { scheme, host, port }
    }

    /// Reads an address that may leave out scheme and port: those of `base` then hold (`10.1.1.10`).
    ///
    /// # Errors
    /// [`OriginError`] when what is there is no address.
    pub fn parse_relative(text: &str, base: &Self) -> Result<Self, OriginError> {
        if text.contains("://") {
            return text.parse();
        }
        let mut origin: Self = format!("{}://{text}", base.scheme.as_str()).parse()?;
        let bare = text.strip_suffix('/').unwrap_or(text);
        let written = bare.rsplit_once(':').is_some_and(|(head, port)| {
            !port.is_empty()
                && port.bytes().all(|b| b.is_ascii_digit())
                && (!head.contains(':') || head.ends_with(']'))
        });
        if !written {
            origin.port = base.port;
        }
        Ok(origin)
    }

    /// Whether TLS is spoken.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The host to resolve or connect to.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The port, written or implied.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What a `Host` header says: the port only when it is not the scheme's own.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.port == self.scheme.default_port() {
            self.host.to_string()
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Origin {
    type Err = OriginError;
    fn from_str(text: &str) -> Result<Self, OriginError> {
        // `url` would leave out line breaks and tabs, and read `\` as `/`.
        if text.bytes().any(|byte| byte <= b' ' || matches!(byte, b'\\' | 0x7f)) {
            return Err(OriginError::Shape);
        }
        let url = Url::parse(text).map_err(|_source| OriginError::Shape)?;
        let scheme = match url.scheme() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return Err(OriginError::Scheme),
        };
        let bare = matches!(url.path(), "" | "/")
            && url.query().is_none()
            && url.fragment().is_none()
            && url.username().is_empty()
            && url.password().is_none();
        if !bare {
            return Err(OriginError::Extra);
        }
        let host = match url.host().ok_or(OriginError::Shape)? {
            url::Host::Domain(name) => Host::Name(name.to_ascii_lowercase().into()),
            url::Host::Ipv4(address) => Host::Address(address.into()),
            url::Host::Ipv6(address) => Host::Address(address.into()),
        };
        let port = url.port().unwrap_or_else(|| scheme.default_port());
        Ok(Self { scheme, host, port })
    }
}

impl TryFrom<String> for Origin {
    type Error = OriginError;
    fn try_from(text: String) -> Result<Self, OriginError> {
        text.parse()
    }
}

impl From<Origin> for String {
    fn from(origin: Origin) -> Self {
        origin.to_string()
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_prints_without_the_port_of_its_scheme() {
        for (written, printed) in [
            ("https://Data.Example:443", "https://data.example"),
            ("https://data.example:8443/", "https://data.example:8443"),
            ("http://[::1]:80", "http://[::1]"),
            ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
        ] {
            assert_eq!(written.parse::<Origin>().unwrap().to_string(), printed);
        }
    }

    #[test]
    fn paths_users_and_other_schemes_are_refused() {
        assert_eq!("https://a/b".parse::<Origin>(), Err(OriginError::Extra));
        assert_eq!("https://u@a".parse::<Origin>(), Err(OriginError::Extra));
        assert_eq!("ftp://a".parse::<Origin>(), Err(OriginError::Scheme));
        assert_eq!("data.example".parse::<Origin>(), Err(OriginError::Shape));
        assert_eq!("https://data\n.example".parse::<Origin>(), Err(OriginError::Shape));
        assert_eq!("https:\\\\data.example".parse::<Origin>(), Err(OriginError::Shape));
    }

    #[test]
    fn an_inner_address_takes_scheme_and_port_from_the_url() {
        let base: Origin = "https://data.example:8443".parse().unwrap();
        for (written, printed) in [
            ("10.1.1.10", "https://10.1.1.10:8443"),
            ("10.1.1.10:9000", "https://10.1.1.10:9000"),
            ("[fd00::1]", "https://[fd00::1]:8443"),
            ("[fd00::1]:443", "https://[fd00::1]"),
            ("10.1.1.10:443/", "https://10.1.1.10"),
            ("http://10.1.1.10", "http://10.1.1.10"),
        ] {
            assert_eq!(Origin::parse_relative(written, &base).unwrap().to_string(), printed);
        }
    }
}
