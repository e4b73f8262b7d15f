//! Interim responses (1xx, RFC 9110 §15.2) on their way from the upstream to the downstream.

use std::cell::RefCell;

use http::StatusCode;

use crate::wire::Fields;

/// A letter box between the exchange with the upstream, which puts interim responses in, and the connection to the
/// downstream, which takes them out. Both run in one task: whoever polls the exchange looks here afterwards.
#[derive(Debug, Default)]
pub struct Interim(RefCell<Vec<(StatusCode, Fields)>>);

/// What one request may bring at most; a peer that sends more is not heard further.
const CAPACITY: usize = 16;

impl Interim {
    /// Leaves one interim response.
    pub fn put(&self, status: StatusCode, headers: Fields) {
        let mut waiting = self.0.borrow_mut();
        if waiting.len() < CAPACITY {
            waiting.push((status, headers));
        }
    }

    /// Takes what is there.
    #[must_use]
    pub fn take(&self) -> Vec<(StatusCode, Fields)> {
        if self.0.borrow().is_empty() { Vec::new() } else { self.0.take() }
    }
}
