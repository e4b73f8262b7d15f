//! Which of the three stories a listener tells.

use std::rc::Rc;

use crate::{
    proxy::{
        edge::Edge,
        flow::Flow,
        inbound::Inbound,
        live::Live,
        outbound::Outbound,
        record::Desk,
        reject::Rejection,
        walk::Walk,
        worker::{Answer, Call, Worker},
    },
    runtime::Shutdown,
    telemetry::Direction,
    wire::Request,
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

    /// Watches over what moves of an exchange's bodies.
    pub(super) fn flow(&self) -> Rc<Flow> {
        let worker = self.worker();
        Flow::new(&worker.watchdog, worker.limits().stall_timeout)
    }

    /// The worker that tells it.
    pub(super) fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }

    /// How far its end has come: that of its way, or that of its listener where this may close alone.
    pub(super) fn end(&self) -> &Shutdown {
        &self.end
    }

    /// What counts and ends everything that goes this way, whichever listener it came by.
    pub(super) fn way(&self) -> &Shutdown {
        match self.direction {
            Direction::Outbound => &self.worker.ends.outbound,
            Direction::Inbound => &self.worker.ends.inbound,
        }
    }

    /// The answer to what is refused before the story begins; `None`: to bytes that never became a request.
    pub(super) fn refuse(
        &self,
        rejection: Rejection,
        request: Option<Request>,
        flow: &Rc<Flow>,
    ) -> Answer {
        let walk = match request {
            Some(mut request) => Walk::begin(self.desk(), &mut request, flow),
            None => Walk::unread(self.desk(), flow),
        };
        walk.end(Err(rejection))
    }

    /// A request whose client did not wait until somebody looked at it.
    pub(super) fn missed(&self, mut request: Request, flow: &Rc<Flow>) {
        // Dropped, and thereby settled.
        let _walk = Walk::begin(self.desk(), &mut request, flow);
    }

    fn desk(&self) -> &Desk {
        match self.direction {
            Direction::Outbound => &self.worker.outbound_desk,
            Direction::Inbound => &self.worker.inbound_desk,
        }
    }

    /// Whether `CONNECT` means something here.
    pub(super) fn takes_connect(&self) -> bool {
        self.direction == Direction::Outbound
    }
}
