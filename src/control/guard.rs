//! Who asks the API, and may they?

use http::{HeaderMap, header::AUTHORIZATION};
use jiff::Timestamp;
use secrecy::SecretString;

use crate::{
    api::CONTROL_AUDIENCE,
    control::{registry::Version, reject::Rejection},
    identity::{Mint, MintError, OwnClaims},
    model::{Scope, ServiceName},
};

/// The longest token that is looked at.
const TOKEN_LIMIT: usize = 16 * 1024;

/// What a token is held against.
pub(super) struct Guard<'a> {
    pub(super) version: &'a Version,
    pub(super) mint: &'a Mint,
    pub(super) issuer: &'a str,
    pub(super) now: Timestamp,
}

impl Guard<'_> {
    /// Who asks with a token of our own for `infrar-control`, as long as the token's identity is there.
    pub(super) fn who(&self, headers: &HeaderMap) -> Result<OwnClaims, Rejection> {
        let token = bearer(headers)?;
        let checked = self.mint.check(&token, self.issuer, CONTROL_AUDIENCE, self.now);
        let claims = checked.map_err(|error| {
            tracing::debug!(error = &error as &dyn std::error::Error, "token refused");
            if matches!(error, MintError::Expired) {
                Rejection::TokenExpired
            } else {
                Rejection::TokenInvalid
            }
        })?;
        if self.version.knows(&claims.sub) {
            Ok(claims)
        } else {
            Err(Rejection::IdentityGone { name: claims.sub })
        }
    }
}

/// Lets those pass whose token carries `scope`, as long as they have that right: a token does not outlive it.
pub(super) fn admit(
    version: &Version,
    claims: &OwnClaims,
    scope: &'static str,
) -> Result<(), Rejection> {
    let carried = scope.parse::<Scope>().is_ok_and(|scope| claims.scopes.contains(&scope));
    if carried && may(version, &claims.sub, scope) {
        Ok(())
    } else {
        Err(Rejection::ScopeMissing { scope })
    }
}

/// Whether `caller` has the right to `scope` at the control plane, in this version.
pub(super) fn may(version: &Version, caller: &ServiceName, scope: &str) -> bool {
    let granted = version.grants(caller, CONTROL_AUDIENCE);
    scope.parse::<Scope>().is_ok_and(|scope| granted.is_some_and(|set| set.contains(&scope)))
}

/// The one bearer token of a request (RFC 6750 §2.1).
fn bearer(headers: &HeaderMap) -> Result<SecretString, Rejection> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().ok_or(Rejection::TokenMissing)?;
    if values.next().is_some() {
        return Err(Rejection::TokenInvalid);
    }
    let text = value.to_str().map_err(|_bytes| Rejection::TokenInvalid)?;
    let (scheme, token) = text.split_once(' ').ok_or(Rejection::TokenMissing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Rejection::TokenMissing);
    }
    let token = token.trim();
    if token.is_empty() || token.len() > TOKEN_LIMIT {
        return Err(Rejection::TokenInvalid);
    }
    Ok(SecretString::from(token))
}
