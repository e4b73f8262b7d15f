//! `infrar control`: the control plane.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use jiff::SignedDuration;
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::{
    flags::{listen, public_url},
    watch::{Told, WatchedFile},
};
use crate::{
    config,
    control::{self, Control, Identities, Running, TlsFiles},
    model::Project,
    runtime::{Signal, Signals},
    store::Location,
};

/// The control plane: registry, token issuer and their API.
#[derive(Debug, clap::Args)]
pub(crate) struct ControlArgs {
    /// The project [default: project.yaml, if that is there; else what the store has].
    #[arg(long, env = "INFRAR_PROJECT", value_name = "FILE")]
    project: Option<PathBuf>,
    /// Where it listens; without a certificate on loopback only.
    #[arg(long, env = "INFRAR_LISTEN", default_value = "127.0.0.1:7070", value_parser = listen)]
    listen: SocketAddr,
    /// The `iss` of its tokens and the way to it for others [default: scheme and address of --listen].
    #[arg(long, env = "INFRAR_PUBLIC_URL", value_parser = public_url)]
    public_url: Option<Url>,
    /// Its certificate, PEM, leaf first.
    #[arg(long, env = "INFRAR_CERT_FILE", requires = "key_file", value_name = "FILE")]
    cert_file: Option<PathBuf>,
    /// The certificate's key, PEM.
    #[arg(long, env = "INFRAR_KEY_FILE", requires = "cert_file", value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Where the registry is kept: sqlite:FILE, or postgres://USER@HOST/DATABASE for several replicas
    /// [default: registry.db in --data-dir].
    #[arg(long, env = "INFRAR_STORE", value_name = "URL")]
    store: Option<Location>,
    /// Where keys and, without --store, the registry are kept.
    #[arg(long, env = "INFRAR_DATA_DIR", default_value = "./.infrar/control", value_name = "DIR")]
    data_dir: PathBuf,
    /// Reads per second of one caller, twice as many at once; 0: no limit. Heartbeats and reports of proxies count as reads.
    /// Whoever proves nothing (tokens, keys, probes) has 500 per second for each address, and no limit with 0.
    #[arg(long, env = "INFRAR_READ_RATE", default_value_t = 2_000, value_name = "PER SECOND")]
    read_rate: u32,
    /// Changes per second of one caller, five times as many at once; 0: no limit.
    #[arg(long, env = "INFRAR_WRITE_RATE", default_value_t = 100, value_name = "PER SECOND")]
    write_rate: u32,
    /// How long a new key is published before it signs. For tests: below the ten minutes for which verifiers keep a key
    /// set, the first token of a new key makes each of them fetch it.
    #[arg(long, hide = true, value_name = "DURATION")]
    key_lead: Option<SignedDuration>,
}

impl ControlArgs {
    /// Runs until told to end; an edited project, secret or key set is in force as soon as it is saved, if it has no
    /// fault.
    ///
    /// # Errors
    /// Whatever keeps it from beginning.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Watched before it is read, so that no edit falls between.
        let mut watched = self.file().map(Watched::new).transpose()?;
        let project = watched.as_mut().map(Watched::load).transpose()?;
        let mut signals = Signals::listen().context("signals cannot be listened to")?;
        let mut settings = control::Settings::new(self.listen, self.data_dir.clone());
        settings.public_url.clone_from(&self.public_url);
        settings.read_rate = self.read_rate;
        settings.write_rate = self.write_rate;
        if let Some(lead) = self.key_lead {
            settings.key_lead = lead.unsigned_abs();
        }
        settings.tls = self
            .cert_file
            .clone()
            .zip(self.key_file.clone())
            .map(|(cert_file, key_file)| TlsFiles { cert_file, key_file });
        if let Some(store) = &self.store {
            settings.store = store.clone();
        }
        let mut running = Control::start(settings, project).await?;
        if let Some((name, secret)) = running.first_admin() {
            introduce(name, &secret);
        }
        let mut told = Told::default();
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Stop | Signal::StopAtOnce => break,
                    Signal::Reload => told = Told::default(),
                },
                () = changed(&mut watched) => {}
            }
            reload(&running, watched.as_mut(), &mut told).await;
        }
        tracing::info!("told to end");
        tokio::select! {
            () = running.shutdown() => {}
            _again = signals.next() => tracing::warn!("told twice: ending at once"),
        }
        Ok(())
    }

    /// The file that the project is taken from.
    fn file(&self) -> Option<PathBuf> {
        let usual = PathBuf::from(USUAL);
        self.project.clone().or_else(|| usual.exists().then_some(usual))
    }
}

/// Where the project is when nobody says.
const USUAL: &str = "project.yaml";

/// The project's file, and whatever it refers to.
struct Watched {
    path: PathBuf,
    watched: WatchedFile,
}

impl Watched {
    fn new(path: PathBuf) -> anyhow::Result<Self> {
        let watched = WatchedFile::new(&path)
            .with_context(|| format!("{} cannot be watched", path.display()))?;
        Ok(Self { path, watched })
    }

    fn load(&mut self) -> Result<(Project, Identities), config::Faults> {
        let file = config::load_project(&self.path)?;
        for note in &file.notes {
            tracing::info!("{note}");
        }
        self.watched.refers_to(file.referred_files());
        Ok((file.project, file.identities))
    }
}

/// Ends when the file has changed; never without one.
async fn changed(watched: &mut Option<Watched>) {
    match watched {
        Some(watched) => watched.watched.changed().await,
        None => std::future::pending().await,
    }
}

/// Takes the project over, or says why not and keeps the old one.
async fn reload(running: &Running, watched: Option<&mut Watched>, told: &mut Told) {
    let Some(watched) = watched else {
        return tracing::info!(
            "the project is in the store; change it with `infrar project import`"
        );
    };
    let (project, identities) = match watched.load() {
        Ok(loaded) => loaded,
        Err(faults) => {
            watched.watched.failed(faults.referred_files());
            return told.not_taken_over(faults.to_string());
        }
    };
    match running.replace(project, &identities).await {
        Ok(replaced) => {
            *told = Told::default();
            tracing::info!(revision = replaced.revision, "the project is in force");
        }
        Err(error) => {
            watched.watched.failed([]);
            told.not_taken_over(format!("{:#}", anyhow::Error::from(error)));
        }
    }
}

/// Tells the first admin credential: once, to whoever stands before it, and to no log.
#[expect(clippy::print_stderr, reason = "a command speaks to people")]
fn introduce(name: &str, secret: &SecretString) {
    eprintln!(
        "\nThe first admin credential, told this once:\n\n  client_id      {name}\n  client_secret  {}\n\n\
         Keep the secret in a file, then:\n  \
         export INFRAR_TOKEN=$(infrar token get --client-id {name} --client-secret-file FILE)\n",
        secret.expose_secret()
    );
}
