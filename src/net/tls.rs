//! Certificates, keys and roots: who we are, and whom we believe.
//!
//! Everything rests on one provider, aws-lc-rs. Configurations are built once and handed out as `Arc`s: tickets and
//! sessions live in them, so one made per connection would never resume.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error as RustlsError,
    InconsistentKeys, RootCertStore, ServerConfig, SignatureScheme, SupportedProtocolVersion,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs as backend},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    version::{TLS12, TLS13},
};
use zeroize::Zeroizing;

/// Sessions remembered per set of protocols, so that a new connection to a known endpoint costs no full handshake.
const CLIENT_SESSIONS: usize = 256;

/// Makes aws-lc-rs the process's provider: the first thing a process and a test harness do. Calling it again does
/// nothing.
pub fn install_provider() {
    // An error means that it is installed already; there is no second provider in the tree.
    backend::default_provider().install_default().ok();
}

fn provider() -> Arc<CryptoProvider> {
    install_provider();
    CryptoProvider::get_default().cloned().unwrap_or_else(|| Arc::new(backend::default_provider()))
}

/// Why certificates or keys are not usable.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Not a PEM certificate.
    #[error("{from} holds no PEM certificate")]
    NoCertificate {
        /// The file, or where the text came from.
        from: String,
    },
    /// A certificate that is not one.
    #[error("{from} holds a certificate that cannot be used")]
    BadCertificate {
        /// The file, or where the text came from.
        from: String,
        /// What is wrong with it.
        #[source]
        source: RustlsError,
    },
    /// Not a PEM private key, or an encrypted one.
    #[error("{from} holds no PEM private key (an encrypted one cannot be used)")]
    NoKey {
        /// The file, or where the text came from.
        from: String,
    },
    /// A key of a kind we cannot sign with.
    #[error("{from} holds a private key that cannot be used")]
    BadKey {
        /// The file, or where the text came from.
        from: String,
        /// What is wrong with it.
        #[source]
        source: RustlsError,
    },
    /// Certificate and key do not belong together.
    #[error("the key in {key} does not belong to the certificate in {cert}")]
    KeyMismatch {
        /// Where the certificate is from.
        cert: String,
        /// Where the key is from.
        key: String,
    },
    /// The provider refused the rest.
    #[error("TLS cannot be set up")]
    Setup(#[source] RustlsError),
}

static NEWEST: [&SupportedProtocolVersion; 1] = [&TLS13];
static BOTH: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

/// The lowest TLS version a listener speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MinVersion {
    /// TLS 1.2 and 1.3.
    Tls12,
    /// TLS 1.3 only.
    #[default]
    Tls13,
}

impl MinVersion {
    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Tls12 => &BOTH,
            Self::Tls13 => &NEWEST,
        }
    }
}

/// What is offered by ALPN (RFC 7301).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// Nothing: the inner protocol is not HTTP.
    None,
    /// `http/1.1`.
    H1,
    /// `h2`.
    H2,
    /// `h2`, else `http/1.1`.
    H2OrH1,
}

impl Alpn {
    const COUNT: usize = 4;

    fn protocols(self) -> Vec<Vec<u8>> {
        let names: &[&[u8]] = match self {
            Self::None => &[],
            Self::H1 => &[b"http/1.1"],
            Self::H2 => &[b"h2"],
            Self::H2OrH1 => &[b"h2", b"http/1.1"],
        };
        names.iter().map(|name| name.to_vec()).collect()
    }
}

/// What came of looking at the files again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// New connections use what is there now.
    Changed,
    /// The files say what they said before.
    Unchanged,
}

/// A listener's certificate and key, exchangeable while it runs. Connections keep what they began with; tickets stay
/// valid over an exchange.
#[derive(Debug)]
pub struct ServerTls {
    current: ArcSwap<Loaded>,
    files: Option<(PathBuf, PathBuf)>,
    terms: Terms,
    /// The fault that [`look`](ServerTls::look) has told, until it is gone.
    told: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    /// SHA-256 of certificate and key as they were read.
    mark: Vec<u8>,
}

/// What does not change with the certificate.
#[derive(Debug)]
struct Terms {
    min: MinVersion,
    alpn: Alpn,
    tickets: Arc<dyn rustls::server::ProducesTickets>,
}

