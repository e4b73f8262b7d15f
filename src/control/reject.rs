//! Every refusal of the control plane and the answer it becomes: the only such table.
//!
//! Its API answers with RFC 9457 problems, the token endpoint with RFC 6749 §5.2 errors, as its clients expect.

use axum::response::{IntoResponse, Response};
use http::{
    HeaderValue, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde::Serialize;
use uuid::Uuid;

use crate::{
    api::OauthRefusal,
    model::{ScopeError, ServiceName},
};

/// Why the API answered with something else than what was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Rejection {
    #[error("{detail}")]
    BadRequest { detail: String },
    #[error("a bearer token for the audience infrar-control is needed")]
    TokenMissing,
    #[error("the token is not one of this control plane for the audience infrar-control")]
    TokenInvalid,
    #[error("the token has expired")]
    TokenExpired,
    #[error("{name} is no longer an identity of this project")]
    IdentityGone { name: ServiceName },
    #[error(
        "the scope {scope} is missing: the token does not carry it, or permissions no longer grant it"
    )]
    ScopeMissing { scope: &'static str },
    #[error("{name} is no service of this project{}", alternatives(nearest))]
    UnknownService { name: String, nearest: Vec<ServiceName> },
    #[error("there is nothing at this path")]
    NotFound,
    #[error("this path does not take that method")]
    Method,
    #[error("there is more to do than can be done at once")]
    Overloaded,
    #[error("no answer was ready in time")]
    Deadline,
    #[error("something went wrong here; the log knows more")]
    Internal,
}

impl Rejection {
    /// Status, code and title. No wildcard arm: a new variant must choose its answer here.
    fn verdict(&self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::BadRequest { .. } => (StatusCode::BAD_REQUEST, "bad-request", "Bad request"),
            Self::TokenMissing => (StatusCode::UNAUTHORIZED, "token-missing", "Token missing"),
            Self::TokenInvalid | Self::IdentityGone { .. } => {
                (StatusCode::UNAUTHORIZED, "token-invalid", "Token invalid")
            }
            Self::TokenExpired => (StatusCode::UNAUTHORIZED, "token-expired", "Token expired"),
            Self::ScopeMissing { .. } => (StatusCode::FORBIDDEN, "scope-missing", "Scope missing"),
            Self::UnknownService { .. } => {
                (StatusCode::NOT_FOUND, "unknown-service", "Unknown service")
            }
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "Not found"),
            Self::Method => {
                (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed")
            }
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded", "Overloaded"),
            Self::Deadline => (StatusCode::GATEWAY_TIMEOUT, "deadline", "Deadline"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal error"),
        }
    }

    /// RFC 6750 §3: what kind of token would be accepted.
    fn challenge(&self) -> Option<String> {
        match self {
            Self::TokenMissing => Some("Bearer realm=\"infrar\"".to_owned()),
            Self::TokenInvalid | Self::TokenExpired | Self::IdentityGone { .. } => Some(format!(
                "Bearer realm=\"infrar\", error=\"invalid_token\", error_description=\"{self}\""
            )),
            Self::ScopeMissing { scope } => Some(format!(
                "Bearer realm=\"infrar\", error=\"insufficient_scope\", scope=\"{scope}\""
            )),
            Self::BadRequest { .. }
            | Self::UnknownService { .. }
            | Self::NotFound
            | Self::Method
            | Self::Overloaded
            | Self::Deadline
            | Self::Internal => None,
        }
    }
}

/// The near names, for whoever reads the sentence alone.
fn alternatives(nearest: &[ServiceName]) -> String {
    let names: Vec<&str> = nearest.iter().map(ServiceName::as_str).collect();
    if names.is_empty() { String::new() } else { format!("; did you mean {}?", names.join(" or ")) }
}

