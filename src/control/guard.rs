//! Who asks the API, and may they?

use http::{HeaderMap, header::AUTHORIZATION};
use jiff::Timestamp;
use secrecy::SecretString;

use crate::{
    api::CONTROL_AUDIENCE,
    control::reject::Rejection,
    identity::{Mint, MintError, OwnClaims},
    model::Scope,
};

/// The longest token that is looked at.
const TOKEN_LIMIT: usize = 16 * 1024;

/// Accepts a request that carries a token of our own for `infrar-control` with `scope`.
pub(super) fn admit(
    headers: &HeaderMap,
    mint: &Mint,
    issuer: &str,
    scope: &'static str,
    now: Timestamp,
) -> Result<OwnClaims, Rejection> {
    let token = bearer(headers)?;
    let claims = mint.check(&token, issuer, CONTROL_AUDIENCE, now).map_err(|error| {
        tracing::debug!(error = &error as &dyn std::error::Error, "token refused");
        if matches!(error, MintError::Expired) {
            Rejection::TokenExpired
        } else {
            Rejection::TokenInvalid
        }
    })?;
    let wanted: Result<Scope, _> = scope.parse();
    match wanted {
        Ok(wanted) if claims.scopes.contains(&wanted) => Ok(claims),
        Ok(_) | Err(_) => Err(Rejection::ScopeMissing { scope }),
    }
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
