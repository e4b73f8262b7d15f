//! The files that settings point at: secrets, certificates, keys.
//!
//! They are read once while a configuration is checked, so that a wrong one is found before anything starts.
//! What was read is never shown.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use rustls::{
    Error as TlsError, InconsistentKeys,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use secrecy::SecretString;
use uuid::Uuid;
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

use super::{
    fault::{Fault, Source, quoted},
    node::Node,
};

/// The largest file that a setting may point at: certificate chains and JWK sets stay far below it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Finds and reads the files of settings.
pub(super) struct Files {
    /// Where absolute paths begin: `/`, or the folder that stands for it.
    root: PathBuf,
    /// Every file that a setting named, found or not.
    named: RefCell<BTreeSet<PathBuf>>,
    /// Whether they are looked at: a file may be checked where none of what it names is.
    looked_at: bool,
}

impl Files {
    pub(super) fn under(root: &Path) -> Self {
        Self { root: root.to_owned(), named: RefCell::default(), looked_at: true }
    }

    /// The files that settings have named until now, whether they were there or not.
    pub(super) fn named(&self) -> Vec<PathBuf> {
        self.named.borrow().iter().cloned().collect()
    }

    /// Files that are taken to be there and to be right.
    pub(super) fn skipped() -> Self {
        Self { root: PathBuf::from("/"), named: RefCell::default(), looked_at: false }
    }

    /// The path that a setting means: relative to the file it is written in; one from a variable or flag,
    /// relative to the working folder.
    pub(super) fn path(&self, node: &Node) -> Option<PathBuf> {
        let written = Path::new(node.scalar()?);
        let path = if let Ok(below_root) = written.strip_prefix("/") {
            self.root.join(below_root)
        } else {
            let base = match &node.at.source {
                Source::File(file) => file.parent(),
                Source::Variable(_) | Source::Flag(_) => None,
            };
            base.map_or_else(|| written.to_owned(), |base| base.join(written))
        };
        // Absolute, so that it means the same when it is printed and when the working folder changes.
        let path = std::path::absolute(&path).unwrap_or(path);
        self.named.borrow_mut().insert(path.clone());
        Some(path)
    }

    /// The path of a file and what is in it.
    fn read(&self, node: &Node, faults: &mut Vec<Fault>) -> Option<(PathBuf, Vec<u8>)> {
        let path = self.path(node)?;
        match read_bounded(&path, MAX_FILE_BYTES) {
            Ok(content) => Some((path, content)),
            Err(error) => {
                let found = format!("{}, {}", node.found(), unreadable(&error));
                faults.push(node.fault_found(found, "write the path of a file this user may read"));
                None
            }
        }
    }

    /// A secret: text without the white space at its end.
    pub(super) fn secret(
        &self,
        node: &Node,
        faults: &mut Vec<Fault>,
    ) -> Option<(PathBuf, SecretString)> {
        if !self.looked_at {
            return Some((self.path(node)?, String::new().into()));
        }
        let (path, content) = self.read(node, faults)?;
        let Ok(text) = String::from_utf8(content) else {
            let found = format!("{}, which holds other bytes than text", node.found());
            faults.push(node.fault_found(found, "put the secret there as text"));
            return None;
        };
        let secret = text.trim_end();
        if secret.is_empty() {
            let found = format!("{}, which is empty", node.found());
            faults.push(node.fault_found(found, "put the secret there"));
            return None;
        }
        Some((path, secret.into()))
    }

