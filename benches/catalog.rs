//! What a large project costs a proxy: a change of one endpoint among a hundred thousand, the look-up of a service by
//! name and by host, and a worker's view of the next snapshot. `cargo bench --bench catalog -- memory` prints what the
//! project takes in memory instead.

#![expect(clippy::expect_used, reason = "a bench that cannot be set up should end")]

use std::{collections::BTreeMap, hint::black_box, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use bytes::BytesMut;
use criterion::{BatchSize, Criterion};
use infrar::{
    api::{Catalog, Change, Patch},
    cost::Meter,
    discovery::Directory,
    http1::{HeadLimits, parse_request},
    identity::{NoTokens, Tokens, Verifier},
    model::{
        Endpoint, Enforcement, NetworkMode, Networking, Project, ScopeSet, Service, ServiceName,
    },
    net::{ClientTls, Resolver},
    proxy::{Ends, Limits, OutboundSettings, Parts, Role, Routes, Settings, UnknownHosts, Ward},
    runtime::{Clock, Supervisor},
    telemetry::Registry,
    wire::{Body, Request},
};
use serde_json::json;
use tokio::{
    runtime::{Handle, Runtime},
    sync::watch,
};

/// The binary's own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The endpoints of each service.
const ENDPOINTS: usize = 10;
/// A large project.
const LARGE: usize = 10_000;

fn name(number: usize) -> ServiceName {
    format!("service-{number}").parse().expect("a name")
}

fn endpoint(service: usize, number: usize, weight: u32) -> Endpoint {
    let (provider, region) =
        if number.is_multiple_of(2) { ("aws", "us_east_1") } else { ("azure", "eastus") };
    let json = json!({
        "id": format!("endpoint-{number}"), "url": format!("https://service-{service}-{number}.example"),
        "internal_url": format!("https://10.{}.{}.{number}:8443", service / 250, service % 250),
        "private_url": null, "place": format!("{provider}_{region}"), "zone": null, "auth_method": "bearer_token",
        "weight": weight, "state": "active",
    });
    serde_json::from_value(json).expect("an endpoint")
}

/// A project of as many services, all of which `web` may call, as a control plane sends it.
fn catalog(services: usize) -> String {
    let service = |number| {
        let endpoints = (0..ENDPOINTS).map(|it| endpoint(number, it, 100)).collect();
        (name(number), Arc::new(Service { endpoints, ..Service::default() }))
    };
    let scopes = ScopeSet::parse_list("read").expect("a scope");
    let granted: BTreeMap<_, _> = (0..services).map(|it| (name(it), scopes.clone())).collect();
    let project = Project {
        name: "shop".parse().expect("a name"),
        networking: Networking {
            multi_cloud: true,
            default_mode: NetworkMode::Public,
            connections: Vec::new(),
        },
        services: (0..services).map(service).collect(),
        permissions: [("web".parse().expect("a name"), granted)].into(),
        issuers: Vec::new(),
        mode: Enforcement::Enforce,
    };
    let catalog = Catalog { revision: 1, issuer: "https://control.example".to_owned(), project };
    serde_json::to_string(&catalog).expect("it can be written")
}

fn read(text: &str) -> Catalog {
    serde_json::from_str(text).expect("it was just written")
}

/// What leads from one revision to the next: another weight of one endpoint.
fn change(revision: u64) -> Change {
    let number = usize::try_from(revision).unwrap_or_default() % LARGE;
    let endpoint = endpoint(number, 3, 50 + u32::try_from(revision % 7).unwrap_or_default());
    let patch = Patch::Endpoint {
        service: name(number),
        id: endpoint.id.clone(),
        endpoint: Some(Box::new(endpoint)),
    };
    Change { revision: revision + 1, etag: String::new(), patches: vec![patch] }
}

/// Takes a change over as the registry's source does.
fn follow(directory: &Directory) {
    let base = directory.base().expect("there is one");
    let next = change(base.revision).apply(&base).expect("it follows");
    directory.publish(next);
}

/// A proxy that listens nowhere.
fn parts(directory: &Arc<Directory>) -> Parts {
    let settings = Settings {
        role: Role::Sidecar,
        service: "web".parse().expect("a name"),
        place: Some("aws_us_east_1".parse().expect("a place")),
        zone: None,
        outbound: Some(OutboundSettings {
            listen: "127.0.0.1:0".parse().expect("an address"),
            ports: Default::default(),
            unknown_hosts: UnknownHosts::Deny,
            via: None,
            override_authorization: false,
        }),
        inbound: Vec::new(),
        limits: Limits::default(),
        tls: Arc::new(ClientTls::new(None).expect("the system's roots, when they are needed")),
        access: None,
    };
    let supervisor = Supervisor::new(Handle::current());
    let tokens =
        Tokens::new(Arc::new(NoTokens), Default::default(), supervisor.clone(), Clock::system());
    Parts {
        settings: watch::channel(Arc::new(settings)).1,
        directory: Arc::clone(directory),
        tokens: Arc::new(tokens),
        trust: Arc::new(ArcSwap::from_pointee(Verifier::new(Vec::new()))),
        resolver: Resolver::new(supervisor),
        meter: Arc::new(Meter::default()),
        registry: Arc::new(Registry::default()),
        ends: Ends::default(),
        ward: Arc::new(Ward::default()),
        own: Vec::new(),
    }
}

fn call(number: usize) -> Request {
    let text = format!("GET /query HTTP/1.1\r\nhost: service-{number}\r\n\r\n");
    let head = parse_request(&mut BytesMut::from(&*text), HeadLimits::default());
    let parsed = head.expect("valid").expect("whole");
    let (method, uri, version) = (parsed.method, parsed.uri, parsed.version);
    Request { method, uri, version, fields: parsed.fields, body: Body::Empty }
}

fn published(text: &str) -> Arc<Directory> {
    let directory = Arc::new(Directory::default());
    directory.publish(read(text));
    directory
}

/// The background core's part of a change, and that of a resync in which nothing else changed.
fn changes(criterion: &mut Criterion) {
    let text = catalog(LARGE);
    let mut group = criterion.benchmark_group("change");
    group.sample_size(20);
    let directory = published(&text);
    group.bench_function("one endpoint", |bench| bench.iter(|| follow(&directory)));
    let snapshot = directory.snapshot().expect("there is one");
    snapshot.service_of("service-5-3.example").expect("it has a host");
    group
        .bench_function("one endpoint, hosts asked for", |bench| bench.iter(|| follow(&directory)));
    let directory = published(&text);
    group.bench_function("all anew", |bench| {
        bench.iter_batched(
            || {
                let revision = directory.base().expect("there is one").revision + 1;
                Catalog { revision, ..read(&text) }
            },
            |next| directory.publish(next),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

/// A worker's part of a change, when it uses a hundred services.
fn survey(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let directory = published(&catalog(LARGE));
    let routes = Routes::new(parts(&directory)).expect("there is a way out");
    for number in 0..100 {
        routes.find(&call(number)).expect("it is one of them");
    }
    let mut group = criterion.benchmark_group("survey");
    group.bench_function("next snapshot", |bench| {
        bench.iter_batched(|| follow(&directory), |()| routes.refresh(), BatchSize::PerIteration);
    });
    group.finish();
}

fn look_up(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let mut group = criterion.benchmark_group("look-up");
    for services in [10, 1000, LARGE] {
        let directory = published(&catalog(services));
        let routes = Routes::new(parts(&directory)).expect("there is a way out");
        let call = call(services / 2);
        routes.find(&call).expect("it is one of them");
        group.bench_function(format!("name among {services}"), |bench| {
            bench.iter(|| routes.find(black_box(&call)));
        });
        let snapshot = directory.snapshot().expect("there is one");
        let host = format!("service-{}-3.example", services / 2);
        group.bench_function(format!("host among {services}"), |bench| {
            bench.iter(|| snapshot.service_of(black_box(&host)));
        });
    }
    group.finish();
}

/// What this process has in memory, in MiB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().unwrap_or(f64::NAN);
    kib / 1024.0
}

/// Prints what a large project takes, step by step.
fn memory() {
    let runtime = Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    // In another process: what writing it took would count.
    let me = std::env::current_exe().expect("this program");
    let written = std::process::Command::new(me)
        .args(["write", &file.path().to_string_lossy()])
        .status()
        .expect("it starts");
    assert!(written.success(), "the catalog was not written");
    let directory = Arc::new(Directory::default());
    let routes = Routes::new(parts(&directory)).expect("there is a way out");
    let told = |what: &str, before: f64| {
        let line = format!(
            "{what}: {:.1} MiB, {:.1} MiB more than before the project",
            resident(),
            resident() - before
        );
        #[expect(clippy::print_stdout, reason = "this is what it is for")]
        {
            println!("{line}");
        }
    };
    let before = resident();
    told("empty", before);
    {
        let text = std::fs::read_to_string(file.path()).expect("it was just written");
        directory.publish(read(&text));
    }
    told("published", before);
    for number in 0..100 {
        routes.find(&call(number)).expect("it is one of them");
    }
    told("a hundred services called", before);
    // Changes come over time, in which the allocator gives back what reading took.
    let changes = |count: usize| {
        for _ in 0..count {
            follow(&directory);
            routes.refresh();
            runtime.block_on(tokio::time::sleep(Duration::from_millis(30)));
        }
    };
    changes(100);
    told("after a hundred changes", before);
    let snapshot = directory.snapshot().expect("there is one");
    snapshot.service_of("service-5-3.example").expect("it has a host");
    told("with hosts", before);
    changes(100);
    told("after a hundred changes with hosts", before);
}

fn main() {
    let mut asked = std::env::args().skip(1);
    match asked.next().as_deref() {
        Some("memory") => memory(),
        Some("write") => {
            let path = asked.next().expect("a path");
            std::fs::write(path, catalog(LARGE)).expect("a writable file");
        }
        Some(_) | None => {
            let mut criterion = Criterion::default().configure_from_args();
            changes(&mut criterion);
            survey(&mut criterion);
            look_up(&mut criterion);
            criterion.final_summary();
        }
    }
}
