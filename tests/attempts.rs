//! What an attempt teaches about its endpoint however it ends, how often one request is sent, and whose time it took.
//!
//! Some of these stories let a little time pass: who waits for whom, and for how long, is what they are about.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use support::{
    Folder, Infrar, Line, Origin, Visit, free_ports, get, header, sidecar::Sidecar, until,
};
use tokio::{
    sync::Barrier,
    time::{Duration, Instant, sleep, timeout},
};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
/// So that all requests share their connections.
const ONE: &str = "workers: 1\n";

/// Asks for `path` and leaves after `patience`; the status, if an answer came before.
async fn impatient(at: std::net::SocketAddr, path: &str, patience: Duration) -> Option<u16> {
    let said = timeout(patience, get(at, "data", path)).await;
    said.ok().map(|said| said.status())
}

/// A number out of a line of the access log.
fn number(line: &str, name: &str) -> f64 {
    let value = line.split(&format!("\"{name}\":")).nth(1).expect("the line has it");
    let end = value.find([',', '}']).unwrap_or(value.len());
    value[..end].parse().expect("a number")
}

#[tokio::test]
async fn an_endpoint_that_hangs_is_left_alone_although_its_clients_do_not_wait_for_it() {
    let hangs = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&hangs);
    let fast = Origin::scripted(move |mut visit: Visit| {
        let hangs = Arc::clone(&seen);
        async move {
            while visit.head().await.is_some() {
                if hangs.load(Ordering::SeqCst) {
                    while visit.head().await.is_some() {}
                    return;
                }
                visit.say(OK).await;
            }
        }
    })
    .await;
    // It works, and is slower.
    let steady = Origin::scripted(|mut visit: Visit| async move {
        while visit.head().await.is_some() {
            sleep(Duration::from_millis(200)).await;
            visit.say(OK).await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[fast.at, steady.at], "")]).await;
    until("the fast one is known", async || {
        assert_eq!(get(sidecar.out, "data", "/").await.status(), 200);
        fast.heads().len() >= 2
    })
    .await;
    hangs.store(true, Ordering::SeqCst);
    let before = fast.heads().len();
    let mut lost = 0;
    for call in 0..6 {
        let path = format!("/call-{call}");
        if impatient(sidecar.out, &path, Duration::from_secs(1)).await.is_none() {
            lost += 1;
            // The proxy has noticed that its client left.
            sidecar.line_of_path(&path).await;
        }
    }
    assert!(lost <= 1 && fast.heads().len() <= before + 1, "{lost} calls were lost");
}

#[tokio::test]
async fn a_client_that_leaves_the_probe_of_a_circuit_does_not_shut_out_the_next() {
    let calls = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&calls);
    let service = Origin::scripted(move |mut visit: Visit| {
        let calls = Arc::clone(&seen);
        async move {
            while let Some(head) = visit.head().await {
                match calls.fetch_add(1, Ordering::SeqCst) {
                    0 => visit.say("HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n").await,
                    // The probe.
                    1 => while visit.head().await.is_some() {},
                    _ => {
                        visit.body(&head).await;
                        visit.say(OK).await;
                    }
                }
            }
        }
    })
    .await;
    let keys = "    circuit: { failure_threshold: 1, recovery_timeout: 3s }\n";
    let sidecar = Sidecar::open(&[("data", &[service.at], keys)]).await;
    assert_eq!(get(sidecar.out, "data", "/").await.status(), 500);
    assert_eq!(get(sidecar.out, "data", "/").await.code(), "circuit-open");
    until("a probe is due", async || {
        let state = sidecar.metric("infrar_circuit_state", &["service=\"data\""]).await;
        state.is_some_and(|state| (state - 1.0).abs() < 0.1)
    })
    .await;
    let gone = impatient(sidecar.out, "/probe", Duration::from_secs(1)).await;
    assert_eq!((gone, calls.load(Ordering::SeqCst)), (None, 2));
    let line = sidecar.line_of_path("/probe").await;
    assert!(line.contains("\"status\":499"), "{line}");
    let said = get(sidecar.out, "data", "/").await;
    assert_eq!(said.status(), 200, "{said:?}");
}

