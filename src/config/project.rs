//! `project.yaml` as it is meant: typed, with its defaults, and consistent in itself.
//!
//! Single values have been checked by their shape. Here is what needs a second look: grants for scopes that a
//! service does not have, two services behind one host, connections to nowhere, secrets that cannot be read.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use super::{
    fault::{Fault, nearest},
    files::Files,
    kinds::{bandwidth, percent, percentile, time, web_url},
    node::{At, Entry, Node, Value},
    show::Shown,
};
use crate::{
    api::{CATALOG_READ, CONTROL_AUDIENCE, KEYS_WRITE, USAGE_WRITE},
    control::{Identities, Identity},
    model::{
        AuthMethod, Backoff, Circuit, Connection, Endpoint, EndpointId, Enforcement, HealthCheck,
        Hedge, HedgeAfter, Issuer, Limits, NetworkMode, Networking, Origin, Place, Project,
        Retries, Routing, Scheme, Scope, ScopeSet, Service, ServiceName, Sticky, Timeouts,
    },
};

/// The weight of an endpoint that does not say.
const WEIGHT: u32 = 100;

/// A `project.yaml` that was read and found right.
#[derive(Clone, Debug)]
pub struct ProjectFile {
    /// What every proxy may know.
    pub project: Project,
    /// What the control plane alone knows.
    pub identities: Identities,
    /// What is right but worth a look: settings that this release does not act on, callers without identity.
    pub notes: Vec<String>,
    /// The caller that stands first in `permissions`.
    pub first_caller: Option<ServiceName>,
    /// Where the secrets of `identities` came from; for `infrar check`, which shows no secret.
    pub(super) secret_files: BTreeMap<ServiceName, PathBuf>,
    /// Where the keys of `issuers` came from, in the same order.
    pub(super) jwks_files: Vec<Option<PathBuf>>,
    /// `capabilities` and `prices` as written: checked, and read by nothing yet.
    pub(super) costs: Vec<(String, Shown)>,
}

impl ProjectFile {
    /// A project that was read elsewhere, as the file that would say it.
    #[must_use]
    pub fn of(project: Project, identities: Identities) -> Self {
        Self {
            jwks_files: vec![None; project.issuers.len()],
            project,
            identities,
            notes: Vec::new(),
            first_caller: None,
            secret_files: BTreeMap::new(),
            costs: Vec::new(),
        }
    }

    /// The files that it refers to: secrets and key sets. What they say counts as if it stood in this one.
    pub fn referred_files(&self) -> impl Iterator<Item = PathBuf> {
        self.secret_files.values().chain(self.jwks_files.iter().flatten()).cloned()
    }
}

/// Whether the identities' secrets are read, or only their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Secrets {
    /// For the control plane.
    Read,
    /// For a proxy that takes its registry from the file: the secrets are none of its business.
    Leave,
}

/// Settings of a service that are read and checked, and have no effect in this release.
const UNUSED: [&[&str]; 4] =
    [&["hedge"], &["health"], &["limits", "connections"], &["routing", "sticky"]];

/// Reads the project. Its result means something only when no fault was found.
pub(super) fn read(
    root: &Node,
    files: &Files,
    secrets: Secrets,
    faults: &mut Vec<Fault>,
) -> Option<ProjectFile> {
    let top = root.here();
    let mut reader = Reader { files, faults, notes: Vec::new() };
    let services = reader.services(top.key("services"));
    let networking = reader.networking(top.key("multi_cloud"), &services);
    let permissions = reader.permissions(top.key("permissions"), &services);
    let (identities, secret_files) = match secrets {
        Secrets::Read => reader.identities(top.key("identities")),
        Secrets::Leave => Default::default(),
    };
    let (issuers, jwks_files) = reader.issuers(top.key("issuers"));
    let mode = reader.mode(root);
    if secrets == Secrets::Read {
        reader.note_workloads(&identities);
        reader.callers_without_identity(&permissions, &identities);
    }
    let costs = reader.costs(top);
    let notes = reader.notes;
    let name = top.key("project").parse()?;
    let project = Project { name, networking, services, permissions, issuers, mode };
    let first_caller = top.key("permissions").entries().first();
    let first_caller = first_caller.and_then(|entry| entry.key.parse().ok());
    Some(ProjectFile { project, identities, notes, first_caller, secret_files, jwks_files, costs })
}

struct Reader<'a> {
    files: &'a Files,
    faults: &'a mut Vec<Fault>,
    notes: Vec<String>,
}

