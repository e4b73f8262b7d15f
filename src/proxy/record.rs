//! What one exchange has shown so far; settled exactly once.
//!
//! A record is opened when a request's head is there and settled when the last byte of the answer is with the kernel.
//! If neither happens — the client goes away, the connection breaks — dropping the record settles it. What has moved by
//! then is counted as it moves, so that a transfer that breaks off is told with its true numbers.

use std::{
    cell::{OnceCell, RefCell},
    collections::{HashMap, hash_map},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use foldhash::fast::RandomState;
use http::{HeaderValue, Method, StatusCode, Uri};
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::{
    balance::{Flight, Vitals},
    model::{EndpointId, NetworkMode, ServiceName},
    proxy::flow::Flow,
    runtime::Clock,
    telemetry::{AccessLog, Counter, Direction, Entry, Histogram, Registry, names},
    wire::TraceContext,
};

/// The status under which a request is counted whose client did not wait for the answer (nginx' convention).
const CLIENT_GONE: u16 = 499;

/// Cells by status and problem code.
type Answers = SmallVec<[(u16, &'static str, Counter); 4]>;
/// Series by caller and callee.
type ByCaller = HashMap<(Box<str>, ServiceName), Rc<Series>, RandomState>;

/// Counts the exchanges of one (direction, caller, callee) on one worker.
pub(super) struct Series {
    direction: Direction,
    caller: Box<str>,
    callee: Box<str>,
    registry: Arc<Registry>,
    /// One cell per (status, problem code) seen; mostly one or two.
    answers: RefCell<Answers>,
    duration: Histogram,
    overhead: Histogram,
    /// Calls that only a project that learns lets through; made for the first.
    learned: OnceCell<Counter>,
}

impl Series {
    /// The series of one caller and callee; its cells live as long as the registry.
    #[must_use]
    pub(super) fn new(
        registry: &Arc<Registry>,
        direction: Direction,
        caller: &str,
        callee: &str,
    ) -> Rc<Self> {
        let way = direction.as_str();
        let series = Self {
            direction,
            caller: caller.into(),
            callee: callee.into(),
            registry: Arc::clone(registry),
            answers: RefCell::default(),
            duration: registry
                .histogram(names::REQUEST_DURATION, &[("direction", way), ("callee", callee)]),
            overhead: registry.histogram(names::PROXY_OVERHEAD, &[("direction", way)]),
            learned: OnceCell::new(),
        };
        // A series that exists at 0 shows up in rates from the first request on.
        series.answers.borrow_mut().push((200, "", series.cell(200, "")));
        Rc::new(series)
    }

    fn cell(&self, status: u16, error: &'static str) -> Counter {
        let code = status.to_string();
        let labels = [
            ("direction", self.direction.as_str()),
            ("caller", &*self.caller),
            ("callee", &*self.callee),
            ("code", &*code),
            ("error", error),
        ];
        self.registry.counter(names::REQUESTS, &labels)
    }

    /// Counts a call that passes only because the project is learning. Of the first on the way out the log tells; on the
    /// way in the gate does, which knows what is missing.
    fn learned(&self) {
        let first = || {
            let (caller, callee) = (&*self.caller, &*self.callee);
            if self.direction == Direction::Outbound {
                let refused = format!("{caller} has no grant at {callee}");
                tracing::info!(
                    callee,
                    would_be_refused = refused,
                    "a call that enforcing permissions would refuse"
                );
            }
            let direction = self.direction.as_str();
            let labels = [("direction", direction), ("caller", caller), ("callee", callee)];
            self.registry.counter(names::LEARNED_GRANTS, &labels)
        };
        self.learned.get_or_init(first).inc();
    }

    fn count(&self, status: u16, error: &'static str) {
        let mut answers = self.answers.borrow_mut();
        if let Some((_, _, cell)) = answers.iter().find(|(s, e, _)| *s == status && *e == error) {
            cell.inc();
            return;
        }
        let cell = self.cell(status, error);
        cell.inc();
        answers.push((status, error, cell));
    }
}

/// Opens records; one per worker and direction.
pub(super) struct Desk {
    direction: Direction,
    registry: Arc<Registry>,
    access: RefCell<Option<AccessLog>>,
    /// Of requests whose caller or callee is not known (yet).
    unknown: Rc<Series>,
    by_caller: RefCell<ByCaller>,
    /// Of the callers that are not counted by name, by callee.
    others: RefCell<HashMap<ServiceName, Rc<Series>, RandomState>>,
    last: RefCell<Option<Rc<Series>>>,
}

/// Callers counted by name on one worker; others are counted together.
const MOST_CALLERS: usize = 1000;
/// What they are called then.
const OTHERS: &str = "(others)";

impl Desk {
    /// A desk for one direction; `me` is the service of this proxy.
    #[must_use]
    pub(super) fn new(
        registry: &Arc<Registry>,
        access: Option<AccessLog>,
        direction: Direction,
        me: &ServiceName,
    ) -> Self {
        let (caller, callee) = match direction {
            Direction::Outbound => (me.as_str(), ""),
            Direction::Inbound => ("", me.as_str()),
        };
        Self {
            direction,
            registry: Arc::clone(registry),
            access: RefCell::new(access),
            unknown: Series::new(registry, direction, caller, callee),
            by_caller: RefCell::default(),
            others: RefCell::default(),
            last: RefCell::default(),
        }
    }

    /// Records that are opened from now on are written to `access`, or to nothing.
    pub(super) fn log_to(&self, access: Option<AccessLog>) {
        self.access.replace(access);
    }

    /// Opens the record of a request whose bodies move in `flow`.
    #[must_use]
    pub(super) fn open(&self, method: &Method, uri: &Uri, flow: &Rc<Flow>) -> Record {
        self.record(|| Some((method.clone(), uri.clone())), flow)
    }

    /// Opens the record of bytes that never became a request.
    #[must_use]
    pub(super) fn open_unread(&self, flow: &Rc<Flow>) -> Record {
        self.record(|| None, flow)
    }

    fn record(&self, asked: impl FnOnce() -> Option<(Method, Uri)>, flow: &Rc<Flow>) -> Record {
        let notes = self.access.borrow().as_ref().map(|log| {
            Box::new(Notes {
                log: log.clone(),
                wall: Clock::system().now(),
                asked: asked(),
                endpoint: None,
                outside: None,
                request_id: None,
                trace: None,
                attempts: 0,
                upstream: Duration::ZERO,
            })
        });
        Record {
            started: Instant::now(),
            series: Rc::clone(&self.unknown),
            error: "",
            status: 0,
            waited: Duration::ZERO,
            waits_since: None,
            pauses: false,
            own: Own::Everything,
            flow: Rc::clone(flow),
            flight: None,
            notes,
            settled: false,
        }
    }

    /// The series of a caller that showed who it is, at `callee`.
    #[must_use]
    pub(super) fn of_caller(&self, caller: &str, callee: &ServiceName) -> Rc<Series> {
        if let Some(last) = &*self.last.borrow()
            && *last.caller == *caller
            && *last.callee == *callee.as_str()
        {
            return Rc::clone(last);
        }
        let series = self.known(caller, callee);
        *self.last.borrow_mut() = Some(Rc::clone(&series));
        series
    }

    /// Series are made once, and none is ever forgotten: their cells live as long as the registry. So the first callers have
    /// names, and all others share one series per callee.
    fn known(&self, caller: &str, callee: &ServiceName) -> Rc<Series> {
        let made = |name| Series::new(&self.registry, self.direction, name, callee.as_str());
        let mut known = self.by_caller.borrow_mut();
        let full = known.len() >= MOST_CALLERS;
        match known.entry((Box::from(caller), callee.clone())) {
            hash_map::Entry::Occupied(found) => Rc::clone(found.get()),
            hash_map::Entry::Vacant(_) if full => {
                let mut others = self.others.borrow_mut();
                let shared = others.entry(callee.clone()).or_insert_with(|| made(OTHERS));
                Rc::clone(shared)
            }
            hash_map::Entry::Vacant(free) => Rc::clone(free.insert(made(caller))),
        }
    }
}

/// What only the log wants to know.
struct Notes {
    log: AccessLog,
    wall: jiff::Timestamp,
    /// What was asked for, if that could be read.
    asked: Option<(Method, Uri)>,
    endpoint: Option<(EndpointId, NetworkMode)>,
    /// The host outside the project that was called: it is no endpoint, and has only this name.
    outside: Option<Box<str>>,
    request_id: Option<HeaderValue>,
    trace: Option<TraceContext>,
    attempts: u32,
    /// Time spent waiting for endpoints.
    upstream: Duration,
}

/// What of an exchange's time was the proxy's own.
enum Own {
    /// All of it: no endpoint was asked.
    Everything,
    /// So much until the head of the answer; what comes then keeps the pace of both sides.
    Until(Duration),
    /// A tunnel has no answer.
    Nothing,
}

/// What one exchange has shown so far.
pub(super) struct Record {
    started: Instant,
    series: Rc<Series>,
    error: &'static str,
    status: u16,
    /// Time spent waiting for endpoints, and between attempts.
    waited: Duration,
    /// Since when either is waited for right now; whoever leaves meanwhile is not the proxy's delay.
    waits_since: Option<Instant>,
    /// Whether that is a pause between attempts.
    pauses: bool,
    own: Own,
    /// What has moved of the bodies.
    flow: Rc<Flow>,
    /// Counts as in flight at the endpoint until the record is gone.
    flight: Option<Flight<Arc<Vitals>>>,
    notes: Option<Box<Notes>>,
    settled: bool,
}

impl Record {
    /// When the request's head was there.
    #[must_use]
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Who speaks to whom is known.
    pub(super) fn belongs_to(&mut self, series: Rc<Series>) {
        self.series = series;
    }

    /// It leads to a host outside the project.
    pub(super) fn leaves_for(&mut self, host: &str) {
        if let Some(notes) = &mut self.notes {
            notes.outside = Some(host.into());
        }
    }

    /// It passes only because the project is learning.
    pub(super) fn learned(&self) {
        self.series.learned();
    }

    /// The request's id and trace are known.
    pub(super) fn identified(&mut self, request_id: &HeaderValue, trace: TraceContext) {
        if let Some(notes) = &mut self.notes {
            notes.request_id = Some(request_id.clone());
            notes.trace = Some(trace);
        }
    }

    /// An attempt began at `begun`: the endpoint is waited for.
    pub(super) fn attempt(&mut self, endpoint: &EndpointId, mode: NetworkMode, begun: Instant) {
        (self.waits_since, self.pauses) = (Some(begun), false);
        if let Some(notes) = &mut self.notes {
            notes.attempts += 1;
        }
        self.answered_by(endpoint, mode);
    }

    /// It is this endpoint whose answer the client gets.
    pub(super) fn answered_by(&mut self, endpoint: &EndpointId, mode: NetworkMode) {
        if let Some(notes) = &mut self.notes {
            notes.endpoint = Some((endpoint.clone(), mode));
        }
    }

    /// From `begun` on nothing is done until it is time for another attempt.
    pub(super) fn pauses(&mut self, begun: Instant) {
        (self.waits_since, self.pauses) = (Some(begun), true);
    }

    /// What moves of the bodies.
    #[must_use]
    pub(super) fn flow(&self) -> &Rc<Flow> {
        &self.flow
    }

    /// What was waited for came, or came not, at `now`.
    pub(super) fn waited(&mut self, now: Instant) {
        if let Some(begun) = self.waits_since.take() {
            let span = now.duration_since(begun);
            self.waited += span;
            if let (Some(notes), false) = (&mut self.notes, self.pauses) {
                notes.upstream += span;
            }
        }
        self.own = Own::Until(now.duration_since(self.started).saturating_sub(self.waited));
    }

    /// From here on both sides speak to each other directly.
    pub(super) fn tunnelled(&mut self) {
        self.own = Own::Nothing;
    }

    /// The endpoint carries this request until the record is settled.
    pub(super) fn carried_by(&mut self, flight: Flight<Arc<Vitals>>) {
        self.flight = Some(flight);
    }

    /// The head of the answer is known.
    pub(super) fn answered(&mut self, status: StatusCode, error: &'static str) {
        self.status = status.as_u16();
        self.error = error;
    }

    /// The exchange is over.
    pub(super) fn settle(mut self) {
        self.close();
    }

    /// The client did not wait for what it would have been answered.
    pub(super) fn missed(mut self) {
        (self.status, self.error) = (CLIENT_GONE, "client-gone");
        self.close();
    }

    /// The endpoint broke off midway: its head is with the client, and cannot say so any more.
    pub(super) fn broke(mut self, code: &'static str) {
        if self.error.is_empty() {
            self.error = code;
        }
        self.close();
    }

    fn close(&mut self) {
        if self.settled {
            return;
        }
        self.settled = true;
        let now = Instant::now();
        if self.waits_since.is_some() {
            self.waited(now);
        }
        let duration = now.duration_since(self.started);
        self.series.count(self.status, self.error);
        self.series.duration.record(duration);
        match self.own {
            Own::Everything => self.series.overhead.record(duration),
            Own::Until(span) => self.series.overhead.record(span),
            Own::Nothing => {}
        }
        if let Some(notes) = &self.notes {
            self.log(notes, duration);
        }
    }

    fn log(&self, notes: &Notes, duration: Duration) {
        let text = |value: &Option<HeaderValue>| {
            value.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        notes.log.record(&Entry {
            time: notes.wall,
            direction: self.series.direction,
            caller: &self.series.caller,
            callee: &self.series.callee,
            endpoint: notes
                .outside
                .as_deref()
                .or_else(|| Some(notes.endpoint.as_ref()?.0.as_str()))
                .unwrap_or_default(),
            mode: notes.endpoint.as_ref().map_or("", |(_, mode)| mode.as_str()),
            method: notes.asked.as_ref().map_or("", |(method, _)| method.as_str()),
            path: notes.asked.as_ref().map_or("", |(method, uri)| target(method, uri)),
            status: self.status,
            code: self.error,
            attempts: notes.attempts,
            bytes_in: self.flow.received(),
            bytes_out: self.flow.sent(),
            duration,
            upstream_duration: notes.upstream,
            trace_id: notes.trace.as_ref().map_or("", TraceContext::trace_id),
            request_id: &text(&notes.request_id),
        });
    }
}

/// What was asked for: a path, or the host that a tunnel leads to.
fn target<'a>(method: &Method, uri: &'a Uri) -> &'a str {
    let host = uri.authority().filter(|_| *method == Method::CONNECT);
    host.map_or_else(|| uri.path(), http::uri::Authority::as_str)
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.settled {
            // The answer never got through: say so, but keep what was already known of it.
            if self.status == 0 {
                self.status = CLIENT_GONE;
            }
            if self.error.is_empty() {
                self.error = "client-gone";
            }
            self.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_beyond_the_first_thousand_share_one_series_per_callee() {
        let me: ServiceName = "data".parse().unwrap();
        let other: ServiceName = "reports".parse().unwrap();
        let desk = Desk::new(&Arc::default(), None, Direction::Inbound, &me);
        let first = desk.of_caller("caller-0", &me);
        for caller in 1..MOST_CALLERS {
            assert_eq!(
                *desk.of_caller(&format!("caller-{caller}"), &me).caller,
                *format!("caller-{caller}")
            );
        }
        let late = desk.of_caller("late", &me);
        assert_eq!(&*late.caller, OTHERS);
        assert!(!Rc::ptr_eq(&late, &desk.of_caller("late", &other)));
        assert!(Rc::ptr_eq(&late, &desk.of_caller("later", &me)));
        assert!(Rc::ptr_eq(&first, &desk.of_caller("caller-0", &me)));
    }
}
