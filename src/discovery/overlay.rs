//! What further sources find, laid over the snapshot that the registry's source publishes.
//!
//! A source says which endpoints a service has; everything else about the service (scopes, time-outs, who may call it)
//! stays what the snapshot says. Where several sources speak of one service, it has the endpoints of all of them. A
//! service that the snapshot does not know is not made up: nobody would be permitted to call it.
//!
//! A service that did not change is the same object in the next snapshot, wherever that comes from: whoever derives
//! something from it sees by that what to keep, and a large project is in memory once.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::DropGuard;

use super::directory::Directory;
use crate::{
    api::Catalog,
    model::{Endpoint, Place, Project, Service, ServiceName},
};

/// Which endpoints a source found, by service.
pub type Found = BTreeMap<ServiceName, Deployment>;

/// The endpoints of one service, as one source found them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deployment {
    /// Its endpoints, each with an id of its own.
    pub endpoints: Vec<Endpoint>,
    /// Why there are none, for whoever calls.
    pub absence: Option<&'static str>,
}

/// The snapshot and what lies over it.
#[derive(Debug, Default)]
pub(super) struct Layers {
    base: Option<Arc<Catalog>>,
    /// `None`: the source has not said anything yet.
    over: BTreeMap<u64, Option<Found>>,
    opened: u64,
    /// Services that were found and that the snapshot does not know, as the log was told.
    strangers: BTreeSet<ServiceName>,
}

impl Layers {
    pub(super) fn base(&self) -> Option<Arc<Catalog>> {
        self.base.clone()
    }

    /// Puts another base in force; `false` when it is none.
    pub(super) fn lay(&mut self, mut catalog: Catalog) -> bool {
        share(&mut catalog, self.base.as_deref());
        if self.base.as_ref().is_some_and(|base| is_same(base, &catalog)) {
            return false;
        }
        self.base = Some(Arc::new(catalog));
        true
    }

    pub(super) fn open(&mut self) -> u64 {
        self.opened += 1;
        self.over.insert(self.opened, None);
        self.opened
    }

    pub(super) fn is_awaiting(&self) -> bool {
        self.over.values().any(Option::is_none)
    }

    pub(super) fn leads_somewhere(&self, id: u64) -> bool {
        let found = self.over.get(&id).and_then(Option::as_ref);
        found.is_some_and(|found| found.values().any(|it| !it.endpoints.is_empty()))
    }

    fn put(&mut self, id: u64, found: Found) -> bool {
        match self.over.get_mut(&id) {
            Some(known) if known.as_ref() != Some(&found) => {
                *known = Some(found);
                true
            }
            Some(_) | None => false,
        }
    }

    fn close(&mut self, id: u64) -> bool {
        self.over.remove(&id).is_some()
    }

    /// What is in force, after `before`. Without anything over it, that is the base itself and nothing is copied.
    pub(super) fn composed(&mut self, before: Option<&Arc<Catalog>>) -> Option<Arc<Catalog>> {
        let base = self.base.as_ref()?;
        let found = merged(self.over.values().flatten());
        let strangers: BTreeSet<_> =
            found.keys().filter(|it| !base.project.services.contains_key(*it)).cloned().collect();
        for service in strangers.difference(&self.strangers) {
            tracing::warn!(
                service = service.as_str(),
                "endpoints are looked for, but the project has no such service"
            );
        }
        let composed = if found.len() == strangers.len() {
            Arc::clone(base)
        } else {
            let mut catalog = Catalog::clone(base);
            for (name, deployment) in found {
                let Some(service) = catalog.project.services.get_mut(&name) else { continue };
                let Deployment { endpoints, absence } = deployment;
                let next = Service { endpoints, absence, ..Service::clone(service) };
                let known = before.and_then(|before| before.project.services.get(&name));
                *service = match known {
                    Some(known) if **known == next => Arc::clone(known),
                    Some(_) | None => Arc::new(next),
                };
            }
            Arc::new(catalog)
        };
        self.strangers = strangers;
        Some(composed)
    }
}

/// Takes every service that did not change from `known`, and gives back what the others do not need.
fn share(catalog: &mut Catalog, known: Option<&Catalog>) {
    let mut places = HashSet::new();
    let mut known = known.into_iter().flat_map(|it| &it.project.services).peekable();
    for (name, service) in &mut catalog.project.services {
        while known.next_if(|(other, _)| *other < name).is_some() {}
        match known.next_if(|(other, _)| *other == name) {
            Some((_, known)) if Arc::ptr_eq(known, service) => {}
            Some((_, known)) if known == service => service.clone_from(known),
            Some(_) | None => {
                if let Some(service) = Arc::get_mut(service) {
                    condense(service, &mut places);
                }
            }
        }
    }
}

