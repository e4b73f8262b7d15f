//! What the log is told of endpoints that cannot be reached: the address and the cause, which no answer may name.
//!
//! Many requests meet the same fault, so each endpoint has its line once in a while and on each worker, which shares no
//! memory of what was said with the others; how often it was met stands in the metrics.

use std::{cell::RefCell, collections::HashMap, error::Error, time::Duration};

use tokio::time::Instant;

use crate::{
    balance::CircuitState,
    model::{EndpointId, ServiceName},
    proxy::view::{Cluster, Target},
    upstream::ConnectError,
};

/// Between two lines about one endpoint.
const PAUSE: Duration = Duration::from_secs(60);

type Said = HashMap<(ServiceName, EndpointId), Instant>;

thread_local! {
    /// When each endpoint was last complained about. Hosts outside the project share one line: anybody may name many.
    static SAID: RefCell<Said> = RefCell::default();
}

/// Says that there is no way to `target`, unless that was said just now.
pub(super) fn no_connection(cluster: &Cluster, target: &Target, error: &ConnectError) {
    let key = (cluster.service.clone(), target.id.clone());
    let due = SAID.with_borrow_mut(|said| is_due(said, key, Instant::now()));
    let (service, endpoint) = (&cluster.callee, &target.id);
    let error = error as &dyn Error;
    let address = target.pool.connector().address();
    if !due {
        tracing::debug!(%service, %endpoint, %address, error, "no connection to an endpoint");
        return;
    }
    // The name that the certificate must have is the host of the endpoint's `url`, whatever the address.
    let named = target.authority.host();
    tracing::warn!(%service, %endpoint, %address, named, error, "no connection to an endpoint");
}

/// Says that the circuit of `target` opened or closed.
#[cold]
pub(super) fn circuit(cluster: &Cluster, target: &Target, state: CircuitState) {
    let (service, endpoint, mode) = (&cluster.callee, &target.id, target.mode);
    match state {
        CircuitState::Open => tracing::warn!(
            %service, %endpoint, %mode, recovery_timeout = ?cluster.aim.circuit().recovery_timeout,
            "the circuit is open: the endpoint has failed too often and is left alone"
        ),
        CircuitState::Closed => {
            tracing::info!(%service, %endpoint, %mode, "the circuit is closed again");
        }
        CircuitState::HalfOpen => {}
    }
}

fn is_due(said: &mut Said, key: (ServiceName, EndpointId), now: Instant) -> bool {
    said.retain(|_, last| now.duration_since(*last) < PAUSE);
    let due = !said.contains_key(&key);
    if due {
        said.insert(key, now);
    }
    due
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_has_its_line_once_in_a_while() {
        let mut said = Said::default();
        let key = |id: &str| ("reports".parse().unwrap(), id.parse().unwrap());
        let begun = Instant::now();
        assert!(is_due(&mut said, key("a"), begun));
        assert!(!is_due(&mut said, key("a"), begun + PAUSE / 2));
        assert!(is_due(&mut said, key("b"), begun + PAUSE / 2), "another one has its own");
        assert!(is_due(&mut said, key("a"), begun + PAUSE));
        assert_eq!(said.len(), 2);
    }
}
