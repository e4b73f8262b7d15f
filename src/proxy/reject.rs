//! `Rejection` → status, problem document, `proxy-status`: the only such table of the data plane.
//!
//! An answer says what happened and what to do about it. Inner addresses, tokens and key ids never reach one; the log
//! has them.

use std::{fmt, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode, header};

use crate::{
    model::{ScopeSet, ServiceName},
    wire::{Body, BodyError, Fields, PROBLEM_JSON, Problem, Response},
};

/// Who did not answer as it should, in the words of whoever asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Callee {
    /// A service of the project.
    Service(ServiceName),
    /// The application behind the inbound listener of this service's proxy.
    Application(ServiceName),
    /// A host outside the project.
    Outside(Box<str>),
}

impl fmt::Display for Callee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(service) => service.fmt(f),
            Self::Application(service) => write!(f, "the application of {service}"),
            Self::Outside(host) => f.write_str(host),
        }
    }
}

/// Why the data plane answered instead of the service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The request is no valid HTTP, or asks for what a proxy cannot do.
    #[error("{0}")]
    BadRequest(&'static str),
    /// No bearer token.
    #[error("this service needs a bearer token in `authorization`")]
    TokenMissing,
    /// A token that proves nothing.
    #[error("the bearer token is not valid: {0}")]
    TokenInvalid(&'static str),
    /// A token past its `exp`.
    #[error("the bearer token has expired; ask for a new one")]
    TokenExpired,
    /// `permissions` has no such row.
    #[error(
        "{caller} has no grant at {callee}; `permissions` needs `{caller}: {{ {callee}: [scope] }}`"
    )]
    NotPermitted {
        /// Who would speak.
        caller: String,
        /// To whom.
        callee: ServiceName,
    },
    /// The caller lacks a scope.
    #[error("{caller} lacks {} at {callee}", named(.missing))]
    ScopeMissing {
        /// Who would speak.
        caller: String,
        /// To whom.
        callee: ServiceName,
        /// What is missing; empty: any scope would do.
        missing: ScopeSet,
    },
    /// No rule names the method and path.
    #[error("no rule of {callee} names this method and path")]
    Unlisted {
        /// The service.
        callee: ServiceName,
    },
    /// A host outside the project.
    #[error(
        "{authority:?} is no service of this project, and other hosts are not allowed: set `outbound.unknown_hosts: allow`, \
         or name the host in the application's NO_PROXY"
    )]
    HostNotAllowed {
        /// The host that was asked for.
        authority: String,
    },
    /// The peer's address, or the address a request leads to, is not allowed.
    #[error("{0}")]
    AddressNotAllowed(&'static str),
    /// Nobody registered this name.
    #[error("{authority:?} is no service of this project")]
    UnknownService {
        /// The host that was asked for.
        authority: String,
        /// Known names that look like it, the nearest first.
        nearest: Vec<String>,
    },
    /// The request did not arrive in time.
    #[error("the request did not arrive within {0:?}")]
    RequestTimeout(Duration),
    /// The body is larger than allowed.
    #[error("the body is larger than {limit} bytes (`limits.body_bytes`)")]
    BodyTooLarge {
        /// In bytes.
        limit: u64,
    },
    /// The head is larger than allowed.
    #[error(
        "the head is larger than {bytes} bytes or {headers} headers (`limits.header_bytes`, `limits.headers`)"
    )]
    HeadersTooLarge {
        /// In bytes.
        bytes: usize,
        /// In lines.
        headers: usize,
    },
    /// No connection could be had.
    #[error("{}", unconnected(.service, .why))]
    ConnectFailed {
        /// Who was called.
        service: Callee,
        /// In a few words.
        why: &'static str,
        /// Whether it was time that ran out.
        timeout: bool,
    },
    /// TLS failed.
    #[error("TLS to {service} failed: {why}{}", believed(*.certificate))]
    TlsFailed {
        /// Who was called.
        service: Callee,
        /// In a few words.
        why: &'static str,
        /// Whether it was the peer's certificate.
        certificate: bool,
    },
    /// The endpoint ended the exchange before it answered.
    #[error("{service} closed the connection before it answered{}", unrepeated(*.spent))]
    UpstreamReset {
        /// Who was called.
        service: Callee,
        /// Whether it might have been tried again, had its body not been too large to keep.
        spent: bool,
    },
    /// The endpoint's answer is no valid HTTP.
    #[error("{service} sent an answer that is no valid HTTP")]
    BadResponse {
        /// Who was called.
        service: Callee,
    },
    /// No endpoint can be used.
    #[error("{service} has no endpoint that can be used from here: {why}")]
    NoHealthyEndpoint {
        /// Who was called.
        service: Callee,
        /// In a few words.
        why: &'static str,
    },
    /// Every endpoint's circuit is open.
    #[error("every endpoint of {service} failed repeatedly and is left alone for a while")]
    CircuitOpen {
        /// Who was called.
        service: Callee,
        /// Until the next one is tried.
        retry_after: Duration,
    },
    /// The proxy is at its own limits.
    #[error("the proxy is at its limit of {0}")]
    Overloaded(&'static str),
    /// No token could be had for the call.
    #[error("no token for {service} could be had: {why}")]
    TokenUnavailable {
        /// The service.
        service: ServiceName,
        /// In a few words.
        why: &'static str,
    },
    /// There is no snapshot yet.
    #[error("the proxy has no snapshot of the project yet")]
    NotReady,
    /// The answer took too long.
    #[error("{service} gave no answer within {limit:?}")]
    Deadline {
        /// Who was called.
        service: Callee,
        /// The time that was given.
        limit: Duration,
    },
    /// The request has been here before.
    #[error("the request came back to the proxy that sent it, or passed too many")]
    Loop,
}

