//! Stories of configurations: right ones are understood, wrong ones are told everything that is wrong with them.
#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "the helpers of a test may fail it"
)]

use std::{
    collections::BTreeMap,
    fs, iter,
    path::{Path, PathBuf},
    time::Duration,
};

use infrar::{
    config::{
        self, Access, AppProtocol, Credential, Faults, LogFormat, ProjectFile, ProxyFile, Registry,
        Role, RulePath, Tls, TlsVersion, UnknownHosts, Workers,
    },
    control::Identity,
    discovery::{DnsKind, Source},
    model::{NetworkMode, ServiceName},
};
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use saphyr_parser::{Event, Parser};
use secrecy::ExposeSecret;
use serde_json::Value as Json;
use tempfile::TempDir;

/// A machine's file system, as far as a configuration names files of it.
struct Machine {
    root: TempDir,
}

impl Machine {
    /// With the files that the examples name: secrets, and a certificate with its key.
    fn new() -> Self {
        let machine = Self { root: tempfile::tempdir().unwrap() };
        let (certificate, key) = certificate(2099);
        for folder in ["etc/infrar/tls", "run/secrets", "credentials"] {
            machine.write(&format!("{folder}/tls.crt"), &certificate);
            machine.write(&format!("{folder}/tls.key"), &key);
        }
        // systemd's, ECS's and Kubernetes' folders of secrets, and the file of Compose and the examples.
        machine.write("run/secrets/infrar/tls.crt", &certificate);
        machine.write("run/secrets/infrar/tls.key", &key);
        machine.write("run/secrets/infrar/client-secret", "s3cr3t\n");
        machine.write("credentials/client-secret", "s3cr3t\n");
        machine.write("etc/infrar/ca.pem", &certificate);
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn project(&self, text: &str) -> Result<ProjectFile, Faults> {
        let file = self.write("project.yaml", text);
        config::load_project_under(self.root.path(), &file)
    }

    fn proxy(&self, text: &str) -> Result<ProxyFile, Faults> {
        self.proxy_with(text, &[], &[])
    }

    fn proxy_with(
        &self,
        text: &str,
        variables: &[(&str, &str)],
        flags: &[(&str, &str)],
    ) -> Result<ProxyFile, Faults> {
        let file = self.write("proxy.yaml", text);
        config::load_proxy_under(self.root.path(), Some(&file), owned(variables), &flag(flags))
    }

    /// The faults as people read them, without the folder of this test.
    fn told(&self, faults: &Faults) -> String {
        faults.to_string().replace(&format!("{}/", self.root.path().display()), "")
    }

    fn wrong_project(&self, text: &str) -> String {
        self.told(&self.project(text).map(|_| ()).unwrap_err())
    }

    fn wrong_proxy(&self, text: &str) -> String {
        self.told(&self.proxy(text).unwrap_err())
    }
}

fn owned(variables: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
    flag(variables).into_iter()
}

fn flag(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A self-signed certificate that ends with a year, and its key.
fn certificate(year: i32) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["shop.example".to_owned()]).unwrap();
    params.not_before = date_time_ymd(2010, 1, 1);
    params.not_after = date_time_ymd(year, 12, 31);
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

fn repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

/// The least that a sidecar says, followed by `more`.
fn sidecar(more: &str) -> String {
    format!(
        "service: web-application\nplace: aws_us_east_1\ncontrol:\n  url: https://control.example:7070\n  \
         credential: {{ client_secret_file: /credentials/client-secret }}\n{more}"
    )
}

// ---------------------------------------------------------------------------------------------- examples

#[test]
fn the_example_project_is_right_and_its_secrets_are_beside_it() {
    let machine = Machine::new();
    machine.write("secrets/web-application", "web-s3cr3t \n\n");
    machine.write("secrets/background-workers", "workers-s3cr3t");
    let text = fs::read_to_string(repository("config/project.example.yaml")).unwrap();
    let ProjectFile { project, identities, notes, .. } = machine.project(&text).unwrap();

    assert_eq!(notes, [""; 0]);
    let service = &project.services[&name("data-intelligence")];
    assert_eq!(
        service.endpoints[0].internal_url.as_ref().unwrap().to_string(),
        "https://10.1.1.10"
    );
    let to_azure = project
        .networking
        .modes(&"aws_us_east_1".parse().unwrap(), &"azure_eastus".parse().unwrap());
    assert_eq!(to_azure, (NetworkMode::Vpn, Some(NetworkMode::Public)));
    let granted = project.granted(&name("web-application"), &name("data-intelligence")).unwrap();
    assert_eq!(granted.to_string(), "read:data write:query");
    let Identity::ClientSecret(secret) = &identities[&name("web-application")] else {
        panic!("a secret was written")
    };
    assert_eq!(secret.expose_secret(), "web-s3cr3t");
}

#[test]
fn the_example_sidecar_edge_and_dev_proxy_are_right() {
    let machine = Machine::new();
    fs::remove_dir_all(machine.path("run/secrets/infrar")).unwrap();
    machine.write("run/secrets/infrar", "s3cr3t\n");
    machine.write("tokens/data-intelligence", "header.payload.signature\n");
    let project = fs::read_to_string(repository("config/project.example.yaml")).unwrap();
    machine.write("project.example.yaml", &project);
    let load = |file: &str| {
        machine.proxy(&fs::read_to_string(repository(file)).unwrap()).unwrap_or_else(|faults| {
            panic!("{file}:\n{faults}");
        })
    };

    let sidecar = load("config/sidecar.yaml");
    assert_eq!(sidecar.role, Role::Sidecar);
    let rules = sidecar.inbound[0].rules.as_ref().unwrap();
    assert_eq!(rules[0].access, Access::Public);
    assert_eq!(rules[2].path, RulePath::Below("/v1".to_owned()));
    assert_eq!(sidecar.outbound.unwrap().ports[&name("data-intelligence")].port(), 15_101);

    let edge = load("config/edge.yaml");
    assert_eq!((edge.role, edge.outbound, &edge.inbound[0].app), (Role::Edge, None, &None));
    assert_eq!(edge.limits.connections, 50_000);
    let Registry::Control(control) = edge.registry else {
        panic!("an edge follows a control plane")
    };
    // Two control planes are two issuers: until they share a store, an example names one.
    assert_eq!(control.urls.len(), 1);

    let dev = load("config/dev.yaml");
    assert_eq!((dev.role, dev.place), (Role::Dev, None));
    assert_eq!(dev.registry, Registry::File(machine.path("project.example.yaml")));
    assert_eq!(dev.outbound.unwrap().unknown_hosts, UnknownHosts::Allow);
    assert_eq!(dev.log.format, LogFormat::Text);
}

#[test]
fn the_configurations_in_the_readme_are_right() {
    let machine = Machine::new();
    fs::remove_dir_all(machine.path("run/secrets/infrar")).unwrap();
    machine.write("run/secrets/infrar", "s3cr3t");
    let (certificate, key) = certificate(2099);
    machine.write("etc/infrar/tls.crt", &certificate);
    machine.write("etc/infrar/tls.key", &key);
    machine.write("secrets/web-application", "s3cr3t");
    machine.write("secrets/reports", "s3cr3t");
    let readme = fs::read_to_string(repository("README.md")).unwrap();
    let blocks = readme.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let (proxies, projects): (Vec<_>, Vec<_>) = blocks.partition(|text| text.contains("role:"));
    assert!(!proxies.is_empty() && !projects.is_empty());
    for text in proxies {
        machine.proxy(text).unwrap_or_else(|faults| panic!("{text}\n{faults}"));
    }
    for text in projects {
        machine.project(text).unwrap_or_else(|faults| panic!("{text}\n{faults}"));
    }
}

#[test]
fn services_on_one_host_are_apart_only_where_an_edge_could_stand() {
    let machine = Machine::new();
    let project = |host: &str| {
        let service = |name: &str| {
            format!(
                "  {name}:\n    endpoints: [{{ url: \"https://{host}\", provider: gcp, region: r }}]\n"
            )
        };
        format!("project: shop\nservices:\n{}{}", service("a"), service("b"))
    };
    assert!(machine.project(&project("127.0.0.1:8443")).is_ok());
    assert!(machine.project(&project("shop.example")).is_err());
}

/// YAML (or JSON, which is YAML) as plain values, each scalar as text.
fn documents(text: &str) -> Vec<Json> {
    enum Open {
        List(Vec<Json>),
        Map(serde_json::Map<String, Json>, Option<String>),
    }
    let (mut stack, mut documents) = (Vec::new(), Vec::new());
    let mut parser = Parser::new_from_str(text);
    while let Some(event) = parser.next_event() {
        let value = match event.expect("the manifest is YAML").0 {
            Event::SequenceStart(..) => {
                stack.push(Open::List(Vec::new()));
                continue;
            }
            Event::MappingStart(..) => {
                stack.push(Open::Map(serde_json::Map::new(), None));
                continue;
            }
            Event::Scalar(text, ..) => Json::from(text.into_owned()),
            Event::SequenceEnd | Event::MappingEnd => match stack.pop().unwrap() {
                Open::List(items) => Json::Array(items),
                Open::Map(entries, _) => Json::Object(entries),
            },
            _ => continue,
        };
        match stack.last_mut() {
            None => documents.push(value),
            Some(Open::List(items)) => items.push(value),
            Some(Open::Map(entries, key @ None)) => {
                assert!(!entries.contains_key(value.as_str().unwrap()), "{value} twice");
                *key = Some(value.as_str().unwrap().to_owned());
            }
            Some(Open::Map(entries, key)) => {
                entries.insert(key.take().unwrap(), value);
            }
        }
    }
    documents
}

/// The variables of every container: `{name, value}` pairs, and maps under `environment`.
fn environments(value: &Json, found: &mut Vec<BTreeMap<String, String>>) {
    if let Json::Object(entries) = value {
        for key in ["env", "environment"] {
            match entries.get(key) {
                Some(Json::Array(pairs)) => found.push(
                    pairs
                        .iter()
                        .map(|pair| {
                            let text = |key: &str| pair[key].as_str().unwrap().to_owned();
                            (text("name"), text("value"))
                        })
                        .collect(),
                ),
                Some(Json::Object(pairs)) => found.push(
                    pairs
                        .iter()
                        .map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned()))
                        .collect(),
                ),
                _ => {}
            }
        }
    }
    match value {
        Json::Object(entries) => entries.values().for_each(|value| environments(value, found)),
        Json::Array(items) => items.iter().for_each(|value| environments(value, found)),
        _ => {}
    }
}

