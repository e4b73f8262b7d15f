//! `infrar check`: every fault of a configuration, or its effective settings.

use std::{fs, path::PathBuf, process::ExitCode};

use crate::config::{self, Effective, Faults};

/// Every fault of a configuration, or its effective settings with their defaults.
#[derive(Debug, clap::Args)]
pub(crate) struct Check {
    /// A `proxy.yaml` (it has `role:`) or a `project.yaml` (any other).
    file: PathBuf,
    /// The published JSON schema of the file instead.
    #[arg(long)]
    schema: bool,
}

impl Check {
    /// Prints settings or faults; 2 when there are faults.
    #[expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks to people")]
    pub(crate) fn run(self) -> ExitCode {
        let proxy = is_proxy(&fs::read_to_string(&self.file).unwrap_or_default());
        if self.schema {
            let schema = if proxy { config::schema_proxy() } else { config::schema_project() };
            println!("{schema:#}");
            return ExitCode::SUCCESS;
        }
        match self.effective(proxy) {
            Ok((yaml, notes)) => {
                println!("{}", yaml.trim_end());
                for note in notes {
                    eprintln!("note: {note}");
                }
                ExitCode::SUCCESS
            }
            Err(faults) => {
                eprintln!("{faults}");
                ExitCode::from(2)
            }
        }
    }

    fn effective(&self, proxy: bool) -> Result<(String, Vec<String>), Faults> {
        if proxy {
            let settings = config::load_proxy(Some(&self.file), std::iter::empty(), &[])?;
            return Ok((settings.effective_yaml(), Vec::new()));
        }
        let project = config::load_project(&self.file)?;
        Ok((project.effective_yaml(), project.notes))
    }
}

/// A file with a `role` of its own is a proxy's.
fn is_proxy(text: &str) -> bool {
    text.lines().any(|line| line.starts_with("role:"))
}
