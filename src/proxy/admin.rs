//! The proxy's admin API, on loopback and on a runtime of its own: a slow scrape never touches a request.
//!
//! It has no password, so it guards itself against browsers: a `host` that is not loopback is DNS rebinding (421), an
//! `origin` is a web page (403). The probes stand open to a network, so connections are numbered, none may keep silent or
//! leave its answers unread for long, and a probe's connection has one answer. No operation reads a body.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Notify,
    time::timeout,
};
use tower_http::set_header::SetResponseHeaderLayer;

use crate::{
    discovery::Directory,
    net::{self, Cut, Flowing, Gate},
    proxy::route,
    runtime::{Phase, Shutdown, Supervisor},
    telemetry::Registry,
    wire::{PROBLEM_JSON, Problem, request_id},
};

/// No admin request takes longer than this, nor a request's head, nor does a connection stay longer without one, or with
/// an answer that gets nowhere.
const LIMIT: Duration = Duration::from_secs(10);
/// Connections of one listener: some probes, some scrapers and some people at a time.
const CONNECTIONS: usize = 256;

/// Whether the proxy can serve.
pub type Ready = Arc<dyn Fn() -> Result<(), &'static str> + Send + Sync>;

/// What the admin API tells.
#[derive(Clone)]
pub struct Admin {
    /// The metrics.
    pub registry: Arc<Registry>,
    /// The snapshot.
    pub directory: Arc<Directory>,
    /// Whether the proxy can serve.
    pub ready: Ready,
    /// Of the ways in: a proxy that ends is not ready.
    pub shutdown: Shutdown,
    /// Told when somebody asks for the end.
    pub drain: Arc<Notify>,
    /// Its connections live as long as this.
    pub supervisor: Supervisor,
}

impl Admin {
    /// Serves everything, to this machine alone, until the end.
    pub async fn serve(self, listener: TcpListener) {
        // On this machine all come from one address.
        self.run(listener, self.routes(), CONNECTIONS).await;
    }

    /// Serves the probes and the metrics only, for the outside.
    pub async fn serve_probes(self, listener: TcpListener) {
        self.run(listener, self.probe_routes(), CONNECTIONS / 2).await;
    }

    fn routes(&self) -> Router {
        let routes = self
            .probes()
            .route("/v1/drain", post(drain))
            .route("/v1/snapshot", get(snapshot))
            .method_not_allowed_fallback(wrong_method)
            .with_state(self.clone());
        routes.layer(middleware::from_fn(only_this_machine)).layer(middleware::from_fn(in_time))
    }

    fn probe_routes(&self) -> Router {
        let routes = self.probes().method_not_allowed_fallback(wrong_method);
        let once = SetResponseHeaderLayer::overriding(
            header::CONNECTION,
            HeaderValue::from_static("close"),
        );
        routes.with_state(self.clone()).layer(middleware::from_fn(in_time)).layer(once)
    }

    fn probes(&self) -> Router<Self> {
        Router::new()
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .fallback(|| async {
                problem(StatusCode::NOT_FOUND, "not-found", "there is nothing here")
            })
    }

    /// Accepts connections until the end, `each` of them from one address.
    async fn run(&self, listener: TcpListener, routes: Router, each: usize) {
        let gate = Gate::new(CONNECTIONS, each);
        let ended = self.shutdown.token(Phase::Abort);
        loop {
            let (stream, peer) = tokio::select! {
                accepted = net::accept(&listener) => accepted,
                () = ended.cancelled() => return,
            };
            let Some(place) = gate.enter(peer.ip()) else { continue };
            let routes = routes.clone();
            self.supervisor.spawn_until_end("admin-connection", async move {
                converse(stream, routes).await;
                drop(place);
            });
        }
    }
}

/// One connection, HTTP/1.1, from its first byte to its last. A connection that keeps silent is closed.
async fn converse<S>(stream: S, routes: Router)
where
    S: AsyncRead + AsyncWrite + Cut + Unpin + Send + 'static,
{
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(LIMIT)
        .max_headers(100)
        .max_buf_size(64 * 1024)
        .serve_connection(
            TokioIo::new(Flowing::new(stream, LIMIT)),
            TowerToHyperService::new(routes),
        );
    if let Err(error) = served.await {
        tracing::debug!(error = &error as &dyn std::error::Error, "an admin connection broke");
    }
}

/// The answer of an operation, or that it took too long.
async fn in_time(request: Request, next: Next) -> Response {
    timeout(LIMIT, next.run(request)).await.unwrap_or_else(|_elapsed| {
        problem(StatusCode::GATEWAY_TIMEOUT, "deadline", "no answer was ready in time")
    })
}

async fn wrong_method() -> Response {
    problem(
        StatusCode::METHOD_NOT_ALLOWED,
        "method-not-allowed",
        "this path does not take that method",
    )
}

/// A refusal, with what RFC 9209 calls it.
fn problem(status: StatusCode, code: &str, detail: &str) -> Response {
    let error = match status {
        StatusCode::FORBIDDEN | StatusCode::MISDIRECTED_REQUEST => "http_request_denied",
        StatusCode::GATEWAY_TIMEOUT => "http_response_timeout",
        status if status.is_client_error() => "http_request_error",
        _ours => "proxy_internal_error",
    };
    let id = request_id();
    let mut problem = Problem::new(status.as_u16(), code, detail.to_owned());
    id.to_str().unwrap_or_default().clone_into(&mut problem.request_id);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON)),
        (HeaderName::from_static("x-request-id"), id),
    ];
    let proxy_status = [("proxy-status", format!("infrar; error={error}"))];
    (status, headers, proxy_status, Json(problem)).into_response()
}