/// Nobody to talk to. Whoever calls a service cannot know that its proxy is well and the application behind it is not.
fn unconnected(callee: &Callee, why: &str) -> String {
    match callee {
        Callee::Application(_) => format!("{callee} does not accept connections: {why}"),
        Callee::Service(_) | Callee::Outside(_) => {
            format!("no connection to {callee} could be made: {why}")
        }
    }
}

/// What to do about a certificate that is not accepted. The log has the reason: it names inner addresses.
fn believed(certificate: bool) -> &'static str {
    if certificate {
        "; the proxy's log says why, and `trust.ca_file` names issuers to believe besides the system's"
    } else {
        ""
    }
}

/// Why there was no further attempt, where that is the body's doing.
fn unrepeated(spent: bool) -> &'static str {
    if spent { "; the body was too large to be sent again" } else { "" }
}

/// The scopes that are missing, for people.
fn named(missing: &ScopeSet) -> String {
    if missing.is_empty() { "any scope".to_owned() } else { format!("the scope {missing}") }
}

/// The code of an endpoint that broke off.
pub(super) const UPSTREAM_RESET: &str = "upstream-reset";
/// The code of an endpoint that took too long.
pub(super) const DEADLINE: &str = "deadline";

/// The code of a request's body that broke off when its answer had begun; `None`: its client has gone.
pub(super) fn body_code(error: &BodyError) -> Option<&'static str> {
    let rejection = match error {
        BodyError::Incomplete => return None,
        BodyError::Framing => Rejection::BadRequest(""),
        BodyError::TooLarge { limit } => Rejection::BodyTooLarge { limit: *limit },
        BodyError::Stalled { limit } => Rejection::RequestTimeout(*limit),
    };
    Some(rejection.code())
}

/// How a rejection is said in each language.
struct Verdict {
    status: StatusCode,
    code: &'static str,
    /// RFC 9209 §2.3 error type.
    proxy_status: &'static str,
    /// gRPC status code.
    grpc: &'static str,
}

const fn verdict(
    status: StatusCode,
    code: &'static str,
    proxy_status: &'static str,
    grpc: &'static str,
) -> Verdict {
    Verdict { status, code, proxy_status, grpc }
}

