//! The way to the database: TLS, limits, and the connections that are kept.

use std::{future::Future, path::Path, pin::Pin, sync::Arc, time::Duration};

use deadpool_postgres::{Connect, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{runtime::Handle, task::JoinHandle};
use tokio_postgres::{Client, Config, Error};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::{
    net::{Alpn, ClientTls},
    store::{
        DEADLINE,
        error::StoreError,
        location::{Database, Trust},
    },
};

/// Connections at most, besides the one that listens. A commit holds one for a few round trips.
const CONNECTIONS: usize = 8;
/// How long one address may take to answer a call.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// When a silent connection is asked whether it is still there, and how often.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Everything needed to make one more connection.
#[derive(Clone)]
pub(super) struct Way {
    pub(super) config: Config,
    pub(super) tls: MakeRustlsConnect,
    side: Handle,
}

impl Way {
    pub(super) fn new(database: &Database, side: Handle) -> Result<Self, StoreError> {
        let tls = MakeRustlsConnect::new(tls(database)?);
        Ok(Self { config: limited(database), tls, side })
    }

    pub(super) fn pool(&self) -> Result<Pool, StoreError> {
        let fast = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_connect(self.config.clone(), self.clone(), fast);
        let pool = Pool::builder(manager)
            .max_size(CONNECTIONS)
            .wait_timeout(Some(DEADLINE))
            .create_timeout(Some(DEADLINE))
            .runtime(Runtime::Tokio1)
            .build();
        pool.map_err(|error| StoreError::Other {
            location: "the pool of connections".to_owned(),
            source: error.into(),
        })
    }
}

impl Connect for Way {
    fn connect(
        &self,
        config: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), Error>> + Send + '_>> {
        let config = config.clone();
        Box::pin(async move {
            let (client, connection) = config.connect(self.tls.clone()).await?;
            #[expect(
                clippy::disallowed_methods,
                reason = "the task ends with its client, and the pool wants to hold it"
            )]
            let task = self.side.spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a connection to the database broke");
                }
            });
            Ok((client, task))
        })
    }
}

/// Ours first: what the operator wrote into the URL comes after it and counts.
fn limited(database: &Database) -> Config {
    let mut config = database.config.clone();
    let limit = DEADLINE.as_millis();
    // A transaction that nobody ends would keep all others waiting.
    let mut options =
        format!("-c statement_timeout={limit} -c idle_in_transaction_session_timeout={limit}");
    if let Some(schema) = database.own_schema {
        options.push_str(" -c search_path=");
        options.push_str(schema);
    }
    if let Some(theirs) = config.get_options() {
        options.push(' ');
        options.push_str(theirs);
    }
    config.options(options);
    if config.get_application_name().is_none() {
        config.application_name("infrar");
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_LIMIT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(DEADLINE);
    }
    config.keepalives_idle(KEEPALIVE).keepalives_interval(KEEPALIVE).keepalives_retries(2);
    config
}

fn tls(database: &Database) -> Result<ClientConfig, StoreError> {
    let ca: Option<&Path> = database.root_certificates.as_deref();
    let roots = ClientTls::new(ca).map_err(|error| StoreError::Refused {
        location: database.to_string(),
        source: error.into(),
    })?;
    let mut config = ClientConfig::clone(&roots.config(Alpn::None));
    if database.trust == Trust::Anybody {
        let provider = Arc::clone(config.crypto_provider());
        config.dangerous().set_certificate_verifier(Arc::new(Anybody(provider)));
    }
    Ok(config)
}

/// Takes any certificate, as `sslmode=require` has it: what is sent is hidden from those who listen, and goes to
/// whoever answered.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
