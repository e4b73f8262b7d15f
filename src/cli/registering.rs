//! `infrar services register | drain | remove | watch`: endpoints by hand, and every change as it comes.

use std::time::Duration;

use anyhow::bail;
use jiff::SignedDuration;
use secrecy::SecretString;
use tokio::time::{interval, sleep};

use super::reach::{Form, print, tame};
use crate::{
    api::{Adjustment, Client, ClientError, EndpointAnswer, Patch, Registration, Source, Told},
    model::{AuthMethod, EndpointId, EndpointState, Origin, Place, ServiceName, Zone},
    runtime::{Signal, Signals},
};

/// Register an endpoint. It is gone when its time is over, unless it is registered again or kept.
#[derive(Debug, clap::Args)]
pub(super) struct Register {
    /// The service.
    service: ServiceName,
    /// The endpoint's id, such as azure-eastus.
    id: EndpointId,
    /// Its address in mode public: https://HOST.
    #[arg(long)]
    url: Origin,
    /// Its address in mode vpn; scheme and port default to those of --url.
    #[arg(long, value_name = "ADDRESS")]
    internal_url: Option<String>,
    /// Its address in mode `private_peering`; scheme and port default to those of --url.
    #[arg(long, value_name = "ADDRESS")]
    private_url: Option<String>,
    /// Provider and region, such as `aws_us_east_1`.
    #[arg(long)]
    place: Place,
    /// The availability zone.
    #[arg(long)]
    zone: Option<Zone>,
    /// Send no token there.
    #[arg(long)]
    no_token: bool,
    /// Its share among unequal weights.
    #[arg(long, default_value_t = 100)]
    weight: u32,
    /// How long it stays: 5s to 1h.
    #[arg(long, default_value = "30s", value_name = "DURATION")]
    ttl: SignedDuration,
    /// Stay, and keep it registered until Ctrl-C; then remove it.
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    form: Form,
}

/// Which endpoint.
#[derive(Debug, clap::Args)]
pub(super) struct One {
    /// The service.
    service: ServiceName,
    /// The endpoint's id.
    id: EndpointId,
    #[command(flatten)]
    form: Form,
}

impl Register {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let inner = |text: &Option<String>| {
            text.as_deref().map(|text| Origin::parse_relative(text, &self.url)).transpose()
        };
        let registration = Registration {
            internal_url: inner(&self.internal_url)?,
            private_url: inner(&self.private_url)?,
            url: self.url.clone(),
            place: self.place.clone(),
            zone: self.zone.clone(),
            auth_method: if self.no_token { AuthMethod::None } else { AuthMethod::BearerToken },
            weight: self.weight,
            state: EndpointState::Active,
            ttl_seconds: self.ttl.unsigned_abs().as_secs(),
        };
        let (client, bearer) = (self.form.reach.client()?, self.form.bearer.secret()?);
        let answer = client.register(bearer, &self.service, &self.id, &registration).await;
        let answer = self.form.reach.advised(answer)?;
        show(&answer, self.form.json)?;
        if self.keep {
            self.keep(&client, bearer, &registration).await?;
        }
        Ok(())
    }

    async fn keep(
        &self,
        client: &Client,
        bearer: &SecretString,
        registration: &Registration,
    ) -> anyhow::Result<()> {
        let mut signals = Signals::listen()?;
        let mut beat = interval(Duration::from_secs(registration.ttl_seconds) / 3);
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Stop | Signal::StopAtOnce => break,
                    Signal::Reload => {}
                },
                _now = beat.tick() => {
                    match client.heartbeat(bearer, &self.service, &self.id).await {
                        Err(ClientError::Refused { code, .. }) if code == "unknown-endpoint" => {
                            client.register(bearer, &self.service, &self.id, registration).await?;
                        }
                        Err(error) if error.is_temporary() => tracing::warn!(
                            error = &error as &dyn std::error::Error, "no heartbeat this time"
                        ),
                        outcome => drop(outcome?),
                    }
                }
            }
        }
        Ok(client.remove(bearer, &self.service, &self.id, None).await?)
    }
}

impl One {
    /// Gives it nothing new.
    pub(super) async fn drain(self) -> anyhow::Result<()> {
        let draining = Adjustment { state: Some(EndpointState::Draining), weight: None };
        let client = self.form.reach.client()?;
        let bearer = self.form.bearer.secret()?;
        let answer = client.adjust(bearer, &self.service, &self.id, &draining, None).await;
        let answer = self.form.reach.advised(answer)?;
        show(&answer, self.form.json)
    }

