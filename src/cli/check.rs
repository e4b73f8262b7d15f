//! `infrar check [FILE]`: every fault of a configuration, or its effective settings with their defaults.

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
    /// A file with `role:` is a proxy.yaml, any other a project.yaml. Without one the environment is a proxy's settings.
    #[arg(env = "INFRAR_CONFIG")]
    file: Option<PathBuf>,
    /// The folder that stands for / in the paths that the file names, such as an unpacked image.
    #[arg(long, default_value = "/", value_name = "FOLDER")]
    root: PathBuf,
    /// Take certificates, secrets, key sets and folders to be there: for a file that is checked on another machine.
    #[arg(long, conflicts_with = "root")]
    skip_files: bool,
}

impl Check {
    /// Checks it: settings go to stdout, faults and notes to stderr. 2 on faults.
    pub(crate) fn run(&self) -> ExitCode {
        let environment = config::environment();
        let written = self.report(&environment, &mut io::stdout().lock(), &mut io::stderr());
        // Nobody reads on; there is no place left to say so.
        written.map_or(ExitCode::FAILURE, ExitCode::from)
    }

    /// Writes what there is to say; the exit code.
    fn report(
        &self,
        environment: &[(String, String)],
        out: &mut impl Write,
        err: &mut impl Write,
    ) -> io::Result<u8> {
        match self.settings(environment) {
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

    /// The effective settings and what is worth a look.
    fn settings(&self, environment: &[(String, String)]) -> Result<(String, Vec<String>), Faults> {
        match &self.file {
            Some(file) if !config::is_proxy(file) => self.project(file),
            file => self.proxy(file.as_deref(), environment),
        }
    }

    fn project(&self, file: &Path) -> Result<(String, Vec<String>), Faults> {
        let project = if self.skip_files {
            config::load_project_alone(file)?
        } else {
            config::load_project_under(&self.root, file)?
        };
        Ok((config::effective_yaml(&project), project.notes))
    }

    /// As the proxy itself would read them, variables included.
    fn proxy(
        &self,
        file: Option<&Path>,
        environment: &[(String, String)],
    ) -> Result<(String, Vec<String>), Faults> {
        let variables = environment.iter().cloned();
        let settings = if self.skip_files {
            config::load_proxy_alone(file, variables, &[])?
        } else {
            config::load_proxy_under(&self.root, file, variables, &[])?
        };
        let mut notes = settings.notes();
        let taken = config::variables(environment);
        if file.is_some() && !taken.is_empty() {
            notes.insert(0, format!("variables that beat the file: {}", taken.join(", ")));
        }
        Ok((config::effective_yaml(&settings), notes))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn checked(check: &Check, environment: &[(&str, &str)]) -> (u8, String, String) {
        let environment: Vec<_> = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = check.report(&environment, &mut out, &mut err).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (code, text(out), text(err))
    }

    fn of(file: Option<PathBuf>, skip_files: bool) -> Check {
        Check { file, root: "/".into(), skip_files }
    }

    fn check(text: &str) -> (u8, String, String) {
        check_with(text, &[])
    }

    fn check_with(text: &str, environment: &[(&str, &str)]) -> (u8, String, String) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file.yaml");
        fs::write(&file, text).unwrap();
        let (code, out, err) = checked(&of(Some(file), true), environment);
        (code, out, err.replace(&format!("{}/", folder.path().display()), ""))
    }

    /// A sidecar whose secret is nowhere on this machine.
    const SIDECAR: &str = "role: sidecar\nservice: web\nplace: aws_us_east_1\n\
        control: { url: 'https://c:1', credential: { client_secret_file: /no/such/secret } }\n";

    #[test]
    fn variables_beat_the_file_and_are_checked_with_it() {
        let (code, out, err) = check_with(
            SIDECAR,
            &[("INFRAR_OUTBOUND_LISTEN", "127.0.0.1:9"), ("INFRAR_TOKEN", "t")],
        );
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("listen: \"127.0.0.1:9\""), "{out}");
        assert_eq!(err, "note: variables that beat the file: INFRAR_OUTBOUND_LISTEN\n");
        let (code, _, err) = check_with(SIDECAR, &[("INFRAR_OUTBOUND_LISTEN", "zzz")]);
        assert_eq!(code, 2);
        assert!(err.starts_with("INFRAR_OUTBOUND_LISTEN: outbound.listen: found \"zzz\""), "{err}");
    }

    #[test]
    fn without_a_file_the_environment_is_checked_alone() {
        let mut environment = vec![
            ("INFRAR_SERVICE", "web"),
            ("INFRAR_PLACE", "aws_us_east_1"),
            ("INFRAR_CONTROL_URL", "https://control.example:7070"),
            ("INFRAR_CONTROL_CREDENTIAL_CLIENT_SECRET_FILE", "/no/such/secret"),
        ];
        let (code, out, err) = checked(&of(None, true), &environment);
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        // With a look at the files the missing secret is a fault.
        assert_eq!(checked(&of(None, false), &environment).0, 2);
        environment.push(("INFRAR_OUTBOUND_LISTEN", "0.0.0.0:15001"));
        let (_, _, err) = checked(&of(None, true), &environment);
        assert!(err.contains("calls with the tokens of web"), "{err}");
    }

    #[test]
    fn the_wrong_kind_of_file_is_named_in_one_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file.yaml");
        fs::write(&file, SIDECAR).unwrap();
        let faults = config::load_project(&file).unwrap_err();
        assert_eq!(faults.0.len(), 1, "{faults}");
        assert!(faults.to_string().contains("found a proxy.yaml (it has `role`)"), "{faults}");
        fs::write(&file, "project: shop\nservices: {}\npermissions: {}\n").unwrap();
        let faults = config::load_proxy(Some(&file), std::iter::empty(), &[]).unwrap_err();
        assert_eq!(faults.0.len(), 1, "{faults}");
        assert!(
            faults.to_string().contains("found a project.yaml (it has `services`)"),
            "{faults}"
        );
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
        let (code, _, err) = checked(&of(Some("no/such.yaml".into()), false), &[]);
        assert_eq!(code, 2);
        assert_eq!(
            err,
            "no/such.yaml: found a file which does not exist; name a YAML file this user may read\n"
        );
    }
}
