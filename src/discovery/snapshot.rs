//! A snapshot, and what is derived from it once for all who read it.

use std::{
    collections::HashMap,
    fmt::{self, Write},
    hash::BuildHasher,
    sync::{Arc, OnceLock},
};

use foldhash::fast::RandomState;

use crate::{
    api::Catalog,
    model::{Origin, Project, ServiceName},
};

/// The catalog of a moment, and whose its hosts are.
#[derive(Debug)]
pub struct Snapshot {
    catalog: Arc<Catalog>,
    /// Made when somebody asks.
    hosts: OnceLock<Hosts>,
}

impl Snapshot {
    pub(super) fn new(catalog: Arc<Catalog>) -> Self {
        Self { catalog, hosts: OnceLock::new() }
    }

    /// As [`new`](Self::new), in the place of `before`: where that was asked for hosts this one will be, and who asks
    /// shall not wait.
    pub(super) fn after(before: Option<&Self>, catalog: Arc<Catalog>) -> Self {
        let next = Self::new(catalog);
        if before.is_some_and(|before| before.hosts.get().is_some()) {
            next.hosts();
        }
        next
    }

    /// The catalog.
    #[must_use]
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// The service one of whose endpoints has this authority or host, in lower case. A host that several services share,
    /// told apart by ports (on one machine only), is nobody's.
    #[must_use]
    pub fn service_of(&self, authority: &str) -> Option<&ServiceName> {
        self.hosts().service_of(&self.catalog.project, authority)
    }

    fn hosts(&self) -> &Hosts {
        self.hosts.get_or_init(|| Hosts::of(&self.catalog.project))
    }
}

/// Which service an authority or a host belongs to, by their hashes: the names themselves stand in the project. Of two
/// with one hash (less likely than a broken disk) one is not found.
#[derive(Debug)]
struct Hosts {
    hasher: RandomState,
    owners: HashMap<u64, ServiceName, RandomState>,
}

impl Hosts {
    fn of(project: &Project) -> Self {
        let hasher = RandomState::default();
        let endpoints = project.services.values().map(|service| service.endpoints.len()).sum();
        let mut owners = HashMap::with_capacity_and_hasher(endpoints, RandomState::default());
        // Hosts without their port, where one is written: whoever has it as a whole authority comes first.
        let mut alone = HashMap::<u64, Option<ServiceName>, RandomState>::default();
        let mut text = String::new();
        for (name, service) in &project.services {
            for endpoint in &service.endpoints {
                let url = &endpoint.url;
                let host = hash(&hasher, &mut text, format_args!("{}", url.host()));
                if url.port() == url.scheme().default_port() {
                    owners.insert(host, name.clone());
                    continue;
                }
                let whole = format_args!("{}:{}", url.host(), url.port());
                owners.insert(hash(&hasher, &mut text, whole), name.clone());
                let owner = alone.entry(host).or_insert_with(|| Some(name.clone()));
                if owner.as_ref().is_some_and(|owner| owner != name) {
                    *owner = None;
                }
            }
        }
        for (host, owner) in alone {
            if let Some(owner) = owner {
                owners.entry(host).or_insert(owner);
            }
        }
        Self { hasher, owners }
    }

    fn service_of(&self, project: &Project, asked: &str) -> Option<&ServiceName> {
        let owner = self.owners.get(&self.hasher.hash_one(asked))?;
        let mut endpoints = project.services.get(owner)?.endpoints.iter();
        endpoints.any(|endpoint| is_named(&endpoint.url, asked)).then_some(owner)
    }
}

fn hash(hasher: &RandomState, text: &mut String, written: fmt::Arguments<'_>) -> u64 {
    text.clear();
    // A string takes everything.
    text.write_fmt(written).ok();
    hasher.hash_one(text.as_str())
}

/// Whether this is how the origin's authority, or its host alone, is written.
fn is_named(origin: &Origin, asked: &str) -> bool {
    let mut rest = Rest(asked);
    let begins = write!(rest, "{}", origin.host()).is_ok();
    let ends = |mut rest: Rest<'_>| write!(rest, ":{}", origin.port()).is_ok() && rest.0.is_empty();
    begins && (rest.0.is_empty() || ends(rest))
}

/// What is left of a text after what was written to it, which it begins with.
struct Rest<'a>(&'a str);

impl Write for Rest<'_> {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.0 = self.0.strip_prefix(part).ok_or(fmt::Error)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoint, Service};

    fn snapshot(services: &[(&str, &[&str])]) -> Snapshot {
        let endpoint = |url: &&str| -> Endpoint {
            serde_json::from_value(serde_json::json!({
                "id": "one", "url": url, "internal_url": null, "private_url": null, "place": "aws_us_east_1",
                "zone": null, "auth_method": "none", "weight": 100, "state": "active",
            }))
            .unwrap()
        };
        let services = services.iter().map(|(name, urls)| {
            let endpoints = urls.iter().map(endpoint).collect();
            (name.parse().unwrap(), Arc::new(Service { endpoints, ..Service::default() }))
        });
        let mut catalog: Catalog = serde_json::from_str(
            r#"{"revision":1,"issuer":"x","project":{"name":"shop","networking":{"multi_cloud":true,
            "default_mode":"public","connections":[]},"services":{},"permissions":{},"issuers":[],
            "mode":"enforce"}}"#,
        )
        .unwrap();
        catalog.project.services = services.collect();
        Snapshot::new(Arc::new(catalog))
    }

    #[test]
    fn a_host_leads_to_its_service_and_a_shared_one_only_with_its_port() {
        let snapshot = snapshot(&[
            ("data", &["https://data.example", "https://data.example:8443", "http://[::1]:81"]),
            ("left", &["http://127.0.0.1:9000"]),
            ("right", &["http://127.0.0.1:9001", "https://right.example:8443"]),
        ]);
        for (asked, owner) in [
            ("data.example", Some("data")),
            ("data.example:8443", Some("data")),
            ("[::1]:81", Some("data")),
            ("[::1]", Some("data")),
            ("127.0.0.1:9000", Some("left")),
            ("127.0.0.1:9001", Some("right")),
            ("127.0.0.1", None),
            ("right.example", Some("right")),
            ("right.example:844", None),
            ("data.example:1", None),
            ("", None),
        ] {
            let found = snapshot.service_of(asked).map(ServiceName::as_str);
            assert_eq!(found, owner, "{asked}");
        }
    }

    #[test]
    fn hosts_are_made_beforehand_only_where_they_were_asked_for() {
        let first = snapshot(&[]);
        let second = Snapshot::after(Some(&first), Arc::clone(first.catalog()));
        assert!(second.hosts.get().is_none());
        assert_eq!(second.service_of("data.example"), None);
        let third = Snapshot::after(Some(&second), Arc::clone(second.catalog()));
        assert!(third.hosts.get().is_some());
    }
}
