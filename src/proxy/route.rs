//! Authority → service. A name matches as `NAME`, `NAME.infrar`, `NAME.infrar.internal` or `NAME.localhost`; a port
//! does not matter.

use std::borrow::Cow;

use http::{HeaderValue, Uri, header};

use crate::{model::ServiceName, proxy::reject::Rejection, wire::Fields};

/// The suffixes under which a service's name is known, the longest first.
const SUFFIXES: [&str; 3] = [".infrar.internal", ".infrar", ".localhost"];
/// So many names are offered to whoever misspelt one.
const OFFERED: usize = 3;

/// A DNS name is no longer (RFC 1035 §2.3.4).
const LONGEST_HOST: usize = 253;
/// Nor is one of its labels, and so the name of a service.
const LONGEST_NAME: usize = 63;

/// The authority that a request names: that of an absolute target, else of `host`; empty where it names none.
///
/// # Errors
/// [`Rejection::BadRequest`] for what is no authority, or of another scheme than HTTP.
pub(super) fn authority(uri: &Uri, fields: &Fields) -> Result<HeaderValue, Rejection> {
    if uri.scheme().is_some_and(|scheme| !matches!(scheme.as_str(), "http" | "https")) {
        return Err(Rejection::BadRequest("the scheme of a target is http or https"));
    }
    let no_host = Rejection::BadRequest("the host is no host");
    let named = match uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => Some(fields.get(&header::HOST).cloned().unwrap_or(HeaderValue::from_static(""))),
    };
    let named = named.ok_or_else(|| no_host.clone())?;
    let text = named.to_str().map_err(|_source| no_host.clone())?;
    // §4.2.4: a user in a target is an old trick, and passwords do not belong there.
    if text.contains('@') {
        return Err(no_host);
    }
    if host(text).len() > LONGEST_HOST {
        return Err(Rejection::BadRequest("the host is longer than a name can be"));
    }
    Ok(named)
}

/// The host part of an authority: without port, an address of IPv6 in its brackets, an absolute name without its final dot.
#[must_use]
pub(super) fn host(authority: &str) -> &str {
    let authority = authority.rsplit_once('@').map_or(authority, |(_user, rest)| rest);
    if authority.starts_with('[') {
        return authority.split_inclusive(']').next().unwrap_or(authority);
    }
    let host = authority.split(':').next().unwrap_or(authority);
    host.strip_suffix('.').unwrap_or(host)
}

/// A host without the suffixes.
fn name(host: &str) -> &str {
    SUFFIXES.iter().find_map(|suffix| host.strip_suffix(suffix)).unwrap_or(host)
}

/// The name of a service that an authority may mean; not yet known to exist.
#[must_use]
pub(super) fn service(authority: &str) -> Cow<'_, str> {
    match lower(host(authority)) {
        Cow::Borrowed(host) => Cow::Borrowed(name(host)),
        Cow::Owned(host) => Cow::Owned(name(&host).to_owned()),
    }
}

/// Hosts mean the same in either case (RFC 9110 §4.2.3); we know them in lower case.
#[must_use]
pub(super) fn lower(host: &str) -> Cow<'_, str> {
    if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    }
}

/// The known names nearest to what was asked for, the nearest first; nothing that is far off.
pub(super) fn nearest<'a>(
    asked: &str,
    known: impl Iterator<Item = &'a ServiceName>,
) -> Vec<String> {
    let asked = name(asked);
    if asked.is_empty() || asked.len() > LONGEST_NAME {
        return Vec::new();
    }
    let mut near: Vec<(f64, &ServiceName)> = known
        .map(|name| (strsim::jaro_winkler(asked, name.as_str()), name))
        .filter(|(likeness, name)| *likeness > 0.8 || name.as_str().contains(asked))
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    near.into_iter().take(OFFERED).map(|(_, name)| name.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_service_is_known_under_four_names() {
        for authority in [
            "data",
            "data:80",
            "data.infrar",
            "data.infrar.internal:8080",
            "data.localhost",
            "data.",
            "u:p@data",
            "Data.Infrar:80",
        ] {
            assert_eq!(service(authority), "data", "{authority}");
        }
        assert_eq!(service("[::1]:8080"), "[::1]");
        // An address has no other names.
        assert_eq!(service("[data.infrar]"), "[data.infrar]");
        assert_eq!(service("data.example.com"), "data.example.com");
    }

    #[test]
    fn who_misspells_a_name_is_told_the_nearest() {
        let known: Vec<ServiceName> =
            ["data-intelligence", "web-application", "reports"].map(|n| n.parse().unwrap()).into();
        assert_eq!(nearest("data-inteligence", known.iter()), ["data-intelligence"]);
        assert_eq!(nearest("report.infrar", known.iter()), ["reports"]);
        assert!(nearest("zzz", known.iter()).is_empty());
        assert!(nearest("", known.iter()).is_empty());
        assert!(nearest(&"reports".repeat(10), known.iter()).is_empty());
    }

    #[test]
    fn what_is_no_host_is_refused() {
        let named = |uri: &str, host: &'static str| {
            let mut fields = Fields::new();
            fields.append(header::HOST, HeaderValue::from_static(host));
            authority(&uri.parse().unwrap(), &fields)
        };
        assert_eq!(named("/", "Data.Infrar:80").unwrap(), "Data.Infrar:80");
        assert_eq!(named("http://data/x", "other").unwrap(), "data");
        assert_eq!(authority(&Uri::default(), &Fields::new()).unwrap(), "");
        for (uri, host) in [("http://u:p@data/", "data"), ("/", "u@data"), ("ftp://data/", "data")]
        {
            assert!(matches!(named(uri, host), Err(Rejection::BadRequest(_))), "{uri} {host}");
        }
        let long = HeaderValue::try_from("a".repeat(254)).unwrap();
        let mut fields = Fields::new();
        fields.append(header::HOST, long);
        assert!(authority(&Uri::default(), &fields).is_err());
    }

    proptest! {
        #[test]
        fn no_authority_makes_it_panic(text in ".{0,60}") {
            let _named = service(&text);
        }
    }
}
