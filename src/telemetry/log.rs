//! The process' own log: what happened to the proxy, not to single requests.

use std::io::{self, IsTerminal};

use tracing::{Dispatch, dispatcher, level_filters::LevelFilter};
use tracing_appender::non_blocking::NonBlocking;
use tracing_subscriber::{EnvFilter, fmt};

use crate::telemetry::writer::{self, Dropped, Flushing};

/// Lines that may wait. There are few of these.
const WAITING: usize = 1024;

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
    #[error("{0:?} is no log level; write off, error, warn, info, debug or trace")]
    Level(String),
    /// Another log runs already.
    #[error("a log runs in this process already")]
    Running,
}

/// Writes what still waits when it is dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the log"]
pub struct LogGuard {
    dropped: Dropped,
    #[expect(dead_code, reason = "held for its Drop, which writes what waits")]
    flushing: Flushing,
}

impl LogGuard {
    /// Counts the lines that were dropped because too many waited or nobody read them.
    #[must_use]
    pub fn dropped(&self) -> Dropped {
        self.dropped.clone()
    }
}

/// Starts the log on standard error. `level` is a level, or directives such as `info,infrar::proxy=debug`; empty means
/// `info`.
///
/// # Errors
/// [`LogError`].
pub fn start(format: Format, level: &str) -> Result<LogGuard, LogError> {
    let filter = filter(level)?;
    let terminal = io::stderr().is_terminal();
    let (lines, dropped, flushing) = writer::open(io::stderr(), WAITING, "infrar-log");
    let subscriber = subscriber(format.is_text(terminal), terminal, filter, lines);
    dispatcher::set_global_default(subscriber).map_err(|_source| LogError::Running)?;
    Ok(LogGuard { dropped, flushing })
}

fn filter(level: &str) -> Result<EnvFilter, LogError> {
    // A bare word that is no level would be taken for the name of a target, and silence everything else.
    let bare = !level.is_empty() && !level.contains(['=', ',']);
    if bare && level.parse::<LevelFilter>().is_err() {
        return Err(LogError::Level(level.to_owned()));
    }
    EnvFilter::builder()
        // Else a value in a directive is an expression, run for every span.
        .with_regex(false)
        // Else an empty level would mean: errors only.
        .with_default_directive(LevelFilter::INFO.into())
        .parse(level)
        .map_err(|_source| LogError::Level(level.to_owned()))
}

fn subscriber(text: bool, colours: bool, filter: EnvFilter, lines: NonBlocking) -> Dispatch {
    let log = fmt().with_env_filter(filter).with_writer(lines);
    if text {
        Dispatch::new(log.with_ansi(colours).with_target(false).finish())
    } else {
        Dispatch::new(log.json().flatten_event(true).finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::writer::tests::Paper;

    /// What is written while `speak` runs.
    fn written(text: bool, level: &str, speak: impl FnOnce()) -> String {
        let paper = Paper::default();
        let (lines, _dropped, flushing) = writer::open(paper.clone(), WAITING, "test");
        let subscriber = subscriber(text, false, filter(level).unwrap(), lines);
        dispatcher::with_default(&subscriber, speak);
        drop(flushing);
        paper.text()
    }

    #[test]
    fn an_event_is_one_object_per_line() {
        let log = written(false, "info", || {
            tracing::info!(service = "reports", "two\nlines");
            tracing::debug!("below the level");
        });
        let lines: Vec<serde_json::Value> =
            log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 1, "{log}");
        assert_eq!(lines[0]["message"], "two\nlines");
        assert_eq!(lines[0]["service"], "reports");
        assert_eq!(lines[0]["level"], "INFO");
    }

    #[test]
    fn people_get_text_without_colours_where_there_is_no_terminal() {
        let log = written(true, "warn", || tracing::warn!(port = 15001, "in use"));
        assert!(log.trim_end().ends_with("WARN in use port=15001"), "{log}");
        assert!(!log.contains('\u{1b}'), "{log}");
    }

    #[test]
    fn an_empty_level_is_info_and_a_directive_opens_one_target() {
        let speak = || {
            tracing::info!("one");
            tracing::debug!(target: "infrar::proxy", "two");
        };
        assert_eq!(written(true, "", speak).lines().count(), 1);
        assert_eq!(written(true, "error,infrar::proxy=debug", speak).lines().count(), 1);
        assert_eq!(written(true, "debug", speak).lines().count(), 2);
    }

    #[test]
    fn a_level_nobody_knows_is_refused_with_what_was_written() {
        // A misspelt level alone would else pass for a target.
        for wrong in ["infrar=loud", "infos"] {
            let error = filter(wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{wrong:?} is no log level")), "{error}");
        }
    }

    #[test]
    fn auto_is_text_on_a_terminal_and_json_elsewhere() {
        assert!(Format::Auto.is_text(true) && !Format::Auto.is_text(false));
        assert!(Format::Text.is_text(false) && !Format::Json.is_text(true));
    }
}
