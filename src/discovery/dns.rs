//! DNS as a source of endpoints: each address that a name has is one.
//!
//! Host, SNI and certificate name stay the name (for SRV: its target); what is dialled is the address. An endpoint's id
//! is made of its address, so that it is the same one for as long as DNS names it and keeps its warm connections.
//!
//! The names are asked again when the least time to live of the answer is over, aliases included. An address that is no
//! longer named drains for half a minute and then goes. When DNS fails, or suddenly knows nothing, the last good answer
//! stays for as long as it takes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream};
use tokio::time::{Instant, sleep_until};

use super::{
    lookup::{Answer, Ask, Dns, Family, LookupFault, Offer},
    overlay::{Deployment, Found, Layer},
};
use crate::model::{
    AuthMethod, Endpoint, EndpointId, EndpointState, Host, NetworkMode, Origin, Place, Scheme,
    ServiceName, Zone,
};

/// How long an address that is no longer named finishes what it has.
const DRAIN: Duration = Duration::from_secs(30);
/// The pause after the first failure; it doubles up to [`LONGEST`], with jitter.
const SHORTEST: Duration = Duration::from_secs(1);
/// The longest pause after a failure.
const LONGEST: Duration = Duration::from_secs(30);
/// Names of one SRV record that are looked up at once.
const AT_ONCE: usize = 16;
/// What one step of an SRV record's weight is in ours: it leaves room for its weight 0, which is "rarely", not "never"
/// (RFC 2782), and for a target whose share several addresses divide.
const WEIGHT_STEP: u32 = 100;
/// The weight of an endpoint whose name says nothing of shares.
const EQUAL: u32 = 100;

/// What is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DnsKind {
    /// A and AAAA; the port is told.
    Address {
        /// Where the addresses listen.
        port: u16,
    },
    /// SRV; the lowest priority is active, the others are standby.
    Srv,
}

/// Why a service has no endpoints although DNS has answered: the one target of its SRV record is ".".
const OFFERED_NOWHERE: &str = "DNS says that it is offered nowhere";

/// A name in DNS and the service it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsSettings {
    /// The service.
    pub service: ServiceName,
    /// The name, in lower case and without a dot at its end.
    pub name: String,
    /// What is looked up.
    pub kind: DnsKind,
    /// What is spoken there.
    pub scheme: Scheme,
    /// Where the endpoints are.
    pub place: Place,
    /// In which zone, where that is known.
    pub zone: Option<Zone>,
    /// The network mode whose addresses DNS tells.
    pub mode: NetworkMode,
    /// How a caller proves itself.
    pub auth_method: AuthMethod,
    /// Who is asked; `None`: the system's servers.
    pub resolver: Option<SocketAddr>,
    /// An answer holds at least this long.
    pub min_ttl: Duration,
    /// And at most this long.
    pub max_ttl: Duration,
}

impl DnsSettings {
    fn endpoint(&self, host: &str, at: SocketAddr, weight: u32, state: EndpointState) -> Endpoint {
        let found = Origin::new(self.scheme, Host::Address(at.ip()), at.port());
        let of = |mode| (self.mode == mode).then(|| found.clone());
        Endpoint {
            id: id(at),
            url: Origin::new(self.scheme, Host::Name(host.into()), at.port()),
            internal_url: of(NetworkMode::Vpn),
            private_url: of(NetworkMode::PrivatePeering),
            found_at: Some(found),
            place: self.place.clone(),
            zone: self.zone.clone(),
            auth_method: self.auth_method,
            weight,
            state,
        }
    }
}

/// An address as a label: `dns-10-1-1-10-8443`, `dns-fd00-0-0-0-0-0-0-1-443`.
fn id(at: SocketAddr) -> EndpointId {
    let address = match at.ip() {
        IpAddr::V4(ip) => ip.octets().map(|part| part.to_string()).join("-"),
        IpAddr::V6(ip) => ip.segments().map(|part| format!("{part:x}")).join("-"),
    };
    let label = format!("dns-{address}-{}", at.port());
    #[expect(clippy::expect_used, reason = "at most 49 characters of a label")]
    label.parse().expect("digits between hyphens are a label")
}

/// What became of the questions, for whoever scrapes.
#[derive(Debug, Default)]
pub struct DnsStats {
    answered: AtomicU64,
    failed: AtomicU64,
    endpoints: AtomicUsize,
    good: Mutex<Option<Instant>>,
}

