//! What a proxy tells the control plane of itself: where its service can be reached, that it still is, and which revision
//! it serves.
//!
//! An endpoint that is told of here has a lease: a proxy that dies is gone with it, one that ends says so. Nothing waits for
//! any of this, and a control plane that is away finds everything told again when it is back.

use std::{sync::Arc, time::Duration};

use secrecy::SecretString;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use uuid::Uuid;

use crate::{
    api::{Adjustment, Client, ClientError, ProxyReport, Registration},
    discovery::{
        Directory, Passes,
        registry::{Outage, chain, with_pass},
    },
    model::{EndpointId, EndpointState, Place, ServiceName},
};

/// How often a proxy is heard of at least.
const REPORT: Duration = Duration::from_secs(30);
/// How soon it is said again what was not heard, or is not true any more.
const SOON: Duration = Duration::from_secs(3);
/// How long a new revision waits to be reported, at most: a thousand proxies have it at the same moment.
const SPREAD: Duration = Duration::from_millis(250);
/// After a refusal that time alone does not mend.
const REFUSED: Duration = Duration::from_secs(60);
/// The first pause after a failure, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// How long a farewell may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often it is looked whether the proxy has become ready.
const LOOK: Duration = Duration::from_millis(250);

/// An endpoint that is told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertisement {
    /// Its id.
    pub id: EndpointId,
    /// What is said of it.
    pub registration: Registration,
}

/// How far the end of the proxy has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// It serves.
    #[default]
    Here,
    /// It finishes what it has.
    Leaving,
    /// It answers nobody any more.
    Gone,
}

/// What there is to know about a proxy.
#[derive(Clone)]
pub struct Introduction {
    /// Who it speaks for.
    pub service: ServiceName,
    /// `sidecar`, `edge` or `dev`.
    pub role: &'static str,
    /// Where it runs.
    pub place: Option<Place>,
    /// The endpoints that it tells of.
    pub endpoints: Vec<Advertisement>,
}

/// Whether the proxy serves.
pub type AskReady = Arc<dyn Fn() -> bool + Send + Sync>;

/// The revision that every worker of the proxy serves.
pub type AskServed = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Tells the control plane about this proxy.
#[derive(Clone)]
pub struct Presence {
    client: Client,
    passes: Arc<dyn Passes>,
    me: Arc<Introduction>,
    instance: Uuid,
    stage: watch::Sender<Stage>,
    /// How many endpoints have taken leave.
    left: watch::Sender<usize>,
}

impl Presence {
    /// Tells the control plane behind `client`.
    #[must_use]
    pub fn new(client: Client, passes: Arc<dyn Passes>, me: Introduction) -> Self {
        Self {
            client,
            passes,
            me: Arc::new(me),
            instance: Uuid::now_v7(),
            stage: watch::Sender::new(Stage::Here),
            left: watch::Sender::new(0),
        }
    }

    /// Says that the proxy finishes what it has: its endpoints get nothing new.
    pub fn leave(&self) {
        self.stage.send_if_modified(|stage| {
            let here = *stage == Stage::Here;
            *stage = (*stage).max(Stage::Leaving);
            here
        });
    }

    /// Takes its endpoints away, and waits for that a moment.
    pub async fn gone(&self) {
        self.stage.send_replace(Stage::Gone);
        let all = self.me.endpoints.len();
        let mut left = self.left.subscribe();
        if timeout(FAREWELL, left.wait_for(|left| *left >= all)).await.is_err() {
            tracing::debug!(
                "the control plane was not told of the end; the leases end by themselves"
            );
        }
    }

