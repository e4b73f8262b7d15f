//! What the entries of the store mean: the project as it was written, the endpoints that were registered beside it, what
//! was adjusted by hand, and the project that comes out of all three.
//!
//! A book is one revision of that. Its parts are shared, so that the next revision costs what has changed in it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use secrecy::SecretString;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    api::{Adjustment, IdentityDocument, ProjectDocument, Source},
    model::{Endpoint, EndpointId, Project, Service, ServiceName},
    store::{Entry, State, Write},
};

/// An endpoint that somebody registered, as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Leased {
    /// What was said of it.
    pub(super) endpoint: Endpoint,
    /// Who registered it.
    pub(super) owner: ServiceName,
    /// How long it stays without a heartbeat, in seconds.
    pub(super) ttl_seconds: u64,
    /// Its place in the order in which endpoints came; keeps the others where they are when one joins.
    pub(super) ordinal: u64,
}

/// The project and the hashes of those that were imported before, the last one last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Imported {
    document: ProjectDocument,
    history: Vec<String>,
}

/// How many imports are remembered.
const HISTORY: usize = 50;

/// Why an entry is not understood: it was written by another release, or by somebody else.
#[derive(Debug, thiserror::Error)]
#[error("the entry {key} of the store is not understood")]
pub struct BookError {
    /// Its key.
    pub key: String,
    /// Where it is wrong; never what it says.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// A thing that was kept, and the revision of its last change.
#[derive(Clone, Debug)]
pub(super) struct Dated<T> {
    pub(super) content: T,
    pub(super) revision: u64,
}

type PerEndpoint<T> = BTreeMap<ServiceName, BTreeMap<EndpointId, Dated<T>>>;

/// One revision of everything that is known.
#[derive(Clone)]
pub(super) struct Book {
    pub(super) revision: u64,
    imported: Option<Arc<Dated<Imported>>>,
    leased: PerEndpoint<Arc<Leased>>,
    adjusted: PerEndpoint<Adjustment>,
    /// The signing keys, by file name.
    keys: BTreeMap<String, SecretString>,
    /// SHA-256 of each admin credential, by its name.
    admins: BTreeMap<ServiceName, [u8; 32]>,
    /// What comes out of it.
    project: Option<Project>,
    ordinal: u64,
}

/// Where an entry lies.
pub(super) enum Key<'a> {
    /// The project as it was written.
    Project,
    /// An endpoint that was registered.
    Leased(&'a ServiceName, &'a EndpointId),
    /// What was adjusted at an endpoint of the project.
    Adjusted(&'a ServiceName, &'a EndpointId),
    /// A signing key.
    Signing(&'a str),
    /// An admin credential.
    Admin(&'a ServiceName),
}

impl Key<'_> {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Project => "project".to_owned(),
            Self::Leased(service, id) => format!("endpoint/{service}/{id}"),
            Self::Adjusted(service, id) => format!("adjusted/{service}/{id}"),
            Self::Signing(stem) => format!("key/{stem}"),
            Self::Admin(name) => format!("admin/{name}"),
        }
    }
}

/// Service and endpoint of a key below `prefix`.
pub(super) fn named(key: &str, prefix: &str) -> Option<(ServiceName, EndpointId)> {
    let (service, id) = key.strip_prefix(prefix)?.split_once('/')?;
    Some((service.parse().ok()?, id.parse().ok()?))
}

impl Book {
    /// What a state of the store means.
    pub(super) fn read(state: &State) -> Result<Self, BookError> {
        let mut book = Self {
            revision: state.revision,
            imported: None,
            leased: BTreeMap::new(),
            adjusted: BTreeMap::new(),
            keys: BTreeMap::new(),
            admins: BTreeMap::new(),
            project: None,
            ordinal: 0,
        };
        for Entry { key, value, revision } in &state.entries {
            book.place(key, Some(value), *revision)?;
        }
        book.compose_all();
        Ok(book)
    }

    /// The book after `writes`, which are those of `revision`.
    pub(super) fn after(&self, revision: u64, writes: &[Write]) -> Result<Self, BookError> {
        let mut next = self.clone();
        next.revision = revision;
        next.apply(writes)?;
        Ok(next)
    }

    /// Takes `writes` over, as ones of its own revision.
    ///
    /// # Errors
    /// [`BookError`]; what came before the write that is not understood is taken over then.
    pub(super) fn apply(&mut self, writes: &[Write]) -> Result<(), BookError> {
        let mut touched = BTreeSet::new();
        for Write { key, value } in writes {
            self.place(key, value.as_deref(), self.revision)?;
            let endpoint = named(key, "endpoint/").or_else(|| named(key, "adjusted/"));
            touched.extend(endpoint.map(|(service, _)| service));
        }
        if writes.iter().any(|write| write.key == Key::Project.text()) {
            self.compose_all();
        } else {
            touched.iter().for_each(|service| self.compose(service));
        }
        Ok(())
    }