impl Reader<'_> {
    fn services(&mut self, at: At<'_>) -> BTreeMap<ServiceName, Arc<Service>> {
        let mut services = BTreeMap::new();
        let mut hosts = BTreeMap::new();
        for entry in at.entries() {
            let Ok(name) = entry.key.parse::<ServiceName>() else { continue };
            self.refuse_reserved(&name, entry);
            let here = entry.value.here();
            let endpoints = self.endpoints(here.key("endpoints"));
            self.one_service_per_host(&name, &entry.value, &endpoints, &mut hosts);
            self.note_unused(&entry.value);
            services.insert(
                name,
                Arc::new(Service {
                    endpoints: endpoints.into_iter().map(|(endpoint, _)| endpoint).collect(),
                    absence: None,
                    scopes: scopes(here.key("scopes")),
                    protocol: here.key("protocol").word().unwrap_or_default(),
                    routing: routing(here.key("routing")),
                    timeouts: timeouts(here.key("timeouts")),
                    retries: self.retries(here.key("retries")),
                    hedge: hedge(here.key("hedge")),
                    circuit: circuit(here.key("circuit")),
                    health: health(here.key("health")),
                    limits: Limits {
                        connections: here.key("limits").key("connections").parse(),
                        requests: here.key("limits").key("requests").parse(),
                    },
                }),
            );
        }
        services
    }

    fn refuse_reserved(&mut self, name: &ServiceName, entry: &Entry) {
        if name.is_reserved() {
            self.faults.push(Fault {
                at: entry.at.clone(),
                path: entry.value.path.clone(),
                found: format!("the reserved name \"{name}\""),
                advice: "write a name that does not begin with infrar".to_owned(),
            });
        }
    }

    /// The endpoints with the node each was read from.
    fn endpoints<'a>(&mut self, at: At<'a>) -> Vec<(Endpoint, &'a Node)> {
        let written: Vec<_> = at.items().iter().filter_map(|node| self.endpoint(node)).collect();
        let mut taken = BTreeSet::new();
        for (id, _, node) in &written {
            let Some(id) = id else { continue };
            if !taken.insert(id.clone()) {
                let fault = node.get("id").unwrap_or(node);
                let found = format!("a second \"{id}\"");
                self.faults
                    .push(fault.fault_found(found, "give each endpoint of a service its own id"));
            }
        }
        let mut endpoints = Vec::new();
        for (id, mut endpoint, node) in written {
            if let Some(id) = id.or_else(|| free_id(&endpoint.place, &taken)) {
                taken.insert(id.clone());
                endpoint.id = id;
                endpoints.push((endpoint, node));
            } else {
                self.faults.push(node.missing("id", "write an id: the place is too long for one"));
            }
        }
        endpoints
    }

    /// An endpoint, and its id if one is written; until then it has that of its place.
    fn endpoint<'a>(&mut self, node: &'a Node) -> Option<(Option<EndpointId>, Endpoint, &'a Node)> {
        let here = node.here();
        let url: Origin = here.key("url").parse()?;
        let inner = |key| here.key(key).with(|text| Origin::parse_relative(text, &url).ok());
        let endpoint = Endpoint {
            id: "unnamed".parse().ok()?,
            found_at: None,
            internal_url: inner("internal_url"),
            private_url: inner("private_url"),
            place: Place::new(here.key("provider").parse()?, here.key("region").parse()?),
            zone: here.key("zone").parse(),
            auth_method: here.key("auth_method").word().unwrap_or_default(),
            weight: here.key("weight").parse().unwrap_or(WEIGHT),
            state: here.key("state").word().unwrap_or_default(),
            url,
        };
        self.tokens_need_tls(node, &endpoint);
        Some((here.key("id").parse(), endpoint, node))
    }

    /// A token never travels in plaintext, so such an address could never be called.
    fn tokens_need_tls(&mut self, node: &Node, endpoint: &Endpoint) {
        if endpoint.auth_method == AuthMethod::None {
            return;
        }
        let open =
            |origin: &Origin| origin.scheme() == Scheme::Http && !origin.host().is_loopback();
        let inherited = open(&endpoint.url);
        let addresses = [
            ("url", Some(&endpoint.url)),
            ("internal_url", endpoint.internal_url.as_ref()),
            ("private_url", endpoint.private_url.as_ref()),
        ];
        for (key, origin) in addresses {
            let Some(value) = node.get(key).filter(|_| origin.is_some_and(open)) else { continue };
            // An inner address that has its scheme from `url` is mended there.
            if inherited && !value.scalar().is_some_and(|text| text.contains("://")) {
                continue;
            }
            let advice = "write https:// (tokens travel over TLS only), or auth_method: none";
            self.faults.push(value.fault(advice));
        }
    }

    /// An edge tells services apart by host, so a host has one. No edge stands before those on this machine.
    fn one_service_per_host(
        &mut self,
        name: &ServiceName,
        service: &Node,
        endpoints: &[(Endpoint, &Node)],
        hosts: &mut BTreeMap<String, ServiceName>,
    ) {
        for (endpoint, node) in endpoints {
            let host = endpoint.url.host();
            if host.is_loopback() {
                continue;
            }
            let owner = hosts.entry(host.to_string()).or_insert_with(|| name.clone());
            if owner != name {
                let value = node.get("url").unwrap_or(service);
                let found = format!("{}, whose host belongs to {owner}", value.found());
                self.faults.push(value.fault_found(found, "give each service a host of its own"));
            }
        }
    }

    fn note_without_effect(&mut self, at: At<'_>) {
        if let Some(node) = at.0 {
            self.notes.push(format!("{}: read, but this release does not act on it", node.path));
        }
    }

    fn note_unused(&mut self, service: &Node) {
        for path in UNUSED {
            let at = path.iter().fold(service.here(), |at, key| at.key(key));
            self.note_without_effect(at);
        }
    }

    fn retries(&mut self, at: At<'_>) -> Retries {
        let default = Retries::default();
        let backoff = at.key("backoff");
        let retries = Retries {
            max_attempts: at.key("max_attempts").parse().unwrap_or(default.max_attempts),
            backoff: Backoff {
                base: backoff.key("base").with(time).unwrap_or(default.backoff.base),
                max: backoff.key("max").with(time).unwrap_or(default.backoff.max),
            },
        };
        if let (true, Some(node)) = (retries.backoff.base > retries.backoff.max, backoff.0) {
            let found = "a base that is longer than max";
            self.faults.push(node.fault_found(found, "write a base of at most max"));
        }
        retries
    }

    fn networking(
        &mut self,
        at: At<'_>,
        services: &BTreeMap<ServiceName, Arc<Service>>,
    ) -> Networking {
        let places: BTreeSet<&Place> =
            services.values().flat_map(|s| &s.endpoints).map(|endpoint| &endpoint.place).collect();
        let mut pairs = BTreeSet::new();
        let mut connections = Vec::new();
        for node in at.key("connections").items() {
            let Some(connection) = connection(node.here()) else { continue };
            self.note_without_effect(node.here().key("bandwidth"));
            self.known_destination(node, &connection, &places);
            self.reachable(node, &connection, services);
            if !pairs.insert((connection.from.clone(), connection.to.clone())) {
                let found = format!("a second row from {} to {}", connection.from, connection.to);
                self.faults.push(node.fault_found(found, "keep one row per pair of places"));
            }
            if connection.from == connection.to {
                let found = "a connection of a place with itself";
                let advice = "leave it out; within a place the private address is used";
                self.faults.push(node.fault_found(found, advice));
            }
            connections.push(connection);
        }
        Networking {
            multi_cloud: at.key("enabled").flag().unwrap_or(true),
            default_mode: at.key("networking_mode").word().unwrap_or_default(),
            connections,
        }
    }

    /// A caller may be anywhere, but what is called is at a place with endpoints.
    fn known_destination(&mut self, node: &Node, row: &Connection, places: &BTreeSet<&Place>) {
        if places.contains(&row.to) {
            return;
        }
        let known: Vec<String> = places.iter().map(ToString::to_string).collect();
        let near = nearest(&row.to.to_string(), known.iter().map(String::as_str));
        let advice = near.map_or_else(
            || "write a place that has an endpoint, or leave the row out".to_owned(),
            |near| format!("write {near}"),
        );
        let to = node.get("to").unwrap_or(node);
        let found = format!("{}, a place without endpoints", to.found());
        self.faults.push(to.fault_found(found, advice));
    }

    /// A row whose mode no endpoint has an address for closes the way; that may be meant.
    fn reachable(
        &mut self,
        node: &Node,
        row: &Connection,
        services: &BTreeMap<ServiceName, Arc<Service>>,
    ) {
        let key = match row.mode {
            NetworkMode::Public => return,
            NetworkMode::Vpn => "internal_url",
            NetworkMode::PrivatePeering => "private_url",
        };
        for (name, service) in services {
            let there = service.endpoints.iter().filter(|endpoint| endpoint.place == row.to);
            for endpoint in there.filter(|endpoint| endpoint.address(row.mode).is_none()) {
                self.notes.push(format!(
                    "{}: {name}/{} has no {key}, which mode {} needs",
                    node.path, endpoint.id, row.mode
                ));
            }
        }
    }

    fn permissions(
        &mut self,
        at: At<'_>,
        services: &BTreeMap<ServiceName, Arc<Service>>,
    ) -> BTreeMap<ServiceName, BTreeMap<ServiceName, ScopeSet>> {
        let mut permissions = BTreeMap::new();
        for entry in at.entries() {
            let Ok(caller) = entry.key.parse::<ServiceName>() else { continue };
            self.refuse_reserved(&caller, entry);
            let mut callees = BTreeMap::new();
            for grant in entry.value.entries() {
                let Ok(callee) = grant.key.parse::<ServiceName>() else { continue };
                match services.get(&callee) {
                    Some(service) => self.known_scopes(grant, &callee, service),
                    None if callee.as_str() == CONTROL_AUDIENCE => self.control_scopes(grant),
                    None => self.unknown_callee(grant, services),
                }
                callees.insert(callee, scopes(grant.value.here()));
            }
            permissions.insert(caller, callees);
        }
        permissions
    }

    fn unknown_callee(&mut self, grant: &Entry, services: &BTreeMap<ServiceName, Arc<Service>>) {
        let near = nearest(&grant.key, services.keys().map(ServiceName::as_str));
        let advice = near.map_or_else(
            || "write a service of this project".to_owned(),
            |near| format!("write {near}"),
        );
        self.faults.push(Fault {
            at: grant.at.clone(),
            path: grant.value.path.clone(),
            found: format!("\"{}\", which is no service of this project", grant.key),
            advice,
        });
    }

    /// The control plane's own API is granted like a service; its scopes are what this release knows.
    fn control_scopes(&mut self, grant: &Entry) {
        let known = [CATALOG_READ, USAGE_WRITE, KEYS_WRITE];
        for node in grant.value.items() {
            let Some(scope) = node.parse::<Scope>() else { continue };
            if !known.contains(&scope.as_str()) {
                let found =
                    format!("{}, a scope that the control plane does not have", node.found());
                self.faults
                    .push(node.fault_found(found, format!("write one of {}", known.join(", "))));
            }
        }
    }

    fn known_scopes(&mut self, grant: &Entry, callee: &ServiceName, service: &Service) {
        for node in grant.value.items() {
            let Some(scope) = node.parse() else { continue };
            if service.scopes.contains(&scope) {
                continue;
            }
            let near = nearest(scope.as_str(), service.scopes.iter().map(|known| known.as_str()));
            let advice = near.map_or_else(
                || format!("add it to services.{callee}.scopes"),
                |near| format!("write {near}, or add it to services.{callee}.scopes"),
            );
            let found = format!("{}, a scope that {callee} does not list", node.found());
            self.faults.push(node.fault_found(found, advice));
        }
    }

    fn identities(&mut self, at: At<'_>) -> (Identities, BTreeMap<ServiceName, PathBuf>) {
        let mut identities = Identities::new();
        let mut secret_files = BTreeMap::new();
        let mut workloads = BTreeMap::new();
        for entry in at.entries() {
            let Ok(name) = entry.key.parse::<ServiceName>() else { continue };
            self.refuse_reserved(&name, entry);
            let here = entry.value.here();
            let parts = ["client_secret_file", "client_secret_sha256", "issuer", "subject"];
            let parts = parts.map(|key| here.key(key));
            match parts.map(|part| part.0) {
                [Some(file), None, None, None] => {
                    let Some((path, secret)) = self.files.secret(file, self.faults) else {
                        continue;
                    };
                    secret_files.insert(name.clone(), path);
                    identities.insert(name, Identity::ClientSecret(secret));
                }
                [None, Some(digest), None, None] => {
                    let Some(digest) = digest.scalar() else { continue };
                    identities.insert(name, Identity::ClientSecretDigest(digest.to_lowercase()));
                }
                [None, None, Some(issuer), Some(subject)] => {
                    self.plain_web(issuer);
                    let (Some(issuer), Some(subject)) = (issuer.scalar(), subject.scalar()) else {
                        continue;
                    };
                    let workload = (issuer.to_owned(), subject.to_owned());
                    if let Some(other) = workloads.insert(workload, name.clone()) {
                        let found = format!("the issuer and subject of {other}");
                        let advice = "give each identity a subject of its own";
                        self.faults.push(entry.value.fault_found(found, advice));
                    }
                    let (issuer, subject) = (issuer.to_owned(), subject.to_owned());
                    identities.insert(name, Identity::Workload { issuer, subject });
                }
                parts => {
                    let set: Vec<&str> = parts
                        .iter()
                        .flatten()
                        .filter_map(|part| part.path.rsplit('.').next())
                        .collect();
                    // A value that is no map, or a key that is none of these, has been told so.
                    let nothing = entry.value.is_null()
                        || matches!(&entry.value.value, Value::Map(keys) if keys.is_empty());
                    if set.is_empty() && !nothing {
                        continue;
                    }
                    let found =
                        if set.is_empty() { "no proof".to_owned() } else { set.join(" and ") };
                    let advice =
                        "write client_secret_file, client_secret_sha256, or issuer and subject";
                    self.faults.push(entry.value.fault_found(found, advice));
                }
            }
        }
        (identities, secret_files)
    }

    /// Keys that decide who is believed come over TLS, or from this machine.
    fn plain_web(&mut self, node: &Node) {
        let Some(url) = node.here().with(web_url) else { return };
        if url.scheme() == "http" && !is_loopback(&url) {
            self.faults.push(node.fault("write https://"));
        }
    }

    fn issuers(&mut self, at: At<'_>) -> (Vec<Issuer>, Vec<Option<PathBuf>>) {
        let mut jwks_files = Vec::new();
        let mut seen = BTreeSet::new();
        let mut issuers = Vec::new();
        for node in at.items() {
            let here = node.here();
            let Some(issuer) = here.key("issuer").text().map(str::to_owned) else { continue };
            // Its callers are named ISSUER#SUBJECT, in headers too.
            if issuer.contains('#') || !issuer.bytes().all(|byte| byte.is_ascii_graphic()) {
                let at = here.key("issuer").0.unwrap_or(node);
                self.faults.push(at.fault("write it without spaces and #, as its tokens say it"));
            }
            if !seen.insert(issuer.clone()) {
                let found = "this issuer a second time";
                self.faults.push(node.fault_found(found, "keep one entry per issuer"));
            }
            let (uri, file) = (here.key("jwks_uri").0, here.key("jwks_file").0);
            if uri.is_some() == file.is_some() {
                let found = if uri.is_some() { "jwks_uri and jwks_file" } else { "no keys" };
                self.faults.push(node.fault_found(found, "write either jwks_uri or jwks_file"));
            }
            if let Some(uri) = uri {
                self.plain_web(uri);
            }
            jwks_files.push(file.and_then(|file| self.files.path(file)));
            issuers.push(Issuer {
                issuer,
                jwks_uri: here.key("jwks_uri").with(web_url),
                jwks: file.and_then(|file| self.files.jwks(file, self.faults)),
                audiences: texts(here.key("audiences")),
            });
        }
        (issuers, jwks_files)
    }

    fn mode(&mut self, root: &Node) -> Enforcement {
        let top = root.here();
        let until = top.key("learn_until");
        match (top.key("mode").text().unwrap_or("enforce"), until.0) {
            ("learn", Some(_)) => until.parse().map(Enforcement::LearnUntil).unwrap_or_default(),
            ("learn", None) => {
                let advice = "write when learning ends, such as 2030-01-31T00:00:00Z";
                self.faults.push(root.missing("learn_until", advice));
                Enforcement::Enforce
            }
            (_, Some(node)) => {
                self.faults.push(node.fault("leave it out, or write mode: learn"));
                Enforcement::Enforce
            }
            (_, None) => Enforcement::Enforce,
        }
    }

    /// Proof by a platform's token is checked, and taken by nobody yet.
    fn note_workloads(&mut self, identities: &Identities) {
        for (name, identity) in identities {
            if matches!(identity, Identity::Workload { .. }) {
                self.notes.push(format!(
                    "identities.{name}: this release takes no issuer and subject for proof, so it gets no token here"
                ));
            }
        }
    }

    fn callers_without_identity(
        &mut self,
        permissions: &BTreeMap<ServiceName, BTreeMap<ServiceName, ScopeSet>>,
        identities: &Identities,
    ) {
        for caller in permissions.keys().filter(|caller| !identities.contains_key(*caller)) {
            self.notes.push(format!(
                "permissions.{caller}: has no entry in identities, so it gets no token here"
            ));
        }
    }

    /// `capabilities` and `prices`, for a later release.
    fn costs(&mut self, top: At<'_>) -> Vec<(String, Shown)> {
        let mut costs = Vec::new();
        for key in ["capabilities", "prices"] {
            let Some(node) = top.key(key).0 else { continue };
            if !node.entries().is_empty() {
                self.notes.push(format!("{key}: read, but this release does not act on it"));
            }
            costs.push((key.to_owned(), as_written(node)));
        }
        costs
    }
}

