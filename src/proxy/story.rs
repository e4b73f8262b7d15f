//! Which of the three stories a listener tells.

use std::rc::Rc;

use http::Method;

use crate::{
    proxy::{
        edge::Edge,
        inbound::Inbound,
        live::Live,
        outbound::Outbound,
        reject::Rejection,
        worker::{Answer, Call, Worker, refused},
    },
    runtime::Shutdown,
    telemetry::Direction,
    wire::{TraceContext, request_id},
};

/// What a listener does with requests, for as long as it is open; how it is told may change with the settings.
pub(super) struct Story {
    worker: Rc<Worker>,
    direction: Direction,
    end: Shutdown,
    tale: Live<Tale>,
}

/// A story as the settings of the moment want it told.
pub(super) enum Tale {
    /// Calls of the local application.
    Outbound(Outbound),
    /// Calls for the local application.
    Inbound(Inbound),
    /// Calls for every service of a place.
    Edge(Edge),
}

impl Tale {
    fn direction(&self) -> Direction {
        match self {
            Self::Outbound(_) => Direction::Outbound,
            Self::Inbound(_) | Self::Edge(_) => Direction::Inbound,
        }
    }
}

impl Story {
    /// A story that is told until `end`.
    #[must_use]
    pub(super) fn new(worker: Rc<Worker>, end: Shutdown, tale: Tale) -> Self {
        Self { worker, direction: tale.direction(), end, tale: Live::new(tale) }
    }

    /// Answers one request.
    pub(super) async fn answer(&self, call: Call<'_>) -> Answer {
        let tale = self.tale.now();
        match &*tale {
            Tale::Outbound(outbound) => outbound.answer(call).await,
            Tale::Inbound(inbound) => inbound.answer(call).await,
            Tale::Edge(edge) => edge.answer(call).await,
        }
    }

    /// How it is told right now.
    #[must_use]
    pub(super) fn tale(&self) -> Rc<Tale> {
        self.tale.now()
    }

    /// Tells it otherwise from the next request on.
    pub(super) fn retell(&self, tale: Tale) {
        self.tale.put(tale);
    }

    /// The worker that tells it.
    pub(super) fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }

    /// How far its end has come: that of its way, or that of its listener where this may close alone.
    pub(super) fn end(&self) -> &Shutdown {
        &self.end
    }

    /// The answer to what never became a request; `grpc`: in the words of gRPC.
    pub(super) fn refuse(&self, rejection: &Rejection, grpc: bool) -> Answer {
        let desk = match self.direction {
            Direction::Outbound => &self.worker.outbound_desk,
            Direction::Inbound => &self.worker.inbound_desk,
        };
        let mut record = desk.open(&Method::GET, &http::Uri::default());
        let id = request_id();
        record.identified(&id, TraceContext::begin());
        refused(rejection, Some(&id), grpc, record)
    }

    /// Whether `CONNECT` means something here.
    pub(super) fn takes_connect(&self) -> bool {
        self.direction == Direction::Outbound
    }
}
