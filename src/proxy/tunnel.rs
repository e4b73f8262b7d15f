//! Two streams that speak to each other: after `CONNECT`, and after an upgrade.

use std::time::Duration;

use tokio::io::{AsyncWriteExt, copy_bidirectional_with_sizes};

use crate::{
    net::Stream,
    proxy::record::Record,
    runtime::{Phase, Shutdown},
};

/// Bytes in hand per direction.
const BUFFER: usize = 32 * 1024;
/// How long a tunnel that is told to end may go on.
const LINGER: Duration = Duration::from_secs(1);

/// Copies both ways until both sides have ended, or the proxy must; settles the record.
pub(super) async fn join(mut near: Stream, mut far: Stream, record: Record, shutdown: &Shutdown) {
    let copied = tokio::select! {
        copied = copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER) => copied.ok(),
        () = shutdown.wait(Phase::Abort) => None,
    };
    let (up, down) = copied.unwrap_or((0, 0));
    record.settle(up, down);
    let close = async {
        let ends = tokio::join!(near.shutdown(), far.shutdown());
        if let (Err(error), _) | (_, Err(error)) = ends {
            tracing::trace!(%error, "a tunnel's end was gone already");
        }
    };
    if tokio::time::timeout(LINGER, close).await.is_err() {
        tracing::trace!("a tunnel's end did not say goodbye");
    }
}
