//! One fault: where, what was found, what to write instead.
//!
//! Faults are gathered, never thrown one by one, and read like advice. What was found is shown shortened and
//! without anything that could be a password.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Where a setting was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// In this file, named as its reader named it.
    File(Arc<Path>),
    /// In this environment variable.
    Variable(Arc<str>),
    /// In the command-line flag for this path.
    Flag(Arc<str>),
}

/// A source and, in a file, the line and column there, both counted from 1; line 0 means the file as a whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Which text.
    pub source: Source,
    /// Which line of it.
    pub line: usize,
    /// Which character of the line.
    pub column: usize,
}

impl Position {
    /// A source as a whole.
    #[must_use]
    pub fn whole(source: Source) -> Self {
        Self { source, line: 0, column: 0 }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::File(file) if self.line == 0 => write!(f, "{}", file.display()),
            Source::File(file) => write!(f, "{}:{}:{}", file.display(), self.line, self.column),
            Source::Variable(name) => f.write_str(name),
            Source::Flag(path) => write!(f, "the flag for {path}"),
        }
    }
}

/// One fault of a configuration.
///
/// Prints as `proxy.yaml:12:7: outbound.listen: found "15001x"; write an address with a port, such as
/// 127.0.0.1:15001`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// Where it is.
    pub at: Position,
    /// The setting: `services.reports.endpoints[0].url`; empty for a file as a whole.
    pub path: String,
    /// What stands there.
    pub found: String,
    /// What to write instead.
    pub advice: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.at)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        write!(f, "found {}; {}", self.found, self.advice)
    }
}

/// Every fault of a configuration, in the order of the text. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>, pub(super) Vec<PathBuf>);

impl Faults {
    /// The files that the configuration refers to, as far as it could be read: a change in one of them may be what mends
    /// it.
    pub fn referred_files(&self) -> impl Iterator<Item = PathBuf> {
        self.1.iter().cloned()
    }

    /// `Ok` when nothing was found wrong. `named` are the files that the configuration refers to.
    pub(super) fn unless_none(mut found: Vec<Fault>, named: Vec<PathBuf>) -> Result<(), Self> {
        if found.is_empty() {
            return Ok(());
        }
        found.sort();
        found.dedup();
        Err(Self(found, named))
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, fault) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// How many characters of a wrong value a fault repeats.
const SHOWN: usize = 60;

/// A wrong value as a fault shows it: quoted, escaped, at most [`SHOWN`] characters, the user part of a URL
/// left out because it may hold a password.
pub(super) fn quoted(text: &str) -> String {
    let masked = mask_user(text);
    let mut shown: String = masked.chars().take(SHOWN).collect();
    if masked.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    format!("{shown:?}")
}

/// `https://user:password@host` without what stands before the `@`.
fn mask_user(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let authority_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    match authority.rsplit_once('@') {
        Some((_user, host)) => format!("{scheme}://…@{host}{path}"),
        None => text.to_owned(),
    }
}

/// The known word nearest to `written`, if one is near enough to be meant.
pub(super) fn nearest<'a>(
    written: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let written = written.to_ascii_lowercase();
    let score = |word: &str| strsim::jaro_winkler(&written, &word.to_ascii_lowercase());
    let best = known.into_iter().map(|word| (score(word), word)).max_by(|a, b| a.0.total_cmp(&b.0));
    best.filter(|(score, _)| *score >= 0.8).map(|(_, word)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_reads_like_advice() {
        let at =
            Position { source: Source::File(Path::new("proxy.yaml").into()), line: 12, column: 7 };
        let fault = Fault {
            at,
            path: "outbound.listen".to_owned(),
            found: quoted("15001x"),
            advice: "write an address with a port, such as 127.0.0.1:15001".to_owned(),
        };
        assert_eq!(
            fault.to_string(),
            "proxy.yaml:12:7: outbound.listen: found \"15001x\"; write an address with a port, such as 127.0.0.1:15001"
        );
    }

    #[test]
    fn a_password_in_an_address_is_never_repeated() {
        assert_eq!(quoted("https://u:p4ss@host/x@y"), "\"https://…@host/x@y\"");
        assert_eq!(quoted("https://u:p@ss@host"), "\"https://…@host\"");
        assert_eq!(quoted(&"x".repeat(100)).chars().count(), 63);
    }

    #[test]
    fn only_a_near_word_is_suggested() {
        assert_eq!(nearest("lisen", ["listen", "via"]), Some("listen"));
        assert_eq!(nearest("banana", ["listen", "via"]), None);
    }
}
