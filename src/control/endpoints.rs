//! Endpoints come and go: register, renew, adjust, remove. What each means for the next version is decided here; nothing of
//! it waits or knows HTTP.

use crate::{
    api::{Adjustment, EndpointAnswer, Registration, Source},
    control::{
        book::{Book, Key, Leased, adjust},
        leases::lease_of,
        registry::{Draft, Version},
        reject::Rejection,
        services::unknown,
    },
    model::{AuthMethod, Endpoint, EndpointId, Origin, Scheme, ServiceName},
    store::Write,
};

/// The shortest and the longest lease, in seconds.
const TTL: std::ops::RangeInclusive<u64> = 5..=3600;
/// Shares beyond this are no shares.
pub(super) const HEAVIEST: u32 = 1_000_000;

/// Which endpoint, of which service.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) service: ServiceName,
    pub(super) id: EndpointId,
}

/// What a request wants to be true before it changes anything (RFC 9110 §13.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Precondition {
    /// `if-match`: one of these revisions, or (empty) that there is an endpoint at all.
    pub(super) is: Option<Vec<u64>>,
    /// `if-none-match: *`: that there is none yet.
    pub(super) absent: bool,
}

impl Precondition {
    fn holds(&self, book: &Book, target: &Target) -> Result<(), Rejection> {
        let found = book.endpoint(&target.service, &target.id).map(|(_, _, revision)| revision);
        let is = self.is.as_ref().is_none_or(|wanted| {
            found.is_some_and(|found| wanted.is_empty() || wanted.contains(&found))
        });
        let absent = !self.absent || found.is_none();
        if is && absent {
            return Ok(());
        }
        Err(Rejection::RevisionMismatch { found })
    }
}

/// Registers an endpoint, or says anew what is registered.
pub(super) fn register(
    draft: &mut Draft,
    target: &Target,
    owner: &ServiceName,
    registration: &Registration,
    precondition: &Precondition,
) -> Result<(), Rejection> {
    let Target { service, id } = target;
    let book = draft.book();
    let project = book.project().ok_or(Rejection::NoProject)?;
    let Some(written) = book.written(service) else {
        return Err(unknown(project, service.as_str()));
    };
    if written.endpoints.iter().any(|endpoint| endpoint.id == *id) {
        return Err(Rejection::OwnedByProject { service: service.clone(), id: id.clone() });
    }
    precondition.holds(book, target)?;
    let endpoint = endpoint(id, registration);
    let known = book.leased(service, id);
    let leased = Leased {
        ordinal: known.map_or_else(|| book.next_ordinal(), |known| known.ordinal),
        endpoint,
        owner: owner.clone(),
        ttl_seconds: registration.ttl_seconds,
    };
    if known == Some(&leased) {
        return Ok(());
    }
    let host = registration.url.host();
    let name = host.to_string();
    // As in the project itself: an edge tells services apart by host, and no edge stands before those on this machine.
    if !host.is_loopback()
        && let Some(taken) = draft.owner_of(&name).filter(|taken| *taken != service)
    {
        return Err(Rejection::HostTaken { host: name, service: taken.clone() });
    }
    let text = serde_json::to_string(&leased).map_err(|_unwritable| Rejection::Internal)?;
    draft.add_at(name, service, vec![Write::put(Key::Leased(service, id).text(), text)])
}

/// Changes state or weight.
pub(super) fn change(
    draft: &mut Draft,
    target: &Target,
    adjustment: &Adjustment,
    precondition: &Precondition,
) -> Result<(), Rejection> {
    let Target { service, id } = target;
    let book = draft.book();
    let (endpoint, source, _) = found(book, target)?;
    if adjustment.weight.is_some_and(|weight| weight > HEAVIEST) {
        return Err(Rejection::BadRequest { detail: format!("weight is at most {HEAVIEST}") });
    }
    precondition.holds(book, target)?;
    let mut changed = endpoint.clone();
    adjust(&mut changed, adjustment);
    if changed == *endpoint {
        return Ok(());
    }
    let write = match source {
        Source::Lease => {
            let leased = book.leased(service, id).ok_or(Rejection::Internal)?;
            let leased = Leased { endpoint: changed, ..leased.clone() };
            let text = serde_json::to_string(&leased).map_err(|_unwritable| Rejection::Internal)?;
            Write::put(Key::Leased(service, id).text(), text)
        }
        Source::Project => {
            let before = book.adjusted(service, id).unwrap_or_default();
            let both = Adjustment {
                state: adjustment.state.or(before.state),
                weight: adjustment.weight.or(before.weight),
            };
            let text = serde_json::to_string(&both).map_err(|_unwritable| Rejection::Internal)?;
            Write::put(Key::Adjusted(service, id).text(), text)
        }
    };
    draft.add(vec![write])
}

