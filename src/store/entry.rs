//! What is kept, in words that both engines share. Values may hold secrets, so nothing here shows one.

use std::{collections::HashMap, fmt, time::Duration};

use uuid::Uuid;

/// All that is kept, at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Of the last commit in it.
    pub revision: u64,
    /// By key, in the order of their bytes.
    pub entries: Vec<Entry>,
}

/// One thing that is kept. What it says is the business of whoever wrote it.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it lies.
    pub key: String,
    /// What it says.
    pub value: String,
    /// Of the commit that changed it last.
    pub revision: u64,
}

/// One change: the entry's new value, or that it is gone.
#[derive(Clone, PartialEq, Eq)]
pub struct Write {
    /// Of which entry.
    pub key: String,
    /// `None` removes it.
    pub value: Option<String>,
}

impl Write {
    /// Puts `value` at `key`.
    pub fn put(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self { key: key.into(), value: Some(value.into()) }
    }

    /// Takes away what is at `key`, if anything is.
    pub fn remove(key: impl Into<String>) -> Self {
        Self { key: key.into(), value: None }
    }
}

/// One revision: what it changed, and why, in the words of whoever made it.
#[derive(Clone, PartialEq, Eq)]
pub struct Commit {
    /// The one it made.
    pub revision: u64,
    /// At most one per key.
    pub writes: Vec<Write>,
    /// Not read by the store.
    pub note: String,
}

/// What came after a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Since {
    /// All of it, oldest first and without a gap, or the beginning of it.
    Commits {
        /// Empty when nothing came.
        commits: Vec<Commit>,
        /// Whether to ask again, from the last of these.
        more: bool,
    },
    /// It is no longer known, or the revision never was: load the whole.
    Forgotten {
        /// The oldest revision from which one can still catch up.
        oldest: u64,
    },
}

/// That somebody was seen, and what was seen of him.
#[derive(Clone, PartialEq, Eq)]
pub struct Sighting {
    /// Who.
    pub id: Uuid,
    /// What, in the words of whoever saw him.
    pub text: String,
    /// How long ago, by the store's clock.
    pub age: Duration,
}

/// Of each key its last word; a commit says one thing about one key.
pub(super) fn last_of_each(writes: Vec<Write>) -> Vec<Write> {
    let mut places: HashMap<String, usize> = HashMap::with_capacity(writes.len());
    let mut kept: Vec<Write> = Vec::with_capacity(writes.len());
    for write in writes {
        let place = *places.entry(write.key.clone()).or_insert(kept.len());
        match kept.get_mut(place) {
            Some(earlier) => *earlier = write,
            None => kept.push(write),
        }
    }
    kept
}

/// The writes of a commit as they lie in its row: `[["key","value"],["key",null]]`.
pub(super) fn writes_to_text(writes: &[Write]) -> String {
    let pairs = writes.iter().map(|write| (write.key.as_str(), write.value.as_deref()));
    // Pairs of text always have a JSON form.
    serde_json::to_string(&pairs.collect::<Vec<_>>()).unwrap_or_default()
}

/// The way back; `None` when somebody else wrote it.
pub(super) fn writes_from_text(text: &str) -> Option<Vec<Write>> {
    let pairs: Vec<(String, Option<String>)> = serde_json::from_str(text).ok()?;
    Some(pairs.into_iter().map(|(key, value)| Write { key, value }).collect())
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("key", &self.key)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.value.is_some() { "put" } else { "remove" };
        write!(f, "{what} {:?}", self.key)
    }
}

impl fmt::Debug for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Commit")
            .field("revision", &self.revision)
            .field("writes", &self.writes)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Sighting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sighting")
            .field("id", &self.id)
            .field("age", &self.age)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_keeps_the_last_word_about_each_key() {
        let writes = vec![Write::put("a", "1"), Write::put("b", "2"), Write::remove("a")];
        assert_eq!(last_of_each(writes), [Write::remove("a"), Write::put("b", "2")]);
    }

    #[test]
    fn writes_come_back_from_their_text() {
        let writes = vec![Write::put("a\0\u{10ffff}\"", "\\\n"), Write::remove("")];
        assert_eq!(writes_from_text(&writes_to_text(&writes)), Some(writes));
        assert_eq!(writes_from_text("[[1]]"), None);
    }

    #[test]
    fn no_value_is_shown() {
        let write = Write::put("key", "s3cret");
        let entry = Entry { key: "key".to_owned(), value: "s3cret".to_owned(), revision: 1 };
        let commit = Commit { revision: 1, writes: vec![write.clone()], note: "s3cret".to_owned() };
        let sighting = Sighting { id: Uuid::nil(), text: "s3cret".to_owned(), age: Duration::ZERO };
        let shown = format!("{write:?} {entry:?} {commit:?} {sighting:?}");
        assert!(!shown.contains("s3cret"), "{shown}");
    }
}
