//! The one who writes: takes what waits, makes one transaction of all renewals and sightings in it and one of each
//! commit, and answers when it is on disk.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rusqlite::Connection;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
    time,
};

use super::{
    fault::fault,
    tables::{self, Outcome, Touch},
};
use crate::store::{
    entry::Write,
    error::{CommitError, StoreError},
    raise,
};

/// Work taken at once.
const BATCH: usize = 256;
/// How long the writer stays for a straggler once the shutdown has begun.
const LINGER: Duration = Duration::from_millis(250);

/// Who has a commit: the writer that begins it, or its author who gives it up. Once taken it stays taken.
#[derive(Clone, Debug, Default)]
pub(super) struct Claim(Arc<AtomicBool>);

impl Claim {
    /// Whether it was free.
    pub(super) fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

pub(super) enum Job {
    Commit {
        expected: u64,
        writes: Vec<Write>,
        note: String,
        claim: Claim,
        answer: oneshot::Sender<Result<u64, CommitError>>,
    },
    Touch {
        touch: Touch,
        answer: oneshot::Sender<Result<(), StoreError>>,
    },
    Close(oneshot::Sender<()>),
}

pub(super) struct Writer {
    pub(super) location: String,
    pub(super) connection: Connection,
    pub(super) lock: File,
    pub(super) queue: mpsc::Receiver<Job>,
    pub(super) kept: u64,
    pub(super) revisions: watch::Sender<u64>,
    pub(super) side: Handle,
}

/// What moves between the task and the threads it works on.
struct Desk {
    location: String,
    connection: Connection,
    kept: u64,
    revisions: watch::Sender<u64>,
}

impl Writer {
    /// Works until the last who could ask is gone, somebody says close, or the shutdown has begun and nobody asks any
    /// more.
    pub(super) async fn work(self, ending: impl Future<Output = ()>) {
        let Self { location, connection, lock, mut queue, kept, revisions, side } = self;
        let mut desk = Desk { location, connection, kept, revisions };
        let mut ending = std::pin::pin!(ending);
        let mut is_ending = false;
        let mut closed = None;
        while closed.is_none() {
            let first = tokio::select! {
                biased;
                job = queue.recv() => job,
                () = &mut ending, if !is_ending => {
                    is_ending = true;
                    continue;
                }
                () = time::sleep(LINGER), if is_ending => None,
            };
            let Some(first) = first else { break };
            let mut batch = vec![first];
            while let Some(job) = (batch.len() < BATCH).then(|| queue.try_recv().ok()).flatten() {
                batch.push(job);
            }
            let worked = side.spawn_blocking(move || {
                let answer = desk.clear(batch);
                (desk, answer)
            });
            match worked.await {
                Ok((back, answer)) => (desk, closed) = (back, answer),
                // It panicked, which the hook has logged, or the runtime is gone: the file is closed either way.
                Err(_) => return,
            }
        }
        queue.close();
        // SQLite writes the journal into the file and removes it. Only then may somebody else come.
        let ended = side.spawn_blocking(move || drop((desk, lock)));
        drop(ended.await);
        // Dropped or sent, it wakes who waits for it.
        drop(closed);
    }
}

impl Desk {
    /// Does all of `batch`, and hands back whom to tell once the file is closed.
    fn clear(&mut self, batch: Vec<Job>) -> Option<oneshot::Sender<()>> {
        let mut closing = None;
        let mut touches = Vec::new();
        let mut commits = Vec::new();
        for job in batch {
            match job {
                Job::Touch { touch, answer } => touches.push((touch, answer)),
                Job::Commit { expected, writes, note, claim, answer } => {
                    commits.push((expected, writes, note, claim, answer));
                }
                Job::Close(answer) => closing = Some(answer),
            }
        }
        // Whoever asked for both waited for the one before the other, so their order here is free.
        if !touches.is_empty() {
            self.touch(touches);
        }
        for (expected, writes, note, claim, answer) in commits {
            if claim.take() {
                let outcome = self.commit(expected, &writes, &note);
                // Nobody listens any more; it is written all the same.
                drop(answer.send(outcome));
            }
        }
        closing
    }

    fn touch(&mut self, touches: Vec<(Touch, oneshot::Sender<Result<(), StoreError>>)>) {
        let outcome = tables::touch(&mut self.connection, touches.iter().map(|(touch, _)| touch));
        for (_, answer) in touches {
            let outcome = match &outcome {
                Ok(()) => Ok(()),
                Err(error) => Err(fault(&self.location, error)),
            };
            drop(answer.send(outcome));
        }
    }

    fn commit(&mut self, expected: u64, writes: &[Write], note: &str) -> Result<u64, CommitError> {
        match tables::commit(&mut self.connection, expected, writes, note, self.kept) {
            Ok(Outcome::Made(revision)) => {
                raise(&self.revisions, revision);
                Ok(revision)
            }
            Ok(Outcome::Conflict(revision)) => Err(CommitError::Conflict { revision }),
            Err(error) => Err(fault(&self.location, &error).into()),
        }
    }
}
