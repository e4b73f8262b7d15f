//! One worker's view of the project: the snapshot, with everything resolved that a request would otherwise look up.
//!
//! A view is built on the worker when the snapshot changes and replaced whole; requests that began on the old one end
//! on it. Pools, vitals and budgets outlive views: an endpoint that did not change keeps its warm connections.

use std::{
    cell::RefCell,
    collections::HashMap,
    rc::{Rc, Weak},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, ThreadId},
    time::Duration,
};

use foldhash::fast::RandomState;
use http::{
    HeaderValue,
    uri::{Authority, Scheme as UriScheme},
};
use tokio::time::Instant;

use crate::{
    api::Catalog,
    balance::{Aim, Budget, Candidate, CircuitState, Picker, Tick, Vitals},
    cost::{Kind, Leg, Meter, Path, PathKey, PriceBook, PriceClass, Site},
    identity::{self, Grant, NotPermitted, Slot, Strictness, Tokens, permits},
    model::{
        AuthMethod, Circuit, Endpoint, EndpointId, EndpointState, Enforcement, NetworkMode,
        Networking, Origin, Place, Protocol, Routing, Scheme, Service, ServiceName, Timeouts, Zone,
    },
    net::{Resolver, Tally},
    proxy::{
        record::Series,
        reject::Callee,
        settings::{App, Role, Settings},
    },
    runtime::Clock,
    telemetry::{Direction, Registry},
    upstream::{Connector, OwnAddresses, Pool, PoolSettings},
};

/// Service, endpoint, address, and the network mode in which it is reached.
type Whom = (ServiceName, EndpointId, Origin, NetworkMode);

/// What is known about an endpoint, for people to read.
#[derive(Clone, Debug)]
pub struct Condition {
    /// The service.
    pub service: ServiceName,
    /// The endpoint.
    pub endpoint: EndpointId,
    /// How it is reached.
    pub mode: NetworkMode,
    /// Its circuit.
    pub circuit: CircuitState,
    /// What an answer takes; `None` before the first one.
    pub latency: Option<Duration>,
}

/// What every worker of a process shares about endpoints: one [`Vitals`] each, one [`Budget`] per service.
#[derive(Debug)]
pub struct Ward {
    zero: Instant,
    vitals: Mutex<HashMap<Whom, (Arc<Vitals>, Circuit)>>,
    budgets: Mutex<HashMap<ServiceName, Arc<Budget>>>,
    /// The revision by which each worker answers.
    served: Mutex<HashMap<ThreadId, u64>>,
}

impl Default for Ward {
    fn default() -> Self {
        Self {
            zero: Instant::now(),
            vitals: Mutex::default(),
            budgets: Mutex::default(),
            served: Mutex::default(),
        }
    }
}

impl Ward {
    /// The moment `now`, as the balance counts time.
    #[must_use]
    pub fn tick(&self, now: Instant) -> Tick {
        Tick::since(self.zero, now)
    }

    /// The worker whose thread this is answers by this revision from now on.
    pub(super) fn serves(&self, revision: u64) {
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.insert(thread::current().id(), revision);
    }

    /// The revision by which every worker answers; 0 before the first one.
    #[must_use]
    pub fn served(&self) -> u64 {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.values().copied().min().unwrap_or(0)
    }

    fn vitals(&self, whom: Whom, circuit: &Circuit) -> Arc<Vitals> {
        let now = self.tick(Instant::now());
        let mut known = self.vitals.lock().unwrap_or_else(PoisonError::into_inner);
        let entry =
            known.entry(whom).or_insert_with(|| (Arc::new(Vitals::new(now)), circuit.clone()));
        entry.1.clone_from(circuit);
        Arc::clone(&entry.0)
    }

