//! Which of the three stories a listener tells.

use std::rc::Rc;

use http::Method;

use crate::{
    proxy::{
        edge::Edge,
        flow::Flow,
        inbound::Inbound,
        outbound::Outbound,
        reject::Rejection,
        worker::{Answer, Call, Worker, refused},
    },
    runtime::Shutdown,
};

/// What a listener does with requests.
pub(super) enum Story {
    /// Calls of the local application.
    Outbound(Rc<Worker>, Outbound),
    /// Calls for the local application.
    Inbound(Rc<Worker>, Inbound),
    /// Calls for every service of a place.
    Edge(Rc<Worker>, Edge),
}

impl Story {
    /// Answers one request.
    pub(super) async fn answer(&self, call: Call<'_>) -> Answer {
        match self {
            Self::Outbound(_, outbound) => outbound.answer(call).await,
            Self::Inbound(_, inbound) => inbound.answer(call).await,
            Self::Edge(_, edge) => edge.answer(call).await,
        }
    }

    /// Watches over what moves of an exchange's bodies.
    pub(super) fn flow(&self) -> Rc<Flow> {
        let worker = self.worker();
        Flow::new(&worker.watchdog, worker.limits().stall_timeout)
    }

    /// The worker that tells it.
    pub(super) fn worker(&self) -> &Rc<Worker> {
        match self {
            Self::Outbound(worker, _) | Self::Inbound(worker, _) | Self::Edge(worker, _) => worker,
        }
    }

    /// How far the end of this way has come.
    pub(super) fn end(&self) -> &Shutdown {
        let ends = &self.worker().ends;
        match self {
            Self::Outbound(..) => &ends.outbound,
            Self::Inbound(..) | Self::Edge(..) => &ends.inbound,
        }
    }

    /// The answer to bytes that never became a request.
    pub(super) fn refuse(&self, rejection: &Rejection, flow: &Rc<Flow>) -> Answer {
        let worker = self.worker();
        let desk = match self {
            Self::Outbound(..) => &worker.outbound_desk,
            Self::Inbound(..) | Self::Edge(..) => &worker.inbound_desk,
        };
        let record = desk.open(&Method::GET, &http::Uri::default(), flow);
        refused(rejection, None, false, record)
    }

    /// Whether `CONNECT` means something here.
    pub(super) fn takes_connect(&self) -> bool {
        matches!(self, Self::Outbound(..))
    }
}