/// The first free id that an endpoint without one gets: `aws-us-east-1`, then `aws-us-east-1-2` …
fn free_id(place: &Place, taken: &BTreeSet<EndpointId>) -> Option<EndpointId> {
    let label = place.label();
    let first = std::iter::once(label.clone());
    let numbered = (2..=taken.len() + 2).map(|number| format!("{label}-{number}"));
    first.chain(numbered).map_while(|id| id.parse().ok()).find(|id| !taken.contains(id))
}

fn connection(at: At<'_>) -> Option<Connection> {
    Some(Connection {
        from: at.key("from").parse()?,
        to: at.key("to").parse()?,
        mode: at.key("type").word()?,
        bandwidth_bps: at.key("bandwidth").with(bandwidth),
        fallback: at.key("fallback").word().unwrap_or_default(),
    })
}

pub(super) fn scopes(at: At<'_>) -> ScopeSet {
    at.items().iter().filter_map(Node::parse).collect()
}

fn texts(at: At<'_>) -> Vec<String> {
    at.items().iter().filter_map(Node::scalar).map(str::to_owned).collect()
}

fn routing(at: At<'_>) -> Routing {
    let sticky = at.key("sticky");
    let text = |key| sticky.key(key).text().map(str::to_owned);
    Routing {
        policy: at.key("policy").word().unwrap_or_default(),
        latency_target: at.key("latency_target").with(time),
        locality: at.key("locality").word().unwrap_or_default(),
        sticky: text("header").map(Sticky::Header).or_else(|| text("cookie").map(Sticky::Cookie)),
    }
}

