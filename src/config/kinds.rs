//! The kinds of text that settings are made of, each with the advice for one that is wrong.

use std::{net::SocketAddr, time::Duration};

use ipnet::IpNet;
use url::Url;

use super::{
    discovery::{dns_name, resolver},
    shape::Kind,
};
use crate::identity::PathRule;
use crate::model::{
    EndpointId, Origin, OriginError, Place, Provider, Region, Scope, ServiceName, Zone, span,
};

/// Defines a kind whose texts are all wrong in the same way.
macro_rules! kind {
    ($name:ident, $what:literal, $advice:literal, $pattern:expr, $good:expr) => {
        pub(super) static $name: Kind = Kind {
            what: $what,
            advice: $advice,
            check: |text| {
                let good: fn(&str) -> bool = $good;
                if good(text) { Ok(()) } else { Err($advice.to_owned()) }
            },
            pattern: $pattern,
        };
    };
}

const LABEL: Option<&str> = Some("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$");
const PART: Option<&str> = Some("^[a-z0-9-]+$");

kind!(NAME, "a name", "write a name of a-z, 0-9 and -, such as data-intelligence", LABEL, |text| {
    text.parse::<ServiceName>().is_ok()
});
kind!(
    ENDPOINT_ID,
    "an endpoint's id",
    "write an id of a-z, 0-9 and -, such as azure-eastus",
    LABEL,
    |text| text.parse::<EndpointId>().is_ok()
);
kind!(
    PLACE,
    "a place",
    "write provider and region, such as aws_us_east_1 or aws/us-east-1",
    Some("^[a-z0-9-]+[_/][a-z0-9_-]+$"),
    |text| text.parse::<Place>().is_ok()
);
kind!(
    PROVIDER,
    "a provider",
    "write a provider of a-z, 0-9 and -, such as aws, azure or gcp",
    PART,
    |text| text.parse::<Provider>().is_ok()
);
kind!(
    SHA256,
    "a SHA-256",
    "write the 64 hexadecimal digits that `sha256sum` prints",
    Some("^[0-9a-fA-F]{64}$"),
    |text| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
);
kind!(REGION, "a region", "write a region as its provider does, such as us-east-1", PART, |text| {
    text.parse::<Region>().is_ok()
});
kind!(
    ZONE,
    "an availability zone",
    "write a zone as its provider does, such as us-east-1a",
    PART,
    |text| text.parse::<Zone>().is_ok()
);
kind!(
    LISTEN,
    "an address with a port",
    "write an address with a port, such as 127.0.0.1:15001",
    Some(":[0-9]+$"),
    |text| text.parse::<SocketAddr>().is_ok()
);
kind!(
    WEB_URL,
    "an http or https URL",
    "write a URL, such as https://issuer.example/keys",
    Some("^https?://"),
    |text| web_url(text).is_some()
);
kind!(
    CONTROL_URL,
    "an http or https URL",
    "write https://HOST:PORT, such as https://control.example:7070",
    Some("^https?://"),
    |text| web_url(text).is_some()
);
kind!(
    SPAN,
    "a length of time",
    "write a length of time, such as 25ms, 5s or 7d (at most 366d)",
    SPAN_PATTERN,
    |text| { time(text).is_some() }
);
kind!(
    POSITIVE_SPAN,
    "a length of time above zero",
    "write a length of time above zero, such as 25ms, 5s or 7d (at most 366d)",
    SPAN_PATTERN,
    |text| time(text).is_some_and(|span| !span.is_zero())
);
kind!(
    SCOPE,
    "a scope",
    "write a scope without spaces, quotes and backslashes, such as read:data",
    Some("^[!#-\\[\\]-~]+$"),
    |text| text.parse::<Scope>().is_ok()
);
kind!(FILE, "the path of a file", "write the path of a file", None, |text| !text.is_empty()
    && !text.contains('\0'));
kind!(DIRECTORY, "the path of a folder", "write the path of a folder", None, |text| !text
    .is_empty()
    && !text.contains('\0'));
