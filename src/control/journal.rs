//! What watchers are told: the last changes, each written once as the bytes that every watcher gets.

use std::{
    collections::VecDeque,
    sync::{PoisonError, RwLock},
};

use bytes::Bytes;

use crate::api::{Change, Standing};

/// How many changes are kept for those who fall behind.
const CHANGES: usize = 4096;
/// How many bytes of them.
const BYTES: usize = 16 * 1024 * 1024;
/// A change that is larger is told as "fetch the catalog"; a client takes no event beyond 64 KiB, a line none beyond 8.
const LARGEST: usize = 32 * 1024;
/// The longest line of an event, which clients bound too.
const LINE: usize = 7 * 1024;

/// The changes that can still be told.
#[derive(Debug, Default)]
pub(super) struct Journal {
    told: RwLock<Told>,
}

#[derive(Debug, Default)]
struct Told {
    /// Of consecutive revisions.
    frames: VecDeque<(u64, Bytes)>,
    bytes: usize,
}

impl Journal {
    /// Notes the change that leads to its revision. One that does not follow on the last makes all before it untold.
    pub(super) fn tell(&self, change: &Change) {
        let frame = frame(change);
        let mut told = self.told.write().unwrap_or_else(PoisonError::into_inner);
        if told.frames.back().is_some_and(|(last, _)| last + 1 != change.revision) {
            *told = Told::default();
        }
        told.bytes += frame.len();
        told.frames.push_back((change.revision, frame));
        while told.frames.len() > CHANGES || told.bytes > BYTES {
            let Some((_, oldest)) = told.frames.pop_front() else { break };
            told.bytes -= oldest.len();
        }
    }

    /// Forgets everything: what came between is not known.
    pub(super) fn forget(&self) {
        *self.told.write().unwrap_or_else(PoisonError::into_inner) = Told::default();
    }

    /// What whoever has seen revision `seen` has to be told until `current`; `None` when that is no longer known.
    pub(super) fn after(&self, seen: u64, current: u64) -> Option<Vec<Bytes>> {
        if seen == current {
            return Some(Vec::new());
        }
        let told = self.told.read().unwrap_or_else(PoisonError::into_inner);
        let (first, _) = told.frames.front()?;
        let skip = usize::try_from((seen + 1).checked_sub(*first)?).ok()?;
        let frames: Vec<Bytes> = told
            .frames
            .iter()
            .skip(skip)
            .take_while(|(revision, _)| *revision <= current)
            .map(|(_, frame)| frame.clone())
            .collect();
        (frames.len() as u64 == current.checked_sub(seen)?).then_some(frames)
    }
}

/// One change as a server-sent event (WHATWG HTML §9.2).
fn frame(change: &Change) -> Bytes {
    let text = serde_json::to_string(change).ok().filter(|text| text.len() <= LARGEST);
    text.map_or_else(|| resync(change.revision), |text| event("change", change.revision, &text))
}

/// "Fetch the catalog", as a server-sent event.
pub(super) fn resync(revision: u64) -> Bytes {
    standing("resync", revision)
}

/// "Nothing has changed", as a server-sent event.
pub(super) fn current(revision: u64) -> Bytes {
    standing("current", revision)
}

fn standing(name: &str, revision: u64) -> Bytes {
    let text = serde_json::to_string(&Standing { revision }).unwrap_or_default();
    event(name, revision, &text)
}

/// JSON has no line feed outside of its strings and an escaped one within; so any comma may begin a new line.
fn event(name: &str, id: u64, json: &str) -> Bytes {
    let mut text = format!("event: {name}\nid: {id}\ndata: ");
    let mut line = 0;
    let mut within = false;
    let mut escaped = false;
    for c in json.chars() {
        text.push(c);
        line += c.len_utf8();
        match c {
            '"' if !escaped => within = !within,
            ',' if !within && line > LINE / 2 => {
                text.push_str("\ndata: ");
                line = 0;
            }
            _ => {}
        }
        escaped = c == '\\' && !escaped;
    }
    text.push_str("\n\n");
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Events, Patch};

    fn change(revision: u64) -> Change {
        Change { revision, etag: String::new(), patches: Vec::new() }
    }

    fn removal(name: &str) -> Patch {
        Patch::Service { name: name.parse().unwrap(), service: None }
    }

    #[test]
    fn whoever_is_behind_is_told_what_came_since_or_that_it_is_too_late() {
        let journal = Journal::default();
        for revision in 5..=8 {
            journal.tell(&change(revision));
        }
        assert_eq!(journal.after(8, 8).unwrap().len(), 0);
        assert_eq!(journal.after(6, 8).unwrap().len(), 2);
        assert_eq!(journal.after(4, 8).unwrap().len(), 4);
        assert_eq!(journal.after(3, 8), None);
        // Ahead of us: of another store, or of a past that was restored away.
        assert_eq!(journal.after(9, 8), None);
        // A gap: what was before it leads nowhere.
        journal.tell(&change(20));
        assert_eq!(journal.after(8, 20), None);
        assert_eq!(journal.after(19, 20).unwrap().len(), 1);
        journal.forget();
        assert_eq!(journal.after(19, 20), None);
    }

    #[test]
    fn only_so_many_are_kept() {
        let journal = Journal::default();
        for revision in 1..=(CHANGES as u64 + 1) {
            journal.tell(&change(revision));
        }
        assert_eq!(journal.after(0, CHANGES as u64 + 1), None);
        assert_eq!(journal.after(1, CHANGES as u64 + 1).unwrap().len(), CHANGES);
    }

    #[test]
    fn a_large_change_arrives_whole_and_one_that_is_too_large_says_resync() {
        let patches = |count| (0..count).map(|n| removal(&format!("service-{n}"))).collect();
        let large = Change { revision: 7, etag: String::new(), patches: patches(500) };
        let mut events = Events::default();
        events.push(&frame(&large)).unwrap();
        let event = events.pop().unwrap();
        assert_eq!((event.name.as_str(), &*event.id), ("change", "7"));
        assert_eq!(serde_json::from_str::<Change>(&event.data).unwrap(), large);
        events
            .push(&frame(&Change { revision: 8, etag: String::new(), patches: patches(5000) }))
            .unwrap();
        let event = events.pop().unwrap();
        assert_eq!((event.name.as_str(), event.data.as_str()), ("resync", r#"{"revision":8}"#));
    }
}