/// Loads the settings of the proxy in a manifest; the application's environment must lead to its outbound port.
fn deployed(machine: &Machine, environments: &[BTreeMap<String, String>]) -> ProxyFile {
    let (proxies, apps): (Vec<_>, Vec<_>) =
        environments.iter().partition(|variables| variables.contains_key("INFRAR_ROLE"));
    let [proxy] = proxies.as_slice() else { panic!("one proxy, not {}", proxies.len()) };
    let settings =
        config::load_proxy_under(machine.root.path(), None, (*proxy).clone().into_iter(), &[])
            .unwrap_or_else(|faults| panic!("{faults}"));
    let listen = format!("http://{}", settings.outbound.as_ref().unwrap().listen);
    let [app] = apps.as_slice() else { panic!("one application, not {}", apps.len()) };
    for variable in ["HTTP_PROXY", "http_proxy", "INFRAR_OUTBOUND_URL"] {
        assert_eq!(app.get(variable), Some(&listen), "{variable}");
    }
    // Else the application would ask its cloud for credentials through the proxy, and be refused.
    for variable in ["NO_PROXY", "no_proxy"] {
        let past: Vec<&str> = app[variable].split(',').collect();
        for host in [
            "localhost",
            "127.0.0.1",
            "::1",
            "169.254.169.254",
            "169.254.170.2",
            "metadata.google.internal",
        ] {
            assert!(past.contains(&host), "{variable}: {host}");
        }
    }
    settings
}

#[test]
fn the_environment_of_every_manifest_makes_a_right_proxy() {
    for (file, tls_by_platform) in [
        ("kubernetes.yaml", false),
        ("ecs-fargate.json", false),
        ("cloud-run.yaml", true),
        ("azure-container-apps.yaml", true),
        ("compose.yaml", false),
    ] {
        let machine = Machine::new();
        if file == "compose.yaml" {
            fs::remove_dir_all(machine.path("run/secrets/infrar")).unwrap();
            machine.write("run/secrets/infrar", "s3cr3t");
        }
        let text = fs::read_to_string(repository("deploy/sidecar").join(file)).unwrap();
        let mut found = Vec::new();
        documents(&text).iter().for_each(|document| environments(document, &mut found));
        let settings = deployed(&machine, &found);
        assert_eq!(settings.inbound[0].tls == Tls::Platform, tls_by_platform, "{file}");
        assert_eq!(settings.inbound[0].listen.port(), 15_006, "{file}");
        let Registry::Control(control) = settings.registry else { panic!("{file}") };
        assert!(control.state_dir.is_some(), "{file}");
    }
}

#[test]
fn manifests_keep_to_what_their_platforms_allow() {
    let read = |file: &str| fs::read_to_string(repository("deploy/sidecar").join(file)).unwrap();
    // Container Apps: a failureThreshold from 1 to 10, and an identity that is there before the app.
    let azure = read("azure-container-apps.yaml");
    for rest in azure.split("failureThreshold: ").skip(1) {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        assert!((1..=10).contains(&digits.parse().unwrap()), "{rest}");
    }
    assert!(azure.contains("type: UserAssigned") && !azure.contains("identity: system"), "{azure}");
    // Compose: whoever lends its network starts first and is stopped last.
    let compose = read("compose.yaml");
    let (application, infrar) = compose.split_once("\n  infrar:\n").unwrap();
    assert!(application.contains("network_mode: service:infrar"), "{compose}");
    assert!(!infrar.contains("network_mode"), "{compose}");
    // ECS: a secret's ARN ends in six characters of its own.
    let ecs = read("ecs-fargate.json");
    for rest in ecs.split(":secret:").skip(1) {
        let name = rest.split(['"', ':']).next().unwrap();
        assert_eq!(name.rsplit('-').next().map(str::len), Some(6), "{name}");
    }
}