#[tokio::test]
async fn the_time_until_a_client_leaves_is_the_endpoints_and_a_pause_is_nobodys() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        let mut asked = 0;
        while let Some(head) = visit.head().await {
            asked += 1;
            if head.contains("/hang") {
                while visit.head().await.is_some() {}
                return;
            }
            let answer = if asked == 1 {
                "HTTP/1.1 429 Slow\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
            } else {
                OK
            };
            visit.say(answer).await;
        }
    })
    .await;
    let sidecar = Sidecar::with(&[("data", &[service.at], "")], ONE).await;
    assert_eq!(get(sidecar.out, "data", "/later").await.status(), 200);
    let line = sidecar.line_of_path("/later").await;
    assert!(number(&line, "duration_ms") >= 1000.0, "{line}");
    assert!(number(&line, "upstream_ms") < 500.0, "{line}");
    assert_eq!(impatient(sidecar.out, "/hang", Duration::from_millis(700)).await, None);
    let line = sidecar.line_of_path("/hang").await;
    assert!(number(&line, "upstream_ms") > 350.0, "{line}");
    until("both are counted", async || {
        sidecar.sum_of("infrar_proxy_overhead_seconds_count").await >= 2.0
    })
    .await;
    let overhead = sidecar.sum_of("infrar_proxy_overhead_seconds_sum").await;
    assert!(overhead < 0.6, "{overhead}");
}

#[tokio::test]
async fn an_endpoint_cannot_ask_for_a_pause_that_is_longer_than_time() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        while visit.head().await.is_some() {
            visit
                .say("HTTP/1.1 429 Slow\r\nretry-after: 18446744073709551615\r\ncontent-length: 0\r\n\r\n")
                .await;
        }
    })
    .await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let said = get(sidecar.out, "data", "/").await;
    assert_eq!(said.status(), 429, "{said:?}\n{}", sidecar.infrar.log());
}

#[tokio::test]
async fn a_call_that_ends_connections_meets_one_kept_connection_and_a_new_one() {
    let together = Arc::new(Barrier::new(8));
    let fatal = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&fatal);
    let service = Origin::scripted(move |mut visit: Visit| {
        let (together, fatal) = (Arc::clone(&together), Arc::clone(&counted));
        async move {
            while let Some(head) = visit.head().await {
                if head.contains("/warm") {
                    together.wait().await;
                } else if head.contains("/fatal") {
                    fatal.fetch_add(1, Ordering::SeqCst);
                    return;
                } else if head.contains("/late") {
                    fatal.fetch_add(1, Ordering::SeqCst);
                    // It has worked on it for a while.
                    sleep(Duration::from_millis(600)).await;
                    return;
                }
                visit.say(OK).await;
            }
        }
    })
    .await;
    let keys = "    retries: { max_attempts: 1 }\n";
    let sidecar = Sidecar::with(&[("data", &[service.at], keys)], ONE).await;
    let mut warm = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let at = sidecar.out;
        warm.spawn(async move { get(at, "data", "/warm").await.status() });
    }
    assert_eq!(warm.join_all().await, [200; 8]);
    let late = get(sidecar.out, "data", "/late").await;
    assert_eq!((late.status(), late.code()), (502, "upstream-reset"), "{late:?}");
    assert_eq!(fatal.swap(0, Ordering::SeqCst), 1);
    let delete = "DELETE /fatal HTTP/1.1\r\nhost: data\r\nconnection: close\r\n\r\n";
    let said = sidecar.says(delete).await;
    assert_eq!((said.status(), said.code()), (502, "upstream-reset"), "{said:?}");
    // A machine that is too busy to notice in time takes the first for a failure.
    assert!(fatal.load(Ordering::SeqCst) <= 2, "{fatal:?}");
}

