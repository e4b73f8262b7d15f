//! Keeps the verifier in step with the project: one set of keys per issuer, renewed on its own, replaced when the list
//! of issuers changes.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::{runtime::Handle, sync::Notify};
use url::Url;

use crate::{
    api::{Catalog, Client},
    identity::{Fetch, Jwks, KeySet, Trusted, Verifier, control_keys, discovered_keys, keys_at},
    model::Issuer,
    runtime::Supervisor,
};

/// Where an issuer's keys come from; another place means another set.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Place {
    Control,
    At(Url),
    Discovered,
    Fixed(String),
}

/// The issuers whose tokens are accepted right now.
pub(super) struct Trust {
    verifier: Arc<ArcSwap<Verifier>>,
    known: HashMap<(String, Place), Arc<Jwks>>,
    client: Client,
    /// Whether the client leads to a control plane, which then is the project's own issuer.
    has_control: bool,
    /// Keys of an earlier run, by issuer.
    remembered: HashMap<String, Value>,
    followed: Arc<Notify>,
}

impl Trust {
    /// Trusts nobody yet.
    pub(super) fn new(
        client: Client,
        has_control: bool,
        remembered: HashMap<String, Value>,
    ) -> Self {
        let verifier = Arc::new(ArcSwap::from_pointee(Verifier::new(Vec::new())));
        Self {
            verifier,
            known: HashMap::new(),
            client,
            has_control,
            remembered,
            followed: Arc::default(),
        }
    }

    /// Who verifies; changes as the project does.
    pub(super) fn verifier(&self) -> Arc<ArcSwap<Verifier>> {
        Arc::clone(&self.verifier)
    }

    /// The key sets in use, by issuer.
    pub(super) fn sets(&self) -> Vec<Arc<Jwks>> {
        self.known.values().cloned().collect()
    }

    /// Takes over the issuers of a snapshot.
    pub(super) fn follow(&mut self, catalog: &Catalog, supervisor: &Supervisor) {
        let mut trusted = Vec::new();
        let before = std::mem::take(&mut self.known);
        if self.has_control && !catalog.issuer.is_empty() {
            let keys = self.keys(&before, &catalog.issuer, Place::Control, supervisor);
            trusted.extend(keys.map(|keys| Trusted {
                issuer: catalog.issuer.as_str().into(),
                ours: true,
                audiences: Vec::new(),
                keys,
            }));
        }
        for issuer in &catalog.project.issuers {
            let keys = self.keys(&before, &issuer.issuer, place(issuer), supervisor);
            trusted.extend(keys.map(|keys| Trusted {
                issuer: issuer.issuer.as_str().into(),
                ours: false,
                audiences: issuer.audiences.clone(),
                keys,
            }));
        }
        self.verifier.store(Arc::new(Verifier::new(trusted)));
        self.followed.notify_one();
    }

    /// Fetches keys by another client from now on, because it believes other certificates. Those that are known serve
    /// until they are fetched anew.
    pub(super) fn fetch_by(&mut self, client: Client, catalog: &Catalog, supervisor: &Supervisor) {
        self.client = client;
        let known = std::mem::take(&mut self.known);
        self.remembered.extend(known.into_iter().filter_map(|((issuer, _), keys)| {
            Some((issuer, serde_json::to_value(keys.load().source()).ok()?))
        }));
        self.follow(catalog, supervisor);
    }

    /// Tells one listener that the key sets may be others.
    pub(super) fn followed(&self) -> Arc<Notify> {
        Arc::clone(&self.followed)
    }

    /// The keys of an issuer: those in use already, or new ones.
    fn keys(
        &mut self,
        before: &HashMap<(String, Place), Arc<Jwks>>,
        issuer: &str,
        place: Place,
        supervisor: &Supervisor,
    ) -> Option<Arc<Jwks>> {
        let key = (issuer.to_owned(), place);
        if let Some(known) = before.get(&key) {
            self.known.insert(key, Arc::clone(known));
            return Some(Arc::clone(known));
        }
        let made = self.make(issuer, &key.1, supervisor)?;
        self.known.insert(key, Arc::clone(&made));
        Some(made)
    }

    fn make(&self, issuer: &str, place: &Place, supervisor: &Supervisor) -> Option<Arc<Jwks>> {
        let name: Arc<str> = issuer.into();
        let client = self.client.clone();
        let fetch: Fetch = match place {
            Place::Fixed(text) => {
                let json: Value = serde_json::from_str(text).ok()?;
                return match KeySet::from_json(&json) {
                    Ok(keys) => Some(Jwks::fixed(name, keys)),
                    Err(error) => {
                        tracing::error!(%issuer, %error, "an issuer's keys cannot be used");
                        None
                    }
                };
            }
            Place::Control => control_keys(client),
            Place::At(url) => keys_at(client, url.clone()),
            Place::Discovered => discovered_keys(client, Arc::clone(&name)),
        };
        let initial = self
            .remembered
            .get(issuer)
            .and_then(|json| KeySet::from_json(json).ok())
            .unwrap_or_default();
        let keys = Jwks::fetched(name, initial, fetch, Handle::current());
        supervisor.spawn_until_end("jwks", keys.follow());
        Some(keys)
    }
}

fn place(issuer: &Issuer) -> Place {
    match (&issuer.jwks, &issuer.jwks_uri) {
        (Some(jwks), _) => Place::Fixed(jwks.to_string()),
        (None, Some(uri)) => Place::At(uri.clone()),
        (None, None) => Place::Discovered,
    }
}
