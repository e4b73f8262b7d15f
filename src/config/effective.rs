//! Settings as the YAML that would say all of them. A new field is shown or this does not compile.

use std::path::PathBuf;

use serde::Serialize;

use super::{
    Effective,
    project::ProjectFile,
    settings::{
        Access, Admin, Advertise, App, AppProtocol, Control, Credential, Inbound, Log, LogFormat,
        Outbound, ProxyFile, ProxyLimits, Registry, Role, Rule, RulePath, ShutdownTimes, Tls,
        TlsVersion, UnknownHosts, Workers,
    },
    show::Shown,
};
use crate::{
    control::Identity,
    discovery::{DnsKind, DnsSettings, Source},
    model::{
        Connection, Endpoint, Enforcement, HealthCheck, Hedge, HedgeAfter, Issuer, Networking,
        Project, Routing, Scope, ScopeSet, Service, Sticky, span,
    },
};

impl Effective for ProxyFile {
    fn effective_yaml(&self) -> String {
        proxy(self).yaml()
    }
}

impl Effective for ProjectFile {
    fn effective_yaml(&self) -> String {
        let Project { name, networking, services, permissions, issuers, mode } = &self.project;
        let mut entries = vec![
            ("project".to_owned(), Shown::text(name)),
            ("multi_cloud".to_owned(), show_networking(networking)),
            (
                "services".to_owned(),
                Shown::map(services.iter().map(|(name, service)| (name, show_service(service)))),
            ),
            (
                "permissions".to_owned(),
                Shown::map(permissions.iter().map(|(caller, callees)| {
                    let grant = |(callee, scopes)| (callee, show_scopes(scopes));
                    (caller, Shown::map(callees.iter().map(grant)))
                })),
            ),
            ("identities".to_owned(), self.show_identities()),
            ("issuers".to_owned(), Shown::list(issuers.iter().zip(&self.jwks_files), show_issuer)),
        ];
        entries.extend(self.costs.iter().cloned());
        match mode {
            Enforcement::Enforce => entries.push(("mode".to_owned(), Shown::text("enforce"))),
            Enforcement::LearnUntil(until) => {
                entries.push(("mode".to_owned(), Shown::text("learn")));
                entries.push(("learn_until".to_owned(), Shown::text(until)));
            }
        }
        Shown::Map(entries).yaml()
    }
}

impl ProjectFile {
    fn show_identities(&self) -> Shown {
        Shown::map(self.identities.iter().map(|(name, identity)| {
            let proof = match identity {
                // The file's path, never what is in it.
                Identity::ClientSecret(_) => {
                    let path = self.secret_files.get(name).map(|path| path.display());
                    Shown::map([("client_secret_file", Shown::maybe(path, Shown::text))])
                }
                Identity::ClientSecretDigest(digest) => {
                    Shown::map([("client_secret_sha256", Shown::text(digest))])
                }
                Identity::Workload { issuer, subject } => {
                    Shown::map([("issuer", Shown::text(issuer)), ("subject", Shown::text(subject))])
                }
            };
            (name, proof)
        }))
    }
}

/// An enum as its own serialization writes it.
fn word(value: impl Serialize) -> Shown {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => Shown::Text(word),
        Ok(_) | Err(_) => Shown::Null,
    }
}

fn time(span: std::time::Duration) -> Shown {
    Shown::text(span::print(span))
}

fn show_scopes(scopes: &ScopeSet) -> Shown {
    Shown::list(scopes.iter().map(Scope::as_str), Shown::text)
}

fn show_networking(networking: &Networking) -> Shown {
    let Networking { multi_cloud, default_mode, connections } = networking;
    Shown::map([
        ("enabled", Shown::word(multi_cloud)),
        ("networking_mode", word(default_mode)),
        ("connections", Shown::list(connections, show_connection)),
    ])
}

fn show_connection(connection: &Connection) -> Shown {
    let Connection { from, to, mode, bandwidth_bps, fallback } = connection;
    let bandwidth = bandwidth_bps.map(|bits| match bits {
        bits if bits % 1_000_000_000 == 0 => format!("{}gbps", bits / 1_000_000_000),
        bits if bits % 1_000_000 == 0 => format!("{}mbps", bits / 1_000_000),
        bits if bits % 1_000 == 0 => format!("{}kbps", bits / 1_000),
        bits => format!("{bits}bps"),
    });
    Shown::map([
        ("from", Shown::text(from)),
        ("to", Shown::text(to)),
        ("type", word(mode)),
        ("bandwidth", Shown::maybe(bandwidth, Shown::text)),
        ("fallback", word(fallback)),
    ])
}

