//! The proxy's admin API, on loopback and on a runtime of its own: a slow scrape never touches a request.
//!
//! It has no password, so it guards itself against browsers: a `host` that is not loopback is DNS rebinding (421), an
//! `origin` is a web page (403).

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::{net::TcpListener, sync::Notify};
use tower_http::{limit::RequestBodyLimitLayer, timeout::TimeoutLayer};

use crate::{
    discovery::Directory,
    proxy::route,
    runtime::{Phase, Shutdown},
    telemetry::Registry,
    wire::{PROBLEM_JSON, Problem},
};

/// No admin request takes longer than this.
const LIMIT: Duration = Duration::from_secs(10);

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
}

impl Admin {
    /// Serves everything, to this machine alone, until the end.
    ///
    /// # Errors
    /// Those of the listener.
    pub async fn serve(self, listener: TcpListener) -> std::io::Result<()> {
        let routes = self
            .probes()
            .route("/v1/drain", post(drain))
            .route("/v1/snapshot", get(snapshot))
            .with_state(self.clone())
            .layer(middleware::from_fn(only_this_machine));
        self.run(listener, routes).await
    }

    /// Serves the probes and the metrics only, for the outside.
    ///
    /// # Errors
    /// Those of the listener.
    pub async fn serve_probes(self, listener: TcpListener) -> std::io::Result<()> {
        let routes = self.probes().with_state(self.clone());
        self.run(listener, routes).await
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

    async fn run(&self, listener: TcpListener, routes: Router) -> std::io::Result<()> {
        let ended = self.shutdown.token(Phase::Abort);
        let routes = routes
            .layer(RequestBodyLimitLayer::new(64 * 1024))
            .layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, LIMIT));
        tokio::select! {
            served = axum::serve(listener, routes).into_future() => served,
            () = ended.cancelled() => Ok(()),
        }
    }
}

fn problem(status: StatusCode, code: &str, detail: &str) -> Response {
    let problem = Problem::new(status.as_u16(), code, detail.to_owned());
    (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], Json(problem)).into_response()
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
    use super::*;

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