    /// Puts one entry where it belongs. Entries of a kind that this release does not know are left alone.
    fn place(&mut self, key: &str, value: Option<&str>, revision: u64) -> Result<(), BookError> {
        if key == "project" {
            self.imported = read(key, value)?.map(|content| Arc::new(Dated { content, revision }));
        } else if let Some((service, id)) = named(key, "endpoint/") {
            let leased: Option<Leased> = read(key, value)?;
            self.ordinal = self.ordinal.max(leased.as_ref().map_or(0, |leased| leased.ordinal));
            file(&mut self.leased, service, id, leased.map(Arc::new), revision);
        } else if let Some((service, id)) = named(key, "adjusted/") {
            file(&mut self.adjusted, service, id, read(key, value)?, revision);
        } else if let Some(stem) = key.strip_prefix("key/") {
            match value {
                Some(pem) => self.keys.insert(stem.to_owned(), SecretString::from(pem)),
                None => self.keys.remove(stem),
            };
        } else if let Some(name) = key.strip_prefix("admin/").and_then(|name| name.parse().ok()) {
            match value.map(|text| unhex(key, text)).transpose()? {
                Some(digest) => self.admins.insert(name, digest),
                None => self.admins.remove(&name),
            };
        }
        Ok(())
    }

    fn compose_all(&mut self) {
        let Some(imported) = &self.imported else {
            self.project = None;
            return;
        };
        let project = &imported.content.document.project;
        let services = project.services.iter();
        let services =
            services.map(|(name, service)| (name.clone(), self.composed(name, service))).collect();
        self.project = Some(Project { services, ..project.clone() });
    }

    fn compose(&mut self, name: &ServiceName) {
        let Some(service) = self.written(name).cloned() else { return };
        let composed = self.composed(name, &service);
        if let Some(project) = &mut self.project {
            project.services.insert(name.clone(), composed);
        }
    }

    /// A service with what was adjusted and registered at it; the same one when that is nothing.
    fn composed(&self, name: &ServiceName, service: &Arc<Service>) -> Arc<Service> {
        let (adjusted, leased) = (self.adjusted.get(name), self.leased.get(name));
        if adjusted.is_none() && leased.is_none() {
            return Arc::clone(service);
        }
        let mut composed = (**service).clone();
        for endpoint in &mut composed.endpoints {
            if let Some(adjusted) = adjusted.and_then(|all| all.get(&endpoint.id)) {
                adjust(endpoint, &adjusted.content);
            }
        }
        let own: BTreeSet<EndpointId> =
            service.endpoints.iter().map(|endpoint| endpoint.id.clone()).collect();
        let mut joined: Vec<&Leased> = leased
            .into_iter()
            .flat_map(BTreeMap::values)
            .map(|leased| &*leased.content)
            .filter(|leased| !own.contains(&leased.endpoint.id))
            .collect();
        joined.sort_unstable_by_key(|leased| leased.ordinal);
        composed.endpoints.extend(joined.into_iter().map(|leased| leased.endpoint.clone()));
        Arc::new(composed)
    }

    /// The project that is in force; `None` before the first one.
    pub(super) fn project(&self) -> Option<&Project> {
        self.project.as_ref()
    }

    /// The project as it was written.
    pub(super) fn document(&self) -> Option<&ProjectDocument> {
        self.imported.as_ref().map(|imported| &imported.content.document)
    }

    /// The revision at which the project was written.
    pub(super) fn written_at(&self) -> Option<u64> {
        self.imported.as_ref().map(|imported| imported.revision)
    }

    /// Whether a project with this hash was in force before another one took its place.
    pub(super) fn is_past(&self, hash: &str) -> bool {
        let Some(imported) = &self.imported else { return false };
        let Some((last, before)) = imported.content.history.split_last() else { return false };
        last != hash && before.iter().any(|known| known == hash)
    }

    /// The entry that puts `document` in force.
    pub(super) fn import(
        &self,
        document: ProjectDocument,
        hash: String,
    ) -> Result<Write, serde_json::Error> {
        let known = self.imported.as_ref().map(|imported| imported.content.history.clone());
        let mut history = known.unwrap_or_default();
        history.retain(|known| *known != hash);
        history.push(hash);
        let surplus = history.len().saturating_sub(HISTORY);
        history.drain(..surplus);
        let text = serde_json::to_string(&Imported { document, history })?;
        Ok(Write::put(Key::Project.text(), text))
    }