/// The body of a refusal (RFC 9457).
#[derive(Serialize)]
struct Problem<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: String,
    code: &'a str,
    request_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    nearest: Option<&'a [ServiceName]>,
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        let (status, code, title) = self.verdict();
        let nearest =
            if let Self::UnknownService { nearest, .. } = &self { Some(&**nearest) } else { None };
        let problem = Problem {
            r#type: format!("urn:infrar:problem:{code}"),
            title,
            status: status.as_u16(),
            detail: self.to_string(),
            code,
            request_id: Uuid::now_v7().to_string(),
            nearest,
        };
        tracing::debug!(code, request_id = problem.request_id, detail = problem.detail, "refused");
        let mut answer = json(status, "application/problem+json", &problem);
        if let Some(challenge) = self.challenge().and_then(|text| text.parse().ok()) {
            answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        }
        if matches!(self, Self::Overloaded) {
            answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        answer
    }
}

/// Why no token was granted.
#[derive(Debug, thiserror::Error)]
pub(super) enum TokenRefusal {
    #[error("{0}")]
    Request(&'static str),
    #[error("the form is larger than is taken here")]
    TooLarge,
    #[error("the form did not arrive in time")]
    Slow,
    #[error("only client_credentials is granted here")]
    GrantType,
    #[error("the client is unknown, or its secret is wrong")]
    Client,
    #[error("name the callee: audience=NAME or resource=https://NAME.infrar.internal")]
    TargetMissing,
    #[error("one token is for one callee: audience and resource must agree")]
    Targets,
    #[error("permissions grant {caller} nothing at {callee:?}")]
    NotGranted { caller: ServiceName, callee: String },
    #[error("that is no list of scopes")]
    ScopeSyntax(#[source] ScopeError),
    #[error("permissions do not grant {caller} the scopes {missing} at {callee}")]
    ScopeNotGranted { caller: ServiceName, callee: String, missing: String },
    #[error("the token could not be signed")]
    Signing,
}

impl TokenRefusal {
    /// Status and RFC 6749 §5.2 (`invalid_target`: RFC 8707 §2) error. No wildcard arm.
    fn verdict(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Request(_) => (StatusCode::BAD_REQUEST, "invalid_request"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "invalid_request"),
            Self::Slow => (StatusCode::REQUEST_TIMEOUT, "invalid_request"),
            Self::GrantType => (StatusCode::BAD_REQUEST, "unsupported_grant_type"),
            Self::Client => (StatusCode::UNAUTHORIZED, "invalid_client"),
            Self::TargetMissing | Self::Targets | Self::NotGranted { .. } => {
                (StatusCode::BAD_REQUEST, "invalid_target")
            }
            Self::ScopeSyntax(_) | Self::ScopeNotGranted { .. } => {
                (StatusCode::BAD_REQUEST, "invalid_scope")
            }
            Self::Signing => (StatusCode::INTERNAL_SERVER_ERROR, "server_error"),
        }
    }
}

impl IntoResponse for TokenRefusal {
    fn into_response(self) -> Response {
        let (status, error) = self.verdict();
        let description = plain(&self.to_string());
        tracing::debug!(error, description, "no token granted");
        let body = OauthRefusal { error: error.to_owned(), error_description: Some(description) };
        let mut answer = json(status, "application/json", &body);
        let headers = answer.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if matches!(self, Self::Client) {
            let challenge = HeaderValue::from_static("Basic realm=\"infrar\", charset=\"UTF-8\"");
            headers.insert(WWW_AUTHENTICATE, challenge);
        }
        answer
    }
}

/// RFC 6749 §5.2 allows an error description printable ASCII without quote and backslash.
fn plain(text: &str) -> String {
    let allowed = |c: char| matches!(c, ' '..='~') && c != '"' && c != '\\';
    text.chars().filter(|c| allowed(*c)).take(300).collect()
}

/// An answer with a JSON body.
pub(super) fn json<T: Serialize>(status: StatusCode, kind: &'static str, body: &T) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => {
            (status, [(CONTENT_TYPE, HeaderValue::from_static(kind))], body).into_response()
        }
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "an answer could not be written"
            );
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
