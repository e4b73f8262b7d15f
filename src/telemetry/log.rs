//! The process' own log: what happened to the proxy, not to single requests.

use std::io::{self, IsTerminal};

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Text on a terminal, else JSON.
    #[default]
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Format {
    pub(super) fn is_text(self, terminal: bool) -> bool {
        match self {
            Self::Auto => terminal,
            Self::Text => true,
            Self::Json => false,
        }
    }
}

/// Why the log did not start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level cannot be read.
    #[error("{0:?} is no log level; write error, warn, info, debug or trace")]
    Level(String),
    /// Another log runs already.
    #[error("a log runs in this process already")]
    Running,
}

/// Writes what still waits when it is dropped.
#[derive(Debug)]
pub struct LogGuard {
    #[expect(dead_code, reason = "held for its Drop, which writes what waits")]
    worker: WorkerGuard,
    dropped: ErrorCounter,
}

impl LogGuard {
    /// Counts the lines that were dropped because too many waited.
    #[must_use]
    pub fn dropped(&self) -> ErrorCounter {
        self.dropped.clone()
    }
}

/// Starts the log on standard error. `level` is a level, or directives such as `info,infrar::proxy=debug`.
///
/// # Errors
/// [`LogError`].
pub fn start(format: Format, level: &str) -> Result<LogGuard, LogError> {
    let filter =
        EnvFilter::builder().parse(level).map_err(|_source| LogError::Level(level.to_owned()))?;
    let terminal = io::stderr().is_terminal();
    let (writer, worker) =
        NonBlockingBuilder::default().lossy(true).thread_name("infrar-log").finish(io::stderr());
    let dropped = writer.error_counter();
    let registry = tracing_subscriber::registry().with(filter);
    let started = if format.is_text(terminal) {
        let lines = fmt::layer().with_writer(writer).with_ansi(terminal).with_target(false);
        registry.with(lines).try_init()
    } else {
        registry.with(fmt::layer().json().flatten_event(true).with_writer(writer)).try_init()
    };
    started.map_err(|_source| LogError::Running)?;
    Ok(LogGuard { worker, dropped })
}