impl ServerTls {
    /// Certificate chain (leaf first) and key from PEM files, for `h2` and `http/1.1`.
    ///
    /// # Errors
    /// [`TlsError`] when a file is not usable or the two do not belong together.
    pub fn from_files(cert: &Path, key: &Path, min: MinVersion) -> Result<Self, TlsError> {
        let terms = Terms::new(min)?;
        let loaded = terms.load_files(cert, key)?;
        let files = Some((cert.to_owned(), key.to_owned()));
        Ok(Self { current: ArcSwap::from_pointee(loaded), files, terms, told: Mutex::default() })
    }

    /// The same from PEM text: for certificates that this process makes itself.
    ///
    /// # Errors
    /// As [`from_files`](Self::from_files).
    pub fn from_pem(cert: &[u8], key: &[u8], min: MinVersion) -> Result<Self, TlsError> {
        let terms = Terms::new(min)?;
        let loaded = terms.load(cert, key, "the certificate", "the key")?;
        let current = ArcSwap::from_pointee(loaded);
        Ok(Self { current, files: None, terms, told: Mutex::default() })
    }

    /// The configuration for a new connection. Cheap, and the same `Arc` until something changes.
    #[must_use]
    pub fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.load().config)
    }

    /// The certificate and key files, for whoever watches them.
    #[must_use]
    pub fn files(&self) -> Option<(&Path, &Path)> {
        self.files.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()))
    }

    /// Reads the files again. It blocks: not for a worker. Two files are rarely exchanged in one instant; a moment of
    /// mismatch is an error here and cured by the next call.
    ///
    /// # Errors
    /// [`TlsError`]; what was in use stays in use.
    pub fn reload(&self) -> Result<Reload, TlsError> {
        let Some((cert, key)) = &self.files else { return Ok(Reload::Unchanged) };
        let loaded = self.terms.load_files(cert, key)?;
        Ok(self.exchange(loaded))
    }

    /// As [`reload`](Self::reload), for whoever looks every few seconds: a fault is told once, and again when another
    /// has taken its place.
    ///
    /// # Errors
    /// [`TlsError`]; what was in use stays in use.
    pub fn look(&self) -> Result<Reload, TlsError> {
        let outcome = self.reload();
        let fault = outcome.as_ref().err().map(|fault| format!("{fault:?}"));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if fault.is_some() && *told == fault {
            return Ok(Reload::Unchanged);
        }
        *told = fault;
        outcome
    }

    /// Exchanges certificate and key for new PEM text.
    ///
    /// # Errors
    /// [`TlsError`]; what was in use stays in use.
    pub fn replace(&self, cert: &[u8], key: &[u8]) -> Result<Reload, TlsError> {
        let loaded = self.terms.load(cert, key, "the certificate", "the key")?;
        Ok(self.exchange(loaded))
    }

    fn exchange(&self, loaded: Loaded) -> Reload {
        if self.current.load().mark == loaded.mark {
            return Reload::Unchanged;
        }
        self.current.store(Arc::new(loaded));
        Reload::Changed
    }
}

impl Terms {
    fn new(min: MinVersion) -> Result<Self, TlsError> {
        let tickets = backend::Ticketer::new().map_err(TlsError::Setup)?;
        Ok(Self { min, alpn: Alpn::H2OrH1, tickets })
    }

    fn load_files(&self, cert: &Path, key: &Path) -> Result<Loaded, TlsError> {
        let chain = read(cert)?;
        let secret = Zeroizing::new(read(key)?);
        let (cert, key) = (cert.display().to_string(), key.display().to_string());
        self.load(&chain, &secret, &cert, &key)
    }

