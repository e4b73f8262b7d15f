//! `infrar demo`: three services in three simulated clouds, each behind its own sidecar, in one process.
//!
//! Nothing is faked but the distance: the sidecars are real proxies with real configuration files, certificates of a
//! CA made on the spot, a real control plane and real tokens. All of it is in one temporary folder, which goes when
//! the demonstration ends.

use std::{
    fs, io,
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener as StdListener},
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;
use aws_lc_rs::rand;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::ExposeSecret;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{self, Instant},
};
use uuid::Uuid;

use crate::{
    cli::{
        ca::Ca,
        proxy::{self, RunningProxy},
        sample::{self, Answer, CallError, Sidecar},
        scene::{CAST, Call, Cast, Ports, Scene},
    },
    config,
    control::{self, Control},
    runtime::write_private,
    runtime::{Clock, Signal, Signals, Supervisor},
};

/// Between two visitors of the web application.
const VISITS: Duration = Duration::from_secs(1);

/// Between two records that the background workers write.
const RECORDS: Duration = Duration::from_secs(3);

/// How long the sidecars may take to become ready.
const READY: Duration = Duration::from_secs(15);

/// Runs the demonstration until Ctrl-C.
///
/// # Errors
/// Whatever keeps it from beginning.
pub(crate) async fn run(supervisor: &Supervisor) -> anyhow::Result<()> {
    let mut signals = Signals::listen().context("signals cannot be listened to")?;
    let folder = Folder::create()?;
    let backstage = Backstage::reserve().await?;
    let began = tokio::select! {
        stage = backstage.open(&folder, supervisor) => stage?,
        // Ctrl-C before the curtain rises.
        _ = signals.next() => return Ok(()),
    };
    print(&began.welcome(&folder));
    live(&began, &mut signals, supervisor).await;
    print("\nEnding: connections are drained, the folder is removed.\n");
    began.end().await;
    Ok(())
}

/// A folder for everything, which only this user may enter; removed with all that is in it when dropped.
struct Folder(PathBuf);

impl Folder {
    fn create() -> anyhow::Result<Self> {
        // Not by the process id: in a container that is the same each time, and a folder may be left from a kill.
        let path = std::env::temp_dir().join(format!("infrar-demo-{}", Uuid::now_v7().simple()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("the folder {} cannot be made", path.display()))?;
        Ok(Self(path))
    }

    fn write(&self, name: &str, content: &[u8]) -> anyhow::Result<PathBuf> {
        let path = self.0.join(name);
        if let Some(parent) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        write_private(&path, content)
            .with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, folder = %self.0.display(), "the folder is left behind");
        }
    }
}

/// Ports that nobody else has, before anything listens there.
struct Backstage {
    apps: Vec<TcpListener>,
    ports: [Ports; 3],
    /// Holds the ports of the sidecars until they take them.
    reserved: Vec<StdListener>,
}

impl Backstage {
    async fn reserve() -> anyhow::Result<Self> {
        let mut apps = Vec::new();
        let mut reserved = Vec::new();
        let mut free = || -> io::Result<SocketAddr> {
            let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let address = listener.local_addr()?;
            reserved.push(listener);
            Ok(address)
        };
        let mut ports = Vec::new();
        for _ in &CAST {
            let app = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            ports.push(Ports {
                app: app.local_addr()?,
                outbound: free()?,
                inbound: free()?,
                admin: free()?,
            });
            apps.push(app);
        }
        let ports = <[Ports; 3]>::try_from(ports)
            .map_err(|ports| anyhow::anyhow!("{} services, not three", ports.len()))?;
        Ok(Self { apps, ports, reserved })
    }

    async fn open(self, folder: &Folder, supervisor: &Supervisor) -> anyhow::Result<Stage> {
        let clock = Clock::system();
        write_certificates(folder, clock)?;
        for cast in &CAST {
            folder.write(&format!("secrets/{}", cast.service), secret()?.as_bytes())?;
        }
        let [web, ..] = &self.ports;
        let nowhere = web.app;
        let scene = Scene { folder: &folder.0, control: nowhere, ports: self.ports };
        let project_file = folder.write("project.yaml", scene.project().as_bytes())?;
        let loaded = config::load_project(&project_file)?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let settings = control::Settings::new(listen, folder.0.join("control"));
        let control = Control::start(settings, Some((loaded.project, loaded.identities))).await?;

        let scene = Scene { control: control.local_addr(), ..scene };
        let [to_web, ..] = &self.ports;
        let mut apps = vec![
            sample::web_application(Sidecar::new(to_web.outbound)),
            sample::data_intelligence(),
            sample::background_workers(),
        ]
        .into_iter();
        for (cast, listener) in CAST.iter().zip(self.apps) {
            if let Some(app) = apps.next() {
                sample::serve(supervisor, cast.service, listener, app);
            }
        }
        drop(self.reserved);
        let mut sidecars = Vec::new();
        for (cast, ports) in CAST.iter().zip(&self.ports) {
            sidecars.push(start_sidecar(folder, &scene, cast, ports)?);
        }
        for ports in &self.ports {
            wait_until_ready(ports.admin).await?;
        }
        Ok(Stage { control_address: scene.control, ports: self.ports, control, sidecars })
    }
}

fn start_sidecar(
    folder: &Folder,
    scene: &Scene<'_>,
    cast: &Cast,
    ports: &Ports,
) -> anyhow::Result<RunningProxy> {
    let name = format!("{}.yaml", cast.service);
    let file = folder.write(&name, scene.proxy(cast, ports).as_bytes())?;
    let settings = config::load_proxy(Some(&file), std::iter::empty(), &[])?;
    proxy::start(&settings).with_context(|| format!("the sidecar of {}", cast.service))
}

