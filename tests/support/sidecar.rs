//! A sidecar without a control plane: its project is a file.

use std::{fmt::Write as _, net::SocketAddr};

use super::{Folder, Infrar, Said, free_ports, get, talk, until};

/// A sidecar with its way out open.
pub(crate) struct Sidecar {
    pub(crate) infrar: Infrar,
    pub(crate) out: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) probes: SocketAddr,
    #[expect(dead_code, reason = "held for its Drop")]
    folder: Folder,
}

/// One service of the project: its name, its endpoints, and further keys.
pub(crate) type Service<'a> = (&'a str, &'a [SocketAddr], &'a str);

impl Sidecar {
    pub(crate) async fn open(services: &[Service<'_>]) -> Self {
        Self::with(services, "").await
    }

    /// With further keys of `proxy.yaml`.
    pub(crate) async fn with(services: &[Service<'_>], keys: &str) -> Self {
        Self::with_way_out(services, "", keys).await
    }

    /// With further keys of `outbound`, and of `proxy.yaml`.
    pub(crate) async fn with_way_out(services: &[Service<'_>], outbound: &str, keys: &str) -> Self {
        let folder = Folder::new();
        let [out, admin, probes] = free_ports();
        let mut project = "project: shop\nservices:\n".to_owned();
        let mut grants = String::new();
        for (name, endpoints, keys) in services {
            write!(project, "  {name}:\n    scopes: [use]\n{keys}    endpoints:\n")
                .expect("memory");
            for at in *endpoints {
                writeln!(
                    project,
                    "      - {{ url: 'http://{at}', provider: aws, region: us-east-1, auth_method: none }}"
                )
                .expect("memory");
            }
            writeln!(grants, "    {name}: [use]").expect("memory");
        }
        write!(project, "permissions:\n  web:\n{grants}").expect("memory");
        folder.write("project.yaml", &project);
        folder.write(
            "proxy.yaml",
            &format!(
                "service: web\nplace: aws_us_east_1\nproject: project.yaml\noutbound: {{ listen: '{out}'{outbound} }}\n\
                 admin: {{ listen: '{admin}', probes: '{probes}' }}\nlog: {{ format: json }}\n{keys}"
            ),
        );
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, out, admin, probes, folder }
    }

    pub(crate) async fn says(&self, text: &str) -> Said {
        talk(self.out, text).await
    }

    /// The value of the metric of that name whose labels have all of these.
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let said = get(self.admin, &self.admin.to_string(), "/metrics").await;
        let line = said.body.lines().find(|line| {
            line.starts_with(&format!("{name}{{")) && labels.iter().all(|it| line.contains(it))
        })?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// What the access log says of the request with this id.
    pub(crate) async fn line(&self, id: &str) -> String {
        let line = || {
            let log = self.infrar.log();
            log.lines().find(|line| line.contains(id)).map(str::to_owned)
        };
        until("the log has the line", async || line().is_some()).await;
        line().unwrap_or_default()
    }

    /// The access log's line about `path`, once there is one.
    pub(crate) async fn line_of_path(&self, path: &str) -> String {
        let quoted = format!("\"path\":\"{path}\"");
        let found =
            || self.infrar.log().lines().find(|line| line.contains(&quoted)).map(str::to_owned);
        until("the log has the line", async || found().is_some()).await;
        found().expect("it was there")
    }

    /// The sum of all samples whose series begins with `series`.
    pub(crate) async fn sum_of(&self, series: &str) -> f64 {
        let metrics = get(self.admin, &self.admin.to_string(), "/metrics").await;
        let samples = metrics.body.lines().filter(|line| line.starts_with(series));
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}