    fn load(
        &self,
        chain: &[u8],
        key: &[u8],
        from: &str,
        key_from: &str,
    ) -> Result<Loaded, TlsError> {
        let mut mark = digest::Context::new(&digest::SHA256);
        mark.update(chain);
        mark.update(key);
        let certificates = certificates(chain, from)?;
        let private = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_not_pem| TlsError::NoKey { from: key_from.to_owned() })?;
        // Looked at by itself first, so that a bad key is not reported as a bad certificate.
        backend::sign::any_supported_type(&private)
            .map_err(|source| TlsError::BadKey { from: key_from.to_owned(), source })?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(self.min.versions())
            .map_err(TlsError::Setup)?
            .with_no_client_auth()
            .with_single_cert(certificates, private)
            .map_err(|source| {
                let from = from.to_owned();
                if source == RustlsError::InconsistentKeys(InconsistentKeys::KeyMismatch) {
                    TlsError::KeyMismatch { cert: from, key: key_from.to_owned() }
                } else {
                    TlsError::BadCertificate { from, source }
                }
            })?;
        config.alpn_protocols = self.alpn.protocols();
        config.ticketer = Arc::clone(&self.tickets);
        Ok(Loaded { config: Arc::new(config), mark: mark.finish().as_ref().to_vec() })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn certificates(pem: &[u8], from: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let none = || TlsError::NoCertificate { from: from.to_owned() };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    found.ok().filter(|chain| !chain.is_empty()).ok_or_else(none)
}

/// Whom we believe when we dial: the roots of `ca_file`, and those of the system. TLS 1.3 and 1.2.
///
/// The system's roots are some 140 certificates in a 200 KB file, and 0.8 MiB in memory. They are read when the first
/// certificate shows up that `ca_file` does not vouch for, so a proxy whose endpoints share one private CA never pays
/// for them; one without `ca_file` calls [`preload`](Self::preload) off the path to its first answer.
#[derive(Debug)]
pub struct ClientTls {
    roots: Arc<Roots>,
    /// One per [`Alpn`], made at first use.
    configs: [OnceLock<Arc<ClientConfig>>; Alpn::COUNT],
}

impl ClientTls {
    /// Believes the system, and the PEM certificates in `ca_file` if one is given.
    ///
    /// # Errors
    /// [`TlsError`] when `ca_file` is not usable.
    pub fn new(ca_file: Option<&Path>) -> Result<Self, TlsError> {
        match ca_file {
            None => Ok(Self::with(None)),
            Some(path) => Self::from_pem_named(&read(path)?, &path.display().to_string()),
        }
    }

    /// Believes the system and the certificates in `ca`, which is PEM text.
    ///
    /// # Errors
    /// [`TlsError`] when there is no usable certificate in it.
    pub fn from_pem(ca: &[u8]) -> Result<Self, TlsError> {
        Self::from_pem_named(ca, "the CA text")
    }

    /// As [`from_pem`](Self::from_pem), for text out of a file that `from` names.
    ///
    /// # Errors
    /// [`TlsError`] when there is no usable certificate in it.
    pub fn from_pem_named(ca: &[u8], from: &str) -> Result<Self, TlsError> {
        let bad = |source| TlsError::BadCertificate { from: from.to_owned(), source };
        let mut store = RootCertStore::empty();
        for certificate in certificates(ca, from)? {
            store.add(certificate).map_err(bad)?;
        }
        let own = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider())
            .build()
            .map_err(|source| bad(RustlsError::General(source.to_string())))?;
        Ok(Self::with(Some(own)))
    }

    fn with(own: Option<Arc<WebPkiServerVerifier>>) -> Self {
        let roots = Roots { own, system: OnceLock::new(), provider: provider() };
        Self { roots: Arc::new(roots), configs: Default::default() }
    }

    /// The configuration for a connection that offers `alpn`. The same `Arc` each time: sessions are resumed through
    /// it.
    #[must_use]
    pub fn config(&self, alpn: Alpn) -> Arc<ClientConfig> {
        match self.configs.get(alpn as usize) {
            Some(slot) => Arc::clone(slot.get_or_init(|| Arc::new(self.roots.config(alpn)))),
            None => Arc::new(self.roots.config(alpn)),
        }
    }

    /// Reads the system's roots now, on the calling thread. Called on the side runtime once a proxy without `ca_file`
    /// is up, so that no worker stops to read files at its first handshake.
    pub fn preload(&self) {
        self.roots.system();
    }

    /// Whether the system's roots have been read.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.roots.system.get().is_some()
    }
}

/// Two sets of roots; a certificate is good when either vouches for it.
#[derive(Debug)]
struct Roots {
    own: Option<Arc<WebPkiServerVerifier>>,
    system: OnceLock<Option<Arc<dyn ServerCertVerifier>>>,
    provider: Arc<CryptoProvider>,
}