fn show_service(service: &Service) -> Shown {
    let Service {
        endpoints,
        absence: _,
        scopes,
        protocol,
        routing,
        timeouts,
        retries,
        hedge,
        circuit,
        health,
        limits,
    } = service;
    Shown::map([
        ("endpoints", Shown::list(endpoints, show_endpoint)),
        ("scopes", show_scopes(scopes)),
        ("protocol", word(protocol)),
        ("routing", show_routing(routing)),
        (
            "timeouts",
            Shown::map([
                ("connect", time(timeouts.connect)),
                ("attempt", Shown::maybe(timeouts.attempt, time)),
                ("request", Shown::maybe(timeouts.request, time)),
            ]),
        ),
        (
            "retries",
            Shown::map([
                ("max_attempts", Shown::word(retries.max_attempts)),
                (
                    "backoff",
                    Shown::map([
                        ("base", time(retries.backoff.base)),
                        ("max", time(retries.backoff.max)),
                    ]),
                ),
            ]),
        ),
        ("hedge", Shown::maybe(hedge.as_ref(), show_hedge)),
        (
            "circuit",
            Shown::map([
                ("failure_threshold", Shown::word(circuit.failure_threshold)),
                ("recovery_timeout", time(circuit.recovery_timeout)),
            ]),
        ),
        ("health", show_health(health)),
        (
            "limits",
            Shown::map([
                ("connections", Shown::maybe(limits.connections, Shown::word)),
                ("requests", Shown::maybe(limits.requests, Shown::word)),
            ]),
        ),
    ])
}

fn show_endpoint(endpoint: &Endpoint) -> Shown {
    // What a source finds is no setting.
    let Endpoint {
        id,
        url,
        found_at: _,
        internal_url,
        private_url,
        place,
        zone,
        auth_method,
        weight,
        state,
    } = endpoint;
    Shown::map([
        ("id", Shown::text(id)),
        ("url", Shown::text(url)),
        ("provider", Shown::text(place.provider())),
        ("region", Shown::text(place.region())),
        ("zone", Shown::maybe(zone.as_ref(), Shown::text)),
        ("internal_url", Shown::maybe(internal_url.as_ref(), Shown::text)),
        ("private_url", Shown::maybe(private_url.as_ref(), Shown::text)),
        ("auth_method", word(auth_method)),
        ("weight", Shown::word(weight)),
        ("state", word(state)),
    ])
}

fn show_routing(routing: &Routing) -> Shown {
    let Routing { policy, latency_target, locality, sticky } = routing;
    let sticky = sticky.as_ref().map(|sticky| match sticky {
        Sticky::Header(name) => ("header", Shown::text(name)),
        Sticky::Cookie(name) => ("cookie", Shown::text(name)),
    });
    Shown::map([
        ("policy", word(policy)),
        ("latency_target", Shown::maybe(*latency_target, time)),
        ("locality", word(locality)),
        ("sticky", Shown::maybe(sticky, |sticky| Shown::map([sticky]))),
    ])
}

fn show_hedge(hedge: &Hedge) -> Shown {
    let after = match &hedge.after {
        HedgeAfter::Percentile(percentile) => Shown::text(format!("p{percentile}")),
        HedgeAfter::Fixed(span) => time(*span),
    };
    let budget = Shown::text(format!("{}%", hedge.budget_percent));
    Shown::map([("after", after), ("budget", budget)])
}

fn show_health(health: &HealthCheck) -> Shown {
    let HealthCheck { kind, path, interval, timeout, healthy, unhealthy } = health;
    Shown::map([
        ("type", word(kind)),
        ("path", Shown::maybe(path.as_ref(), Shown::text)),
        ("interval", time(*interval)),
        ("timeout", time(*timeout)),
        ("healthy", Shown::word(healthy)),
        ("unhealthy", Shown::word(unhealthy)),
    ])
}

fn show_issuer((issuer, jwks_file): (&Issuer, &Option<PathBuf>)) -> Shown {
    // The keys themselves are public, but a reader looks for their place.
    let Issuer { issuer, jwks_uri, jwks: _, audiences } = issuer;
    let mut entries = vec![("issuer", Shown::text(issuer))];
    entries.extend(jwks_uri.iter().map(|uri| ("jwks_uri", Shown::text(uri))));
    entries.extend(jwks_file.iter().map(|path| ("jwks_file", Shown::text(path.display()))));
    entries.push(("audiences", Shown::list(audiences, Shown::text)));
    Shown::map(entries)
}