/// Many endpoints are in few places, and a list that was read has room for more. It is moved because allocators leave a
/// block that shrinks where it is.
fn condense(service: &mut Service, places: &mut HashSet<Place>) {
    let mut exact = Vec::with_capacity(service.endpoints.len());
    exact.append(&mut service.endpoints);
    service.endpoints = exact;
    for endpoint in &mut service.endpoints {
        match places.get(&endpoint.place) {
            Some(known) => endpoint.place.clone_from(known),
            None => {
                places.insert(endpoint.place.clone());
            }
        }
    }
}

/// Whether two snapshots are equal, of which the later one shares with the earlier one every service that is.
pub(super) fn is_same(one: &Catalog, other: &Catalog) -> bool {
    let Catalog { revision, issuer, project } = one;
    let Project { name, networking, services, permissions, issuers, mode } = project;
    *revision == other.revision
        && *issuer == other.issuer
        && *name == other.project.name
        && *networking == other.project.networking
        && *issuers == other.project.issuers
        && *mode == other.project.mode
        && services.len() == other.project.services.len()
        && services
            .iter()
            .zip(&other.project.services)
            .all(|((name, one), (named, other))| name == named && Arc::ptr_eq(one, other))
        && *permissions == other.project.permissions
}

/// What all sources together found. Of two endpoints with one id the first stays: an older source's, whose connections
/// are warm.
fn merged<'a>(all: impl Iterator<Item = &'a Found>) -> Found {
    let mut sum = Found::new();
    for (name, deployment) in all.flatten() {
        let entry = sum.entry(name.clone()).or_default();
        let known: HashSet<_> = entry.endpoints.iter().map(|it| it.id.clone()).collect();
        let new = deployment.endpoints.iter().filter(|it| !known.contains(&it.id));
        entry.endpoints.extend(new.cloned());
        entry.absence = deployment.absence.or(entry.absence);
    }
    for deployment in sum.values_mut().filter(|it| !it.endpoints.is_empty()) {
        deployment.absence = None;
    }
    sum
}

/// Where one source writes what it finds. What it found goes when this is dropped.
#[derive(Debug)]
pub struct Layer {
    directory: Arc<Directory>,
    id: u64,
    /// Sources whose place this one takes, once it has found something.
    before: Mutex<Vec<DropGuard>>,
}

impl Layer {
    pub(super) fn new(directory: Arc<Directory>, id: u64) -> Self {
        Self { directory, id, before: Mutex::default() }
    }

    /// Lets these go on until this one has found something, so that nobody is without endpoints in between.
    pub(super) fn succeed(&self, before: Vec<DropGuard>) {
        *self.before.lock().unwrap_or_else(PoisonError::into_inner) = before;
    }

    /// Whether the source has found any endpoint that is in force.
    #[must_use]
    pub fn leads_somewhere(&self) -> bool {
        self.directory.leads_somewhere(self.id)
    }

    /// Whether the service has endpoints without what sources find.
    pub(super) fn lies_over_endpoints(&self, service: &ServiceName) -> bool {
        let base = self.directory.base();
        let service = base.as_ref().and_then(|base| base.project.services.get(service));
        service.is_some_and(|service| !service.endpoints.is_empty())
    }

