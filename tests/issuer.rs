//! Tokens on their way out: asked for once however many wait, used while the issuer is down, never after their end.
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
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use support::{Folder, Infrar, Line, Origin, Pair, Visit, free_ports, get, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Duration, Instant},
};

/// A control plane behind a relay that sees every request for a token, and a caller that knows the relay alone.
struct Stage {
    #[expect(dead_code, reason = "held for its Drop")]
    folder: Folder,
    out: SocketAddr,
    relay: Origin,
    down: Arc<AtomicBool>,
    callee: Origin,
    caller: Infrar,
    #[expect(dead_code, reason = "held for its Drop")]
    control: Infrar,
}

impl Stage {
    /// `lifetime`: what the relay says about how long tokens are valid, in seconds.
    async fn open(lifetime: Option<u32>) -> Self {
        Self::with(lifetime, Origin::plain("ok").await).await
    }

    /// With a callee of the story's own.
    async fn with(lifetime: Option<u32>, callee: Origin) -> Self {
        let folder = Folder::new();
        let [control_at, out, admin] = free_ports();
        let down = Arc::new(AtomicBool::new(false));
        let is_down = Arc::clone(&down);
        let relay =
            Origin::scripted(move |visit| relay(visit, control_at, Arc::clone(&is_down), lifetime))
                .await;
        folder.write("secrets/web", "the caller's secret\n");
        folder.write("secrets/data", "the callee's secret\n");
        folder.write("project.yaml", &Pair::project(callee.at, ""));
        folder.write(
            "caller.yaml",
            &format!(
                "service: web\nplace: aws_us_east_1\ncontrol: {{ url: 'http://{}', state_dir: caller, \
                 credential: {{ client_secret_file: secrets/web }} }}\noutbound: {{ listen: '{out}' }}\n\
                 admin: {{ listen: '{admin}' }}\nlog: {{ access: false }}\n",
                relay.at
            ),
        );
        let mut control = Pair::start_control(&folder, control_at);
        control.ready(control_at).await;
        let mut caller = Pair::start_proxy(&folder, "caller");
        caller.ready(admin).await;
        Self { folder, out, relay, down, callee, caller, control }
    }

    /// How many tokens were asked for.
    fn asked(&self) -> usize {
        self.relay.heads().iter().filter(|head| head.starts_with("POST /oauth2/token ")).count()
    }
}

/// Hands one request on to the control plane; answers nothing when it is said to be down.
async fn relay(
    mut visit: Visit,
    control: SocketAddr,
    down: Arc<AtomicBool>,
    lifetime: Option<u32>,
) {
    let Some(head) = visit.head().await else { return };
    if down.load(Ordering::Relaxed) {
        return;
    }
    let body = visit.body(&head).await;
    let Ok(mut far) = TcpStream::connect(control).await else { return };
    let head = head.replacen("\r\n", "\r\nconnection: close\r\n", 1);
    if far.write_all(format!("{head}{body}").as_bytes()).await.is_err() {
        return;
    }
    let mut piece = vec![0; 64 * 1024];
    loop {
        let count = tokio::select! {
            read = far.read(&mut piece) => read.unwrap_or(0),
            () = gone(&down) => return,
        };
        if count == 0 {
            return;
        }
        let mut said = String::from_utf8_lossy(piece.get(..count).unwrap_or_default()).into_owned();
        if let Some(lifetime) = lifetime.filter(|_| head.starts_with("POST /oauth2/token ")) {
            said = said.replace("\"expires_in\":3600", &format!("\"expires_in\":{lifetime:<4}"));
        }
        visit.say(said).await;
    }
}

async fn gone(down: &AtomicBool) {
    let mut again = tokio::time::interval(Duration::from_millis(10));
    while !down.load(Ordering::Relaxed) {
        again.tick().await;
    }
}

#[tokio::test]
async fn ten_thousand_first_calls_cost_one_token() {
    let stage = Stage::open(None).await;
    let before = stage.asked();
    // Ten thousand connections would need more files than some machines grant: each of 250 has forty calls in its pipe.
    let out = stage.out;
    let callers: Vec<_> = (0..250)
        .map(|_| {
            tokio::spawn(async move {
                let mut line = Line::to(out).await;
                line.say("GET / HTTP/1.1\r\nhost: data\r\n\r\n".repeat(40)).await;
                for _ in 0..40 {
                    let said = line.answer().await;
                    assert_eq!((said.status(), &*said.body), (200, "ok"), "{said:?}");
                }
            })
        })
        .collect();
    for caller in callers {
        assert!(caller.await.is_ok(), "{}", stage.caller.log());
    }
    assert_eq!(stage.asked() - before, 1);
    let heads = stage.callee.heads();
    assert_eq!(heads.len(), 10_000);
    assert!(
        heads
            .iter()
            .all(|head| header(head, "authorization") == header(&heads[0], "authorization"))
    );
}

#[tokio::test]
async fn a_token_serves_while_the_issuer_is_down_and_never_after_its_end() {
    // Used until five seconds before its end: two seconds.
    let stage = Stage::open(Some(7)).await;
    let first = Instant::now();
    assert_eq!(get(stage.out, "data", "/").await.status(), 200, "{}", stage.caller.log());
    stage.down.store(true, Ordering::Relaxed);
    let mut served = 0;
    let said = loop {
        let said = get(stage.out, "data", "/").await;
        if said.status() != 200 {
            break said;
        }
        served += 1;
        assert!(first.elapsed() < Duration::from_secs(4), "the token is used for too long");
    };
    assert!(
        served > 10 && first.elapsed() > Duration::from_millis(1500),
        "{served} in {:?}",
        first.elapsed()
    );
    assert_eq!((said.status(), said.code()), (503, "token-unavailable"), "{said:?}");
    assert!(said.header("retry-after").is_some(), "{said:?}");
    let seen = stage.callee.heads().len();
    assert_eq!(seen, served + 1);
    assert_eq!(get(stage.out, "data", "/").await.code(), "token-unavailable");
    assert_eq!(stage.callee.heads().len(), seen);
    // Nor does the log say the secret.
    assert!(!stage.caller.log().contains("the caller's secret"));
    // When it is back, so are the calls.
    stage.down.store(false, Ordering::Relaxed);
    support::until("calls are served again", async || {
        get(stage.out, "data", "/").await.status() == 200
    })
    .await;
}