    /// A service as the project has it, without what was registered.
    pub(super) fn written(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.document()?.project.services.get(name)
    }

    /// A service as it is in force.
    pub(super) fn service(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.project.as_ref()?.services.get(name)
    }

    /// An endpoint as it is in force, where it comes from, and when it last changed.
    pub(super) fn endpoint(
        &self,
        service: &ServiceName,
        id: &EndpointId,
    ) -> Option<(&Endpoint, Source, u64)> {
        let found = self.service(service)?.endpoints.iter().find(|one| one.id == *id)?;
        let written = self.written(service)?.endpoints.iter().any(|one| one.id == *id);
        if !written {
            let revision = self.leased.get(service)?.get(id)?.revision;
            return Some((found, Source::Lease, revision));
        }
        let adjusted = self.adjusted.get(service).and_then(|all| all.get(id));
        let revision = adjusted.map_or(0, |adjusted| adjusted.revision).max(self.written_at()?);
        Some((found, Source::Project, revision))
    }

    /// What was registered under this name.
    pub(super) fn leased(&self, service: &ServiceName, id: &EndpointId) -> Option<&Leased> {
        self.leased.get(service)?.get(id).map(|leased| &*leased.content)
    }

    /// Everything that was registered.
    pub(super) fn leases(&self) -> impl Iterator<Item = (&ServiceName, &EndpointId, &Leased)> {
        self.leased.iter().flat_map(|(service, all)| {
            all.iter().map(move |(id, leased)| (service, id, &*leased.content))
        })
    }

    /// What was adjusted at an endpoint of the project.
    pub(super) fn adjusted(&self, service: &ServiceName, id: &EndpointId) -> Option<Adjustment> {
        self.adjusted.get(service)?.get(id).map(|adjusted| adjusted.content)
    }

    /// Every endpoint at which something was adjusted.
    pub(super) fn adjustments(&self) -> impl Iterator<Item = (&ServiceName, &EndpointId)> {
        self.adjusted.iter().flat_map(|(service, all)| all.keys().map(move |id| (service, id)))
    }

    /// The place of the next endpoint that comes.
    pub(super) fn next_ordinal(&self) -> u64 {
        self.ordinal + 1
    }

    /// The signing keys, by file name.
    pub(super) fn keys(&self) -> &BTreeMap<String, SecretString> {
        &self.keys
    }

    /// The digest that the secret of an admin credential has.
    pub(super) fn admin(&self, name: &ServiceName) -> Option<&[u8; 32]> {
        self.admins.get(name)
    }

    /// Whether there is any admin credential.
    pub(super) fn has_admin(&self) -> bool {
        !self.admins.is_empty()
    }

    /// Whether the project names this identity.
    pub(super) fn is_identity(&self, name: &ServiceName) -> bool {
        self.document().is_some_and(|document| document.identities.contains_key(name))
    }

    /// Who may ask for tokens.
    pub(super) fn identities(&self) -> impl Iterator<Item = (&ServiceName, &IdentityDocument)> {
        self.document().into_iter().flat_map(|document| &document.identities)
    }

    /// The service to which each host belongs.
    pub(super) fn hosts(&self) -> HashMap<String, ServiceName> {
        let services = self.project.iter().flat_map(|project| &project.services);
        services
            .flat_map(|(name, service)| {
                service.endpoints.iter().map(move |one| (one.url.host().to_string(), name.clone()))
            })
            .collect()
    }
}

/// Changes an endpoint as it was asked for.
pub(super) fn adjust(endpoint: &mut Endpoint, adjustment: &Adjustment) {
    endpoint.state = adjustment.state.unwrap_or(endpoint.state);
    endpoint.weight = adjustment.weight.unwrap_or(endpoint.weight);
}

fn read<T: DeserializeOwned>(key: &str, value: Option<&str>) -> Result<Option<T>, BookError> {
    let wrong =
        |source: serde_json::Error| BookError { key: key.to_owned(), source: source.into() };
    value.map(serde_json::from_str).transpose().map_err(wrong)
}

fn unhex(key: &str, text: &str) -> Result<[u8; 32], BookError> {
    digest(text).ok_or_else(|| BookError {
        key: key.to_owned(),
        source: "it is no SHA-256 in hexadecimal".into(),
    })
}

/// A SHA-256 from its 64 hexadecimal digits.
pub(super) fn digest(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(digest)
}

