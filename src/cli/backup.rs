//! `infrar backup` and `infrar restore`: the whole store in one file, and back.

use std::path::{Path, PathBuf};

use super::reach::{print, tame};
use crate::{
    control,
    store::{Location, Store, StoreError},
};

/// Which store, found as `infrar control` finds it.
#[derive(Debug, clap::Args)]
struct Place {
    /// The store: sqlite:FILE or postgres://USER@HOST/DATABASE [default: registry.db in --data-dir].
    #[arg(long, env = "INFRAR_STORE", value_name = "URL")]
    store: Option<Location>,
    /// The control plane's directory.
    #[arg(long, env = "INFRAR_DATA_DIR", default_value = "./.infrar/control", value_name = "DIR")]
    data_dir: PathBuf,
}

impl Place {
    fn location(&self) -> Location {
        self.store.clone().unwrap_or_else(|| control::usual_store(&self.data_dir))
    }
}

/// Copy the control plane's store into a new file, also while it runs.
///
/// The file has everything: the project, what is registered, and the private keys that sign tokens. Keep it as secret as
/// those; it is readable by its owner only.
#[derive(Debug, clap::Args)]
pub(crate) struct Backup {
    /// The file to make.
    to: PathBuf,
    #[command(flatten)]
    place: Place,
}

/// Fill an empty store from a backup.
///
/// Stop the control plane before. The restored one has the same project, the same endpoints, whose leases begin anew, and
/// signs with the same keys; proxies go on with it by themselves.
#[derive(Debug, clap::Args)]
pub(crate) struct Restore {
    /// What `infrar backup` made.
    from: PathBuf,
    #[command(flatten)]
    place: Place,
}

impl Backup {
    /// Copies it and says what lies there now.
    ///
    /// # Errors
    /// [`StoreError`], with what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let location = self.place.location();
        if let Location::Sqlite(path) = &location
            && !path.exists()
        {
            return Err(absent(path));
        }
        Store::copy(&location, &self.to).await?;
        let text = format!(
            "{location} is copied to {}\n\
             It holds the private keys that sign tokens: keep it as secret as those (its mode is 0600).",
            self.to.display()
        );
        Ok(print(&tame(&text))?)
    }
}

impl Restore {
    /// Fills it and says how to go on.
    ///
    /// # Errors
    /// [`StoreError`], with what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let location = self.place.location();
        Store::restore(&location, &self.from).await.map_err(|error| advised(error, &location))?;
        let text = format!(
            "{location} has what {} had, the private keys that sign tokens among it\n\
             Start `infrar control` with it; leases begin anew, and proxies fetch everything once.",
            self.from.display()
        );
        Ok(print(&tame(&text))?)
    }
}

fn absent(path: &Path) -> anyhow::Error {
    let text = format!(
        "there is no store at {}; name the directory of the control plane with --data-dir, or its store with --store",
        path.display()
    );
    super::Usage::new(text).into()
}

/// What is in the way belongs to somebody: it is never removed here.
fn advised(error: StoreError, location: &Location) -> anyhow::Error {
    let advice = match (&error, location) {
        (StoreError::NotEmpty { .. }, Location::Sqlite(path)) => format!(
            "nothing was restored; move {} away, or restore into another --data-dir",
            path.display()
        ),
        (StoreError::NotEmpty { .. }, Location::Postgres(_)) => {
            "nothing was restored; create another database, or another schema, and name it"
                .to_owned()
        }
        (StoreError::InUse { .. }, _) => {
            "nothing was restored; stop the control plane that runs on it".to_owned()
        }
        _ => return error.into(),
    };
    anyhow::Error::from(error).context(advice)
}