#[test]
fn the_systemd_unit_makes_a_right_proxy() {
    let machine = Machine::new();
    let unit = fs::read_to_string(repository("deploy/sidecar/infrar.service")).unwrap();
    let variables = unit.lines().filter_map(|line| line.strip_prefix("Environment=")).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap();
        let value = value.replace("%d", "/credentials").replace("%S", "/var/lib");
        (name.to_owned(), value)
    });
    let settings = config::load_proxy_under(machine.root.path(), None, variables, &[]).unwrap();
    let Registry::Control(control) = settings.registry else {
        panic!("it follows a control plane")
    };
    assert_eq!(control.state_dir.unwrap(), machine.path("var/lib/infrar"));
    for line in ["DynamicUser=yes", "StateDirectory=infrar", "ProtectSystem=strict"] {
        assert!(unit.lines().any(|written| written == line), "{line}");
    }
}

// ---------------------------------------------------------------------------------------------- defaults, layers

#[test]
fn a_sidecar_needs_no_file() {
    let machine = Machine::new();
    let variables = [
        ("INFRAR_SERVICE", "web-application"),
        ("INFRAR_PLACE", "aws_us_east_1"),
        ("INFRAR_CONTROL_URL", "https://control.example:7070"),
        ("INFRAR_CONTROL_CREDENTIAL_CLIENT_SECRET_FILE", "/credentials/client-secret"),
        // An empty variable is as good as none; those of others are none of ours.
        ("INFRAR_CONTROL_CA_FILE", ""),
        ("INFRAR_TOKEN", "t0k3n"),
        ("INFRAR_LOG_LEVEL", "debug"),
        ("PATH", "/bin"),
    ];
    let settings =
        config::load_proxy_under(machine.root.path(), None, owned(&variables), &[]).unwrap();
    assert_eq!(settings.role, Role::Sidecar);
    assert_eq!(settings.outbound.unwrap().listen, "127.0.0.1:15001".parse().unwrap());
    assert!(settings.inbound.is_empty());
    assert_eq!(settings.admin.listen, "127.0.0.1:15000".parse().unwrap());
    assert_eq!(settings.workers, Workers::Auto);
    let Registry::Control(control) = settings.registry else {
        panic!("it follows a control plane")
    };
    let secret = machine.path("credentials/client-secret");
    assert_eq!(control.credential, Credential::ClientSecretFile(secret));
    assert_eq!(control.max_snapshot_age, Duration::from_secs(7 * 86_400));
}

#[test]
fn a_listener_opens_when_its_section_or_one_of_its_variables_is_there() {
    let machine = Machine::new();
    let inbound = "inbound: { app: http://127.0.0.1:8080, tls: platform }\n";
    let only_inbound = machine.proxy(&sidecar(inbound)).unwrap();
    assert!(only_inbound.outbound.is_none());
    assert_eq!(only_inbound.inbound[0].listen, "0.0.0.0:15006".parse().unwrap());

    let both = machine.proxy(&sidecar(&format!("{inbound}outbound:\n"))).unwrap();
    assert_eq!(both.outbound.unwrap().listen.port(), 15_001);

    let by_variable = machine
        .proxy_with(&sidecar(inbound), &[("INFRAR_OUTBOUND_UNKNOWN_HOSTS", "allow")], &[])
        .unwrap();
    assert_eq!(by_variable.outbound.unwrap().unknown_hosts, UnknownHosts::Allow);
}

#[test]
fn flags_beat_the_environment_and_the_environment_beats_the_file() {
    let machine = Machine::new();
    let text = sidecar(
        "outbound: { listen: 127.0.0.1:1001, unknown_hosts: allow }\nlog: { format: text }\n",
    );
    let text = text.replace("client_secret_file: /credentials/client-secret", "token_file: /none");
    let variables = [
        ("INFRAR_OUTBOUND_LISTEN", "127.0.0.1:1002"),
        ("INFRAR_OUTBOUND_PORTS", "{ reports: 127.0.0.1:2001, data: 127.0.0.1:2002 }"),
        ("INFRAR_LOG_ACCESS", "false"),
        ("INFRAR_LOG_FORMAT", "json"),
        // Of keys that exclude each other the higher layer's holds.
        ("INFRAR_CONTROL_CREDENTIAL_CLIENT_SECRET_FILE", "/credentials/client-secret"),
        ("INFRAR_CONTROL_URL", "[https://a.example:7070, https://b.example:7070]"),
    ];
    let flags = [("outbound.listen", "127.0.0.1:1003"), ("workers", "3")];
    let settings = machine.proxy_with(&text, &variables, &flags).unwrap();
    let outbound = settings.outbound.unwrap();
    assert_eq!(outbound.listen.port(), 1003);
    assert_eq!(outbound.unknown_hosts, UnknownHosts::Allow);
    assert_eq!(outbound.ports[&name("data")].port(), 2002);
    assert_eq!((settings.log.access, settings.log.format), (false, LogFormat::Json));
    assert_eq!(settings.workers, Workers::Count(3.try_into().unwrap()));
    let Registry::Control(control) = settings.registry else {
        panic!("it follows a control plane")
    };
    let secret = machine.path("credentials/client-secret");
    assert_eq!(control.credential, Credential::ClientSecretFile(secret));
    assert_eq!(control.urls.len(), 2);
}

#[test]
fn faults_of_variables_and_flags_name_them() {
    let machine = Machine::new();
    let two = "inbound:\n  - { listen: 127.0.0.1:1, app: http://127.0.0.1:80 }\n  - { listen: 127.0.0.1:2, app: http://127.0.0.1:80 }\n";
    let variables = [
        ("INFRAR_INBOUND_APP", "http://127.0.0.1:81"),
        ("INFRAR_OUTBOUND_LISSTEN", "127.0.0.1:15001"),
        ("INFRAR_OUTBOUND_PORTS", "{ reports: 1, reports: [ }"),
        ("INFRAR_SHUTDOWN_GRACE", "3 sec onds"),
        ("INFRAR_LIMITS", "{ header: 5 }"),
    ];
    let flags = [("admin.listen", "localhost"), ("nonsense", "1")];
    let faults = machine.proxy_with(&sidecar(two), &variables, &flags).unwrap_err();
    assert_eq!(
        machine.told(&faults),
        "\
INFRAR_INBOUND_APP: inbound.app: found a part of one of 2 listeners; set the whole list, or change it in the file
INFRAR_LIMITS: limits.header: found an unknown key; write headers
INFRAR_OUTBOUND_LISSTEN: found an unknown variable; write INFRAR_OUTBOUND_LISTEN
INFRAR_OUTBOUND_PORTS: outbound.ports: found text that is no YAML (while parsing a node, did not find expected node content); check indentation, quotes and brackets up to here
INFRAR_OUTBOUND_PORTS: outbound.ports.reports: found this key a second time; keep one of them
INFRAR_SHUTDOWN_GRACE: shutdown.grace: found \"3 sec onds\"; write a length of time, such as 25ms, 5s or 7d (at most 366d)
the flag for admin.listen: admin.listen: found \"localhost\"; write an address with a port, such as 127.0.0.1:15001
the flag for nonsense: found the unknown setting \"nonsense\"; leave it out; `infrar check` lists the settings"
    );
}

