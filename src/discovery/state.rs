//! What survives a restart while the control plane is down: the last snapshot, public keys, tokens.
//!
//! Each is a file of its own, written when it is received, atomically and for its owner's eyes only. A file that is
//! damaged, too old, or of another proxy is refused with its reason, and so is one whose project or issuer is another
//! than the snapshot's; the proxy then starts as if it were not there.
//!
//! How old something is counts from when its source last said that it is current, not from its last change. So a small
//! file beside it notes that, and a large one is not written again for it.

use std::{
    fmt, fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    api::Catalog,
    model::ServiceName,
    runtime::{Clock, PrivateFault, clear_leftovers, hex, read_private, sha256, write_private},
};

/// The version of the files' form.
const FORMAT: u32 = 1;
/// A file beyond this is none of ours.
const LARGEST: u64 = 256 * 1024 * 1024;

/// Why a kept file was not used.
#[derive(Debug, thiserror::Error)]
pub enum StateFault {
    /// The file system said no.
    #[error("{path} cannot be used")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Others than its owner can read it.
    #[error("{0} can be read by others than its owner; it should have mode 0600")]
    Exposed(PathBuf),
    /// It was changed, or only half written.
    #[error("{0} is damaged: its checksum does not match its content")]
    Damaged(PathBuf),
    /// It was written by another release.
    #[error("{path} has the form {found}, this release reads {FORMAT}")]
    Form {
        /// Which file.
        path: PathBuf,
        /// Its form.
        found: u32,
    },
    /// It belongs to another proxy.
    #[error("{path} was written by the proxy of {found}, this is the proxy of {expected}")]
    Other {
        /// Which file.
        path: PathBuf,
        /// Who this is.
        expected: ServiceName,
        /// Who wrote it.
        found: String,
    },
    /// It belongs to another project, or to another issuer.
    #[error("{path} is of {found}, and the snapshot of {expected}")]
    Elsewhere {
        /// Which file.
        path: PathBuf,
        /// Whose the snapshot is.
        expected: Origin,
        /// Whose it is.
        found: Origin,
    },
    /// It is older than `control.max_snapshot_age`.
    #[error("{path} is {age:?} old, older than control.max_snapshot_age allows")]
    Old {
        /// Which file.
        path: PathBuf,
        /// Its age.
        age: Duration,
    },
}

/// Whose something is: what one project's issuer says means nothing to another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The project's name.
    pub project: String,
    /// The `iss` of its own tokens.
    pub issuer: String,
}

impl Origin {
    /// Whose a snapshot is.
    #[must_use]
    pub fn of(catalog: &Catalog) -> Self {
        Self { project: catalog.project.name.to_string(), issuer: catalog.issuer.clone() }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the project {:?} with the issuer {:?}", self.project, self.issuer)
    }
}

/// A file as it is on disk. The content is text of its own, so that the checksum covers exactly its bytes.
#[derive(Serialize, Deserialize)]
struct Envelope {
    format: u32,
    service: String,
    #[serde(default)]
    origin: Origin,
    /// When it was received or confirmed, seconds since 1970.
    saved_at: i64,
    sha256: String,
    content: String,
}

/// Tells which content lies on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seal(String);

/// Content that was kept, and how old it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored<T> {
    /// What was kept.
    pub content: T,
    /// Since its source last said that it is current.
    pub age: Duration,
    /// To confirm it by.
    pub seal: Seal,
}

/// The folder in which a proxy keeps what must survive it.
#[derive(Clone, Debug)]
pub struct State {
    folder: PathBuf,
    service: ServiceName,
    clock: Clock,
}

