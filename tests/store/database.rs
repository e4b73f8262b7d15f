//! A real PostgreSQL server in a folder of its own, that ends with the one who started it.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use infrar::store::Location;
use tempfile::TempDir;
use tokio_postgres::NoTls;

/// `nobody` of Debian, as whom the server runs when we are root, which it refuses to be.
const NOBODY: u32 = 65_534;
/// How often another port, or an end of the server before, is tried.
const TRIES: usize = 50;

pub(crate) struct Server {
    pub(crate) port: u16,
    folder: PathBuf,
    child: Child,
    /// While it is open the server runs.
    _life: Option<ChildStdin>,
}

/// One server for all stories that do not harm it. It ends when this process does, however it ends.
pub(crate) fn shared() -> Option<&'static Server> {
    static SHARED: OnceLock<Option<Server>> = OnceLock::new();
    let start = || {
        let folder = cluster()?.keep();
        Some(Server::start(&folder, Life::OfThisProcess, &[]))
    };
    SHARED.get_or_init(start).as_ref()
}

/// A folder with the files of a new server; `None`, and why, without the package.
pub(crate) fn cluster() -> Option<TempDir> {
    let initdb = program("initdb")?;
    let folder = tempfile::tempdir().expect("a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).expect("ours");
    if is_root() {
        chown(folder.path(), Some(NOBODY), Some(NOBODY)).expect("root may");
    }
    let output = as_nobody(&initdb)
        .args(["--username=infrar", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"])
        .arg("-D")
        .arg(folder.path().join("data"))
        .current_dir(folder.path())
        .output()
        .expect("initdb runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(folder)
}

/// How long a server lives.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// As long as this process; then it and its folder are removed.
    OfThisProcess,
    /// Until it is killed or dropped.
    OfItsOwn,
}

impl Server {
    pub(crate) fn start(folder: &Path, life: Life, options: &[&str]) -> Self {
        let port = free_port();
        for _ in 0..TRIES {
            if let Some(server) = Self::try_start(folder, port, life, options) {
                return server;
            }
        }
        panic!("the server does not start; its log says why")
    }

    /// `None` when it ended instead: its port is taken, or the one before it is not quite gone.
    pub(crate) fn try_start(
        folder: &Path,
        port: u16,
        life: Life,
        options: &[&str],
    ) -> Option<Self> {
        let postgres = program("postgres")?;
        let mut command = match life {
            Life::OfItsOwn => as_nobody(&postgres),
            Life::OfThisProcess => {
                let mut command = as_nobody(Path::new("/bin/sh"));
                let script = r#""$@" & cat > /dev/null; kill -QUIT $!; wait $!; rm -rf "$FOLDER""#;
                command.args(["-c", script, "sh"]).arg(&postgres);
                command.env("FOLDER", folder).stdin(Stdio::piped());
                command
            }
        };
        let settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c"];
        let mut child = command
            .arg("-D")
            .arg(folder.join("data"))
            .args(["-p", &port.to_string()])
            .args(settings)
            .arg(format!("unix_socket_directories={}", folder.display()))
            .args(options)
            .current_dir(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("postgres runs");
        let life = child.stdin.take();
        let log = child.stderr.take().expect("a pipe");
        let mut lines = BufReader::new(log).lines().map_while(Result::ok);
        let is_ready = lines
            .by_ref()
            .inspect(|line| eprintln!("{line}"))
            .any(|line| line.contains("ready to accept connections"));
        if !is_ready {
            child.wait().expect("its end");
            return None;
        }
        // Somebody must read on, or it stops when the pipe is full.
        std::thread::spawn(move || lines.for_each(drop));
        Some(Self { port, folder: folder.to_owned(), child, _life: life })
    }

    /// SIGKILL to the server itself; its children find out by themselves.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("its end");
    }

    /// The same server again, on the same port.
    pub(crate) fn restart(&mut self, options: &[&str]) {
        for _ in 0..TRIES {
            if let Some(server) = Self::try_start(&self.folder, self.port, Life::OfItsOwn, options)
            {
                *self = server;
                return;
            }
        }
        panic!("it does not come back")
    }

    /// A database that nobody else uses.
    pub(crate) async fn new_database(&self) -> Location {
        let name = self.new_database_name().await;
        self.url(&name).parse().expect("a URL")
    }

    pub(crate) async fn new_database_name(&self) -> String {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("story_{}", MADE.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name} TEMPLATE template0")).await;
        name
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://infrar@127.0.0.1:{}/{database}", self.port)
    }

    /// Says something to the server beside the store.
    pub(crate) async fn sql(&self, database: &str, sql: &str) {
        let url = self.url(database);
        let connecting = tokio_postgres::connect(&url, NoTls);
        let (client, connection) = connecting.await.expect("a connection");
        let said = async {
            let said = client.batch_execute(sql).await;
            drop(client);
            said
        };
        let (said, _) = tokio::join!(said, connection);
        said.expect("SQL that it understands");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|us| us.uid() == 0)
}

fn as_nobody(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let nobody = NOBODY.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups"]).arg(program);
    command
}

/// Debian keeps the server out of PATH, one folder for each version.
fn program(name: &str) -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions
        .map(|version| version.path().join("bin").join(name))
        .filter(|file| file.is_file())
        .collect();
    found.sort();
    let newest = found.pop();
    if newest.is_none() {
        let what = "PostgreSQL is not installed: run scripts/foreign-clients.sh";
        assert_ne!(std::env::var_os("CI").as_deref(), Some(OsStr::new("true")), "{what}");
        eprintln!("skipped: {what}");
    }
    newest
}