impl Rejection {
    /// Status, our code, the RFC 9209 error type and the gRPC status. No wildcard arm: a new variant must choose its
    /// answer here before the crate compiles.
    #[expect(clippy::too_many_lines, reason = "one table, to be read as one")]
    fn verdict(&self) -> Verdict {
        use StatusCode as S;
        match self {
            Self::BadRequest(_) => {
                verdict(S::BAD_REQUEST, "bad-request", "http_request_error", "3")
            }
            Self::TokenMissing => {
                verdict(S::UNAUTHORIZED, "token-missing", "http_request_denied", "16")
            }
            Self::TokenInvalid(_) => {
                verdict(S::UNAUTHORIZED, "token-invalid", "http_request_denied", "16")
            }
            Self::TokenExpired => {
                verdict(S::UNAUTHORIZED, "token-expired", "http_request_denied", "16")
            }
            Self::NotPermitted { .. } => {
                verdict(S::FORBIDDEN, "not-permitted", "http_request_denied", "7")
            }
            Self::ScopeMissing { .. } => {
                verdict(S::FORBIDDEN, "scope-missing", "http_request_denied", "7")
            }
            Self::Unlisted { .. } => {
                verdict(S::FORBIDDEN, "not-permitted", "http_request_denied", "7")
            }
            Self::HostNotAllowed { .. } => {
                verdict(S::FORBIDDEN, "host-not-allowed", "http_request_denied", "7")
            }
            Self::AddressNotAllowed(_) => {
                verdict(S::FORBIDDEN, "address-not-allowed", "http_request_denied", "7")
            }
            // RFC 9209 suggests 500; the caller named a service nobody registered.
            Self::UnknownService { .. } => {
                verdict(S::NOT_FOUND, "unknown-service", "destination_not_found", "5")
            }
            Self::RequestTimeout(_) => {
                verdict(S::REQUEST_TIMEOUT, "request-timeout", "http_request_error", "4")
            }
            Self::BodyTooLarge { .. } => {
                verdict(S::PAYLOAD_TOO_LARGE, "body-too-large", "http_request_error", "8")
            }
            Self::HeadersTooLarge { .. } => verdict(
                S::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "headers-too-large",
                "http_request_error",
                "8",
            ),
            Self::ConnectFailed { timeout: true, .. } => {
                verdict(S::BAD_GATEWAY, "connect-failed", "connection_timeout", "14")
            }
            Self::ConnectFailed { timeout: false, .. } => {
                verdict(S::BAD_GATEWAY, "connect-failed", "connection_refused", "14")
            }
            Self::TlsFailed { certificate: true, .. } => {
                verdict(S::BAD_GATEWAY, "tls-failed", "tls_certificate_error", "14")
            }
            Self::TlsFailed { certificate: false, .. } => {
                verdict(S::BAD_GATEWAY, "tls-failed", "tls_protocol_error", "14")
            }
            Self::UpstreamReset { .. } => {
                verdict(S::BAD_GATEWAY, UPSTREAM_RESET, "connection_terminated", "14")
            }
            Self::BadResponse { .. } => {
                verdict(S::BAD_GATEWAY, "bad-response", "http_protocol_error", "14")
            }
            Self::NoHealthyEndpoint { .. } => verdict(
                S::SERVICE_UNAVAILABLE,
                "no-healthy-endpoint",
                "destination_unavailable",
                "14",
            ),
            Self::CircuitOpen { .. } => {
                verdict(S::SERVICE_UNAVAILABLE, "circuit-open", "destination_unavailable", "14")
            }
            Self::Overloaded(_) => {
                verdict(S::SERVICE_UNAVAILABLE, "overloaded", "connection_limit_reached", "14")
            }
            Self::TokenUnavailable { .. } => {
                verdict(S::SERVICE_UNAVAILABLE, "token-unavailable", "proxy_internal_error", "14")
            }
            Self::NotReady => {
                verdict(S::SERVICE_UNAVAILABLE, "not-ready", "proxy_internal_error", "14")
            }
            Self::Deadline { .. } => {
                verdict(S::GATEWAY_TIMEOUT, DEADLINE, "http_response_timeout", "4")
            }
            Self::Loop => verdict(S::LOOP_DETECTED, "loop", "proxy_loop_detected", "9"),
        }
    }

    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.verdict().code
    }

    /// The status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.verdict().status
    }

    /// When trying again may help.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::CircuitOpen { retry_after, .. } => Some(*retry_after),
            Self::TokenUnavailable { .. } | Self::NotReady | Self::Overloaded(_) => {
                Some(Duration::from_secs(1))
            }
            Self::BadRequest(_)
            | Self::TokenMissing
            | Self::TokenInvalid(_)
            | Self::TokenExpired
            | Self::NotPermitted { .. }
            | Self::ScopeMissing { .. }
            | Self::Unlisted { .. }
            | Self::HostNotAllowed { .. }
            | Self::AddressNotAllowed(_)
            | Self::UnknownService { .. }
            | Self::RequestTimeout(_)
            | Self::BodyTooLarge { .. }
            | Self::HeadersTooLarge { .. }
            | Self::ConnectFailed { .. }
            | Self::TlsFailed { .. }
            | Self::UpstreamReset { .. }
            | Self::BadResponse { .. }
            | Self::NoHealthyEndpoint { .. }
            | Self::Deadline { .. }
            | Self::Loop => None,
        }
    }

    /// RFC 6750 §3: what a caller without a good token is told.
    fn challenge(&self) -> Option<HeaderValue> {
        if *self == Self::TokenMissing {
            return Some(HeaderValue::from_static("Bearer realm=\"infrar\""));
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            return Some(HeaderValue::from_static(
                "Bearer realm=\"infrar\", error=\"invalid_token\"",
            ));
        }
        let Self::ScopeMissing { missing, .. } = self else { return None };
        let challenge =
            format!("Bearer realm=\"infrar\", error=\"insufficient_scope\", scope=\"{missing}\"");
        HeaderValue::try_from(challenge).ok()
    }

    /// The answer. `request_id` is repeated in it; `grpc` says it as trailers only.
    #[must_use]
    pub fn answer(&self, request_id: Option<&HeaderValue>, grpc: bool) -> Response {
        let verdict = self.verdict();
        let mut fields = Fields::with_capacity(8);
        if let Ok(value) = HeaderValue::try_from(format!("infrar; error={}", verdict.proxy_status))
        {
            fields.append(HeaderName::from_static("proxy-status"), value);
        }
        if let Some(id) = request_id {
            fields.append(HeaderName::from_static("x-request-id"), id.clone());
        }
        if let Some(wait) = self.retry_after() {
            fields.append(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        if let Some(challenge) = self.challenge() {
            fields.append(header::WWW_AUTHENTICATE, challenge);
        }
        let (status, body) = if grpc {
            fields.append(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            fields.append(
                HeaderName::from_static("grpc-status"),
                HeaderValue::from_static(verdict.grpc),
            );
            let message = format!("{}: {self}", verdict.code);
            if let Ok(message) = HeaderValue::try_from(percent_encode(&message)) {
                fields.append(HeaderName::from_static("grpc-message"), message);
            }
            (StatusCode::OK, Body::Empty)
        } else {
            fields.append(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
            let mut problem = Problem::new(verdict.status.as_u16(), verdict.code, self.to_string());
            problem.request_id =
                request_id.and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
            if let Self::UnknownService { nearest, .. } = self {
                problem.nearest = Some(nearest.clone());
            }
            let bytes = serde_json::to_vec(&problem).unwrap_or_default();
            (verdict.status, Body::Full(bytes.into()))
        };
        Response { status, fields, body }
    }
}

/// `grpc-message` is percent-encoded UTF-8 (gRPC over HTTP/2, "Responses").
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (0x20..=0x7e).contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> ServiceName {
        "reports".parse().unwrap()
    }

    #[test]
    fn a_refusal_is_a_problem_document_with_a_proxy_status() {
        let rejection = Rejection::UnknownService {
            authority: "report".into(),
            nearest: vec!["reports".into()],
        };
        let answer = rejection.answer(Some(&HeaderValue::from_static("7")), false);
        assert_eq!(answer.status, 404);
        assert_eq!(
            answer.fields.get("proxy-status").unwrap(),
            "infrar; error=destination_not_found"
        );
        assert_eq!(answer.fields.get("content-type").unwrap(), "application/problem+json");
        let Body::Full(bytes) = &answer.body else { panic!("a body") };
        let problem: Problem = serde_json::from_slice(bytes).unwrap();
        assert_eq!((problem.code.as_str(), problem.request_id.as_str()), ("unknown-service", "7"));
        assert_eq!(problem.nearest, Some(vec!["reports".to_owned()]));
    }

    #[test]
    fn a_grpc_caller_is_told_in_trailers_only() {
        let service = Callee::Service(service());
        let rejection = Rejection::Deadline { service, limit: Duration::from_secs(2) };
        let answer = rejection.answer(None, true);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.fields.get("grpc-status").unwrap(), "4");
        assert_eq!(
            answer.fields.get("grpc-message").unwrap(),
            "deadline: reports gave no answer within 2s"
        );
        assert!(answer.body.is_empty());
    }

    #[test]
    fn a_connection_that_cannot_be_had_is_told_by_whose_it_was() {
        let told = |service| {
            Rejection::ConnectFailed { service, why: "refused", timeout: false }.to_string()
        };
        assert_eq!(
            told(Callee::Application(service())),
            "the application of reports does not accept connections: refused"
        );
        assert_eq!(
            told(Callee::Outside("example.com:8080".into())),
            "no connection to example.com:8080 could be made: refused"
        );
        assert_eq!(
            told(Callee::Service(service())),
            "no connection to reports could be made: refused"
        );
    }

    #[test]
    fn who_lacks_a_token_or_a_scope_is_told_how_to_ask() {
        let told = |rejection: Rejection| {
            rejection.answer(None, false).fields.get("www-authenticate").cloned()
        };
        assert_eq!(told(Rejection::TokenMissing).unwrap(), "Bearer realm=\"infrar\"");
        assert!(told(Rejection::TokenExpired).unwrap().to_str().unwrap().contains("invalid_token"));
        let missing = ScopeSet::parse_list("write:query").unwrap();
        let scope = Rejection::ScopeMissing { caller: "a".into(), callee: service(), missing };
        assert!(scope.to_string().starts_with("a lacks the scope write:query at "), "{scope}");
        assert!(told(scope).unwrap().to_str().unwrap().contains("scope=\"write:query\""));
        assert_eq!(told(Rejection::Loop), None);
    }
}
