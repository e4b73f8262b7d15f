//! `infrar completions` and `infrar man`: what a shell and a manual know of the commands.

use std::{io, path::PathBuf};

use anyhow::Context;
use clap_complete::Shell;

use super::reach::print;

/// The completions of a shell, to be put where it looks for them.
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// Which shell.
    shell: Shell,
}

impl Completions {
    /// Prints the completions of `command`.
    ///
    /// # Errors
    /// When they cannot be printed.
    pub fn run(self, mut command: clap::Command) -> io::Result<()> {
        let mut script = Vec::new();
        let name = command.get_name().to_owned();
        clap_complete::generate(self.shell, &mut command, name, &mut script);
        print(String::from_utf8_lossy(&script).trim_end())
    }
}

/// The manual page.
#[derive(Debug, clap::Args)]
pub struct Man {
    /// Write a page for every command into this folder instead.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

impl Man {
    /// Prints the page of `command`, or writes one for each of its commands.
    ///
    /// # Errors
    /// When they cannot be printed or written.
    pub fn run(self, command: clap::Command) -> anyhow::Result<()> {
        if let Some(dir) = &self.dir {
            return clap_mangen::generate_to(command, dir)
                .with_context(|| format!("{} cannot be written", dir.display()));
        }
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        Ok(print(String::from_utf8_lossy(&page).trim_end())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_gets_its_page() {
        let folder = tempfile::tempdir().unwrap();
        let command = clap::Command::new("infrar").subcommand(clap::Command::new("health"));
        Man { dir: Some(folder.path().to_owned()) }.run(command).unwrap();
        for page in ["infrar.1", "infrar-health.1"] {
            assert!(folder.path().join(page).exists(), "{page}");
        }
    }
}
