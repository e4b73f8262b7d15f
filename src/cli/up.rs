//! `infrar up`: a control plane and one proxy on this machine.
//!
//! For a laptop: everything listens on loopback, the proxy speaks for one caller of the project with a secret made
//! for this run, and an edited `project.yaml` is in force as soon as it is saved.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use secrecy::SecretString;

use crate::{
    cli::{
        Usage,
        demo::{secret, wait_until_ready},
        flags::{listen, log_format},
        proxy::{self, RunningProxy},
        watch::WatchedFile,
    },
    config::{self, ProjectFile},
    control::{self, Control, Identity},
    model::{Place, ServiceName},
    net,
    runtime::write_private,
    runtime::{Signal, Signals},
    telemetry::Format,
};

/// The project that is written where there is none.
const EXAMPLE: &str = "\
# What is true for the whole project. Saved changes are in force at once.
project: shop
services:
  hello:
    endpoints:
      # Any HTTP server will do:  python3 -m http.server 8080 --bind 127.0.0.1 --directory public
      - { url: \"http://127.0.0.1:8080\", provider: local, region: laptop, auth_method: none }
    scopes: [read:hello]
    circuit: { recovery_timeout: 2s }   # called before it runs? It is tried again soon
permissions:                       # what is not listed is refused
  web-application:
    hello: [read:hello]
";

/// Control plane and one proxy on this machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Up {
    /// The project; an example is written if it is not there.
    #[arg(default_value = "project.yaml")]
    project: PathBuf,
    /// Where keys, tokens and the last snapshot are kept.
    #[arg(long, default_value = "./.infrar")]
    data_dir: PathBuf,
    /// The caller that the proxy speaks for [default: the one that stands first in `permissions`].
    #[arg(long)]
    service: Option<ServiceName>,
    /// Where the proxy is said to run.
    #[arg(long, default_value = "local_laptop")]
    place: Place,
    /// The control plane's address.
    #[arg(long, default_value = "127.0.0.1:7070", value_parser = listen)]
    control_listen: SocketAddr,
    /// The address that applications call services through.
    #[arg(long, default_value = "127.0.0.1:15001", value_parser = listen)]
    outbound_listen: SocketAddr,
    /// The proxy's admin address.
    #[arg(long, default_value = "127.0.0.1:15000", value_parser = listen)]
    admin_listen: SocketAddr,
    /// What `--log-format` says, which every command has.
    #[arg(skip)]
    pub(super) log_format: Option<Format>,
}

