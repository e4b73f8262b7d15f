//! `infrar control`: the control plane.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use jiff::SignedDuration;
use url::Url;

use super::watch::{Told, WatchedFile};
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
        let watched = WatchedFile::new(&self.project);
        let file = config::load_project(&self.project)?;
        for note in &file.notes {
            tracing::info!("{note}");
        }
        let mut signals = Signals::listen().context("signals cannot be listened to")?;
        let mut watched =
            watched.with_context(|| format!("{} cannot be watched", self.project.display()))?;
        watched.refers_to(file.referred_files());
        let mut settings = control::Settings::new(self.listen, self.data_dir.clone());
        settings.public_url.clone_from(&self.public_url);
        if let Some(lead) = self.key_lead {
            settings.key_lead = lead.unsigned_abs();
        }
        settings.tls = self
            .cert_file
            .clone()
            .zip(self.key_file.clone())
            .map(|(cert_file, key_file)| TlsFiles { cert_file, key_file });
        let running = Control::start(settings, file.project, file.identities).await?;
        let mut told = Told::default();
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Stop | Signal::StopAtOnce => break,
                    Signal::Reload => told = Told::default(),
                },
                () = watched.changed() => {}
            }
            self.reload(&running, &mut watched, &mut told);
        }
        tracing::info!("told to end");
        tokio::select! {
            () = running.shutdown() => {}
            _again = signals.next() => tracing::warn!("told twice: ending at once"),
        }
        Ok(())
    }

    /// Takes the project over, or says why not and keeps the old one.
    fn reload(&self, running: &Running, watched: &mut WatchedFile, told: &mut Told) {
        let file = match config::load_project(&self.project) {
            Ok(file) => file,
            Err(faults) => {
                watched.failed(faults.referred_files());
                return told.not_taken_over(faults.to_string());
            }
        };
        watched.refers_to(file.referred_files());
        match running.replace(file.project, &file.identities) {
            Ok(_) => {
                *told = Told::default();
                tracing::info!(revision = running.revision(), "the project is in force");
            }
            Err(error) => {
                watched.failed([]);
                told.not_taken_over(format!("{:#}", anyhow::Error::from(error)));
            }
        }
    }
}
