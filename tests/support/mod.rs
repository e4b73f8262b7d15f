//! The stories' stage: the real binary in a folder of its own, origins that follow a script, and clients that say exactly
//! the bytes they are told to.
#![expect(clippy::expect_used, clippy::panic, reason = "the helpers of a test may fail it")]
#![expect(
    clippy::disallowed_methods,
    reason = "an origin of a test ends with it, nobody supervises it"
)]
#![allow(dead_code, reason = "each story file uses a part of the stage")]

pub(crate) mod dns;
pub(crate) mod frames;
pub(crate) mod http2;
pub(crate) mod sidecar;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::JoinHandle,
    time::{interval, timeout},
};

/// Long enough for a debug build on a busy machine; nothing waits for it when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Below every port that a system gives to connections which it opens itself (Linux: from 32768), so that none of them
/// takes a port between its being found free and its being listened on.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

/// Loopback addresses that are free at the moment of asking, all different, also from those of earlier questions.
pub(crate) fn free_ports<const N: usize>() -> [SocketAddr; N] {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let width = u32::from(PORTS.end - PORTS.start);
    // Other test processes look for ports too: each begins somewhere else.
    let begin = std::process::id().wrapping_mul(2_654_435_761) % width;
    std::array::from_fn(|_| {
        let mut tries = (0..width).map(|_| {
            let next = (begin + ASKED.fetch_add(1, Ordering::Relaxed)) % width;
            PORTS.start + u16::try_from(next).expect("below the width")
        });
        let free = tries.find_map(|port| {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()?;
            listener.local_addr().ok()
        });
        free.expect("a free port")
    })
}

/// A temporary folder with the files of a story.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// Writes a file that only its owner reads, as secrets must be, in one step, as editors do.
    pub(crate) fn write(&self, name: &str, content: &str) {
        let path = self.path(name);
        let parent = path.parent().expect("inside the folder");
        fs::create_dir_all(parent).expect("a writable folder");
        let draft = path.with_extension("draft");
        fs::write(&draft, content).expect("a writable folder");
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o600)).expect("our own file");
        fs::rename(&draft, &path).expect("the same folder");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }
}

/// A running `infrar`; killed by its id when dropped.
pub(crate) struct Infrar {
    child: Child,
    log: PathBuf,
}

impl Infrar {
    /// Starts the binary in `folder`; what it says goes to `NAME.log` there.
    pub(crate) fn start(folder: &Folder, name: &str, arguments: &[&str]) -> Self {
        let log = folder.path(&format!("{name}.log"));
        let file =
            fs::OpenOptions::new().create(true).append(true).open(&log).expect("a writable folder");
        let mut command = Command::new(env!("CARGO_BIN_EXE_infrar"));
        for name in ["HTTP_PROXY", "http_proxy", "CI"] {
            command.env_remove(name);
        }
        let child = command
            .args(arguments)
            .current_dir(folder.0.path())
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second handle"))
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .expect("the binary starts");
        Self { child, log }
    }

    /// Waits until `/readyz` at `at` says 200.
    pub(crate) async fn ready(&mut self, at: SocketAddr) {
        let asked = async {
            let mut again = interval(Duration::from_millis(10));
            loop {
                again.tick().await;
                if readyz(at).await == Some(200) {
                    return;
                }
                if let Ok(Some(status)) = self.child.try_wait() {
                    panic!("it ended with {status} before it was ready\n{}", self.log());
                }
            }
        };
        if timeout(PATIENCE, asked).await.is_err() {
            panic!("it did not become ready\n{}", self.log());
        }
    }

