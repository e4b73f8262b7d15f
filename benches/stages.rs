//! What the stages of a walk cost between a request's head and its first attempt: the look-up of its service, and the
//! headers on their way out and in. `verify` has the token, `codec` the bytes.

#![expect(clippy::expect_used, reason = "a bench that cannot be set up should end")]

use std::{fmt::Write, hint::black_box, rc::Rc, sync::Arc};

use arc_swap::ArcSwap;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::BytesMut;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use http::{HeaderValue, header};
use infrar::{
    api::Catalog,
    config::load_registry,
    cost::Meter,
    discovery::Directory,
    http1::{HeadLimits, parse_request},
    identity::{
        Action, Claims, Grant, Jwks, KeySet, NoTokens, Rules, Strictness, Tokens, Trusted,
        Verifier, admit,
    },
    net::{ClientTls, Resolver},
    proxy::{
        Ends, Hop, Limits, OutboundSettings, Parts, Role, Routes, Settings, UnknownHosts, Ward,
    },
    runtime::{Clock, Supervisor},
    telemetry::Registry,
    wire::{Body, Request},
};
use serde_json::json;
use tokio::{
    runtime::{Handle, Runtime},
    sync::watch,
};

/// A call as the application beside us makes it, through `HTTP_PROXY`.
const CALL: &str = "POST http://service-500/query?limit=100 HTTP/1.1\r\n\
    Host: service-500\r\n\
    User-Agent: python-httpx/0.28.1\r\n\
    Accept: application/json\r\n\
    Accept-Encoding: gzip, deflate, br, zstd\r\n\
    Connection: keep-alive\r\n\
    Content-Type: application/json\r\n\
    Content-Length: 27\r\n\r\n";

/// The same call as it arrives from another proxy.
const ARRIVAL: &str = "POST /query?limit=100 HTTP/1.1\r\n\
    Host: service-500.example\r\n\
    User-Agent: python-httpx/0.28.1\r\n\
    Accept: application/json\r\n\
    Accept-Encoding: gzip, deflate, br, zstd\r\n\
    Content-Type: application/json\r\n\
    Content-Length: 27\r\n\
    X-Request-Id: 0199d3f07c1e7d529c1f6f1f5a3a2b10\r\n\
    Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00\r\n\
    Via: 1.1 infrar-00000001\r\n\
    Forwarded: host=service-500;proto=http\r\n\
    Authorization: Bearer x.y.z\r\n\r\n";

fn head(text: &str) -> Request {
    let head = parse_request(&mut BytesMut::from(text), HeadLimits::default());
    let parsed = head.expect("valid").expect("whole");
    let (method, uri, version) = (parsed.method, parsed.uri, parsed.version);
    Request { method, uri, version, fields: parsed.fields, body: Body::Empty }
}

/// A project of a thousand services, all of which `web` may call.
fn project() -> String {
    let mut services = "project: shop\nservices:\n".to_owned();
    let mut permissions = "permissions:\n  web:\n".to_owned();
    for number in 0..1000 {
        let written = writeln!(
            services,
            "  service-{number}:\n    endpoints: [{{ url: 'https://service-{number}.example', \
             provider: aws, region: us-east-1 }}]\n    scopes: [read]"
        );
        let permitted = writeln!(permissions, "    service-{number}: [read]");
        written.and(permitted).expect("a string takes it");
    }
    services + &permissions
}