impl DnsStats {
    /// How often the name was looked up with and without success.
    #[must_use]
    pub fn lookups(&self) -> (u64, u64) {
        (self.answered.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }

    /// How many endpoints it leads to, draining ones included.
    #[must_use]
    pub fn endpoints(&self) -> usize {
        self.endpoints.load(Ordering::Relaxed)
    }

    /// How old the answer in use is; `None` before the first one.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        self.good.lock().unwrap_or_else(PoisonError::into_inner).map(|at| at.elapsed())
    }

    fn note(&self, good: bool) {
        let count = if good { &self.answered } else { &self.failed };
        count.fetch_add(1, Ordering::Relaxed);
        if good {
            *self.good.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }
}

/// Follows the name until dropped.
pub(super) async fn follow(settings: DnsSettings, layer: Arc<Layer>, stats: Arc<DnsStats>) {
    let server = settings.resolver;
    Follower::new(settings, stats).follow(&layer, move || Dns::new(server)).await;
}

/// What one round of questions found.
struct Round {
    /// `None`: nothing is known of the name, or no longer; what was found before stays.
    endpoints: Option<Vec<Endpoint>>,
    ttl: Option<Duration>,
    fault: Option<LookupFault>,
}

/// The addresses of one name, as far as they could be found out.
#[derive(Default)]
struct Looked {
    addresses: Vec<IpAddr>,
    ttl: Option<Duration>,
    fault: Option<LookupFault>,
}

struct Known {
    endpoint: Endpoint,
    /// When it goes, once it is no longer named.
    leaves: Option<Instant>,
}

/// The last good addresses by name and family.
type Memory = HashMap<(String, Family), Vec<IpAddr>>;

struct Follower {
    settings: DnsSettings,
    stats: Arc<DnsStats>,
    known: BTreeMap<EndpointId, Known>,
    memory: Memory,
    absence: &'static str,
    failing: bool,
}

impl Follower {
    fn new(settings: DnsSettings, stats: Arc<DnsStats>) -> Self {
        let (known, memory) = (BTreeMap::new(), Memory::new());
        Self { settings, stats, known, memory, absence: OFFERED_NOWHERE, failing: false }
    }

    async fn follow<A: Ask>(
        mut self,
        layer: &Layer,
        whom: impl Fn() -> Result<A, LookupFault> + Send,
    ) {
        let (mut pause, mut good) = (SHORTEST, false);
        loop {
            let round = match whom() {
                Ok(ask) => self.look(&ask).await,
                Err(fault) => Round { endpoints: None, ttl: None, fault: Some(fault) },
            };
            let failed = round.fault.is_some();
            let ttl = round.ttl.map(|ttl| ttl.clamp(self.settings.min_ttl, self.settings.max_ttl));
            good |= round.endpoints.is_some();
            self.take_over(round, Instant::now());
            // One that begins again after a panic and has found nothing yet leaves what it had found before.
            if good || !layer.leads_somewhere() {
                // As long as nothing was ever heard, the endpoints that the project has stay.
                let silent = !good && layer.lies_over_endpoints(&self.settings.service);
                layer.put(if silent { Found::default() } else { self.found() });
            }
            let again = pause.mul_f64(fastrand::f64().mul_add(0.5, 0.5));
            let wait = match (failed, ttl) {
                (false, ttl) => ttl.unwrap_or(self.settings.min_ttl),
                (true, Some(ttl)) => ttl.min(again),
                (true, None) => again,
            };
            pause = if failed { (pause * 2).min(LONGEST) } else { SHORTEST };
            self.rest(layer, Instant::now() + wait).await;
        }
    }

    /// Waits until it is time to ask again; what has drained meanwhile goes.
    async fn rest(&mut self, layer: &Layer, until: Instant) {
        while let Some(gone) = self.known.values().filter_map(|it| it.leaves).min() {
            if gone > until {
                break;
            }
            sleep_until(gone).await;
            self.forget(gone);
            layer.put(self.found());
        }
        sleep_until(until).await;
    }

    async fn look<A: Ask>(&mut self, ask: &A) -> Round {
        match self.settings.kind {
            DnsKind::Address { port } => self.look_for_addresses(ask, port).await,
            DnsKind::Srv => self.look_for_offers(ask).await,
        }
    }

