//! One line per request.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

use crate::telemetry::{cells::Direction, log::Format};

/// Lines that may wait to be written; a million requests a second fill it in a few hundredths of one.
const WAITING: usize = 32_768;

/// What is known of a request when it is over.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// When its head was there.
    pub time: Timestamp,
    /// Which way it went.
    pub direction: Direction,
    /// Who called; empty when nobody showed.
    pub caller: &'a str,
    /// Whom; empty when nobody was found.
    pub callee: &'a str,
    /// The endpoint of the last attempt.
    pub endpoint: &'a str,
    /// How it was reached.
    pub mode: &'a str,
    /// The method.
    pub method: &'a str,
    /// The path without its query, which may hold secrets.
    pub path: &'a str,
    /// The status of the answer.
    pub status: u16,
    /// The problem code, where infrar answered itself.
    pub code: &'a str,
    /// How often it was sent.
    pub attempts: u32,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the answer's body.
    pub bytes_out: u64,
    /// From head to last byte.
    pub duration: Duration,
    /// Of that, the time spent on the endpoint.
    pub upstream_duration: Duration,
    /// The trace it belongs to.
    pub trace_id: &'a str,
    /// Its `x-request-id`.
    pub request_id: &'a str,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    direction: &'static str,
    caller: &'a str,
    callee: &'a str,
    endpoint: &'a str,
    mode: &'a str,
    method: &'a str,
    path: &'a str,
    status: u16,
    code: &'a str,
    attempts: u32,
    bytes_in: u64,
    bytes_out: u64,
    duration_ms: f64,
    upstream_ms: f64,
    trace_id: &'a str,
    request_id: &'a str,
}

fn millis(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}

/// Writes a line per request on a thread of its own; drops lines rather than wait.
#[derive(Clone, Debug)]
pub struct AccessLog {
    writer: NonBlocking,
    text: bool,
}

/// Writes what still waits when it is dropped.
#[derive(Debug)]
pub struct Flushing(
    #[expect(dead_code, reason = "held for its Drop, which writes what waits")] WorkerGuard,
);

impl AccessLog {
    /// Lines on standard output.
    #[must_use]
    pub fn stdout(format: Format) -> (Self, Flushing) {
        let text = format.is_text(io::stdout().is_terminal());
        Self::to(io::stdout(), text)
    }

    /// Lines to a writer; as text for people or as JSON.
    pub fn to<W: Write + Send + 'static>(writer: W, text: bool) -> (Self, Flushing) {
        let (writer, guard) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(WAITING)
            .thread_name("infrar-access")
            .finish(writer);
        (Self { writer, text }, Flushing(guard))
    }

    /// Counts the lines that were dropped.
    #[must_use]
    pub fn dropped(&self) -> ErrorCounter {
        self.writer.error_counter()
    }

    /// Writes a line, or drops it when too many wait.
    pub fn record(&self, entry: &Entry<'_>) {
        let line = if self.text { text(entry) } else { json(entry) };
        // Each write is one message to the writing thread; it fails only when that thread is gone.
        if self.writer.clone().write_all(line.as_bytes()).is_err() {
            tracing::trace!("an access log line was lost");
        }
    }
}

fn json(entry: &Entry<'_>) -> String {
    let line = Line {
        time: entry.time.to_string(),
        direction: entry.direction.as_str(),
        caller: entry.caller,
        callee: entry.callee,
        endpoint: entry.endpoint,
        mode: entry.mode,
        method: entry.method,
        path: entry.path,
        status: entry.status,
        code: entry.code,
        attempts: entry.attempts,
        bytes_in: entry.bytes_in,
        bytes_out: entry.bytes_out,
        duration_ms: millis(entry.duration),
        upstream_ms: millis(entry.upstream_duration),
        trace_id: entry.trace_id,
        request_id: entry.request_id,
    };
    let mut text = serde_json::to_string(&line).unwrap_or_default();
    text.push('\n');
    text
}

fn text(entry: &Entry<'_>) -> String {
    let mut line = String::with_capacity(160);
    let arrow = match entry.direction {
        Direction::Outbound => "→",
        Direction::Inbound => "←",
    };
    let caller = if entry.caller.is_empty() { "?" } else { entry.caller };
    let callee = if entry.callee.is_empty() { "?" } else { entry.callee };
    // Writing to a string does not fail.
    let _infallible = writeln!(
        line,
        "{:.3} {arrow} {caller} → {callee} {} {} {} {} {:.1} ms {} B {}",
        entry.time,
        entry.method,
        entry.path.escape_debug(),
        entry.status,
        if entry.code.is_empty() { "-" } else { entry.code },
        millis(entry.duration),
        entry.bytes_out,
        if entry.endpoint.is_empty() { "-" } else { entry.endpoint },
    );
    line
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn entry() -> Entry<'static> {
        Entry {
            time: Timestamp::UNIX_EPOCH,
            direction: Direction::Outbound,
            caller: "web",
            callee: "data",
            endpoint: "azure-eastus",
            mode: "public",
            method: "POST",
            path: "/que\"ry",
            status: 200,
            code: "",
            attempts: 1,
            bytes_in: 3,
            bytes_out: 5,
            duration: Duration::from_micros(1500),
            upstream_duration: Duration::from_micros(1400),
            trace_id: "0af7651916cd43dd8448eb211c80319c",
            request_id: "7",
        }
    }

    #[test]
    fn a_request_is_one_line_of_json() {
        let paper = Paper::default();
        let (log, flushing) = AccessLog::to(paper.clone(), false);
        log.record(&entry());
        drop((log, flushing));
        let written = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        let line: serde_json::Value = serde_json::from_str(written.trim_end()).unwrap();
        assert_eq!(line["path"], "/que\"ry");
        assert_eq!(line["duration_ms"], 1.5);
        assert_eq!(line["bytes_out"], 5);
        assert_eq!(written.lines().count(), 1);
    }

    #[test]
    fn people_get_a_line_they_can_read() {
        let paper = Paper::default();
        let (log, flushing) = AccessLog::to(paper.clone(), true);
        log.record(&entry());
        drop((log, flushing));
        let written = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        assert!(
            written.contains("web → data POST /que\\\"ry 200 - 1.5 ms 5 B azure-eastus"),
            "{written}"
        );
    }
}
