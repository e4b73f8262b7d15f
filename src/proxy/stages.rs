//! Single stages of the walk, for those who look at one alone: benches measure them, fuzz targets attack them.
//!
//! What stands here is what `outbound` and `inbound` do with a head, by the same functions in the same order, without
//! a socket before it and an endpoint behind it. Nothing in this file lies on the path of a request.

use std::{borrow::Cow, cell::RefCell, net::SocketAddr, rc::Rc};

use crate::{
    identity::{Claims, Grant},
    proxy::{
        Parts, Site,
        flow::Flow,
        headers::{self, Forwarded, Via},
        inbound::{self, Admitted},
        outbound::{self, Outbound},
        record::Record,
        reject::Rejection,
        route, walk,
        worker::{Peer, Worker},
    },
    runtime::WorkerId,
    upstream::OwnAddresses,
    wire::{Fields, Request},
};

/// The name of a service that an authority may mean; not yet known to exist.
#[must_use]
pub fn service_named(authority: &str) -> Cow<'_, str> {
    route::service(authority)
}

/// The way out's look-up: which service a request is for, and whether it may be called.
pub struct Routes {
    worker: Rc<Worker>,
    outbound: Outbound,
    record: RefCell<Record>,
}

impl Routes {
    /// The routes of a proxy made of `parts`; `None` unless its settings have a way out.
    #[must_use]
    pub fn new(parts: Parts) -> Option<Self> {
        let settings = parts.settings.borrow().outbound.clone()?;
        let vias = (Via::random(), Via::random());
        let site = Site { id: WorkerId::new(0), own: OwnAddresses::default(), vias };
        let worker = Rc::new(super::worker(parts, site));
        worker.refresh();
        let flow = Flow::new(&worker.watchdog, worker.limits().stall_timeout);
        let record = worker.outbound_desk.open(&http::Method::GET, &http::Uri::default(), &flow);
        let outbound = Outbound::new(Rc::clone(&worker), settings, None);
        Some(Self { worker, outbound, record: RefCell::new(record) })
    }

    /// Takes over the snapshot of the moment, as a worker does that is told of it.
    pub fn refresh(&self) {
        self.worker.refresh();
    }

    /// Looks a request up.
    ///
    /// # Errors
    /// The [`Rejection`] that its caller would see.
    pub fn find(&self, head: &Request) -> Result<(), Rejection> {
        let host = route::authority(&head.uri, &head.fields)?;
        let asked = outbound::asked(&host)?;
        let cluster = self.outbound.route(&head.uri, asked, &mut self.record.borrow_mut())?;
        outbound::granted(&cluster).map(drop)
    }
}

/// What one hop does to headers: this process, and a client's connection.
pub struct Hop {
    via: Via,
    peer: Peer,
}

impl Hop {
    /// The hop of a client at `peer` (`None`: the application itself), over TLS or not.
    #[must_use]
    pub fn new(peer: Option<SocketAddr>, tls: bool) -> Self {
        let peer = Peer { server_name: None, forwarded: Forwarded::new(peer, tls) };
        Self { via: Via::random(), peer }
    }

    /// Dresses a request on its way out. The token and the endpoint's `host` are put on per attempt.
    ///
    /// # Errors
    /// The [`Rejection`] of a request that has been here, or that names no host.
    pub fn dress(&self, head: &mut Request) -> Result<(), Rejection> {
        let opened = walk::open(head);
        let host = walk::enter(&self.via, head)?;
        outbound::asked(&host)?;
        walk::see_off(&mut head.fields, &self.peer, &host, opened.upgrade());
        Ok(())
    }

    /// Undresses a request on its way in, for a caller that showed `claims` (`None`: on a public path).
    ///
    /// # Errors
    /// The [`Rejection`] of a request that has been here, or whose host is none.
    pub fn undress(
        &self,
        head: &mut Request,
        grant: Grant,
        claims: Option<Rc<Claims>>,
    ) -> Result<(), Rejection> {
        let opened = walk::open(head);
        let host = walk::enter(&self.via, head)?;
        Admitted { grant, claims }.introduce(&mut head.fields);
        inbound::keep_host(head, &host);
        walk::see_off(&mut head.fields, &self.peer, &host, opened.upgrade());
        Ok(())
    }

    /// What is left of an answer's headers.
    pub fn relay(fields: &mut Fields) {
        headers::strip_hop_by_hop(fields);
    }
}
