//! How every walk begins and ends; what lies between is told by `outbound`, `inbound` and `edge`.

use std::rc::Rc;

use http::{HeaderValue, Method, StatusCode, header};

use crate::{
    proxy::{
        flow::Flow,
        forward::Dispatch,
        headers::{self, Via},
        record::{Desk, Record},
        reject::Rejection,
        route,
        worker::{Answer, Call, Peer},
    },
    upstream::Received,
    wire::{Body, Fields, Request, Response, TraceContext, request_id},
};

/// One request on its way, and what must be known to answer it, whatever comes of it.
pub(super) struct Walk {
    /// What it has shown so far.
    pub record: Record,
    id: HeaderValue,
    grpc: bool,
    /// The protocol that the client asks to switch to.
    upgrade: Option<HeaderValue>,
}

/// What a head says of itself, once it has been undressed.
pub(super) struct Opened {
    id: HeaderValue,
    trace: TraceContext,
    grpc: bool,
    upgrade: Option<HeaderValue>,
}

/// Takes off what ends at this hop and what only infrar may say; only then, so that nobody can talk it away, an id and a
/// trace are put on.
pub(super) fn open(request: &mut Request) -> Opened {
    let fields = &mut request.fields;
    let grpc = headers::is_grpc(fields);
    let upgrade = headers::upgrade(&request.method, request.version, fields);
    headers::strip_hop_by_hop(fields);
    headers::strip_identity(fields);
    let id = headers::identify(fields);
    Opened { id, trace: headers::continue_trace(fields), grpc, upgrade }
}

/// Has a request been here before, and which host does it ask for? Empty where it names none, as HTTP/1.0 may.
///
/// # Errors
/// [`Rejection::Loop`], and [`Rejection::BadRequest`] for what is no host, and for TRACE.
pub(super) fn enter(via: &Via, request: &mut Request) -> Result<HeaderValue, Rejection> {
    if request.method == Method::TRACE {
        return Err(Rejection::BadRequest(
            "TRACE is not passed on: its answer would show the token that was put on the request",
        ));
    }
    via.pass(request.version, &mut request.fields)?;
    route::authority(&request.uri, &request.fields)
}

/// The answer to a request that was to go no further than here (`max-forwards`); one hop less for any other. Only OPTIONS
/// counts its hops: TRACE does not come this far, and for other methods the header means nothing (RFC 9110 §7.6.2).
pub(super) fn last_stop(request: &mut Request) -> Option<Received> {
    if request.method != Method::OPTIONS {
        return None;
    }
    let text = request.fields.get(&header::MAX_FORWARDS)?.to_str().ok()?;
    if text.is_empty() || !text.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    match text.parse::<u32>().unwrap_or(u32::MAX).checked_sub(1) {
        Some(left) => {
            request.fields.set(header::MAX_FORWARDS, left.into());
            None
        }
        None => Some(Received::Response(Response {
            status: StatusCode::NO_CONTENT,
            fields: Fields::new(),
            body: Body::Empty,
        })),
    }
}

/// Says where a request came from and which host it asked for, and repeats the wish to switch protocols.
pub(super) fn see_off(
    fields: &mut Fields,
    peer: &Peer,
    host: &HeaderValue,
    upgrade: Option<&HeaderValue>,
) {
    peer.forwarded.add(fields, host.to_str().unwrap_or_default());
    if let Some(protocol) = upgrade {
        fields.set(header::CONNECTION, HeaderValue::from_static("upgrade"));
        fields.set(header::UPGRADE, protocol.clone());
    }
}

impl Opened {
    /// The protocol that the client asks to switch to.
    pub(super) fn upgrade(&self) -> Option<&HeaderValue> {
        self.upgrade.as_ref()
    }
}

impl Walk {
    /// Opens the record of a request and undresses it. Its id and trace are known before anything can refuse it.
    pub(super) fn begin(desk: &Desk, request: &mut Request, flow: &Rc<Flow>) -> Self {
        let mut record = desk.open(&request.method, &request.uri, flow);
        let Opened { id, trace, grpc, upgrade } = open(request);
        record.identified(&id, trace);
        Self { record, id, grpc, upgrade }
    }

    /// The walk of bytes that never became a request.
    pub(super) fn unread(desk: &Desk, flow: &Rc<Flow>) -> Self {
        let mut record = desk.open_unread(flow);
        let id = request_id();
        record.identified(&id, TraceContext::begin());
        Self { record, id, grpc: false, upgrade: None }
    }

    /// The request as it goes on: it says where it came from and which `host` it asked for. `bearer` is for endpoints that
    /// take one.
    pub(super) fn dispatch<'a>(
        &self,
        call: Call<'a>,
        host: &HeaderValue,
        bearer: Option<HeaderValue>,
    ) -> Dispatch<'a> {
        let mut request = call.request;
        see_off(&mut request.fields, call.peer, host, self.upgrade.as_ref());
        Dispatch {
            request,
            bearer,
            upgrade: self.upgrade.is_some(),
            grpc: self.grpc,
            interim: call.interim,
            alarm: call.alarm,
        }
    }

    /// The answer: that of an endpoint, whose hop-by-hop headers end here, or the refusal.
    pub(super) fn end(mut self, outcome: Result<Received, Rejection>) -> Answer {
        match outcome {
            Ok(Received::Response(mut response)) => {
                self.record.answered(response.status, "");
                headers::strip_hop_by_hop(&mut response.fields);
                Answer::Response(response, self.record)
            }
            Ok(Received::Upgraded(response, stream)) => {
                self.record.answered(response.status, "");
                self.record.tunnelled();
                Answer::Tunnel(response, stream, self.record)
            }
            Err(rejection) => {
                self.record.answered(rejection.status(), rejection.code());
                Answer::Response(rejection.answer(Some(&self.id), self.grpc), self.record)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{Uri, Version};

    use super::*;

    #[test]
    fn only_options_counts_its_hops() {
        let hops = |method: Method, said: &str| {
            let mut fields = Fields::new();
            fields.set(header::MAX_FORWARDS, said.parse().unwrap());
            let (uri, version) = (Uri::default(), Version::HTTP_11);
            let mut request = Request { method, uri, version, fields, body: Body::Empty };
            match last_stop(&mut request) {
                Some(_answer) => "here".to_owned(),
                None => request.fields.get(&header::MAX_FORWARDS).unwrap().to_str().unwrap().into(),
            }
        };
        assert_eq!(hops(Method::OPTIONS, "0"), "here");
        assert_eq!(hops(Method::OPTIONS, "1"), "0");
        // More than we count to: less is said (§7.6.2).
        assert_eq!(hops(Method::OPTIONS, "99999999999999999999"), "4294967294");
        for nonsense in ["", "-1", "+1", "1, 2", "many"] {
            assert_eq!(hops(Method::OPTIONS, nonsense), nonsense);
        }
        assert_eq!(hops(Method::GET, "0"), "0");
    }
}
