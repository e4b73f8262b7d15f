//! Lines on their way out: a bounded queue, a thread that writes, and a count of what was dropped.
//!
//! Full queue: the newest line is dropped. Whoever logs is serving somebody and must not wait for a terminal.

use std::{
    fmt,
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

/// Bytes gathered before a write; whatever is there is written as soon as the queue is empty.
const BUFFER_BYTES: usize = 64 * 1024;
/// Longest wait for the last lines when the process ends.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Opens a queue of at most `lines` lines in front of `writer`, emptied by a thread of this name.
pub(super) fn open<W>(
    writer: W,
    lines: usize,
    thread: &'static str,
) -> (NonBlocking, Dropped, Flushing)
where
    W: Write + Send + 'static,
{
    let failed = Arc::new(AtomicUsize::new(0));
    let tolerant = Tolerant::new(writer, Arc::clone(&failed));
    let (queue, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(lines)
        .thread_name(thread)
        .finish(tolerant);
    let dropped = Dropped { refused: queue.error_counter(), failed };
    (queue, dropped, Flushing(Some(guard)))
}

/// How many lines of one log were lost, because the queue was full or the reader gone.
#[derive(Clone, Debug)]
pub struct Dropped {
    refused: ErrorCounter,
    failed: Arc<AtomicUsize>,
}

impl Dropped {
    /// The count so far.
    #[must_use]
    pub fn dropped_lines(&self) -> usize {
        self.refused.dropped_lines().saturating_add(self.failed.load(Ordering::Relaxed))
    }
}

/// Writes out what is queued when it is dropped, and waits for that two seconds at most: a reader that stands still
/// must not keep the process from ending.
#[must_use = "dropping it ends the log"]
pub struct Flushing(Option<WorkerGuard>);

impl fmt::Debug for Flushing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Flushing").finish()
    }
}

impl Drop for Flushing {
    fn drop(&mut self) {
        let Some(guard) = self.0.take() else { return };
        let (flushed, done) = mpsc::sync_channel(1);
        // The guard prints to stdout when the queue stays full, which waits for the very reader that stands still,
        // or panics when it is gone. So it is dropped aside. No thread to be had: then nothing is left to save.
        let aside = thread::Builder::new().name("infrar-flush".to_owned()).spawn(move || {
            drop(guard);
            flushed.send(()).ok();
        });
        if aside.is_ok() {
            done.recv_timeout(FLUSH_LIMIT).ok();
        }
    }
}

/// A writer that counts the lines it could not write instead of reporting them: a broken pipe is no reason to stop.
struct Tolerant<W> {
    writer: W,
    /// Whole lines, but for the first: of that a part may have been written.
    waiting: Vec<u8>,
    /// How many lines those are.
    lines: usize,
    failed: Arc<AtomicUsize>,
}

impl<W: Write> Tolerant<W> {
    fn new(writer: W, failed: Arc<AtomicUsize>) -> Self {
        Self { writer, waiting: Vec::with_capacity(BUFFER_BYTES), lines: 0, failed }
    }

    /// Writes what waits. Of what cannot be written now the rest stays and is tried again with the next line, unless the
    /// reader is gone for good: then every line of it is lost.
    fn write_out(&mut self) {
        let mut written = 0;
        let outcome = loop {
            let rest = self.waiting.get(written..).unwrap_or_default();
            if rest.is_empty() {
                break Ok(());
            }
            match self.writer.write(rest) {
                Ok(0) => break Err(io::ErrorKind::WriteZero),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error.kind()),
            }
        };
        self.waiting.drain(..written.min(self.waiting.len()));
        match outcome {
            Ok(()) => {
                self.lines = 0;
                self.writer.flush().ok();
            }
            Err(io::ErrorKind::BrokenPipe) => {
                self.failed.fetch_add(self.lines, Ordering::Relaxed);
                self.lines = 0;
                self.waiting.clear();
            }
            Err(_for_now) => {}
        }
    }

    fn has_room(&self, line: &[u8]) -> bool {
        self.waiting.is_empty() || self.waiting.len() + line.len() <= BUFFER_BYTES
    }
}

impl<W: Write> Write for Tolerant<W> {
    /// Takes one line, whole or not at all.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.has_room(line) {
            self.write_out();
        }
        if self.has_room(line) {
            self.waiting.extend_from_slice(line);
            self.lines += 1;
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        if self.waiting.len() > BUFFER_BYTES {
            self.write_out();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_out();
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{
        Mutex,
        mpsc::{Receiver, SyncSender},
    };

    use super::*;

    /// Keeps what is written on it.
    #[derive(Clone, Default)]
    pub(crate) struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Paper {
        pub(crate) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A reader that is gone.
    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A reader that tells when it is written to, and stands still until its other end is dropped.
    struct Still {
        reached: SyncSender<()>,
        released: Receiver<()>,
    }

    impl Write for Still {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.reached.try_send(()).ok();
            self.released.recv().ok();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_to_a_reader_that_is_gone_are_counted_as_soon_as_they_are_written() {
        let (mut queue, dropped, flushing) = open(Gone, 64, "test");
        for _ in 0..3 {
            queue.write_all(b"line\n").unwrap();
        }
        drop(flushing);
        assert_eq!(dropped.dropped_lines(), 3);
    }

    /// A disk that is full for the first `0` writes.
    struct Full(usize, Paper);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some(left) = self.0.checked_sub(1) {
                self.0 = left;
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_cannot_be_written_for_now_is_tried_again() {
        let paper = Paper::default();
        let failed = Arc::new(AtomicUsize::new(0));
        let mut tolerant = Tolerant::new(Full(1, paper.clone()), Arc::clone(&failed));
        tolerant.write_all(b"one\n").unwrap();
        tolerant.flush().unwrap();
        assert_eq!(paper.text(), "");
        tolerant.write_all(b"two\n").unwrap();
        tolerant.flush().unwrap();
        assert_eq!((paper.text().as_str(), failed.load(Ordering::Relaxed)), ("one\ntwo\n", 0));
    }

    #[test]
    fn a_reader_that_stands_still_costs_lines_and_neither_the_writer_nor_the_end_waits_for_it() {
        let (reached, at_work) = mpsc::sync_channel(1);
        let (release, released) = mpsc::sync_channel(0);
        let (mut queue, dropped, flushing) = open(Still { reached, released }, 2, "test");
        // Larger than the buffer, so it is written at once; then the queue takes two and no more.
        queue.write_all(&[b'x'; BUFFER_BYTES + 1]).unwrap();
        at_work.recv().unwrap();
        for _ in 0..5 {
            queue.write_all(b"line\n").unwrap();
        }
        assert_eq!(dropped.dropped_lines(), 3);
        // Returns although nobody reads: that it does is the test.
        drop(flushing);
        drop(release);
    }
}
