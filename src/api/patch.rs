//! What changes from one version of the catalog to the next: computed by the control plane, applied by proxies, and shown
//! to people before they change anything.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    api::{Catalog, shapes},
    model::{
        Endpoint, EndpointId, Enforcement, Issuer, Networking, Project, ScopeSet, Service,
        ServiceName,
    },
};

/// Why a change was not applied; the whole catalog must then be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// It does not follow on the catalog's revision.
    #[error("revision {found} does not follow on {known}")]
    Gap {
        /// The catalog's revision.
        known: u64,
        /// The change's revision.
        found: u64,
    },
    /// It speaks of a service that the catalog does not have.
    #[error("an endpoint of a service that is not there")]
    Stranger,
}

/// `GET /v1/watch`: the data of one `change` event; its `id` is the revision too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// The revision that it leads to; it follows on the one before.
    pub revision: u64,
    /// The ETag of the catalog that it leads to.
    pub etag: String,
    /// What is different, in any order.
    pub patches: Vec<Patch>,
}

/// `GET /v1/watch`: the data of a `resync` or `current` event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Standing {
    /// The revision that is current.
    pub revision: u64,
}

/// What a watch tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// The next change.
    Change(Change),
    /// What lies between cannot be told any more: fetch the catalog.
    Resync(Standing),
    /// Nothing has changed; said every now and then.
    Current(Standing),
}

/// One thing that is different.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Patch {
    /// What is true for the whole project, all of it.
    Settings(Box<Settings>),
    /// A service, with its endpoints; `None`: it is gone.
    Service {
        /// Its name.
        #[schema(value_type = shapes::ServiceName)]
        name: ServiceName,
        /// What is now said about it.
        #[schema(value_type = Option<shapes::Service>)]
        service: Option<Box<Service>>,
    },
    /// An endpoint of a service that stays; `None`: it is gone.
    Endpoint {
        /// The service.
        #[schema(value_type = shapes::ServiceName)]
        service: ServiceName,
        /// The endpoint.
        #[schema(value_type = shapes::EndpointId)]
        id: EndpointId,
        /// What is now said about it.
        #[schema(value_type = Option<shapes::Endpoint>)]
        endpoint: Option<Box<Endpoint>>,
    },
}

/// A project without its services.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Settings {
    /// How places reach each other.
    #[schema(value_type = shapes::Networking)]
    pub networking: Networking,
    /// Caller → callee → scopes.
    #[schema(value_type = BTreeMap<shapes::ServiceName, BTreeMap<shapes::ServiceName, Vec<shapes::Scope>>>)]
    pub permissions: BTreeMap<ServiceName, BTreeMap<ServiceName, ScopeSet>>,
    /// Further issuers whose tokens callees accept.
    #[schema(value_type = Vec<shapes::Issuer>)]
    pub issuers: Vec<Issuer>,
    /// Whether a missing grant refuses.
    #[schema(value_type = shapes::Enforcement)]
    pub mode: Enforcement,
}

impl Settings {
    fn of(project: &Project) -> Self {
        Self {
            networking: project.networking.clone(),
            permissions: project.permissions.clone(),
            issuers: project.issuers.clone(),
            mode: project.mode.clone(),
        }
    }

    fn are_of(&self, project: &Project) -> bool {
        self.networking == project.networking
            && self.permissions == project.permissions
            && self.issuers == project.issuers
            && self.mode == project.mode
    }
}

impl Change {
    /// The catalog after this change.
    ///
    /// # Errors
    /// [`PatchError`]; the change is of no use then.
    pub fn apply(&self, catalog: &Catalog) -> Result<Catalog, PatchError> {
        if catalog.revision.checked_add(1) != Some(self.revision) {
            return Err(PatchError::Gap { known: catalog.revision, found: self.revision });
        }
        let mut next = Catalog { revision: self.revision, ..catalog.clone() };
        for patch in &self.patches {
            patch.apply(&mut next.project)?;
        }
        Ok(next)
    }
}

impl Patch {
    fn apply(&self, project: &mut Project) -> Result<(), PatchError> {
        match self {
            Self::Settings(settings) => {
                let Settings { networking, permissions, issuers, mode } = (**settings).clone();
                project.networking = networking;
                project.permissions = permissions;
                project.issuers = issuers;
                project.mode = mode;
            }
            Self::Service { name, service: Some(service) } => {
                project.services.insert(name.clone(), Arc::new((**service).clone()));
            }
            Self::Service { name, service: None } => {
                project.services.remove(name);
            }
            Self::Endpoint { service, id, endpoint } => {
                let service = project.services.get_mut(service).ok_or(PatchError::Stranger)?;
                let endpoints = &mut Arc::make_mut(service).endpoints;
                let place = endpoints.iter().position(|known| known.id == *id);
                match (place.and_then(|index| endpoints.get_mut(index)), endpoint) {
                    (Some(known), Some(endpoint)) => known.clone_from(endpoint),
                    (None, Some(endpoint)) => endpoints.push((**endpoint).clone()),
                    (_, None) => endpoints.retain(|known| known.id != *id),
                }
            }
        }
        Ok(())
    }
}

/// What leads from `before` to `after`: whole services where more than their endpoints differ, single endpoints otherwise.
/// Only services that are not shared by both are compared.
#[must_use]
pub fn differences(before: &Project, after: &Project) -> Vec<Patch> {
    let mut patches = Vec::new();
    let settings = Settings::of(after);
    if !settings.are_of(before) {
        patches.push(Patch::Settings(Box::new(settings)));
    }
    for name in before.services.keys().filter(|name| !after.services.contains_key(*name)) {
        patches.push(Patch::Service { name: name.clone(), service: None });
    }
    for (name, service) in &after.services {
        match before.services.get(name) {
            Some(known) if Arc::ptr_eq(known, service) => {}
            Some(known) if differ_in_endpoints_alone(known, service) => {
                patches.extend(endpoints(name, known, service));
            }
            Some(_) | None => {
                let service = Some(Box::new((**service).clone()));
                patches.push(Patch::Service { name: name.clone(), service });
            }
        }
    }
    patches
}

