//! Births and ends of the tasks on the side runtime.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{runtime::Handle, task::AbortHandle, time};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::TaskTracker,
};

use super::panics::caught;

/// Rest before a task that panicked is begun again, so that a panic at its start does not burn a CPU.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// Why a shutdown was not clean.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SupervisorError {
    /// These did not end in time and were dropped where they stood.
    #[error("still running at the deadline: {}", .tasks.join(", "))]
    Unfinished {
        /// Their names, sorted.
        tasks: Vec<&'static str>,
    },
}

/// Names the tasks of the side runtime, gives them a cancellation token and awaits their end.
#[derive(Clone, Debug)]
pub struct Supervisor {
    side: Handle,
    cancel: CancellationToken,
    tasks: TaskTracker,
    names: Arc<Mutex<Names>>,
}

#[derive(Debug, Default)]
struct Names {
    next: u64,
    running: BTreeMap<u64, (&'static str, Option<AbortHandle>)>,
}

impl Supervisor {
    /// A supervisor of tasks on `side`.
    #[must_use]
    pub fn new(side: Handle) -> Self {
        Self {
            side,
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
            names: Arc::default(),
        }
    }

    /// Cancelled when the shutdown begins. A task that has something to finish watches it.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.cancel.clone()
    }

    /// Ends when the shutdown begins.
    pub fn ending(&self) -> WaitForCancellationFutureOwned {
        self.cancel.clone().cancelled_owned()
    }

    /// The runtime the tasks live on.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.side
    }

    /// Starts a task that watches [`token`](Self::token) itself, because it has something to finish. A panic in it is
    /// logged and counted.
    pub fn spawn<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let id = {
            let mut names = lock(&self.names);
            names.next += 1;
            let id = names.next;
            names.running.insert(id, (name, None));
            id
        };
        let names = Arc::clone(&self.names);
        let body = AssertUnwindSafe(task).catch_unwind().map(move |outcome| {
            lock(&names).running.remove(&id);
            if outcome.is_err() {
                caught(name);
            }
        });
        let handle = self.tasks.spawn_on(body, &self.side).abort_handle();
        if let Some(entry) = lock(&self.names).running.get_mut(&id) {
            entry.1 = Some(handle);
        }
    }

    /// Starts a task that is dropped where it waits when the shutdown begins.
    pub fn spawn_until_end<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let cancel = self.cancel.clone();
        self.spawn(name, async move {
            cancel.run_until_cancelled_owned(task).await;
        });
    }

    /// As [`spawn_until_end`](Self::spawn_until_end), and begun again a second after it panicked. It ends for good
    /// when what `make` gave ends by itself.
    pub fn spawn_restarting<M, F>(&self, name: &'static str, mut make: M)
    where
        M: FnMut() -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_until_end(name, async move {
            while AssertUnwindSafe(make()).catch_unwind().await.is_err() {
                caught(name);
                time::sleep(RESTART_AFTER).await;
            }
        });
    }

    /// Names of the tasks that run now, sorted.
    #[must_use]
    pub fn running(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = lock(&self.names).running.values().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names
    }

    /// Cancels the token and waits for all tasks, at most `limit`; then drops what is left.
    ///
    /// # Errors
    /// [`SupervisorError::Unfinished`] names the tasks that were dropped.
    pub async fn shutdown(&self, limit: Duration) -> Result<(), SupervisorError> {
        self.cancel.cancel();
        self.tasks.close();
        if time::timeout(limit, self.tasks.wait()).await.is_ok() {
            return Ok(());
        }
        let tasks = self.running();
        for (_, handle) in lock(&self.names).running.values() {
            if let Some(handle) = handle {
                handle.abort();
            }
        }
        Err(SupervisorError::Unfinished { tasks })
    }
}

fn lock(names: &Mutex<Names>) -> MutexGuard<'_, Names> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_shutdown_waits_for_what_a_task_has_to_finish() {
        let supervisor = Supervisor::new(Handle::current());
        let (finished, outcome) = oneshot::channel();
        let ending = supervisor.ending();
        supervisor.spawn("ledger", async move {
            ending.await;
            time::sleep(Duration::from_secs(2)).await;
            finished.send("flushed").unwrap();
        });
        supervisor.spawn_until_end("watch", std::future::pending());
        assert_eq!(supervisor.running(), ["ledger", "watch"]);
        assert_eq!(supervisor.shutdown(Duration::from_secs(5)).await, Ok(()));
        assert_eq!(outcome.await, Ok("flushed"));
        assert!(supervisor.running().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_end_is_named_and_dropped() {
        let supervisor = Supervisor::new(Handle::current());
        let (_kept, dropped) = oneshot::channel::<()>();
        supervisor.spawn("stuck", async move {
            let _kept = _kept;
            std::future::pending::<()>().await;
        });
        let verdict = supervisor.shutdown(Duration::from_secs(1)).await;
        assert_eq!(verdict, Err(SupervisorError::Unfinished { tasks: vec!["stuck"] }));
        assert!(dropped.await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_begun_again() {
        let supervisor = Supervisor::new(Handle::current());
        let (done, finished) = oneshot::channel();
        let mut done = Some(done);
        let tries = Arc::new(AtomicU32::new(0));
        let seen = Arc::clone(&tries);
        supervisor.spawn_restarting("jwks", move || {
            let attempt = seen.fetch_add(1, Ordering::SeqCst);
            let done = (attempt == 2).then(|| done.take()).flatten();
            async move {
                let Some(done) = done else { panic!("on purpose") };
                done.send(()).unwrap();
            }
        });
        finished.await.unwrap();
        assert_eq!(tries.load(Ordering::SeqCst), 3);
        assert_eq!(supervisor.shutdown(Duration::from_secs(1)).await, Ok(()));
    }
}
