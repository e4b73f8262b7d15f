//! Every refusal of the control plane and the answer it becomes: the only such table.
//!
//! Its API answers with RFC 9457 problems, the token endpoint with RFC 6749 §5.2 errors, as its clients expect.

use axum::response::{IntoResponse, Response};
use http::{
    HeaderValue, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    api::OauthRefusal,
    control::rates::Wait,
    model::{EndpointId, ScopeError, ServiceName},
    store::StoreError,
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
    #[error("{service} has no endpoint {id}")]
    UnknownEndpoint { service: ServiceName, id: EndpointId },
    #[error("the host {host} belongs to {service}; give each service a host of its own")]
    HostTaken { host: String, service: ServiceName },
    #[error(
        "the project itself names the endpoint {id} of {service}; change it there, or adjust its state and weight"
    )]
    OwnedByProject { service: ServiceName, id: EndpointId },
    #[error("{}", match found {
        Some(revision) => format!("it has changed meanwhile, at revision {revision}; read it again"),
        None => "it is not there".to_owned(),
    })]
    RevisionMismatch { found: Option<u64> },
    #[error("no service may be called {name}: names beginning with infrar are reserved")]
    Reserved { name: ServiceName },
    #[error(
        "the project was {before} and is called {now}, which no proxy that knows {before} would follow; write project: {before}, \
         or begin {now} anew: remove the --data-dir and the proxies' state folders (control.state_dir), and start them"
    )]
    Renamed { before: ServiceName, now: ServiceName },
    #[error("there is no project yet: give --project FILE, or infrar project import")]
    NoProject,
    #[error("the body is larger than is taken here")]
    BodyTooLarge,
    #[error("the body is JSON: content-type: application/json")]
    MediaType,
    #[error("asked too often; ask again in {wait} s")]
    TooOften { wait: u64 },
    #[error(
        "the store does not answer right now; a change may have been made or not: look before it is asked for again"
    )]
    StoreUnavailable,
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
    /// No wildcard arm: a new variant must choose its answer here.
    fn code(&self) -> Code {
        match self {
            Self::BadRequest { .. } => Code::BadRequest,
            Self::TokenMissing => Code::TokenMissing,
            Self::TokenInvalid | Self::IdentityGone { .. } => Code::TokenInvalid,
            Self::TokenExpired => Code::TokenExpired,
            Self::ScopeMissing { .. } => Code::ScopeMissing,
            Self::UnknownService { .. } => Code::UnknownService,
            Self::UnknownEndpoint { .. } => Code::UnknownEndpoint,
            Self::HostTaken { .. } => Code::HostTaken,
            Self::OwnedByProject { .. } => Code::OwnedByProject,
            Self::RevisionMismatch { .. } => Code::RevisionMismatch,
            Self::Reserved { .. } => Code::ReservedName,
            Self::Renamed { .. } => Code::ProjectRenamed,
            Self::NoProject => Code::NotReady,
            Self::BodyTooLarge => Code::BodyTooLarge,
            Self::MediaType => Code::UnsupportedMediaType,
            Self::TooOften { .. } => Code::RateLimited,
            Self::StoreUnavailable => Code::StoreUnavailable,
            Self::NotFound => Code::NotFound,
            Self::Method => Code::MethodNotAllowed,
            Self::Overloaded => Code::Overloaded,
            Self::Deadline => Code::Deadline,
            Self::Internal => Code::Internal,
        }
    }

    /// When to come again, in seconds.
    fn retry_after(&self) -> Option<u64> {
        if let Self::TooOften { wait } = self {
            return Some(*wait);
        }
        let soon = matches!(self, Self::Overloaded | Self::StoreUnavailable | Self::NoProject);
        soon.then_some(1)
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
            | Self::UnknownEndpoint { .. }
            | Self::HostTaken { .. }
            | Self::OwnedByProject { .. }
            | Self::RevisionMismatch { .. }
            | Self::Reserved { .. }
            | Self::Renamed { .. }
            | Self::NoProject
            | Self::BodyTooLarge
            | Self::MediaType
            | Self::TooOften { .. }
            | Self::StoreUnavailable
            | Self::NotFound
            | Self::Method
            | Self::Overloaded
            | Self::Deadline
            | Self::Internal => None,
        }
    }
}

/// What a refusal is called, for programs: stable, whatever its sentence says. The contract names these too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    BadRequest,
    TokenMissing,
    TokenInvalid,
    TokenExpired,
    ScopeMissing,
    UnknownService,
    UnknownEndpoint,
    HostTaken,
    OwnedByProject,
    RevisionMismatch,
    ReservedName,
    ProjectRenamed,
    NotReady,
    BodyTooLarge,
    UnsupportedMediaType,
    RateLimited,
    StoreUnavailable,
    NotFound,
    MethodNotAllowed,
    Overloaded,
    Deadline,
    Internal,
}

