//! What must survive a restart besides the keys: the revision, and the hash of the content it stands for.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{model::ServiceName, runtime::write_private};

/// Why the revision could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("the revision in {} cannot be kept", path.display())]
    Storage {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is not what we wrote. Beginning anew would reuse revisions, so that is left to a person.
    #[error("{} is damaged; restore it, or use another data directory", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// A revision and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// Rises with every change.
    pub(super) revision: u64,
    /// SHA-256 of the content, in hexadecimal.
    pub(super) content: String,
    /// Whose content: proxies that know a project follow no other.
    pub(super) project: ServiceName,
}

/// One file in the data directory.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
}

impl Store {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self { path: data_dir.join("revision.json") }
    }

    /// What was kept last; `None` at the first start.
    pub(super) fn load(&self) -> Result<Option<Kept>, StoreError> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::Storage { path: self.path.clone(), source }),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| StoreError::Damaged { path: self.path.clone(), source })
    }

    /// Keeps `kept`; afterwards it is on disk, whatever happens.
    pub(super) fn save(&self, kept: &Kept) -> Result<(), StoreError> {
        let text = serde_json::to_vec(kept)
            .map_err(|source| StoreError::Damaged { path: self.path.clone(), source })?;
        write_private(&self.path, &text)
            .map_err(|source| StoreError::Storage { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_there_again_and_damage_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        assert_eq!(store.load().unwrap(), None);
        let kept = Kept { revision: 7, content: "ab".to_owned(), project: "shop".parse().unwrap() };
        store.save(&kept).unwrap();
        assert_eq!(store.load().unwrap(), Some(kept));
        fs::write(folder.path().join("revision.json"), "{").unwrap();
        assert!(matches!(store.load(), Err(StoreError::Damaged { .. })));
    }
}