fn proxy(settings: &ProxyFile) -> Shown {
    let ProxyFile {
        role,
        service,
        place,
        zone,
        registry,
        discovery,
        outbound,
        inbound,
        admin,
        trust_ca_file,
        limits,
        shutdown,
        log,
        workers,
    } = settings;
    let role = match role {
        Role::Sidecar => "sidecar",
        Role::Edge => "edge",
        Role::Dev => "dev",
    };
    let mut entries = vec![("role", Shown::text(role)), ("service", Shown::text(service))];
    entries.extend(place.iter().map(|place| ("place", Shown::text(place))));
    entries.extend(zone.iter().map(|zone| ("zone", Shown::text(zone))));
    entries.push(match registry {
        Registry::Control(control) => ("control", show_control(control)),
        Registry::File(path) => ("project", Shown::text(path.display())),
    });
    if !discovery.is_empty() {
        entries.push(("discovery", Shown::list(discovery, show_source)));
    }
    entries.extend(outbound.iter().map(|outbound| ("outbound", show_outbound(outbound))));
    if !inbound.is_empty() {
        entries.push(("inbound", Shown::list(inbound, show_inbound)));
    }
    let Admin { listen, probes } = admin;
    let probes = Shown::maybe(probes.as_ref(), Shown::text);
    entries.push(("admin", Shown::map([("listen", Shown::text(listen)), ("probes", probes)])));
    entries.extend(
        trust_ca_file
            .iter()
            .map(|path| ("trust", Shown::map([("ca_file", Shown::text(path.display()))]))),
    );
    entries.push(("limits", show_limits(limits)));
    let ShutdownTimes { grace, deadline } = shutdown;
    let shutdown = Shown::map([("grace", time(*grace)), ("deadline", time(*deadline))]);
    entries.push(("shutdown", shutdown));
    entries.push(("log", show_log(*log)));
    entries.push(match workers {
        Workers::Auto => ("workers", Shown::text("auto")),
        Workers::Count(count) => ("workers", Shown::word(count)),
    });
    Shown::map(entries)
}

fn show_control(control: &Control) -> Shown {
    let Control { urls, ca_file, credential, state_dir, max_snapshot_age } = control;
    let credential = match credential {
        Credential::ClientSecretFile(path) => ("client_secret_file", path),
        Credential::TokenFile(path) => ("token_file", path),
        Credential::PrivateKeyFile(path) => ("private_key_file", path),
    };
    let mut entries = vec![("url", Shown::list(urls, Shown::text))];
    entries.extend(ca_file.iter().map(|path| ("ca_file", Shown::text(path.display()))));
    entries.push(("credential", Shown::map([(credential.0, Shown::text(credential.1.display()))])));
    let state_dir = state_dir.as_ref().map(|path| path.display());
    entries.push(("state_dir", Shown::maybe(state_dir, Shown::text)));
    entries.push(("max_snapshot_age", time(*max_snapshot_age)));
    Shown::map(entries)
}

fn show_source(source: &Source) -> Shown {
    match source {
        Source::Dns(dns) => Shown::map([("dns", show_dns(dns))]),
    }
}

fn show_dns(dns: &DnsSettings) -> Shown {
    let DnsSettings {
        service,
        name,
        kind,
        scheme,
        place,
        zone,
        mode,
        auth_method,
        resolver,
        min_ttl,
        max_ttl,
    } = dns;
    let mut entries = vec![("service", Shown::text(service)), ("name", Shown::text(name))];
    match kind {
        DnsKind::Srv => entries.push(("type", Shown::text("srv"))),
        DnsKind::Address { port } => {
            entries.push(("type", Shown::text("address")));
            entries.push(("port", Shown::word(port)));
        }
    }
    entries.extend([
        ("scheme", Shown::text(scheme.as_str())),
        ("place", Shown::text(place)),
        ("zone", Shown::maybe(zone.as_ref(), Shown::text)),
        ("mode", word(mode)),
        ("auth_method", word(auth_method)),
        ("resolver", Shown::maybe(resolver.as_ref(), Shown::text)),
        ("min_ttl", time(*min_ttl)),
        ("max_ttl", time(*max_ttl)),
    ]);
    Shown::map(entries)
}

