//! What is answered to anybody: tokens to those who prove themselves, the key set, metadata, probes, and the contract.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Extension,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, PRAGMA, REFERRER_POLICY,
        X_CONTENT_TYPE_OPTIONS,
    },
};
use serde_json::json as literal;
use tokio::time::sleep;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    api::TokenReply,
    control::{
        asked::Public,
        contract::{Anybody, Foreign, NoToken, TokenForm},
        reject::{TokenRefusal, json},
        router::{Peer, Shared},
        tokens::{Desk, Proof, Question},
    },
    runtime::sha256,
};

/// How long others may keep the key set; shorter than the lead of a new key.
const JWKS_CACHE: &str = "public, max-age=300";
/// The viewer of the contract: all of it, so that it needs no network.
const VIEWER: &str = include_str!("viewer.html");

type App = State<Arc<Shared>>;

/// What answers out of memory.
pub(super) fn memory() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::default()
        .routes(routes!(jwks))
        .routes(routes!(openid))
        .routes(routes!(metadata))
        .routes(routes!(alive))
        .routes(routes!(ready))
        .routes(routes!(openapi))
        .routes(routes!(docs))
}

/// The contract and its viewer, made once.
pub(super) struct Pages {
    document: Bytes,
    /// What the viewer may do: run its own script, and read from here.
    policy: HeaderValue,
}

impl Pages {
    pub(super) fn new(document: &utoipa::openapi::OpenApi) -> Self {
        let document = serde_json::to_vec(document).unwrap_or_else(|error| {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the contract cannot be written"
            );
            Vec::new()
        });
        let policy = format!(
            "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
             frame-ancestors 'none'",
            inline("script"),
            inline("style"),
        );
        let policy = HeaderValue::try_from(policy);
        let nothing = HeaderValue::from_static("default-src 'none'");
        Self { document: document.into(), policy: policy.unwrap_or(nothing) }
    }
}

/// The hash of the viewer's one element of that name (CSP 3 §2.3.1).
fn inline(element: &str) -> String {
    let open = format!("<{element}>");
    let text =
        VIEWER.split_once(&open).and_then(|(_, rest)| rest.split_once(&format!("</{element}>")));
    let text = text.map_or("", |(text, _)| text);
    format!("sha256-{}", STANDARD.encode(sha256(text.as_bytes())))
}

/// A token for one callee (RFC 6749 §4.4).
///
/// The client proves itself by HTTP Basic or in the form. The callee is named by `audience` or `resource`.
#[utoipa::path(
    post, path = "/oauth2/token", operation_id = "token", tag = "tokens",
    request_body(content = TokenForm, content_type = "application/x-www-form-urlencoded"),
    responses(
        (status = 200, description = "The token", body = TokenReply, headers(("cache-control" = String), ("pragma" = String))),
        NoToken,
    ),
    security((), ("basic" = [])),
)]
pub(super) async fn token(
    State(shared): App,
    Extension(Peer(peer)): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match shared.grant(peer.ip(), &headers, body).await {
        Ok(reply) => {
            let mut answer = json(StatusCode::OK, "application/json", &reply);
            // RFC 6749 §5.1.
            answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            answer.headers_mut().insert(PRAGMA, HeaderValue::from_static("no-cache"));
            answer
        }
        Err(refusal) => refusal.into_response(),
    }
}

impl Shared {
    /// A token for whoever asks from `peer`.
    async fn grant(
        &self,
        peer: IpAddr,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<TokenReply, TokenRefusal> {
        let body = self.intake.read(body, peer).await?;
        // Only failures count for the address: what neighbours do there turns nobody away who shows who it is.
        let failed = |refusal| self.rates.public(peer).err().map_or(refusal, Into::into);
        let question = Question::read(headers, &body).map_err(failed)?;
        let Proof { caller, hold } = self.at_desk(|desk| desk.caller(&question, peer));
        if !hold.is_zero() {
            sleep(hold).await;
        }
        let caller = caller.map_err(failed)?;
        self.rates.read(&caller)?;
        // What is in force now counts, not what was when the question came.
        self.at_desk(|desk| desk.grant(&caller, &question))
    }

    fn at_desk<T>(&self, ask: impl FnOnce(&Desk<'_>) -> T) -> T {
        ask(&Desk {
            version: &self.registry.current(),
            issuer: self.registry.issuer(),
            mint: &self.mint,
            throttle: &self.throttle,
            now: self.clock.now(),
        })
    }
}

/// The keys that tokens are signed with (RFC 7517).
#[utoipa::path(
    get, path = "/.well-known/jwks.json", operation_id = "jwks", tag = "tokens",
    responses(
        (status = 200, description = "The key set", body = Foreign, content_type = "application/jwk-set+json",
            headers(("cache-control" = String))),
        Anybody,
    ),
)]
async fn jwks(State(shared): App, _: Public) -> Response {
    let keys = shared.mint.jwks(shared.clock.now());
    let mut answer = json(StatusCode::OK, "application/jwk-set+json", &keys);
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static(JWKS_CACHE));
    answer
}

