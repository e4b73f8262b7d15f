//! Bodies on their way in: how long one may take, and how many may be waited for.
//!
//! A form is some hundred bytes and comes with its head; whoever sends one byte and then waits costs a place. Places
//! are numbered, in all and for one address. When there is none left nobody is refused: whoever has waited longest
//! gives way, first of the same address. So the quick are heard however many are slow.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::body::{Body, HttpBody};
use http_body_util::BodyExt;
use tokio::{sync::oneshot, time::sleep};

use crate::{control::reject::TokenRefusal, net};

/// The largest body that is taken.
const BODY_LIMIT: usize = 16 * 1024;
/// How long a body may take from its head to its end.
const LIMIT: Duration = Duration::from_secs(2);
/// Bodies that are waited for at a time: 64 MiB if all were as large as they may.
const ALL: usize = 4096;
/// Of them from one address.
const EACH: usize = 256;

/// The places. One per control plane.
pub(super) struct Intake {
    all: usize,
    each: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    /// In the order of their coming. Dropping the sender tells the one who waits to give way.
    places: BTreeMap<u64, (IpAddr, oneshot::Sender<()>)>,
    from: HashMap<IpAddr, BTreeSet<u64>>,
}

impl Intake {
    pub(super) fn new() -> Self {
        Self { all: ALL, each: EACH, waiting: Mutex::default() }
    }

    /// The whole body of a request from `peer`.
    pub(super) async fn read(&self, body: Body, peer: IpAddr) -> Result<Vec<u8>, TokenRefusal> {
        if body.size_hint().lower() > BODY_LIMIT as u64 {
            return Err(TokenRefusal::TooLarge);
        }
        let mut place = self.enter(peer);
        tokio::select! {
            // Whoever is there is heard, also when its place is wanted.
            biased;
            whole = collect(body) => whole,
            _given_up = &mut place.gives_way => Err(TokenRefusal::Slow),
            () = sleep(LIMIT) => Err(TokenRefusal::Slow),
        }
    }

    fn enter(&self, peer: IpAddr) -> Place<'_> {
        let source = net::source(peer);
        let mut waiting = self.lock();
        let own = waiting.from.get(&source).filter(|own| own.len() >= self.each);
        let full = waiting.places.len() >= self.all;
        let oldest =
            own.and_then(BTreeSet::first).or_else(|| waiting.places.keys().next().filter(|_| full));
        if let Some(oldest) = oldest.copied() {
            waiting.remove(oldest);
        }
        let number = waiting.next;
        waiting.next += 1;
        let (stays, gives_way) = oneshot::channel();
        waiting.places.insert(number, (source, stays));
        waiting.from.entry(source).or_default().insert(number);
        Place { intake: self, number, gives_way }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn remove(&mut self, number: u64) {
        let Some((source, _stays)) = self.places.remove(&number) else { return };
        if let Some(own) = self.from.get_mut(&source) {
            own.remove(&number);
            if own.is_empty() {
                self.from.remove(&source);
            }
        }
    }
}

/// One body's place.
struct Place<'a> {
    intake: &'a Intake,
    number: u64,
    /// Ends when the place is wanted by another.
    gives_way: oneshot::Receiver<()>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.intake.lock().remove(self.number);
    }
}

/// Copied, not gathered: a body in pieces of one byte would keep a buffer for each.
async fn collect(mut body: Body) -> Result<Vec<u8>, TokenRefusal> {
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|_broken| TokenRefusal::Request("the body did not arrive whole"))?;
        let Some(piece) = frame.data_ref() else { continue };
        if whole.len() + piece.len() > BODY_LIMIT {
            return Err(TokenRefusal::TooLarge);
        }
        whole.extend_from_slice(piece);
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, pin::pin};

    use bytes::Bytes;
    use futures_util::{StreamExt, poll, stream};
    use tokio::time::Instant;

    use super::*;

    fn intake(all: usize, each: usize) -> Intake {
        Intake { all, each, waiting: Mutex::default() }
    }

    /// One byte, and then nothing.
    fn slow() -> Body {
        let first = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"g"))]);
        Body::from_stream(first.chain(stream::pending()))
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_end_is_given_up_at_the_limit() {
        let intake = intake(8, 8);
        let begun = Instant::now();
        let read = intake.read(slow(), ip("192.0.2.1")).await;
        assert!(matches!(read, Err(TokenRefusal::Slow)), "{read:?}");
        assert_eq!(begun.elapsed(), LIMIT);
        let waiting = intake.lock();
        assert!(waiting.places.is_empty() && waiting.from.is_empty(), "nothing is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn the_slowest_of_the_same_address_gives_way_and_the_quick_are_heard() {
        let intake = intake(3, 2);
        let mut first = pin!(intake.read(slow(), ip("192.0.2.1")));
        let mut other = pin!(intake.read(slow(), ip("192.0.2.2")));
        let mut second = pin!(intake.read(slow(), ip("192.0.2.1")));
        assert!(poll!(&mut first).is_pending() && poll!(&mut other).is_pending());
        assert!(poll!(&mut second).is_pending());
        // All places are taken and the share of this address is too: its own first gives way.
        assert_eq!(intake.read(Body::from("form"), ip("192.0.2.1")).await.unwrap(), b"form");
        assert!(poll!(&mut first).is_ready());
        assert!(poll!(&mut other).is_pending() && poll!(&mut second).is_pending());
        // The last place goes to a third address; for a fourth the one that came first of all gives way.
        let mut third = pin!(intake.read(slow(), ip("192.0.2.3")));
        assert!(poll!(&mut third).is_pending());
        assert_eq!(intake.read(Body::from("form"), ip("192.0.2.4")).await.unwrap(), b"form");
        assert!(poll!(&mut other).is_ready() && poll!(&mut second).is_pending());
    }

    #[tokio::test]
    async fn a_body_above_the_limit_is_refused_also_when_it_does_not_say_so() {
        let pieces = stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(&[0; 1000])));
        for body in [Body::from(vec![0; BODY_LIMIT + 1]), Body::from_stream(pieces)] {
            let read = intake(8, 8).read(body, ip("192.0.2.1")).await;
            assert!(matches!(read, Err(TokenRefusal::TooLarge)), "{read:?}");
        }
    }
}