impl State {
    /// The folder, made if it is not there.
    ///
    /// # Errors
    /// [`StateFault::Io`] when it cannot be made.
    pub fn open(folder: &Path, service: ServiceName, clock: Clock) -> Result<Self, StateFault> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|source| StateFault::Io { path: folder.to_owned(), source })?;
        clear_leftovers(folder);
        Ok(Self { folder: folder.to_owned(), service, clock })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }

    /// Keeps `content` of `origin` under `name`, as current now. Blocks on the disk.
    ///
    /// # Errors
    /// [`StateFault::Io`]; what was kept before is then untouched.
    pub fn keep<T: Serialize>(
        &self,
        name: &str,
        content: &T,
        origin: &Origin,
    ) -> Result<Seal, StateFault> {
        self.write(&self.path(name), content, origin, Duration::ZERO)
    }

    /// Notes that what was kept under `name` with this seal was current `age` ago. Blocks on the disk.
    ///
    /// # Errors
    /// [`StateFault::Io`]; what was noted before is then untouched.
    pub fn confirm(&self, name: &str, seal: &Seal, age: Duration) -> Result<(), StateFault> {
        self.write(&self.path(&note_of(name)), seal, &Origin::default(), age).map(drop)
    }

    fn write<T: Serialize>(
        &self,
        path: &Path,
        content: &T,
        origin: &Origin,
        age: Duration,
    ) -> Result<Seal, StateFault> {
        let io = |source| StateFault::Io { path: path.to_owned(), source };
        let content = serde_json::to_string(content).map_err(|source| io(source.into()))?;
        let age = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
        let seal = checksum(&content);
        let envelope = Envelope {
            format: FORMAT,
            service: self.service.to_string(),
            origin: origin.clone(),
            saved_at: self.clock.unix_seconds().saturating_sub(age),
            sha256: seal.clone(),
            content,
        };
        let bytes = serde_json::to_vec(&envelope).map_err(|source| io(source.into()))?;
        write_private(path, &bytes).map_err(io)?;
        Ok(Seal(seal))
    }

    /// What was kept under `name`, if anything was; `oldest` is the age from which it is refused. Blocks on the disk.
    ///
    /// # Errors
    /// [`StateFault`] when there is something that must not be used.
    pub fn kept<T: DeserializeOwned>(
        &self,
        name: &str,
        oldest: Option<Duration>,
    ) -> Result<Option<Stored<T>>, StateFault> {
        let path = self.path(name);
        let Some(envelope) = self.read(&path)? else { return Ok(None) };
        self.open_up(path, envelope, name, oldest)
    }

    /// As [`kept`](Self::kept) however old it is, but of `origin` only.
    ///
    /// # Errors
    /// [`StateFault`] when there is something that must not be used.
    pub fn kept_of<T: DeserializeOwned>(
        &self,
        name: &str,
        origin: &Origin,
    ) -> Result<Option<Stored<T>>, StateFault> {
        let path = self.path(name);
        let Some(envelope) = self.read(&path)? else { return Ok(None) };
        if envelope.origin != *origin {
            let (expected, found) = (origin.clone(), envelope.origin);
            return Err(StateFault::Elsewhere { path, expected, found });
        }
        self.open_up(path, envelope, name, None)
    }

    fn open_up<T: DeserializeOwned>(
        &self,
        path: PathBuf,
        envelope: Envelope,
        name: &str,
        oldest: Option<Duration>,
    ) -> Result<Option<Stored<T>>, StateFault> {
        let seal = Seal(envelope.sha256);
        let current_at = self.confirmed(name, &seal).unwrap_or(i64::MIN).max(envelope.saved_at);
        // A clock that was set back makes no file younger than new.
        let seconds = self.clock.unix_seconds().saturating_sub(current_at);
        let age = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        if oldest.is_some_and(|oldest| age > oldest) {
            return Err(StateFault::Old { path, age });
        }
        match serde_json::from_str(&envelope.content) {
            Ok(content) => Ok(Some(Stored { content, age, seal })),
            Err(_other_shape) => Err(StateFault::Damaged(path)),
        }
    }

    /// When the content with this seal was last confirmed. A note that cannot be used confirms nothing.
    fn confirmed(&self, name: &str, seal: &Seal) -> Option<i64> {
        let note = self.read(&self.path(&note_of(name))).unwrap_or_else(|fault| {
            let error = &fault as &dyn std::error::Error;
            tracing::warn!(error, "what was kept counts as older than it may be");
            None
        })?;
        let confirmed: Seal = serde_json::from_str(&note.content).ok()?;
        (confirmed == *seal).then_some(note.saved_at)
    }

    fn read(&self, path: &Path) -> Result<Option<Envelope>, StateFault> {
        let path = path.to_owned();
        let bytes = match read_private(&path, LARGEST) {
            Ok(bytes) => bytes,
            Err(PrivateFault::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(PrivateFault::Io(source)) => return Err(StateFault::Io { path, source }),
            Err(PrivateFault::Exposed) => return Err(StateFault::Exposed(path)),
            Err(PrivateFault::TooLarge) => return Err(StateFault::Damaged(path)),
        };
        let Ok(envelope) = serde_json::from_slice::<Envelope>(&bytes) else {
            return Err(StateFault::Damaged(path));
        };
        if envelope.format != FORMAT {
            return Err(StateFault::Form { path, found: envelope.format });
        }
        if checksum(&envelope.content) != envelope.sha256 {
            return Err(StateFault::Damaged(path));
        }
        if envelope.service != self.service.as_str() {
            return Err(StateFault::Other {
                path,
                expected: self.service.clone(),
                found: envelope.service,
            });
        }
        Ok(Some(envelope))
    }
}

/// The file that says when `name` was last confirmed.
fn note_of(name: &str) -> String {
    format!("{name}-confirmed")
}