#[tokio::test]
async fn the_attempts_of_a_body_that_streams_share_one_deadline() {
    let service = Origin::scripted(|mut visit: Visit| async move {
        let head = visit.head().await.expect("a request");
        visit.body(&head).await;
        sleep(Duration::from_millis(1100)).await;
    })
    .await;
    let keys = "    timeouts: { request: 1500ms }\n    circuit: { failure_threshold: 100 }\n";
    let sidecar = Sidecar::open(&[("data", &[service.at], keys)]).await;
    let begun = Instant::now();
    let said = sidecar
        .says("PUT / HTTP/1.1\r\nhost: data\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        .await;
    let took = begun.elapsed();
    assert_eq!((said.status(), said.code()), (504, "deadline"), "{said:?}");
    assert!(took >= Duration::from_millis(1490), "{took:?}");
}

#[tokio::test]
async fn an_endpoint_whose_answer_was_held_never_takes_a_broken_upload_for_a_whole_one() {
    /// What each endpoint did, in the order in which they were asked.
    type Saw = Arc<Mutex<Vec<(std::net::SocketAddr, String)>>>;
    let saw = Saw::default();
    let script = |saw: Saw| {
        move |mut visit: Visit| {
            let saw = Arc::clone(&saw);
            async move {
                let at = visit.line.stream.local_addr().expect("our own socket");
                let Some(head) = visit.head().await else { return };
                let number = {
                    let mut all = saw.lock().expect("nobody panics");
                    all.push((at, head));
                    all.len() - 1
                };
                if number > 0 {
                    // It takes everything, and says nothing.
                    visit.line.hear("0\r\n\r\n").await;
                    return;
                }
                visit.line.hear("first").await;
                visit
                    .say("HTTP/1.1 503 Full\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")
                    .await;
                let rest = visit.line.rest().await;
                saw.lock().expect("nobody panics")[0].1 = rest;
            }
        }
    };
    let one = Origin::scripted(script(Arc::clone(&saw))).await;
    let two = Origin::scripted(script(Arc::clone(&saw))).await;
    let keys = "    retries: { max_attempts: 2 }\n";
    let sidecar = Sidecar::open(&[("data", &[one.at, two.at], keys)]).await;
    let mut line = Line::to(sidecar.out).await;
    line.say(
        "PUT /held HTTP/1.1\r\nhost: data\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n",
    )
    .await;
    until("another was asked", async || saw.lock().expect("nobody panics").len() == 2).await;
    // More than is kept.
    for _ in 0..10 {
        line.say(format!("2710\r\n{}\r\n", "b".repeat(10_000))).await;
    }
    line.say("0\r\n\r\n").await;
    let said = line.answer().await;
    assert_eq!((said.status(), &*said.body), (503, "no"), "{said:?}");
    drop(line);
    until("the first has seen its end", async || {
        !saw.lock().expect("nobody panics")[0].1.starts_with("PUT")
    })
    .await;
    let (first, rest) = saw.lock().expect("nobody panics")[0].clone();
    assert!(!rest.contains("0\r\n\r\n"), "{rest:?}");
    // It is the first whose answer this was.
    let logged = sidecar.line_of_path("/held").await;
    let id = if first == one.at { "aws-us-east-1" } else { "aws-us-east-1-2" };
    assert!(logged.contains(&format!("\"endpoint\":\"{id}\"")), "{id}: {logged}");
    assert!((number(&logged, "attempts") - 2.0).abs() < 0.1, "{logged}");
}

#[tokio::test]
async fn tunnels_pay_into_the_budget_of_retries_and_say_nothing_about_answers() {
    let echo = Origin::scripted(|mut visit: Visit| async move {
        visit.line.hear("hello").await;
        visit.say("bye").await;
    })
    .await;
    let [nobody] = free_ports();
    let keys = "    circuit: { failure_threshold: 1000 }\n    retries: { max_attempts: 3, backoff: { base: 1ms, max: 1ms } }\n";
    let services: &[(&str, &[_], &str)] = &[("data", &[nobody], keys), ("echo", &[echo.at], keys)];
    let sidecar = Sidecar::open(services).await;
    let tunnels = 40;
    for tunnel in 0..tunnels {
        let said = sidecar
            .says(&format!("CONNECT data:80 HTTP/1.1\r\nhost: data:80\r\nx-request-id: tunnel-{tunnel}\r\nconnection: close\r\n\r\n"))
            .await;
        assert_eq!(said.code(), "connect-failed", "{said:?}");
    }
    let mut attempts = 0.0;
    for tunnel in 0..tunnels {
        let line = sidecar.line(&format!("\"request_id\":\"tunnel-{tunnel}\"")).await;
        attempts += number(&line, "attempts");
    }
    // Without what they pay in there are three retries in ten seconds.
    assert!(attempts - f64::from(tunnels) > 4.5, "{attempts}");
    let mut line = Line::to(sidecar.out).await;
    line.say("CONNECT echo:80 HTTP/1.1\r\nhost: echo:80\r\n\r\n").await;
    line.hear("\r\n\r\n").await;
    line.say("hello").await;
    assert_eq!(line.rest().await, "bye");
    let circuit = sidecar.metric("infrar_circuit_state", &["service=\"echo\""]).await;
    let latency = sidecar.metric("infrar_endpoint_latency_seconds", &["service=\"echo\""]).await;
    assert_eq!((circuit, latency), (Some(0.0), None));
}

#[tokio::test]
async fn a_trace_is_refused_and_an_options_goes_no_further_than_it_may() {
    let service = Origin::plain("far").await;
    let sidecar = Sidecar::open(&[("data", &[service.at], "")]).await;
    let ask = |method: &str, hops: &str| {
        format!(
            "{method} / HTTP/1.1\r\nhost: data\r\nmax-forwards: {hops}\r\nconnection: close\r\n\r\n"
        )
    };
    let said = sidecar.says(&ask("TRACE", "5")).await;
    assert_eq!((said.status(), said.code()), (400, "bad-request"), "{said:?}");
    let said = sidecar.says(&ask("OPTIONS", "0")).await;
    assert_eq!((said.status(), &*said.body), (204, ""), "{said:?}");
    assert!(service.heads().is_empty(), "{:?}", service.heads());
    assert_eq!(sidecar.says(&ask("OPTIONS", "5")).await.body, "far");
    assert_eq!(header(&service.heads()[0], "max-forwards"), Some("4"));
    // For other methods it means nothing.
    assert_eq!(sidecar.says(&ask("GET", "0")).await.body, "far");
    assert_eq!(header(&service.heads()[1], "max-forwards"), Some("0"));
}

#[tokio::test]
async fn bytes_are_booked_to_the_place_where_an_endpoint_now_is() {
    let service = Origin::plain("moved").await;
    let folder = Folder::new();
    let [out, admin] = free_ports();
    let project = |region: &str| {
        format!(
            "project: shop\nservices:\n  data: {{ scopes: [use], endpoints: [{{ id: only, url: 'http://{}', provider: gcp, region: {region}, auth_method: none }}] }}\n\
             permissions: {{ web: {{ data: [use] }} }}\n",
            service.at
        )
    };
    folder.write("project.yaml", &project("us-central1"));
    folder.write(
        "proxy.yaml",
        &format!(
            "service: web\nplace: aws_us_east_1\nproject: project.yaml\noutbound: {{ listen: '{out}' }}\n\
             admin: {{ listen: '{admin}' }}\nworkers: 1\n"
        ),
    );
    let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
    infrar.ready(admin).await;
    let booked = async |place: &str| {
        let metrics = get(admin, &admin.to_string(), "/metrics").await.body;
        let mut lines = metrics.lines().filter(|line| {
            line.starts_with("infrar_egress_bytes_total{")
                && line.contains("leg=\"request\"")
                && line.contains(&format!("to=\"{place}\""))
        });
        lines.next().and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    assert_eq!(get(out, "data", "/").await.body, "moved");
    let before = booked("gcp_us_central1").await;
    assert!(before > 0.0, "{}", get(admin, &admin.to_string(), "/metrics").await.body);
    folder.write("project.yaml", &project("europe-west1"));
    until("the bytes go to the new place", async || {
        assert_eq!(get(out, "data", "/").await.body, "moved");
        booked("gcp_europe_west1").await > 0.0
    })
    .await;
}

#[tokio::test]
async fn applications_behind_two_listeners_are_told_apart() {
    let (one, two) = (Origin::plain("one").await, Origin::plain("two").await);
    let [first, second] = free_ports();
    let listener = |at, app| {
        format!(
            "  - {{ listen: '{at}', app: 'http://{app}', tls: off, rules: [{{ path: /*, public: true }}] }}\n"
        )
    };
    let keys = format!("inbound:\n{}{}", listener(first, one.at), listener(second, two.at));
    let sidecar = Sidecar::with(&[("data", &[one.at], "")], &keys).await;
    for (at, name, endpoint) in [(first, "one", "app"), (second, "two", "app-2")] {
        assert_eq!(get(at, "web", "/").await.body, name);
        let labels = ["service=\"web\"", &format!("endpoint=\"{endpoint}\"")];
        let latency = sidecar.metric("infrar_endpoint_latency_seconds", &labels).await;
        assert!(latency.is_some(), "{endpoint}");
    }
}
