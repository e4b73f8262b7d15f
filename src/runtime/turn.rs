//! Writes that go out together.
//!
//! When many requests are ready at once, each read, decided and written in one go, the peer is woken for every single
//! one and goes back to sleep before the next. A task that lets the others go first, once, before it writes makes the
//! writes follow each other closely: the peer stays awake and takes them together, which spares both sides the cost of
//! waking. A task that is alone goes on at once.

use std::task::{Context, Poll};

/// One turn that is given up.
#[derive(Debug, Default)]
pub struct Turn {
    given: bool,
}

impl Turn {
    /// Pending once, so that every task that is ready comes first; then ready for good.
    pub fn poll_give(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.given {
            return Poll::Ready(());
        }
        self.given = true;
        // To the end of the run queue, and not behind the next look at the sockets as `yield_now` would.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, future::poll_fn, rc::Rc};

    use super::*;

    #[tokio::test(flavor = "local")]
    async fn everybody_reads_before_anybody_writes() {
        let told = Rc::new(RefCell::new(Vec::new()));
        let tasks: Vec<_> = (0..3)
            .map(|task| {
                let told = Rc::clone(&told);
                super::super::spawn_local("task", async move {
                    told.borrow_mut().push(("reads", task));
                    let mut turn = Turn::default();
                    poll_fn(|cx| turn.poll_give(cx)).await;
                    told.borrow_mut().push(("writes", task));
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let steps: Vec<_> = told.borrow().iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, ["reads", "reads", "reads", "writes", "writes", "writes"]);
    }
}