impl Up {
    /// Runs both until Ctrl-C.
    ///
    /// # Errors
    /// Whatever keeps them from beginning: a wrong project, an address in use.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        self.check_addresses()?;
        let written = self.write_example()?;
        let mut signals = Signals::listen().context("signals cannot be listened to")?;
        let mut file = WatchedFile::new(&self.project)
            .with_context(|| format!("{} cannot be watched", self.project.display()))?;
        let loaded = config::load_project(&self.project)?;
        file.refers_to(loaded.referred_files());
        let stand = self.open(loaded).await?;
        print(&self.welcome(&stand, written));
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Stop | Signal::StopAtOnce => break,
                    Signal::Reload => print(&stand.reload(&self.project, &mut file).await),
                },
                () = file.changed() => print(&stand.reload(&self.project, &mut file).await),
            }
        }
        print("\nEnding.\n");
        stand.end().await;
        Ok(())
    }

    /// Every address with the flag that chose it.
    fn addresses(&self) -> [(SocketAddr, String); 3] {
        [
            (self.control_listen, "--control-listen"),
            (self.outbound_listen, "--outbound-listen"),
            (self.admin_listen, "--admin-listen"),
        ]
        .map(|(address, flag)| (address, flag.to_owned()))
    }

    /// Finds every address that is taken, or open to others, before anything begins.
    fn check_addresses(&self) -> anyhow::Result<()> {
        let addresses = self.addresses();
        let open = addresses.iter().filter(|(address, _)| !address.ip().is_loopback());
        let open: Vec<_> = open.map(|(address, flag)| format!("{flag} {address}")).collect();
        if !open.is_empty() {
            return Err(Usage::new(format!(
                "{} is open to others, and `infrar up` is for this machine alone: whoever reaches its proxy calls with the \
                 caller's tokens. Write a loopback address, such as 127.0.0.1:7070; for others there are `infrar control` with a \
                 certificate and `infrar proxy`",
                open.join(", ")
            ))
            .into());
        }
        Ok(net::try_bind(&addresses)?)
    }

    /// Whether an example had to be written.
    fn write_example(&self) -> anyhow::Result<bool> {
        if self.project.exists() {
            return Ok(false);
        }
        fs::write(&self.project, EXAMPLE)
            .with_context(|| format!("{} cannot be written", self.project.display()))?;
        Ok(true)
    }

    async fn open(&self, loaded: ProjectFile) -> anyhow::Result<Stand> {
        let cannot = || format!("--data-dir {} cannot be used", self.data_dir.display());
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.data_dir)
            .with_context(cannot)?;
        // Paths in settings count from the file they are in, and there is none.
        let folder = std::path::absolute(&self.data_dir).with_context(cannot)?;
        let me = self.service.clone().or(loaded.first_caller).unwrap_or_else(somebody);
        let secret = secret()?;
        let secret_file = folder.join("secret");
        write_private(&secret_file, secret.as_bytes()).with_context(cannot)?;
        let stand_in = Identity::ClientSecret(SecretString::from(secret));

        let settings = control::Settings::new(self.control_listen, folder.join("control"));
        let ProjectFile { project, mut identities, .. } = loaded;
        let permissions = project.permissions.get(&me).cloned().unwrap_or_default();
        identities.insert(me.clone(), stand_in.clone());
        let control = Control::start(settings, Some((project, identities))).await?;
        let flags = self.proxy_settings(&folder, &me, control.local_addr());
        let settings = config::load_proxy(None, std::iter::empty(), &flags)?;
        let proxy = proxy::start(&settings)?;
        wait_until_ready(proxy.admin).await?;
        let outbound = proxy.listeners().first().map_or(self.outbound_listen, |(_, at)| *at);
        let greeting = invitations(permissions.keys(), &me, outbound);
        Ok(Stand { me, stand_in, greeting, outbound, control, proxy })
    }

    fn proxy_settings(
        &self,
        folder: &Path,
        me: &ServiceName,
        control: SocketAddr,
    ) -> Vec<(String, String)> {
        let path = |name: &str| folder.join(name).display().to_string();
        [
            ("role", "sidecar".to_owned()),
            ("service", me.to_string()),
            ("place", self.place.to_string()),
            ("control.url", format!("http://{control}")),
            ("control.credential.client_secret_file", path("secret")),
            ("control.state_dir", path("state")),
            ("outbound.listen", self.outbound_listen.to_string()),
            ("admin.listen", self.admin_listen.to_string()),
            ("shutdown.grace", "0s".to_owned()),
            ("shutdown.deadline", "5s".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into_iter()
        .chain(self.log_format.map(log_format))
        .collect()
    }

    fn welcome(&self, stand: &Stand, written: bool) -> String {
        let note = if written { "  (an example, written just now)" } else { "" };
        format!(
            "\
A control plane and a proxy on this machine; Ctrl-C ends both.

  project         {project}{note}
  control plane   http://{control}
  outbound        http://{outbound}   speaks for {me} (--service NAME for another caller)
  admin           http://{admin}
  state           {state}

{greeting}
Ask what happened:

  curl http://{admin}/v1/snapshot
  curl http://{admin}/metrics

Edit {project}: a saved change is in force at once, a wrong one is refused with its faults.
",
            project = self.project.display(),
            control = stand.control.local_addr(),
            outbound = stand.outbound,
            me = stand.me,
            admin = stand.proxy.admin,
            state = self.data_dir.display(),
            greeting = stand.greeting,
        )
    }
}

/// Both, running.
struct Stand {
    /// The caller that the proxy speaks for.
    me: ServiceName,
    /// How it proves that, in this run.
    stand_in: Identity,
    greeting: String,
    outbound: SocketAddr,
    control: control::Running,
    proxy: RunningProxy,
}

impl Stand {
    /// Puts the edited project in force, or says what is wrong with it.
    async fn reload(&self, file: &Path, watched: &mut WatchedFile) -> String {
        let loaded = match config::load_project(file) {
            Ok(loaded) => loaded,
            Err(faults) => return format!("{faults}\nThe project stays as it was.\n"),
        };
        watched.refers_to(loaded.referred_files());
        let ProjectFile { project, mut identities, .. } = loaded;
        identities.insert(self.me.clone(), self.stand_in.clone());
        match self.control.replace(project, &identities).await {
            Ok(_revision) => {
                format!("{} is in force, revision {}.\n", file.display(), self.control.revision())
            }
            Err(error) => {
                format!("{:#}\nThe project stays as it was.\n", anyhow::Error::from(error))
            }
        }
    }

    async fn end(self) {
        self.proxy.shutdown().await;
        self.control.shutdown().await;
    }
}

/// Who the proxy speaks for when nobody says.
fn somebody() -> ServiceName {
    #[expect(clippy::expect_used, reason = "a constant that is a DNS label")]
    "developer".parse().expect("a DNS label is a name")
}

/// What to paste, for what `me` may call.
fn invitations<'a>(
    callees: impl Iterator<Item = &'a ServiceName>,
    me: &ServiceName,
    outbound: SocketAddr,
) -> String {
    let mut callees = callees.peekable();
    if callees.peek().is_none() {
        return format!(
            "Nothing may be called by {me} yet: grant it something under `permissions`.\n"
        );
    }
    let mut text = "Call by name, in whichever way suits the application:\n\n".to_owned();
    for callee in callees {
        append(
            &mut text,
            format_args!(
                "  curl -x http://{outbound} http://{callee}/\n  curl -H 'Host: {callee}' http://{outbound}/\n"
            ),
        );
    }
    // Programs differ in which of the two they read; curl reads the small one only.
    append(
        &mut text,
        format_args!(
            "  export http_proxy=http://{outbound} HTTP_PROXY=http://{outbound} NO_PROXY=localhost,127.0.0.1,::1\n"
        ),
    );
    text
}

