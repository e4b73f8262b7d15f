//! The token endpoint: who asks, for which callee, with which scopes, and what does `permissions` say?
//!
//! Only `client_credentials` (RFC 6749 §4.4) is spoken. A caller proves itself by HTTP Basic or in the form; the
//! callee is named by `audience` or by `resource` (RFC 8707).

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{
    HeaderMap,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;
use tokio::time::Instant;
use url::{Url, form_urlencoded};

use crate::{
    api::TokenReply,
    control::{registry::Version, reject::TokenRefusal, throttle::Throttle},
    identity::{Mint, Strictness},
    model::{Scope, ScopeSet, ServiceName},
    runtime::sha256,
};

/// What stands behind a service's name in `resource=https://NAME.infrar.internal`.
const RESOURCE_SUFFIX: &str = ".infrar.internal";

/// One question to the token endpoint, read but not yet believed.
pub(super) struct Question {
    claimed: Claimed,
    form: BTreeMap<String, String>,
}

/// Who asks, and how long the answer is to be held, whatever it is.
pub(super) struct Proof {
    pub(super) caller: Result<ServiceName, TokenRefusal>,
    pub(super) hold: Duration,
}

/// What the answer depends on besides the question.
pub(super) struct Desk<'a> {
    pub(super) version: &'a Version,
    pub(super) issuer: &'a str,
    pub(super) mint: &'a Mint,
    pub(super) throttle: &'a Throttle,
    pub(super) now: Timestamp,
}

/// A secret and the name it is said to belong to.
struct Claimed {
    client_id: String,
    /// As it arrived and, for HTTP Basic, form-decoded: RFC 6749 §2.3.1 asks for that, plain clients do not.
    secrets: Vec<SecretString>,
}

impl Question {
    /// Reads the one grant that is spoken here.
    pub(super) fn read(headers: &HeaderMap, body: &[u8]) -> Result<Self, TokenRefusal> {
        let form = form(headers, body)?;
        match form.get("grant_type").map(String::as_str) {
            None => return Err(TokenRefusal::Request("grant_type is missing")),
            Some("client_credentials") => {}
            Some(_other) => return Err(TokenRefusal::GrantType),
        }
        Ok(Self { claimed: claimed(headers, &form)?, form })
    }
}

