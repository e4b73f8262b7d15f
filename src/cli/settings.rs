//! A proxy's file as the data plane takes it.

use std::sync::Arc;

use crate::{
    config::{self, ProxyFile},
    identity::{Access, PathRule, Rule, Rules},
    model::Protocol,
    net::{MinVersion, ServerTls},
    proxy,
};

/// The settings of the data plane, out of those of the file.
pub(super) fn settings(file: &ProxyFile) -> anyhow::Result<proxy::Settings> {
    let outbound = file.outbound.as_ref().map(|outbound| proxy::OutboundSettings {
        listen: outbound.listen,
        ports: outbound.ports.clone(),
        unknown_hosts: match outbound.unknown_hosts {
            config::UnknownHosts::Deny => proxy::UnknownHosts::Deny,
            config::UnknownHosts::Allow => proxy::UnknownHosts::Allow,
        },
        via: outbound.via.clone(),
        override_authorization: outbound.override_authorization,
    });
    let limits = &file.limits;
    Ok(proxy::Settings {
        role: match file.role {
            config::Role::Sidecar => proxy::Role::Sidecar,
            config::Role::Edge => proxy::Role::Edge,
            config::Role::Dev => proxy::Role::Dev,
        },
        service: file.service.clone(),
        place: file.place.clone(),
        zone: file.zone.clone(),
        outbound,
        inbound: file.inbound.iter().map(inbound).collect::<anyhow::Result<_>>()?,
        limits: proxy::Limits {
            head: crate::http1::HeadLimits { bytes: limits.header_bytes, headers: limits.headers },
            header_timeout: limits.header_timeout,
            idle_timeout: limits.idle_timeout,
            stall_timeout: limits.stall_timeout,
            streams: limits.streams,
            connections: limits.connections,
            body_bytes: limits.body_bytes,
        },
    })
}

fn inbound(file: &config::Inbound) -> anyhow::Result<proxy::InboundSettings> {
    let tls = match &file.tls {
        config::Tls::Files { cert_file, key_file, min_version } => {
            let min = match min_version {
                config::TlsVersion::V12 => MinVersion::Tls12,
                config::TlsVersion::V13 => MinVersion::Tls13,
            };
            Some(Arc::new(ServerTls::from_files(cert_file, key_file, min)?))
        }
        config::Tls::Platform | config::Tls::Off => None,
    };
    let rules =
        file.rules.as_ref().map(|rules| rules.iter().map(rule).collect::<anyhow::Result<Vec<_>>>());
    let rules = Rules::new(rules.transpose()?)
        .map_err(|(index, fault)| anyhow::anyhow!("inbound.rules[{index}].path: {fault}"))?;
    let app = file.app.as_ref().map(|app| proxy::App {
        origin: app.origin.clone(),
        protocol: match app.protocol {
            config::AppProtocol::Auto => Protocol::Auto,
            config::AppProtocol::H2c => Protocol::H2,
        },
    });
    Ok(proxy::InboundSettings {
        listen: file.listen,
        app,
        tls,
        rules,
        allow_from: file.allow_from.clone(),
        forward_authorization: file.forward_authorization,
        token_cache: file.token_cache,
    })
}

fn rule(rule: &config::Rule) -> anyhow::Result<Rule> {
    let path = match &rule.path {
        config::RulePath::Exact(path) => path.clone(),
        config::RulePath::Below(path) => format!("{path}/*"),
    };
    Ok(Rule {
        path: path
            .parse::<PathRule>()
            .map_err(|fault| anyhow::anyhow!("inbound.rules: {path}: {fault}"))?,
        methods: rule.methods.clone(),
        access: match &rule.access {
            config::Access::Public => Access::Public,
            config::Access::Scopes(scopes) => Access::Scopes(scopes.clone()),
        },
    })
}
