//! Interim responses (1xx, RFC 9110 §15.2) on their way from the upstream to the downstream.

use std::cell::{Cell, RefCell};

use http::StatusCode;

use crate::wire::Fields;

/// A letter box between the exchange with the upstream, which puts interim responses in, and the connection to the
/// downstream, which takes them out; one per request. Both run in one task: whoever polls the exchange looks here
/// afterwards.
#[derive(Debug, Default)]
pub struct Interim {
    waiting: RefCell<Vec<(StatusCode, Fields)>>,
    heard: Cell<usize>,
}

/// What one request may bring at most; a peer that sends more is not heard further. It bounds what waits for a client
/// that does not read.
const CAPACITY: usize = 32;

impl Interim {
    /// Leaves one interim response. `100 Continue` ends here: whoever passes the body on says it to its own client.
    pub fn put(&self, status: StatusCode, headers: Fields) {
        let heard = self.heard.get();
        if status != StatusCode::CONTINUE && heard < CAPACITY {
            self.heard.set(heard + 1);
            self.waiting.borrow_mut().push((status, headers));
        }
    }

    /// Takes what is there.
    #[must_use]
    pub fn take(&self) -> Vec<(StatusCode, Fields)> {
        if self.waiting.borrow().is_empty() { Vec::new() } else { self.waiting.take() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_never_stops_hinting_is_not_heard_further() {
        let interim = Interim::default();
        interim.put(StatusCode::CONTINUE, Fields::new());
        let mut heard = 0;
        for _ in 0..1000 {
            interim.put(StatusCode::EARLY_HINTS, Fields::new());
            heard += interim.take().len();
        }
        assert_eq!(heard, CAPACITY);
    }
}
