//! The one client of the control plane, for proxies and commands.
//!
//! Replicas are tried in turn, beginning with the one that answered last. Every wait has a limit, every body
//! a bound, and redirects are never followed, so a token cannot travel to a host that was not configured.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, ETAG, IF_NONE_MATCH, USER_AGENT},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{Client as HyperClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::ClientConfig;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::{Instant, timeout, timeout_at};
use url::{Url, form_urlencoded};

use crate::{
    api::{
        Catalog, Change, Credential, EventError, Events, OauthRefusal, ServiceAnswer, ServiceList,
        TokenAnswer, TokenReply,
    },
    model::{ScopeSet, ServiceName},
    net::{Alpn, ClientTls},
    runtime::sha256,
};

/// The largest token answer or refusal that is read.
const SMALL_LIMIT: usize = 64 * 1024;
/// The largest JWK set that is read.
const JWKS_LIMIT: usize = 1024 * 1024;
/// The largest catalog that is read.
const CATALOG_LIMIT: usize = 64 * 1024 * 1024;
/// A watch that stays silent longer is given up; the control plane says something every 15 s.
const WATCH_SILENCE: Duration = Duration::from_secs(45);

type Boxed = Box<dyn std::error::Error + Send + Sync>;

/// Why the control plane (or another issuer) gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It answered, and the answer is no.
    #[error("refused with status {status} ({code}){}", detail.as_ref().map_or_else(String::new, |text| format!(": {text}")))]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// The `error` of RFC 6749 §5.2 or the `code` of a problem document; empty when there was neither.
        code: String,
        /// A sentence for people, where one was given.
        detail: Option<String>,
    },
    /// No answer: connecting, TLS or waiting failed.
    #[error("{host} cannot be reached")]
    Unreachable {
        /// Host and port that were asked.
        host: String,
        /// What went wrong.
        #[source]
        source: Boxed,
    },
    /// An answer that is not what was asked for.
    #[error("the answer of {host} cannot be used")]
    Malformed {
        /// Host and port that were asked.
        host: String,
        /// What is wrong with it.
        #[source]
        source: Boxed,
    },
    /// The client was set up with something that cannot work.
    #[error("{what}")]
    Settings {
        /// What, and what to write instead.
        what: String,
        /// The cause, where there is one.
        #[source]
        source: Option<Boxed>,
    },
}

impl ClientError {
    /// Whether the same question may get another answer later: nobody answered, the answer was garbled, or
    /// the other side said that it is its own fault or too busy.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Refused { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            Self::Unreachable { .. } | Self::Malformed { .. } => true,
            Self::Settings { .. } => false,
        }
    }

    fn settings(what: impl Into<String>, source: Option<Boxed>) -> Self {
        Self::Settings { what: what.into(), source }
    }
}

/// What the client needs.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// Addresses of one control plane; a path is kept as a prefix. May be empty for a client that only fetches key sets.
    pub urls: Vec<Url>,
    /// Certificates (PEM) trusted besides those of the system.
    pub ca_file: Option<PathBuf>,
    /// For one question to one replica, connecting included.
    pub timeout: Duration,
}

impl ClientSettings {
    /// With the usual limit of 10 s.
    #[must_use]
    pub fn new(urls: Vec<Url>, ca_file: Option<PathBuf>) -> Self {
        Self { urls, ca_file, timeout: Duration::from_secs(10) }
    }
}

type Http = HyperClient<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// The client. Clones share their connections.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Exchanged whole when other certificates are trusted: its connections were made under the old ones.
    http: ArcSwap<Http>,
    ca: Option<Mutex<CaFile>>,
    urls: Vec<Url>,
    /// The replica that answered last.
    preferred: AtomicUsize,
    timeout: Duration,
}

/// The file with the certificates that are trusted besides those of the system.
#[derive(Debug)]
struct CaFile {
    path: PathBuf,
    /// The SHA-256 of what it said when it was last looked at.
    seen: Option<[u8; 32]>,
}

/// A question, not yet addressed to a replica. Holds secrets: no `Debug`.
struct Question<'a> {
    method: Method,
    path: &'a str,
    query: Option<String>,
    authorization: Option<HeaderValue>,
    accept: &'static str,
    if_none_match: Option<&'a str>,
    form: Option<String>,
}