    /// Everything that the source found, in the place of what it found before.
    pub fn put(&self, found: Found) {
        let any = found.values().any(|it| !it.endpoints.is_empty());
        self.directory.edit(|layers| layers.put(self.id, found));
        if any {
            drop(mem::take(&mut *self.before.lock().unwrap_or_else(PoisonError::into_inner)));
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.directory.edit(|layers| layers.close(self.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(revision: u64, services: &str) -> Catalog {
        let json = format!(
            r#"{{"revision":{revision},"issuer":"x","project":{{"name":"shop","networking":{{"multi_cloud":true,
            "default_mode":"public","connections":[]}},"services":{{{services}}},"permissions":{{}},"issuers":[],
            "mode":"enforce"}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    const DATA: &str = r#""data":{"endpoints":[],"scopes":["use"],"protocol":"auto",
        "routing":{"policy":"latency","latency_target":null,"locality":"none","sticky":null},
        "timeouts":{"connect":"5s","attempt":null,"request":"30s"},
        "retries":{"max_attempts":3,"backoff":{"base":"25ms","max":"1s"}},"hedge":null,
        "circuit":{"failure_threshold":5,"recovery_timeout":"1m"},
        "health":{"kind":"http","path":null,"interval":"10s","timeout":"5s","healthy":2,"unhealthy":3},
        "limits":{"connections":null,"requests":null}}"#;

    fn found(service: &str, ids: &[&str]) -> Found {
        let endpoint = |id: &&str| {
            serde_json::from_value(serde_json::json!({
                "id": id, "url": "https://data.example", "internal_url": null, "private_url": null,
                "place": "azure_eastus", "zone": null, "auth_method": "none", "weight": 100, "state": "active",
            }))
            .unwrap()
        };
        let endpoints: Vec<_> = ids.iter().map(endpoint).collect();
        let absence = endpoints.is_empty().then_some("nobody found it");
        [(service.parse().unwrap(), Deployment { endpoints, absence })].into()
    }

    fn ids(directory: &Directory) -> Vec<String> {
        let catalog = directory.load().unwrap();
        catalog.project.services["data"].endpoints.iter().map(|it| it.id.to_string()).collect()
    }

    #[test]
    fn what_did_not_change_is_the_same_object_in_the_next_snapshot() {
        let service = |name: &str| DATA.replace("\"data\"", &format!("\"{name}\""));
        let both = format!("{},{}", service("data"), service("mail"));
        let other = DATA.replace("\"max_attempts\":3", "\"max_attempts\":2");
        let mixed = format!("{other},{}", service("mail"));
        let directory = Arc::<Directory>::default();
        let of = |name: &str| Arc::clone(&directory.load().unwrap().project.services[name]);
        let layer = directory.layer();
        layer.put(found("mail", &["a"]));
        directory.publish(catalog(1, &both));
        let (data, mail) = (of("data"), of("mail"));
        // Another source finds something, and a whole catalog comes that says the same.
        let second = directory.layer();
        second.put(found("data", &["b"]));
        assert!(Arc::ptr_eq(&mail, &of("mail")) && !Arc::ptr_eq(&data, &of("data")));
        drop(second);
        directory.publish(catalog(2, &both));
        assert!(Arc::ptr_eq(&mail, &of("mail")) && Arc::ptr_eq(&data, &of("data")));
        directory.publish(catalog(3, &mixed));
        assert!(Arc::ptr_eq(&mail, &of("mail")) && !Arc::ptr_eq(&data, &of("data")));
        // The same revision with other content is another snapshot; with the same it is none.
        let mut changes = directory.changes();
        changes.mark_unchanged();
        directory.publish(catalog(3, &mixed));
        assert!(!changes.has_changed().unwrap());
        directory.publish(catalog(3, &both));
        assert!(changes.has_changed().unwrap());
    }

    #[test]
    fn what_is_found_lies_over_the_base_and_goes_with_its_layer() {
        let directory = Arc::<Directory>::default();
        let (mut changes, mut bases) = (directory.changes(), directory.base_changes());
        let layer = directory.layer();
        assert!(directory.is_awaiting());
        layer.put(found("data", &["a"]));
        assert_eq!((directory.load(), directory.is_awaiting()), (None, false));
        directory.publish(catalog(1, DATA));
        assert_eq!(ids(&directory), ["a"]);
        assert_eq!(directory.base().as_deref(), Some(&catalog(1, DATA)));
        changes.mark_unchanged();
        bases.mark_unchanged();

        // The base stays what it was, on disk too; what is read follows the source.
        layer.put(found("data", &["b"]));
        assert!(changes.has_changed().unwrap() && !bases.has_changed().unwrap());
        assert_eq!((ids(&directory), directory.load().unwrap().revision), (vec!["b".into()], 1));
        changes.mark_unchanged();
        layer.put(found("data", &["b"]));
        directory.publish(catalog(1, DATA));
        assert!(!changes.has_changed().unwrap());
        layer.put(found("data", &[]));
        let service = directory.load().unwrap().project.services["data"].clone();
        assert_eq!((service.endpoints.len(), service.absence), (0, Some("nobody found it")));
        drop(layer);
        assert!(Arc::ptr_eq(&directory.load().unwrap(), &directory.base().unwrap()));
    }

    #[test]
    fn several_layers_add_up_and_none_makes_up_a_service() {
        let directory = Arc::<Directory>::default();
        directory.publish(catalog(1, DATA));
        let (one, other) = (directory.layer(), directory.layer());
        other.put(found("data", &[]));
        one.put(found("data", &["a", "b"]));
        assert_eq!(directory.load().unwrap().project.services["data"].absence, None);
        other.put(found("data", &["b", "c"]));
        assert_eq!(ids(&directory), ["a", "b", "c"]);
        drop(one);
        assert_eq!(ids(&directory), ["b", "c"]);
        other.put(found("reports", &["a"]));
        assert!(Arc::ptr_eq(&directory.load().unwrap(), &directory.base().unwrap()));
    }

    #[test]
    fn who_is_succeeded_stays_until_something_was_found() {
        let directory = Arc::<Directory>::default();
        let (cancel, layer) = (tokio_util::sync::CancellationToken::new(), directory.layer());
        layer.succeed(vec![cancel.clone().drop_guard()]);
        layer.put(found("data", &[]));
        assert!(!cancel.is_cancelled());
        layer.put(found("data", &["a"]));
        assert!(cancel.is_cancelled());
    }
}
