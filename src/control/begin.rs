//! What a control plane does first with its store: the project of its file, and somebody who may change things.

use aws_lc_rs::rand::fill;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    control::{
        Identities,
        book::Key,
        keys::entry,
        project::{self, Imported, Past},
        registry::Registry,
        reject::Rejection,
    },
    identity::KeptKey,
    model::{Project, ServiceName},
    runtime::{hex, sha256},
    store::Write,
};

/// The name of the first admin credential; reserved, so no service has it.
pub(super) const FIRST_ADMIN: &str = "infrar-admin";

/// Puts the project in force; where there are none yet, gives the store our signing keys and makes the first admin
/// credential. Gives the secret of that, which nobody can tell later.
pub(super) async fn begin(
    registry: &Registry,
    project: Option<(Project, Identities)>,
    past: Past,
    keys: Vec<KeptKey>,
) -> Result<Option<SecretString>, Rejection> {
    let document = project.map(|(project, identities)| project::document(project, &identities));
    let (secret, admin) = credential()?;
    let digest = sha256(secret.expose_secret().as_bytes());
    let name = admin.clone();
    registry
        .change(move |draft| {
            if let Some(document) = &document
                && project::import(draft, document, past)? == Imported::Past
            {
                tracing::warn!(
                    "the project file was in force before and is not taken over again; exchange it, or bring it back with \
                     `infrar project import`"
                );
            }
            let mut writes = Vec::new();
            if draft.book().keys().is_empty() {
                writes.extend(keys.iter().map(entry));
            }
            if !draft.book().has_admin() {
                writes.push(Write::put(Key::Admin(&name).text(), hex(&digest)));
            }
            if writes.is_empty() { Ok(()) } else { draft.add(writes) }
        })
        .await?;
    // Another replica may have been faster.
    let ours = registry.current().book.admin(&admin) == Some(&digest);
    Ok(ours.then_some(secret))
}

/// A new admin credential.
fn credential() -> Result<(SecretString, ServiceName), Rejection> {
    let none = || {
        tracing::error!("the system gives no random numbers");
        Rejection::Internal
    };
    let mut bytes = Zeroizing::new([0; 32]);
    fill(&mut *bytes).map_err(|_unspecified| none())?;
    let secret = SecretString::from(URL_SAFE_NO_PAD.encode(*bytes));
    Ok((secret, FIRST_ADMIN.parse().map_err(|_never| none())?))
}