impl<'a> Question<'a> {
    fn get(path: &'a str, bearer: Option<&SecretString>) -> Result<Self, ClientError> {
        let authorization = bearer
            .map(|bearer| secret_header(&format!("Bearer {}", bearer.expose_secret())))
            .transpose()?;
        Ok(Self {
            method: Method::GET,
            path,
            query: None,
            authorization,
            accept: "application/json",
            if_none_match: None,
            form: None,
        })
    }
}

impl Client {
    /// Reads the trusted certificates; connects to nobody yet.
    ///
    /// # Errors
    /// [`ClientError::Settings`] for a URL that is not http or https, or certificates that cannot be read.
    pub fn new(settings: ClientSettings) -> Result<Self, ClientError> {
        for url in &settings.urls {
            if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
                let what = format!("{url} is no address; write https://host or http://host:port");
                return Err(ClientError::settings(what, None));
            }
        }
        let ClientSettings { urls, ca_file, timeout } = settings;
        let pem = ca_file.as_deref().map(read_ca).transpose()?;
        let http = http(trust(ca_file.as_deref().zip(pem.as_deref()))?, timeout);
        let ca = ca_file
            .zip(pem)
            .map(|(path, pem)| Mutex::new(CaFile { path, seen: Some(sha256(&pem)) }));
        let (http, preferred) = (ArcSwap::from_pointee(http), AtomicUsize::new(0));
        Ok(Self { shared: Arc::new(Shared { http, ca, urls, preferred, timeout }) })
    }

    /// Looks at the file of trusted certificates again; says whether other ones are trusted now. Questions under way end
    /// as they began. A fault is told once, until the file is another one again. Blocks on the disk.
    ///
    /// # Errors
    /// [`ClientError::Settings`] when they cannot be used; the old ones then stay in force.
    pub fn reread(&self) -> Result<bool, ClientError> {
        let Some(ca) = &self.shared.ca else { return Ok(false) };
        let mut ca = ca.lock().unwrap_or_else(PoisonError::into_inner);
        let pem = match read_ca(&ca.path) {
            Ok(pem) => pem,
            // Also while it is exchanged.
            Err(_unreadable) if ca.seen.is_none() => return Ok(false),
            Err(fault) => {
                ca.seen = None;
                return Err(fault);
            }
        };
        let now = Some(sha256(&pem));
        if now == ca.seen {
            return Ok(false);
        }
        ca.seen = now;
        let tls = trust(Some((&ca.path, &pem)))?;
        self.shared.http.store(Arc::new(http(tls, self.shared.timeout)));
        Ok(true)
    }

    /// Asks for a token for `audience` (RFC 6749 §4.4 with RFC 8693's `audience`); without `scopes` for all
    /// that are granted.
    ///
    /// # Errors
    /// [`ClientError`]; `invalid_client`, `invalid_target` and `invalid_scope` arrive as `Refused`.
    pub async fn token(
        &self,
        credential: &Credential,
        audience: &str,
        scopes: Option<&ScopeSet>,
    ) -> Result<TokenAnswer, ClientError> {
        let question = Question {
            method: Method::POST,
            path: "/oauth2/token",
            query: None,
            authorization: Some(basic(credential)?),
            accept: "application/json",
            if_none_match: None,
            form: Some(token_form(audience, scopes)),
        };
        let (answer, host) = self.ask(&question).await?;
        let reply: TokenReply = self.read(answer, &host, SMALL_LIMIT).await?;
        let malformed = |source: Boxed| ClientError::Malformed { host: host.clone(), source };
        if !reply.token_type.eq_ignore_ascii_case("bearer") {
            return Err(malformed("the token is no bearer token".into()));
        }
        // It will stand in a header; better to learn here that it cannot.
        if reply.access_token.is_empty()
            || !reply.access_token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(malformed("the token has characters that no bearer token has".into()));
        }
        let scope = match &reply.scope {
            Some(text) => ScopeSet::parse_list(text).map_err(|source| malformed(source.into()))?,
            // RFC 6749 §5.1: left out when it is what was asked for.
            None => scopes.cloned().unwrap_or_default(),
        };
        Ok(TokenAnswer {
            access_token: SecretString::from(reply.access_token),
            expires_in: reply.expires_in.map(Duration::from_secs),
            scope,
        })
    }

    /// Fetches the catalog with its ETag; `None` when the one with `etag` is still current.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn catalog(
        &self,
        bearer: &SecretString,
        etag: Option<&str>,
    ) -> Result<Option<(Catalog, String)>, ClientError> {
        let question =
            Question { if_none_match: etag, ..Question::get("/v1/catalog", Some(bearer))? };
        let (answer, host) = self.ask(&question).await?;
        if answer.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        let etag = answer.headers().get(ETAG).and_then(|value| value.to_str().ok());
        let etag = etag.unwrap_or_default().to_owned();
        Ok(Some((self.read(answer, &host, CATALOG_LIMIT).await?, etag)))
    }

    /// Follows the revisions after `from`. The current one arrives at once when it is newer.
    ///
    /// # Errors
    /// [`ClientError`] when the stream cannot be opened; later faults come from [`Watch::next`].
    pub async fn watch(&self, bearer: &SecretString, from: u64) -> Result<Watch, ClientError> {
        let question = Question {
            query: Some(format!("from={from}")),
            accept: "text/event-stream",
            ..Question::get("/v1/watch", Some(bearer))?
        };
        let (answer, host) = self.ask(&question).await?;
        let heard = Instant::now();
        Ok(Watch { body: answer.into_body(), host, events: Events::default(), heard })
    }

    /// Every service in brief.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn services(&self, bearer: &SecretString) -> Result<ServiceList, ClientError> {
        let (answer, host) = self.ask(&Question::get("/v1/services", Some(bearer))?).await?;
        self.read(answer, &host, CATALOG_LIMIT).await
    }

    /// One service in full.
    ///
    /// # Errors
    /// [`ClientError`]; an unknown name is refused with `unknown-service`.
    pub async fn service(
        &self,
        bearer: &SecretString,
        name: &ServiceName,
    ) -> Result<ServiceAnswer, ClientError> {
        let path = format!("/v1/services/{name}");
        let (answer, host) = self.ask(&Question::get(&path, Some(bearer))?).await?;
        self.read(answer, &host, CATALOG_LIMIT).await
    }

    /// The control plane's own public keys, as a JWK set (RFC 7517 §5).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn own_jwks(&self) -> Result<serde_json::Value, ClientError> {
        let (answer, host) = self.ask(&Question::get("/.well-known/jwks.json", None)?).await?;
        self.read(answer, &host, JWKS_LIMIT).await
    }

    /// What the control plane's tokens have as `iss`, by its own discovery document (RFC 8414 §3.2).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn own_issuer(&self) -> Result<String, ClientError> {
        #[derive(Deserialize)]
        struct Document {
            issuer: String,
        }
        let question = Question::get("/.well-known/openid-configuration", None)?;
        let (answer, host) = self.ask(&question).await?;
        let document: Document = self.read(answer, &host, SMALL_LIMIT).await?;
        Ok(document.issuer)
    }

    /// The public keys at `url`, of any issuer. At most 1 MiB is read; what is in it, is not looked at.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn jwks(&self, url: &Url) -> Result<serde_json::Value, ClientError> {
        let question = Question::get("", None)?;
        let answer = self.send(url, &question).await?;
        let host = authority(url);
        let answer = self.accepted(answer, &host).await?;
        self.read(answer, &host, JWKS_LIMIT).await
    }

    /// Asks one replica after the other until one answers with anything but its own failure.
    async fn ask(
        &self,
        question: &Question<'_>,
    ) -> Result<(Response<Incoming>, String), ClientError> {
        let count = self.shared.urls.len();
        let first = self.shared.preferred.load(Ordering::Relaxed);
        let mut failure = ClientError::settings("no address of a control plane is known", None);
        for turn in 0..count {
            let index = (first + turn) % count;
            let Some(base) = self.shared.urls.get(index) else { continue };
            match self.ask_one(base, question).await {
                Ok(answer) => {
                    self.shared.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) if error.is_temporary() => failure = error,
                Err(error) => return Err(error),
            }
        }
        Err(failure)
    }

    async fn ask_one(
        &self,
        base: &Url,
        question: &Question<'_>,
    ) -> Result<(Response<Incoming>, String), ClientError> {
        let mut url = base.clone();
        url.set_path(&format!("{}{}", base.path().trim_end_matches('/'), question.path));
        url.set_query(question.query.as_deref());
        let answer = self.send(&url, question).await?;
        let host = authority(&url);
        Ok((self.accepted(answer, &host).await?, host))
    }

    /// Sends one question and waits for the head of its answer.
    async fn send(
        &self,
        url: &Url,
        question: &Question<'_>,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder()
            .method(question.method.clone())
            .uri(url.as_str())
            .header(USER_AGENT, concat!("infrar/", env!("CARGO_PKG_VERSION")))
            .header(ACCEPT, question.accept);
        if let Some(value) = &question.authorization {
            request = request.header(AUTHORIZATION, value);
        }
        if let Some(etag) = question.if_none_match {
            request = request.header(IF_NONE_MATCH, etag);
        }
        if question.form.is_some() {
            request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        let body = Full::from(question.form.clone().unwrap_or_default());
        let request = request.body(body).map_err(|source| {
            ClientError::settings(format!("{url} cannot be asked"), Some(source.into()))
        })?;
        let unreachable = |source: Boxed| ClientError::Unreachable { host: authority(url), source };
        let http = self.shared.http.load_full();
        timeout(self.shared.timeout, http.request(request))
            .await
            .map_err(|elapsed| unreachable(elapsed.into()))?
            .map_err(|error| unreachable(error.into()))
    }

    /// Lets success and 304 through; anything else is a refusal with what its body says.
    async fn accepted(
        &self,
        answer: Response<Incoming>,
        host: &str,
    ) -> Result<Response<Incoming>, ClientError> {
        let status = answer.status();
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(answer);
        }
        let body = self.collect(answer, host, SMALL_LIMIT).await.unwrap_or_default();
        Err(refusal(status, &body))
    }

    async fn read<T: DeserializeOwned>(
        &self,
        answer: Response<Incoming>,
        host: &str,
        limit: usize,
    ) -> Result<T, ClientError> {
        let body = self.collect(answer, host, limit).await?;
        serde_json::from_slice(&body).map_err(|source| ClientError::Malformed {
            host: host.to_owned(),
            source: source.into(),
        })
    }

    async fn collect(
        &self,
        answer: Response<Incoming>,
        host: &str,
        limit: usize,
    ) -> Result<Bytes, ClientError> {
        let unreachable =
            |source: Boxed| ClientError::Unreachable { host: host.to_owned(), source };
        let body = timeout(self.shared.timeout, Limited::new(answer.into_body(), limit).collect())
            .await
            .map_err(|elapsed| unreachable(elapsed.into()))?
            .map_err(unreachable)?;
        Ok(body.to_bytes())
    }
}