/// Whether patches of endpoints lead from one to the other, their order included: they change in place and come last.
fn differ_in_endpoints_alone(before: &Service, after: &Service) -> bool {
    let bare = |service: &Service| Service { endpoints: Vec::new(), ..service.clone() };
    let ids = |service: &Service| -> Vec<EndpointId> {
        service.endpoints.iter().map(|endpoint| endpoint.id.clone()).collect()
    };
    let (old, new) = (ids(before), ids(after));
    let mut kept = old;
    let staying: std::collections::HashSet<&EndpointId> = new.iter().collect();
    kept.retain(|id| staying.contains(id));
    new.starts_with(&kept) && bare(before) == bare(after)
}

fn endpoints(name: &ServiceName, before: &Service, after: &Service) -> Vec<Patch> {
    let known: std::collections::HashMap<&EndpointId, &Endpoint> =
        before.endpoints.iter().map(|endpoint| (&endpoint.id, endpoint)).collect();
    let staying: std::collections::HashSet<&EndpointId> =
        after.endpoints.iter().map(|endpoint| &endpoint.id).collect();
    let patch = |id: &EndpointId, endpoint: Option<&Endpoint>| Patch::Endpoint {
        service: name.clone(),
        id: id.clone(),
        endpoint: endpoint.map(|endpoint| Box::new(endpoint.clone())),
    };
    let gone = before.endpoints.iter().filter(|endpoint| !staying.contains(&endpoint.id));
    let gone = gone.map(|endpoint| patch(&endpoint.id, None));
    let other = after.endpoints.iter().filter(|endpoint| known.get(&endpoint.id) != Some(endpoint));
    gone.chain(other.map(|endpoint| patch(&endpoint.id, Some(endpoint)))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn service(endpoints: &[(u8, u32)], scopes: &str) -> Arc<Service> {
        let endpoints = endpoints.iter().map(|(id, weight)| {
            serde_json::json!({"id": format!("e{id}"), "url": format!("https://e{id}.example.com"),
                "internal_url": null, "private_url": null, "place": "aws/us-east-1", "zone": null,
                "auth_method": "bearer_token", "weight": weight, "state": "active"})
        });
        let endpoints: Vec<Endpoint> =
            endpoints.map(|one| serde_json::from_value(one).unwrap()).collect();
        Arc::new(Service {
            endpoints,
            scopes: ScopeSet::parse_list(scopes).unwrap(),
            ..Service::default()
        })
    }

    fn project(services: &[(&str, Arc<Service>)], multi_cloud: bool) -> Project {
        let services = services
            .iter()
            .map(|(name, service)| (name.parse().unwrap(), Arc::clone(service)))
            .collect();
        Project {
            name: "shop".parse().unwrap(),
            networking: Networking {
                multi_cloud,
                default_mode: crate::model::NetworkMode::Public,
                connections: Vec::new(),
            },
            services,
            permissions: BTreeMap::new(),
            issuers: Vec::new(),
            mode: Enforcement::Enforce,
        }
    }

    fn lead(before: Project, after: &Project) -> Vec<Patch> {
        let patches = differences(&before, after);
        let change = Change { revision: 8, etag: String::new(), patches };
        // As it travels.
        let change: Change =
            serde_json::from_str(&serde_json::to_string(&change).unwrap()).unwrap();
        let catalog = Catalog { revision: 7, issuer: String::new(), project: before };
        assert_eq!(change.apply(&catalog).unwrap().project, *after);
        change.patches
    }

    #[test]
    fn one_endpoint_that_changes_is_one_patch() {
        let before = project(&[("data", service(&[(1, 1), (2, 1)], "a"))], true);
        let after = project(&[("data", service(&[(1, 1), (2, 5)], "a"))], true);
        assert!(matches!(&*lead(before, &after), [Patch::Endpoint { endpoint: Some(_), .. }]));
    }

    #[test]
    fn a_change_that_does_not_follow_is_refused() {
        let change = Change { revision: 9, etag: String::new(), patches: Vec::new() };
        let project = project(&[], true);
        let catalog = Catalog { revision: 7, issuer: String::new(), project };
        assert_eq!(change.apply(&catalog), Err(PatchError::Gap { known: 7, found: 9 }));
    }

    proptest! {
        #[test]
        fn differences_lead_from_any_version_to_any_other(
            before in proptest::collection::btree_map(0u8..6, 0u32..3, 0..6),
            after in proptest::collection::vec((0u8..8, 0u32..3), 0..6),
            scopes in prop_oneof![Just("a"), Just("a b")],
            there in any::<[bool; 4]>(),
        ) {
            let before: Vec<(u8, u32)> = before.into_iter().collect();
            let mut seen = std::collections::HashSet::new();
            let after: Vec<(u8, u32)> = after.into_iter().filter(|(id, _)| seen.insert(*id)).collect();
            let shared = service(&[(1, 1)], "a");
            let some = |there: bool, name: &'static str, service: Arc<Service>| there.then_some((name, service));
            let old: Vec<_> = [some(there[0], "data", service(&before, "a")), some(there[1], "web", Arc::clone(&shared))]
                .into_iter().flatten().collect();
            let new: Vec<_> = [some(there[2], "data", service(&after, scopes)), some(there[3], "web", shared)]
                .into_iter().flatten().collect();
            lead(project(&old, there[0]), &project(&new, there[1]));
        }
    }
}