fn file<T>(
    all: &mut PerEndpoint<T>,
    service: ServiceName,
    id: EndpointId,
    content: Option<T>,
    revision: u64,
) {
    let Some(content) = content else {
        if let Some(of_service) = all.get_mut(&service) {
            of_service.remove(&id);
            if of_service.is_empty() {
                all.remove(&service);
            }
        }
        return;
    };
    all.entry(service).or_default().insert(id, Dated { content, revision });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn endpoint(id: &str) -> serde_json::Value {
        json!({"id": id, "url": format!("https://{id}.example"), "internal_url": null, "private_url": null,
            "place": "aws/us-east-1", "zone": null, "auth_method": "bearer_token", "weight": 100, "state": "active"})
    }

    fn imported(endpoints: &[&str]) -> String {
        let mut service = serde_json::to_value(Service::default()).unwrap();
        service["endpoints"] = endpoints.iter().map(|id| endpoint(id)).collect();
        json!({"document": {"project": {"name": "shop", "networking": {"multi_cloud": true, "default_mode": "public",
            "connections": []}, "services": {"data": service}, "permissions": {}, "issuers": [], "mode": "enforce"},
            "identities": {}}, "history": ["a", "b"]})
        .to_string()
    }

    fn leased(id: &str, ordinal: u64) -> String {
        json!({"endpoint": endpoint(id), "owner": "data", "ttl_seconds": 30, "ordinal": ordinal})
            .to_string()
    }

    fn empty() -> Book {
        Book::read(&State { revision: 0, entries: Vec::new() }).unwrap()
    }

    fn ids(book: &Book) -> Vec<String> {
        let data = "data".parse().unwrap();
        book.service(&data).unwrap().endpoints.iter().map(|one| one.id.to_string()).collect()
    }

    #[test]
    fn what_was_registered_joins_what_was_written_in_the_order_it_came() {
        let writes = [
            Write::put("project", imported(&["home"])),
            Write::put("endpoint/data/a", leased("a", 2)),
            Write::put("endpoint/data/z", leased("z", 1)),
            // A name that the project has belongs to the project.
            Write::put("endpoint/data/home", leased("home", 3)),
            Write::put("adjusted/data/home", r#"{"state":"draining"}"#),
            Write::put("of-a-later-release/x", "?"),
        ];
        let book = empty().after(1, &writes).unwrap();
        assert_eq!(ids(&book), ["home", "z", "a"]);
        let (data, home) = ("data".parse().unwrap(), "home".parse().unwrap());
        let (endpoint, source, revision) = book.endpoint(&data, &home).unwrap();
        assert_eq!((endpoint.state.as_str(), source, revision), ("draining", Source::Project, 1));
        assert_eq!(book.next_ordinal(), 4);
        let book = book.after(2, &[Write::remove("endpoint/data/z")]).unwrap();
        assert_eq!(ids(&book), ["home", "a"]);
        let book = book.after(3, &[Write::remove("adjusted/data/home")]).unwrap();
        assert_eq!(book.endpoint(&data, &home).unwrap().0.state.as_str(), "active");
    }

    #[test]
    fn step_by_step_is_the_same_as_at_once() {
        let all = [
            Write::put("endpoint/data/a", leased("a", 1)),
            Write::put("project", imported(&["home"])),
            Write::put("adjusted/data/home", r#"{"weight":7}"#),
        ];
        let at_once = empty().after(3, &all).unwrap();
        let mut steps = empty();
        for (revision, write) in (1..).zip(&all) {
            steps = steps.after(revision, std::slice::from_ref(write)).unwrap();
        }
        assert_eq!(at_once.project(), steps.project());
    }

    #[test]
    fn services_that_a_step_does_not_touch_are_shared() {
        let book = empty().after(1, &[Write::put("project", imported(&["home"]))]).unwrap();
        let data: ServiceName = "data".parse().unwrap();
        let next = book.after(2, &[Write::put("admin/infrar-admin", "00".repeat(32))]).unwrap();
        assert!(Arc::ptr_eq(book.service(&data).unwrap(), next.service(&data).unwrap()));
        assert!(next.has_admin());
    }

    #[test]
    fn an_entry_that_is_not_understood_is_named() {
        let fault = empty().after(1, &[Write::put("endpoint/data/a", "{")]).err().unwrap();
        assert_eq!(fault.key, "endpoint/data/a");
        assert!(empty().after(1, &[Write::put("admin/x", "zz")]).is_err());
    }

    #[test]
    fn a_project_that_another_has_replaced_is_past() {
        let book = empty().after(1, &[Write::put("project", imported(&[]))]).unwrap();
        assert!(book.is_past("a"));
        assert!(!book.is_past("b") && !book.is_past("c"));
    }
}
