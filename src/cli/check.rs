//! `infrar check FILE`: every fault of a configuration, or its effective settings with their defaults.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use crate::config::{self, Faults};

/// Wrong usage or configuration.
const WRONG: u8 = 2;

/// Every fault of a configuration, or its effective settings.
#[derive(Debug, clap::Args)]
pub(crate) struct Check {
    /// A file with `role:` is a proxy.yaml, any other a project.yaml.
    file: PathBuf,
    /// The folder that stands for / in the paths that the file names, such as an unpacked image.
    #[arg(long, default_value = "/")]
    root: PathBuf,
}

impl Check {
    /// Checks the file: settings go to stdout, faults and notes to stderr. 2 on faults.
    pub(crate) fn run(&self) -> ExitCode {
        let written = report(&self.root, &self.file, &mut io::stdout().lock(), &mut io::stderr());
        // Nobody reads on; there is no place left to say so.
        written.map_or(ExitCode::FAILURE, ExitCode::from)
    }
}

/// Writes what there is to say about `file`; the exit code.
fn report(root: &Path, file: &Path, out: &mut impl Write, err: &mut impl Write) -> io::Result<u8> {
    match settings(root, file) {
        Ok((yaml, notes)) => {
            for note in notes {
                writeln!(err, "note: {note}")?;
            }
            out.write_all(yaml.as_bytes())?;
            out.flush()?;
            Ok(0)
        }
        Err(faults) => {
            writeln!(err, "{faults}")?;
            Ok(WRONG)
        }
    }
}

/// The effective settings and what is worth a look. The environment is left out: the answer is about the file.
fn settings(root: &Path, file: &Path) -> Result<(String, Vec<String>), Faults> {
    if config::is_proxy(file) {
        let settings = config::load_proxy_under(root, Some(file), std::iter::empty(), &[])?;
        return Ok((config::effective_yaml(&settings), Vec::new()));
    }
    let project = config::load_project_under(root, file)?;
    Ok((config::effective_yaml(&project), project.notes))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn check(text: &str) -> (u8, String, String) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file.yaml");
        fs::write(&file, text).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = report(Path::new("/"), &file, &mut out, &mut err).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (code, text(out), text(err).replace(&format!("{}/", folder.path().display()), ""))
    }

    #[test]
    fn a_right_file_is_printed_with_its_defaults_and_notes_apart() {
        let (code, out, err) =
            check("project: shop\nservices: { a: { hedge: { after: p95, budget: 2% } } }\n");
        assert_eq!(code, 0);
        assert!(out.starts_with("project: shop\nmulti_cloud:\n  enabled: true\n"), "{out}");
        assert_eq!(err, "note: services.a.hedge: read, but this release does not act on it\n");
    }

    #[test]
    fn a_wrong_file_is_told_all_its_faults_and_prints_nothing() {
        let (code, out, err) = check("role: sidecar\nservise: a\nplace: nowhere\n");
        assert_eq!((code, out.as_str()), (2, ""));
        assert_eq!(
            err,
            "file.yaml:1:1: control: found nothing; write control: { url: https://…:7070, credential: { client_secret_file: … } }, or project: project.yaml\n\
             file.yaml:1:1: service: found nothing; write a name of a-z, 0-9 and -, such as data-intelligence\n\
             file.yaml:2:1: servise: found an unknown key; write service\n\
             file.yaml:3:8: place: found \"nowhere\"; write provider and region, such as aws_us_east_1 or aws/us-east-1\n"
        );
    }

    #[test]
    fn a_file_that_is_not_there_is_a_fault() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = report(Path::new("/"), Path::new("no/such.yaml"), &mut out, &mut err).unwrap();
        assert_eq!(code, 2);
        assert_eq!(
            String::from_utf8(err).unwrap(),
            "no/such.yaml: found a file which does not exist; name a YAML file this user may read\n"
        );
    }
}