fn timeouts(at: At<'_>) -> Timeouts {
    let default = Timeouts::default();
    let request = at.key("request").with(time);
    Timeouts {
        connect: at.key("connect").with(time).unwrap_or(default.connect),
        attempt: at.key("attempt").with(time),
        request: if at.says_null("request") { None } else { request.or(default.request) },
    }
}

fn hedge(at: At<'_>) -> Option<Hedge> {
    let after = at.key("after");
    let percentile = after.with(percentile).map(HedgeAfter::Percentile);
    Some(Hedge {
        after: percentile.or_else(|| after.with(time).map(HedgeAfter::Fixed))?,
        budget_percent: at.key("budget").with(percent)?,
    })
}

fn circuit(at: At<'_>) -> Circuit {
    let default = Circuit::default();
    Circuit {
        failure_threshold: at.key("failure_threshold").parse().unwrap_or(default.failure_threshold),
        recovery_timeout: at.key("recovery_timeout").with(time).unwrap_or(default.recovery_timeout),
    }
}

fn health(at: At<'_>) -> HealthCheck {
    let default = HealthCheck::default();
    HealthCheck {
        kind: at.key("type").word().unwrap_or(default.kind),
        path: at.key("path").text().map(str::to_owned),
        interval: at.key("interval").with(time).unwrap_or(default.interval),
        timeout: at.key("timeout").with(time).unwrap_or(default.timeout),
        healthy: at.key("healthy").parse().unwrap_or(default.healthy),
        unhealthy: at.key("unhealthy").parse().unwrap_or(default.unhealthy),
    }
}

/// Whether a URL can only mean this machine.
#[must_use]
pub fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

fn as_written(node: &Node) -> Shown {
    match &node.value {
        _ if node.is_null() => Shown::Null,
        Value::Scalar { text, plain: true }
            if text.parse::<f64>().is_ok() || matches!(text.as_str(), "true" | "false") =>
        {
            Shown::word(text)
        }
        Value::Scalar { text, .. } => Shown::text(text),
        Value::List(items) => Shown::list(items, as_written),
        Value::Map(entries) => {
            Shown::map(entries.iter().map(|entry| (&entry.key, as_written(&entry.value))))
        }
    }
}