/// The revisions of the control plane, as they come.
#[derive(Debug)]
pub struct Watch {
    body: Incoming,
    host: String,
    events: Events,
    /// When the control plane last said anything.
    heard: Instant,
}

impl Watch {
    /// Waits for the next change; `None` when the control plane ended the stream (ask again then).
    /// Cancel-safe: what has arrived is kept, and silence counts from when anything was last heard, however often
    /// this is given up and called again.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] when the connection breaks or is silent for 45 s,
    /// [`ClientError::Malformed`] for what is no event stream of ours.
    pub async fn next(&mut self) -> Result<Option<Change>, ClientError> {
        loop {
            while let Some(event) = self.events.pop() {
                if event.name == "change" {
                    let change = serde_json::from_str(&event.data);
                    return change.map(Some).map_err(|source| self.malformed(source.into()));
                }
            }
            let frame = timeout_at(self.heard + WATCH_SILENCE, self.body.frame())
                .await
                .map_err(|elapsed| self.unreachable(elapsed.into()))?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|error| self.unreachable(error.into()))?;
            self.heard = Instant::now();
            if let Some(piece) = frame.data_ref() {
                let pushed = self.events.push(piece);
                pushed.map_err(|source: EventError| self.malformed(source.into()))?;
            }
        }
    }

    fn unreachable(&self, source: Boxed) -> ClientError {
        ClientError::Unreachable { host: self.host.clone(), source }
    }

    fn malformed(&self, source: Boxed) -> ClientError {
        ClientError::Malformed { host: self.host.clone(), source }
    }
}

