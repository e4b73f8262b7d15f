//! What the client asks besides reading: endpoints, proxies, the project as a document.

use http::{
    HeaderValue, Method, Response,
    header::{ETAG, HeaderName, IF_MATCH},
};
use hyper::body::Incoming;
use secrecy::SecretString;
use serde::Serialize;
use uuid::Uuid;

use super::client::{CATALOG_LIMIT, Client, ClientError, Question, SMALL_LIMIT};
use crate::{
    api::{
        Adjustment, EndpointAnswer, Heartbeat, ProjectDocument, ProxyList, ProxyReport,
        Registration,
    },
    model::{EndpointId, ServiceName},
};

impl Client {
    /// Registers an endpoint, or says anew what is registered.
    ///
    /// # Errors
    /// [`ClientError`]; `host-taken` and `owned-by-project` arrive as `Refused`.
    pub async fn register(
        &self,
        bearer: &SecretString,
        service: &ServiceName,
        id: &EndpointId,
        registration: &Registration,
    ) -> Result<EndpointAnswer, ClientError> {
        let path = endpoint_path(service, id);
        let question = Question { method: Method::PUT, ..said(&path, bearer, registration)? };
        let (answer, host) = self.ask(&question).await?;
        self.read(answer, &host, SMALL_LIMIT).await
    }

    /// Begins the lease of an endpoint anew.
    ///
    /// # Errors
    /// [`ClientError`]; `unknown-endpoint` when it is gone and has to be registered again.
    pub async fn heartbeat(
        &self,
        bearer: &SecretString,
        service: &ServiceName,
        id: &EndpointId,
    ) -> Result<Heartbeat, ClientError> {
        let path = format!("{}/heartbeat", endpoint_path(service, id));
        let question = Question { method: Method::POST, ..Question::get(&path, Some(bearer))? };
        let (answer, host) = self.ask(&question).await?;
        self.read(answer, &host, SMALL_LIMIT).await
    }

    /// One endpoint, with the revision of its last change.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn endpoint(
        &self,
        bearer: &SecretString,
        service: &ServiceName,
        id: &EndpointId,
    ) -> Result<(EndpointAnswer, Option<u64>), ClientError> {
        let path = endpoint_path(service, id);
        let (answer, host) = self.ask(&Question::get(&path, Some(bearer))?).await?;
        let changed = revision_of(&answer);
        Ok((self.read(answer, &host, SMALL_LIMIT).await?, changed))
    }

    /// Changes state or weight; `at`: only if it has not changed since that revision.
    ///
    /// # Errors
    /// [`ClientError`]; `revision-mismatch` when it has.
    pub async fn adjust(
        &self,
        bearer: &SecretString,
        service: &ServiceName,
        id: &EndpointId,
        adjustment: &Adjustment,
        at: Option<u64>,
    ) -> Result<EndpointAnswer, ClientError> {
        let path = endpoint_path(service, id);
        let question = Question {
            method: Method::PATCH,
            precondition: at.map(if_match),
            ..said(&path, bearer, adjustment)?
        };
        let (answer, host) = self.ask(&question).await?;
        self.read(answer, &host, SMALL_LIMIT).await
    }

    /// Takes a registered endpoint away; `at`: only if it has not changed since that revision.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn remove(
        &self,
        bearer: &SecretString,
        service: &ServiceName,
        id: &EndpointId,
        at: Option<u64>,
    ) -> Result<(), ClientError> {
        let path = endpoint_path(service, id);
        let question = Question {
            method: Method::DELETE,
            precondition: at.map(if_match),
            ..Question::get(&path, Some(bearer))?
        };
        self.ask(&question).await.map(drop)
    }

    /// Tells which revision a proxy serves.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn report(
        &self,
        bearer: &SecretString,
        instance: Uuid,
        report: &ProxyReport,
    ) -> Result<(), ClientError> {
        let path = format!("/v1/proxies/{instance}");
        let question = Question { method: Method::PUT, ..said(&path, bearer, report)? };
        self.ask(&question).await.map(drop)
    }

    /// Who serves which revision.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn proxies(&self, bearer: &SecretString) -> Result<ProxyList, ClientError> {
        let (answer, host) = self.ask(&Question::get("/v1/proxies", Some(bearer))?).await?;
        self.read(answer, &host, CATALOG_LIMIT).await
    }

    /// The project as it was written, and the revision at which it was.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn project(
        &self,
        bearer: &SecretString,
    ) -> Result<(ProjectDocument, Option<u64>), ClientError> {
        let (answer, host) = self.ask(&Question::get("/v1/project", Some(bearer))?).await?;
        let changed = revision_of(&answer);
        Ok((self.read(answer, &host, CATALOG_LIMIT).await?, changed))
    }

    /// Puts a project in force, if the one that was written at `at` still is; gives the revision.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn import(
        &self,
        bearer: &SecretString,
        document: &ProjectDocument,
        at: Option<u64>,
    ) -> Result<Option<u64>, ClientError> {
        let question = Question {
            method: Method::PUT,
            precondition: at.map(if_match),
            ..said("/v1/project", bearer, document)?
        };
        let (answer, _) = self.ask(&question).await?;
        Ok(revision_of(&answer))
    }
}

fn endpoint_path(service: &ServiceName, id: &EndpointId) -> String {
    format!("/v1/services/{service}/endpoints/{id}")
}

/// A question with a JSON body.
fn said<'a, T: Serialize>(
    path: &'a str,
    bearer: &SecretString,
    body: &T,
) -> Result<Question<'a>, ClientError> {
    let body = serde_json::to_string(body).map_err(|source| {
        ClientError::settings("it cannot be written as JSON", Some(source.into()))
    })?;
    Ok(Question { body: Some(("application/json", body)), ..Question::get(path, Some(bearer))? })
}

fn if_match(revision: u64) -> (HeaderName, String) {
    (IF_MATCH, format!("\"{revision}\""))
}

fn revision_of(answer: &Response<Incoming>) -> Option<u64> {
    let etag = answer.headers().get(ETAG).map(HeaderValue::to_str)?.ok()?;
    etag.trim_matches('"').parse().ok()
}