kind!(TEXT, "text", "write some text", None, |text| !text.trim().is_empty());
kind!(
    BYTES,
    "a number of bytes",
    "write a number of bytes, such as 65536, 60KiB or 10MiB",
    None,
    |text| bytes(text).is_some_and(|bytes| bytes > 0)
);
kind!(
    HEAD_BYTES,
    "a number of bytes",
    "write at least 1KiB, such as 16KiB or 60KiB: no smaller head has room for a token",
    None,
    |text| bytes(text).is_some_and(|bytes| bytes >= LEAST_HEAD)
);
kind!(
    BANDWIDTH,
    "a bandwidth",
    "write bits per second, such as 500mbps, 1gbps or 10gbps",
    None,
    |text| bandwidth(text).is_some()
);
kind!(NETWORK, "an IP network", "write a network, such as 10.0.0.0/8 or ::/0", None, |text| {
    network(text).is_some()
});
kind!(
    METHOD,
    "an HTTP method",
    "write a method in capitals, such as POST",
    Some("^[A-Z-]+$"),
    |text| { !text.is_empty() && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'-') }
);
kind!(HEADER, "a header's name", "write a header's name, such as x-session", None, |text| {
    http::HeaderName::from_bytes(text.as_bytes()).is_ok()
});
kind!(TIMESTAMP, "a moment", "write a moment in UTC, such as 2030-01-31T00:00:00Z", None, |text| {
    text.parse::<jiff::Timestamp>().is_ok()
});
kind!(
    PERCENT,
    "a percentage",
    "write a percentage from 0% to 100%, such as 2%",
    Some("^[0-9.]+%$"),
    |text| percent(text).is_some()
);
kind!(
    HEDGE_AFTER,
    "a percentile or a length of time",
    "write a percentile such as p95, or a length of time such as 50ms",
    None,
    |text| percentile(text).is_some() || time(text).is_some_and(|span| !span.is_zero())
);
kind!(AMOUNT, "an amount", "write an amount that is not negative, such as 12.50", None, |text| {
    amount(text)
});
kind!(
    DNS_NAME,
    "a name in DNS",
    "write a name in DNS, such as reports.internal.example.com",
    Some("^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?$"),
    |text| dns_name(text).is_some()
);
kind!(
    RESOLVER,
    "the address of a DNS server",
    "write the address of a DNS server, such as 10.0.0.2 or 127.0.0.1:5353",
    None,
    |text| resolver(text).is_some()
);
kind!(WORKERS, "a number of threads", "write auto, or a number from 1 to 1024", None, |text| text
    .parse::<u16>()
    .is_ok_and(|count| (1..=1024).contains(&count)));
kind!(
    TLS_VERSION,
    "a TLS version",
    "write \"1.3\" or \"1.2\"",
    Some("^1\\.[23]$"),
    |text| matches!(text, "1.3" | "1.2")
);
kind!(PATH, "a path", "write a path that begins with /", Some("^/"), |text| text.starts_with('/')
    && http::uri::PathAndQuery::try_from(text).is_ok());

pub(super) static ORIGIN: Kind = Kind {
    what: "an address",
    advice: "write an address, such as https://data.example or https://data.example:8443",
    check: |text| text.parse::<Origin>().map(drop).map_err(|error| origin_advice(&error)),
    pattern: Some("^https?://"),
};

pub(super) static INNER_ADDRESS: Kind = Kind {
    what: "an address; scheme and port default to those of url",
    advice: "write an address, such as 10.1.1.10, 10.1.1.10:8443 or https://data.internal",
    check: |text| {
        let base =
            Origin::new(crate::model::Scheme::Https, crate::model::Host::Name("host".into()), 443);
        Origin::parse_relative(text, &base).map(drop).map_err(|error| match error {
            OriginError::Shape => INNER_ADDRESS.advice.to_owned(),
            OriginError::Scheme | OriginError::Extra => origin_advice(&error),
        })
    },
    pattern: None,
};

pub(super) static APP: Kind = Kind {
    what: "the application's address",
    advice: "write the application's address, such as http://127.0.0.1:8080 (h2c:// for HTTP/2 only)",
    check: |text| match app_origin(text) {
        Ok(_origin) => Ok(()),
        Err(OriginError::Extra) => Err(origin_advice(&OriginError::Extra)),
        Err(OriginError::Shape | OriginError::Scheme) => Err(APP.advice.to_owned()),
    },
    pattern: Some("^(http|https|h2c)://"),
};

pub(super) static RULE_PATH: Kind = Kind {
    what: "a path, or a prefix ending in /*",
    advice: "write a path such as /query, or a prefix such as /v1/*",
    check: rule_path,
    pattern: Some("^/[^*]*\\*?$"),
};

const SPAN_PATTERN: Option<&str> = Some("^[0-9]");

/// The longest time a setting may mean: adding it to any moment cannot overflow.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);

/// The smallest head that a listener may be told to take: below it no call with a token would get in.
const LEAST_HEAD: u64 = 1024;

fn origin_advice(error: &OriginError) -> String {
    match error {
        OriginError::Shape => ORIGIN.advice,
        OriginError::Scheme => "begin with https:// or http://",
        OriginError::Extra => {
            "leave out path, query and user: write https://host or https://host:port"
        }
    }
    .to_owned()
}

