//! A sidecar without a control plane: its project is a file.

use std::{fmt::Write as _, net::SocketAddr};

use super::{Folder, Infrar, Said, free_ports, get, talk, until};

/// A sidecar with its way out open.
pub(crate) struct Sidecar {
    pub(crate) infrar: Infrar,
    pub(crate) out: SocketAddr,
    pub(crate) admin: SocketAddr,
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
        let folder = Folder::new();
        let [out, admin] = free_ports();
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
                "service: web\nplace: aws_us_east_1\nproject: project.yaml\noutbound: {{ listen: '{out}' }}\n\
                 admin: {{ listen: '{admin}' }}\nlog: {{ format: json }}\n{keys}"
            ),
        );
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, out, admin, folder }
    }

    pub(crate) async fn says(&self, text: &str) -> Said {
        talk(self.out, text).await
    }

    /// The access log's line about `path`, once there is one.
    pub(crate) async fn line(&self, path: &str) -> String {
        let quoted = format!("\"path\":\"{path}\"");
        let found =
            || self.infrar.log().lines().find(|line| line.contains(&quoted)).map(str::to_owned);
        until("the log has the line", async || found().is_some()).await;
        found().expect("it was there")
    }

    /// The sum of all samples whose series begins with `series`.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let metrics = get(self.admin, &self.admin.to_string(), "/metrics").await;
        let samples = metrics.body.lines().filter(|line| line.starts_with(series));
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}
