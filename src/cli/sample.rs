//! Small applications for the demonstration: what a team would have, and nothing of infrar in them.
//!
//! They listen on loopback in plain HTTP, call each other by name through their sidecar, and read who called them from
//! the headers that the sidecar puts on a request.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    response::Response,
    routing::{get, post},
};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, time};

use crate::runtime::Supervisor;

/// The most that a sample reads of an answer.
const ANSWER_LIMIT: usize = 64 * 1024;

/// Serves `app` on `listener` until the shutdown, and finishes what it has.
pub(crate) fn serve(
    supervisor: &Supervisor,
    name: &'static str,
    listener: TcpListener,
    app: Router,
) {
    let ending = supervisor.ending();
    supervisor.spawn(name, async move {
        let served = axum::serve(listener, app).with_graceful_shutdown(ending).await;
        if let Err(error) = served {
            tracing::error!(%error, name, "a sample application has ended");
        }
    });
}

/// `data-intelligence`: answers queries, takes in records, streams.
pub(crate) fn data_intelligence() -> Router {
    Router::new()
        .route("/query", post(query))
        .route("/data", post(take_in))
        .route("/stream", get(stream))
        .route("/healthz", get(healthz))
}

/// `web-application`: a page that needs `data-intelligence`.
pub(crate) fn web_application(sidecar: Sidecar) -> Router {
    Router::new().route("/", get(page)).route("/healthz", get(healthz)).with_state(sidecar)
}

/// `background-workers`: nothing to ask it but its health.
pub(crate) fn background_workers() -> Router {
    Router::new().route("/healthz", get(healthz))
}

async fn healthz() -> &'static str {
    "ok\n"
}

/// What the sidecar in front of this application found out about the caller.
fn asked_by(headers: &HeaderMap) -> Value {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("nobody");
    json!({ "caller": text("infrar-caller"), "scopes": text("infrar-scopes") })
}

async fn query(headers: HeaderMap, body: Bytes) -> Json<Value> {
    Json(json!({
        "service": "data-intelligence",
        "asked_by": asked_by(&headers),
        "query_bytes": body.len(),
        "rows": [
            { "product": "kettle", "sold": 42 },
            { "product": "teapot", "sold": 418 },
        ],
    }))
}

async fn take_in(headers: HeaderMap, body: Bytes) -> (StatusCode, Json<Value>) {
    let answer = json!({ "stored_bytes": body.len(), "asked_by": asked_by(&headers) });
    (StatusCode::ACCEPTED, Json(answer))
}