/// Writing into a `String` cannot fail.
fn append(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    let _infallible = text.write_fmt(arguments);
}

/// Writes to the terminal; whoever closed it does not want to know.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _closed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        up: Up,
    }

    fn up(arguments: &[&str]) -> Up {
        Line::parse_from(["up"].iter().chain(arguments)).up
    }

    #[test]
    fn the_example_is_a_project_that_loads_and_names_its_caller() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("project.yaml");
        let up = up(&[file.to_str().unwrap()]);
        assert!(up.write_example().unwrap());
        assert!(!up.write_example().unwrap());
        let loaded = config::load_project(&file).unwrap();
        let me = loaded.first_caller.unwrap();
        assert_eq!(me.as_str(), "web-application");
        let callees = loaded.project.permissions[&me].keys();
        let text = invitations(callees, &me, up.outbound_listen);
        assert!(text.contains("curl -x http://127.0.0.1:15001 http://hello/\n"), "{text}");
        assert!(text.contains("export http_proxy=http://127.0.0.1:15001 HTTP_PROXY="), "{text}");
    }

    #[test]
    fn addresses_in_use_are_all_named_with_their_flags() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let up = up(&[
            "--control-listen",
            &address,
            "--outbound-listen",
            "127.0.0.1:0",
            "--admin-listen",
            &address,
        ]);
        let fault = up.check_addresses().unwrap_err();
        assert!(fault.is::<net::BindErrors>(), "a fault of the configuration");
        let fault = fault.to_string();
        assert!(fault.contains("--control-listen") && fault.contains("--admin-listen"), "{fault}");
        assert!(!fault.contains("--outbound-listen"), "{fault}");
    }

    #[test]
    fn an_address_that_others_reach_is_refused_by_its_own_flag() {
        for flag in ["--control-listen", "--outbound-listen", "--admin-listen"] {
            let fault = up(&[flag, "0.0.0.0:0"]).check_addresses().unwrap_err();
            assert!(fault.is::<Usage>(), "{fault}");
            assert!(fault.to_string().starts_with(&format!("{flag} 0.0.0.0:0 is open")), "{fault}");
        }
    }

    #[test]
    fn the_settings_of_its_proxy_are_right() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("secret"), "s").unwrap();
        let up = up(&[]);
        let me = "web-application".parse().unwrap();
        let flags = up.proxy_settings(folder.path(), &me, up.control_listen);
        let settings = config::load_proxy(None, std::iter::empty(), &flags).unwrap();
        assert_eq!(settings.outbound.unwrap().listen, up.outbound_listen);
        assert!(settings.inbound.is_empty());
    }
}