impl Roots {
    fn config(self: &Arc<Self>, alpn: Alpn) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(Arc::clone(&self.provider));
        #[expect(clippy::expect_used, reason = "aws-lc-rs has cipher suites for both versions")]
        let builder =
            builder.with_protocol_versions(&BOTH).expect("the provider speaks TLS 1.3 and 1.2");
        let mut config = builder
            .dangerous() // "dangerous" is to bring a verifier; this one asks webpki and the platform's
            .with_custom_certificate_verifier(Arc::clone(self) as Arc<dyn ServerCertVerifier>)
            .with_no_client_auth();
        config.alpn_protocols = alpn.protocols();
        config.resumption = Resumption::in_memory_sessions(CLIENT_SESSIONS);
        config
    }

    /// The platform's verifier; where the platform has no roots at all (an empty image), Mozilla's list as compiled in.
    fn system(&self) -> Option<&Arc<dyn ServerCertVerifier>> {
        let load = || match rustls_platform_verifier::Verifier::new(Arc::clone(&self.provider)) {
            Ok(verifier) => Some(Arc::new(verifier) as Arc<dyn ServerCertVerifier>),
            Err(error) => {
                tracing::info!(
                    error = &error as &dyn std::error::Error,
                    "the system has no root certificates; using those compiled in"
                );
                let roots = webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect();
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
                    .build()
                    .ok()
                    .map(|verifier| verifier as Arc<dyn ServerCertVerifier>)
            }
        };
        self.system.get_or_init(load).as_ref()
    }
}