fn write_certificates(folder: &Folder, clock: Clock) -> anyhow::Result<()> {
    let ca = Ca::new("infrar demo", clock.now()).context("the CA cannot be made")?;
    folder.write("tls/ca.pem", ca.certificate().as_bytes())?;
    for Cast { service, host, .. } in &CAST {
        let issued = ca.issue(&[host]).context("a certificate cannot be made")?;
        folder.write(&format!("tls/{service}.crt"), issued.certificate.as_bytes())?;
        folder.write(&format!("tls/{service}.key"), issued.key.expose_secret().as_bytes())?;
    }
    Ok(())
}

/// A client secret that nobody can guess.
pub(crate) fn secret() -> anyhow::Result<String> {
    let mut bytes = [0u8; 32];
    rand::fill(&mut bytes).context("the system gives no random bytes")?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// Waits until the proxy whose admin API is at `admin` has its snapshot and its keys.
pub(crate) async fn wait_until_ready(admin: SocketAddr) -> anyhow::Result<()> {
    let probe = Sidecar::new(admin);
    let deadline = Instant::now() + READY;
    loop {
        let seen = match probe.get("localhost", "/readyz").await {
            Ok(answer) if answer.status.is_success() => return Ok(()),
            Ok(answer) => String::from_utf8_lossy(&answer.body).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            anyhow::bail!("the proxy at {admin} is not ready after {READY:?}: {seen}");
        }
        time::sleep(Duration::from_millis(20)).await;
    }
}

/// The demonstration, running.
struct Stage {
    control_address: SocketAddr,
    ports: [Ports; 3],
    control: control::Running,
    sidecars: Vec<RunningProxy>,
}

impl Stage {
    fn welcome(&self, folder: &Folder) -> String {
        let scene = Scene { folder: &folder.0, control: self.control_address, ports: self.ports };
        format!(
            "Three services in three simulated clouds, each behind its own sidecar:\n\n{}\n\
             Paste any of these into another terminal:\n\n{}\n\
             Live traffic; Ctrl-C ends it:\n\n",
            scene.table(),
            scene.invitations()
        )
    }

    /// Ends the sidecars together, then what they depend on.
    async fn end(self) {
        futures_util::future::join_all(self.sidecars.into_iter().map(RunningProxy::shutdown)).await;
        self.control.shutdown().await;
    }
}

/// Calls between the services, one line each, until somebody has seen enough.
async fn live(stage: &Stage, signals: &mut Signals, supervisor: &Supervisor) {
    let [web, _, jobs] = &stage.ports;
    let (web, jobs) = (Sidecar::new(web.outbound), Sidecar::new(jobs.outbound));
    // Full means that the terminal is slower than the traffic: then lines are left out, never calls.
    let (lines, mut shown) = mpsc::channel(64);
    let (mut visits, mut records) = (time::interval(VISITS), time::interval(RECORDS));
    loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Stop | Signal::StopAtOnce => return,
                Signal::Reload => {}
            },
            Some(call) = shown.recv() => {
                let now = jiff::Zoned::now().time();
                if !print(&format!("{}\n", Call::line(&call, now))) {
                    return;
                }
            }
            _ = visits.tick() => {
                let (web, lines) = (web.clone(), lines.clone());
                supervisor.spawn_until_end("demo-visit", async move {
                    let query = web.post("data-intelligence", "/query", r#"{"top":2}"#);
                    let _full = lines.try_send(timed(0, "POST /query", query).await);
                });
            }
            _ = records.tick() => {
                let (jobs, lines) = (jobs.clone(), lines.clone());
                supervisor.spawn_until_end("demo-record", async move {
                    let record = jobs.post("data-intelligence", "/data", r#"{"sold":1}"#);
                    let _full = lines.try_send(timed(2, "POST /data", record).await);
                });
            }
        }
    }
}

/// Makes a call to `data-intelligence` and notes what came of it.
async fn timed(
    caller: usize,
    asked: &'static str,
    call: impl Future<Output = Result<Answer, CallError>>,
) -> Call {
    let began = Instant::now();
    let answer = match call.await {
        Ok(answer) => match answer.code() {
            Some(code) => format!("{} {code}", answer.status.as_u16()),
            None => answer.status.as_u16().to_string(),
        },
        Err(error) => error.to_string(),
    };
    Call { caller, callee: 1, asked, answer, took: began.elapsed() }
}

/// Writes to the terminal; `false` when nobody reads any more.
fn print(text: &str) -> bool {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_files_of_the_demonstration_are_right() {
        let folder = Folder::create().unwrap();
        let backstage = Backstage::reserve().await.unwrap();
        write_certificates(&folder, Clock::system()).unwrap();
        for cast in &CAST {
            folder.write(&format!("secrets/{}", cast.service), b"s").unwrap();
        }
        let control = backstage.ports[0].app;
        let scene = Scene { folder: &folder.0, control, ports: backstage.ports };
        let project = folder.write("project.yaml", scene.project().as_bytes()).unwrap();
        let loaded = config::load_project(&project).unwrap();
        assert_eq!(loaded.identities.len(), 3);
        for (cast, ports) in CAST.iter().zip(&backstage.ports) {
            let file = folder.write("proxy.yaml", scene.proxy(cast, ports).as_bytes()).unwrap();
            let settings = config::load_proxy(Some(&file), std::iter::empty(), &[]).unwrap();
            assert_eq!(settings.place.unwrap().to_string(), cast.place());
            assert_eq!(settings.inbound[0].listen, ports.inbound);
        }
        let path = folder.0.clone();
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn secrets_are_long_and_never_the_same() {
        let (one, other) = (secret().unwrap(), secret().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.len(), 43);
    }
}
