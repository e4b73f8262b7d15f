//! Authority → service. A name matches as `NAME`, `NAME.infrar`, `NAME.infrar.internal` or `NAME.localhost`; a port
//! does not matter.

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

/// The authority that a request names: that of an absolute target, else of `host`; empty where it names none. In lower
/// case, as hosts are compared (RFC 9110 §4.2.3).
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
    if !text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Ok(named);
    }
    HeaderValue::try_from(text.to_ascii_lowercase()).map_err(|_source| no_host)
}

/// The host part of an authority: without port, brackets kept off, and without the final dot of an absolute name.
#[must_use]
pub(super) fn host(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    let host = authority.split(':').next().unwrap_or(authority);
    host.strip_suffix('.').unwrap_or(host)
}

/// The name that a host may mean, without the suffixes; not yet known to exist.
#[must_use]
pub(super) fn name(host: &str) -> &str {
    SUFFIXES.iter().find_map(|suffix| host.strip_suffix(suffix)).unwrap_or(host)
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
        ] {
            assert_eq!(name(host(authority)), "data", "{authority}");
        }
        assert_eq!(host("[::1]:8080"), "::1");
        assert_eq!(name(host("data.example.com")), "data.example.com");
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
    fn a_host_is_read_in_lower_case_and_what_is_none_is_refused() {
        let named = |uri: &str, host: &'static str| {
            let mut fields = Fields::new();
            fields.append(header::HOST, HeaderValue::from_static(host));
            authority(&uri.parse().unwrap(), &fields)
        };
        assert_eq!(named("/", "Data.Infrar:80").unwrap(), "data.infrar:80");
        assert_eq!(named("http://DATA/x", "other").unwrap(), "data");
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
            let _named = name(host(&text));
        }
    }
}
