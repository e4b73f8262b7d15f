//! `proxy.yaml`, environment and flags as they are meant: typed, with defaults, and consistent in themselves.
//!
//! Single values have been checked by their shape. Here is what needs a second look: listeners that collide,
//! plaintext where it must not be, a certificate and a key that do not belong together.

use std::{
    collections::BTreeMap, net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration,
};

use http::Method;
use ipnet::IpNet;

use super::{
    defaults::{
        ADMIN_LISTEN, DEADLINE, GRACE, INBOUND_LISTEN, MAX_SNAPSHOT_AGE, OUTBOUND_LISTEN,
        TOKEN_CACHE,
    },
    discovery,
    fault::{Fault, nearest},
    files::Files,
    kinds::{app_origin, bytes, network, time, web_url},
    node::{At, Node, Value},
    project::{is_loopback, scopes},
    settings::{
        Access, Admin, Advertise, App, AppProtocol, Control, Credential, Inbound, Log, LogFormat,
        Outbound, ProxyFile, ProxyLimits, Registry, Role, Rule, RulePath, ShutdownTimes, Tls,
        TlsVersion, UnknownHosts, Workers,
    },
};
use crate::model::{Origin, Project, Scheme, ServiceName};

/// How long an endpoint stays registered without a heartbeat, and how long that may be.
const LEASE: Duration = Duration::from_secs(30);
const LEASES: RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(3600);

/// Reads the proxy's settings; `None` only together with a fault. `project` reads the project file that takes
/// the place of a control plane.
pub(super) fn read(
    root: &Node,
    files: &Files,
    faults: &mut Vec<Fault>,
    project: impl FnOnce(PathBuf, &Node, &mut Vec<Fault>) -> Option<Project>,
) -> Option<ProxyFile> {
    let top = root.here();
    let mut reader = Reader { files, faults, listeners: Vec::new() };
    let role = match top.key("role").text() {
        Some("edge") => Role::Edge,
        Some("dev") => Role::Dev,
        Some(_) | None => Role::Sidecar,
    };
    if role != Role::Dev && top.key("place").0.is_none() {
        reader.faults.push(root.missing("place", "write where this proxy runs: aws_us_east_1"));
    }
    let admin = reader.admin(root);
    let outbound = reader.outbound(root, role);
    let inbound = reader.all_inbound(root, role);
    reader.listeners_are_apart();
    let registry = reader.registry(root, outbound.as_ref(), project);
    let trust = top.key("trust").key("ca_file").0;
    let trust_ca_file = trust.and_then(|node| reader.certificate_file(node));
    reader.advertised(root, role, registry.as_ref());
    let shutdown = reader.shutdown(top.key("shutdown"));
    let limits = limits(top.key("limits"));
    let place = top.key("place").parse();
    let discovery = discovery::read(root, place.as_ref(), reader.faults);
    Some(ProxyFile {
        role,
        service: top.key("service").parse()?,
        place,
        zone: top.key("zone").parse(),
        registry: registry?,
        discovery,
        outbound,
        inbound,
        admin: admin?,
        trust_ca_file,
        limits,
        shutdown,
        log: log(top.key("log")),
        workers: top.key("workers").parse().map_or(Workers::Auto, Workers::Count),
    })
}

struct Reader<'a> {
    files: &'a Files,
    faults: &'a mut Vec<Fault>,
    /// Every listener so far, with the place to blame.
    listeners: Vec<(SocketAddr, Fault)>,
}

