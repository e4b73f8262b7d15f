//! `infrar services`: what the control plane knows, and endpoints by hand.

use std::fmt::Write;

use super::{
    reach::{Form, print, table, tame},
    registering,
};
use crate::{
    api::{ServiceAnswer, ServiceList},
    model::{Endpoint, NetworkMode, ScopeSet, ServiceName},
};

/// Services as the control plane knows them.
#[derive(Debug, clap::Args)]
pub struct Services {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Every service, where it runs and which scopes it has.
    List {
        #[command(flatten)]
        form: Form,
    },
    /// One service: its endpoints, and who may call it.
    Show {
        /// Its name.
        service: ServiceName,
        #[command(flatten)]
        form: Form,
    },
    Register(Box<registering::Register>),
    /// Let an endpoint finish what it has and give it nothing new.
    Drain(registering::One),
    /// Take an endpoint away that was registered. A sidecar that is alive registers its own again: drain that one instead.
    Remove(registering::One),
    /// Print every change as it comes, until Ctrl-C.
    Watch {
        #[command(flatten)]
        form: Form,
    },
}

impl Services {
    /// Asks and prints.
    ///
    /// # Errors
    /// Whatever keeps it from an answer.
    pub async fn run(self) -> anyhow::Result<()> {
        let text = match self.verb {
            Verb::List { form } => {
                let list = form.reach.client()?.services(form.bearer.secret()?).await;
                let list = form.reach.advised(list)?;
                if form.json { serde_json::to_string_pretty(&list)? } else { listed(&list) }
            }
            Verb::Show { service, form } => {
                let shown = form.reach.client()?.service(form.bearer.secret()?, &service).await;
                let shown = form.reach.advised(shown)?;
                if form.json { serde_json::to_string_pretty(&shown)? } else { told(&shown) }
            }
            Verb::Register(register) => return register.run().await,
            Verb::Drain(one) => return one.drain().await,
            Verb::Remove(one) => return one.remove().await,
            Verb::Watch { form } => return registering::watch(form).await,
        };
        Ok(print(&tame(&text))?)
    }
}

fn listed(list: &ServiceList) -> String {
    let rows: Vec<_> = list
        .services
        .iter()
        .map(|row| {
            let places: Vec<String> = row.places.iter().map(ToString::to_string).collect();
            [
                row.name.to_string(),
                format!("{}/{}", row.active, row.endpoints),
                places.join(" "),
                row.scopes.to_string(),
            ]
        })
        .collect();
    table(["SERVICE", "ACTIVE", "PLACES", "SCOPES"], &rows)
}

fn told(shown: &ServiceAnswer) -> String {
    let ServiceAnswer { revision, name, service, callers } = shown;
    let mut text =
        format!("{name} (revision {revision})\nscopes: {}\n\n", or_none(&service.scopes));
    let endpoints: Vec<_> = service.endpoints.iter().map(endpoint).collect();
    text += &table(["ENDPOINT", "PLACE", "STATE", "WEIGHT", "ADDRESSES"], &endpoints);
    let rows: Vec<_> =
        callers.iter().map(|(caller, scopes)| [caller.to_string(), or_none(scopes)]).collect();
    // Writing to a string cannot fail.
    let _always = if rows.is_empty() {
        write!(text, "\n\nnobody may call it")
    } else {
        write!(text, "\n\n{}", table(["CALLER", "SCOPES"], &rows))
    };
    text
}

fn endpoint(endpoint: &Endpoint) -> [String; 5] {
    let place = endpoint.zone.as_ref().map_or_else(
        || endpoint.place.to_string(),
        |zone| format!("{} {}", endpoint.place, zone.as_str()),
    );
    let modes = [NetworkMode::Public, NetworkMode::Vpn, NetworkMode::PrivatePeering];
    let addresses: Vec<String> = modes
        .into_iter()
        .filter_map(|mode| Some(format!("{mode}={}", endpoint.address(mode)?)))
        .collect();
    [
        endpoint.id.to_string(),
        place,
        endpoint.state.as_str().to_owned(),
        endpoint.weight.to_string(),
        addresses.join(" "),
    ]
}

fn or_none(scopes: &ScopeSet) -> String {
    if scopes.is_empty() { "none".to_owned() } else { scopes.to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_is_a_table() {
        let list: ServiceList = serde_json::from_value(json!({
            "revision": 3,
            "services": [{
                "name": "reports", "endpoints": 2, "active": 1,
                "places": ["aws_us_east_1", "azure_eastus"], "scopes": ["read:data"],
            }],
        }))
        .unwrap();
        assert_eq!(
            listed(&list),
            "SERVICE  ACTIVE  PLACES                      SCOPES\n\
             reports  1/2     aws_us_east_1 azure_eastus  read:data"
        );
    }

    #[test]
    fn an_endpoint_shows_an_address_per_mode_it_has() {
        let shown: Endpoint = serde_json::from_value(json!({
            "id": "azure-eastus", "url": "https://data.example", "internal_url": "https://10.1.1.10",
            "private_url": null, "place": "azure_eastus", "zone": "1", "auth_method": "bearer_token",
            "weight": 100, "state": "active",
        }))
        .unwrap();
        let cells = endpoint(&shown);
        assert_eq!(cells[1], "azure_eastus 1");
        assert_eq!(cells[4], "public=https://data.example vpn=https://10.1.1.10");
    }
}