impl ServerCertVerifier for Roots {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        let unknown = RustlsError::InvalidCertificate(CertificateError::UnknownIssuer);
        let ours = match &self.own {
            Some(own) => own.verify_server_cert(leaf, chain, name, ocsp, now),
            None => Err(unknown.clone()),
        };
        let Err(fault) = ours else { return ours };
        let system = match self.system() {
            Some(system) => system.verify_server_cert(leaf, chain, name, ocsp, now),
            None => Err(unknown.clone()),
        };
        // Of two refusals the one by whoever knew the issuer says more.
        system.map_err(|other| if fault == unknown { other } else { fault })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether an I/O error is TLS's own: a handshake that failed, a record that made no sense, an alert.
#[must_use]
pub fn is_tls_fault(error: &io::Error) -> bool {
    rustls_error(error).is_some()
}

/// Whether an I/O error says that a certificate was not accepted, theirs by us or ours by them.
#[must_use]
pub fn is_certificate_fault(error: &io::Error) -> bool {
    match rustls_error(error) {
        Some(RustlsError::InvalidCertificate(_) | RustlsError::NoCertificatesPresented) => true,
        Some(RustlsError::AlertReceived(alert)) => matches!(
            alert,
            AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateRequired
                | AlertDescription::UnknownCA
        ),
        _ => false,
    }
}

fn rustls_error(error: &io::Error) -> Option<&RustlsError> {
    error.get_ref()?.downcast_ref()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

    use super::*;

    const NAME: &str = "data.example";

    struct Ca(CertifiedIssuer<'static, KeyPair>);

    impl Ca {
        fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
        }

        fn pem(&self) -> String {
            self.0.pem()
        }

        fn issue(&self) -> (String, String) {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new([NAME.to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &self.0).unwrap();
            (certificate.pem(), key.serialize_pem())
        }
    }

    type Ends = (client::TlsStream<DuplexStream>, server::TlsStream<DuplexStream>);

    async fn shake(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
        name: &'static str,
    ) -> io::Result<Ends> {
        let (near, far) = duplex(64 * 1024);
        let name = ServerName::try_from(name).unwrap();
        let client = TlsConnector::from(client).connect(name, near);
        let (client, server) = tokio::join!(client, TlsAcceptor::from(server).accept(far));
        let (mut client, mut server) = (client?, server?);
        // The tickets come with the first bytes.
        server.write_all(b"x").await?;
        server.flush().await?;
        client.read_exact(&mut [0]).await?;
        Ok((client, server))
    }

    fn pair(min: MinVersion) -> (Ca, ServerTls, ClientTls) {
        let ca = Ca::new();
        let (cert, key) = ca.issue();
        let server = ServerTls::from_pem(cert.as_bytes(), key.as_bytes(), min).unwrap();
        let client = ClientTls::from_pem(ca.pem().as_bytes()).unwrap();
        (ca, server, client)
    }

    #[tokio::test]
    async fn a_private_ca_is_believed_without_reading_the_systems_roots() {
        let (_ca, server, client) = pair(MinVersion::Tls13);
        let ends = shake(client.config(Alpn::H2OrH1), server.current(), NAME).await.unwrap();
        let (_, connection) = ends.0.get_ref();
        assert_eq!(connection.alpn_protocol(), Some(&b"h2"[..]));
        assert_eq!(connection.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        assert!(!client.is_loaded());
    }

    #[tokio::test]
    async fn the_second_connection_resumes_and_configurations_are_handed_out_again() {
        let (_ca, server, client) = pair(MinVersion::Tls13);
        let config = || client.config(Alpn::H1);
        assert!(Arc::ptr_eq(&config(), &config()));
        let mut kinds = Vec::new();
        for _ in 0..2 {
            let ends = shake(config(), server.current(), NAME).await.unwrap();
            kinds.push(ends.0.get_ref().1.handshake_kind());
        }
        assert_eq!(kinds[1], Some(rustls::HandshakeKind::Resumed), "{kinds:?}");
        assert_ne!(kinds[0], kinds[1]);
    }

    #[tokio::test]
    async fn an_unknown_issuer_and_a_wrong_name_are_certificate_faults() {
        let (_ca, server, client) = pair(MinVersion::Tls13);
        let stranger = ClientTls::from_pem(Ca::new().pem().as_bytes()).unwrap();
        let fault = shake(stranger.config(Alpn::H1), server.current(), NAME).await.unwrap_err();
        assert!(is_certificate_fault(&fault) && stranger.is_loaded(), "{fault:?}");
        let fault = shake(client.config(Alpn::H1), server.current(), "other.example").await;
        assert!(is_certificate_fault(&fault.unwrap_err()));
        let other = io::Error::other("not TLS");
        assert!(!is_certificate_fault(&other) && !is_tls_fault(&other));
    }

    #[tokio::test]
    async fn tls_1_2_is_refused_unless_configured() {
        for (min, spoken) in [(MinVersion::Tls13, false), (MinVersion::Tls12, true)] {
            let (ca, server, _client) = pair(min);
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
            let old = ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&TLS12])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            let outcome = shake(Arc::new(old), server.current(), NAME).await;
            assert_eq!(outcome.is_ok(), spoken, "{min:?}: {outcome:?}");
            if let Err(fault) = outcome {
                assert!(is_tls_fault(&fault) && !is_certificate_fault(&fault), "{fault:?}");
            }
        }
    }

    #[test]
    fn changed_files_are_taken_up_and_bad_ones_leave_the_old_in_use() {
        let ca = Ca::new();
        let folder = tempfile::tempdir().unwrap();
        let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        let (first, first_key) = ca.issue();
        let (second, second_key) = ca.issue();
        std::fs::write(&cert, first).unwrap();
        std::fs::write(&key, &first_key).unwrap();
        let server = ServerTls::from_files(&cert, &key, MinVersion::Tls13).unwrap();
        let before = server.current();
        assert_eq!(server.reload().unwrap(), Reload::Unchanged);
        assert!(Arc::ptr_eq(&before, &server.current()));

        std::fs::write(&cert, second).unwrap();
        let fault = server.reload().unwrap_err();
        assert!(matches!(fault, TlsError::KeyMismatch { .. }), "{fault:?}");
        assert!(Arc::ptr_eq(&before, &server.current()));

        std::fs::write(&key, second_key).unwrap();
        assert_eq!(server.reload().unwrap(), Reload::Changed);
        assert!(!Arc::ptr_eq(&before, &server.current()));

        std::fs::remove_file(&cert).unwrap();
        assert!(matches!(server.reload(), Err(TlsError::Read { .. })));
        // Whoever looks again and again is told once.
        assert!(matches!(server.look(), Err(TlsError::Read { .. })));
        assert_eq!(server.look().unwrap(), Reload::Unchanged);
        std::fs::write(&cert, "no certificate").unwrap();
        assert!(matches!(server.look(), Err(TlsError::NoCertificate { .. })));
        assert_eq!(server.look().unwrap(), Reload::Unchanged);
    }

    #[test]
    fn what_is_no_certificate_or_key_is_told_apart() {
        let (cert, key) = Ca::new().issue();
        let load = |cert: &str, key: &str| {
            ServerTls::from_pem(cert.as_bytes(), key.as_bytes(), MinVersion::Tls13).unwrap_err()
        };
        assert!(matches!(load("", &key), TlsError::NoCertificate { .. }));
        assert!(matches!(load(&key, &key), TlsError::NoCertificate { .. }));
        assert!(matches!(load(&cert, &cert), TlsError::NoKey { .. }));
        let garbled = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        assert!(matches!(load(&cert, garbled), TlsError::BadKey { .. }));
        assert!(matches!(ClientTls::from_pem(b"nothing"), Err(TlsError::NoCertificate { .. })));
        let missing = ClientTls::new(Some(Path::new("/nonexistent/ca.pem"))).unwrap_err();
        assert!(matches!(missing, TlsError::Read { .. }) && missing.to_string().contains("ca.pem"));
    }
}