impl Reader<'_> {
    /// A listener's address: as written, or its default, blamed on the section.
    fn listen(&mut self, section: &Node, key: &str, default: &str) -> Option<SocketAddr> {
        let written = section.here().key(key);
        let address = match written.0 {
            Some(node) => node.parse()?,
            None => default.parse().ok()?,
        };
        let blame = match written.0 {
            Some(node) => node.fault(""),
            None => section.missing(key, ""),
        };
        self.listeners.push((address, blame));
        Some(address)
    }

    /// Two listeners on one port cannot both open.
    fn listeners_are_apart(&mut self) {
        for (at, (address, blame)) in self.listeners.iter().enumerate() {
            let mut earlier = self.listeners.iter().take(at);
            let Some((_, other)) = earlier.find(|(other, _)| overlap(*other, *address)) else {
                continue;
            };
            let mut fault = blame.clone();
            fault.found = format!("\"{address}\", which {} has", other.path);
            "give each listener a port of its own".clone_into(&mut fault.advice);
            self.faults.push(fault);
        }
    }

    fn admin(&mut self, root: &Node) -> Option<Admin> {
        let nowhere = absent(root, "admin");
        let at = root.here().key("admin");
        let section = at.0.unwrap_or(&nowhere);
        let listen = self.listen(section, "listen", ADMIN_LISTEN)?;
        if !listen.ip().is_loopback() {
            let node = section.get("listen").unwrap_or(section);
            let advice = "write a loopback address, and admin.probes for probes from elsewhere";
            self.faults.push(node.fault(advice));
        }
        let probes = at.key("probes").0;
        let probes = probes.and_then(|_| self.listen(section, "probes", ADMIN_LISTEN));
        Some(Admin { listen, probes })
    }

    fn outbound(&mut self, root: &Node, role: Role) -> Option<Outbound> {
        let by_default = role != Role::Edge && !root.has("inbound");
        if !root.has("outbound") && !by_default {
            return None;
        }
        let nowhere = absent(root, "outbound");
        let section = entry(root, "outbound").unwrap_or(&nowhere);
        let here = section.here();
        let listen = self.listen(section, "listen", OUTBOUND_LISTEN);
        let mut ports = BTreeMap::new();
        for entry in here.key("ports").entries() {
            let (Ok(name), Some(address)) = (entry.key.parse(), entry.value.parse()) else {
                continue;
            };
            self.listeners.push((address, entry.value.fault("")));
            ports.insert(name, address);
        }
        let mut token_files = BTreeMap::new();
        for entry in here.key("token_files").entries() {
            let Ok(name) = entry.key.parse::<ServiceName>() else { continue };
            if let Some((path, _token)) = self.files.secret(&entry.value, self.faults) {
                token_files.insert(name, path);
            }
        }
        let via = here.key("via").parse();
        self.via_is_encrypted(here.key("via"), via.as_ref());
        Some(Outbound {
            listen: listen?,
            ports,
            unknown_hosts: match here.key("unknown_hosts").text() {
                Some("allow") => UnknownHosts::Allow,
                Some(_) | None => UnknownHosts::Deny,
            },
            via,
            override_authorization: here.key("override_authorization").flag().unwrap_or(false),
            token_files,
        })
    }

    /// Tokens pass through the edge, so the way to it is encrypted too.
    fn via_is_encrypted(&mut self, at: At<'_>, via: Option<&Origin>) {
        let Some((node, via)) = at.0.zip(via) else { return };
        if via.scheme() == Scheme::Http && !via.host().is_loopback() {
            self.faults.push(node.fault("write https:// (tokens travel over TLS only)"));
        }
    }

    fn all_inbound(&mut self, root: &Node, role: Role) -> Vec<Inbound> {
        let sections = At(entry(root, "inbound")).one_or_many();
        if sections.is_empty() && (role == Role::Edge || root.has("inbound")) {
            let advice = "write the listener for callers: { listen: 0.0.0.0:443, tls: { cert_file: …, key_file: … } }";
            self.faults.push(root.missing("inbound", advice));
        }
        sections.iter().filter_map(|section| self.inbound(section, role)).collect()
    }

    fn inbound(&mut self, section: &Node, role: Role) -> Option<Inbound> {
        let here = section.here();
        let listen = self.listen(section, "listen", INBOUND_LISTEN);
        let app = self.app(section, role, listen);
        let tls = self.tls(section, listen);
        self.not_yet(here);
        let advertise = here.key("advertise").0.and_then(|node| self.advertise(node));
        let rules = here.key("rules").0;
        let rules =
            rules.map(|rules| rules.items().iter().filter_map(|rule| self.rule(rule)).collect());
        Some(Inbound {
            listen: listen?,
            app,
            tls: tls?,
            allow_from: networks(here.key("allow_from")),
            rules,
            forward_authorization: here.key("forward_authorization").flag().unwrap_or(true),
            token_cache: here.key("token_cache").parse().unwrap_or(TOKEN_CACHE),
            advertise,
        })
    }

    /// An endpoint is told to a control plane, and is somewhere.
    fn advertised(&mut self, root: &Node, role: Role, registry: Option<&Registry>) {
        let written = root.get("inbound").into_iter();
        let sections = written.flat_map(|node| match &node.value {
            Value::List(items) => items.iter().collect(),
            Value::Map(_) | Value::Scalar { .. } => vec![node],
        });
        for node in sections.filter_map(|section| section.get("advertise")) {
            if node.is_null() {
                continue;
            }
            let advice = match (role, registry) {
                (Role::Edge, _) => "leave it out: an edge is no endpoint of a service of its own",
                (Role::Dev, _) if root.get("place").is_none() => {
                    "write place, for an endpoint is somewhere"
                }
                (_, Some(Registry::File(_))) => {
                    "leave it out, or write control: endpoints are registered there"
                }
                (Role::Sidecar | Role::Dev, Some(Registry::Control(_)) | None) => continue,
            };
            self.faults.push(node.fault(advice));
        }
    }

    fn advertise(&mut self, node: &Node) -> Option<Advertise> {
        let here = node.here();
        let url: Origin = here.key("url").parse()?;
        let inner = |key| here.key(key).with(|text| Origin::parse_relative(text, &url).ok());
        let open = url.scheme() == Scheme::Http && !url.host().is_loopback();
        if let (true, Some(node)) = (open, node.get("url")) {
            self.faults.push(node.fault("write https:// (tokens travel over TLS only)"));
        }
        let ttl = here.key("ttl").with(time).unwrap_or(LEASE);
        if let (false, Some(node)) = (LEASES.contains(&ttl), node.get("ttl")) {
            self.faults.push(node.fault("write 5s to 1h"));
        }
        Some(Advertise {
            id: here.key("id").parse(),
            internal_url: inner("internal_url"),
            private_url: inner("private_url"),
            url,
            ttl,
        })
    }

    fn app(&mut self, section: &Node, role: Role, listen: Option<SocketAddr>) -> Option<App> {
        let node = match (section.get("app"), role) {
            (Some(node), Role::Sidecar | Role::Dev) => node,
            (None, Role::Edge) => return None,
            (Some(node), Role::Edge) => {
                let advice = "leave it out: an edge forwards to the services of its place";
                self.faults.push(node.fault(advice));
                return None;
            }
            (None, Role::Sidecar | Role::Dev) => {
                let advice = "write the application's address, such as http://127.0.0.1:8080";
                self.faults.push(section.missing("app", advice));
                return None;
            }
        };
        let origin = node.here().with(|text| app_origin(text).ok())?;
        if listen.is_some_and(|listen| listen.port() == origin.port())
            && origin.host().is_loopback()
        {
            let found = format!("{}, which is this listener", node.found());
            self.faults.push(node.fault_found(found, "write the port of the application"));
        }
        let h2c = node.scalar().is_some_and(|text| text.starts_with("h2c://"));
        let protocol = if h2c { AppProtocol::H2c } else { AppProtocol::Auto };
        Some(App { origin, protocol })
    }

    fn tls(&mut self, section: &Node, listen: Option<SocketAddr>) -> Option<Tls> {
        let on_loopback = listen.is_some_and(|listen| listen.ip().is_loopback());
        let with_files = "tls: { cert_file: …, key_file: … }, or platform where the cloud ends TLS";
        let Some(node) = section.get("tls") else {
            if on_loopback {
                return Some(Tls::Off);
            }
            // A listener whose address is wrong has been told so.
            if listen.is_some() {
                self.faults.push(section.missing("tls", format!("write {with_files}")));
            }
            return None;
        };
        match node.scalar() {
            Some("platform") => Some(Tls::Platform),
            Some("off") if on_loopback || listen.is_none() => Some(Tls::Off),
            Some("off") => {
                let found = "off on an address that others reach";
                self.faults.push(node.fault_found(found, format!("write {with_files}")));
                None
            }
            Some("auto") => {
                let found = "auto, which this release cannot do yet";
                self.faults.push(node.fault_found(found, format!("write {with_files}")));
                None
            }
            Some(_) => None,
            None => {
                let (cert, key) = (node.get("cert_file")?, node.get("key_file")?);
                let (cert_file, key_file) = self.files.identity(cert, key, self.faults)?;
                let min_version = match node.here().key("min_version").text() {
                    Some("1.2") => TlsVersion::V12,
                    Some(_) | None => TlsVersion::V13,
                };
                Some(Tls::Files { cert_file, key_file, min_version })
            }
        }
    }

    /// What the file may say one day, and what to use until then.
    fn not_yet(&mut self, inbound: At<'_>) {
        if let Some(node) = inbound.key("mtls").0.filter(|node| node.scalar() != Some("off")) {
            let found = format!("{}, which this release cannot do yet", node.found());
            self.faults
                .push(node.fault_found(found, "write off; callers prove themselves by token"));
        }
    }

    fn rule(&mut self, node: &Node) -> Option<Rule> {
        let here = node.here();
        let public = here.key("public").flag().unwrap_or(false);
        let access = match (public, here.key("scopes").0) {
            (true, None) => Access::Public,
            (false, Some(list)) => Access::Scopes(scopes(list.here())),
            (true, Some(_)) | (false, None) => {
                let found = if public { "public and scopes" } else { "neither public nor scopes" };
                let advice = "write either public: true or scopes: [ … ]";
                self.faults.push(node.fault_found(found, advice));
                return None;
            }
        };
        let methods = here.key("methods").0.map(|list| self.methods(list));
        let path = here.key("path").text()?;
        let path = match path.strip_suffix("/*") {
            Some(below) => RulePath::Below(below.to_owned()),
            None => RulePath::Exact(path.to_owned()),
        };
        Some(Rule { path, methods, access })
    }

    fn methods(&mut self, list: &Node) -> Vec<Method> {
        if list.items().is_empty() && list.scalar().is_none() {
            let found = "no method at all";
            self.faults.push(list.fault_found(found, "leave it out for every method"));
        }
        list.items().iter().filter_map(|node| node.parse()).collect()
    }

    fn registry(
        &mut self,
        root: &Node,
        outbound: Option<&Outbound>,
        project: impl FnOnce(PathBuf, &Node, &mut Vec<Fault>) -> Option<Project>,
    ) -> Option<Registry> {
        match (root.get("control"), root.get("project")) {
            (Some(control), None) => self.control(control).map(Registry::Control),
            (None, Some(node)) => {
                let path = self.files.path(node)?;
                let project = project(path.clone(), node, self.faults)?;
                self.names_are_services(root, outbound, &project);
                discovery::services_exist(root, &project, self.faults);
                Some(Registry::File(path))
            }
            (Some(_), Some(node)) => {
                let found = "a project beside control";
                let advice = "keep control, or project for a proxy without a control plane";
                self.faults.push(node.fault_found(found, advice));
                None
            }
            (None, None) => {
                let advice = "write control: { url: https://…:7070, credential: { client_secret_file: … } }, or project: project.yaml";
                self.faults.push(root.missing("control", advice));
                None
            }
        }
    }

    /// With the project at hand, ports and tokens for services that do not exist are found here.
    fn names_are_services(&mut self, root: &Node, outbound: Option<&Outbound>, project: &Project) {
        if outbound.is_none() {
            return;
        }
        let section = root.here().key("outbound");
        for key in ["ports", "token_files"] {
            for entry in section.key(key).entries() {
                if project.services.contains_key(entry.key.as_str()) {
                    continue;
                }
                let near = nearest(&entry.key, project.services.keys().map(ServiceName::as_str));
                let advice = near.map_or_else(
                    || "write a service of the project".to_owned(),
                    |near| format!("write {near}"),
                );
                self.faults.push(Fault {
                    at: entry.at.clone(),
                    path: entry.value.path.clone(),
                    found: format!("\"{}\", which is no service of the project", entry.key),
                    advice,
                });
            }
        }
    }

    fn control(&mut self, section: &Node) -> Option<Control> {
        let here = section.here();
        let mut urls = Vec::new();
        for node in here.key("url").one_or_many() {
            let Some(url) = node.here().with(web_url) else { continue };
            if url.scheme() == "http" && !is_loopback(&url) {
                let advice = "write https:// (the credential travels over TLS only)";
                self.faults.push(node.fault(advice));
            }
            if url.query().is_some() {
                self.faults.push(node.fault("leave the query out"));
            }
            urls.push(url);
        }
        let listed = here.key("url").0.filter(|node| matches!(node.value, Value::List(_)));
        if let Some(list) = listed.filter(|list| list.items().is_empty()) {
            self.faults.push(list.fault_found("an empty list", "write at least one address"));
        }
        let credential = self.credential(here.key("credential"));
        let ca_file = here.key("ca_file").0.and_then(|node| self.certificate_file(node));
        let state_dir = here.key("state_dir").0.and_then(|node| self.folder(node));
        Some(Control {
            urls,
            ca_file,
            credential: credential?,
            state_dir,
            max_snapshot_age: here.key("max_snapshot_age").with(time).unwrap_or(MAX_SNAPSHOT_AGE),
        })
    }

    fn credential(&mut self, at: At<'_>) -> Option<Credential> {
        if let Some(node) = at.key("client_secret_file").0 {
            let (path, _secret) = self.files.secret(node, self.faults)?;
            return Some(Credential::ClientSecretFile(path));
        }
        let node = at.key("token_file").0.or_else(|| at.key("private_key_file").0)?;
        let key = node.path.rsplit('.').next().unwrap_or_default();
        let found = format!("{key}, which this release cannot do yet");
        self.faults.push(node.fault_found(found, "write client_secret_file: with a shared secret"));
        None
    }

    fn certificate_file(&mut self, node: &Node) -> Option<PathBuf> {
        let (path, _certificates) = self.files.certificates(node, self.faults)?;
        Some(path)
    }

    fn folder(&mut self, node: &Node) -> Option<PathBuf> {
        self.files.folder(node, self.faults)
    }

    fn shutdown(&mut self, at: At<'_>) -> ShutdownTimes {
        let times = ShutdownTimes {
            grace: at.key("grace").with(time).unwrap_or(GRACE),
            deadline: at.key("deadline").with(time).unwrap_or(DEADLINE),
        };
        if let (true, Some(node)) = (times.grace >= times.deadline, at.0) {
            let found = "a grace that is not shorter than the deadline";
            self.faults.push(node.fault_found(found, "write a grace below the deadline"));
        }
        times
    }
}

