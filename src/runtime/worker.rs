//! The data plane's threads: one single-threaded runtime each, tasks that never change thread.

use std::{
    fmt,
    future::{Future, poll_fn},
    io,
    num::NonZeroUsize,
    panic::AssertUnwindSafe,
    pin::Pin,
    task::Poll,
    thread,
};

use futures_util::FutureExt;
use rustix::process::{Resource, getrlimit};
use tokio::{
    runtime::{Builder, LocalOptions, LocalRuntime},
    sync::oneshot,
    task::JoinHandle,
};

use super::panics::caught;

/// Stack of a worker thread: room for deep futures; untouched pages cost nothing.
const STACK_BYTES: usize = 2 * 1024 * 1024;

/// So many tasks run before the sockets, and what other threads ask for, are looked at again.
const EVENT_INTERVAL: u32 = 255;

/// Why a runtime or one of its threads could not live.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The system gave no thread or no event queue.
    #[error("cannot start the thread {name}")]
    Start {
        /// The thread's name.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The worker's own future panicked (not one of its tasks: those are caught).
    #[error("worker {worker} ended in a panic")]
    Panicked {
        /// Which.
        worker: WorkerId,
    },
}

/// Which worker: counts from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(usize);

impl WorkerId {
    /// The worker with this index.
    #[must_use]
    pub const fn new(index: usize) -> Self {
        Self(index)
    }

    /// Its place in lists that have one entry per worker.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.0)
    }
}

/// The running worker threads.
#[derive(Debug)]
pub struct Workers {
    ends: Vec<(WorkerId, oneshot::Receiver<()>)>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads named `NAME-w0`, `NAME-w1` …; each calls `build` on itself and runs what it returns, so
    /// nothing in that future needs to be `Send`. The thread ends when its future does; tasks still there are
    /// dropped. A worker has no threads for blocking calls: those belong to the side runtime.
    ///
    /// # Errors
    /// [`RuntimeError::Start`]; threads already started end as if their future had ended.
    pub fn start<B, F>(count: NonZeroUsize, name: &str, build: B) -> Result<Self, RuntimeError>
    where
        B: Fn(WorkerId) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        let mut workers = Self { ends: Vec::new(), threads: Vec::new() };
        for index in 0..count.get() {
            let worker = WorkerId(index);
            let thread_name = format!("{name}-{worker}");
            let build = build.clone();
            let (ended, end) = oneshot::channel();
            let (ready, started) = std::sync::mpsc::sync_channel(1);
            let failed = |source| RuntimeError::Start { name: thread_name.clone(), source };
            let thread = thread::Builder::new()
                .name(thread_name.clone())
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    // The runtime belongs to the thread that made it, so it is made here.
                    let runtime = match local_runtime() {
                        Ok(runtime) => runtime,
                        Err(source) => return drop(ready.send(Err(source))),
                    };
                    drop(ready.send(Ok(())));
                    run(&runtime, worker, build, ended);
                })
                .map_err(failed)?;
            started.recv().unwrap_or_else(|gone| Err(io::Error::other(gone))).map_err(failed)?;
            workers.threads.push(thread);
            workers.ends.push((worker, end));
        }
        Ok(workers)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Ends when a worker has, which one that is watched in this way was not told to; says which, and how. Cancel-safe.
    ///
    /// # Errors
    /// [`RuntimeError::Panicked`] when its own future panicked.
    pub async fn lost(&mut self) -> Result<WorkerId, RuntimeError> {
        poll_fn(|cx| {
            let ended = self.ends.iter_mut().enumerate().find_map(|(index, (_, end))| {
                match Pin::new(end).poll(cx) {
                    Poll::Ready(end) => Some((index, end)),
                    Poll::Pending => None,
                }
            });
            let Some((index, end)) = ended else { return Poll::Pending };
            // Asked once more it would panic.
            let (worker, _end) = self.ends.swap_remove(index);
            Poll::Ready(end.map(|()| worker).map_err(|_gone| RuntimeError::Panicked { worker }))
        })
        .await
    }

    /// Waits until all have ended by themselves.
    ///
    /// # Errors
    /// [`RuntimeError::Panicked`] with the first whose own future panicked.
    pub async fn join(self) -> Result<(), RuntimeError> {
        let mut verdict = Ok(());
        for (worker, end) in self.ends {
            if end.await.is_err() && verdict.is_ok() {
                verdict = Err(RuntimeError::Panicked { worker });
            }
        }
        verdict
    }
}

fn local_runtime() -> io::Result<LocalRuntime> {
    Builder::new_current_thread()
        .enable_all()
        // A worker has hundreds of short tasks ready at once; looking at the sockets after every 61 of them, as is the
        // rule, would cut the batches that make reading and writing cheap.
        .event_interval(EVENT_INTERVAL)
        .global_queue_interval(EVENT_INTERVAL)
        .max_blocking_threads(1)
        .build_local(LocalOptions::default())
}