    /// Takes it away.
    pub(super) async fn remove(self) -> anyhow::Result<()> {
        let client = self.form.reach.client()?;
        let bearer = self.form.bearer.secret()?;
        self.form.reach.advised(client.remove(bearer, &self.service, &self.id, None).await)?;
        if self.form.json {
            return Ok(());
        }
        Ok(print(&format!("{} of {} is removed", self.id, self.service))?)
    }
}

/// Prints every change until Ctrl-C, whoever of the control planes is lost meanwhile.
pub(super) async fn watch(form: Form) -> anyhow::Result<()> {
    let (client, bearer) = (form.reach.client()?, form.bearer.secret()?);
    let answer = form.reach.advised(client.catalog(bearer, None).await)?;
    let Some((catalog, _)) = answer else {
        bail!("the control plane answered a question that was not asked");
    };
    let mut revision = catalog.revision;
    loop {
        match follow(&form, &client, bearer, &mut revision).await {
            Ok(()) => {}
            Err(error) => match error.downcast_ref::<ClientError>() {
                Some(lost) if lost.is_temporary() => {
                    tracing::warn!(error = &*error, "the control plane is not heard; trying again");
                }
                Some(_) | None => return Err(error),
            },
        }
        sleep(AGAIN).await;
    }
}

/// Between two tries to hear a control plane.
const AGAIN: Duration = Duration::from_secs(1);

/// Prints what one stream says, until it ends: with the token, or because the control plane ends.
async fn follow(
    form: &Form,
    client: &Client,
    bearer: &SecretString,
    revision: &mut u64,
) -> anyhow::Result<()> {
    let mut watch = match client.watch(bearer, *revision).await {
        Err(error) if error.is_temporary() => return Err(error.into()),
        answer => form.reach.advised(answer)?,
    };
    while let Some(told) = watch.next().await? {
        *revision = match &told {
            Told::Change(change) => change.revision,
            Told::Resync(standing) => standing.revision,
            Told::Current(_) => continue,
        };
        let text = if form.json { as_json(&told)? } else { sentences(&told) };
        print(&tame(&text))?;
    }
    Ok(())
}

fn as_json(told: &Told) -> serde_json::Result<String> {
    match told {
        Told::Change(change) => serde_json::to_string(change),
        Told::Resync(standing) | Told::Current(standing) => serde_json::to_string(standing),
    }
}

fn sentences(told: &Told) -> String {
    match told {
        Told::Resync(standing) => format!("revision {}: more than can be told", standing.revision),
        Told::Current(standing) => format!("revision {}: still", standing.revision),
        Told::Change(change) => {
            let patches: Vec<String> = change.patches.iter().map(sentence).collect();
            let what =
                if patches.is_empty() { "nothing that proxies see" } else { &patches.join("; ") };
            format!("revision {}: {what}", change.revision)
        }
    }
}

fn sentence(patch: &Patch) -> String {
    match patch {
        Patch::Settings(_) => "the project's settings are others".to_owned(),
        Patch::Service { name, service: Some(service) } => {
            format!("{name} is said anew, with {} endpoints", service.endpoints.len())
        }
        Patch::Service { name, service: None } => format!("{name} is gone"),
        Patch::Endpoint { service, id, endpoint: Some(endpoint) } => format!(
            "{id} of {service} is {} at {}, weight {}",
            endpoint.state.as_str(),
            endpoint.url,
            endpoint.weight
        ),
        Patch::Endpoint { service, id, endpoint: None } => format!("{id} of {service} is gone"),
    }
}

fn show(answer: &EndpointAnswer, json: bool) -> anyhow::Result<()> {
    if json {
        return Ok(print(&tame(&serde_json::to_string_pretty(answer)?))?);
    }
    let EndpointAnswer { revision, service, source, expires_in, endpoint } = answer;
    let stays = match (source, expires_in) {
        (Source::Project, _) => "as long as the project names it".to_owned(),
        (Source::Lease, Some(left)) => format!("for {left} s without a heartbeat"),
        (Source::Lease, None) => "until its lease ends".to_owned(),
    };
    let text = format!(
        "{} of {service}: {} at {}, {stays} (revision {revision})",
        endpoint.id,
        endpoint.state.as_str(),
        endpoint.url
    );
    Ok(print(&tame(&text))?)
}
