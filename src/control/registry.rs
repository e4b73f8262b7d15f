//! The current version of the project, and the way from one to the next.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use secrecy::ExposeSecret;
use tokio::sync::watch;

use crate::{
    api::{CATALOG_READ, CONTROL_AUDIENCE, Catalog, USAGE_WRITE},
    control::{
        Identities, Identity,
        store::{Kept, Store, StoreError},
    },
    model::{Project, ScopeSet, ServiceName},
};

/// Why a version did not come into force; the one before it then stays.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A service took a name that belongs to infrar itself.
    #[error("no service may be called {name}: names beginning with infrar are reserved")]
    Reserved {
        /// The name.
        name: ServiceName,
    },
    /// The project has another name than before, and proxies that know it follow no other.
    #[error(
        "the project was {before} and is called {now}, which no proxy that knows {before} would follow; write project: {before}, \
         or begin {now} anew: remove the --data-dir and the proxies' state folders (control.state_dir), and start them"
    )]
    Renamed {
        /// Its name until now.
        before: ServiceName,
        /// The name it has in the file.
        now: ServiceName,
    },
    /// Its revision could not be kept.
    #[error("the new version was not taken over")]
    Store(#[from] StoreError),
    /// It could not be written as JSON.
    #[error("the project cannot be written as JSON")]
    Catalog(#[source] serde_json::Error),
}

/// What a replacement did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replaced {
    /// Proxies see nothing new; secrets may have changed all the same.
    Unchanged {
        /// The revision that stays.
        revision: u64,
    },
    /// Proxies are told.
    Changed {
        /// The new revision.
        revision: u64,
    },
}

/// One immutable version of everything that is served.
pub(super) struct Version {
    pub(super) revision: u64,
    pub(super) project: Project,
    /// The body of `GET /v1/catalog`, written once.
    pub(super) catalog: Bytes,
    /// Its strong ETag, quotes included.
    pub(super) etag: String,
    /// SHA-256 of the content.
    content: String,
    /// SHA-256 of every secret; identities without a usable secret are not in it.
    secrets: BTreeMap<ServiceName, [u8; 32]>,
    /// All identities.
    identities: BTreeSet<ServiceName>,
}

impl Version {
    /// The digest that a caller's secret must have.
    pub(super) fn secret(&self, name: &ServiceName) -> Option<&[u8; 32]> {
        self.secrets.get(name)
    }

    /// Whether `name` is an identity of the project.
    pub(super) fn knows(&self, name: &ServiceName) -> bool {
        self.identities.contains(name)
    }

    /// What `permissions` grant `caller` at `callee`; `None`: nothing. At the control plane itself every identity
    /// may follow the catalog and report its usage, and whoever is none may do nothing.
    pub(super) fn grants(&self, caller: &ServiceName, callee: &str) -> Option<ScopeSet> {
        let row = self.project.permissions.get(caller);
        let written = row.and_then(|row| row.get(callee));
        if callee != CONTROL_AUDIENCE {
            return written.cloned();
        }
        let own = [CATALOG_READ, USAGE_WRITE].into_iter().filter_map(|text| text.parse().ok());
        let written = written.into_iter().flat_map(ScopeSet::iter).cloned();
        self.knows(caller).then(|| own.chain(written).collect())
    }
}

/// SHA-256, as an array.
pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// Holds the current version. Readers take no lock that a replacement holds for longer than the swap.
pub(super) struct Registry {
    issuer: String,
    store: Store,
    current: watch::Sender<Arc<Version>>,
    replacing: Mutex<()>,
}

impl Registry {
    /// Takes the first version over; unchanged content keeps the revision it had before the restart.
    pub(super) fn open(
        issuer: String,
        store: Store,
        project: Project,
        identities: &Identities,
    ) -> Result<Self, RegistryError> {
        let kept = store.load()?;
        let (version, kept_now) = version(&issuer, kept.as_ref(), project, identities)?;
        if kept.as_ref() != Some(&kept_now) {
            store.save(&kept_now)?;
        }
        let (current, _) = watch::channel(Arc::new(version));
        Ok(Self { issuer, store, current, replacing: Mutex::new(()) })
    }