fn checksum(content: &str) -> String {
    hex(&sha256(content.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const WEEK: Option<Duration> = Some(Duration::from_secs(7 * 86_400));

    fn ours() -> Origin {
        Origin { project: "shop".to_owned(), issuer: "https://i".to_owned() }
    }

    fn state(folder: &Path, service: &str) -> State {
        let clock = Clock::starting_at(jiff::Timestamp::from_second(1_800_000_000).unwrap());
        State::open(folder, service.parse().unwrap(), clock).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_kept_is_found_again_until_it_is_too_old() {
        let folder = tempfile::tempdir().unwrap();
        let state = state(folder.path(), "web");
        assert_eq!(state.kept::<u64>("snapshot", WEEK).unwrap(), None);
        state.keep("snapshot", &7u64, &ours()).unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
        let found = state.kept::<u64>("snapshot", WEEK).unwrap().unwrap();
        assert_eq!((found.content, found.age), (7, Duration::from_secs(60)));
        tokio::time::advance(Duration::from_secs(7 * 86_400)).await;
        assert!(matches!(state.kept::<u64>("snapshot", WEEK), Err(StateFault::Old { .. })));
        // Whoever asks without a limit has it however old it is.
        assert_eq!(state.kept::<u64>("snapshot", None).unwrap().unwrap().content, 7);
    }

    #[tokio::test(start_paused = true)]
    async fn its_age_counts_from_its_last_confirmation() {
        let (folder, day) = (tempfile::tempdir().unwrap(), Duration::from_secs(86_400));
        let state = state(folder.path(), "web");
        let seal = state.keep("snapshot", &7u64, &ours()).unwrap();
        tokio::time::advance(10 * day).await;
        state.confirm("snapshot", &seal, Duration::from_secs(30)).unwrap();
        tokio::time::advance(day).await;
        let found = state.kept::<u64>("snapshot", WEEK).unwrap().unwrap();
        assert_eq!((found.age, found.seal), (day + Duration::from_secs(30), seal.clone()));
        // What was confirmed is that content, and no other that takes its place.
        tokio::time::advance(day).await;
        state.keep("snapshot", &8u64, &ours()).unwrap();
        tokio::time::advance(day).await;
        state.confirm("snapshot", &seal, Duration::ZERO).unwrap();
        assert_eq!(state.kept::<u64>("snapshot", WEEK).unwrap().unwrap().age, day);
        // A damaged note confirms nothing, and takes nothing away.
        fs::write(folder.path().join("snapshot-confirmed.json"), "{").unwrap();
        assert_eq!(state.kept::<u64>("snapshot", WEEK).unwrap().unwrap().age, day);
    }

    #[tokio::test]
    async fn what_a_killed_process_left_half_written_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        state(folder.path(), "web").keep("tokens", &1u8, &ours()).unwrap();
        let leftover = folder.path().join(format!(".{}.tmp", uuid::Uuid::now_v7()));
        fs::write(&leftover, "half a token").unwrap();
        let again = state(folder.path(), "web");
        assert!(!leftover.exists());
        assert_eq!(again.kept::<u8>("tokens", None).unwrap().unwrap().content, 1);
    }

    #[tokio::test]
    async fn a_damaged_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = state(folder.path(), "web");
        state.keep("snapshot", &"abc", &ours()).unwrap();
        let path = folder.path().join("snapshot.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("abc", "abd")).unwrap();
        assert!(matches!(state.kept::<String>("snapshot", WEEK), Err(StateFault::Damaged(_))));
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(state.kept::<String>("snapshot", WEEK), Err(StateFault::Damaged(_))));
    }

    #[tokio::test]
    async fn what_another_project_or_issuer_has_given_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = state(folder.path(), "web");
        state.keep("tokens", &1u8, &ours()).unwrap();
        assert_eq!(state.kept_of::<u8>("tokens", &ours()).unwrap().unwrap().content, 1);
        for other in [
            Origin { project: "bank".to_owned(), ..ours() },
            Origin { issuer: "https://j".to_owned(), ..ours() },
        ] {
            let fault = state.kept_of::<u8>("tokens", &other).unwrap_err();
            assert!(
                matches!(&fault, StateFault::Elsewhere { found, .. } if *found == ours()),
                "{fault}"
            );
        }
        assert_eq!(state.kept_of::<u8>("none", &ours()).unwrap(), None);
    }

    #[tokio::test]
    async fn a_file_of_another_proxy_or_for_everybodys_eyes_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        state(folder.path(), "web").keep("snapshot", &1u8, &ours()).unwrap();
        let other = state(folder.path(), "reports").kept::<u8>("snapshot", WEEK);
        assert!(matches!(other, Err(StateFault::Other { .. })));
        let path = folder.path().join("snapshot.json");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let open = state(folder.path(), "web").kept::<u8>("snapshot", WEEK);
        assert!(matches!(open, Err(StateFault::Exposed(_))));
    }
}