impl Desk<'_> {
    /// Answers the question of a caller that has proved itself.
    pub(super) fn grant(
        &self,
        caller: &ServiceName,
        question: &Question,
    ) -> Result<TokenReply, TokenRefusal> {
        // Is it still an identity, after what its answer was held for?
        if !self.version.knows(caller) {
            return Err(TokenRefusal::Client);
        }
        // For which callee, and what may the caller do there?
        let callee = callee(&question.form)?;
        let wanted = wanted(&question.form)?;
        let scopes = match self.scopes(caller, &callee, wanted.as_ref()) {
            Ok(scopes) => scopes,
            // Is it too early to say no?
            Err(refusal) => self.learned(refusal, caller, &callee, wanted.as_ref())?,
        };
        let minted =
            self.mint.sign(self.issuer, caller, &callee, &scopes, self.now).map_err(|error| {
                tracing::error!(error = &error as &dyn std::error::Error, "no token was signed");
                TokenRefusal::Signing
            })?;
        tracing::debug!(%caller, callee, %scopes, jti = minted.id, "token granted");
        Ok(TokenReply {
            access_token: minted.token.expose_secret().to_owned(),
            token_type: "Bearer".to_owned(),
            expires_in: Some(minted.expires_in.as_secs()),
            scope: Some(scopes.to_string()),
        })
    }

    /// The caller, when its secret is right. Takes the same time for unknown names and wrong secrets.
    ///
    /// The secret is compared before anything is counted: whoever has the right one is never turned away, however
    /// many wrong ones arrive under its name from its own address.
    pub(super) fn caller(&self, question: &Question, peer: IpAddr) -> Proof {
        let claimed = &question.claimed;
        let name: Option<ServiceName> = claimed.client_id.parse().ok();
        let digest = name.as_ref().and_then(|name| self.version.secret(name));
        // For an unknown name something is compared all the same; the answer is no whatever comes out.
        let expected = digest.unwrap_or(&[0; 32]);
        let mut right = subtle::Choice::from(0);
        for secret in &claimed.secrets {
            right |= sha256(secret.expose_secret().as_bytes()).ct_eq(expected);
        }
        let known = name.filter(|_| digest.is_some());
        let (pair, now) = (Throttle::pair(known.clone(), peer), Instant::now());
        let caller = known.filter(|_| bool::from(right)).ok_or(TokenRefusal::Client);
        if caller.is_err() {
            self.throttle.failed(pair.clone(), now);
        }
        Proof { caller, hold: self.throttle.hold(&pair, now) }
    }

    /// What `permissions` grant: everything, or what was asked for if all of that is granted.
    fn scopes(
        &self,
        caller: &ServiceName,
        callee: &str,
        wanted: Option<&ScopeSet>,
    ) -> Result<ScopeSet, TokenRefusal> {
        let granted = self.version.grants(caller, callee).ok_or_else(|| {
            TokenRefusal::NotGranted { caller: caller.clone(), callee: callee.to_owned() }
        })?;
        let Some(wanted) = wanted else { return Ok(granted) };
        if granted.covers(wanted) {
            return Ok(wanted.clone());
        }
        let missing: Vec<&str> =
            wanted.iter().filter(|scope| !granted.contains(scope)).map(Scope::as_str).collect();
        Err(TokenRefusal::ScopeNotGranted {
            caller: caller.clone(),
            callee: callee.to_owned(),
            missing: missing.join(" "),
        })
    }

    /// While the project learns, what `refusal` would keep back at a service of the project: the scopes that exist
    /// there, as far as they were asked for. The log says what would have been refused. The control plane's own API
    /// never learns.
    fn learned(
        &self,
        refusal: TokenRefusal,
        caller: &ServiceName,
        callee: &str,
        wanted: Option<&ScopeSet>,
    ) -> Result<ScopeSet, TokenRefusal> {
        let Some(project) = self.version.book.project() else { return Err(refusal) };
        let strictness = Strictness::at(&project.mode, self.now);
        let service = project.services.get(callee);
        let (Strictness::Learn, Some(service)) = (strictness, service) else { return Err(refusal) };
        let listed = &service.scopes;
        let scopes = wanted.map_or_else(|| listed.clone(), |wanted| wanted.intersection(listed));
        tracing::info!(
            %caller, callee, %scopes, would_be_refused = %refusal,
            "a token that enforcing permissions would refuse"
        );
        Ok(scopes)
    }
}

/// The form's fields. RFC 6749 §3.2: none may be sent twice, one without a value counts as not sent.
fn form(headers: &HeaderMap, body: &[u8]) -> Result<BTreeMap<String, String>, TokenRefusal> {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
        return Err(TokenRefusal::Request("the body is a form: application/x-www-form-urlencoded"));
    }
    let mut form = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(body) {
        if value.is_empty() {
            continue;
        }
        if form.contains_key(name.as_ref()) {
            return Err(match name.as_ref() {
                // One token is for one callee; RFC 8707 would allow several.
                "resource" | "audience" => TokenRefusal::Targets,
                _ => TokenRefusal::Request("a field is there twice"),
            });
        }
        form.insert(name.into_owned(), value.into_owned());
    }
    Ok(form)
}

/// The name and secret of a request, from exactly one place (RFC 6749 §2.3).
fn claimed(headers: &HeaderMap, form: &BTreeMap<String, String>) -> Result<Claimed, TokenRefusal> {
    let posted = form.get("client_secret");
    let Some(value) = headers.get(AUTHORIZATION) else {
        let (Some(client_id), Some(secret)) = (form.get("client_id"), posted) else {
            return Err(TokenRefusal::Client);
        };
        let secrets = vec![SecretString::from(secret.clone())];
        return Ok(Claimed { client_id: client_id.clone(), secrets });
    };
    if posted.is_some() {
        return Err(TokenRefusal::Request(
            "the secret goes by HTTP Basic or in the form, not both",
        ));
    }
    let basic = value.to_str().ok().and_then(|text| text.split_once(' '));
    let (_, encoded) = basic
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"))
        .ok_or(TokenRefusal::Client)?;
    let pair = STANDARD.decode(encoded.trim()).ok().and_then(|pair| String::from_utf8(pair).ok());
    let pair = pair.ok_or(TokenRefusal::Client)?;
    let (client_id, secret) = pair.split_once(':').ok_or(TokenRefusal::Client)?;
    // A name is a DNS label, which form-encoding leaves as it is.
    if form.get("client_id").is_some_and(|posted| posted != client_id) {
        return Err(TokenRefusal::Request("client_id is not the name in HTTP Basic"));
    }
    let secrets = vec![SecretString::from(secret), SecretString::from(form_decoded(secret))];
    Ok(Claimed { client_id: client_id.to_owned(), secrets })
}