    /// Forgets endpoints that no worker and no request knows any more.
    pub(super) fn sweep(&self) {
        let mut known = self.vitals.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, (vitals, _)| Arc::strong_count(vitals) > 1);
    }

    /// What is known about every endpoint. Takes a lock that no request takes.
    #[must_use]
    pub fn conditions(&self) -> Vec<Condition> {
        self.sweep();
        let now = self.tick(Instant::now());
        let known = self.vitals.lock().unwrap_or_else(PoisonError::into_inner);
        let each =
            known.iter().map(|((service, endpoint, _, mode), (vitals, circuit))| Condition {
                service: service.clone(),
                endpoint: endpoint.clone(),
                mode: *mode,
                circuit: vitals.breaker.view(circuit, now).state,
                latency: vitals.latency.measured(),
            });
        each.collect()
    }

    fn budget(&self, service: &ServiceName) -> Arc<Budget> {
        let mut known = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(known.entry(service.clone()).or_insert_with(|| Arc::new(Budget::for_retries())))
    }
}

/// One way to one endpoint.
pub(super) struct Target {
    /// The endpoint.
    pub id: EndpointId,
    /// How it is reached.
    pub mode: NetworkMode,
    /// What `host` says there; `None`: what the client said.
    pub host: Option<HeaderValue>,
    /// The same for HTTP/2.
    pub authority: Authority,
    /// `http` or `https`.
    pub scheme: UriScheme,
    /// Whether it wants a token, and the way there is fit for one.
    pub takes_token: bool,
    /// This worker's connections.
    pub pool: Rc<Pool>,
    /// The way of tunnels, where an edge stands in the way of requests.
    direct: Option<Connector>,
    /// What the process knows about it.
    pub vitals: Arc<Vitals>,
}

impl Target {
    /// The way there for a tunnel: a client that speaks TLS with the endpoint must reach the endpoint itself.
    pub(super) fn tunnels(&self) -> &Connector {
        self.direct.as_ref().unwrap_or_else(|| self.pool.connector())
    }
}

/// One service as this worker calls it.
pub(super) struct Cluster {
    /// Its name.
    pub service: ServiceName,
    /// What it is called where it fails.
    pub callee: Callee,
    /// Whether this proxy's service may speak to it.
    pub grant: Result<Grant, NotPermitted>,
    /// Where its token is.
    pub token: Option<Arc<Slot>>,
    /// The ways there, in the order of `candidates`.
    pub targets: Vec<Rc<Target>>,
    /// The same for the choice.
    pub candidates: Vec<Candidate>,
    /// What a good choice is.
    pub aim: Aim,
    /// This worker's memory of its choices.
    pub picker: RefCell<Picker>,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Attempts in all.
    pub max_attempts: u32,
    /// The pause between two attempts.
    pub backoff: (Duration, Duration),
    /// What retries may spend.
    pub budget: Arc<Budget>,
    /// Counts the calls.
    pub series: Rc<Series>,
    /// Why there may be no target.
    pub absence: &'static str,
}

/// A worker's view of the project.
pub(super) struct View {
    /// What it was made from.
    pub catalog: Arc<Catalog>,
    clusters: HashMap<ServiceName, Rc<Cluster>, RandomState>,
    /// Authority of an endpoint's `url`, and its host alone → its service.
    hosts: HashMap<Box<str>, ServiceName, RandomState>,
    /// Whether missing grants refuse.
    pub strictness: Strictness,
}

impl View {
    /// The service with this name.
    #[must_use]
    pub(super) fn cluster(&self, name: &str) -> Option<&Rc<Cluster>> {
        self.clusters.get(name)
    }

    /// The service one of whose endpoints has this authority or host, in lower case.
    #[must_use]
    pub(super) fn service_of(&self, authority: &str) -> Option<&ServiceName> {
        self.hosts.get(authority)
    }

    /// Whether missing grants refuse at `now` as they did when it was made.
    #[must_use]
    pub(super) fn is_as_strict_as_at(&self, now: jiff::Timestamp) -> bool {
        Strictness::at(&self.catalog.project.mode, now) == self.strictness
    }

