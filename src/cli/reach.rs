//! How a command reaches the control plane, and how it prints what it learnt.

use std::{
    io::{self, Write},
    path::PathBuf,
    str::FromStr,
};

use secrecy::SecretString;
use url::Url;

use super::Usage;
use crate::{
    api::{Client, ClientError, ClientSettings},
    config,
};

/// Several addresses of one control plane, as a flag or variable has them: one, several with commas between, or the YAML list
/// that a proxy's `INFRAR_CONTROL_URL` may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Replicas(Vec<Url>);

impl FromStr for Replicas {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bare = text.trim();
        let list = bare.strip_prefix('[').and_then(|list| list.strip_suffix(']')).unwrap_or(bare);
        let urls: Result<Vec<Url>, String> = list.split(',').map(address).collect();
        urls.map(Self)
    }
}

fn address(text: &str) -> Result<Url, String> {
    let text = text.trim().trim_matches(['"', '\'']);
    let url: Option<Url> = text.parse().ok();
    let url = url
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| format!("{text:?} is no address; write https://HOST:PORT"))?;
    encrypted(url)
}

/// Secrets and tokens, and the keys that say who is believed, travel over TLS, or stay on this machine.
fn encrypted(url: Url) -> Result<Url, String> {
    if url.scheme() == "http" && !config::is_loopback(&url) {
        return Err("write https:// (plain http is spoken to this machine only)".to_owned());
    }
    Ok(url)
}

/// An address of keys.
pub(crate) fn keys_url(text: &str) -> Result<Url, String> {
    encrypted(text.parse().map_err(|_no_url| "write https://HOST/PATH".to_owned())?)
}

/// Where the control plane is, and whom to believe on the way.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Reach {
    /// The control plane; several addresses of it with commas between.
    #[arg(
        long,
        env = "INFRAR_CONTROL_URL",
        default_value = "http://127.0.0.1:7070",
        value_name = "URL"
    )]
    control: Replicas,
    /// Certificates (PEM) to trust besides the system's.
    #[arg(long, env = "INFRAR_CONTROL_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl Reach {
    /// A client for it.
    ///
    /// # Errors
    /// [`ClientError::Settings`].
    pub(crate) fn client(&self) -> Result<Client, ClientError> {
        Client::new(ClientSettings::new(self.control.0.clone(), self.ca_file.clone()))
    }

    /// What became of a question, with what to do about it where that is known.
    ///
    /// # Errors
    /// The one it was given, with advice before its causes.
    pub(crate) fn advised<T>(&self, answer: Result<T, ClientError>) -> anyhow::Result<T> {
        answer.map_err(|error| match self.advice(&error) {
            Some(advice) => anyhow::Error::from(error).context(advice),
            None => error.into(),
        })
    }

    fn advice(&self, error: &ClientError) -> Option<String> {
        match error {
            // A control plane has every path that is asked here.
            ClientError::Refused { status, code, .. }
                if matches!(code.as_str(), "" | "not-found") =>
            {
                Some(format!(
                    "no infrar control plane answers at {} (status {status})",
                    self.address()
                ))
            }
            ClientError::Refused { code, .. }
                if matches!(code.as_str(), "token-invalid" | "token-expired") =>
            {
                Some(format!("INFRAR_TOKEN is not accepted; {GET_ONE}"))
            }
            ClientError::Unreachable { host, source } => unreached(host, &**source),
            ClientError::Malformed { .. } => {
                Some(format!("no infrar control plane answers at {}", self.address()))
            }
            ClientError::Refused { .. } | ClientError::Settings { .. } => None,
        }
    }

    /// The address that is asked first.
    pub(crate) fn address(&self) -> String {
        let first = self.control.0.first().map(Url::as_str).unwrap_or_default();
        first.trim_end_matches('/').to_owned()
    }
}

/// What to do without one.
const GET_ONE: &str = "get one and ask again:\n  \
     export INFRAR_TOKEN=$(infrar token get --client-id NAME --client-secret-file FILE)\n\
     (with `infrar up`: the caller it speaks for, and the file `secret` in its --data-dir)";

