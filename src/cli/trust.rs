//! Keeps the verifier in step with the project: one set of keys per issuer, renewed on its own, replaced when the list
//! of issuers changes.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::sync::watch;
use url::Url;

use crate::{
    api::{Catalog, Client},
    identity::{Fetch, Jwks, KeySet, Trusted, Verifier, control_keys, keys_at},
    model::Issuer,
    runtime::Supervisor,
};

/// Where an issuer's keys come from; another place means another set.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Place {
    Control,
    At(Url),
    Fixed(String),
}

/// The issuers whose tokens are accepted right now.
pub(super) struct Trust {
    verifier: Arc<ArcSwap<Verifier>>,
    known: HashMap<(String, Place), Arc<Jwks>>,
    /// The keys of the project's own issuer, once it is known.
    own: Option<Arc<Jwks>>,
    /// Whether tokens could be verified once; keys that were there stay.
    verified: bool,
    client: Client,
    /// Whether the client leads to a control plane, which then is the project's own issuer.
    has_control: bool,
    /// Keys of an earlier run, by issuer and the place where they came from: see [`remembered_as`].
    remembered: HashMap<String, Value>,
    followed: watch::Sender<u64>,
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
            own: None,
            verified: false,
            client,
            has_control,
            remembered,
            followed: watch::Sender::new(0),
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

    /// The keys that were fetched and are worth keeping, as [`Trust::new`] takes them.
    pub(super) fn to_remember(&self) -> HashMap<String, Value> {
        let fetched = self.known.iter().filter(|(_, keys)| !keys.load().is_empty());
        let kept = fetched.filter_map(|((issuer, place), keys)| {
            let name = remembered_as(issuer, place)?;
            Some((name, serde_json::to_value(keys.load().source()).ok()?))
        });
        kept.collect()
    }

    /// Whether the keys are there that every callee needs: those of the project's own issuer; without a control plane
    /// those of any issuer, if there is one. Once it is so it stays so, whatever issuers come later.
    pub(super) fn can_verify(&mut self) -> bool {
        let there = |keys: &Arc<Jwks>| !keys.load().is_empty();
        self.verified = self.verified
            || if self.has_control {
                self.own.as_ref().is_some_and(there)
            } else {
                self.known.is_empty() || self.known.values().any(there)
            };
        self.verified
    }

    /// Takes over the issuers of a snapshot.
    pub(super) fn follow(&mut self, catalog: &Catalog, supervisor: &Supervisor) {
        let mut trusted = Vec::new();
        let before = std::mem::take(&mut self.known);
        if self.has_control && !catalog.issuer.is_empty() {
            let keys = self.keys(&before, &catalog.issuer, Place::Control, supervisor);
            self.own.clone_from(&keys);
            trusted.extend(keys.map(|keys| Trusted {
                issuer: catalog.issuer.as_str().into(),
                ours: true,
                audiences: Vec::new(),
                keys,
            }));
        }
        for issuer in &catalog.project.issuers {
            let Some(place) = place(issuer) else { continue };
            let keys = self.keys(&before, &issuer.issuer, place, supervisor);
            trusted.extend(keys.map(|keys| Trusted {
                issuer: issuer.issuer.as_str().into(),
                ours: false,
                audiences: shared_audiences(issuer, catalog),
                keys,
            }));
        }
        self.verifier.store(Arc::new(Verifier::new(trusted)));
        self.followed.send_modify(|count| *count += 1);
    }

    /// Fetches keys by another client from now on, because it believes other certificates. Those that are known serve
    /// until they are fetched anew.
    pub(super) fn fetch_by(&mut self, client: Client, catalog: &Catalog, supervisor: &Supervisor) {
        self.client = client;
        let known = self.to_remember();
        self.known.clear();
        self.remembered.extend(known);
        self.follow(catalog, supervisor);
    }

    /// Tells that the key sets may be others; the number is of no further meaning.
    pub(super) fn followed(&self) -> watch::Receiver<u64> {
        self.followed.subscribe()
    }

    /// The keys of the project's own issuer, once it is known.
    pub(super) fn own(&self) -> Option<Arc<Jwks>> {
        self.own.clone()
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
                        let error = &error as &dyn std::error::Error;
                        tracing::error!(%issuer, error, "an issuer's keys cannot be used");
                        None
                    }
                };
            }
            Place::Control => control_keys(client),
            Place::At(url) => keys_at(client, url.clone()),
        };
        let initial = remembered_as(issuer, place)
            .and_then(|name| self.remembered.get(&name))
            .and_then(|json| KeySet::from_json(json).ok())
            .unwrap_or_default();
        let keys = Jwks::fetched(name, initial, fetch, supervisor.clone());
        supervisor.spawn_until_end("jwks", keys.follow());
        Some(keys)
    }
}

/// The name under which keys are remembered: of the issuer and of the place, because whoever could answer at an old place
/// is believed no more once the project names another one. Keys that stand in the project need no remembering.
fn remembered_as(issuer: &str, place: &Place) -> Option<String> {
    match place {
        Place::Control => Some(own_name(issuer)),
        Place::At(url) => Some(format!("{issuer} {url}")),
        Place::Fixed(_) => None,
    }
}