#[test]
fn what_kubernetes_says_about_a_service_named_infrar_is_no_setting() {
    let machine = Machine::new();
    let variables = [
        ("INFRAR_CONTROL_SERVICE_HOST", "10.0.0.1"),
        ("INFRAR_CONTROL_SERVICE_PORT", "7070"),
        ("INFRAR_CONTROL_SERVICE_PORT_HTTPS", "7070"),
        ("INFRAR_CONTROL_PORT", "tcp://10.0.0.1:7070"),
        ("INFRAR_CONTROL_PORT_7070_TCP", "tcp://10.0.0.1:7070"),
        ("INFRAR_CONTROL_PORT_7070_TCP_ADDR", "10.0.0.1"),
        ("INFRAR_CONTROL_PORT_7070_TCP_PORT", "7070"),
        ("INFRAR_CONTROL_PORT_7070_TCP_PROTO", "tcp"),
    ];
    assert!(machine.proxy_with(&sidecar(""), &variables, &[]).is_ok());
}

#[test]
fn endpoints_without_an_id_get_that_of_their_place() {
    let machine = Machine::new();
    let endpoint = |host: &str, more: &str| {
        format!("      - {{ url: \"https://{host}\", provider: aws, region: us-east-1{more} }}\n")
    };
    let text = format!(
        "project: shop\nservices:\n  a:\n    endpoints:\n{}{}{}{}",
        endpoint("a1.example", ""),
        endpoint("a2.example", ", id: aws-us-east-1-2"),
        endpoint("a3.example", ""),
        endpoint("a4.example", "")
    );
    let project = machine.project(&text).unwrap().project;
    let ids: Vec<_> =
        project.services[&name("a")].endpoints.iter().map(|e| e.id.as_str()).collect();
    assert_eq!(ids, ["aws-us-east-1", "aws-us-east-1-2", "aws-us-east-1-3", "aws-us-east-1-4"]);
}

