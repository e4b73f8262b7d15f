//! Further sources of endpoints, beside the control plane or the project's file.
//!
//! A source is a future that writes what it finds into its [`Layer`](super::Layer) until it is dropped. A further one is
//! a file of its own, a variant of [`Source`] and a line in each of its matches.

use std::{
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::future::BoxFuture;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    directory::Directory,
    dns::{self, DnsSettings, DnsStats},
    overlay::Layer,
};
use crate::{model::ServiceName, runtime::Supervisor};

/// Where endpoints come from, and how they are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A name in DNS.
    Dns(DnsSettings),
}

/// What a source tells of itself.
#[derive(Clone, Debug)]
pub enum Report {
    /// A name in DNS.
    Dns(DnsSettings, Arc<DnsStats>),
}

impl Source {
    /// The service whose endpoints it finds.
    #[must_use]
    pub fn service(&self) -> &ServiceName {
        match self {
            Self::Dns(settings) => &settings.service,
        }
    }

    fn begin(&self) -> Report {
        match self {
            Self::Dns(settings) => Report::Dns(settings.clone(), Arc::default()),
        }
    }
}

impl Report {
    fn source(&self) -> &'static str {
        match self {
            Self::Dns(..) => "dns",
        }
    }

    fn follow(self, layer: Arc<Layer>) -> BoxFuture<'static, ()> {
        match self {
            Self::Dns(settings, stats) => Box::pin(dns::follow(settings, layer, stats)),
        }
    }
}

/// The sources that run.
pub struct Sources {
    directory: Arc<Directory>,
    supervisor: Supervisor,
    running: Mutex<Vec<Running>>,
}

struct Running {
    source: Source,
    report: Report,
    /// Ends it when dropped.
    end: DropGuard,
}

impl Sources {
    /// None yet.
    #[must_use]
    pub fn new(directory: Arc<Directory>, supervisor: Supervisor) -> Self {
        Self { directory, supervisor, running: Mutex::default() }
    }

    /// Has exactly these run from now on. One that runs already goes on; one that takes the place of another for the
    /// same service lets that go on until it has found something itself.
    pub fn follow(&self, wanted: &[Source]) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut kept, mut old): (Vec<_>, Vec<_>) =
            mem::take(&mut *running).into_iter().partition(|it| wanted.contains(&it.source));
        for source in wanted {
            if kept.iter().any(|it| it.source == *source) {
                continue;
            }
            let before;
            (before, old) = old.into_iter().partition(|it| it.source.service() == source.service());
            kept.push(self.start(source, before));
        }
        *running = kept;
    }

    /// What each of them tells of itself.
    #[must_use]
    pub fn reports(&self) -> Vec<Report> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.iter().map(|it| it.report.clone()).collect()
    }

    fn start(&self, source: &Source, before: Vec<Running>) -> Running {
        let (end, report) = (CancellationToken::new(), source.begin());
        let layer = Arc::new(self.directory.layer());
        layer.succeed(before.into_iter().map(|it| it.end).collect());
        let (told, following) = (end.clone(), report.clone());
        // The layer outlives a panic: what was found stays while the source begins again.
        self.supervisor.spawn_restarting(report.source(), move || {
            let following = following.clone().follow(Arc::clone(&layer));
            let told = told.clone();
            async move {
                told.run_until_cancelled_owned(following).await;
            }
        });
        Running { source: source.clone(), report, end: end.drop_guard() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::runtime::Handle;

    use super::*;
    use crate::{
        discovery::DnsKind,
        model::{AuthMethod, NetworkMode, Scheme},
        telemetry::overhear,
    };

    fn source(service: &str, name: &str) -> Source {
        Source::Dns(DnsSettings {
            service: service.parse().unwrap(),
            name: name.to_owned(),
            kind: DnsKind::Srv,
            scheme: Scheme::Https,
            place: "azure_eastus".parse().unwrap(),
            zone: None,
            mode: NetworkMode::Public,
            auth_method: AuthMethod::None,
            // Nobody answers there.
            resolver: Some("127.0.0.1:9".parse().unwrap()),
            min_ttl: Duration::from_secs(1),
            max_ttl: Duration::from_secs(1),
        })
    }

    #[tokio::test]
    async fn what_is_still_wanted_goes_on_and_what_is_not_ends() {
        let (_log, _guard) = overhear("info");
        let (directory, supervisor) = (Arc::default(), Supervisor::new(Handle::current()));
        let sources = Sources::new(Arc::clone(&directory), supervisor.clone());
        sources.follow(&[source("a", "a.example"), source("b", "b.example")]);
        assert_eq!(supervisor.running(), ["dns", "dns"]);
        let counts = |sources: &Sources| -> Vec<_> {
            let each = sources.reports().into_iter();
            each.map(|Report::Dns(settings, stats)| (settings.name, stats)).collect()
        };
        let before = counts(&sources);
        sources.follow(&[source("b", "other.example"), source("a", "a.example")]);
        let after = counts(&sources);
        assert_eq!(after[0].0, "a.example");
        assert!(Arc::ptr_eq(&before[0].1, &after[0].1), "it is the same one");
        assert_eq!((after[1].0.as_str(), after.len()), ("other.example", 2));
        // The one whose place is taken goes on; nobody takes the place of those that are wanted no more.
        assert_eq!(supervisor.running().len(), 3);
        sources.follow(&[]);
        while !supervisor.running().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(!directory.is_awaiting());
    }
}