    async fn look_for_addresses<A: Ask>(&mut self, ask: &A, port: u16) -> Round {
        let name = self.settings.name.clone();
        let Looked { addresses, ttl, fault } = looked(ask, &name, &mut self.memory).await;
        if addresses.is_empty() {
            return Round { endpoints: None, ttl, fault };
        }
        let endpoints = addresses.into_iter().map(|ip| {
            let at = SocketAddr::new(ip, port);
            self.settings.endpoint(&name, at, EQUAL, EndpointState::Active)
        });
        Round { endpoints: Some(endpoints.collect()), ttl, fault }
    }

    async fn look_for_offers<A: Ask>(&mut self, ask: &A) -> Round {
        let Answer { mut records, mut ttl } = match ask.offers(&self.settings.name).await {
            Ok(answer) => answer,
            Err(fault) => return Round { endpoints: None, ttl: None, fault: Some(fault) },
        };
        // RFC 2782: a target of "." says that the service is decidedly not available.
        records.retain(|offer| !offer.target.is_empty() && offer.port != 0);
        records.sort();
        let targets: BTreeSet<_> = records.iter().map(|offer| offer.target.clone()).collect();
        let memory = std::mem::take(&mut self.memory);
        let each = stream::iter(targets).map(|target| {
            let of = |family| memory.get_key_value(&(target.clone(), family));
            let mut memory: Memory = [of(Family::V4), of(Family::V6)]
                .into_iter()
                .flatten()
                .map(|(key, addresses)| (key.clone(), addresses.clone()))
                .collect();
            async move {
                let looked = looked(ask, &target, &mut memory).await;
                (target, looked, memory)
            }
        });
        let all: Vec<_> = each.buffer_unordered(AT_ONCE).collect().await;
        let (mut found, mut fault) = (HashMap::new(), None);
        for (target, looked, memory) in all {
            self.memory.extend(memory);
            ttl = looked.ttl.map_or(ttl, |it| it.min(ttl));
            fault = looked.fault.or(fault);
            found.insert(target, looked.addresses);
        }
        let endpoints = self.offered(&records, &found);
        // Where something is offered and nothing of it is found, it is DNS that has a fault.
        let nothing = endpoints.is_empty() && fault.is_some();
        Round { endpoints: (!nothing).then_some(endpoints), ttl: Some(ttl), fault }
    }

    /// The endpoints of SRV records, in their order; one that several records name is that of the first.
    fn offered(&self, records: &[Offer], found: &HashMap<String, Vec<IpAddr>>) -> Vec<Endpoint> {
        let lowest = records.iter().map(|offer| offer.priority).min();
        let mut endpoints = Vec::new();
        for offer in records {
            let state = match Some(offer.priority) == lowest {
                true => EndpointState::Active,
                false => EndpointState::Standby,
            };
            let addresses = found.get(&offer.target).map_or(&[][..], Vec::as_slice);
            let share = u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
            let weight = (u32::from(offer.weight) * WEIGHT_STEP / share).max(1);
            for ip in addresses {
                let at = SocketAddr::new(*ip, offer.port);
                endpoints.push(self.settings.endpoint(&offer.target, at, weight, state));
            }
        }
        endpoints
    }

    /// Takes a round's outcome over: who is new comes, who is no longer named begins to leave.
    fn take_over(&mut self, round: Round, now: Instant) {
        self.stats.note(round.fault.is_none());
        self.report(round.fault.as_ref());
        self.absence = round.fault.as_ref().map_or(OFFERED_NOWHERE, LookupFault::absence);
        self.forget(now);
        let Some(endpoints) = round.endpoints else { return };
        let mut named = BTreeSet::new();
        let (mut come, mut left) = (0usize, 0usize);
        for endpoint in endpoints {
            if !named.insert(endpoint.id.clone()) {
                continue;
            }
            let before = self.known.insert(endpoint.id.clone(), Known { endpoint, leaves: None });
            come += usize::from(before.is_none_or(|it| it.leaves.is_some()));
        }
        for (id, known) in &mut self.known {
            if known.leaves.is_none() && !named.contains(id) {
                known.endpoint.state = EndpointState::Draining;
                known.leaves = Some(now + DRAIN);
                left += 1;
            }
        }
        if come + left > 0 {
            let DnsSettings { service, name, .. } = &self.settings;
            let service = service.as_str();
            // Where a server tells another part of a large whole each time, this comes with every answer.
            tracing::debug!(service, name, come, left, "DNS names other endpoints");
        }
    }