impl Code {
    /// Status, code and title.
    fn verdict(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::BadRequest => (StatusCode::BAD_REQUEST, "bad-request", "Bad request"),
            Self::TokenMissing => (StatusCode::UNAUTHORIZED, "token-missing", "Token missing"),
            Self::TokenInvalid => (StatusCode::UNAUTHORIZED, "token-invalid", "Token invalid"),
            Self::TokenExpired => (StatusCode::UNAUTHORIZED, "token-expired", "Token expired"),
            Self::ScopeMissing => (StatusCode::FORBIDDEN, "scope-missing", "Scope missing"),
            Self::UnknownService => (StatusCode::NOT_FOUND, "unknown-service", "Unknown service"),
            Self::UnknownEndpoint => {
                (StatusCode::NOT_FOUND, "unknown-endpoint", "Unknown endpoint")
            }
            Self::HostTaken => (StatusCode::CONFLICT, "host-taken", "Host taken"),
            Self::OwnedByProject => {
                (StatusCode::CONFLICT, "owned-by-project", "Owned by the project")
            }
            Self::RevisionMismatch => {
                (StatusCode::PRECONDITION_FAILED, "revision-mismatch", "Revision mismatch")
            }
            Self::ReservedName => (StatusCode::BAD_REQUEST, "reserved-name", "Reserved name"),
            Self::ProjectRenamed => (StatusCode::CONFLICT, "project-renamed", "Project renamed"),
            Self::NotReady => (StatusCode::SERVICE_UNAVAILABLE, "not-ready", "No project yet"),
            Self::BodyTooLarge => {
                (StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", "Body too large")
            }
            Self::UnsupportedMediaType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                "Unsupported media type",
            ),
            Self::RateLimited => (StatusCode::TOO_MANY_REQUESTS, "rate-limited", "Rate limited"),
            Self::StoreUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "store-unavailable", "Store unavailable")
            }
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "Not found"),
            Self::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed")
            }
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded", "Overloaded"),
            Self::Deadline => (StatusCode::GATEWAY_TIMEOUT, "deadline", "Deadline"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal error"),
        }
    }

    pub(super) fn status(self) -> StatusCode {
        self.verdict().0
    }

    pub(super) fn as_str(self) -> &'static str {
        self.verdict().1
    }

    pub(super) fn title(self) -> &'static str {
        self.verdict().2
    }
}

impl From<Wait> for Rejection {
    fn from(Wait(wait): Wait) -> Self {
        Self::TooOften { wait }
    }
}

impl From<StoreError> for Rejection {
    fn from(error: StoreError) -> Self {
        tracing::error!(error = &error as &dyn std::error::Error, "the store did not answer");
        Self::StoreUnavailable
    }
}

/// The near names, for whoever reads the sentence alone.
fn alternatives(nearest: &[ServiceName]) -> String {
    let names: Vec<&str> = nearest.iter().map(ServiceName::as_str).collect();
    if names.is_empty() { String::new() } else { format!("; did you mean {}?", names.join(" or ")) }
}

/// The body of a refusal (RFC 9457).
#[derive(Serialize, ToSchema)]
pub(super) struct Problem {
    /// `urn:infrar:problem:` and the code.
    #[schema(pattern = "^urn:infrar:problem:[a-z-]+$")]
    r#type: String,
    /// The same for every refusal of this code.
    title: &'static str,
    /// The answer's status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What is wrong this time, for people.
    detail: String,
    /// What is wrong, for programs: stable.
    code: &'static str,
    /// This refusal, as the log names it.
    request_id: Uuid,
    /// Names near to one that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    nearest: Option<Vec<ServiceName>>,
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        let (status, code, title) = self.code().verdict();
        let (challenge, retry_after) = (self.challenge(), self.retry_after());
        let detail = self.to_string();
        let nearest =
            if let Self::UnknownService { nearest, .. } = self { Some(nearest) } else { None };
        let problem = Problem {
            r#type: format!("urn:infrar:problem:{code}"),
            title,
            status: status.as_u16(),
            detail,
            code,
            request_id: Uuid::now_v7(),
            nearest,
        };
        tracing::debug!(code, request_id = %problem.request_id, detail = problem.detail, "refused");
        let mut answer = json(status, "application/problem+json", &problem);
        if let Some(challenge) = challenge.and_then(|text| text.parse().ok()) {
            answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        }
        if let Some(seconds) = retry_after {
            answer.headers_mut().insert(RETRY_AFTER, seconds.into());
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
    #[error("asked too often from this address; ask again in {} s", .0.0)]
    TooOften(Wait),
    #[error("the token could not be signed")]
    Signing,
}

impl From<Wait> for TokenRefusal {
    fn from(wait: Wait) -> Self {
        Self::TooOften(wait)
    }
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
            // The token endpoint has no code of its own for that; this one is RFC 6749 §4.1.2.1's.
            Self::TooOften(_) => (StatusCode::TOO_MANY_REQUESTS, "temporarily_unavailable"),
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
        if let Self::TooOften(Wait(seconds)) = self {
            headers.insert(RETRY_AFTER, seconds.into());
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