/// The form of a question for a token. Apart, because the serializer must not be held over an `.await`: it is not `Send`.
fn token_form(audience: &str, scopes: Option<&ScopeSet>) -> String {
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.append_pair("grant_type", "client_credentials").append_pair("audience", audience);
    if let Some(scopes) = scopes {
        form.append_pair("scope", &scopes.to_string());
    }
    form.finish()
}

/// Host and port for messages, without user, path or query.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// HTTP Basic with both halves form-encoded first, as RFC 6749 §2.3.1 asks.
fn basic(credential: &Credential) -> Result<HeaderValue, ClientError> {
    let encode = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let id = encode(credential.client_id.as_str());
    let pair = format!("{id}:{}", encode(credential.secret.expose_secret()));
    secret_header(&format!("Basic {}", STANDARD.encode(pair)))
}

/// A header value that no log shows.
fn secret_header(text: &str) -> Result<HeaderValue, ClientError> {
    let mut value = HeaderValue::from_str(text).map_err(|_secret| {
        ClientError::settings("the credential has characters that no header may have", None)
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// Reads what a refusing body says: RFC 6749 §5.2 or RFC 9457.
fn refusal(status: StatusCode, body: &[u8]) -> ClientError {
    #[derive(Deserialize)]
    struct Problem {
        code: String,
        detail: Option<String>,
    }
    let (code, detail) = if let Ok(oauth) = serde_json::from_slice::<OauthRefusal>(body) {
        (oauth.error, oauth.error_description)
    } else if let Ok(problem) = serde_json::from_slice::<Problem>(body) {
        (problem.code, problem.detail)
    } else {
        (String::new(), None)
    };
    ClientError::Refused { status, code, detail }
}

/// The system's roots and those of a file. The connector adds its own ALPN.
fn trust(ca: Option<(&Path, &[u8])>) -> Result<ClientConfig, ClientError> {
    let tls = match ca {
        Some((path, pem)) => ClientTls::from_pem_named(pem, &path.display().to_string()),
        None => ClientTls::new(None),
    };
    let tls = tls.map_err(|source| {
        ClientError::settings("the trusted certificates cannot be used", Some(source.into()))
    })?;
    Ok(ClientConfig::clone(&tls.config(Alpn::None)))
}

fn read_ca(path: &Path) -> Result<Vec<u8>, ClientError> {
    std::fs::read(path).map_err(|source| {
        let what = format!("the trusted certificates in {} cannot be read", path.display());
        ClientError::settings(what, Some(source.into()))
    })
}

fn http(tls: ClientConfig, limit: Duration) -> Http {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_keepalive(Some(Duration::from_secs(30)));
    connector.set_connect_timeout(Some(limit.min(Duration::from_secs(5))));
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_all_versions()
        .wrap_connector(connector);
    HyperClient::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(30))
        .pool_max_idle_per_host(2)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .http2_keep_alive_timeout(Duration::from_secs(10))
        .build(connector)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn both_kinds_of_refusal_are_understood() {
        let oauth = br#"{"error":"invalid_target","error_description":"no grant"}"#;
        let problem = br#"{"type":"urn:x","code":"token-missing","detail":"say who you are"}"#;
        for (body, expected) in
            [(&oauth[..], "invalid_target"), (&problem[..], "token-missing"), (b"<html>", "")]
        {
            let error = refusal(StatusCode::BAD_REQUEST, body);
            assert!(matches!(&error, ClientError::Refused { code, .. } if code == expected));
            assert!(!error.is_temporary());
        }
        assert!(refusal(StatusCode::BAD_GATEWAY, b"").is_temporary());
    }

    #[test]
    fn secrets_are_form_encoded_and_hidden() {
        let credential = Credential {
            client_id: "web".parse().unwrap(),
            secret: SecretString::from("a+b:c d%"),
        };
        let header = basic(&credential).unwrap();
        let encoded = header.to_str().unwrap().strip_prefix("Basic ").unwrap();
        assert_eq!(STANDARD.decode(encoded).unwrap(), b"web:a%2Bb%3Ac+d%25");
        assert!(!format!("{header:?} {credential:?}").contains("a+b"));
        assert!(!format!("{header:?}").contains(encoded));
    }

    #[test]
    fn what_is_no_http_address_is_refused() {
        for bad in ["ftp://a", "unix:/x"] {
            let settings = ClientSettings::new(vec![url(bad)], None);
            assert!(matches!(Client::new(settings), Err(ClientError::Settings { .. })), "{bad}");
        }
    }

    #[test]
    fn a_ca_file_without_certificates_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        std::fs::write(&path, "nothing").unwrap();
        let error = Client::new(ClientSettings::new(Vec::new(), Some(path))).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("ca.pem"), "{cause}");
    }

    #[tokio::test]
    async fn certificates_that_are_trusted_are_taken_up_while_it_runs() {
        let authority = || {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut parameters = rcgen::CertificateParams::default();
            parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            rcgen::CertifiedIssuer::self_signed(parameters, key).unwrap()
        };
        let (old, new) = (authority(), authority());
        let key = rcgen::KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned()];
        let leaf = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &new).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let [ca, cert, secret] = ["ca", "cert", "key"].map(|name| folder.path().join(name));
        std::fs::write(&ca, old.pem()).unwrap();
        std::fs::write(&cert, leaf.pem()).unwrap();
        std::fs::write(&secret, key.serialize_pem()).unwrap();
        let tls = crate::net::ServerTls::from_files(&cert, &secret, crate::net::MinVersion::Tls13)
            .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = url(&format!("https://localhost:{}", listener.local_addr().unwrap().port()));
        let serving = async {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let mut config = rustls::ServerConfig::clone(&tls.current());
                config.alpn_protocols = vec![b"http/1.1".to_vec()];
                let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
                let answer = "HTTP/1.1 200 OK\r\ncontent-length: 11\r\nconnection: close\r\n\r\n{\"keys\":[]}";
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.shutdown().await.ok();
            }
        };
        let asking = async {
            let client = Client::new(ClientSettings::new(vec![address], Some(ca.clone()))).unwrap();
            let other = client.clone();
            assert!(client.own_jwks().await.is_err(), "the old authority vouches for nobody here");
            assert!(!client.reread().unwrap());
            // A wrong file takes nothing away, and is told once.
            std::fs::write(&ca, "nothing").unwrap();
            assert!(client.reread().is_err());
            assert!(!client.reread().unwrap());
            std::fs::remove_file(&ca).unwrap();
            assert!(client.reread().is_err());
            assert!(!client.reread().unwrap());
            std::fs::write(&ca, new.pem()).unwrap();
            assert!(client.reread().unwrap());
            assert_eq!(other.own_jwks().await.unwrap()["keys"], serde_json::json!([]));
        };
        tokio::select! {
            () = asking => {}
            () = serving => unreachable!("it serves until it has been asked"),
        }
    }

    #[tokio::test]
    async fn nobody_listening_is_unreachable_and_names_the_host() {
        // Bound and dropped: the port is free again, and nobody listens.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = url(&format!("http://127.0.0.1:{port}"));
        let client = Client::new(ClientSettings::new(vec![address], None)).unwrap();
        let error = client.own_jwks().await.unwrap_err();
        assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
        assert!(error.to_string().contains(&port.to_string()));
    }

    #[tokio::test]
    async fn a_silent_stream_is_given_up_however_often_its_reader_looks_away() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = url(&format!("http://{}", listener.local_addr().unwrap()));
        let client = Client::new(ClientSettings::new(vec![address], None)).unwrap();
        let bearer = SecretString::from("pass");
        let answering = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
            stream
        };
        let (watch, _held) = tokio::join!(client.watch(&bearer, 1), answering);
        let mut watch = watch.unwrap();
        // From here on nothing comes, so the paused clock goes from timer to timer.
        tokio::time::pause();
        let poll = Duration::from_secs(30);
        assert!(timeout(poll, watch.next()).await.is_err());
        let silence = timeout(poll, watch.next()).await.unwrap();
        assert!(matches!(silence, Err(ClientError::Unreachable { .. })), "{silence:?}");
    }

    #[tokio::test]
    async fn without_a_replica_the_client_says_so() {
        let client = Client::new(ClientSettings::new(Vec::new(), None)).unwrap();
        assert!(matches!(client.own_jwks().await, Err(ClientError::Settings { .. })));
    }
}