    /// Certificates in PEM, at least one, none of them expired.
    pub(super) fn certificates(
        &self,
        node: &Node,
        faults: &mut Vec<Fault>,
    ) -> Option<(PathBuf, Vec<CertificateDer<'static>>)> {
        if !self.looked_at {
            return Some((self.path(node)?, Vec::new()));
        }
        let (path, content) = self.read(node, faults)?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&content).collect();
        let certificates = certificates.unwrap_or_default();
        if certificates.is_empty() {
            let found = format!("{}, which holds no certificate", node.found());
            faults.push(node.fault_found(found, "write the path of a certificate in PEM"));
            return None;
        }
        Some((path, certificates))
    }

    /// A private key in PEM.
    pub(super) fn private_key(
        &self,
        node: &Node,
        faults: &mut Vec<Fault>,
    ) -> Option<(PathBuf, PrivateKeyDer<'static>)> {
        let (path, content) = self.read(node, faults)?;
        let Ok(key) = PrivateKeyDer::from_pem_slice(&content) else {
            let found = format!("{}, which holds no private key", node.found());
            faults.push(node.fault_found(found, "write the path of a private key in PEM"));
            return None;
        };
        Some((path, key))
    }

    /// A certificate and the key that belongs to it.
    pub(super) fn identity(
        &self,
        cert: &Node,
        key: &Node,
        faults: &mut Vec<Fault>,
    ) -> Option<(PathBuf, PathBuf)> {
        if !self.looked_at {
            return Some((self.path(cert)?, self.path(key)?));
        }
        let chain = self.certificates(cert, faults);
        let private = self.private_key(key, faults);
        let ((cert_file, chain), (key_file, private)) = (chain?, private?);
        if let Some(fault) = chain.first().and_then(|leaf| expired(cert, leaf)) {
            faults.push(fault);
        }
        match CertifiedKey::from_der(chain, private, &aws_lc_rs::default_provider()) {
            Ok(_pair) => Some((cert_file, key_file)),
            Err(TlsError::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
                let found = format!("{}, which belongs to another certificate", key.found());
                let advice = format!("write the key of {}", quoted(&cert_file.to_string_lossy()));
                faults.push(key.fault_found(found, advice));
                None
            }
            Err(error) => {
                let found = format!("{}, which cannot be used ({error})", key.found());
                faults.push(key.fault_found(found, "write a certificate and its key in PEM"));
                None
            }
        }
    }

    /// A folder that this user may write to, or can still make. It is tried, and left as it was.
    pub(super) fn folder(&self, node: &Node, faults: &mut Vec<Fault>) -> Option<PathBuf> {
        let path = self.path(node)?;
        if !self.looked_at {
            return Some(path);
        }
        if let Err(error) = try_folder(&path) {
            let found = if error.kind() == io::ErrorKind::NotADirectory {
                format!("{}, which is no folder", node.found())
            } else {
                format!("{}, where nothing can be kept: {error}", node.found())
            };
            let advice = "write the path of a folder this user may write to";
            faults.push(node.fault_found(found, advice));
            return None;
        }
        Some(path)
    }

    /// A JWK set with at least one key.
    pub(super) fn jwks(&self, node: &Node, faults: &mut Vec<Fault>) -> Option<serde_json::Value> {
        if !self.looked_at {
            return Some(serde_json::json!({ "keys": [] }));
        }
        let (_path, content) = self.read(node, faults)?;
        let set: Option<serde_json::Value> = serde_json::from_slice(&content).ok();
        let usable = set.as_ref().is_some_and(|set| {
            serde_json::from_value::<jsonwebtoken::jwk::JwkSet>(set.clone())
                .is_ok_and(|keys| !keys.keys.is_empty())
        });
        if !usable {
            let found = format!("{}, which holds no JWK set", node.found());
            let advice = "write the path of a JWK set: {\"keys\": [ … ]}";
            faults.push(node.fault_found(found, advice));
            return None;
        }
        set
    }
}

/// Makes something of a name that nobody else has in the folder, or in the nearest one above it that there is, and
/// removes it again.
fn try_folder(path: &Path) -> io::Result<()> {
    let there = path.ancestors().find(|folder| folder.exists()).unwrap_or(path);
    if !there.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let trial = there.join(format!(".{}.tmp", Uuid::now_v7()));
    // Where the folder itself is still to be made, its parent must take one.
    if there == path {
        File::create_new(&trial)?;
        fs::remove_file(&trial)
    } else {
        fs::create_dir(&trial)?;
        fs::remove_dir(&trial)
    }
}

/// A fault if the certificate's time is over.
fn expired(node: &Node, certificate: &CertificateDer<'_>) -> Option<Fault> {
    let (_rest, parsed) = X509Certificate::from_der(certificate).ok()?;
    let validity = parsed.validity();
    // Only an end that is over: a beginning in the future may be a clock that is not set yet.
    (validity.not_after < ASN1Time::now()).then(|| {
        let found = format!("{}, which expired on {}", node.found(), validity.not_after);
        node.fault_found(found, "write the path of a certificate that is still valid")
    })
}

/// Reads a regular file of at most `limit` bytes.
pub(super) fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    // A pipe or device might never end, or never begin.
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
    }
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        let why = format!("it is larger than {} MiB", limit >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(content)
}

/// Why a file could not be read, in words.
pub(super) fn unreadable(error: &io::Error) -> String {
    // The kinds that people meet; everything else in the system's own words.
    if error.kind() == io::ErrorKind::NotFound {
        "which does not exist".to_owned()
    } else if error.kind() == io::ErrorKind::PermissionDenied {
        "which this user may not read".to_owned()
    } else if error.kind() == io::ErrorKind::IsADirectory {
        "which is a folder".to_owned()
    } else {
        format!("which cannot be read: {error}")
    }
}
