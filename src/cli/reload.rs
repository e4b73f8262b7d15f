//! Another file takes over while a proxy runs: whole, or not at all and with its reason.

use std::sync::{
    Arc, Mutex, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use tokio::sync::watch;

use super::{
    settings::{Workshop, reread},
    world::{Reins, lock},
};
use crate::{
    config::{Faults, ProxyFile},
    net::ServerTls,
    proxy,
    runtime::Supervisor,
    telemetry::AccessLog,
};

/// What came of reading settings again, for whoever scrapes.
#[derive(Debug, Default)]
pub(super) struct Reloads {
    applied: AtomicU64,
    refused: AtomicU64,
    behind: AtomicBool,
}

impl Reloads {
    /// So many were applied and refused.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.applied.load(Ordering::Relaxed), self.refused.load(Ordering::Relaxed))
    }

    /// Whether what is in force is what the files say.
    pub(super) fn is_current(&self) -> bool {
        !self.behind.load(Ordering::Relaxed)
    }
}

/// Holds the settings in force and everything that is told of others.
pub(super) struct Helm {
    /// The file in force: what it says of listeners is what is open.
    pub(super) in_force: ProxyFile,
    pub(super) workshop: Workshop,
    pub(super) settings: watch::Sender<Arc<proxy::Settings>>,
    pub(super) reins: Reins,
    pub(super) certificates: Arc<Mutex<Vec<Arc<ServerTls>>>>,
    pub(super) log: Arc<OnceLock<AccessLog>>,
    pub(super) reloads: Arc<Reloads>,
}

impl Helm {
    /// Takes over what was read, or says why not and stays as it is.
    pub(super) fn follow(
        &mut self,
        loaded: Result<ProxyFile, Faults>,
        running: &mut proxy::Running,
        supervisor: &Supervisor,
    ) {
        let taken =
            loaded.map_err(Into::into).and_then(|next| self.take_over(next, running, supervisor));
        let behind = match taken {
            Ok(waiting) if waiting.is_empty() => {
                tracing::info!("the settings are in force");
                false
            }
            Ok(waiting) => {
                let keys = waiting.join(", ");
                tracing::warn!(
                    keys,
                    "the settings are in force, but for these keys: they need a restart"
                );
                true
            }
            Err(error) => {
                self.reloads.refused.fetch_add(1, Ordering::Relaxed);
                self.reloads.behind.store(true, Ordering::Relaxed);
                return tracing::error!(
                    "the settings were not taken over, the old ones stay:\n{error:#}"
                );
            }
        };
        self.reloads.applied.fetch_add(1, Ordering::Relaxed);
        self.reloads.behind.store(behind, Ordering::Relaxed);
    }

    /// Puts a file in force, as far as that goes without a restart; gives the keys that need one. Whatever may fail
    /// comes first.
    fn take_over(
        &mut self,
        next: ProxyFile,
        running: &mut proxy::Running,
        supervisor: &Supervisor,
    ) -> anyhow::Result<Vec<String>> {
        let (file, waiting) = self.in_force.followed_by(next);
        let ports = file.outbound.as_ref().map(|it| it.ports.clone()).unwrap_or_default();
        let bound = running.bind(&ports)?;
        let settings = self.workshop.settings(&file)?;
        let trust_changed = !Arc::ptr_eq(&self.settings.borrow().tls, &settings.tls);
        self.reins.follow(&file, trust_changed, supervisor);
        self.settings.send_replace(Arc::new(settings));
        running.serve(&ports, bound);
        self.in_force = file;
        self.note();
        // What the file points at may be another although the file is not.
        reread(&lock(&self.certificates), ServerTls::reload);
        self.reins.look_again();
        Ok(waiting)
    }

    /// Shows what the settings in force are made of to whoever watches it.
    pub(super) fn note(&self) {
        *lock(&self.certificates) = self.workshop.certificates();
        if let Some(log) = self.workshop.log() {
            let _known_already = self.log.set(log.clone());
        }
    }
}
