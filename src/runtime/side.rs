//! The side runtime: where everything lives that may stall.

use tokio::runtime::{Builder, Handle, Runtime};

use crate::runtime::RuntimeError;

/// Threads of the side runtime. Two, so that one task that computes does not hold up the others.
const THREADS: usize = 2;
/// Stack of a side thread. Address space only: pages that are never touched cost nothing.
const STACK_BYTES: usize = 1024 * 1024;
/// Most threads for blocking calls: half of them at most are look-ups of names (`net::Resolver`), which may hang for as
/// long as the system's resolver likes; the others are for files. They come when they are needed and go again.
const BLOCKING_THREADS: usize = 16;

/// The runtime beside the data plane: control client, keys, tokens, files, DNS, admin, log writing.
///
/// Dropping it ends its threads without waiting for blocking calls.
#[derive(Debug)]
pub struct Side(Option<Runtime>);

impl Side {
    /// Starts its threads, named `infrar-side`.
    ///
    /// # Errors
    /// [`RuntimeError::Start`] when the system gives no threads or no event queue.
    pub fn start() -> Result<Self, RuntimeError> {
        Builder::new_multi_thread()
            .worker_threads(THREADS)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_stack_size(STACK_BYTES)
            .thread_name("infrar-side")
            .enable_all()
            .build()
            .map(|runtime| Self(Some(runtime)))
            .map_err(|source| RuntimeError::Start { name: "infrar-side".to_owned(), source })
    }

    /// The way to it from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.runtime().handle().clone()
    }

    /// Runs `future` on the calling thread, with the side runtime driving its sockets and timers.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime().block_on(future)
    }

    #[expect(clippy::expect_used, reason = "only drop takes the runtime out")]
    fn runtime(&self) -> &Runtime {
        self.0.as_ref().expect("the runtime is there until drop")
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