/// Takes a registered endpoint away.
pub(super) fn remove(
    draft: &mut Draft,
    target: &Target,
    precondition: &Precondition,
) -> Result<(), Rejection> {
    let Target { service, id } = target;
    let (_, source, _) = found(draft.book(), target)?;
    precondition.holds(draft.book(), target)?;
    match source {
        Source::Lease => draft.add(vec![Write::remove(Key::Leased(service, id).text())]),
        Source::Project => {
            Err(Rejection::OwnedByProject { service: service.clone(), id: id.clone() })
        }
    }
}

/// Takes those away whose lease has ended.
pub(super) fn expire(draft: &mut Draft, ended: &[Target]) -> Result<(), Rejection> {
    let book = draft.book();
    let there = ended.iter().filter(|target| book.leased(&target.service, &target.id).is_some());
    let writes: Vec<Write> = there.map(|target| Write::remove(lease_of(target))).collect();
    if writes.is_empty() { Ok(()) } else { draft.add(writes) }
}

/// One endpoint as it is in force.
pub(super) fn answer(
    version: &Version,
    target: &Target,
    expires_in: Option<u64>,
) -> Result<(EndpointAnswer, u64), Rejection> {
    let (endpoint, source, changed) = found(&version.book, target)?;
    let answer = EndpointAnswer {
        revision: version.revision,
        service: target.service.clone(),
        source,
        expires_in: expires_in.filter(|_| source == Source::Lease),
        endpoint: endpoint.clone(),
    };
    Ok((answer, changed))
}

fn found<'a>(book: &'a Book, target: &Target) -> Result<(&'a Endpoint, Source, u64), Rejection> {
    let project = book.project().ok_or(Rejection::NoProject)?;
    let Target { service, id } = target;
    if book.service(service).is_none() {
        return Err(unknown(project, service.as_str()));
    }
    book.endpoint(service, id)
        .ok_or_else(|| Rejection::UnknownEndpoint { service: service.clone(), id: id.clone() })
}

/// What is wrong with a registration in itself; every fault at once.
pub(super) fn faults(id: &EndpointId, registration: &Registration) -> Vec<String> {
    let mut faults = Vec::new();
    if !TTL.contains(&registration.ttl_seconds) {
        faults.push(format!("ttl_seconds is {} to {}", TTL.start(), TTL.end()));
    }
    if registration.weight > HEAVIEST {
        faults.push(format!("weight is at most {HEAVIEST}"));
    }
    let endpoint = endpoint(id, registration);
    faults.extend(plaintext(&endpoint).map(|key| {
        format!("{key} begins with https:// (tokens travel over TLS only), or auth_method is none")
    }));
    faults
}

/// The keys of addresses to which tokens would travel in plaintext.
pub(super) fn plaintext(endpoint: &Endpoint) -> impl Iterator<Item = &'static str> {
    let open = |origin: &Origin| origin.scheme() == Scheme::Http && !origin.host().is_loopback();
    let wants_token = endpoint.auth_method != AuthMethod::None;
    let addresses = [
        ("url", Some(&endpoint.url)),
        ("internal_url", endpoint.internal_url.as_ref()),
        ("private_url", endpoint.private_url.as_ref()),
    ];
    let open = addresses.map(|(key, origin)| (key, wants_token && origin.is_some_and(open)));
    open.into_iter().filter(|(_, open)| *open).map(|(key, _)| key)
}

fn endpoint(id: &EndpointId, registration: &Registration) -> Endpoint {
    let Registration {
        url,
        internal_url,
        private_url,
        place,
        zone,
        auth_method,
        weight,
        state,
        ttl_seconds: _,
    } = registration.clone();
    Endpoint {
        id: id.clone(),
        url,
        internal_url,
        private_url,
        found_at: None,
        place,
        zone,
        auth_method,
        weight,
        state,
    }
}