    /// How much longer the project learns; `None` when this view does not.
    #[must_use]
    pub(super) fn learns_for(&self, now: jiff::Timestamp) -> Option<Duration> {
        match (self.strictness, &self.catalog.project.mode) {
            (Strictness::Learn, Enforcement::LearnUntil(end)) => {
                // Not a moment too early, or it would be looked at in vain.
                let left =
                    end.duration_since(now).saturating_add(jiff::SignedDuration::from_millis(1));
                Some(Duration::try_from(left).unwrap_or(Duration::ZERO))
            }
            (Strictness::Learn | Strictness::Enforce, _) => None,
        }
    }

    /// Every name there is.
    pub(super) fn names(&self) -> impl Iterator<Item = &ServiceName> {
        self.catalog.project.services.keys()
    }
}

/// Which service an authority or a host belongs to. A host that several services share, told apart by ports (on one
/// machine only), is nobody's.
fn hosts<'a>(
    services: impl IntoIterator<Item = (&'a ServiceName, &'a Service)>,
) -> HashMap<Box<str>, ServiceName, RandomState> {
    let mut whole = HashMap::<Box<str>, ServiceName, RandomState>::default();
    let mut alone = HashMap::<Box<str>, Option<ServiceName>, RandomState>::default();
    for (name, service) in services {
        for endpoint in &service.endpoints {
            whole.insert(endpoint.url.authority().into(), name.clone());
            let host = endpoint.url.host().to_string();
            let owner = alone.entry(host.into()).or_insert_with(|| Some(name.clone()));
            if owner.as_ref().is_some_and(|owner| owner != name) {
                *owner = None;
            }
        }
    }
    for (host, owner) in alone {
        if let Some(owner) = owner {
            whole.entry(host).or_insert(owner);
        }
    }
    whole
}

/// Counts a connection's bytes on the path it takes.
struct OnPath {
    path: Path,
    kind: Kind,
}

impl Tally for OnPath {
    fn sent(&self, bytes: usize) {
        self.path.add(Leg::Request, self.kind, bytes as u64);
    }

    fn received(&self, bytes: usize) {
        self.path.add(Leg::Response, self.kind, bytes as u64);
    }
}

/// What identifies a pool that may be kept when the snapshot changes: all that its connections were opened for, and where
/// their bytes are booked.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct PoolKey {
    service: ServiceName,
    endpoint: EndpointId,
    address: Origin,
    url: Origin,
    mode: NetworkMode,
    protocol: Protocol,
    place: Place,
    zone: Option<Zone>,
}

impl PoolKey {
    fn of(service: &ServiceName, way: &Way<'_>, address: &Origin, protocol: Protocol) -> Self {
        Self {
            service: service.clone(),
            endpoint: way.endpoint.id.clone(),
            address: address.clone(),
            url: way.endpoint.url.clone(),
            mode: way.mode,
            protocol,
            place: way.endpoint.place.clone(),
            zone: way.endpoint.zone.clone(),
        }
    }
}

/// Builds views on one worker.
pub(super) struct Surveyor {
    /// The proxy's settings.
    pub settings: RefCell<Arc<Settings>>,
    /// What the workers share.
    pub ward: Arc<Ward>,
    /// Where tokens come from.
    pub tokens: Arc<Tokens>,
    /// Names to addresses.
    pub resolver: Resolver,
    /// The proxy's own listeners.
    pub own: OwnAddresses,
    /// Counts bytes.
    pub meter: Arc<Meter>,
    /// Counts requests.
    pub registry: Arc<Registry>,
    /// The pools of the last view.
    pub pools: RefCell<HashMap<PoolKey, Rc<Pool>>>,
    /// Every pool it made, as long as somebody uses it.
    pub made: RefCell<Vec<Weak<Pool>>>,
    /// The series of the last view.
    pub series: RefCell<HashMap<ServiceName, Rc<Series>>>,
}

/// One way to an endpoint, before anything is made for it.
struct Way<'a> {
    endpoint: &'a Endpoint,
    address: &'a Origin,
    mode: NetworkMode,
    /// Fallback ways rank behind all others.
    fallback: bool,
    local: bool,
}

/// Added to the rank of a way that is only a fallback.
const FALLBACK_RANK: u8 = 100;