fn form_decoded(text: &str) -> String {
    // `&` and `=` would end the value; in a well-formed one they are escaped.
    let escaped = text.replace('&', "%26").replace('=', "%3D");
    let pair = form_urlencoded::parse(escaped.as_bytes()).next();
    pair.map(|(value, _)| value.into_owned()).unwrap_or_default()
}

/// The one callee that is named.
fn callee(form: &BTreeMap<String, String>) -> Result<String, TokenRefusal> {
    let resource = form.get("resource").map(|text| {
        let url = Url::parse(text).ok().filter(|url| {
            // RFC 8707 §2: absolute, no fragment. A path would name a part of a service; there is none.
            url.scheme() == "https"
                && url.path() == "/"
                && url.query().is_none()
                && url.fragment().is_none()
        });
        let name = url
            .as_ref()
            .and_then(Url::host_str)
            .and_then(|host| host.strip_suffix(RESOURCE_SUFFIX));
        name.map(str::to_owned).ok_or(TokenRefusal::TargetMissing)
    });
    match (form.get("audience"), resource.transpose()?) {
        (Some(audience), None) => Ok(audience.clone()),
        (None, Some(resource)) => Ok(resource),
        (Some(audience), Some(resource)) if *audience == resource => Ok(resource),
        (Some(_), Some(_)) => Err(TokenRefusal::Targets),
        (None, None) => Err(TokenRefusal::TargetMissing),
    }
}

/// The scopes that were asked for; `None` when nothing was said.
fn wanted(form: &BTreeMap<String, String>) -> Result<Option<ScopeSet>, TokenRefusal> {
    let text = form.get("scope");
    text.map(|text| ScopeSet::parse_list(text)).transpose().map_err(TokenRefusal::ScopeSyntax)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_callee_is_named_by_audience_or_by_resource() {
        let resource = "https://reports.infrar.internal";
        for pairs in [
            &[("audience", "reports")][..],
            &[("resource", resource)],
            &[("audience", "reports"), ("resource", "https://reports.infrar.internal/")],
        ] {
            assert_eq!(callee(&fields(pairs)).unwrap(), "reports");
        }
        for pairs in [
            &[][..],
            &[("audience", "other"), ("resource", resource)],
            &[("resource", "http://reports.infrar.internal")],
            &[("resource", "https://reports.example")],
            &[("resource", "https://reports.infrar.internal/part")],
            &[("resource", "reports")],
        ] {
            assert!(callee(&fields(pairs)).is_err(), "{pairs:?}");
        }
    }

    #[test]
    fn a_basic_secret_is_taken_encoded_or_as_it_is() {
        let mut headers = HeaderMap::new();
        let header = format!("Basic {}", STANDARD.encode("web:a+b%3D&c="));
        headers.insert(AUTHORIZATION, header.parse().unwrap());
        let claimed = claimed(&headers, &fields(&[])).unwrap();
        assert_eq!(claimed.client_id, "web");
        let secrets: Vec<&str> = claimed.secrets.iter().map(ExposeSecret::expose_secret).collect();
        assert_eq!(secrets, ["a+b%3D&c=", "a b=&c="]);
    }

    #[test]
    fn a_secret_in_two_places_is_refused() {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, "Basic d2ViOng=".parse().unwrap());
        let form = fields(&[("client_secret", "x")]);
        assert!(matches!(claimed(&headers, &form), Err(TokenRefusal::Request(_))));
    }

    proptest! {
        #[test]
        fn no_form_or_header_panics(body: Vec<u8>, header: Vec<u8>) {
            let mut headers = HeaderMap::new();
            let kind = "application/x-www-form-urlencoded".parse().unwrap();
            headers.insert(CONTENT_TYPE, kind);
            if let Ok(value) = http::HeaderValue::from_bytes(&header) {
                headers.insert(AUTHORIZATION, value);
            }
            if let Ok(form) = form(&headers, &body) {
                let _named = callee(&form);
                let _claimed = claimed(&headers, &form);
            }
        }
    }
}