/// The name under which the keys of the project's own issuer are remembered.
pub(super) fn own_name(issuer: &str) -> String {
    format!("{issuer} control")
}

/// The audiences of an issuer that stand for every service. One that is a service's name stands for that service alone,
/// where it is accepted anyway: a token for `reports` opens nothing else.
fn shared_audiences(issuer: &Issuer, catalog: &Catalog) -> Vec<String> {
    let services = &catalog.project.services;
    let shared = issuer.audiences.iter().filter(|name| !services.contains_key(name.as_str()));
    shared.cloned().collect()
}

/// Where the project says that an issuer's keys are; it always does, or the issuer is not trusted.
fn place(issuer: &Issuer) -> Option<Place> {
    match (&issuer.jwks, &issuer.jwks_uri) {
        (Some(jwks), _) => Some(Place::Fixed(jwks.to_string())),
        (None, Some(uri)) => Some(Place::At(uri.clone())),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::runtime::Handle;

    use super::*;
    use crate::api::ClientSettings;

    /// The public key of RFC 7515, appendix A.3.
    fn a_key() -> Value {
        json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": "k1", "alg": "ES256",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]})
    }

    fn issuer(name: &str, jwks: Option<Value>) -> Issuer {
        // Nobody listens on port 1.
        let jwks_uri = jwks.is_none().then(|| "http://127.0.0.1:1/jwks".parse().unwrap());
        Issuer { issuer: name.to_owned(), jwks_uri, jwks, audiences: Vec::new() }
    }

    fn catalog(own: &str, issuers: &[Issuer]) -> Catalog {
        let project = json!({"name": "shop", "networking": {"multi_cloud": true, "default_mode": "public",
            "connections": []}, "services": {}, "permissions": {}, "issuers": issuers, "mode": "enforce"});
        let project = serde_json::from_value(project).unwrap();
        Catalog { revision: 1, issuer: own.to_owned(), project }
    }

    fn trust(has_control: bool, remembered: &[&str]) -> Trust {
        let client = Client::new(ClientSettings::new(Vec::new(), None)).unwrap();
        let remembered = remembered.iter().map(|name| (own_name(name), a_key())).collect();
        Trust::new(client, has_control, remembered)
    }

    #[tokio::test]
    async fn a_callee_waits_for_its_own_issuers_keys_and_for_nobody_elses() {
        let supervisor = Supervisor::new(Handle::current());
        let dead = [issuer("https://dead.example", None)];
        let mut waiting = trust(true, &[]);
        assert!(!waiting.can_verify(), "no snapshot was followed yet");
        waiting.follow(&catalog("https://own", &[issuer("i", Some(a_key()))]), &supervisor);
        assert!(!waiting.can_verify());
        let mut trust = trust(true, &["https://own"]);
        trust.follow(&catalog("https://own", &dead), &supervisor);
        assert!(trust.can_verify());
        // The control plane has moved: the keys of its new name come within moments.
        trust.follow(&catalog("https://moved", &dead), &supervisor);
        assert!(trust.can_verify());
    }

    #[tokio::test]
    async fn keys_of_the_place_that_an_issuer_has_left_are_believed_no_more() {
        let supervisor = Supervisor::new(Handle::current());
        let mut first = trust(false, &[]);
        let old = issuer("https://i", None);
        first.remembered.insert("https://i http://127.0.0.1:1/jwks".to_owned(), a_key());
        first.follow(&catalog("", std::slice::from_ref(&old)), &supervisor);
        assert_eq!(first.to_remember().len(), 1);
        let mut moved = old.clone();
        moved.jwks_uri = Some("http://127.0.0.1:1/moved".parse().unwrap());
        first.follow(&catalog("", std::slice::from_ref(&moved)), &supervisor);
        assert!(first.sets().iter().all(|keys| keys.load().is_empty()));
        // Nor after a restart.
        let client = Client::new(ClientSettings::new(Vec::new(), None)).unwrap();
        let remembered = [("https://i http://127.0.0.1:1/jwks".to_owned(), a_key())].into();
        let mut second = Trust::new(client, false, remembered);
        second.follow(&catalog("", &[moved]), &supervisor);
        assert!(second.sets().iter().all(|keys| keys.load().is_empty()));
        second.follow(&catalog("", &[old]), &supervisor);
        assert!(!second.sets()[0].load().is_empty());
    }

    #[tokio::test]
    async fn without_a_control_plane_one_issuer_with_keys_is_enough() {
        let supervisor = Supervisor::new(Handle::current());
        let (dead, alive) = (issuer("https://dead", None), issuer("https://alive", Some(a_key())));
        let mut waiting = trust(false, &[]);
        waiting.follow(&catalog("", std::slice::from_ref(&dead)), &supervisor);
        assert!(!waiting.can_verify());
        waiting.follow(&catalog("", &[dead.clone(), alive]), &supervisor);
        assert!(waiting.can_verify());
        waiting.follow(&catalog("", &[dead]), &supervisor);
        assert!(waiting.can_verify(), "it was ready before");
        // Nobody is trusted, so public paths are all there is.
        let mut nobody = trust(false, &[]);
        nobody.follow(&catalog("", &[]), &supervisor);
        assert!(nobody.can_verify());
    }
}
