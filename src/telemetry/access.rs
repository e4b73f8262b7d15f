//! One line per request.

use std::{
    cell::RefCell,
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;
use tracing_appender::non_blocking::NonBlocking;

use crate::telemetry::{
    cells::Direction,
    log::Format,
    writer::{self, Dropped, Flushing},
};

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
    time: Timestamp,
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
pub struct AccessLog(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Tells logs apart; an address could be used again.
    id: u64,
    lines: NonBlocking,
    text: bool,
    dropped: Dropped,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// A thread's own way into the queue of the log it used last. Queueing needs a handle of one's own, and to clone one
/// for each line would have all workers count in the same cache line.
struct Seat {
    id: u64,
    lines: NonBlocking,
    line: Vec<u8>,
}

thread_local! {
    static SEAT: RefCell<Option<Seat>> = const { RefCell::new(None) };
}

impl AccessLog {
    /// Lines on standard output.
    pub fn stdout(format: Format) -> (Self, Flushing) {
        let text = format.is_text(io::stdout().is_terminal());
        Self::open(io::stdout(), text)
    }

    /// Lines to a writer, which is taken to be no terminal.
    pub fn to<W: Write + Send + 'static>(writer: W, format: Format) -> (Self, Flushing) {
        Self::open(writer, format.is_text(false))
    }

    fn open<W: Write + Send + 'static>(writer: W, text: bool) -> (Self, Flushing) {
        let (lines, dropped, flushing) = writer::open(writer, WAITING, "infrar-access");
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        (Self(Arc::new(Shared { id, lines, text, dropped })), flushing)
    }

    /// Counts the lines that were dropped because too many waited or nobody read them.
    #[must_use]
    pub fn dropped(&self) -> Dropped {
        self.0.dropped.clone()
    }

    /// Writes a line, or drops it when too many wait.
    pub fn record(&self, entry: &Entry<'_>) {
        let shared = &*self.0;
        let written = SEAT.try_with(|seat| {
            let mut seat = seat.borrow_mut();
            let seat = match &mut *seat {
                Some(seat) if seat.id == shared.id => seat,
                other => other.insert(Seat {
                    id: shared.id,
                    lines: shared.lines.clone(),
                    line: Vec::with_capacity(512),
                }),
            };
            seat.line.clear();
            if shared.text { text(&mut seat.line, entry) } else { json(&mut seat.line, entry) }?;
            seat.lines.write_all(&seat.line)
        });
        // A thread that ends has no seat any more. Nothing else fails: memory takes every line, the queue counts its own.
        if !matches!(written, Ok(Ok(()))) {
            tracing::trace!("an access log line was lost");
        }
    }
}

fn json(to: &mut Vec<u8>, entry: &Entry<'_>) -> io::Result<()> {
    let line = Line {
        time: entry.time,
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
    serde_json::to_writer(&mut *to, &line)?;
    to.push(b'\n');
    Ok(())
}

fn text(to: &mut Vec<u8>, entry: &Entry<'_>) -> io::Result<()> {
    let arrow = match entry.direction {
        Direction::Outbound => "→",
        Direction::Inbound => "←",
    };
    let caller = if entry.caller.is_empty() { "?" } else { entry.caller };
    let callee = if entry.callee.is_empty() { "?" } else { entry.callee };
    // A caller's name comes from its token and a path from the wire: neither may begin a line of its own.
    writeln!(
        to,
        "{:.3} {arrow} {} → {callee} {} {} {} {} {:.1} ms {} B {}",
        entry.time,
        caller.escape_debug(),
        entry.method,
        entry.path.escape_debug(),
        entry.status,
        if entry.code.is_empty() { "-" } else { entry.code },
        millis(entry.duration),
        entry.bytes_out,
        if entry.endpoint.is_empty() { "-" } else { entry.endpoint },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::writer::tests::Paper;

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
        let (log, flushing) = AccessLog::to(paper.clone(), Format::Auto);
        log.record(&entry());
        drop((log, flushing));
        let written = paper.text();
        let line: serde_json::Value = serde_json::from_str(written.trim_end()).unwrap();
        assert_eq!(line["path"], "/que\"ry");
        assert_eq!(line["duration_ms"], 1.5);
        assert_eq!(line["bytes_out"], 5);
        assert_eq!(written.lines().count(), 1);
    }

    #[test]
    fn people_get_a_line_they_can_read() {
        let paper = Paper::default();
        let (log, flushing) = AccessLog::to(paper.clone(), Format::Text);
        log.record(&entry());
        drop((log, flushing));
        let written = paper.text();
        assert!(
            written.contains("web → data POST /que\\\"ry 200 - 1.5 ms 5 B azure-eastus"),
            "{written}"
        );
    }

    #[test]
    fn a_caller_cannot_forge_a_line() {
        for format in [Format::Text, Format::Json] {
            let paper = Paper::default();
            let (log, flushing) = AccessLog::to(paper.clone(), format);
            log.record(&Entry { caller: "web\n1970 forged", path: "/\r\n\u{1b}[2J", ..entry() });
            drop((log, flushing));
            let written = paper.text();
            assert_eq!(written.lines().count(), 1, "{written}");
            assert!(!written.trim_end().contains(char::is_control), "{written}");
        }
    }

    #[test]
    fn one_thread_may_write_two_logs_in_turn_and_two_threads_one() {
        let (ours, theirs) = (Paper::default(), Paper::default());
        let (first, first_flushing) = AccessLog::to(ours.clone(), Format::Json);
        let (second, second_flushing) = AccessLog::to(theirs.clone(), Format::Json);
        for _ in 0..3 {
            first.record(&entry());
            second.record(&entry());
        }
        let same = first.clone();
        std::thread::spawn(move || same.record(&entry())).join().unwrap();
        drop((first_flushing, second_flushing));
        assert_eq!((ours.text().lines().count(), theirs.text().lines().count()), (4, 3));
        assert_eq!(first.dropped().dropped_lines(), 0);
    }
}