    /// The `iss` of the project's tokens.
    pub(super) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The version in force.
    pub(super) fn current(&self) -> Arc<Version> {
        Arc::clone(&self.current.borrow())
    }

    /// The version in force and those that follow.
    pub(super) fn follow(&self) -> watch::Receiver<Arc<Version>> {
        self.current.subscribe()
    }

    /// Puts the next version in force, or keeps the old one and says why.
    pub(super) fn replace(
        &self,
        project: Project,
        identities: &Identities,
    ) -> Result<Replaced, RegistryError> {
        // Guards only the order of replacements; the version itself is swapped whole.
        let _replacing = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.current();
        let kept = Kept {
            revision: before.revision,
            content: before.content.clone(),
            project: before.project.name.clone(),
        };
        let (version, kept_now) = version(&self.issuer, Some(&kept), project, identities)?;
        let revision = version.revision;
        if kept == kept_now {
            // Nobody is to be woken for what no proxy can see; a watch of an identity that is gone has to end.
            self.current.send_if_modified(|current| {
                let other = current.identities != version.identities;
                *current = Arc::new(version);
                other
            });
            return Ok(Replaced::Unchanged { revision });
        }
        self.store.save(&kept_now)?;
        self.current.send_replace(Arc::new(version));
        Ok(Replaced::Changed { revision })
    }
}

fn version(
    issuer: &str,
    before: Option<&Kept>,
    project: Project,
    identities: &Identities,
) -> Result<(Version, Kept), RegistryError> {
    if let Some(name) = project.services.keys().find(|name| name.is_reserved()) {
        return Err(RegistryError::Reserved { name: name.clone() });
    }
    if let Some(kept) = before.filter(|kept| kept.project != project.name) {
        return Err(RegistryError::Renamed { before: kept.project.clone(), now: project.name });
    }
    // The content without its revision, so that a restart finds it equal.
    let mut catalog = Catalog { revision: 0, issuer: issuer.to_owned(), project };
    let content = serde_json::to_vec(&catalog).map_err(RegistryError::Catalog)?;
    let content = hex(&sha256(&content));
    catalog.revision = match before {
        None => 1,
        Some(kept) if kept.content == content => kept.revision,
        Some(kept) => kept.revision + 1,
    };
    let body = serde_json::to_vec(&catalog).map_err(RegistryError::Catalog)?;
    let kept = Kept {
        revision: catalog.revision,
        content: content.clone(),
        project: catalog.project.name.clone(),
    };
    let version = Version {
        revision: catalog.revision,
        // The revision is in it, so two data directories with equal content still differ.
        etag: format!("\"{}-{}\"", catalog.revision, content.get(..16).unwrap_or(&content)),
        project: catalog.project,
        catalog: body.into(),
        content,
        secrets: secrets(identities),
        identities: identities.keys().cloned().collect(),
    };
    Ok((version, kept))
}