/// Five lines, a fifth of a second apart: whoever buffers shows it.
async fn stream() -> Response {
    let lines = futures_util::stream::unfold(1u8, |line| async move {
        if line > 5 {
            return None;
        }
        if line > 1 {
            time::sleep(Duration::from_millis(200)).await;
        }
        Some((Ok::<_, Infallible>(Bytes::from(format!("line {line} of 5\n"))), line + 1))
    });
    let mut response = Response::new(Body::from_stream(lines));
    let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

async fn page(State(sidecar): State<Sidecar>) -> (StatusCode, Json<Value>) {
    match sidecar.post("data-intelligence", "/query", r#"{"top":2}"#).await {
        Ok(answer) if answer.status.is_success() => {
            (StatusCode::OK, Json(json!({ "page": "bestsellers", "data": answer.json() })))
        }
        Ok(answer) => (
            StatusCode::BAD_GATEWAY,
            Json(
                json!({ "page": "unavailable", "status": answer.status.as_u16(), "why": answer.json() }),
            ),
        ),
        Err(error) => (
            StatusCode::BAD_GATEWAY,
            Json(json!({ "page": "unavailable", "why": error.to_string() })),
        ),
    }
}

/// An application's way out: the outbound port of the sidecar beside it.
#[derive(Clone)]
pub(crate) struct Sidecar {
    outbound: SocketAddr,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

impl Answer {
    /// The body as JSON, or as text where it is none.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_no_json| String::from_utf8_lossy(&self.body).into())
    }

    /// infrar's code, when the answer is a refusal.
    pub(crate) fn code(&self) -> Option<String> {
        Some(self.json().get("code")?.as_str()?.to_owned())
    }
}

/// Why nothing came back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The name or the path makes no request.
    #[error("the request cannot be written")]
    Request(#[source] http::Error),
    /// The sidecar could not be reached.
    #[error("the sidecar does not answer")]
    Sidecar(#[source] hyper_util::client::legacy::Error),
    /// The answer broke off, or is longer than a sample answers.
    #[error("the answer cannot be read")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Sidecar {
    /// The sidecar whose outbound port is at `outbound`.
    pub(crate) fn new(outbound: SocketAddr) -> Self {
        Self { outbound, client: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// Calls a service by its logical name, as `curl -H 'host: NAME' http://OUTBOUND/PATH -d BODY` does.
    ///
    /// # Errors
    /// [`CallError`] when nothing comes back; a refusal is an answer.
    pub(crate) async fn post(
        &self,
        service: &str,
        path: &str,
        body: &'static str,
    ) -> Result<Answer, CallError> {
        let request = Request::post(format!("http://{}{path}", self.outbound))
            .header(header::CONTENT_TYPE, "application/json");
        self.send(service, request, body).await
    }

    /// As [`Sidecar::post`], without a body.
    ///
    /// # Errors
    /// [`CallError`] when nothing comes back; a refusal is an answer.
    pub(crate) async fn get(&self, service: &str, path: &str) -> Result<Answer, CallError> {
        self.send(service, Request::get(format!("http://{}{path}", self.outbound)), "").await
    }

    async fn send(
        &self,
        service: &str,
        request: http::request::Builder,
        body: &'static str,
    ) -> Result<Answer, CallError> {
        let request = request
            .header(header::HOST, service)
            .body(Full::from(body))
            .map_err(CallError::Request)?;
        let response = self.client.request(request).await.map_err(CallError::Sidecar)?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_LIMIT).collect().await.map_err(CallError::Answer)?;
        Ok(Answer { status: head.status, body: body.to_bytes() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn loopback() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").await.unwrap()
    }

    #[tokio::test]
    async fn the_page_shows_what_the_other_service_answered() {
        let supervisor = Supervisor::new(tokio::runtime::Handle::current());
        let (data, web) = (loopback().await, loopback().await);
        // Without a sidecar in between: the two applications alone.
        let to_data = Sidecar::new(data.local_addr().unwrap());
        let to_web = web.local_addr().unwrap();
        serve(&supervisor, "data-intelligence", data, data_intelligence());
        serve(&supervisor, "web-application", web, web_application(to_data.clone()));

        let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let page = client.get(format!("http://{to_web}/").parse().unwrap()).await.unwrap();
        assert_eq!(page.status(), StatusCode::OK);
        let page = page.into_body().collect().await.unwrap().to_bytes();
        let page: Value = serde_json::from_slice(&page).unwrap();
        assert_eq!(page["data"]["rows"][1]["sold"], 418);
        assert_eq!(page["data"]["asked_by"]["caller"], "nobody");

        let stored = to_data.post("data-intelligence", "/data", "12345").await.unwrap();
        assert_eq!(stored.status, StatusCode::ACCEPTED);
        assert_eq!(stored.json()["stored_bytes"], 5);
        assert_eq!(stored.code(), None);
        drop(client);
        drop(to_data);
        supervisor.shutdown(Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn a_page_without_its_data_says_why() {
        let nobody = loopback().await.local_addr().unwrap();
        let (status, Json(why)) = page(State(Sidecar::new(nobody))).await;
        assert_eq!(status, StatusCode::BAD_GATEWAY);
        assert_eq!(why["why"], "the sidecar does not answer");
    }
}
