//! `infrar proxies`: who serves which revision.

use super::reach::{Form, print, table, tame};
use crate::api::ProxyList;

/// Which proxies there are, and which revision each serves.
#[derive(Debug, clap::Args)]
pub(crate) struct Proxies {
    #[command(flatten)]
    form: Form,
}

impl Proxies {
    /// Asks and prints.
    ///
    /// # Errors
    /// Whatever keeps it from an answer.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let list = self.form.reach.client()?.proxies(self.form.bearer.secret()?).await;
        let list = self.form.reach.advised(list)?;
        let text =
            if self.form.json { serde_json::to_string_pretty(&list)? } else { listed(&list) };
        Ok(print(&tame(&text))?)
    }
}

fn listed(list: &ProxyList) -> String {
    let rows: Vec<_> = list
        .proxies
        .iter()
        .map(|row| {
            let behind = list.revision.saturating_sub(row.report.revision);
            [
                row.service.to_string(),
                row.report.role.clone(),
                row.report.place.as_ref().map(ToString::to_string).unwrap_or_default(),
                row.report.revision.to_string(),
                if behind == 0 { "current".to_owned() } else { format!("{behind} behind") },
                format!("{} s", row.seen_seconds_ago),
                row.report.version.clone(),
                row.instance.to_string(),
            ]
        })
        .collect();
    let headings = ["SERVICE", "ROLE", "PLACE", "REVISION", "", "HEARD OF", "RELEASE", "INSTANCE"];
    format!("revision in force: {}\n\n{}", list.revision, table(headings, &rows))
}