    fn forget(&mut self, now: Instant) {
        self.known.retain(|_, known| known.leaves.is_none_or(|at| at > now));
    }

    /// Tells when DNS begins to fail and when it is over, not of each attempt between.
    fn report(&mut self, fault: Option<&LookupFault>) {
        let DnsSettings { service, name, .. } = &self.settings;
        let (service, known) = (service.as_str(), self.failing);
        self.failing = fault.is_some();
        match fault {
            Some(fault) => {
                let error = fault as &dyn std::error::Error;
                if known {
                    return tracing::debug!(service, name, error, "the name is still not found");
                }
                let kept = self.known.len();
                tracing::warn!(
                    service,
                    name,
                    error,
                    kept,
                    "a name could not be looked up; what was last found stays in force"
                );
            }
            None if known => tracing::info!(service, name, "the name is found again"),
            None => {}
        }
    }

    fn found(&self) -> Found {
        let endpoints: Vec<_> = self.known.values().map(|it| it.endpoint.clone()).collect();
        self.stats.endpoints.store(endpoints.len(), Ordering::Relaxed);
        let absence = endpoints.is_empty().then_some(self.absence);
        [(self.settings.service.clone(), Deployment { endpoints, absence })].into()
    }
}

/// Looks a name up in both families. What one of them does not tell this time is what it told last; that there is
/// nothing is believed of one family, not of both.
async fn looked<A: Ask>(ask: &A, name: &str, memory: &mut Memory) -> Looked {
    let both = tokio::join!(ask.addresses(name, Family::V4), ask.addresses(name, Family::V6));
    let (mut looked, mut none) = (Looked::default(), Vec::new());
    for (family, outcome) in [(Family::V4, both.0), (Family::V6, both.1)] {
        let key = (name.to_owned(), family);
        match outcome {
            Ok(answer) => {
                looked.ttl = Some(looked.ttl.map_or(answer.ttl, |ttl| ttl.min(answer.ttl)));
                looked.addresses.extend(&answer.records);
                memory.insert(key, answer.records);
            }
            Err(fault) if fault.is_negative() => none.push((key, fault)),
            Err(fault) => {
                looked.addresses.extend(memory.get(&key).into_iter().flatten());
                looked.fault = Some(fault);
            }
        }
    }
    if looked.addresses.is_empty() {
        for (key, fault) in none {
            looked.addresses.extend(memory.get(&key).into_iter().flatten());
            looked.fault.get_or_insert(fault);
        }
    } else {
        none.iter().for_each(|(key, _)| drop(memory.remove(key)));
    }
    looked
}

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::op::ResponseCode;
    use tokio::{runtime::Handle, time::sleep};

    use super::*;
    use crate::{discovery::Directory, runtime::Supervisor, telemetry::overhear};

    const NAME: &str = "data.example.com";

    /// DNS as a test says it; what it does not say does not exist.
    #[derive(Clone, Default)]
    struct Book(Arc<Mutex<Pages>>);

    #[derive(Default)]
    struct Pages {
        addresses: HashMap<(String, Family), (u64, Vec<&'static str>)>,
        offers: Option<(u64, Vec<Offer>)>,
        /// SERVFAIL to questions of this family, or to all.
        fails: Option<Option<Family>>,
        asked: u32,
    }

    impl Book {
        fn edit(&self, edit: impl FnOnce(&mut Pages)) {
            edit(&mut self.0.lock().unwrap());
        }

        fn says(&self, name: &str, ttl: u64, addresses: &[&'static str]) {
            self.edit(|pages| {
                for (family, mark) in [(Family::V4, '.'), (Family::V6, ':')] {
                    let of: Vec<_> =
                        addresses.iter().copied().filter(|it| it.contains(mark)).collect();
                    pages.addresses.insert((name.to_owned(), family), (ttl, of));
                }
            });
        }

        fn asked(&self) -> u32 {
            self.0.lock().unwrap().asked
        }
    }

    const SERVFAIL: LookupFault = LookupFault::Refused(ResponseCode::ServFail);

