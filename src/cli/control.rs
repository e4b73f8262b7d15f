//! `infrar control`: the control plane.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use url::Url;

use super::watch::WatchedFile;
use crate::{
    config,
    control::{self, Control, Running, TlsFiles},
    runtime::{Signal, Signals},
};

/// The control plane: registry, token issuer and their API.
#[derive(Debug, clap::Args)]
pub(crate) struct ControlArgs {
    /// The project.
    #[arg(long, env = "INFRAR_PROJECT", default_value = "project.yaml", value_name = "FILE")]
    project: PathBuf,
    /// Where it listens; without a certificate on loopback only.
    #[arg(long, env = "INFRAR_LISTEN", default_value = "127.0.0.1:7070")]
    listen: SocketAddr,
    /// The `iss` of its tokens and the way to it for others [default: scheme and address of --listen].
    #[arg(long, env = "INFRAR_PUBLIC_URL")]
    public_url: Option<Url>,
    /// Its certificate, PEM, leaf first.
    #[arg(long, env = "INFRAR_CERT_FILE", requires = "key_file", value_name = "FILE")]
    cert_file: Option<PathBuf>,
    /// The certificate's key, PEM.
    #[arg(long, env = "INFRAR_KEY_FILE", requires = "cert_file", value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Where keys and the revision are kept.
    #[arg(long, env = "INFRAR_DATA_DIR", default_value = "./.infrar/control", value_name = "DIR")]
    data_dir: PathBuf,
}

impl ControlArgs {
    /// Runs until told to end; an edited project is in force as soon as it is saved, if it has no fault.
    ///
    /// # Errors
    /// Whatever keeps it from beginning.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let file = config::load_project(&self.project)?;
        for note in &file.notes {
            tracing::info!("{note}");
        }
        let mut signals = Signals::listen().context("signals cannot be listened to")?;
        let mut watched = WatchedFile::new(&self.project)
            .with_context(|| format!("{} cannot be watched", self.project.display()))?;
        let mut settings = control::Settings::new(self.listen, self.data_dir.clone());
        settings.public_url.clone_from(&self.public_url);
        settings.tls = self
            .cert_file
            .clone()
            .zip(self.key_file.clone())
            .map(|(cert_file, key_file)| TlsFiles { cert_file, key_file });
        let running = Control::start(settings, file.project, file.identities).await?;
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Stop | Signal::StopAtOnce => break,
                    Signal::Reload => self.reload(&running),
                },
                () = watched.changed() => self.reload(&running),
            }
        }
        tracing::info!("told to end");
        tokio::select! {
            () = running.shutdown() => {}
            _again = signals.next() => tracing::warn!("told twice: ending at once"),
        }
        Ok(())
    }

    /// Takes the project over, or says why not and keeps the old one.
    fn reload(&self, running: &Running) {
        let file = match config::load_project(&self.project) {
            Ok(file) => file,
            Err(faults) => {
                return tracing::error!(
                    "the project was not taken over, the old one stays:\n{faults}"
                );
            }
        };
        match running.replace(file.project, &file.identities) {
            Ok(_) => tracing::info!(revision = running.revision(), "the project is in force"),
            Err(error) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "the project was not taken over, the old one stays"
            ),
        }
    }
}
