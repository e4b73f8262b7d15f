//! One worker's view of the project: the snapshot, with everything resolved that a request would otherwise look up.
//!
//! A view is built on the worker when the snapshot changes and replaced whole; requests that began on the old one end
//! on it. A service is resolved when it is first asked for, and what was resolved serves the next view too as long as
//! neither the service nor anything else that it was resolved by changes. So a large project costs a worker what it
//! uses of it. Pools, vitals and budgets outlive views: an endpoint that did not change keeps its warm connections.
//!
//! Of a small project, and of a large one as far as this proxy's service has grants at few, everything is resolved
//! beforehand, so that its series exist at 0; other series begin with the first call.

use std::{
    cell::RefCell,
    collections::HashMap,
    ops::Bound,
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
    discovery::Snapshot,
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

/// As many services are resolved before anybody asks for them.
const FEW: usize = 256;
/// As many names on either side in the alphabet are looked at for one that was meant.
const NEIGHBOURS: usize = 500;

/// The pools of the views that believe the same of their endpoints. The clusters hold them; here they are only found
/// again.
type Pools = Rc<RefCell<HashMap<PoolKey, Weak<Pool>>>>;

/// What a cluster is made by, beside its service.
struct Basis {
    settings: Arc<Settings>,
    pools: Pools,
    strictness: Strictness,
}

/// A worker's view of the project.
pub(super) struct View {
    /// What it was made from.
    pub snapshot: Arc<Snapshot>,
    surveyor: Rc<Surveyor>,
    basis: Basis,
    /// The services that anybody has asked for.
    clusters: RefCell<HashMap<ServiceName, Rc<Cluster>, RandomState>>,
}

impl View {
    /// The service with this name.
    #[must_use]
    pub(super) fn cluster(&self, name: &str) -> Option<Rc<Cluster>> {
        if let Some(known) = self.clusters.borrow().get(name) {
            return Some(Rc::clone(known));
        }
        let (name, service) = self.catalog().project.services.get_key_value(name)?;
        Some(self.resolve(name, service))
    }

    fn resolve(&self, name: &ServiceName, service: &Service) -> Rc<Cluster> {
        let cluster = Rc::new(self.surveyor.cluster(&self.basis, self.catalog(), name, service));
        self.clusters.borrow_mut().insert(name.clone(), Rc::clone(&cluster));
        cluster
    }

    /// Takes over what an earlier view has resolved. What has changed since is resolved at once, while its pools are
    /// there to be found.
    fn inherit(&self, before: &Self) {
        let (now, old) = (&self.catalog().project, &before.catalog().project);
        let me = &self.basis.settings.service;
        let same = Arc::ptr_eq(&self.basis.settings, &before.basis.settings)
            && Rc::ptr_eq(&self.basis.pools, &before.basis.pools)
            && self.basis.strictness == before.basis.strictness
            && now.networking == old.networking
            && now.permissions.get(me) == old.permissions.get(me);
        for (name, cluster) in before.clusters.borrow().iter() {
            let Some(service) = now.services.get(name) else { continue };
            if same && old.services.get(name).is_some_and(|old| Arc::ptr_eq(old, service)) {
                self.clusters.borrow_mut().insert(name.clone(), Rc::clone(cluster));
            } else {
                self.resolve(name, service);
            }
        }
    }

    /// Resolves what can be expected to be asked for, if that is not too much.
    fn foresee(&self) {
        let project = &self.catalog().project;
        if project.services.len() <= FEW {
            project.services.keys().for_each(|name| drop(self.cluster(name.as_str())));
        } else if let Some(granted) = project.permissions.get(&self.basis.settings.service)
            && granted.len() <= FEW
        {
            granted.keys().for_each(|name| drop(self.cluster(name.as_str())));
        }
    }

    /// The project as the snapshot has it.
    #[must_use]
    pub(super) fn catalog(&self) -> &Arc<Catalog> {
        self.snapshot.catalog()
    }

    /// Whether missing grants refuse.
    #[must_use]
    pub(super) fn strictness(&self) -> Strictness {
        self.basis.strictness
    }

    /// The service one of whose endpoints has this authority or host, in lower case.
    #[must_use]
    pub(super) fn service_of(&self, authority: &str) -> Option<&ServiceName> {
        self.snapshot.service_of(authority)
    }

    /// Whether missing grants refuse at `now` as they did when it was made.
    #[must_use]
    pub(super) fn is_as_strict_as_at(&self, now: jiff::Timestamp) -> bool {
        Strictness::at(&self.catalog().project.mode, now) == self.strictness()
    }

    /// How much longer the project learns; `None` when this view does not.
    #[must_use]
    pub(super) fn learns_for(&self, now: jiff::Timestamp) -> Option<Duration> {
        match (self.strictness(), &self.catalog().project.mode) {
            (Strictness::Learn, Enforcement::LearnUntil(end)) => {
                // Not a moment too early, or it would be looked at in vain.
                let left =
                    end.duration_since(now).saturating_add(jiff::SignedDuration::from_millis(1));
                Some(Duration::try_from(left).unwrap_or(Duration::ZERO))
            }
            (Strictness::Learn | Strictness::Enforce, _) => None,
        }
    }

    /// Names that may be meant by `asked`: every one in a project that is not large, else its neighbours.
    pub(super) fn names_near(&self, asked: &str) -> impl Iterator<Item = &ServiceName> {
        let services = &self.catalog().project.services;
        let before = (Bound::Unbounded, Bound::Excluded(asked));
        let after = (Bound::Included(asked), Bound::Unbounded);
        let before = services.range::<str, _>(before).rev().take(NEIGHBOURS);
        let after = services.range::<str, _>(after).take(NEIGHBOURS);
        before.chain(after).map(|(name, _)| name)
    }
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
    /// The pools that views from now on may find.
    pub pools: RefCell<Pools>,
    /// Every pool it made, as long as somebody uses it.
    pub made: RefCell<Vec<Weak<Pool>>>,
    /// The series of what was ever resolved.
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

    /// The view of a snapshot, after `before`.
    #[must_use]
    pub(super) fn survey(
        self: &Rc<Self>,
        snapshot: Arc<Snapshot>,
        before: Option<&View>,
    ) -> Rc<View> {
        let mode = &snapshot.catalog().project.mode;
        let strictness = Strictness::at(mode, Clock::system().now());
        let pools = Rc::clone(&self.pools.borrow());
        let basis = Basis { settings: self.settings(), pools, strictness };
        let clusters = RefCell::default();
        let view = View { snapshot, surveyor: Rc::clone(self), basis, clusters };
        if let Some(before) = before {
            view.inherit(before);
        }
        view.foresee();
        Rc::new(view)
    }

    fn cluster(
        &self,
        basis: &Basis,
        catalog: &Catalog,
        name: &ServiceName,
        service: &Service,
    ) -> Cluster {
        let settings = &*basis.settings;
        let mut absence = service.absence.unwrap_or("it has no endpoints");
        let ways = self.ways(settings, &catalog.project.networking, service, &mut absence);
        let mut targets = Vec::new();
        let mut candidates = Vec::new();
        for way in ways {
            match self.target(basis, name, service, &way) {
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
            grant: permits(&catalog.project, &settings.service, name, basis.strictness),
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
        basis: &Basis,
        name: &ServiceName,
        service: &Service,
        way: &Way<'_>,
    ) -> Option<(Target, Candidate)> {
        let settings = &*basis.settings;
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
        let found = basis.pools.borrow().get(&key).and_then(Weak::upgrade);
        let pool = match found {
            Some(pool) => pool,
            None => {
                let made = self.pool(settings, name, way, edge, service.protocol)?;
                basis.pools.borrow_mut().insert(key, Rc::downgrade(&made));
                made
            }
        };
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
        let findable = self.pools.borrow();
        findable.borrow_mut().retain(|_, pool| pool.strong_count() > 0);
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tokio::runtime::Handle;

    use super::*;
    use crate::{
        discovery::Directory,
        identity::NoTokens,
        net::ClientTls,
        proxy::{
            OutboundSettings,
            settings::{Limits, UnknownHosts},
        },
        runtime::Supervisor,
    };

    fn settings() -> Arc<Settings> {
        let outbound = OutboundSettings {
            listen: "127.0.0.1:0".parse().unwrap(),
            ports: Default::default(),
            unknown_hosts: UnknownHosts::Deny,
            via: None,
            override_authorization: false,
        };
        Arc::new(Settings {
            role: Role::Sidecar,
            service: "web".parse().unwrap(),
            place: Some("aws_us_east_1".parse().unwrap()),
            zone: None,
            outbound: Some(outbound),
            inbound: Vec::new(),
            limits: Limits::default(),
            tls: Arc::new(ClientTls::new(None).unwrap()),
            access: None,
        })
    }

    /// A worker's surveyor, the directory that it follows and its last view.
    struct Post {
        surveyor: Rc<Surveyor>,
        directory: Arc<Directory>,
        view: Option<Rc<View>>,
    }

    impl Post {
        fn new() -> Self {
            let supervisor = Supervisor::new(Handle::current());
            let clock = Clock::system();
            let tokens = Tokens::new(Arc::new(NoTokens), HashMap::new(), supervisor.clone(), clock);
            let surveyor = Rc::new(Surveyor {
                settings: settings().into(),
                ward: Arc::default(),
                tokens: Arc::new(tokens),
                resolver: Resolver::new(supervisor),
                own: OwnAddresses::default(),
                meter: Arc::default(),
                registry: Arc::default(),
                pools: Default::default(),
                made: Default::default(),
                series: Default::default(),
            });
            Self { surveyor, directory: Arc::default(), view: None }
        }

        fn survey(&mut self) -> Rc<View> {
            let snapshot = self.directory.snapshot().unwrap();
            let view = self.surveyor.survey(snapshot, self.view.as_deref());
            self.surveyor.ward.sweep();
            self.view = Some(Rc::clone(&view));
            view
        }

        /// The view of a project as a control plane would send it whole.
        fn publish(&mut self, project: &Value) -> Rc<View> {
            let revision = self.directory.load().map_or(1, |catalog| catalog.revision + 1);
            let project = serde_json::from_value(project.clone()).unwrap();
            self.directory.publish(Catalog { revision, issuer: String::new(), project });
            self.survey()
        }

        fn resolved(&self) -> usize {
            self.view.as_ref().map_or(0, |view| view.clusters.borrow().len())
        }
    }

    fn service(ids: &[&str]) -> Value {
        let mut service = serde_json::to_value(Service::default()).unwrap();
        let endpoints = ids.iter().map(|id| {
            json!({
                "id": id, "url": format!("https://{id}.example"), "internal_url": null, "private_url": null,
                "place": "azure_eastus", "zone": null, "auth_method": "none", "weight": 100, "state": "active",
            })
        });
        service["endpoints"] = endpoints.collect();
        service
    }

    /// `data` and `mail`, and as many others.
    fn project(others: usize) -> Value {
        let mut services: serde_json::Map<_, _> =
            (0..others).map(|number| (format!("other-{number}"), service(&["x"]))).collect();
        services.insert("data".to_owned(), service(&["a", "b"]));
        services.insert("mail".to_owned(), service(&["m"]));
        json!({"name": "shop", "networking": {"multi_cloud": true, "default_mode": "public", "connections": []},
            "services": services, "permissions": {"web": {"data": ["use"]}}, "issuers": [], "mode": "enforce"})
    }

    #[tokio::test]
    async fn a_cluster_is_kept_while_nothing_changes_that_it_is_made_of() {
        let mut post = Post::new();
        let mut project = project(0);
        let before = post.publish(&project);
        let (data, mail) = (before.cluster("data").unwrap(), before.cluster("mail").unwrap());
        project["services"]["data"] = service(&["b", "c"]);
        let after = post.publish(&project);
        let changed = after.cluster("data").unwrap();
        assert!(Rc::ptr_eq(&mail, &after.cluster("mail").unwrap()));
        assert!(!Rc::ptr_eq(&data, &changed));
        // The endpoint that stayed kept its connections and what is known of it.
        let (old, new) = (&data.targets[1], &changed.targets[0]);
        assert_eq!((old.id.as_str(), new.id.as_str()), ("b", "b"));
        assert!(Rc::ptr_eq(&old.pool, &new.pool) && Arc::ptr_eq(&old.vitals, &new.vitals));
        // What is gone is gone with whoever still uses it.
        let gone = Rc::downgrade(&data.targets[0].pool);
        drop((before, data));
        assert!(gone.upgrade().is_none());
        post.surveyor.prune(Instant::now());
        assert_eq!(post.surveyor.pools.borrow().borrow().len(), 3);
        let known = post.surveyor.ward.conditions();
        assert_eq!(known.len(), 3, "{known:?}");

        project["services"].as_object_mut().unwrap().remove("mail");
        assert!(post.publish(&project).cluster("mail").is_none());
    }

    #[tokio::test]
    async fn grants_of_others_change_nothing_and_those_of_this_service_all() {
        let mut post = Post::new();
        let mut project = project(0);
        let first = post.publish(&project).cluster("mail").unwrap();
        assert!(first.grant.is_err());
        project["permissions"]["batch"] = json!({"mail": ["use"]});
        let second = post.publish(&project).cluster("mail").unwrap();
        assert!(Rc::ptr_eq(&first, &second));
        project["permissions"]["web"]["mail"] = json!(["use"]);
        let third = post.publish(&project).cluster("mail").unwrap();
        assert!(third.grant.is_ok());
        assert!(Rc::ptr_eq(&first.targets[0].pool, &third.targets[0].pool));
        project["mode"] = json!({"learn_until": "9999-01-01T00:00:00Z"});
        assert!(!Rc::ptr_eq(&third, &post.publish(&project).cluster("mail").unwrap()));
        project["networking"]["multi_cloud"] = json!(false);
        assert!(post.publish(&project).cluster("mail").unwrap().targets.is_empty());
    }

    #[tokio::test]
    async fn other_settings_make_every_cluster_anew_and_another_world_every_pool() {
        let mut post = Post::new();
        let first = post.publish(&project(0)).cluster("data").unwrap();
        post.surveyor.survey_by(settings());
        let second = post.survey().cluster("data").unwrap();
        assert!(!Rc::ptr_eq(&first, &second));
        assert!(Rc::ptr_eq(&first.targets[0].pool, &second.targets[0].pool));
        let old = post.view.clone().unwrap();
        post.surveyor.begin_anew();
        let third = post.survey().cluster("data").unwrap();
        assert!(!Rc::ptr_eq(&second.targets[0].pool, &third.targets[0].pool));
        // What an old view still resolves is of the old world.
        old.clusters.borrow_mut().clear();
        let late = old.cluster("data").unwrap();
        assert!(Rc::ptr_eq(&second.targets[0].pool, &late.targets[0].pool));
    }

    #[tokio::test]
    async fn of_a_large_project_only_what_is_granted_or_used_is_resolved() {
        let mut post = Post::new();
        let mut project = project(FEW);
        let view = post.publish(&project);
        assert_eq!(post.resolved(), 1, "web has a grant at data");
        assert!(view.cluster("other-7").is_some() && view.cluster("nobody").is_none());
        assert_eq!(post.resolved(), 2);
        let used = view.cluster("other-7").unwrap();
        project["services"]["mail"] = service(&[]);
        let next = post.publish(&project);
        assert_eq!(post.resolved(), 2);
        assert!(Rc::ptr_eq(&used, &next.cluster("other-7").unwrap()));
    }

    #[tokio::test]
    async fn names_are_looked_for_in_the_neighbourhood() {
        let mut post = Post::new();
        let view = post.publish(&project(3));
        assert_eq!(view.names_near("nail").count(), 5);
        let view = post.publish(&project(3 * NEIGHBOURS));
        assert_eq!(view.names_near("other-5").count(), 2 * NEIGHBOURS);
        assert!(view.names_near("other-5").any(|name| name.as_str() == "other-5"));
    }
}
