//! Who issues bearers: the control plane, a file, or nobody; and why there is none.
//!
//! A source is asked once and answers once. Who waits for it, how long its answer serves and when it is asked again is
//! for the slot to say.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use secrecy::SecretString;

use crate::{
    api::{Client, ClientError, Credential, TokenAnswer},
    identity::bearer::NO_EXPIRY,
    model::{ScopeSet, ServiceName},
};

/// How often a token file is looked at.
pub(super) const FILE_EVERY: Duration = Duration::from_secs(1);
/// The largest token file that is read.
const FILE_LIMIT: u64 = 64 * 1024;

/// Why there is no token. Shared by all who waited for it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenUnavailable {
    /// The issuer says no: `invalid_target` when the callee is not granted (RFC 8707 §2), `invalid_client`.
    #[error("the issuer refuses a token ({code})")]
    Refused {
        /// The `error` of RFC 6749 §5.2.
        code: String,
        /// Status and detail.
        #[source]
        source: Arc<ClientError>,
    },
    /// The issuer gave no usable answer.
    #[error("the issuer cannot be asked for a token")]
    Unreachable(#[source] Arc<ClientError>),
    /// It gave none in time.
    #[error("the issuer gave no answer in time")]
    Deadline,
    /// What came cannot be sent, or has expired already.
    #[error("the token cannot be used")]
    Unusable,
    /// The file with the token, or with the secret to ask for one, cannot be read.
    #[error("{} cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Nothing is set up that could issue one.
    #[error("no control plane and no token file gives tokens for this service")]
    NoSource,
}

impl TokenUnavailable {
    /// Whether the issuer said that the callee is not granted: no failure, but a missing permission.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if matches!(code.as_str(), "invalid_target" | "access_denied"))
    }

    /// What it comes down to, for whoever called: no address, path or code.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused { code, .. } if code == "invalid_client" => {
                "wrong credential: the issuer does not accept this proxy's own"
            }
            Self::Refused { .. } => "the issuer refuses a token for it",
            Self::Unreachable(error) => match &**error {
                ClientError::Refused { .. } => "the issuer is out of order or too busy",
                ClientError::Unreachable { .. } => "the issuer cannot be reached",
                ClientError::Malformed { .. } => "the issuer's answer cannot be used",
                ClientError::Settings { .. } => "the issuer cannot be asked with these settings",
            },
            Self::Deadline => "the issuer cannot be reached: it gave no answer in time",
            Self::Unusable => "the token cannot be used: it has expired or is malformed",
            Self::File { .. } => "no credential: the file that holds it cannot be read",
            Self::NoSource => "no credential: nothing is set up that gives tokens for it",
        }
    }
}

impl From<ClientError> for TokenUnavailable {
    fn from(error: ClientError) -> Self {
        match &error {
            ClientError::Refused { code, .. } if !error.is_temporary() => {
                Self::Refused { code: code.clone(), source: Arc::new(error) }
            }
            ClientError::Refused { .. }
            | ClientError::Unreachable { .. }
            | ClientError::Malformed { .. }
            | ClientError::Settings { .. } => Self::Unreachable(Arc::new(error)),
        }
    }
}

/// Whoever issues bearers.
pub trait TokenSource: Send + Sync + 'static {
    /// Asks for a bearer for `audience`, once. Awaited on the side runtime.
    fn ask(
        &self,
        audience: &ServiceName,
    ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>>;
}

/// The project's own token endpoint.
#[derive(Clone, Debug)]
pub struct ControlTokens {
    client: Client,
    credential: Credential,
}

impl ControlTokens {
    /// Tokens for the bearer of `credential`, with all scopes that are granted to it.
    #[must_use]
    pub fn new(client: Client, credential: Credential) -> Self {
        Self { client, credential }
    }
}

impl TokenSource for ControlTokens {
    fn ask(
        &self,
        audience: &ServiceName,
    ) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
        let (asker, audience) = (self.clone(), audience.clone());
        async move { Ok(asker.client.token(&asker.credential, audience.as_str(), None).await?) }
            .boxed()
    }
}

/// No issuer at all: a proxy that has only token files.
#[derive(Clone, Copy, Debug)]
pub struct NoTokens;

impl TokenSource for NoTokens {
    fn ask(&self, _: &ServiceName) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
        std::future::ready(Err(TokenUnavailable::NoSource)).boxed()
    }
}