/// Where tokens and keys are (OpenID Connect Discovery 1.0 §3).
#[utoipa::path(
    get, path = "/.well-known/openid-configuration", operation_id = "openid_configuration", tag = "tokens",
    responses((status = 200, description = "The metadata", body = Foreign), Anybody),
)]
async fn openid(State(shared): App, _: Public) -> Response {
    discovery(&shared)
}

/// Where tokens and keys are (RFC 8414 §3).
#[utoipa::path(
    get, path = "/.well-known/oauth-authorization-server", operation_id = "authorization_server", tag = "tokens",
    responses((status = 200, description = "The metadata", body = Foreign), Anybody),
)]
async fn metadata(State(shared): App, _: Public) -> Response {
    discovery(&shared)
}

/// RFC 8414 §2, and what OpenID Connect Discovery 1.0 §3 requires besides.
fn discovery(shared: &Shared) -> Response {
    let issuer = shared.registry.issuer();
    let document = literal!({
        "issuer": issuer,
        "token_endpoint": format!("{issuer}/oauth2/token"),
        "jwks_uri": format!("{issuer}/.well-known/jwks.json"),
        "grant_types_supported": ["client_credentials"],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        // No authorization endpoint: there are no people here, only services.
        "response_types_supported": [],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    });
    json(StatusCode::OK, "application/json", &document)
}

/// Whether it runs.
#[utoipa::path(
    get, path = "/livez", operation_id = "livez", tag = "probes",
    responses((status = 200, description = "It does", body = String), Anybody),
)]
async fn alive() -> &'static str {
    "ok\n"
}

/// Whether it can answer.
#[utoipa::path(
    get, path = "/readyz", operation_id = "readyz", tag = "probes",
    responses(
        (status = 200, description = "It can", body = String),
        (status = 503, description = "It ends, or there is no project yet", body = String),
        Anybody,
    ),
)]
async fn ready(State(shared): App) -> Response {
    // Keys are there from the start; a project may have to be imported first.
    if shared.end.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "ending\n").into_response()
    } else if shared.registry.current().book.project().is_none() {
        (StatusCode::SERVICE_UNAVAILABLE, "there is no project yet\n").into_response()
    } else {
        "ok\n".into_response()
    }
}

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", operation_id = "openapi", tag = "contract",
    responses((status = 200, description = "OpenAPI 3.1", body = Foreign), Anybody),
)]
async fn openapi(Extension(pages): Extension<Arc<Pages>>, _: Public) -> Response {
    ([(CONTENT_TYPE, "application/json")], pages.document.clone()).into_response()
}

/// This document, for people.
#[utoipa::path(
    get, path = "/docs", operation_id = "docs", tag = "contract",
    responses(
        (status = 200, description = "A page that needs nothing but this server", body = String, content_type = "text/html",
            headers(("content-security-policy" = String))),
        Anybody,
    ),
)]
async fn docs(Extension(pages): Extension<Arc<Pages>>, _: Public) -> Response {
    let plain = |name: HeaderName, value: &'static str| (name, HeaderValue::from_static(value));
    let headers = [
        plain(CONTENT_TYPE, "text/html; charset=utf-8"),
        plain(X_CONTENT_TYPE_OPTIONS, "nosniff"),
        plain(REFERRER_POLICY, "no-referrer"),
        (CONTENT_SECURITY_POLICY, pages.policy.clone()),
    ];
    (headers, VIEWER).into_response()
}
