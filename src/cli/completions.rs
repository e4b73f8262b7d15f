//! `infrar completions` and `infrar man`: what a shell and a manual know of the commands.

use std::{fs, io, path::PathBuf};

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
        let page = page(command.clone())?;
        let Some(dir) = &self.dir else { return Ok(print(page.trim_end())?) };
        let cannot = || format!("{} cannot be written", dir.display());
        fs::create_dir_all(dir).with_context(cannot)?;
        let main = dir.join(format!("{}.1", command.get_name()));
        clap_mangen::generate_to(command, dir).with_context(cannot)?;
        // With what is true for all commands.
        fs::write(main, page).with_context(cannot)
    }
}

/// The page of all commands together.
fn page(command: clap::Command) -> io::Result<String> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(String::from_utf8_lossy(&page).into_owned() + ALL_COMMANDS)
}

/// What no command says of itself.
const ALL_COMMANDS: &str = r#".SH "EXIT STATUS"
.TP
0
Done; of \fBinfrar health\fR: the proxy is ready; of \fBinfrar token verify\fR: the token is valid.
.TP
1
Failed.
.TP
2
Wrong usage or configuration. What is wrong stands on standard error, with what to write instead.
.SH FILES
.TP
project.yaml
What is true for a whole project; read by \fBinfrar control\fR and \fBinfrar up\fR.
.TP
proxy.yaml
One proxy; read by \fBinfrar proxy \-\-config\fR.
.TP
control.state_dir
The proxy's last snapshot, the key sets of each issuer and its unexpired tokens: a restart needs no control plane.
.TP
\-\-data\-dir
The control plane's signing keys and its revision. For its owner alone.
.SH ENVIRONMENT
Every key of proxy.yaml is a variable too: INFRAR_ and its path in upper case with _ between, such as
INFRAR_OUTBOUND_LISTEN. Lists and maps are YAML flow text. A flag beats the variable, which beats the file;
\fBinfrar check\fR shows what they come to.
.TP
INFRAR_CONFIG
The file of \fBinfrar proxy\fR and \fBinfrar check\fR.
.TP
INFRAR_CONTROL_URL, INFRAR_TOKEN
Where \fBinfrar services\fR and \fBinfrar token\fR ask, and with which token.
.TP
INFRAR_ADMIN_URL
Where \fBinfrar health\fR asks.
.TP
INFRAR_LOG_LEVEL, INFRAR_LOG_FORMAT
How much is logged, and in which form.
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_gets_its_page() {
        let folder = tempfile::tempdir().unwrap();
        let command = clap::Command::new("infrar").subcommand(clap::Command::new("health"));
        let new = folder.path().join("share/man1");
        Man { dir: Some(new.clone()) }.run(command).unwrap();
        let page = |name: &str| fs::read_to_string(new.join(name)).unwrap();
        assert!(page("infrar-health.1").contains("infrar"));
        for section in ["EXIT STATUS", "FILES", "ENVIRONMENT"] {
            assert!(page("infrar.1").contains(section), "{section}");
        }
    }
}