    /// Reports which revision is served, until dropped.
    pub async fn report(self, directory: Arc<Directory>, served: AskServed) {
        let mut changes = directory.changes();
        loop {
            sleep(SPREAD.mul_f64(fastrand::f64())).await;
            changes.mark_unchanged();
            // Workers take a snapshot over in their own time.
            let wanted = directory.load().map_or(0, |catalog| catalog.revision);
            let until = Instant::now() + LOOK;
            while served() < wanted && Instant::now() < until {
                sleep(Duration::from_millis(10)).await;
            }
            let report = ProxyReport {
                revision: served(),
                place: self.me.place.clone(),
                role: self.me.role.to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            };
            let told = self.told(&report).await;
            if let Err(error) = &told {
                tracing::debug!(error = &**error, "which revision is served was not reported");
            }
            // Soon again when the control plane did not hear it, or when workers are not there yet.
            let pause = if told.is_err() || report.revision < wanted { SOON } else { REPORT };
            let again = Instant::now() + pause.mul_f64(fastrand::f64().mul_add(0.2, 0.8));
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = sleep_until(again) => {}
            }
        }
    }

    async fn told(&self, report: &ProxyReport) -> Result<(), Failure> {
        let report = |pass| async move { self.client.report(&pass, self.instance, report).await };
        Ok(with_pass(&*self.passes, report).await?)
    }

    /// Registers the endpoints once the proxy is ready and keeps them registered; ends when they have taken leave.
    pub async fn advertise(self, ready: AskReady) {
        let each = self.me.endpoints.iter().map(|endpoint| {
            let (presence, ready) = (&self, &ready);
            async move {
                presence.keep(endpoint, ready).await;
                presence.left.send_modify(|left| *left += 1);
            }
        });
        futures_util::future::join_all(each).await;
    }

    async fn keep(&self, endpoint: &Advertisement, ready: &AskReady) {
        let mut stage = self.stage.subscribe();
        while !ready() && *stage.borrow() == Stage::Here {
            sleep(LOOK).await;
        }
        let lease = Duration::from_secs(endpoint.registration.ttl_seconds);
        let mut told = Told::default();
        loop {
            let now = *stage.borrow_and_update();
            if told.stage == Some(Stage::Gone) || (now == Stage::Gone && told.stage.is_none()) {
                return;
            }
            let outcome = self.say(endpoint, now, &told).await;
            let next = match outcome {
                Ok(()) => {
                    told.succeeded(now, endpoint);
                    // A little apart from others that began with us.
                    lease.mul_f64(fastrand::f64().mul_add(0.1, 0.28))
                }
                Err(failure) => told.failed(&failure, endpoint),
            };
            // An end that could not be told is not worth waiting for: the lease ends too.
            if now == Stage::Gone {
                return;
            }
            tokio::select! {
                _changed = stage.changed() => {}
                () = sleep(next) => {}
            }
        }
    }

    /// Says what is true now: anew, or that it still is.
    async fn say(&self, endpoint: &Advertisement, now: Stage, told: &Told) -> Result<(), Failure> {
        let say = |pass| async move { self.say_with(&pass, endpoint, now, told).await };
        Ok(with_pass(&*self.passes, say).await?)
    }

    async fn say_with(
        &self,
        bearer: &SecretString,
        endpoint: &Advertisement,
        now: Stage,
        told: &Told,
    ) -> Result<(), ClientError> {
        let (service, id) = (&self.me.service, &endpoint.id);
        match now {
            Stage::Here if told.stage == Some(Stage::Here) => {
                self.client.heartbeat(bearer, service, id).await?;
            }
            Stage::Here => {
                self.client.register(bearer, service, id, &endpoint.registration).await?;
            }
            Stage::Leaving if told.stage.is_none() => {}
            Stage::Leaving => {
                let draining = Adjustment { state: Some(EndpointState::Draining), weight: None };
                self.client.adjust(bearer, service, id, &draining, None).await?;
                self.client.heartbeat(bearer, service, id).await?;
            }
            Stage::Gone => self.client.remove(bearer, service, id, None).await?,
        }
        Ok(())
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What the control plane knows of an endpoint.
#[derive(Default)]
struct Told {
    stage: Option<Stage>,
    pause: Option<Duration>,
    /// Why it is not registered, as far as the log has told.
    outage: Outage,
}

impl Told {
    fn succeeded(&mut self, now: Stage, endpoint: &Advertisement) {
        if now == Stage::Here && self.stage != Some(Stage::Here) {
            tracing::info!(endpoint = %endpoint.id, "this endpoint is registered");
        }
        *self = Self { stage: Some(now), pause: None, outage: Outage::default() };
    }

    /// How long to wait before it is tried again.
    fn failed(&mut self, failure: &Failure, endpoint: &Advertisement) -> Duration {
        let refusal = failure.source().and_then(|cause| cause.downcast_ref::<ClientError>());
        let refusal = refusal.or_else(|| failure.downcast_ref::<ClientError>());
        if let Some(ClientError::Refused { code, .. }) = refusal
            && code == "unknown-endpoint"
        {
            // Its lease has ended: register it again, at once.
            self.stage = None;
            return Duration::ZERO;
        }
        if self.outage.is_news(chain(&**failure), Instant::now()) {
            tracing::warn!(endpoint = %endpoint.id, error = &**failure, "this endpoint is not registered");
        }
        if refusal.is_some_and(|error| !error.is_temporary()) {
            return REFUSED.mul_f64(fastrand::f64().mul_add(0.5, 0.5));
        }
        let (first, longest) = PAUSES;
        let pause = self.pause.map_or(first, |pause| (pause * 2).min(longest));
        self.pause = Some(pause);
        pause.mul_f64(fastrand::f64().mul_add(0.5, 0.5))
    }
}