fn rule_path(text: &str) -> Result<(), String> {
    let body = text.strip_suffix("/*").unwrap_or(text);
    if body.contains('*') {
        return Err("put * only at the end, after a slash: /v1/*".to_owned());
    }
    let plain = if text == "/*" { "/" } else { body };
    if !plain.starts_with('/') || plain.contains(['?', '#']) {
        return Err(RULE_PATH.advice.to_owned());
    }
    // Requests are compared after normalising, so a rule in another form could never match.
    let odd = plain.contains("//")
        || plain.split('/').any(|part| matches!(part, "." | ".."))
        || plain.bytes().any(|b| b <= b' ' || b == 0x7f || b == b'\\');
    if odd {
        return Err("write the path in its plain form, without //, /./, /../ and spaces".to_owned());
    }
    // The last word has who compares: what it cannot read would only be found at the start.
    text.parse::<PathRule>().map(drop).map_err(|fault| {
        let why = std::error::Error::source(&fault)
            .map_or_else(|| fault.to_string(), ToString::to_string);
        format!("write a path that can be compared ({why})")
    })
}

/// The application's address; `h2c://` is HTTP with HTTP/2 only.
pub(super) fn app_origin(text: &str) -> Result<Origin, OriginError> {
    match text.strip_prefix("h2c://") {
        Some(rest) => format!("http://{rest}").parse(),
        None => text.parse(),
    }
}

/// A length of time of at most a year.
pub(super) fn time(text: &str) -> Option<Duration> {
    span::parse(text).ok().filter(|span| *span <= LONGEST)
}

/// An http or https URL with a host, and without a user.
pub(super) fn web_url(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.fragment().is_none();
    plain.then_some(url)
}

/// `10.0.0.0/8`, or a single address.
pub(super) fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<std::net::IpAddr>().ok().map(IpNet::from))
}

/// `65536`, `60KiB`, `10MiB`, `1GiB`, `10MB` …
pub(super) fn bytes(text: &str) -> Option<u64> {
    let units: [(&str, u64); 6] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
    ];
    scaled(text, &units)
}

/// Bits per second: `500mbps`, `1gbps`.
pub(super) fn bandwidth(text: &str) -> Option<u64> {
    let units: [(&str, u64); 4] = [
        ("tbps", 1_000_000_000_000),
        ("gbps", 1_000_000_000),
        ("mbps", 1_000_000),
        ("kbps", 1_000),
    ];
    let lower = text.to_ascii_lowercase();
    scaled(&lower, &units).filter(|bits| *bits > 0 && lower.ends_with("bps"))
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (digits, unit) = units
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim_end(), *unit)))
        .unwrap_or((text, 1));
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if plain { digits.parse::<u64>().ok()?.checked_mul(unit) } else { None }
}

/// `2%` as 2.0.
pub(super) fn percent(text: &str) -> Option<f64> {
    let number: f64 = text.strip_suffix('%')?.trim_end().parse().ok()?;
    (0.0..=100.0).contains(&number).then_some(number)
}

/// `p95` as 95.0.
pub(super) fn percentile(text: &str) -> Option<f64> {
    let number: f64 = text.strip_prefix('p')?.parse().ok()?;
    (number > 0.0 && number < 100.0).then_some(number)
}

/// A decimal number that is not negative.
fn amount(text: &str) -> bool {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.len() <= 20 && digits(whole) && digits(part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_and_bandwidths_have_units() {
        assert_eq!(bytes("60KiB"), Some(61_440));
        assert_eq!(bytes("10 MB"), Some(10_000_000));
        assert_eq!(bandwidth("1gbps"), Some(1_000_000_000));
        for bad in ["", "KiB", "1.5MiB", "-1", "99999999999GiB", "1 2"] {
            assert_eq!(bytes(bad), None, "{bad:?}");
        }
        assert_eq!(bandwidth("1000"), None);
    }

    #[test]
    fn a_rule_names_a_path_in_its_plain_form() {
        for good in ["/", "/*", "/query", "/v1/*", "/a/b"] {
            assert_eq!(rule_path(good), Ok(()), "{good:?}");
        }
        for bad in [
            "", "query", "/a*", "/*/b", "/a//b", "/a/../b", "/a b", "/a?b", "/a%zz", "/a%00",
            "/%252e",
        ] {
            assert!(rule_path(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_time_beyond_a_year_is_refused() {
        assert!(time("366d").is_some());
        assert!(time("367d").is_none());
        assert!(time("99999999999d").is_none());
    }

    proptest! {
        #[test]
        fn no_text_panics_a_kind(text in any::<String>()) {
            for kind in [
                &NAME, &PLACE, &LISTEN, &WEB_URL, &SPAN, &BYTES, &BANDWIDTH, &NETWORK, &PERCENT,
                &HEDGE_AFTER, &AMOUNT, &ORIGIN, &INNER_ADDRESS, &APP, &RULE_PATH, &PATH,
            ] {
                let told = (kind.check)(&text);
                prop_assert!(told.is_ok() || !kind.advice.is_empty());
            }
        }
    }
}
