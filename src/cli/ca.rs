//! A certificate authority made on the spot, for a demonstration or a machine of one's own.
//!
//! Its key never leaves the process and everything it issues ends within a day, so nothing made here can be trusted
//! by accident tomorrow. `not_before` lies a little in the past, because clocks differ.

use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use secrecy::SecretString;

/// How long its certificates last.
const LIFETIME: Duration = Duration::from_hours(24);

/// How far clocks may differ.
const SKEW: Duration = Duration::from_mins(5);

/// A certificate authority whose key exists in this process only.
pub(crate) struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    now: Timestamp,
}

/// A certificate with its key, both PEM.
pub(crate) struct Issued {
    /// The certificate alone; the authority's is with the clients.
    pub(crate) certificate: String,
    /// PKCS #8.
    pub(crate) key: SecretString,
}

impl Ca {
    /// A new authority, valid for a day from `now`.
    ///
    /// # Errors
    /// Those of the cryptography library.
    pub(crate) fn new(name: &str, now: Timestamp) -> Result<Self, rcgen::Error> {
        let mut params = lasting(CertificateParams::default(), now);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)?, now })
    }

    /// What clients are told to trust, PEM.
    pub(crate) fn certificate(&self) -> String {
        self.issuer.pem()
    }

    /// A server certificate for host names and addresses; the first is its subject.
    ///
    /// # Errors
    /// A name that is no DNS name, and those of the cryptography library.
    pub(crate) fn issue(&self, hosts: &[&str]) -> Result<Issued, rcgen::Error> {
        let names: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        // `new` tells addresses from names.
        let mut params = lasting(CertificateParams::new(names)?, self.now);
        if let Some(first) = hosts.first() {
            params.distinguished_name.push(DnType::CommonName, *first);
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { certificate, key: key.serialize_pem().into() })
    }
}

fn lasting(mut params: CertificateParams, now: Timestamp) -> CertificateParams {
    let seconds = u64::try_from(now.as_second()).unwrap_or_default();
    let begin = Duration::from_secs(seconds).saturating_sub(SKEW);
    params.not_before = date_time_ymd(1970, 1, 1) + begin;
    params.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds) + LIFETIME;
    params
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{
        RootCertStore, client::WebPkiServerVerifier, client::danger::ServerCertVerifier,
        crypto::aws_lc_rs, pki_types::ServerName,
    };
    use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject};
    use secrecy::ExposeSecret;

    use super::*;

    /// What a client that trusts `ca` says to `issued` when it called `host` at `seconds`.
    fn verify(ca: &Ca, issued: &Issued, host: &str, seconds: i64) -> Result<(), rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.certificate().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
        let certificate = CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds.try_into().unwrap()));
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let verifier = verifier.build().unwrap();
        verifier.verify_server_cert(&certificate, &[], &name, &[], now).map(|_verified| ())
    }

    #[test]
    fn clients_that_trust_it_accept_its_certificates_for_a_day() {
        let now: Timestamp = "2026-11-23T10:00:00Z".parse().unwrap();
        let ca = Ca::new("infrar demo", now).unwrap();
        let issued = ca.issue(&["data.example", "127.0.0.1"]).unwrap();
        let at = now.as_second();
        for host in ["data.example", "127.0.0.1"] {
            for seconds in [at - 299, at, at + 86_399] {
                assert_eq!(verify(&ca, &issued, host, seconds), Ok(()), "{host}");
            }
            for seconds in [at - 301, at + 86_401] {
                assert!(verify(&ca, &issued, host, seconds).is_err(), "{host}");
            }
        }
        assert!(verify(&ca, &issued, "other.example", at).is_err());
    }

    #[test]
    fn another_authority_of_the_same_name_is_not_trusted() {
        let now: Timestamp = "2026-11-23T10:00:00Z".parse().unwrap();
        let (ca, other) =
            (Ca::new("infrar demo", now).unwrap(), Ca::new("infrar demo", now).unwrap());
        let issued = other.issue(&["data.example"]).unwrap();
        assert!(verify(&ca, &issued, "data.example", now.as_second()).is_err());
    }

    #[test]
    fn the_key_is_one_that_servers_can_load() {
        let ca = Ca::new("infrar demo", Timestamp::UNIX_EPOCH).unwrap();
        let issued = ca.issue(&["data.example"]).unwrap();
        let key = PrivateKeyDer::from_pem_slice(issued.key.expose_secret().as_bytes()).unwrap();
        assert!(aws_lc_rs::sign::any_supported_type(&key).is_ok());
    }
}