/// A proxy that listens nowhere.
fn parts() -> Parts {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("project.yaml");
    std::fs::write(&file, project()).expect("a writable folder");
    let project = load_registry(&file).expect("a valid project").project;
    let directory = Arc::new(Directory::default());
    directory.publish(Catalog { revision: 1, issuer: String::new(), project });
    let nowhere = "127.0.0.1:0".parse().expect("an address");
    let settings = Settings {
        role: Role::Sidecar,
        service: "web".parse().expect("a name"),
        place: Some("aws_us_east_1".parse().expect("a place")),
        zone: None,
        outbound: Some(OutboundSettings {
            listen: nowhere,
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
        directory,
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

fn route(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let routes = Routes::new(parts()).expect("there is a way out");
    let mut group = criterion.benchmark_group("route");
    for (name, host) in [("name", "service-500"), ("long", "service-500.infrar.internal:80")] {
        let call = head(&format!("GET /query HTTP/1.1\r\nhost: {host}\r\n\r\n"));
        routes.find(&call).expect("it is one of the thousand");
        group.bench_function(name, |bench| bench.iter(|| routes.find(black_box(&call))));
    }
    let call = head(CALL);
    group.bench_function("absolute", |bench| bench.iter(|| routes.find(black_box(&call))));
    group.finish();
}

/// What a caller showed, and what it may.
fn shown() -> (Rc<Claims>, Grant) {
    let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("32 bytes are a seed");
    let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let (issuer, now) = ("https://control.example:7070", 1_800_000_000);
    let keys = json!({"keys": [{
        "kty": "OKP", "crv": "Ed25519", "kid": "bench", "x": encode(pair.public_key().as_ref()),
    }]});
    let keys = Jwks::fixed(issuer.into(), KeySet::from_json(&keys).expect("the key was just made"));
    let trusted = Trusted { issuer: issuer.into(), ours: true, audiences: Vec::new(), keys };
    let header = json!({"typ": "at+jwt", "alg": "EdDSA", "kid": "bench"}).to_string();
    let payload = json!({
        "iss": issuer, "sub": "web-application", "aud": "service-500", "exp": now + 3600,
        "iat": now, "nbf": now, "jti": "0199d3f0-7c1e-7d52-9c1f-6f1f5a3a2b10",
        "scope": "read:data write:query",
    });
    let message =
        format!("{}.{}", encode(header.as_bytes()), encode(payload.to_string().as_bytes()));
    let token = format!("{message}.{}", encode(pair.sign(message.as_bytes()).as_ref()));
    let claims = Verifier::new(vec![trusted]).verify(token.as_bytes(), &["service-500"], now);
    let claims = claims.expect("the token is valid");
    let granted = claims.scopes().clone();
    let grant = admit(&claims, Action::AnyScope, Some(&granted), None, Strictness::Enforce);
    (Rc::new(claims), grant.expect("it has a scope"))
}

fn dress(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("headers");
    let hop = Hop::new(None, false);
    let bearer = HeaderValue::from_static("Bearer aGVhZA.cGF5bG9hZA.c2lnbmF0dXJl");
    let host = HeaderValue::from_static("service-500.example");
    group.bench_function("dress", |bench| {
        bench.iter_batched_ref(
            || head(CALL),
            |call| {
                hop.dress(call).expect("it has not been here");
                call.fields.set(header::HOST, host.clone());
                call.fields.set(header::AUTHORIZATION, bearer.clone())
            },
            BatchSize::SmallInput,
        );
    });
    let peer = "192.0.2.1:40000".parse().expect("an address");
    let hop = Hop::new(Some(peer), true);
    let (claims, grant) = shown();
    group.bench_function("undress", |bench| {
        bench.iter_batched_ref(
            || (head(ARRIVAL), grant.clone(), Rc::clone(&claims)),
            |(arrival, grant, claims)| {
                hop.undress(arrival, grant.clone(), Some(Rc::clone(claims)))
                    .expect("it has not been here");
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

/// Rules are looked through for every request that arrives.
fn rules(criterion: &mut Criterion) {
    use infrar::identity::{Access, Rule};
    let rule = |path: &str, access: Access| {
        let path = path.parse().expect("a plain path");
        Rule { path, methods: None, access }
    };
    let mut list = vec![rule("/healthz", Access::Public)];
    for number in 0..20 {
        list.push(rule(&format!("/v1/thing-{number}/*"), Access::Scopes(Default::default())));
    }
    list.push(rule("/query", Access::Scopes(Default::default())));
    let rules = Rules::new(Some(list)).expect("plain rules");
    let mut group = criterion.benchmark_group("rules");
    for (name, path) in [("plain", "/query"), ("encoded", "/v1/%74hing-19/../../query")] {
        assert!(matches!(rules.action(&http::Method::POST, path), Action::Scopes(_)), "{path}");
        group.bench_function(name, |bench| {
            bench.iter(|| rules.action(&http::Method::POST, black_box(path)));
        });
    }
    group.finish();
}

criterion_group!(benches, route, dress, rules);
criterion_main!(benches);