/// A bearer from elsewhere, in a file. Its life is that of the JWT in it, if it is one.
pub(super) struct TokenFile {
    pub(super) path: PathBuf,
}

impl TokenSource for TokenFile {
    fn ask(&self, _: &ServiceName) -> BoxFuture<'static, Result<TokenAnswer, TokenUnavailable>> {
        let path = self.path.clone();
        async move {
            let fault = |source: io::Error| TokenUnavailable::File {
                path: path.clone(),
                source: Arc::new(source),
            };
            let text = read_small(&path).await.map_err(fault)?;
            let access_token = SecretString::from(text.trim());
            Ok(TokenAnswer {
                access_token,
                expires_in: Some(NO_EXPIRY),
                scope: ScopeSet::default(),
            })
        }
        .boxed()
    }
}

async fn read_small(path: &Path) -> io::Result<String> {
    if tokio::fs::metadata(path).await?.len() > FILE_LIMIT {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    tokio::fs::read_to_string(path).await
}

/// What is another when a file is: its content, or the link that a projected volume swaps.
pub(super) async fn stamp(path: &Path) -> Option<(u64, u64, i64, i64)> {
    use std::os::unix::fs::MetadataExt;
    let file = tokio::fs::metadata(path).await.ok()?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::identity::forge::{base64url, data, tokens};

    #[tokio::test(start_paused = true)]
    async fn an_expired_token_in_a_file_is_not_sent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = |exp: i64| {
            format!("{}.{}.AA", base64url("{}"), base64url(format!(r#"{{"exp":{exp}}}"#)))
        };
        std::fs::write(&path, token(1_800_000_000 + 4)).unwrap();
        let (tokens, _issuer) = tokens(&[("data", path.clone())]);
        let slot = tokens.slot(&data());
        assert!(matches!(slot.bearer().await, Err(TokenUnavailable::Unusable)));
        let gone: ServiceName = "gone".parse().unwrap();
        assert_eq!(slot.callee(), &data());
        std::fs::write(&path, token(1_800_000_000 + 600)).unwrap();
        sleep(Duration::from_secs(6)).await;
        let left = slot.bearer().await.unwrap().usable_until() - Instant::now();
        assert!(left < Duration::from_secs(600), "{left:?}");
        assert!(tokens.slot(&gone).bearer().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_file_is_read_again_when_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "first\n").unwrap();
        let (tokens, issuer) = tokens(&[("data", path.clone())]);
        let slot = tokens.slot(&data());
        assert_eq!(slot.bearer().await.unwrap().header(), "Bearer first");
        let swap = folder.path().join("new");
        std::fs::write(&swap, "second").unwrap();
        std::fs::rename(&swap, &path).unwrap();
        sleep(Duration::from_secs(3)).await;
        assert_eq!(slot.current(Instant::now()).unwrap().header(), "Bearer second");
        assert_eq!((issuer.asked(), tokens.snapshot().len()), (0, 0));
    }

    #[test]
    fn a_missing_grant_is_told_apart_from_an_issuer_that_is_down() {
        let refused = |status: u16, code: &str| {
            TokenUnavailable::from(ClientError::Refused {
                status: http::StatusCode::from_u16(status).unwrap(),
                code: code.to_owned(),
                detail: None,
            })
        };
        assert!(refused(400, "invalid_target").is_permission());
        assert!(!refused(401, "invalid_client").is_permission());
        assert!(matches!(refused(503, "invalid_target"), TokenUnavailable::Unreachable(_)));
        let missing = TokenUnavailable::File {
            path: "/run/secrets/infrar".into(),
            source: Arc::new(io::ErrorKind::NotFound.into()),
        };
        assert!(missing.to_string().contains("/run/secrets/infrar"), "the log names the file");
        for (fault, begins) in [
            (refused(401, "invalid_client"), "wrong credential"),
            (refused(400, "invalid_target"), "the issuer refuses"),
            (refused(503, "temporarily_unavailable"), "the issuer is out of order"),
            (TokenUnavailable::Deadline, "the issuer cannot be reached"),
            (TokenUnavailable::NoSource, "no credential"),
            (missing, "no credential"),
        ] {
            let reason = fault.reason();
            assert!(reason.starts_with(begins), "{fault:?}: {reason}");
            assert!(!reason.contains('/') && !reason.contains("401"), "{reason}");
        }
    }
}
