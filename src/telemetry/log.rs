//! The process' own log: what happened to the proxy, not to single requests.
//!
//! An error is a field like any other, `error = &error as &dyn Error`, and is written with all its causes, joined by
//! `: `, in both forms. So no caller writes causes out itself.

use std::{
    error::Error,
    fmt,
    io::{self, IsTerminal},
    sync::OnceLock,
};

use serde::ser::{SerializeMap, Serializer};
use tracing::{
    Dispatch, Event, Subscriber, dispatcher,
    field::{Field, Visit},
    level_filters::LevelFilter,
};
use tracing_appender::non_blocking::NonBlocking;
use tracing_subscriber::{
    EnvFilter,
    field::{RecordFields, VisitOutput},
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{DefaultVisitor, Writer},
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

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
    #[expect(dead_code, reason = "held for its Drop, which writes what waits")]
    flushing: Flushing,
}

/// What the one log of this process has lost.
static LOST: OnceLock<Dropped> = OnceLock::new();

/// How many lines of this process' own log were dropped because too many waited or nobody read them.
#[must_use]
pub fn process_lines_dropped() -> usize {
    LOST.get().map_or(0, Dropped::dropped_lines)
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
    // There is no second log, so nobody has set it.
    let _first = LOST.set(dropped);
    Ok(LogGuard { flushing })
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
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(lines);
    if text {
        Dispatch::new(log.with_ansi(colours).with_target(false).fmt_fields(TextFields).finish())
    } else {
        Dispatch::new(log.event_format(JsonLines).finish())
    }
}

/// An error and its causes, outermost first.
struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}

/// The fields of a line of text.
struct TextFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut line = TextLine(DefaultVisitor::new(writer, true));
        fields.record(&mut line);
        line.0.finish()
    }
}

/// As usual, but for errors.
struct TextLine<'a>(DefaultVisitor<'a>);

impl Visit for TextLine<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.record_debug(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.record_str(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        // Causes may quote a peer: what would move a terminal's cursor is written as an escape.
        let mut plain = String::new();
        for letter in Chain(value).to_string().chars() {
            if letter.is_control() {
                plain.extend(letter.escape_default());
            } else {
                plain.push(letter);
            }
        }
        self.0.record_debug(field, &format_args!("{plain}"));
    }
}

/// One object per line: `time`, `level`, the event's own fields, `target`.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let line = json_line(&time, event).map_err(|_error| fmt::Error)?;
        writer.write_str(&line)?;
        writer.write_char('\n')
    }
}

fn json_line(time: &str, event: &Event<'_>) -> Result<String, serde_json::Error> {
    let mut line = Vec::with_capacity(256);
    let mut serializer = serde_json::Serializer::new(&mut line);
    let mut map = serializer.serialize_map(None)?;
    map.serialize_entry("time", time)?;
    map.serialize_entry("level", event.metadata().level().as_str())?;
    let mut members = JsonMembers { map: &mut map, outcome: Ok(()) };
    event.record(&mut members);
    members.outcome?;
    map.serialize_entry("target", event.metadata().target())?;
    map.end()?;
    // What serde_json writes is UTF-8.
    Ok(String::from_utf8(line).unwrap_or_default())
}

/// The fields of an event as members of an object.
struct JsonMembers<'a, M: SerializeMap> {
    map: &'a mut M,
    outcome: Result<(), M::Error>,
}

impl<M: SerializeMap> JsonMembers<'_, M> {
    fn member<T: serde::Serialize + ?Sized>(&mut self, field: &Field, value: &T) {
        if self.outcome.is_ok() {
            let name = field.name();
            let name = name.strip_prefix("r#").unwrap_or(name);
            self.outcome = self.map.serialize_entry(name, value);
        }
    }
}

impl<M: SerializeMap> Visit for JsonMembers<'_, M> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.member(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.member(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.member(field, &Chain(value).to_string());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.member(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.member(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.member(field, &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.member(field, &value);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::telemetry::writer::tests::Paper;

    /// Writes down what this thread logs from `level` on, until the guard is dropped.
    pub(crate) fn overhear(level: &str) -> (Paper, dispatcher::DefaultGuard) {
        let paper = Paper::default();
        let pages = paper.clone();
        let log = tracing_subscriber::fmt().with_env_filter(filter(level).unwrap());
        let log = log.with_ansi(false).fmt_fields(TextFields).with_writer(move || pages.clone());
        let guard = dispatcher::set_default(&Dispatch::new(log.finish()));
        (paper, guard)
    }

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

    #[derive(Debug, thiserror::Error)]
    #[error("no catalog")]
    struct Outer(#[source] Middle);

    #[derive(Debug, thiserror::Error)]
    #[error("control:7070 cannot be reached")]
    struct Middle(#[source] io::Error);

    #[test]
    fn an_error_is_written_with_all_its_causes_in_both_forms() {
        let speak = || {
            let error = Outer(Middle(io::Error::other("name\u{1b}[2J\nnot known")));
            tracing::warn!(error = &error as &dyn Error, attempts = 3, last = true, "not followed");
        };
        let log = written(false, "info", speak);
        let line: serde_json::Value = serde_json::from_str(&log).unwrap();
        let chain = "no catalog: control:7070 cannot be reached: name\u{1b}[2J\nnot known";
        assert_eq!(line["error"], chain, "{log}");
        assert_eq!((&line["attempts"], &line["last"]), (&3.into(), &true.into()), "{log}");
        assert_eq!(line["message"], "not followed", "{log}");
        let order = ["time", "level", "message", "error", "target"];
        let order = order.map(|key| log.find(&format!("\"{key}\":")));
        assert!(order.is_sorted() && order[0].is_some(), "{log}");
        // For people the same, and nothing that moves their cursor.
        let log = written(true, "info", speak);
        let end = r"error=no catalog: control:7070 cannot be reached: name\u{1b}[2J\nnot known";
        assert!(log.contains(end) && log.lines().count() == 1, "{log}");
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
