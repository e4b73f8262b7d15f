//! The flags of a proxy: the few settings that are worth a flag of their own, and `--set` for every other.

use std::path::PathBuf;

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
        let mut pairs: Vec<_> = named
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value.clone()?)))
            .collect();
        pairs.extend(self.set.iter().cloned());
        pairs
    }
}
