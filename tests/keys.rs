//! Keys of an issuer that change while calls go on: a valid token is never refused, one whose key has gone always is.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::KeyPair;
use serde_json::{Value, json};
use support::{Folder, Infrar, Line, Origin, Said, Visit, free_ports, get, talk, until};
use tokio::{
    sync::Barrier,
    time::{Duration, Instant, MissedTickBehavior, interval, sleep},
};

const ISSUER: &str = "https://issuer.example";

/// A callee's sidecar that trusts an issuer whose keys are fetched, that issuer, and the app.
struct Callee {
    infrar: Infrar,
    inbound: SocketAddr,
    admin: SocketAddr,
    app: Origin,
    issuer: Origin,
    published: Arc<Mutex<Value>>,
    #[expect(dead_code, reason = "held for its Drop")]
    folder: Folder,
}

impl Callee {
    /// The issuer takes `slow` for each answer.
    async fn open(keys: &[&Key], slow: Duration) -> Self {
        let folder = Folder::new();
        let [inbound, admin] = free_ports();
        let published = Arc::new(Mutex::new(set(keys)));
        let shown = Arc::clone(&published);
        let issuer = Origin::scripted(move |visit| publish(visit, Arc::clone(&shown), slow)).await;
        let app = Origin::plain("reached").await;
        folder.write(
            "project.yaml",
            &format!(
                "project: shop\nservices:\n  data:\n    scopes: [use]\n    endpoints:\n      \
                 - {{ url: 'https://localhost:{}', provider: aws, region: us-east-1 }}\n\
                 issuers:\n  - {{ issuer: '{ISSUER}', jwks_uri: 'http://{}/jwks', audiences: [data] }}\n",
                inbound.port(),
                issuer.at
            ),
        );
        folder.write(
            "proxy.yaml",
            &format!(
                "service: data\nplace: aws_us_east_1\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
                 inbound: {{ listen: '{inbound}', app: 'http://{}', tls: off, rules: [{{ path: /*, scopes: [use] }}] }}\n\
                 log: {{ access: false }}\n",
                app.at
            ),
        );
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, inbound, admin, app, issuer, published, folder }
    }

    fn publish(&self, keys: &[&Key]) {
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = set(keys);
    }

    async fn asks(&self, token: &str) -> Said {
        talk(self.inbound, call(token).replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n")).await
    }
}

/// Answers with the keys as they were when it was asked.
async fn publish(mut visit: Visit, published: Arc<Mutex<Value>>, slow: Duration) {
    while visit.head().await.is_some() {
        let keys = published.lock().unwrap_or_else(PoisonError::into_inner).to_string();
        sleep(slow).await;
        let length = keys.len();
        visit
            .say(format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{keys}"))
            .await;
    }
}

/// A signing key under its name.
struct Key {
    name: &'static str,
    pair: KeyPair,
}

impl Key {
    fn new(name: &'static str) -> Self {
        Self { name, pair: KeyPair::generate().expect("a key") }
    }

    /// A token of its own for each number.
    fn token(&self, number: usize) -> String {
        let header = Header { kid: Some(self.name.to_owned()), ..Header::new(Algorithm::ES256) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let claims = json!({"iss": ISSUER, "sub": "web", "aud": "data", "exp": now + 600, "iat": now, "scope": "use", "jti": number});
        encode(&header, &claims, &EncodingKey::from_ec_der(&self.pair.serialize_der()))
            .expect("a token")
    }
}

fn set(keys: &[&Key]) -> Value {
    let jwk = |key: &&Key| {
        let point = key.pair.public_key_raw();
        let part = |from: usize| URL_SAFE_NO_PAD.encode(&point[from..from + 32]);
        json!({"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": key.name, "x": part(1), "y": part(33)})
    };
    json!({"keys": keys.iter().map(jwk).collect::<Vec<_>>()})
}

fn call(token: &str) -> String {
    format!("GET / HTTP/1.1\r\nhost: data\r\nauthorization: Bearer {token}\r\n\r\n")
}

/// About a thousand calls a second, whose tokens are signed by whichever key signs at the moment.
struct Load {
    tasks: Vec<tokio::task::JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    signs: Arc<Mutex<Arc<Key>>>,
}

impl Load {
    const CALLERS: usize = 16;

    async fn on(at: SocketAddr, key: &Arc<Key>) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let served = Arc::<AtomicUsize>::default();
        let signs = Arc::new(Mutex::new(Arc::clone(key)));
        let begin = Arc::new(Barrier::new(Self::CALLERS));
        let tasks = (0..Self::CALLERS)
            .map(|caller| {
                let (stop, served, signs, begin) =
                    (stop.clone(), served.clone(), signs.clone(), begin.clone());
                tokio::spawn(async move {
                    let mut line = Line::to(at).await;
                    begin.wait().await;
                    let mut ticks = interval(Duration::from_millis(Self::CALLERS as u64));
                    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    let mut number = 0;
                    while !stop.load(Ordering::Relaxed) {
                        ticks.tick().await;
                        let key = signs.lock().unwrap_or_else(PoisonError::into_inner).clone();
                        // A token serves four calls: the first is verified, the others are remembered.
                        let token = key.token(caller * 1_000_000 + number / 4);
                        line.say(call(&token)).await;
                        let said = line.answer().await;
                        assert_eq!(
                            (said.status(), &*said.body),
                            (200, "reached"),
                            "{} {said:?}",
                            key.name
                        );
                        served.fetch_add(1, Ordering::Relaxed);
                        number += 1;
                    }
                })
            })
            .collect();
        let load = Self { tasks, stop, served, signs };
        load.another(500).await;
        load
    }

    /// Waits for so many calls more.
    async fn another(&self, count: usize) {
        let mark = self.served.load(Ordering::Relaxed);
        until("load went on", async || {
            self.served.load(Ordering::Relaxed) > mark + count
                || self.tasks.iter().any(tokio::task::JoinHandle::is_finished)
        })
        .await;
    }

    fn signs(&self, key: &Arc<Key>) {
        *self.signs.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(key);
    }

    /// Ends; every call must have been served.
    async fn off(self, callee: &Callee) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            assert!(task.await.is_ok(), "{}", callee.infrar.log());
        }
        self.served.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_published_in_the_moment_it_signs_is_believed_at_once() {
    let (old, new) = (Arc::new(Key::new("k1")), Arc::new(Key::new("k2")));
    let callee = Callee::open(&[&old], Duration::ZERO).await;
    let began = Instant::now();
    let load = Load::on(callee.inbound, &old).await;
    callee.publish(&[&old, &new]);
    load.signs(&new);
    load.another(1000).await;
    // Nor is the old one forgotten.
    load.signs(&old);
    load.another(500).await;
    load.signs(&new);
    load.another(500).await;
    let served = load.off(&callee).await;
    eprintln!("{served} calls in {:?}", began.elapsed());
    assert_eq!(callee.app.heads().len(), served);
    // However many missed the key, it was asked for once.
    assert_eq!(callee.issuer.heads().len(), 2, "{:?}", callee.issuer.heads());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_slow_issuer_is_asked_for_a_new_key_calls_under_the_old_one_go_on() {
    let (old, new) = (Arc::new(Key::new("k1")), Arc::new(Key::new("k2")));
    let callee = Callee::open(&[&old], Duration::from_secs(1)).await;
    let load = Load::on(callee.inbound, &old).await;
    callee.publish(&[&old, &new]);
    let fresh = new.token(0);
    let asked = Instant::now();
    let mark = load.served.load(Ordering::Relaxed);
    let said = callee.asks(&fresh).await;
    assert_eq!(said.status(), 200, "{said:?}");
    assert!(asked.elapsed() > Duration::from_millis(900), "{:?}", asked.elapsed());
    assert!(load.served.load(Ordering::Relaxed) > mark + 100);
    load.off(&callee).await;
}

#[tokio::test]
async fn a_token_whose_key_was_taken_away_is_refused_however_often_it_had_been_accepted() {
    let (old, new) = (Key::new("k1"), Key::new("k2"));
    let callee = Callee::open(&[&old], Duration::ZERO).await;
    let token = old.token(1);
    // On many connections, so that every worker remembers it.
    let mut lines = Vec::new();
    for _ in 0..8 {
        let mut line = Line::to(callee.inbound).await;
        for _ in 0..3 {
            line.say(call(&token)).await;
            assert_eq!(line.answer().await.status(), 200, "{}", callee.infrar.log());
        }
        lines.push(line);
    }
    callee.publish(&[&new]);
    assert_eq!(callee.asks(&new.token(2)).await.status(), 200, "{}", callee.infrar.log());
    let seen = callee.app.heads().len();
    for line in &mut lines {
        line.say(call(&token)).await;
        let said = line.answer().await;
        assert_eq!((said.status(), said.code()), (401, "token-invalid"), "{said:?}");
    }
    assert_eq!(callee.app.heads().len(), seen);
}

#[tokio::test]
async fn an_issuer_that_publishes_nothing_takes_nothing_away() {
    let (key, unknown) = (Key::new("k1"), Key::new("k2"));
    let callee = Callee::open(&[&key], Duration::ZERO).await;
    assert_eq!(callee.asks(&key.token(1)).await.status(), 200);
    callee.publish(&[]);
    // A key that is not known makes the callee ask, and nothing is what it hears.
    assert_eq!(callee.asks(&unknown.token(2)).await.status(), 401);
    assert_eq!(callee.issuer.heads().len(), 2, "{:?}", callee.issuer.heads());
    let failures = format!("infrar_jwks_failures_total{{issuer=\"{ISSUER}\"}} 1");
    until("the failure is counted", async || {
        let metrics = get(callee.admin, "localhost", "/metrics").await;
        metrics.body.lines().any(|line| line == failures)
    })
    .await;
    assert_eq!(callee.asks(&key.token(3)).await.status(), 200, "{}", callee.infrar.log());
}

#[tokio::test]
async fn strangers_who_invent_keys_make_nobody_ask_the_issuer_again_and_again() {
    let key = Key::new("k1");
    let callee = Callee::open(&[&key], Duration::ZERO).await;
    let stranger = Key::new("k2");
    let mut line = Line::to(callee.inbound).await;
    for number in 0..200 {
        line.say(call(&stranger.token(number))).await;
        let said = line.answer().await;
        assert_eq!((said.status(), said.code()), (401, "token-invalid"), "{said:?}");
        line.say(call(&key.token(number))).await;
        assert_eq!(line.answer().await.status(), 200);
    }
    for name in ["k3", "k4", "k5"] {
        assert_eq!(callee.asks(&Key::new(name).token(0)).await.status(), 401);
    }
    assert_eq!(callee.issuer.heads().len(), 2, "{:?}", callee.issuer.heads());
}
