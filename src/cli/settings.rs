//! A proxy's file as the data plane takes it, and what outlives one file when another is taken over.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use tokio::runtime::Handle;

use crate::{
    config::{self, ProxyFile},
    identity::{Access, PathRule, Rule, Rules},
    model::Protocol,
    net::{ClientTls, MinVersion, Reload, ServerTls, TlsError},
    proxy,
    telemetry::{AccessLog, Flushing, Format},
};

/// Makes settings out of files. What two files have in common is made once: certificates keep their tickets, roots
/// their sessions, and there is one log.
#[derive(Default)]
pub(super) struct Workshop {
    certificates: Vec<Certificate>,
    roots: Option<Roots>,
    access: Option<AccessLog>,
    /// Writes the lines that wait when it is dropped.
    flushing: Option<Flushing>,
}

/// A listener's certificate, and what the file says of it.
type Certificate = ((PathBuf, PathBuf, config::TlsVersion), Arc<ServerTls>);

/// Whom TLS believes, and out of which file with which content.
#[derive(Clone)]
struct Roots {
    file: Option<(PathBuf, Vec<u8>)>,
    tls: Arc<ClientTls>,
}

impl Workshop {
    /// The settings of the data plane, out of those of the file. When they cannot be made, nothing has changed.
    pub(super) fn settings(&mut self, file: &ProxyFile) -> anyhow::Result<proxy::Settings> {
        let roots = self.roots(file.trust_ca_file.as_deref())?;
        let mut certificates = Vec::new();
        let inbound = file.inbound.iter();
        let inbound = inbound
            .map(|file| self.inbound(file, &mut certificates))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let access = file.log.access.then(|| self.access(format(file.log.format)));
        let settings = proxy::Settings {
            role: match file.role {
                config::Role::Sidecar => proxy::Role::Sidecar,
                config::Role::Edge => proxy::Role::Edge,
                config::Role::Dev => proxy::Role::Dev,
            },
            service: file.service.clone(),
            place: file.place.clone(),
            zone: file.zone.clone(),
            outbound: file.outbound.as_ref().map(outbound),
            inbound,
            limits: limits(&file.limits),
            tls: Arc::clone(&roots.tls),
            access,
        };
        (self.roots, self.certificates) = (Some(roots), certificates);
        Ok(settings)
    }

    /// The log of requests, once anybody wanted to read it.
    pub(super) fn log(&self) -> Option<&AccessLog> {
        self.access.as_ref()
    }

    /// The certificates in use.
    pub(super) fn certificates(&self) -> Vec<Arc<ServerTls>> {
        self.certificates.iter().map(|(_, tls)| Arc::clone(tls)).collect()
    }

    /// The log of requests; there is only one, whose form the first file chose.
    fn access(&mut self, format: Format) -> AccessLog {
        let log = self.access.get_or_insert_with(|| {
            let (log, flushing) = AccessLog::stdout(format);
            self.flushing = Some(flushing);
            log
        });
        log.clone()
    }

    /// Whom TLS believes: whoever it believed before, unless the file or what is in it is another.
    fn roots(&self, path: Option<&Path>) -> anyhow::Result<Roots> {
        let read = |path: &Path| {
            let content = std::fs::read(path);
            content.with_context(|| format!("trust.ca_file: {} cannot be read", path.display()))
        };
        let file = path.map(|path| Ok::<_, anyhow::Error>((path.to_owned(), read(path)?)));
        let file = file.transpose()?;
        if let Some(same) = self.roots.as_ref().filter(|roots| roots.file == file) {
            return Ok(same.clone());
        }
        let tls = Arc::new(ClientTls::new(path)?);
        if file.is_none() {
            let tls = Arc::clone(&tls);
            // Reading the system's roots takes long; nobody waits for it.
            drop(Handle::current().spawn_blocking(move || tls.preload()));
        }
        Ok(Roots { file, tls })
    }

    fn inbound(
        &self,
        file: &config::Inbound,
        certificates: &mut Vec<Certificate>,
    ) -> anyhow::Result<proxy::InboundSettings> {
        let tls = match &file.tls {
            config::Tls::Files { cert_file, key_file, min_version } => {
                let key = (cert_file.clone(), key_file.clone(), *min_version);
                let tls = self.certificate(&key)?;
                certificates.push((key, Arc::clone(&tls)));
                Some(tls)
            }
            config::Tls::Platform | config::Tls::Off => None,
        };
        let rules = file.rules.as_ref();
        let rules = rules.map(|rules| rules.iter().map(rule).collect::<anyhow::Result<Vec<_>>>());
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

    /// The certificate that the file describes: the one in use, if it is described the same way.
    fn certificate(
        &self,
        key: &(PathBuf, PathBuf, config::TlsVersion),
    ) -> anyhow::Result<Arc<ServerTls>> {
        let known = self.certificates.iter().find(|(known, _)| known == key);
        if let Some((_, tls)) = known {
            return Ok(Arc::clone(tls));
        }
        let (cert_file, key_file, min_version) = key;
        let min = match min_version {
            config::TlsVersion::V12 => MinVersion::Tls12,
            config::TlsVersion::V13 => MinVersion::Tls13,
        };
        Ok(Arc::new(ServerTls::from_files(cert_file, key_file, min)?))
    }
}

/// Reads certificates again, where their files say something else; `how` says whether a known fault is told again.
pub(super) fn reread(
    certificates: &[Arc<ServerTls>],
    how: impl Fn(&ServerTls) -> Result<Reload, TlsError>,
) {
    for certificate in certificates {
        match how(certificate) {
            Ok(Reload::Changed) => tracing::info!("a new certificate is in use"),
            Ok(Reload::Unchanged) => {}
            Err(error) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "a new certificate cannot be used; the old one stays"
            ),
        }
    }
}

fn outbound(outbound: &config::Outbound) -> proxy::OutboundSettings {
    proxy::OutboundSettings {
        listen: outbound.listen,
        ports: outbound.ports.clone(),
        unknown_hosts: match outbound.unknown_hosts {
            config::UnknownHosts::Deny => proxy::UnknownHosts::Deny,
            config::UnknownHosts::Allow => proxy::UnknownHosts::Allow,
        },
        via: outbound.via.clone(),
        override_authorization: outbound.override_authorization,
    }
}

fn limits(limits: &config::ProxyLimits) -> proxy::Limits {
    proxy::Limits {
        head: crate::http1::HeadLimits { bytes: limits.header_bytes, headers: limits.headers },
        header_timeout: limits.header_timeout,
        idle_timeout: limits.idle_timeout,
        stall_timeout: limits.stall_timeout,
        streams: limits.streams,
        connections: limits.connections,
        body_bytes: limits.body_bytes,
    }
}

pub(super) fn format(format: config::LogFormat) -> Format {
    match format {
        config::LogFormat::Auto => Format::Auto,
        config::LogFormat::Text => Format::Text,
        config::LogFormat::Json => Format::Json,
    }
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
