//! `discovery`: further sources of endpoints, beside the control plane or the project's file.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use super::{
    defaults::{DNS_MAX_TTL, DNS_MIN_TTL, DNS_PORT},
    fault::{Fault, nearest},
    kinds::time,
    node::{At, Node},
};
use crate::{
    discovery::{DnsKind, DnsSettings, Source},
    model::{NetworkMode, Place, Project, Scheme, ServiceName},
};

/// Reads the list; `here` is where the proxy runs.
pub(super) fn read(root: &Node, here: Option<&Place>, faults: &mut Vec<Fault>) -> Vec<Source> {
    let mut known = HashMap::new();
    let mut sources = Vec::new();
    for item in root.here().key("discovery").items() {
        let Some(node) = item.get("dns") else { continue };
        let Some(source) = dns(node, here, faults) else { continue };
        let first = known.insert((source.service.clone(), source.name.clone()), node.at.line);
        if let Some(line) = first {
            let found = format!("{}, which the entry of line {line} looks up too", source.name);
            faults.push(node.fault_found(found, "keep one of them"));
        }
        sources.push(Source::Dns(source));
    }
    sources
}

/// With the project at hand, endpoints for services that do not exist are found here.
pub(super) fn services_exist(root: &Node, project: &Project, faults: &mut Vec<Fault>) {
    for item in root.here().key("discovery").items() {
        let Some(node) = item.here().key("dns").key("service").0 else { continue };
        let Some(name) = node.scalar().filter(|it| !project.services.contains_key(*it)) else {
            continue;
        };
        let near = nearest(name, project.services.keys().map(ServiceName::as_str));
        let advice = near.map_or_else(
            || "write a service of the project".to_owned(),
            |near| format!("write {near}"),
        );
        let found = format!("\"{name}\", which is no service of the project");
        faults.push(node.fault_found(found, advice));
    }
}

fn dns(node: &Node, here: Option<&Place>, faults: &mut Vec<Fault>) -> Option<DnsSettings> {
    let at = node.here();
    let scheme = match at.key("scheme").text() {
        Some("http") => Scheme::Http,
        Some(_) | None => Scheme::Https,
    };
    let kind = kind(node, scheme, faults);
    let place = at.key("place").parse();
    // Without a place of its own (a developer's machine) everything is far away.
    let place = place.or_else(|| here.cloned()).or_else(|| "local/local".parse().ok())?;
    let by_default = match here == Some(&place) {
        true => NetworkMode::PrivatePeering,
        false => NetworkMode::Public,
    };
    let (min_ttl, max_ttl) = (
        at.key("min_ttl").with(time).unwrap_or(DNS_MIN_TTL),
        at.key("max_ttl").with(time).unwrap_or(DNS_MAX_TTL),
    );
    if min_ttl > max_ttl {
        let found = "a min_ttl above max_ttl";
        faults.push(node.fault_found(found, "write a min_ttl that is not above max_ttl"));
    }
    Some(DnsSettings {
        service: at.key("service").parse()?,
        name: at.key("name").with(dns_name)?,
        kind: kind?,
        scheme,
        place,
        zone: at.key("zone").parse(),
        mode: at.key("mode").word().unwrap_or(by_default),
        auth_method: at.key("auth_method").word().unwrap_or_default(),
        resolver: at.key("resolver").with(resolver),
        min_ttl,
        max_ttl,
    })
}

fn kind(node: &Node, scheme: Scheme, faults: &mut Vec<Fault>) -> Option<DnsKind> {
    let at = node.here();
    let port = at.key("port");
    if at.key("type").text() == Some("srv") {
        if let Some(port) = port.0 {
            faults.push(port.fault("leave it out: an SRV record says the port"));
        }
        return Some(DnsKind::Srv);
    }
    if let At(Some(name)) = at.key("name")
        && at.key("type").0.is_none()
        && name.scalar().is_some_and(|name| name.starts_with('_'))
    {
        faults.push(node.missing("type", "write type: srv for a name that begins with _"));
        return None;
    }
    match port.0 {
        None => Some(DnsKind::Address { port: scheme.default_port() }),
        Some(port) => port.parse().map(|port| DnsKind::Address { port }),
    }
}

/// A name as it is looked up: in lower case, without the dot at its end.
pub(super) fn dns_name(text: &str) -> Option<String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    // RFC 1035 §2.3.4; underscores stand in the names of SRV records (RFC 2782).
    let label = |label: &str| {
        let plain =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_');
        (1..=63).contains(&label.len())
            && label.bytes().all(plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A last label of digits alone is an address, or a mistyped one.
    let numeric = name.rsplit('.').next().is_none_or(|it| it.bytes().all(|b| b.is_ascii_digit()));
    (name.len() <= 253 && name.split('.').all(label) && !numeric).then_some(name)
}

/// `10.0.0.2:5353`, or an address alone.
pub(super) fn resolver(text: &str) -> Option<SocketAddr> {
    let address = || text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, DNS_PORT));
    let server = text.parse().ok().or_else(address)?;
    Some(server).filter(|it: &SocketAddr| it.port() != 0)
}
