//! The project as a document: from the file that somebody wrote, or over the API; and which of two is the newer one.

use std::collections::{BTreeMap, BTreeSet};

use secrecy::ExposeSecret;

use crate::{
    api::{IdentityDocument, ProjectDocument},
    control::{
        Identities, Identity,
        book::{self, Book, Key},
        endpoints::{HEAVIEST, plaintext},
        registry::Draft,
        reject::Rejection,
    },
    model::{EndpointId, Project, ServiceName},
    runtime::{hex, sha256},
    store::Write,
};

/// Whether a document that was in force before may be put in force again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// Somebody wants it now.
    Taken,
    /// It is read at a start: where several replicas have a file each, the one that was not exchanged yet must not undo what
    /// another has brought.
    Left,
}

/// What an import did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Imported {
    /// It is in force, or was already.
    InForce,
    /// It was in force before, and something newer has taken its place.
    Past,
}

/// The document of a file: secrets leave it as digests.
#[must_use]
pub fn document(project: Project, identities: &Identities) -> ProjectDocument {
    let proofs = identities.iter().filter_map(|(name, identity)| {
        let proof = match identity {
            // An empty secret would be known to everybody.
            Identity::ClientSecret(secret) if secret.expose_secret().is_empty() => return None,
            Identity::ClientSecret(secret) => IdentityDocument::Secret {
                client_secret_sha256: hex(&sha256(secret.expose_secret().as_bytes())),
            },
            Identity::ClientSecretDigest(digest) => {
                IdentityDocument::Secret { client_secret_sha256: digest.clone() }
            }
            Identity::Workload { issuer, subject } => {
                IdentityDocument::Workload { issuer: issuer.clone(), subject: subject.clone() }
            }
        };
        Some((name.clone(), proof))
    });
    let identities: BTreeMap<ServiceName, IdentityDocument> = proofs.collect();
    ProjectDocument { project, identities }
}

/// The way back: who may ask for tokens, as a file says it.
#[must_use]
pub fn identities(document: &ProjectDocument) -> Identities {
    let each = document.identities.iter().map(|(name, proof)| {
        let identity = match proof.clone() {
            IdentityDocument::Secret { client_secret_sha256 } => {
                Identity::ClientSecretDigest(client_secret_sha256)
            }
            IdentityDocument::Workload { issuer, subject } => {
                Identity::Workload { issuer, subject }
            }
        };
        (name.clone(), identity)
    });
    each.collect()
}

/// Puts a document in force. What was registered or adjusted and finds no place in it any more goes.
pub(super) fn import(
    draft: &mut Draft,
    document: &ProjectDocument,
    past: Past,
) -> Result<Imported, Rejection> {
    check(draft.book(), document)?;
    if draft.book().document() == Some(document) {
        return Ok(Imported::InForce);
    }
    let text = serde_json::to_vec(document).map_err(|_unwritable| Rejection::Internal)?;
    let hash = hex(&sha256(&text));
    if past == Past::Left && draft.book().is_past(&hash) {
        return Ok(Imported::Past);
    }
    let write =
        draft.book().import(document.clone(), hash).map_err(|_unwritable| Rejection::Internal)?;
    let mut writes = vec![write];
    writes.extend(homeless(draft.book(), document));
    draft.add(writes)?;
    Ok(Imported::InForce)
}

/// Entries that say nothing beside `document`: their service is gone, the project now has such an endpoint or none such,
/// or another service has their host.
fn homeless(book: &Book, document: &ProjectDocument) -> Vec<Write> {
    let services = &document.project.services;
    let has = |service: &ServiceName, id: &EndpointId| {
        let service = services.get(service);
        service.map(|service| service.endpoints.iter().any(|endpoint| endpoint.id == *id))
    };
    let hosts: BTreeMap<String, &ServiceName> = services
        .iter()
        .flat_map(|(name, service)| {
            service.endpoints.iter().map(move |endpoint| (endpoint.url.host().to_string(), name))
        })
        .collect();
    let leased = book.leases().filter(|(service, id, leased)| {
        let host = leased.endpoint.url.host();
        let taken = !host.is_loopback()
            && hosts.get(&host.to_string()).is_some_and(|owner| owner != service);
        has(service, id) != Some(false) || taken
    });
    let leased = leased.map(|(service, id, _)| {
        tracing::warn!(%service, endpoint = %id, "a registered endpoint has no place in the new project");
        Write::remove(Key::Leased(service, id).text())
    });
    let adjusted = book.adjustments().filter(|(service, id)| has(service, id) != Some(true));
    leased
        .chain(adjusted.map(|(service, id)| Write::remove(Key::Adjusted(service, id).text())))
        .collect()
}

/// What no project may be, whoever wrote it. A file is checked for more, with lines and columns, by whoever reads it.
fn check(book: &Book, document: &ProjectDocument) -> Result<(), Rejection> {
    let ProjectDocument { project, identities } = document;
    let named = project.services.keys().chain(identities.keys()).chain(project.permissions.keys());
    if let Some(name) = named.into_iter().find(|name| name.is_reserved()) {
        return Err(Rejection::Reserved { name: name.clone() });
    }
    let before = book.document().map(|document| &document.project.name);
    if let Some(before) = before.filter(|before| **before != project.name) {
        return Err(Rejection::Renamed { before: before.clone(), now: project.name.clone() });
    }
    let mut faults = Vec::new();
    let mut hosts = BTreeMap::new();
    for (name, service) in &project.services {
        let mut ids = BTreeSet::new();
        for endpoint in &service.endpoints {
            let at = format!("services.{name}.endpoints.{}", endpoint.id);
            if !ids.insert(&endpoint.id) {
                faults.push(format!("{at}: each endpoint of a service has an id of its own"));
            }
            if endpoint.weight > HEAVIEST {
                faults.push(format!("{at}.weight is at most {HEAVIEST}"));
            }
            faults.extend(plaintext(endpoint).map(|key| {
                format!("{at}.{key} begins with https:// (tokens travel over TLS only), or auth_method is none")
            }));
            let host = endpoint.url.host();
            let owner = hosts.entry(host.to_string()).or_insert(name);
            if !host.is_loopback() && *owner != name {
                faults.push(format!(
                    "{at}.url: the host belongs to {owner}; give each service its own"
                ));
            }
        }
    }
    for (name, identity) in identities {
        match identity {
            IdentityDocument::Secret { client_secret_sha256 }
                if book::digest(client_secret_sha256).is_none() =>
            {
                faults.push(format!(
                    "identities.{name}.client_secret_sha256 is a SHA-256 in hexadecimal"
                ));
            }
            IdentityDocument::Secret { .. } | IdentityDocument::Workload { .. } => {}
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Rejection::BadRequest { detail: faults.join("; ") })
    }
}