/// Keeps web pages out.
async fn only_this_machine(headers: HeaderMap, request: Request, next: Next) -> Response {
    if headers.contains_key(header::ORIGIN) {
        return problem(
            StatusCode::FORBIDDEN,
            "origin-not-allowed",
            "the admin API is not for web pages",
        );
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let named =
        request.uri().authority().map(http::uri::Authority::as_str).or(host).unwrap_or_default();
    if !is_this_machine(named) {
        return problem(
            StatusCode::MISDIRECTED_REQUEST,
            "host-not-allowed",
            "the admin API answers to localhost and loopback addresses only",
        );
    }
    next.run(request).await
}

/// Whether an authority names loopback.
fn is_this_machine(authority: &str) -> bool {
    let host = route::host(authority);
    let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || address.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn readyz(State(admin): State<Admin>) -> Response {
    if admin.shutdown.reached(Phase::NotReady) {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response();
    }
    match (admin.ready)() {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let text = admin.registry.expose();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn drain(State(admin): State<Admin>) -> Response {
    tracing::info!("told to drain");
    admin.drain.notify_one();
    (StatusCode::ACCEPTED, "draining\n").into_response()
}

async fn snapshot(State(admin): State<Admin>) -> Response {
    match admin.directory.load() {
        Some(catalog) => Json(&*catalog).into_response(),
        None => problem(StatusCode::SERVICE_UNAVAILABLE, "not-ready", "there is no snapshot yet"),
    }
}

/// Where an admin API listens.
#[derive(Clone, Copy, Debug)]
pub struct AdminAddress {
    /// Everything, on loopback.
    pub admin: SocketAddr,
    /// The probes.
    pub probes: Option<SocketAddr>,
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http_body_util::BodyExt;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        runtime::Handle,
        time::Instant,
    };
    use tower::ServiceExt;

    use super::*;

    fn admin() -> Admin {
        Admin {
            registry: Arc::default(),
            directory: Arc::default(),
            ready: Arc::new(|| Ok(())),
            shutdown: Shutdown::default(),
            drain: Arc::default(),
            supervisor: Supervisor::new(Handle::current()),
        }
    }

    async fn refused(request: http::request::Builder) -> (StatusCode, HeaderMap, Problem) {
        let request = request.body(Body::empty()).unwrap();
        let (head, body) = admin().routes().oneshot(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status, head.headers, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn every_refusal_is_a_problem_with_a_proxy_status() {
        let local = |request: http::request::Builder| request.header("host", "localhost:15000");
        for (request, status, code, error) in [
            (local(http::Request::get("/nothing")), 404, "not-found", "http_request_error"),
            (local(http::Request::post("/livez")), 405, "method-not-allowed", "http_request_error"),
            (
                local(http::Request::get("/v1/drain")),
                405,
                "method-not-allowed",
                "http_request_error",
            ),
            (
                local(http::Request::get("/livez")).header("origin", "https://a.example"),
                403,
                "origin-not-allowed",
                "http_request_denied",
            ),
            (
                http::Request::get("/livez").header("host", "rebound.example"),
                421,
                "host-not-allowed",
                "http_request_denied",
            ),
            (local(http::Request::get("/v1/snapshot")), 503, "not-ready", "proxy_internal_error"),
        ] {
            let (answered, headers, problem) = refused(request).await;
            assert_eq!((answered.as_u16(), problem.code.as_str()), (status, code));
            assert_eq!(headers["proxy-status"], format!("infrar; error={error}"));
            assert_eq!(headers["content-type"], PROBLEM_JSON);
            assert_eq!(headers["x-request-id"], problem.request_id);
            assert_eq!(problem.request_id.len(), 32);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_keeps_silent_or_never_ends_its_head_is_closed() {
        for words in ["", "GET /livez HTTP/1.1\r\nhost: localhost\r\n"] {
            let (mut client, server) = duplex(4096);
            client.write_all(words.as_bytes()).await.unwrap();
            let begun = Instant::now();
            let mut heard = Vec::new();
            let (_, read) =
                tokio::join!(converse(server, admin().routes()), client.read_to_end(&mut heard));
            read.unwrap();
            assert_eq!(begun.elapsed(), LIMIT, "{words:?}");
            assert!(!String::from_utf8_lossy(&heard).contains("200"), "{words:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_never_reads_its_answers_is_closed() {
        let (mut client, server) = duplex(4096);
        let request = "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";
        client.write_all(request.repeat(80).as_bytes()).await.unwrap();
        let begun = Instant::now();
        let served = timeout(LIMIT * 5, converse(server, admin().routes())).await;
        assert!(served.is_ok(), "it waits still");
        assert_eq!(begun.elapsed(), LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_is_answered_once_per_connection() {
        let (mut client, server) = duplex(64 * 1024);
        let request = "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";
        client.write_all(request.repeat(3).as_bytes()).await.unwrap();
        let mut heard = String::new();
        let (_, read) = tokio::join!(
            converse(server, admin().probe_routes()),
            client.read_to_string(&mut heard)
        );
        read.unwrap();
        assert_eq!(heard.matches("HTTP/1.1 200").count(), 1, "{heard}");
        assert!(heard.contains("connection: close"), "{heard}");
    }

    #[test]
    fn only_names_of_this_machine_are_answered_to() {
        for good in ["localhost", "Localhost:15000", "127.0.0.1:15000", "127.8.8.8", "[::1]:15000"]
        {
            assert!(is_this_machine(good), "{good}");
        }
        for bad in ["", "data", "localhost.example", "10.0.0.1", "[fd00::1]:15000", "127.0.0.1.x"] {
            assert!(!is_this_machine(bad), "{bad}");
        }
    }
}