fn secrets(identities: &Identities) -> BTreeMap<ServiceName, [u8; 32]> {
    let mut found = BTreeMap::new();
    for (name, identity) in identities {
        match identity {
            // An empty secret would be known to everybody.
            Identity::ClientSecret(secret) if !secret.expose_secret().is_empty() => {
                found.insert(name.clone(), sha256(secret.expose_secret().as_bytes()));
            }
            Identity::ClientSecret(_) | Identity::Workload { .. } => {}
        }
    }
    found
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::{Enforcement, NetworkMode, Networking};

    fn project(multi_cloud: bool) -> Project {
        Project {
            name: "shop".parse().unwrap(),
            networking: Networking {
                multi_cloud,
                default_mode: NetworkMode::Public,
                connections: Vec::new(),
            },
            services: BTreeMap::new(),
            permissions: BTreeMap::new(),
            issuers: Vec::new(),
            mode: Enforcement::Enforce,
        }
    }

    fn open(folder: &Path, project: Project) -> Registry {
        let store = Store::new(folder);
        Registry::open("https://c".to_owned(), store, project, &Identities::new()).unwrap()
    }

    #[test]
    fn a_revision_rises_with_the_content_and_survives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let registry = open(folder.path(), project(true));
        assert_eq!(registry.current().revision, 1);
        let none = Identities::new();
        let same = registry.replace(project(true), &none).unwrap();
        assert_eq!(same, Replaced::Unchanged { revision: 1 });
        let other = registry.replace(project(false), &none).unwrap();
        assert_eq!(other, Replaced::Changed { revision: 2 });

        assert_eq!(open(folder.path(), project(false)).current().revision, 2, "unchanged content");
        assert_eq!(open(folder.path(), project(true)).current().revision, 3, "changed while down");
    }

    #[test]
    fn a_project_keeps_its_name_for_life() {
        let folder = tempfile::tempdir().unwrap();
        let renamed = || Project { name: "store".parse().unwrap(), ..project(true) };
        let registry = open(folder.path(), project(true));
        let refused = registry.replace(renamed(), &Identities::new()).unwrap_err();
        assert!(
            refused.to_string().contains("write project: shop, or begin store anew"),
            "{refused}"
        );
        assert_eq!(registry.current().project.name.as_str(), "shop");
        // Nor by a restart.
        let store = Store::new(folder.path());
        let none = Identities::new();
        let refused = Registry::open("https://c".to_owned(), store, renamed(), &none);
        assert!(matches!(refused, Err(RegistryError::Renamed { .. })));
    }

    #[test]
    fn a_version_that_cannot_be_kept_is_not_served() {
        let folder = tempfile::tempdir().unwrap();
        let registry = open(folder.path(), project(true));
        // A folder in the file's place: the rename must fail, also for root.
        std::fs::remove_file(folder.path().join("revision.json")).unwrap();
        std::fs::create_dir(folder.path().join("revision.json")).unwrap();
        let refused = registry.replace(project(false), &Identities::new());
        assert!(matches!(refused, Err(RegistryError::Store(_))));
        assert!(registry.current().project.networking.multi_cloud);
        assert_eq!(registry.current().revision, 1);
    }

    #[test]
    fn a_changed_secret_wakes_nobody_but_is_in_force() {
        let folder = tempfile::tempdir().unwrap();
        let registry = open(folder.path(), project(true));
        let web: ServiceName = "web".parse().unwrap();
        let replace = |secret: &str| {
            let secret = Identity::ClientSecret(secret.to_owned().into());
            registry.replace(project(true), &Identities::from([(web.clone(), secret)])).unwrap()
        };
        replace("before");
        let mut changes = registry.follow();
        assert_eq!(replace("secret"), Replaced::Unchanged { revision: 1 });
        assert!(!changes.has_changed().unwrap());
        assert_eq!(changes.borrow_and_update().secret(&web), Some(&sha256(b"secret")));
        // Whoever watches under a name that is gone has to hear of it.
        registry.replace(project(true), &Identities::new()).unwrap();
        assert!(changes.has_changed().unwrap());
        assert!(registry.current().grants(&web, CONTROL_AUDIENCE).is_none());
    }

    #[test]
    fn an_empty_secret_lets_nobody_in() {
        let folder = tempfile::tempdir().unwrap();
        let registry = open(folder.path(), project(true));
        let web: ServiceName = "web".parse().unwrap();
        let empty = Identity::ClientSecret(String::new().into());
        registry.replace(project(true), &Identities::from([(web.clone(), empty)])).unwrap();
        assert_eq!(registry.current().secret(&web), None);
    }
}