#[test]
fn settings_without_effect_and_no_others_are_noted() {
    let machine = Machine::new();
    machine.write("secret", "x");
    let text = "\
project: shop
multi_cloud: { connections: [{ from: aws_us_east_1, to: azure_eastus, type: vpn, bandwidth: 1gbps }] }
services:
  a:
    endpoints: [{ url: \"https://a.example\", provider: azure, region: eastus }]
    hedge: { after: 50ms, budget: 2.5% }
    routing: { policy: balanced, latency_target: 80ms, sticky: { header: x-session } }
    circuit: { failure_threshold: 7, recovery_timeout: 5s }
    health: { path: /healthz }
    limits: { requests: 100, connections: 10 }
    retries: { max_attempts: 2 }
    timeouts: { request: null, attempt: 2s }
permissions: { b: { a: [] } }
identities: { c: { client_secret_file: secret }, d: { issuer: \"https://oidc.example\", subject: d } }
capabilities: { search: { provider: aws, region: us-east-1, monthly_cost: { compute: 12.50 } } }
prices: { aws: { baseline_gb: 500, rates: { internet: 0.05 } } }
";
    let loaded = machine.project(text).unwrap();
    assert_eq!(loaded.project.services[&name("a")].timeouts.request, None);
    assert_eq!(
        loaded.notes,
        [
            "services.a.hedge: read, but this release does not act on it",
            "services.a.health: read, but this release does not act on it",
            "services.a.limits.connections: read, but this release does not act on it",
            "services.a.routing.sticky: read, but this release does not act on it",
            "multi_cloud.connections[0].bandwidth: read, but this release does not act on it",
            "multi_cloud.connections[0]: a/azure-eastus has no internal_url, which mode vpn needs",
            "identities.d: this release takes no issuer and subject for proof, so it gets no token here",
            "permissions.b: has no entry in identities, so it gets no token here",
            "capabilities: read, but this release does not act on it",
            "prices: read, but this release does not act on it",
        ]
    );
    // What is printed says the same again.
    let printed = config::effective_yaml(&loaded);
    let again = config::load_project(&machine.write("again.yaml", &printed)).unwrap();
    assert_eq!(again.project, loaded.project);
    assert_eq!(config::effective_yaml(&again), printed);
}

// ---------------------------------------------------------------------------------------------- printing

#[test]
fn effective_settings_read_back_as_themselves_and_show_no_secret() {
    let machine = Machine::new();
    machine.write("secrets/web-application", "web-s3cr3t");
    machine.write("secrets/background-workers", "workers-s3cr3t");
    let text = fs::read_to_string(repository("config/project.example.yaml")).unwrap();
    let loaded = machine.project(&text).unwrap();
    let printed = config::effective_yaml(&loaded);
    assert!(!printed.contains("s3cr3t"), "{printed}");
    assert!(printed.contains("secrets/web-application"), "{printed}");
    let again = config::load_project(&machine.write("again.yaml", &printed)).unwrap();
    assert_eq!(again.project, loaded.project);

    for more in [
        "",
        "inbound:\n  app: h2c://127.0.0.1:8080\n  tls: { cert_file: /credentials/tls.crt, key_file: /credentials/tls.key, min_version: 1.2 }\n  \
         rules: [{ path: /*, scopes: [] }, { path: /a, methods: [GET, POST], public: true }]\n  allow_from: [10.0.0.0/8, 192.0.2.1]\n",
        "outbound: { ports: { a: \"[::1]:4000\" }, via: \"https://edge.example\", override_authorization: true }\n\
         limits: { header_bytes: 1MiB, body_bytes: 10MB }\nlog: { format: json }\nworkers: 2\nzone: us-east-1a\n\
         admin: { probes: 0.0.0.0:15021 }\ntrust: { ca_file: /etc/infrar/ca.pem }\n",
        "discovery:\n  - dns: { service: a, name: _https._tcp.a.example, type: srv, place: azure/eastus, zone: '1', max_ttl: 1m }\n  \
         - dns: { service: b, name: B.example., scheme: http, auth_method: none, resolver: \"[::1]:5353\", mode: vpn }\n",
    ] {
        let loaded = machine.proxy(&sidecar(more)).unwrap();
        let printed = config::effective_yaml(&loaded);
        let file = machine.write("again.yaml", &printed);
        let again = config::load_proxy(Some(&file), iter::empty(), &[]).unwrap();
        assert_eq!(again, loaded, "{printed}");
        assert!(config::is_proxy(&file));
    }
}

#[test]
fn a_name_to_look_up_is_settled_with_its_defaults() {
    let machine = Machine::new();
    let text = "discovery:\n  - dns: { service: a, name: A.Example. }\n  \
                - dns: { service: a, name: b.example, scheme: http, place: gcp_us_central1, resolver: 10.0.0.2 }\n";
    let settings = machine.proxy(&sidecar(text)).unwrap();
    let [Source::Dns(near), Source::Dns(far)] = settings.discovery.as_slice() else {
        panic!("two names")
    };
    assert_eq!((near.name.as_str(), near.kind), ("a.example", DnsKind::Address { port: 443 }));
    // Where the proxy runs, over its private network; anywhere else over the internet.
    assert_eq!(Some(&near.place), settings.place.as_ref());
    assert_eq!((near.mode, far.mode), (NetworkMode::PrivatePeering, NetworkMode::Public));
    assert_eq!(far.kind, DnsKind::Address { port: 80 });
    assert_eq!(far.resolver, Some("10.0.0.2:53".parse().unwrap()));
    assert_eq!((near.min_ttl, near.max_ttl), (Duration::from_secs(1), Duration::from_secs(300)));
}

#[test]
fn names_to_look_up_are_told_all_their_faults() {
    let machine = Machine::new();
    let told = machine.wrong_proxy(&sidecar(
        "discovery:
  - dns: { service: a, name: _https._tcp.a.example }
  - dns: { service: a, name: a..example, type: srv, port: 443 }
  - dns: { service: a, name: 10.0.0.1, port: 0, scheme: h2 }
  - dns: { service: A, name: a.example, type: cname, mode: vnp }
  - dns: { service: b, name: b.example, min_ttl: 10m, resolver: dns.example }
  - dns: { name: c.example, ttl: 5s }
  - dns: { service: d, name: d.example }
  - dns: { service: d, name: D.example., port: 8443 }
  - consul: { service: e }
",
    ));
    assert_eq!(told, WRONG_NAMES.trim_end());
    let project = "project: shop\nservices: { data: { scopes: [use] } }\n";
    machine.write("project.yaml", project);
    let told = machine.wrong_proxy(
        "service: web\nplace: aws_us_east_1\nproject: project.yaml\ndiscovery: [{ dns: { service: date, name: a.example } }]\n",
    );
    assert_eq!(
        told,
        "proxy.yaml:4:31: discovery[0].dns.service: found \"date\", which is no service of the project; write data"
    );
}

const WRONG_NAMES: &str = "\
proxy.yaml:7:10: discovery[0].dns.type: found nothing; write type: srv for a name that begins with _
proxy.yaml:8:30: discovery[1].dns.name: found \"a..example\"; write a name in DNS, such as reports.internal.example.com
proxy.yaml:8:59: discovery[1].dns.port: found \"443\"; leave it out: an SRV record says the port
proxy.yaml:9:30: discovery[2].dns.name: found \"10.0.0.1\"; write a name in DNS, such as reports.internal.example.com
proxy.yaml:9:46: discovery[2].dns.port: found \"0\"; write a whole number from 1 to 65535
proxy.yaml:9:57: discovery[2].dns.scheme: found \"h2\"; write https or http
proxy.yaml:10:21: discovery[3].dns.service: found \"A\"; write a name of a-z, 0-9 and -, such as data-intelligence
proxy.yaml:10:47: discovery[3].dns.type: found \"cname\"; write address or srv
proxy.yaml:10:60: discovery[3].dns.mode: found \"vnp\"; write public, vpn or private_peering
proxy.yaml:11:10: discovery[4].dns: found a min_ttl above max_ttl; write a min_ttl that is not above max_ttl
proxy.yaml:11:65: discovery[4].dns.resolver: found \"dns.example\"; write the address of a DNS server, such as 10.0.0.2 or 127.0.0.1:5353
proxy.yaml:12:10: discovery[5].dns.service: found nothing; write a name of a-z, 0-9 and -, such as data-intelligence
proxy.yaml:12:29: discovery[5].dns.ttl: found an unknown key; the keys here are service, name, type, port, scheme, place, zone, mode, auth_method, resolver, min_ttl, max_ttl
proxy.yaml:14:10: discovery[7].dns: found d.example, which the entry of line 13 looks up too; keep one of them
proxy.yaml:15:5: discovery[8].consul: found an unknown key; the keys here are dns
";

#[test]
fn an_inbound_listener_says_what_is_spoken_on_either_side() {
    let machine = Machine::new();
    let inbound = "inbound: { listen: 127.0.0.1:0, app: h2c://127.0.0.1:8080 }\n";
    let settings = machine.proxy(&sidecar(inbound)).unwrap();
    let app = settings.inbound[0].app.as_ref().unwrap();
    assert_eq!(
        (app.origin.to_string().as_str(), app.protocol),
        ("http://127.0.0.1:8080", AppProtocol::H2c)
    );
    let tls =
        "{ cert_file: /credentials/tls.crt, key_file: /credentials/tls.key, min_version: 1.2 }";
    let old = sidecar(&format!("inbound: {{ app: \"http://127.0.0.1:8080\", tls: {tls} }}\n"));
    let Tls::Files { min_version, .. } = &machine.proxy(&old).unwrap().inbound[0].tls else {
        panic!("the certificate is from files")
    };
    assert_eq!(*min_version, TlsVersion::V12);
    // On loopback, TLS may be left out.
    assert_eq!(settings.inbound[0].tls, Tls::Off);
}

#[test]
fn the_published_schemas_are_current() {
    for (file, schema) in [
        ("config/project.schema.json", config::schema_project()),
        ("config/proxy.schema.json", config::schema_proxy()),
    ] {
        let printed = format!("{}\n", serde_json::to_string_pretty(&schema).unwrap());
        if std::env::var_os("UPDATE_SCHEMAS").is_some() {
            fs::write(repository(file), &printed).unwrap();
        }
        let published = fs::read_to_string(repository(file)).unwrap();
        assert!(published == printed, "{file}: run with UPDATE_SCHEMAS=1 and commit what changed");
        assert_eq!(schema["additionalProperties"], false);
    }
}

// ---------------------------------------------------------------------------------------------- wrong files

#[test]
fn a_project_is_told_all_its_faults_at_once() {
    let machine = Machine::new();
    machine.write("empty", " \n");
    let text = "\
project: Shop
multi_clowd: {}
multi_cloud:
  enabled: yes
  connections:
    - { from: aws_us_east_1, to: azure_eastuz, type: vpn }
    - { from: aws_us_east_1, to: azure_eastus, type: vnp, bandwidth: fast }
services:
  data-intelligence:
    endpoints:
      - { id: a, url: \"https://data.example/path\", provider: azure, region: eastus }
      - { id: a, url: \"https://data.example\", provider: azure, region: eastus }
      - { id: a, url: \"https://data2.example\", provider: azure, region: eastus, weight: -1 }
      - { url: \"http://data3.example\", provider: azure }
    scopes: [read:data, write:query]
    scopes: [read:data, write:query]
    timeouts: { connect: 3 sec onds, request: 0s }
    retries: { max_attempts: 0, backoff: { base: 2s, max: 1s } }
  reports:
    endpoints:
      - { url: \"https://data.example:8443\", provider: aws, region: us-east-1 }
      - { url: \"http://10.0.0.1\", provider: aws, region: us-east-1 }
  infrar-control: {}
permissions:
  web-application:
    data-inteligence: [read:data]
    data-intelligence: [read:dta, admin]
    reports: read
identities:
  web-application: { client_secret_file: secrets/none }
  background-workers: { client_secret_file: empty }
  other: {}
  nothing:
  half: { issuer: \"http://oidc.example\" }
  wrong: s3cr3t
issuers:
  - { issuer: x, jwks_uri: \"https://u:p4ssw0rd@x.example\" }
  - { issuer: x }
mode: learning
";
    let told = machine.wrong_project(text);
    assert!(!told.contains("s3cr3t") && !told.contains("p4ssw0rd"), "{told}");
    assert_eq!(told, WRONG_PROJECT.trim_end());
}

const WRONG_PROJECT: &str = "\
project.yaml:1:10: project: found \"Shop\"; write a name of a-z, 0-9 and -, such as data-intelligence
project.yaml:2:1: multi_clowd: found an unknown key; write multi_cloud
project.yaml:4:12: multi_cloud.enabled: found \"yes\"; write true
project.yaml:6:34: multi_cloud.connections[0].to: found \"azure_eastuz\", a place without endpoints; write azure_eastus
project.yaml:7:54: multi_cloud.connections[1].type: found \"vnp\"; write public, vpn or private_peering
project.yaml:7:70: multi_cloud.connections[1].bandwidth: found \"fast\"; write bits per second, such as 500mbps, 1gbps or 10gbps
project.yaml:11:23: services.data-intelligence.endpoints[0].url: found \"https://data.example/path\"; leave out path, query and user: write https://host or https://host:port
project.yaml:13:15: services.data-intelligence.endpoints[2].id: found a second \"a\"; give each endpoint of a service its own id
project.yaml:13:89: services.data-intelligence.endpoints[2].weight: found \"-1\"; write a whole number from 0 to 1000000
project.yaml:14:9: services.data-intelligence.endpoints[3].region: found nothing; write a region as its provider does, such as us-east-1
project.yaml:16:5: services.data-intelligence.scopes: found this key a second time; keep one of them; the first is on line 15
project.yaml:17:26: services.data-intelligence.timeouts.connect: found \"3 sec onds\"; write a length of time above zero, such as 25ms, 5s or 7d (at most 366d)
project.yaml:17:47: services.data-intelligence.timeouts.request: found \"0s\"; write a length of time above zero, such as 25ms, 5s or 7d (at most 366d)
project.yaml:18:30: services.data-intelligence.retries.max_attempts: found \"0\"; write a whole number from 1 to 10
project.yaml:18:42: services.data-intelligence.retries.backoff: found a base that is longer than max; write a base of at most max
project.yaml:21:16: services.reports.endpoints[0].url: found \"https://data.example:8443\", whose host belongs to data-intelligence; give each service a host of its own
project.yaml:22:16: services.reports.endpoints[1].url: found \"http://10.0.0.1\"; write https:// (tokens travel over TLS only), or auth_method: none
project.yaml:23:3: services.infrar-control: found the reserved name \"infrar-control\"; write a name that does not begin with infrar
project.yaml:26:5: permissions.web-application.data-inteligence: found \"data-inteligence\", which is no service of this project; write data-intelligence
project.yaml:27:25: permissions.web-application.data-intelligence[0]: found \"read:dta\", a scope that data-intelligence does not list; write read:data, or add it to services.data-intelligence.scopes
project.yaml:27:35: permissions.web-application.data-intelligence[1]: found \"admin\", a scope that data-intelligence does not list; add it to services.data-intelligence.scopes
project.yaml:28:14: permissions.web-application.reports: found \"read\"; write a list: [first, second]
project.yaml:30:42: identities.web-application.client_secret_file: found \"secrets/none\", which does not exist; write the path of a file this user may read
project.yaml:31:45: identities.background-workers.client_secret_file: found \"empty\", which is empty; put the secret there
project.yaml:32:10: identities.other: found no proof; write client_secret_file, client_secret_sha256, or issuer and subject
project.yaml:33:10: identities.nothing: found no proof; write client_secret_file, client_secret_sha256, or issuer and subject
project.yaml:34:9: identities.half: found issuer; write client_secret_file, client_secret_sha256, or issuer and subject
project.yaml:35:10: identities.wrong: found a single value or list; write a map; its keys are client_secret_file, client_secret_sha256, issuer, subject
project.yaml:37:28: issuers[0].jwks_uri: found \"https://…@x.example\"; write a URL, such as https://issuer.example/keys
project.yaml:38:5: issuers[1]: found no keys; write either jwks_uri or jwks_file
project.yaml:38:5: issuers[1]: found this issuer a second time; keep one entry per issuer
project.yaml:39:7: mode: found \"learning\"; write learn
";

#[test]
fn a_proxy_is_told_all_its_faults_at_once() {
    let machine = Machine::new();
    let (expired, its_key) = certificate(2011);
    machine.write("old.crt", &expired);
    machine.write("old.key", &its_key);
    let text = "\
role: sidecat
place: nowhere
control:
  url: http://control.example:7070
  credential: { client_secret_file: none, token_file: none }
  state_dir: /etc/infrar/ca.pem
outbound:
  listen: 15001x
  ports: { data: 127.0.0.1:15006, reports: 127.0.0.1:15006 }
  unknown_hosts: denny
  via: http://edge.example
inbound:
  - listen: 0.0.0.0:15006
    app: http://127.0.0.1:15006
    tls: off
    mtls: required
  - listen: 127.0.0.1:1
    tls: { cert_file: old.crt, key_file: /credentials/tls.key }
    rules:
      - { path: query, scopes: [a b] }
      - { path: /a*, public: true }
      - { path: /b, public: true, scopes: [] }
      - { path: /c }
      - { path: /a%zz, public: true }
  - listen: 127.0.0.1:2
    app: ftp://127.0.0.1
    tls: auto
    advertise: { url: \"http://me.example\", ttl: 1s }
  - listen: 127.0.0.1:3
    app: http://127.0.0.1:80
    tls: { cert_file: old.crt, key_file: old.key }
admin: { listen: 0.0.0.0:15000 }
trust: { ca_file: /credentials/client-secret }
shutdown: { grace: 30s }
limits: { streams: 0, header_bytes: many, idle_timeout: 999999d }
workers: 0
";
    assert_eq!(machine.wrong_proxy(text), WRONG_PROXY.trim_end());
}

const WRONG_PROXY: &str = "\
proxy.yaml:1:1: service: found nothing; write a name of a-z, 0-9 and -, such as data-intelligence
proxy.yaml:1:7: role: found \"sidecat\"; write sidecar
proxy.yaml:2:8: place: found \"nowhere\"; write provider and region, such as aws_us_east_1 or aws/us-east-1
proxy.yaml:4:8: control.url: found \"http://control.example:7070\"; write https:// (the credential travels over TLS only)
proxy.yaml:5:15: control.credential: found client_secret_file and token_file; write exactly one of client_secret_file, token_file, private_key_file
proxy.yaml:5:37: control.credential.client_secret_file: found \"none\", which does not exist; write the path of a file this user may read
proxy.yaml:6:14: control.state_dir: found \"/etc/infrar/ca.pem\", which is no folder; write the path of a folder this user may write to
proxy.yaml:8:11: outbound.listen: found \"15001x\"; write an address with a port, such as 127.0.0.1:15001
proxy.yaml:9:44: outbound.ports.reports: found \"127.0.0.1:15006\", which outbound.ports.data has; give each listener a port of its own
proxy.yaml:10:18: outbound.unknown_hosts: found \"denny\"; write deny
proxy.yaml:11:8: outbound.via: found \"http://edge.example\"; write https:// (tokens travel over TLS only)
proxy.yaml:13:13: inbound[0].listen: found \"0.0.0.0:15006\", which outbound.ports.data has; give each listener a port of its own
proxy.yaml:14:10: inbound[0].app: found \"http://127.0.0.1:15006\", which is this listener; write the port of the application
proxy.yaml:15:10: inbound[0].tls: found off on an address that others reach; write tls: { cert_file: …, key_file: … }, or platform where the cloud ends TLS
proxy.yaml:16:11: inbound[0].mtls: found \"required\", which this release cannot do yet; write off; callers prove themselves by token
proxy.yaml:17:5: inbound[1].app: found nothing; write the application's address, such as http://127.0.0.1:8080
proxy.yaml:18:23: inbound[1].tls.cert_file: found \"old.crt\", which expired on Dec 31 00:00:00 2011 +00:00; write the path of a certificate that is still valid
proxy.yaml:18:42: inbound[1].tls.key_file: found \"/credentials/tls.key\", which belongs to another certificate; write the key of \"old.crt\"
proxy.yaml:20:17: inbound[1].rules[0].path: found \"query\"; write a path such as /query, or a prefix such as /v1/*
proxy.yaml:20:33: inbound[1].rules[0].scopes[0]: found \"a b\"; write a scope without spaces, quotes and backslashes, such as read:data
proxy.yaml:21:17: inbound[1].rules[1].path: found \"/a*\"; put * only at the end, after a slash: /v1/*
proxy.yaml:22:9: inbound[1].rules[2]: found public and scopes; write either public: true or scopes: [ … ]
proxy.yaml:23:9: inbound[1].rules[3]: found neither public nor scopes; write either public: true or scopes: [ … ]
proxy.yaml:24:17: inbound[1].rules[4].path: found \"/a%zz\"; write a path that can be compared (the path cannot be decoded)
proxy.yaml:26:10: inbound[2].app: found \"ftp://127.0.0.1\"; write the application's address, such as http://127.0.0.1:8080 (h2c:// for HTTP/2 only)
proxy.yaml:27:10: inbound[2].tls: found auto, which this release cannot do yet; write tls: { cert_file: …, key_file: … }, or platform where the cloud ends TLS
proxy.yaml:28:23: inbound[2].advertise.url: found \"http://me.example\"; write https:// (tokens travel over TLS only)
proxy.yaml:28:49: inbound[2].advertise.ttl: found \"1s\"; write 5s to 1h
proxy.yaml:31:23: inbound[3].tls.cert_file: found \"old.crt\", which expired on Dec 31 00:00:00 2011 +00:00; write the path of a certificate that is still valid
proxy.yaml:32:18: admin.listen: found \"0.0.0.0:15000\"; write a loopback address, and admin.probes for probes from elsewhere
proxy.yaml:33:19: trust.ca_file: found \"/credentials/client-secret\", which holds no certificate; write the path of a certificate in PEM
proxy.yaml:34:11: shutdown: found a grace that is not shorter than the deadline; write a grace below the deadline
proxy.yaml:35:20: limits.streams: found \"0\"; write a whole number from 1 to 1000000
proxy.yaml:35:37: limits.header_bytes: found \"many\"; write at least 1KiB, such as 16KiB or 60KiB: no smaller head has room for a token
proxy.yaml:35:57: limits.idle_timeout: found \"999999d\"; write a length of time above zero, such as 25ms, 5s or 7d (at most 366d)
proxy.yaml:36:10: workers: found \"0\"; write auto, or a number from 1 to 1024
";

#[test]
fn an_issuer_that_would_make_its_callers_names_unclear_is_refused() {
    let machine = Machine::new();
    for issuer in ["https://idp.example#part", "https://idp.example/a b"] {
        let told = machine.wrong_project(&format!(
            "project: shop\nservices: {{}}\nissuers:\n  - {{ issuer: '{issuer}', jwks_uri: 'https://idp.example/keys' }}\n"
        ));
        assert!(told.contains("project.yaml:4:15: issuers[0].issuer: found"), "{told}");
        assert!(told.contains("write it without spaces and #"), "{told}");
    }
}

#[test]
fn what_cannot_start_is_a_fault_of_the_file() {
    let machine = Machine::new();
    let base = "service: a\nplace: aws_us_east_1\n";
    let credential = |credential: &str, more: &str| {
        machine.wrong_proxy(&format!(
            "{base}control: {{ url: \"https://c.example\", credential: {{ {credential}: /credentials/client-secret }}{more} }}\n"
        ))
    };
    for kind in ["token_file", "private_key_file"] {
        let told = credential(kind, "");
        let fault = format!(
            "control.credential.{kind}: found {kind}, which this release cannot do yet; write client_secret_file: with a shared secret"
        );
        assert!(told.starts_with("proxy.yaml:3:") && told.ends_with(&fault), "{told}");
    }
    // Below a file no folder can be made, whoever asks.
    let told = credential("client_secret_file", ", state_dir: /etc/infrar/ca.pem/state");
    let fault = "control.state_dir: found \"/etc/infrar/ca.pem/state\", which is no folder";
    assert!(told.contains(fault), "{told}");
    // Neither in a file system that takes none: /proc, for root too.
    let credentials = machine.path("credentials").display().to_string();
    let text = sidecar("  state_dir: /proc/x\n").replace("/credentials", &credentials);
    let file = machine.write("proxy.yaml", &text);
    let told = machine.told(&config::load_proxy(Some(&file), iter::empty(), &[]).unwrap_err());
    let fault =
        "proxy.yaml:6:14: control.state_dir: found \"/proc/x\", where nothing can be kept: ";
    assert!(told.starts_with(fault), "{told}");
    // One that can be used is left as it was.
    assert!(machine.proxy(&sidecar("  state_dir: /var/lib/infrar\n")).is_ok());
    assert!(!machine.path("var").exists());
}

#[test]
fn an_edge_has_a_public_listener_and_no_application() {
    let machine = Machine::new();
    assert_eq!(
        machine.wrong_proxy(&sidecar("role: edge\n")),
        "proxy.yaml:1:1: inbound: found nothing; write the listener for callers: { listen: 0.0.0.0:443, tls: { cert_file: …, key_file: … } }"
    );
    assert_eq!(
        machine.wrong_proxy(&sidecar(
            "role: edge\ninbound: { tls: platform, app: \"http://127.0.0.1\" }\n"
        )),
        "proxy.yaml:7:32: inbound.app: found \"http://127.0.0.1\"; leave it out: an edge forwards to the services of its place"
    );
}

#[test]
fn a_proxy_has_one_registry_and_that_is_checked_too() {
    let machine = Machine::new();
    let base = "service: a\nplace: aws_us_east_1\n";
    assert_eq!(
        machine.wrong_proxy(&format!("{base}project: none.yaml\n")),
        "proxy.yaml:3:10: project: found \"none.yaml\", which does not exist; write the path of a project.yaml"
    );
    machine.write("p.yaml", "project: shop\nservices: { reports: { scopes: x } }\nidentities: { a: { client_secret_file: none } }\n");
    assert_eq!(
        machine.wrong_proxy(&format!("{base}project: p.yaml\n")),
        "p.yaml:2:32: services.reports.scopes: found \"x\"; write a list: [first, second]"
    );
    // A proxy does not need the secrets of the project.
    machine.write("p.yaml", "project: shop\nservices: { reports: {} }\nidentities: { a: { client_secret_file: none } }\n");
    let outbound = "outbound: { ports: { report: 127.0.0.1:4000 } }\n";
    assert_eq!(
        machine.wrong_proxy(&format!("{base}project: p.yaml\n{outbound}")),
        "proxy.yaml:4:22: outbound.ports.report: found \"report\", which is no service of the project; write reports"
    );
    assert!(machine.proxy(&format!("{base}project: p.yaml\n")).is_ok());
    assert_eq!(
        machine.wrong_proxy(&sidecar("project: p.yaml\n")),
        "proxy.yaml:6:10: project: found a project beside control; keep control, or project for a proxy without a control plane"
    );
}

#[test]
fn a_file_that_is_too_large_or_no_text_is_refused() {
    let machine = Machine::new();
    let large = format!("project: shop\n#{}\n", "x".repeat(32 << 20));
    assert_eq!(
        machine.wrong_project(&large),
        "project.yaml: found a file which cannot be read: it is larger than 32 MiB; name a YAML file this user may read"
    );
    fs::write(machine.path("project.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    let faults = config::load_project(&machine.path("project.yaml")).map(|_| ()).unwrap_err();
    assert_eq!(
        machine.told(&faults),
        "project.yaml: found a file which is no UTF-8 text; name a YAML file this user may read"
    );
}

// ---------------------------------------------------------------------------------------------- anything at all

/// Pieces that configurations are made of, right and wrong, to be put together at random.
fn any_configuration() -> impl Strategy<Value = String> {
    let words = prop::sample::select(vec![
        "project",
        "services",
        "a",
        "endpoints",
        "url",
        "https://a.example",
        "provider",
        "aws",
        "region",
        "null",
        "permissions",
        "identities",
        "client_secret_file",
        "role",
        "edge",
        "inbound",
        "outbound",
        "listen",
        "127.0.0.1:0",
        "tls",
        "off",
        "control",
        "credential",
        "limits",
        "1",
        "-1",
        "true",
        "5s",
        "issuers",
        "hedge",
        "after",
        "p95",
        "budget",
        "2%",
        "multi_cloud",
        "connections",
        "from",
        "to",
        "aws_us_east_1",
        "type",
        "vpn",
        "rules",
        "path",
        "/*",
        "mode",
        "learn",
        "place",
        "service",
        "ports",
        "app",
        "é",
        "\u{0}",
    ]);
    let leaf = words.clone().prop_map(|word| serde_json::to_string(word).unwrap());
    let value = leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4)
                .prop_map(|items| format!("[{}]", items.join(", "))),
            prop::collection::vec((words.clone(), inner), 0..6).prop_map(|entries| {
                let entry = |(key, value): &(&str, String)| {
                    format!("{}: {value}", serde_json::to_string(key).unwrap())
                };
                format!("{{{}}}", entries.iter().map(entry).collect::<Vec<_>>().join(", "))
            }),
        ]
    });
    prop_oneof![value, any::<String>()]
}

/// One of the examples with a line changed, moved or cut.
fn a_broken_example() -> impl Strategy<Value = String> {
    let examples = ["project.example.yaml", "sidecar.yaml", "edge.yaml", "dev.yaml"]
        .map(|file| fs::read_to_string(repository("config").join(file)).unwrap());
    let example = prop::sample::select(examples.to_vec());
    (example, any::<prop::sample::Index>(), "[ a-z:{}\\[\\]\"#&*!|-]{0,6}").prop_map(
        |(example, at, junk)| {
            let places: Vec<usize> = example.char_indices().map(|(at, _)| at).collect();
            let (head, tail) = example.split_at(places[at.index(places.len())]);
            format!("{head}{junk}{}", tail.chars().skip(junk.len() / 2).collect::<String>())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_text_panics_the_readers(text in prop_oneof![any_configuration(), a_broken_example()]) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file.yaml");
        fs::write(&file, &text).unwrap();
        // A refusal has at least one fault, and each of them says something.
        if let Err(faults) = config::load_project_under(folder.path(), &file) {
            prop_assert!(!faults.0.is_empty() && faults.0.iter().all(|fault| !fault.advice.is_empty()));
            prop_assert!(!faults.0.iter().any(|fault| fault.advice.contains("report this")), "{text}");
        }
        if let Err(faults) = config::load_proxy_under(folder.path(), Some(&file), iter::empty(), &[]) {
            prop_assert!(!faults.0.is_empty() && faults.0.iter().all(|fault| !fault.advice.is_empty()));
            prop_assert!(!faults.0.iter().any(|fault| fault.advice.contains("report this")), "{text}");
        }
    }

    #[test]
    fn no_variable_panics_the_reader(
        name in prop::sample::select(vec!["INFRAR_INBOUND", "INFRAR_CONTROL", "INFRAR_OUTBOUND_PORTS", "INFRAR_INBOUND_TLS", "INFRAR_CONTROL_URL", "INFRAR_X"]),
        text in any_configuration(),
    ) {
        let variables = [(name.to_owned(), text)];
        // One variable alone is never enough.
        prop_assert!(config::load_proxy(None, variables.into_iter(), &[]).is_err());
    }
}
