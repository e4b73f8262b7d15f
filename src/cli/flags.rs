//! The flags of a proxy: the few settings that are worth a flag of their own, and `--set` for every other.

use std::{net::SocketAddr, path::PathBuf};

use url::Url;

use crate::{config, telemetry::Format};

/// Settings of a proxy on the command line; they beat the environment, which beats the file.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct ProxyFlags {
    /// The settings; without a file the environment (`INFRAR_…`) says everything.
    #[arg(long, env = "INFRAR_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Who this proxy speaks for.
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Where it runs: `aws_us_east_1`.
    #[arg(long, value_name = "PLACE")]
    place: Option<String>,
    /// `sidecar`, `edge` or `dev`.
    #[arg(long, value_name = "ROLE")]
    role: Option<String>,
    /// The control plane's address.
    #[arg(long, value_name = "URL")]
    control: Option<String>,
    /// Any other setting by its path: `--set outbound.listen=127.0.0.1:15001`.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,
    /// What `--log-format` says, which every command has.
    #[arg(skip)]
    pub(crate) log_format: Option<Format>,
}

/// Where something listens; the system's own words for what is no address give no example.
pub(crate) fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_no_address| "write ADDRESS:PORT, such as 127.0.0.1:7070".to_owned())
}

/// The address that others know something by.
pub(crate) fn public_url(text: &str) -> Result<Url, String> {
    let url = text.parse::<Url>().ok().filter(Url::has_host);
    url.ok_or_else(|| "write https://HOST:PORT, such as https://control.example:7070".to_owned())
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once('=').ok_or("write KEY=VALUE, such as outbound.listen=127.0.0.1:15001")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl ProxyFlags {
    /// The flags as paths and values.
    pub(crate) fn pairs(&self) -> Vec<(String, String)> {
        let named = [
            ("service", &self.service),
            ("place", &self.place),
            ("role", &self.role),
            ("control.url", &self.control),
        ];
        // First, so that `--set log.format=…` has the last word.
        let mut pairs: Vec<_> = self.log_format.map(log_format).into_iter().collect();
        pairs.extend(
            named.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?))),
        );
        pairs.extend(self.set.iter().cloned());
        pairs
    }

    /// The form of log lines that the settings come to, before they are checked.
    pub(crate) fn resolved_log_format(&self) -> Format {
        let environment = config::environment().into_iter();
        let format = config::log_format(self.config.as_deref(), environment, &self.pairs());
        super::settings::format(format)
    }
}

/// The form of log lines as a setting.
pub(crate) fn log_format(format: Format) -> (String, String) {
    let word = match format {
        Format::Auto => "auto",
        Format::Text => "text",
        Format::Json => "json",
    };
    ("log.format".to_owned(), word.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;
    use crate::config::LogFormat;

    #[derive(Debug, Parser)]
    struct Alone {
        #[command(flatten)]
        flags: ProxyFlags,
    }

    #[test]
    fn one_form_holds_for_all_log_lines_flag_before_environment_before_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("proxy.yaml");
        // With a fault in it: the log must know its form before it says so.
        fs::write(&file, "servise: web\nlog: { format: json }\n").unwrap();
        let variable = ("INFRAR_LOG_FORMAT".to_owned(), "text".to_owned());
        let resolved = |variable: Option<&(String, String)>, format, set: &[&str]| {
            let mut flags = Alone::parse_from(["proxy"].iter().chain(set)).flags;
            flags.log_format = format;
            config::log_format(Some(&file), variable.into_iter().cloned(), &flags.pairs())
        };
        assert_eq!(resolved(None, None, &[]), LogFormat::Json);
        assert_eq!(resolved(Some(&variable), None, &[]), LogFormat::Text);
        assert_eq!(resolved(Some(&variable), Some(Format::Json), &[]), LogFormat::Json);
        let set = ["--set", "log.format=auto"];
        assert_eq!(resolved(Some(&variable), Some(Format::Json), &set), LogFormat::Auto);
    }
}