fn show_outbound(outbound: &Outbound) -> Shown {
    let Outbound { listen, ports, unknown_hosts, via, override_authorization, token_files } =
        outbound;
    let unknown_hosts = match unknown_hosts {
        UnknownHosts::Deny => "deny",
        UnknownHosts::Allow => "allow",
    };
    let files = token_files.iter().map(|(name, path)| (name, Shown::text(path.display())));
    Shown::map([
        ("listen", Shown::text(listen)),
        ("ports", Shown::map(ports.iter().map(|(name, port)| (name, Shown::text(port))))),
        ("unknown_hosts", Shown::text(unknown_hosts)),
        ("via", Shown::maybe(via.as_ref(), Shown::text)),
        ("override_authorization", Shown::word(override_authorization)),
        ("token_files", Shown::map(files)),
    ])
}

fn show_inbound(inbound: &Inbound) -> Shown {
    let Inbound {
        listen,
        app,
        tls,
        allow_from,
        rules,
        forward_authorization,
        token_cache,
        advertise,
    } = inbound;
    let mut entries = vec![("listen", Shown::text(listen))];
    entries.extend(app.iter().map(|app| ("app", show_app(app))));
    entries.push(("tls", show_tls(tls)));
    entries.push(("mtls", Shown::text("off")));
    entries.push(("allow_from", Shown::list(allow_from, Shown::text)));
    entries.push(("rules", Shown::maybe(rules.as_ref(), |rules| Shown::list(rules, show_rule))));
    entries.push(("forward_authorization", Shown::word(forward_authorization)));
    entries.push(("token_cache", Shown::word(token_cache)));
    entries.push(("advertise", Shown::maybe(advertise.as_ref(), show_advertise)));
    Shown::map(entries)
}

fn show_advertise(advertise: &Advertise) -> Shown {
    let Advertise { id, url, internal_url, private_url, ttl } = advertise;
    Shown::map([
        ("id", Shown::maybe(id.as_ref(), Shown::text)),
        ("url", Shown::text(url)),
        ("internal_url", Shown::maybe(internal_url.as_ref(), Shown::text)),
        ("private_url", Shown::maybe(private_url.as_ref(), Shown::text)),
        ("ttl", time(*ttl)),
    ])
}

fn show_app(app: &App) -> Shown {
    let App { origin, protocol } = app;
    let text = origin.to_string();
    match (protocol, text.strip_prefix("http://")) {
        // The port is written out: h2c has none of its own.
        (AppProtocol::H2c, Some(_)) => {
            Shown::text(format!("h2c://{}:{}", origin.host(), origin.port()))
        }
        (AppProtocol::H2c | AppProtocol::Auto, _) => Shown::Text(text),
    }
}

fn show_tls(tls: &Tls) -> Shown {
    match tls {
        Tls::Platform => Shown::text("platform"),
        Tls::Off => Shown::text("off"),
        Tls::Files { cert_file, key_file, min_version } => {
            let version = match min_version {
                TlsVersion::V12 => "1.2",
                TlsVersion::V13 => "1.3",
            };
            Shown::map([
                ("cert_file", Shown::text(cert_file.display())),
                ("key_file", Shown::text(key_file.display())),
                ("min_version", Shown::text(version)),
            ])
        }
    }
}

fn show_rule(rule: &Rule) -> Shown {
    let Rule { path, methods, access } = rule;
    let path = match path {
        RulePath::Exact(path) => path.clone(),
        RulePath::Below(path) => format!("{path}/*"),
    };
    let mut entries = vec![("path", Shown::Text(path))];
    entries.extend(methods.iter().map(|methods| ("methods", Shown::list(methods, Shown::text))));
    entries.push(match access {
        Access::Public => ("public", Shown::word(true)),
        Access::Scopes(scopes) => ("scopes", show_scopes(scopes)),
    });
    Shown::map(entries)
}

fn show_limits(limits: &ProxyLimits) -> Shown {
    let ProxyLimits {
        header_bytes,
        headers,
        header_timeout,
        idle_timeout,
        stall_timeout,
        streams,
        connections,
        body_bytes,
    } = limits;
    Shown::map([
        ("header_bytes", Shown::word(header_bytes)),
        ("headers", Shown::word(headers)),
        ("header_timeout", time(*header_timeout)),
        ("idle_timeout", time(*idle_timeout)),
        ("stall_timeout", time(*stall_timeout)),
        ("streams", Shown::word(streams)),
        ("connections", Shown::word(connections)),
        ("body_bytes", Shown::maybe(*body_bytes, Shown::word)),
    ])
}

fn show_log(log: Log) -> Shown {
    let Log { format, access } = log;
    let format = match format {
        LogFormat::Auto => "auto",
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    Shown::map([("format", Shown::text(format)), ("access", Shown::word(access))])
}