/// What keeps a connection from being one, where the cause says so. Libraries tell it in their own words, by which alone
/// some of these can be told apart.
fn unreached(host: &str, source: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut causes = source.to_string();
    let mut next = source.source();
    while let Some(cause) = next {
        causes = format!("{causes}: {cause}");
        next = cause.source();
    }
    let known = [
        ("invalid HTTP version", "it speaks TLS: write https://"),
        ("InvalidContentType", "it does not speak TLS: write http:// (to this machine only)"),
        (
            "UnknownIssuer",
            "its certificate is signed by nobody whom this machine trusts: give --ca-file",
        ),
        (
            "CaUsedAsEndEntity",
            "its certificate is that of a CA: it needs one of its own (basicConstraints=CA:FALSE)",
        ),
        ("NotValidForName", "its certificate is for another name"),
        ("Expired", "its certificate has expired"),
        ("Connection refused", "nothing listens there"),
    ];
    let (_, advice) = known.iter().find(|(mark, _)| causes.contains(mark))?;
    Some(format!("{host}: {advice}"))
}

/// A bearer for the audience `infrar-control`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Bearer {
    /// A token for the audience infrar-control: `infrar token get`.
    #[arg(long, env = "INFRAR_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<SecretString>,
}

impl Bearer {
    /// The token.
    ///
    /// # Errors
    /// [`Usage`] says how to get one.
    pub(crate) fn secret(&self) -> Result<&SecretString, Usage> {
        self.token.as_ref().ok_or_else(|| {
            Usage::new(format!("the control plane answers whoever has a token; {GET_ONE}"))
        })
    }
}

/// What every command has that asks the control plane's API.
#[derive(Debug, clap::Args)]
pub(crate) struct Form {
    /// As JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(flatten)]
    pub(crate) bearer: Bearer,
}

/// Writes `text` and a line feed to stdout. Whoever stops reading (`| head`) is no fault.
///
/// # Errors
/// What the system says of any other.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

/// Text from elsewhere without the characters that steer a terminal.
pub(crate) fn tame(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// Rows under headings, in columns as wide as they must be.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = headings.map(|heading| heading.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String; N]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&headings.map(str::to_owned))];
    lines.extend(rows.iter().map(line));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_alone_with_commas_or_as_a_list_and_are_encrypted() {
        let two = ["https://a:7070/", "https://b/"];
        for text in ["https://a:7070,https://b", "[https://a:7070, \"https://b\"]"] {
            let Replicas(urls) = text.parse().unwrap();
            assert_eq!(urls.iter().map(Url::as_str).collect::<Vec<_>>(), two, "{text}");
        }
        for local in ["http://127.0.0.1:7070", "http://localhost:7070", "http://[::1]:7070"] {
            assert!(local.parse::<Replicas>().is_ok(), "{local:?}");
        }
        for bad in ["", "control:7070", "ftp://a", "https://a,", "http://control.example:7070"] {
            assert!(bad.parse::<Replicas>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_libraries_say_becomes_advice() {
        for (said, advice) in [
            ("invalid HTTP version parsed", "h:1: it speaks TLS: write https://"),
            ("received corrupt message of type InvalidContentType", "does not speak TLS"),
            ("invalid peer certificate: UnknownIssuer", "give --ca-file"),
            ("tcp connect error: Connection refused (os error 111)", "nothing listens there"),
        ] {
            let told = unreached("h:1", &io::Error::other(io::Error::other(said))).unwrap();
            assert!(told.contains(advice), "{told}");
        }
        assert_eq!(unreached("h:1", &io::Error::other("something else")), None);
    }

    #[test]
    fn columns_line_up_and_nothing_steers_the_terminal() {
        let rows = [["a".to_owned(), "x".to_owned()], ["longer".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "B"], &rows), "NAME    B\na       x\nlonger");
        assert_eq!(tame("a\u{1b}[2Jb\u{9b}c\n"), "a\u{fffd}[2Jb\u{fffd}c\n");
    }
}