    impl Ask for Book {
        async fn addresses(
            &self,
            name: &str,
            family: Family,
        ) -> Result<Answer<IpAddr>, LookupFault> {
            let mut pages = self.0.lock().unwrap();
            pages.asked += 1;
            if pages.fails.is_some_and(|which| which.is_none_or(|it| it == family)) {
                return Err(SERVFAIL);
            }
            let Some((ttl, texts)) = pages.addresses.get(&(name.to_owned(), family)) else {
                return Err(LookupFault::NoSuchName);
            };
            let records: Vec<_> = texts.iter().map(|text| text.parse().unwrap()).collect();
            if records.is_empty() {
                return Err(LookupFault::NoRecord);
            }
            Ok(Answer { records, ttl: Duration::from_secs(*ttl) })
        }

        async fn offers(&self, _name: &str) -> Result<Answer<Offer>, LookupFault> {
            let pages = self.0.lock().unwrap();
            if pages.fails == Some(None) {
                return Err(SERVFAIL);
            }
            let (ttl, records) = pages.offers.clone().ok_or(LookupFault::NoSuchName)?;
            Ok(Answer { records, ttl: Duration::from_secs(ttl) })
        }
    }

    fn settings(kind: DnsKind) -> DnsSettings {
        DnsSettings {
            service: "data".parse().unwrap(),
            name: NAME.to_owned(),
            kind,
            scheme: Scheme::Https,
            place: "azure_eastus".parse().unwrap(),
            zone: None,
            mode: NetworkMode::Public,
            auth_method: AuthMethod::BearerToken,
            resolver: None,
            min_ttl: Duration::from_secs(1),
            max_ttl: Duration::from_secs(300),
        }
    }

    /// A source and the directory it writes to.
    struct Stage {
        directory: Arc<Directory>,
        stats: Arc<DnsStats>,
        book: Book,
        told: Box<dyn Fn(&str) -> usize>,
    }

    impl Stage {
        async fn open(kind: DnsKind, book: &Book) -> Self {
            let directory = Arc::<Directory>::default();
            let json = r#"{"revision":1,"issuer":"x","project":{"name":"shop","networking":{"multi_cloud":true,
                "default_mode":"public","connections":[]},"services":{"data":{"endpoints":[],"scopes":["use"],
                "protocol":"auto","routing":{"policy":"latency","latency_target":null,"locality":"none","sticky":null},
                "timeouts":{"connect":"5s","attempt":null,"request":"30s"},
                "retries":{"max_attempts":3,"backoff":{"base":"25ms","max":"1s"}},"hedge":null,
                "circuit":{"failure_threshold":5,"recovery_timeout":"1m"},
                "health":{"kind":"http","path":null,"interval":"10s","timeout":"5s","healthy":2,"unhealthy":3},
                "limits":{"connections":null,"requests":null}}},"permissions":{},"issuers":[],"mode":"enforce"}}"#;
            directory.publish(serde_json::from_str(json).unwrap());
            let (layer, stats) = (directory.layer(), Arc::<DnsStats>::default());
            // Every test listens: what is logged first where nobody does is never heard.
            let (log, guard) = overhear("info");
            let told = Box::new(move |what: &str| {
                let _guard = &guard;
                log.text().matches(what).count()
            });
            let follower = Follower::new(settings(kind), Arc::clone(&stats));
            let asked = book.clone();
            Supervisor::new(Handle::current()).spawn_until_end("dns", async move {
                follower.follow(&layer, || Ok::<_, LookupFault>(asked.clone())).await;
            });
            let stage = Self { directory, stats, book: book.clone(), told };
            stage.after(0.0).await;
            stage
        }

        /// A moment later than so many seconds from now.
        async fn after(&self, seconds: f64) {
            sleep(Duration::from_secs_f64(seconds + 0.01)).await;
        }

        fn endpoints(&self) -> Vec<Endpoint> {
            let catalog = self.directory.load().unwrap();
            catalog.project.services["data"].endpoints.clone()
        }

        /// Addresses and states, in order.
        fn seen(&self) -> Vec<String> {
            let each = self.endpoints();
            let each = each.iter().map(|it| {
                format!("{} {}", it.found_at.as_ref().unwrap().authority(), it.state.as_str())
            });
            let mut each: Vec<_> = each.collect();
            each.sort();
            each
        }