#[tokio::test]
async fn a_token_that_ends_while_a_call_is_tried_again_is_not_sent() {
    // The first attempt takes longer than the token may be used: two seconds.
    let tried = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tried);
    let callee = Origin::scripted(move |mut visit: Visit| {
        let count = Arc::clone(&count);
        async move {
            while visit.head().await.is_some() {
                if count.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                    return tokio::time::sleep(Duration::from_millis(2500)).await;
                }
                visit.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            }
        }
    })
    .await;
    let stage = Stage::with(Some(7), callee).await;
    let said = get(stage.out, "data", "/").await;
    assert_eq!(said.status(), 200, "{said:?}\n{}", stage.caller.log());
    let heads = stage.callee.heads();
    let tokens: Vec<_> = heads.iter().map(|head| header(head, "authorization")).collect();
    assert!(tokens.len() == 2 && tokens.iter().all(Option::is_some), "{heads:?}");
    assert_ne!(tokens[0], tokens[1]);

    // When no other can be had, the call fails as it would have without any.
    let out = stage.out;
    let call = tokio::spawn(async move { get(out, "data", "/").await });
    support::until("the call is on its way", async || tried.load(Ordering::Relaxed) == 3).await;
    stage.down.store(true, Ordering::Relaxed);
    let said = call.await.expect("an answer");
    assert_eq!((said.status(), said.code()), (503, "token-unavailable"), "{said:?}");
    assert_eq!(stage.callee.heads().len(), 3);
}

/// The project, the caller's sidecar and the callee's go on; the control plane comes back as another.
async fn a_new_control_plane(pair: &mut Pair, further: &[&str]) {
    pair.processes.control.kill().await;
    let at = pair.control.to_string();
    let mut arguments =
        vec!["control", "--project", "project.yaml", "--listen", &at, "--data-dir", "control"];
    arguments.extend(further);
    pair.processes.control = Infrar::start(&pair.folder, "control", &arguments);
    pair.processes.control.ready(pair.control).await;
}

/// Waits until calls are served with another token than `before`, and gives it.
async fn another_token(pair: &Pair, app: &Origin, before: Option<&str>) -> String {
    let token =
        || app.heads().last().and_then(|head| header(head, "authorization").map(str::to_owned));
    support::until("calls are served with another token", async || {
        let said = get(pair.out, "data", "/").await;
        said.status() == 200 && token().as_deref() != before
    })
    .await;
    token().expect("a token")
}

#[tokio::test]
async fn a_control_plane_that_has_lost_its_keys_or_has_another_name_takes_no_call_down_for_good() {
    let app = Origin::plain("ok").await;
    let mut pair = Pair::open(app.at, "", "").await;
    let first = another_token(&pair, &app, None).await;
    std::fs::remove_dir_all(pair.folder.path("control")).expect("its data");
    a_new_control_plane(&mut pair, &[]).await;
    let second = another_token(&pair, &app, Some(&first)).await;
    // It is followed again, too: an edit arrives.
    pair.folder.write("project.yaml", &Pair::project(pair.inbound, "  more: {}\n"));
    support::until("the edit is in force", async || {
        get(pair.caller_admin, "localhost", "/v1/snapshot").await.body.contains("\"more\"")
    })
    .await;
    a_new_control_plane(&mut pair, &["--public-url", "http://issuer.example"]).await;
    let third = another_token(&pair, &app, Some(&second)).await;
    // What lies on disk is what is good now: a restart without the control plane serves.
    let token = third.trim_start_matches("Bearer ");
    support::until("the token is on disk", async || {
        pair.folder.read("caller/tokens.json").contains(token)
    })
    .await;
    pair.processes.control.kill().await;
    pair.processes.caller.kill().await;
    pair.processes.caller = Pair::start_proxy(&pair.folder, "caller");
    pair.processes.caller.ready(pair.caller_admin).await;
    let said = get(pair.out, "data", "/").await;
    assert_eq!(said.status(), 200, "{said:?}\n{}", pair.logs());
    let heads = app.heads();
    assert_eq!(heads.last().and_then(|head| header(head, "authorization")), Some(&*third));
}

#[tokio::test]
async fn a_project_that_names_a_secret_which_comes_later_is_in_force_when_it_has_come() {
    let app = Origin::plain("ok").await;
    let pair = Pair::open(app.at, "", "").await;
    let project = Pair::project(pair.inbound, "");
    let later = project
        .replace("identities: {", "identities: { late: { client_secret_file: secrets/late },");
    assert_ne!(project, later);
    pair.folder.write("project.yaml", &later);
    let refused = || pair.processes.control.log().matches("was not taken over").count();
    support::until("the fault is told", async || refused() == 1).await;
    pair.folder.write("secrets/late", "the secret of the late one\n");
    support::until("it is in force", async || {
        pair.processes.control.log().contains("the project is in force")
    })
    .await;
    assert_eq!(refused(), 1, "{}", pair.logs());
}