    /// Its exit status, when it has ended.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        match timeout(PATIENCE, self.child.wait()).await {
            Ok(status) => status.expect("our own child"),
            Err(_elapsed) => panic!("it did not end\n{}", self.log()),
        }
    }

    /// Ends it as the kernel does: at once.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.expect("our own child");
    }

    /// Whether it has not ended.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it holds of the machine's memory right now, in KiB.
    pub(crate) fn memory(&self) -> u64 {
        let id = self.child.id().expect("it runs");
        let status = fs::read_to_string(format!("/proc/{id}/status")).expect("our own child");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// Sends a signal by the shell's name of it.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().expect("it runs").to_string();
        let status = std::process::Command::new("kill").args([&format!("-{name}"), &id]).status();
        assert!(status.expect("kill").success(), "{name}");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// The status of `/readyz`, if anybody answers.
pub(crate) async fn readyz(at: SocketAddr) -> Option<u16> {
    let answer = timeout(Duration::from_secs(2), async {
        let mut stream = TcpStream::connect(at).await.ok()?;
        let request = format!("GET /readyz HTTP/1.1\r\nhost: {at}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.ok()?;
        Some(answer)
    });
    let answer = answer.await.ok()??;
    std::str::from_utf8(answer.get(9..)?).ok()?.parse().ok()
}

/// Asks until it is so.
pub(crate) async fn until(what: &str, so: impl AsyncFn() -> bool) {
    let asked = async {
        let mut again = interval(Duration::from_millis(10));
        loop {
            again.tick().await;
            if so().await {
                return;
            }
        }
    };
    assert!(timeout(PATIENCE, asked).await.is_ok(), "waited in vain until {what}");
}

/// An answer, as it was on the wire.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// Status line and header lines.
    pub(crate) head: String,
    /// The rest, still in its framing.
    pub(crate) body: String,
    /// Whether the connection was closed behind it.
    pub(crate) closed: bool,
}

impl Said {
    pub(crate) fn status(&self) -> u16 {
        self.head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// The value of the first header line of that name, given in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// The problem's code, if it is a problem document.
    pub(crate) fn code(&self) -> &str {
        let code = self.body.split("\"code\":\"").nth(1).and_then(|rest| rest.split('"').next());
        code.unwrap_or_default()
    }
}

/// The value of the first line of that name in a head; names in lower case.
pub(crate) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A connection on which one speaks byte by byte.
pub(crate) struct Line<S = TcpStream> {
    pub(crate) stream: S,
    read: Vec<u8>,
}

impl Line {
    pub(crate) async fn to(at: SocketAddr) -> Self {
        Self::over(TcpStream::connect(at).await.expect("somebody listens"))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    pub(crate) fn over(stream: S) -> Self {
        Self { stream, read: Vec::new() }
    }

    pub(crate) async fn say(&mut self, text: impl AsRef<[u8]>) {
        // Whoever is refused early may find the connection closed: what was answered counts.
        let said = self.stream.write_all(text.as_ref()).await;
        if said.is_ok() {
            drop(self.stream.flush().await);
        }
    }

    /// Reads until `end` has come; what came before and with it, as text. What was read before counts.
    pub(crate) async fn hear(&mut self, end: &str) -> String {
        let heard = async {
            loop {
                if let Some(at) = find(&self.read, end.as_bytes()) {
                    let rest = self.read.split_off(at + end.len());
                    return std::mem::replace(&mut self.read, rest);
                }
                if !self.more().await {
                    panic!(
                        "closed before {end:?}; heard {:?}",
                        String::from_utf8_lossy(&self.read)
                    );
                }
            }
        };
        let heard = timeout(PATIENCE, heard).await;
        let Ok(heard) = heard else {
            panic!("waited in vain for {end:?}; heard {:?}", String::from_utf8_lossy(&self.read))
        };
        String::from_utf8_lossy(&heard).into_owned()
    }

    /// One answer with a `content-length`, or none at all.
    pub(crate) async fn answer(&mut self) -> Said {
        let head = self.hear("\r\n\r\n").await;
        let length: usize =
            header(&head, "content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let body = async { while self.read.len() < length && self.more().await {} };
        assert!(timeout(PATIENCE, body).await.is_ok(), "the body of {head} does not come");
        let rest = self.read.split_off(length.min(self.read.len()));
        let body = std::mem::replace(&mut self.read, rest);
        Said { head, body: String::from_utf8_lossy(&body).into_owned(), closed: false }
    }

    /// Everything until the other side closes.
    pub(crate) async fn rest(&mut self) -> String {
        let all = async { while self.more().await {} };
        let closed = timeout(PATIENCE, all).await.is_ok();
        let heard = String::from_utf8_lossy(&std::mem::take(&mut self.read)).into_owned();
        assert!(closed, "the connection stays open; heard {heard:?}");
        heard
    }

    async fn more(&mut self) -> bool {
        self.read.reserve(16 * 1024);
        self.stream.read_buf(&mut self.read).await.is_ok_and(|count| count > 0)
    }
}

fn find(within: &[u8], what: &[u8]) -> Option<usize> {
    within.windows(what.len()).position(|window| window == what)
}

/// Says `text`, and hears everything until the other side closes.
pub(crate) async fn talk(at: SocketAddr, text: impl AsRef<[u8]>) -> Said {
    let mut line = Line::to(at).await;
    line.say(text).await;
    split(&line.rest().await)
}

/// One call whose connection is closed behind it.
pub(crate) async fn get(at: SocketAddr, host: &str, path: &str) -> Said {
    talk(at, format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")).await
}

fn split(all: &str) -> Said {
    let (head, body) = all.split_once("\r\n\r\n").unwrap_or((all, ""));
    Said { head: head.to_owned(), body: body.to_owned(), closed: true }
}

/// A server of the story's own making; it ends when dropped.
pub(crate) struct Origin {
    pub(crate) at: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

/// What an origin's script works with: one connection, and where to note what it saw.
pub(crate) struct Visit {
    pub(crate) line: Line,
    /// How many connections came before.
    pub(crate) number: usize,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Visit {
    /// Reads one request's head and notes it; `None` when the client leaves.
    pub(crate) async fn head(&mut self) -> Option<String> {
        loop {
            if let Some(at) = find(&self.line.read, b"\r\n\r\n") {
                let rest = self.line.read.split_off(at + 4);
                let head = std::mem::replace(&mut self.line.read, rest);
                let head = String::from_utf8_lossy(&head).into_owned();
                self.heads.lock().unwrap_or_else(PoisonError::into_inner).push(head.clone());
                return Some(head);
            }
            if !self.line.more().await {
                return None;
            }
        }
    }

    /// Reads the body that `head` announces, as it is on the wire.
    pub(crate) async fn body(&mut self, head: &str) -> String {
        if header(head, "transfer-encoding").is_some() {
            return self.line.hear("0\r\n\r\n").await;
        }
        self.announced(head).await.0
    }

    /// The same; `None` when it breaks off.
    pub(crate) async fn whole_body(&mut self, head: &str) -> Option<String> {
        if header(head, "transfer-encoding").is_none() {
            let (body, whole) = self.announced(head).await;
            return whole.then_some(body);
        }
        while find(&self.line.read, b"0\r\n\r\n").is_none() {
            if !self.line.more().await {
                return None;
            }
        }
        Some(self.line.hear("0\r\n\r\n").await)
    }

    /// A body whose length is said, and whether all of it came.
    async fn announced(&mut self, head: &str) -> (String, bool) {
        let length: usize =
            header(head, "content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        while self.line.read.len() < length && self.line.more().await {}
        let whole = self.line.read.len() >= length;
        let rest = self.line.read.split_off(length.min(self.line.read.len()));
        let body = std::mem::replace(&mut self.line.read, rest);
        (String::from_utf8_lossy(&body).into_owned(), whole)
    }

    pub(crate) async fn say(&mut self, text: impl AsRef<[u8]>) {
        self.line.say(text).await;
    }

    /// Answers every request with 200 and `name`.
    pub(crate) async fn plainly(mut self, name: &str) {
        while let Some(head) = self.head().await {
            self.body(&head).await;
            let length = name.len();
            self.say(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{name}")).await;
        }
    }
}

impl Origin {
    /// Every connection is handled by `script`.
    pub(crate) async fn scripted<F>(script: impl Fn(Visit) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::on(Ipv4Addr::LOCALHOST.into(), script).await
    }

    /// The same on another address of this machine.
    pub(crate) async fn on<F>(address: IpAddr, script: impl Fn(Visit) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::at((address, 0).into(), script).await
    }

    /// The same at a port that the story chose.
    pub(crate) async fn at<F>(at: SocketAddr, script: impl Fn(Visit) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(at).await.expect("a free port");
        let at = listener.local_addr().expect("bound");
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = Arc::clone(&heads);
        let task = tokio::spawn(async move {
            let mut visits = tokio::task::JoinSet::new();
            let mut number = 0;
            while let Ok((stream, _peer)) = listener.accept().await {
                let heads = Arc::clone(&noted);
                visits.spawn(script(Visit { line: Line::over(stream), number, heads }));
                number += 1;
            }
        });
        Self { at, heads, task }
    }

    /// Answers every request with 200 and `name`.
    pub(crate) async fn plain(name: &'static str) -> Self {
        Self::scripted(move |visit| visit.plainly(name)).await
    }

    /// The heads of all requests it has seen.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A caller and a callee, each behind its sidecar, and their control plane; all processes of their own.
pub(crate) struct Pair {
    pub(crate) folder: Folder,
    pub(crate) control: SocketAddr,
    pub(crate) out: SocketAddr,
    pub(crate) inbound: SocketAddr,
    pub(crate) caller_admin: SocketAddr,
    pub(crate) callee_admin: SocketAddr,
    pub(crate) processes: Processes,
}

/// The three of a pair.
pub(crate) struct Processes {
    pub(crate) control: Infrar,
    pub(crate) callee: Infrar,
    pub(crate) caller: Infrar,
}

impl Pair {
    /// All three started and ready, `data` answered by the app at `app`; `services` are further lines of the project's
    /// services, `keys` of the caller's settings.
    pub(crate) async fn open(app: SocketAddr, services: &str, keys: &str) -> Self {
        Self::with_callee(app, services, keys, "").await
    }

    /// With further keys for the callee.
    pub(crate) async fn with_callee(
        app: SocketAddr,
        services: &str,
        keys: &str,
        callee_keys: &str,
    ) -> Self {
        let folder = Folder::new();
        let [control, out, inbound, caller_admin, callee_admin] = free_ports();
        folder.write("secrets/web", "the caller's secret\n");
        folder.write("secrets/data", "the callee's secret\n");
        folder.write("project.yaml", &Self::project(inbound, services));
        folder.write(
            "caller.yaml",
            &format!(
                "service: web\nplace: aws_us_east_1\ncontrol: {{ url: 'http://{control}', state_dir: caller, \
                 credential: {{ client_secret_file: secrets/web }} }}\noutbound: {{ listen: '{out}' }}\n\
                 admin: {{ listen: '{caller_admin}' }}\nlog: {{ format: json }}\n{keys}"
            ),
        );
        folder.write(
            "callee.yaml",
            &format!(
                "service: data\nplace: azure_eastus\ncontrol: {{ url: 'http://{control}', state_dir: callee, \
                 credential: {{ client_secret_file: secrets/data }} }}\ninbound: {{ listen: '{inbound}', app: 'http://{app}', tls: off }}\n\
                 admin: {{ listen: '{callee_admin}' }}\nlog: {{ format: json }}\n{callee_keys}"
            ),
        );
        let processes = Processes {
            control: Self::start_control(&folder, control),
            callee: Self::start_proxy(&folder, "callee"),
            caller: Self::start_proxy(&folder, "caller"),
        };
        let mut pair =
            Self { folder, control, out, inbound, caller_admin, callee_admin, processes };
        pair.processes.control.ready(control).await;
        pair.processes.callee.ready(callee_admin).await;
        pair.processes.caller.ready(caller_admin).await;
        pair
    }

    pub(crate) fn project(inbound: SocketAddr, services: &str) -> String {
        format!(
            "project: shop\nservices:\n  data:\n    scopes: [use]\n    endpoints: [{{ url: 'http://{inbound}', provider: azure, region: eastus }}]\n\
             {services}permissions: {{ web: {{ data: [use], infrar-control: ['infrar:keys:write'] }} }}\n\
             identities: {{ web: {{ client_secret_file: secrets/web }}, data: {{ client_secret_file: secrets/data }} }}\n"
        )
    }

    pub(crate) fn start_control(folder: &Folder, at: SocketAddr) -> Infrar {
        let at = at.to_string();
        let arguments =
            ["control", "--project", "project.yaml", "--listen", &at, "--data-dir", "control"];
        Infrar::start(folder, "control", &arguments)
    }

    pub(crate) fn start_proxy(folder: &Folder, name: &str) -> Infrar {
        Infrar::start(folder, name, &["proxy", "--config", &format!("{name}.yaml")])
    }

    pub(crate) fn logs(&self) -> String {
        let Processes { control, callee, caller } = &self.processes;
        format!(
            "--- control\n{}\n--- callee\n{}\n--- caller\n{}",
            control.log(),
            callee.log(),
            caller.log()
        )
    }
}