        fn absence(&self) -> Option<&'static str> {
            self.directory.load().unwrap().project.services["data"].absence
        }
    }

    const ADDRESS: DnsKind = DnsKind::Address { port: 8443 };

    #[tokio::test(start_paused = true)]
    async fn an_address_is_dialled_under_the_name_it_was_found_by() {
        let book = Book::default();
        book.says(NAME, 60, &["192.0.2.1", "2001:db8::1"]);
        let stage = Stage::open(ADDRESS, &book).await;
        let endpoints = stage.endpoints();
        let ids: Vec<_> = endpoints.iter().map(|it| it.id.as_str()).collect();
        assert_eq!(ids, ["dns-192-0-2-1-8443", "dns-2001-db8-0-0-0-0-0-1-8443"]);
        for (endpoint, at) in endpoints.iter().zip(["192.0.2.1:8443", "[2001:db8::1]:8443"]) {
            assert_eq!(endpoint.url.to_string(), "https://data.example.com:8443");
            assert_eq!(endpoint.public_address().to_string(), format!("https://{at}"));
            assert_eq!(endpoint.local_address().1, NetworkMode::Public);
        }
        let near = DnsSettings { mode: NetworkMode::PrivatePeering, ..settings(ADDRESS) };
        let at = "10.0.0.1:443".parse().unwrap();
        let endpoint = near.endpoint(NAME, at, EQUAL, EndpointState::Active);
        let (address, mode) = endpoint.local_address();
        assert_eq!(
            (address.to_string().as_str(), mode),
            ("https://10.0.0.1", NetworkMode::PrivatePeering)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn names_are_asked_again_when_their_time_is_over_within_bounds() {
        let book = Book::default();
        book.says(NAME, 40, &["192.0.2.1"]);
        let stage = Stage::open(ADDRESS, &book).await;
        // Two questions each: one per family.
        assert_eq!(stage.book.asked(), 2);
        stage.after(39.9).await;
        assert_eq!(stage.book.asked(), 2);
        book.says(NAME, 0, &["192.0.2.1"]);
        stage.after(0.1).await;
        assert_eq!(stage.book.asked(), 4);
        book.says(NAME, 86_400, &["192.0.2.1"]);
        stage.after(1.0).await;
        assert_eq!(stage.book.asked(), 6, "once a second at most");
        stage.after(300.0).await;
        assert_eq!(stage.book.asked(), 8, "once in five minutes at least");
        assert_eq!(stage.stats.lookups(), (4, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_is_no_longer_named_drains_and_then_goes() {
        let book = Book::default();
        book.says(NAME, 20, &["192.0.2.1", "192.0.2.2"]);
        let stage = Stage::open(ADDRESS, &book).await;
        assert_eq!(stage.seen(), ["192.0.2.1:8443 active", "192.0.2.2:8443 active"]);
        book.says(NAME, 20, &["192.0.2.2", "192.0.2.3"]);
        stage.after(20.0).await;
        let drains = ["192.0.2.1:8443 draining", "192.0.2.2:8443 active", "192.0.2.3:8443 active"];
        assert_eq!(stage.seen(), drains);
        stage.after(29.0).await;
        assert_eq!(stage.seen(), drains);
        stage.after(1.0).await;
        assert_eq!(stage.seen(), ["192.0.2.2:8443 active", "192.0.2.3:8443 active"]);

        // One that comes back before it is gone is what it was.
        book.says(NAME, 20, &["192.0.2.2"]);
        stage.after(20.0).await;
        assert_eq!(stage.seen(), ["192.0.2.2:8443 active", "192.0.2.3:8443 draining"]);
        book.says(NAME, 20, &["192.0.2.2", "192.0.2.3"]);
        stage.after(20.0).await;
        assert_eq!(stage.seen(), ["192.0.2.2:8443 active", "192.0.2.3:8443 active"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_good_answer_stays_whatever_dns_says_then() {
        let book = Book::default();
        book.says(NAME, 5, &["192.0.2.1", "2001:db8::1"]);
        let stage = Stage::open(ADDRESS, &book).await;
        let both = ["192.0.2.1:8443 active", "[2001:db8::1]:8443 active"];
        assert_eq!(stage.seen(), both);
        for fails in [Some(None), None] {
            // SERVFAIL; and a name that all of a sudden is not there.
            book.edit(|pages| {
                pages.fails = fails;
                if fails.is_none() {
                    pages.addresses.clear();
                }
            });
            stage.after(600.0).await;
            assert_eq!(stage.seen(), both);
        }
        let (answered, failed) = stage.stats.lookups();
        assert_eq!(answered, 1);
        // At most every half of the longest pause, once that is reached; at least once in each.
        assert!((1200 / 30..=1200 / 15 + 10).contains(&failed), "{failed}");
        assert!(stage.stats.age().unwrap() > Duration::from_secs(1200));
        // Of all that the log has one line; and one when it is over.
        assert_eq!((stage.told)("could not be looked up"), 1);
        book.says(NAME, 5, &["192.0.2.1"]);
        stage.after(30.0).await;
        assert_eq!((stage.told)("is found again"), 1);
        assert_eq!(stage.seen()[0], "192.0.2.1:8443 active");
        assert_eq!(stage.seen()[1], "[2001:db8::1]:8443 draining");
    }

    #[tokio::test(start_paused = true)]
    async fn one_family_that_fails_takes_nothing_away_and_one_without_addresses_does() {
        let book = Book::default();
        book.says(NAME, 5, &["192.0.2.1", "2001:db8::1"]);
        let stage = Stage::open(ADDRESS, &book).await;
        book.says(NAME, 5, &["192.0.2.2", "2001:db8::1"]);
        book.edit(|pages| pages.fails = Some(Some(Family::V6)));
        stage.after(5.0).await;
        assert_eq!(
            stage.seen(),
            ["192.0.2.1:8443 draining", "192.0.2.2:8443 active", "[2001:db8::1]:8443 active"]
        );
        book.says(NAME, 5, &["192.0.2.2"]);
        book.edit(|pages| pages.fails = None);
        stage.after(5.0).await;
        assert!(stage.seen().contains(&"[2001:db8::1]:8443 draining".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_was_never_found_leaves_no_endpoint_and_says_why() {
        let book = Book::default();
        let stage = Stage::open(ADDRESS, &book).await;
        assert_eq!(stage.seen(), [""; 0]);
        assert_eq!(stage.absence(), Some("DNS knows no such name as it should be found by"));
        book.edit(|pages| pages.fails = Some(None));
        stage.after(10.0).await;
        let why = "the name that it should be found by could not be looked up in DNS";
        assert_eq!(stage.absence(), Some(why));
        book.edit(|pages| pages.fails = None);
        book.says(NAME, 5, &["192.0.2.1"]);
        stage.after(30.0).await;
        assert_eq!((stage.seen().len(), stage.absence()), (1, None));
    }

    fn offer(priority: u16, weight: u16, target: &str) -> Offer {
        Offer { priority, weight, port: 443, target: target.to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_lowest_priority_is_active_and_weights_are_shares() {
        let book = Book::default();
        book.says("a.example.com", 60, &["192.0.2.1", "192.0.2.2"]);
        book.says("b.example.com", 60, &["192.0.2.3"]);
        book.says("c.example.com", 60, &["192.0.2.4"]);
        let offers = vec![
            offer(20, 1, "c.example.com"),
            offer(10, 6, "a.example.com"),
            offer(10, 0, "b.example.com"),
        ];
        book.edit(|pages| pages.offers = Some((60, offers)));
        let stage = Stage::open(DnsKind::Srv, &book).await;
        let seen: Vec<_> = stage
            .endpoints()
            .iter()
            .map(|it| (it.url.to_string(), it.weight, it.state.as_str()))
            .collect();
        let a = || "https://a.example.com".to_owned();
        assert_eq!(
            seen,
            [
                (a(), 300, "active"),
                (a(), 300, "active"),
                ("https://b.example.com".to_owned(), 1, "active"),
                ("https://c.example.com".to_owned(), 100, "standby"),
            ]
        );
        // One target that is not found keeps what it had, and the others are followed.
        book.says("c.example.com", 60, &["192.0.2.5"]);
        book.edit(|pages| {
            pages.addresses.retain(|(name, _), _| name != "b.example.com");
        });
        stage.after(60.0).await;
        assert!(stage.seen().contains(&"192.0.2.3 active".to_owned()), "{:?}", stage.seen());
        assert!(stage.seen().contains(&"192.0.2.5 standby".to_owned()), "{:?}", stage.seen());
        assert_eq!(stage.stats.lookups(), (1, 1));

        // "." is an answer too: nobody offers it any more.
        book.edit(|pages| pages.offers = Some((60, vec![offer(0, 0, "")])));
        stage.after(60.0).await;
        assert!(stage.seen().iter().all(|it| it.ends_with("draining")), "{:?}", stage.seen());
        stage.after(30.0).await;
        assert_eq!((stage.seen().len(), stage.absence()), (0, Some(OFFERED_NOWHERE)));
    }
}