/// The value under `key`, null included: a section without anything in it still opens its listener.
fn entry<'a>(node: &'a Node, key: &str) -> Option<&'a Node> {
    node.entries().iter().find(|entry| entry.key == key).map(|entry| &entry.value)
}

/// A section that is not there, to blame for its defaults.
fn absent(root: &Node, key: &str) -> Node {
    let mut node = Node::text(root.at.clone(), "");
    key.clone_into(&mut node.path);
    node
}

/// Whether two listeners would want the same port of the same address. Port 0 is any free one.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let same_address = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() == b.port() && a.port() != 0 && same_address
}

fn networks(at: At<'_>) -> Vec<IpNet> {
    if at.0.is_none() {
        return ["0.0.0.0/0", "::/0"].iter().filter_map(|text| network(text)).collect();
    }
    at.items().iter().filter_map(|node| node.here().with(network)).collect()
}

fn limits(at: At<'_>) -> ProxyLimits {
    let default = ProxyLimits::default();
    let size = |key| at.key(key).with(bytes);
    let header_bytes = size("header_bytes").and_then(|bytes| usize::try_from(bytes).ok());
    ProxyLimits {
        header_bytes: header_bytes.unwrap_or(default.header_bytes),
        headers: at.key("headers").parse().unwrap_or(default.headers),
        header_timeout: at.key("header_timeout").with(time).unwrap_or(default.header_timeout),
        idle_timeout: at.key("idle_timeout").with(time).unwrap_or(default.idle_timeout),
        stall_timeout: at.key("stall_timeout").with(time).unwrap_or(default.stall_timeout),
        streams: at.key("streams").parse().unwrap_or(default.streams),
        connections: at.key("connections").parse().unwrap_or(default.connections),
        body_bytes: size("body_bytes"),
    }
}

pub(super) fn log(at: At<'_>) -> Log {
    let format = match at.key("format").text() {
        Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(_) | None => LogFormat::Auto,
    };
    Log { format, access: at.key("access").flag().unwrap_or(true) }
}