/// Tells `ended` when the worker's future has ended of itself; lets it drop untold when it panicked.
fn run<B, F>(runtime: &LocalRuntime, worker: WorkerId, build: B, ended: oneshot::Sender<()>)
where
    B: Fn(WorkerId) -> F,
    F: Future<Output = ()> + 'static,
{
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async move { build(worker).await });
    }));
    if outcome.is_ok() {
        // Nobody listens when the owner did not join; that is its right.
        ended.send(()).ok();
    } else {
        caught("worker");
    }
}

/// Starts a task on the worker whose thread this is. A panic in it is logged and counted; the worker lives on, and so
/// do its other tasks.
///
/// # Panics
/// When the calling thread is no worker (and has no other local runtime).
#[expect(clippy::disallowed_methods, reason = "the one place where local tasks are born")]
pub fn spawn_local<F>(name: &'static str, future: F) -> JoinHandle<()>
where
    F: Future<Output = ()> + 'static,
{
    // Combinators, not an async block: that would keep room for the future twice.
    tokio::task::spawn_local(AssertUnwindSafe(future).catch_unwind().map(move |outcome| {
        if outcome.is_err() {
            caught(name);
        }
    }))
}

/// CPUs this container may use: affinity and the cgroup's quota count, and there is always one.
#[must_use]
pub fn cpus() -> NonZeroUsize {
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// How many files and sockets this process may have open at a time.
#[must_use]
pub fn open_files() -> usize {
    // No limit at all is `None`.
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use tokio::sync::mpsc;

    use super::*;
    use crate::runtime::panics;

    #[tokio::test]
    async fn each_worker_runs_its_own_future_on_its_own_named_thread() {
        let (told, mut names) = mpsc::channel(4);
        let workers = Workers::start(NonZeroUsize::new(2).unwrap(), "infrar", move |worker| {
            let told = told.clone();
            let not_send = Rc::new(Cell::new(0));
            async move {
                let inner = Rc::clone(&not_send);
                spawn_local("test", async move { inner.set(1) }).await.unwrap();
                assert_eq!(not_send.get(), 1);
                let name = thread::current().name().unwrap().to_owned();
                told.send((worker.index(), name)).await.unwrap();
            }
        })
        .unwrap();
        assert_eq!(workers.count(), 2);
        workers.join().await.unwrap();
        let mut seen = vec![names.recv().await.unwrap(), names.recv().await.unwrap()];
        seen.sort();
        assert_eq!(seen, [(0, "infrar-w0".to_owned()), (1, "infrar-w1".to_owned())]);
    }

    #[tokio::test(flavor = "local")]
    async fn a_panic_in_a_task_is_counted_and_the_next_task_runs() {
        let before = panics();
        spawn_local("test", async { panic!("on purpose") }).await.unwrap();
        assert!(panics() > before);
        let ran = Rc::new(Cell::new(false));
        let flag = Rc::clone(&ran);
        spawn_local("test", async move { flag.set(true) }).await.unwrap();
        assert!(ran.get());
    }

    #[tokio::test]
    async fn a_worker_whose_own_future_panics_is_reported() {
        let workers = Workers::start(NonZeroUsize::MIN, "infrar", |_worker| async {
            panic!("on purpose");
        })
        .unwrap();
        assert!(matches!(workers.join().await, Err(RuntimeError::Panicked { .. })));
    }

    #[tokio::test]
    async fn a_worker_that_ends_before_the_others_is_noticed_at_once() {
        let (end, _) = tokio::sync::broadcast::channel::<()>(1);
        let ends = end.clone();
        let mut workers =
            Workers::start(NonZeroUsize::new(3).unwrap(), "infrar", move |worker: WorkerId| {
                let mut told = ends.subscribe();
                async move {
                    match worker.index() {
                        0 => drop(told.recv().await),
                        1 => {}
                        _ => panic!("on purpose"),
                    }
                }
            })
            .unwrap();
        let (first, second) = (workers.lost().await, workers.lost().await);
        let ended = |it: &Result<WorkerId, RuntimeError>| matches!(it, Ok(WorkerId(1)));
        assert!(ended(&first) != ended(&second), "{first:?} {second:?}");
        assert!(first.is_err() != second.is_err(), "{first:?} {second:?}");
        assert!(workers.lost().now_or_never().is_none());
        end.send(()).unwrap();
        workers.join().await.unwrap();
    }

    #[test]
    fn there_is_always_a_cpu() {
        assert!(cpus().get() >= 1);
    }
}