impl Surveyor {
    /// The proxy's settings right now.
    #[must_use]
    pub(super) fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.borrow())
    }

    /// Surveys with other settings from now on; gives those before.
    pub(super) fn survey_by(&self, settings: Arc<Settings>) -> Arc<Settings> {
        self.settings.replace(settings)
    }

    /// The connections of the views so far serve no later one: what was believed or counted of them has changed.
    pub(super) fn begin_anew(&self) {
        let _old = self.pools.take();
    }

    /// The view of a snapshot.
    #[must_use]
    pub(super) fn survey(&self, catalog: Arc<Catalog>) -> Rc<View> {
        let settings = self.settings();
        let strictness = Strictness::at(&catalog.project.mode, Clock::system().now());
        let mut kept = HashMap::new();
        let clusters = catalog
            .project
            .services
            .iter()
            .map(|(name, service)| {
                let cluster =
                    self.cluster(&settings, &catalog, name, service, strictness, &mut kept);
                (name.clone(), Rc::new(cluster))
            })
            .collect();
        let services = catalog.project.services.iter();
        let hosts = hosts(services.map(|(name, service)| (name, &**service)));
        // Pools that no endpoint uses any more end with the requests that still hold them.
        *self.pools.borrow_mut() = kept;
        Rc::new(View { hosts, clusters, catalog, strictness })
    }

    fn cluster(
        &self,
        settings: &Settings,
        catalog: &Catalog,
        name: &ServiceName,
        service: &Service,
        strictness: Strictness,
        kept: &mut HashMap<PoolKey, Rc<Pool>>,
    ) -> Cluster {
        let mut absence = service.absence.unwrap_or("it has no endpoints");
        let ways = self.ways(settings, &catalog.project.networking, service, &mut absence);
        let mut targets = Vec::new();
        let mut candidates = Vec::new();
        for way in ways {
            match self.target(settings, name, service, &way, kept) {
                Some((target, candidate)) => {
                    targets.push(Rc::new(target));
                    candidates.push(candidate);
                }
                None => absence = "its address cannot be used",
            }
        }
        let wants_token = targets.iter().any(|target| target.takes_token);
        Cluster {
            service: name.clone(),
            callee: Callee::Service(name.clone()),
            grant: permits(&catalog.project, &settings.service, name, strictness),
            token: (wants_token && settings.role != Role::Edge).then(|| self.tokens.slot(name)),
            targets,
            candidates,
            aim: Aim::new(&service.routing, &service.circuit),
            picker: RefCell::default(),
            timeouts: service.timeouts.clone(),
            max_attempts: service.retries.max_attempts.max(1),
            backoff: (service.retries.backoff.base, service.retries.backoff.max),
            budget: self.ward.budget(name),
            series: self.series_of(settings, name),
            absence,
        }
    }

    fn series_of(&self, settings: &Settings, name: &ServiceName) -> Rc<Series> {
        let mut known = self.series.borrow_mut();
        let made = || {
            Series::new(
                &self.registry,
                Direction::Outbound,
                settings.service.as_str(),
                name.as_str(),
            )
        };
        Rc::clone(known.entry(name.clone()).or_insert_with(made))
    }

    /// Every way from here to an endpoint of the service, preferred ones first.
    fn ways<'a>(
        &self,
        settings: &Settings,
        networking: &Networking,
        service: &'a Service,
        absence: &mut &'static str,
    ) -> Vec<Way<'a>> {
        let mut ways = Vec::new();
        for endpoint in &service.endpoints {
            let Some(here) = &settings.place else {
                // Without a place (a laptop) everything is far away and public.
                ways.push(Way {
                    endpoint,
                    address: endpoint.public_address(),
                    mode: NetworkMode::Public,
                    fallback: false,
                    local: false,
                });
                continue;
            };
            if *here == endpoint.place {
                let (address, mode) = endpoint.local_address();
                // An edge never dials a host it serves itself.
                if settings.role == Role::Edge && mode == NetworkMode::Public {
                    *absence = "its endpoint here has neither private_url nor internal_url for the edge to use";
                    continue;
                }
                ways.push(Way { endpoint, address, mode, fallback: false, local: true });
                continue;
            }
            if !networking.multi_cloud {
                *absence = "it has no endpoint in this place, and multi_cloud is off";
                continue;
            }
            let (mode, fallback) = networking.modes(here, &endpoint.place);
            let modes = [(Some(mode), false), (fallback, true)];
            for (mode, fallback) in
                modes.into_iter().filter_map(|(mode, fallback)| Some((mode?, fallback)))
            {
                match endpoint.address(mode) {
                    Some(address) => {
                        ways.push(Way { endpoint, address, mode, fallback, local: false })
                    }
                    None => *absence = "it has no address for the network mode between the places",
                }
            }
        }
        ways
    }

    fn target(
        &self,
        settings: &Settings,
        name: &ServiceName,
        service: &Service,
        way: &Way<'_>,
        kept: &mut HashMap<PoolKey, Rc<Pool>>,
    ) -> Option<(Target, Candidate)> {
        let outbound = settings.outbound.as_ref();
        // Cross-cloud calls may go through this cloud's own edge.
        let edge = outbound.and_then(|outbound| outbound.via.as_ref()).filter(|_| {
            settings
                .place
                .as_ref()
                .is_some_and(|here| here.provider() != way.endpoint.place.provider())
        });
        let address = edge.unwrap_or(way.address);
        let key = PoolKey::of(name, way, address, service.protocol);
        let found = self.pools.borrow().get(&key).cloned();
        let pool = match found {
            Some(pool) => pool,
            None => self.pool(settings, name, way, edge, service.protocol)?,
        };
        kept.insert(key, Rc::clone(&pool));
        let direct = match edge {
            Some(_) => {
                let direct = self.connector(settings, way.address, &way.endpoint.url)?;
                Some(tallied(direct, self.path(settings, name, way).as_ref(), &[Kind::Tunnel]))
            }
            None => None,
        };
        let whom = (name.clone(), way.endpoint.id.clone(), address.clone(), way.mode);
        let vitals = self.ward.vitals(whom, &service.circuit);
        let here = settings.place.as_ref();
        let rank = here.map_or(0, |here| {
            Candidate::rank(service.routing.locality, here, settings.zone.as_ref(), way.endpoint)
        });
        let rank = if way.fallback { rank.saturating_add(FALLBACK_RANK) } else { rank };
        let price = Self::price(settings, way);
        let candidate =
            Candidate::new(way.endpoint, rank, price, service.limits.requests, Arc::clone(&vitals));
        let host = way.endpoint.url.authority();
        let safe = address.scheme() == Scheme::Https
            || address.host().is_loopback()
            || matches!(address.host(), crate::model::Host::Address(ip) if ip.is_loopback());
        let keeps_host = settings.role == Role::Edge && way.local;
        let target = Target {
            id: way.endpoint.id.clone(),
            mode: way.mode,
            host: if keeps_host { None } else { Some(HeaderValue::try_from(&host).ok()?) },
            authority: Authority::try_from(host).ok()?,
            scheme: match address.scheme() {
                Scheme::Http => UriScheme::HTTP,
                Scheme::Https => UriScheme::HTTPS,
            },
            takes_token: safe && way.endpoint.auth_method == AuthMethod::BearerToken,
            pool,
            direct,
            vitals,
        };
        Some((target, candidate))
    }

    fn price(settings: &Settings, way: &Way<'_>) -> Option<crate::model::NanoUsd> {
        let here = settings.place.as_ref()?;
        // The book is some milliseconds of parsing: only who asks for prices pays.
        let book = PriceBook::shipped();
        let from = Site { place: here, zone: settings.zone.as_ref() };
        let to = Site { place: &way.endpoint.place, zone: way.endpoint.zone.as_ref() };
        let class = book.class(from, to, way.mode);
        book.rate(class, here, Some(&way.endpoint.place)).map(|rate| rate.per_gb)
    }

    fn connector(
        &self,
        settings: &Settings,
        address: &Origin,
        named: &Origin,
    ) -> Option<Connector> {
        let (resolver, own) = (self.resolver.clone(), self.own.clone());
        Connector::new(address.clone(), named.host(), &settings.tls, resolver, own).ok()
    }

    /// The connections to an endpoint, or to the edge in front of it.
    fn pool(
        &self,
        settings: &Settings,
        name: &ServiceName,
        way: &Way<'_>,
        edge: Option<&Origin>,
        protocol: Protocol,
    ) -> Option<Rc<Pool>> {
        let connector = match edge {
            // The edge counts what it sends to the other cloud: counted here too, it would be paid twice.
            Some(edge) => tallied(
                self.connector(settings, edge, edge)?,
                self.path_next_door(settings, name).as_ref(),
                &[Kind::Http],
            ),
            None => {
                let connector = self.connector(settings, way.address, &way.endpoint.url)?;
                tallied(
                    connector,
                    self.path(settings, name, way).as_ref(),
                    &[Kind::Http, Kind::Tunnel],
                )
            }
        };
        let pool = PoolSettings { head: settings.limits.head, ..PoolSettings::default() };
        Some(self.keep(Pool::new(pool, protocol, connector)))
    }

    fn keep(&self, pool: Rc<Pool>) -> Rc<Pool> {
        self.made.borrow_mut().push(Rc::downgrade(&pool));
        pool
    }

    /// Closes connections that are too old or unused for too long.
    pub(super) fn prune(&self, now: Instant) {
        let pools: Vec<_> = self.made.borrow().iter().filter_map(Weak::upgrade).collect();
        pools.iter().for_each(|pool| pool.prune(now));
        drop(pools);
        self.made.borrow_mut().retain(|pool| pool.strong_count() > 0);
    }

    /// The path to an endpoint.
    fn path(&self, settings: &Settings, name: &ServiceName, way: &Way<'_>) -> Option<Path> {
        let zone = way.endpoint.zone.as_ref();
        self.path_to(settings, name, &way.endpoint.place, zone, way.mode)
    }

    /// The path to the edge of this place: it ends there, at a public address in a zone that nobody knows.
    fn path_next_door(&self, settings: &Settings, name: &ServiceName) -> Option<Path> {
        self.path_to(settings, name, settings.place.as_ref()?, None, NetworkMode::Public)
    }

    fn path_to(
        &self,
        settings: &Settings,
        name: &ServiceName,
        to: &Place,
        zone: Option<&Zone>,
        mode: NetworkMode,
    ) -> Option<Path> {
        let from = settings.place.clone()?;
        let class = PriceBook::shipped().class(
            Site { place: &from, zone: settings.zone.as_ref() },
            Site { place: to, zone },
            mode,
        );
        let to = Some(to.clone());
        Some(self.meter.path(PathKey { callee: name.clone(), from, to, mode, class }))
    }

    /// The path to a host outside the project; on this machine there is nothing to count.
    fn path_outside(&self, settings: &Settings, name: &ServiceName, host: &Origin) -> Option<Path> {
        let from = settings.place.clone().filter(|_| !host.host().is_loopback())?;
        let (mode, class) = (NetworkMode::Public, PriceClass::Internet);
        Some(self.meter.path(PathKey { callee: name.clone(), from, to: None, mode, class }))
    }

    /// The cluster of a host outside the project. It has no part in what the process knows of endpoints: anybody may name
    /// as many hosts as they like.
    #[must_use]
    pub(super) fn outside(&self, host: &Origin) -> Option<Cluster> {
        // Reserved, so no service of the project has it.
        let name: ServiceName = "infrar-outside".parse().ok()?;
        let settings = self.settings();
        let vitals = Arc::new(Vitals::new(self.ward.tick(Instant::now())));
        let connector = tallied(
            self.connector(&settings, host, host)?,
            self.path_outside(&settings, &name, host).as_ref(),
            &[Kind::Http, Kind::Tunnel],
        );
        let app = App { origin: host.clone(), protocol: Protocol::Auto };
        let grant = Ok(identity::outside());
        let id = APP.parse().ok()?;
        self.single(&app, (&name, id), (connector, vitals), grant, Some(host.authority()))
    }

    /// The cluster of the application behind an inbound listener.
    #[must_use]
    pub(super) fn app(&self, app: &App) -> Option<Cluster> {
        let settings = self.settings();
        let me = &settings.service;
        let mut listeners = settings.inbound.iter();
        // Listeners may have applications of their own, which people must be able to tell apart.
        let id: EndpointId = match listeners.position(|it| it.app.as_ref() == Some(app)) {
            None | Some(0) => APP.parse().ok()?,
            Some(index) => format!("{APP}-{}", index + 1).parse().ok()?,
        };
        let whom = (me.clone(), id.clone(), app.origin.clone(), NetworkMode::Public);
        let vitals = self.ward.vitals(whom, &NEVER_LEFT_ALONE);
        let connector = self.connector(&settings, &app.origin, &app.origin)?;
        // Nobody calls it but for a caller who was granted something.
        let grant = Err(NotPermitted { caller: me.clone(), callee: me.clone() });
        self.single(app, (me, id), (connector, vitals), grant, None)
    }

    /// The cluster of a single address that is no part of the catalog.
    fn single(
        &self,
        app: &App,
        (service, id): (&ServiceName, EndpointId),
        (connector, vitals): (Connector, Arc<Vitals>),
        grant: Result<Grant, NotPermitted>,
        host: Option<String>,
    ) -> Option<Cluster> {
        let settings = self.settings();
        // An application behind TLS speaks what ALPN finds; on loopback HTTP/1.1 costs less than HTTP/2.
        let prefer_h2 = app.origin.scheme() == Scheme::Https;
        let pool =
            PoolSettings { head: settings.limits.head, prefer_h2, ..PoolSettings::default() };
        let pool = self.keep(Pool::new(pool, app.protocol, connector));
        let endpoint = Endpoint {
            id: id.clone(),
            url: app.origin.clone(),
            found_at: None,
            internal_url: None,
            private_url: None,
            place: Place::new("local".parse().ok()?, "local".parse().ok()?),
            zone: None::<Zone>,
            auth_method: AuthMethod::None,
            weight: 100,
            state: EndpointState::Active,
        };
        let callee = host.as_deref().map_or_else(
            || Callee::Application(service.clone()),
            |host| Callee::Outside(host.into()),
        );
        let authority = app.origin.authority();
        let target = Target {
            id,
            mode: NetworkMode::Public,
            host: host.and_then(|host| HeaderValue::try_from(host).ok()),
            authority: Authority::try_from(authority).ok()?,
            scheme: match app.origin.scheme() {
                Scheme::Http => UriScheme::HTTP,
                Scheme::Https => UriScheme::HTTPS,
            },
            takes_token: false,
            pool,
            direct: None,
            vitals: Arc::clone(&vitals),
        };
        Some(Cluster {
            service: service.clone(),
            callee,
            grant,
            token: None,
            targets: vec![Rc::new(target)],
            candidates: vec![Candidate::new(&endpoint, 0, None, None, vitals)],
            aim: Aim::new(&Routing::default(), &NEVER_LEFT_ALONE),
            picker: RefCell::default(),
            timeouts: Timeouts { request: None, ..Timeouts::default() },
            max_attempts: 1,
            backoff: (Duration::ZERO, Duration::ZERO),
            budget: self.ward.budget(service),
            series: self.series_of(&settings, service),
            absence: "",
        })
    }
}

/// The id under which an address that is no part of the catalog is known.
const APP: &str = "app";
/// There is no other endpoint to turn to.
const NEVER_LEFT_ALONE: Circuit =
    Circuit { failure_threshold: Circuit::NEVER, recovery_timeout: Duration::from_secs(1) };

/// Counts these kinds of bytes on `path`.
fn tallied(mut connector: Connector, path: Option<&Path>, kinds: &[Kind]) -> Connector {
    let Some(path) = path else { return connector };
    for kind in kinds.iter().copied() {
        let tally = Rc::new(OnPath { path: path.clone(), kind });
        connector = match kind {
            Kind::Http => connector.tallied(tally),
            Kind::Tunnel => connector.tunnels_tallied(tally),
        };
    }
    connector
}
