//! What the demonstration shows: three services in three simulated clouds, and the texts that describe them.
//!
//! The files are those that a real project has, so that whoever looks into the demonstration's folder sees how to
//! begin. Every cloud is this machine; what tells them apart are ports and names under `.localhost`.

use std::{fmt::Write, net::SocketAddr, path::Path, time::Duration};

/// One service of the demonstration, before it has ports.
pub(crate) struct Cast {
    /// Its logical name.
    pub(crate) service: &'static str,
    provider: &'static str,
    region: &'static str,
    /// Host of its `url`, and the name in its certificate.
    pub(crate) host: &'static str,
    scopes: &'static str,
    rules: &'static str,
}

/// The three services.
pub(crate) const CAST: [Cast; 3] = [
    Cast {
        service: "web-application",
        provider: "aws",
        region: "us-east-1",
        host: "web-application.aws.localhost",
        scopes: "[read:pages]",
        rules: "    - { path: /healthz, public: true }
    - { methods: [GET], path: /, scopes: [read:pages] }
",
    },
    Cast {
        service: "data-intelligence",
        provider: "azure",
        region: "eastus",
        host: "data-intelligence.azure.localhost",
        scopes: "[read:data, write:query, write:data]",
        rules: "    - { path: /healthz, public: true }
    - { methods: [POST], path: /query, scopes: [write:query] }
    - { methods: [POST], path: /data, scopes: [write:data] }
    - { methods: [GET], path: /stream, scopes: [read:data] }
",
    },
    Cast {
        service: "background-workers",
        provider: "gcp",
        region: "us-central1",
        host: "background-workers.gcp.localhost",
        scopes: "[run:jobs]",
        rules: "    - { path: /healthz, public: true }
    - { methods: [POST], path: /run, scopes: [run:jobs] }
",
    },
];

impl Cast {
    /// Where it runs, as configurations write it: `aws_us_east_1`.
    pub(crate) fn place(&self) -> String {
        format!("{}_{}", self.provider, self.region.replace('-', "_"))
    }
}

/// The ports of one service and of the sidecar beside it, all on loopback.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    /// The application.
    pub(crate) app: SocketAddr,
    /// The sidecar's outbound listener.
    pub(crate) outbound: SocketAddr,
    /// The sidecar's inbound listener.
    pub(crate) inbound: SocketAddr,
    /// The sidecar's admin API.
    pub(crate) admin: SocketAddr,
}

/// The demonstration with its ports.
pub(crate) struct Scene<'a> {
    /// Where its files are.
    pub(crate) folder: &'a Path,
    /// The control plane.
    pub(crate) control: SocketAddr,
    /// In the order of [`CAST`].
    pub(crate) ports: [Ports; 3],
}

impl Scene<'_> {
    /// `project.yaml`.
    pub(crate) fn project(&self) -> String {
        let mut services = String::new();
        let mut identities = String::new();
        for (cast, ports) in CAST.iter().zip(&self.ports) {
            let Cast { service, provider, region, host, scopes, .. } = cast;
            let port = ports.inbound.port();
            append(
                &mut services,
                format_args!(
                    "  {service}:
    endpoints:
      - {{ url: \"https://{host}:{port}\", provider: {provider}, region: {region} }}
    scopes: {scopes}
"
                ),
            );
            append(
                &mut identities,
                format_args!("  {service}: {{ client_secret_file: secrets/{service} }}\n"),
            );
        }
        format!(
            "project: demo
multi_cloud:
  networking_mode: public
services:
{services}permissions:                       # what is not listed is refused
  web-application:
    data-intelligence: [read:data, write:query]
  background-workers:
    data-intelligence: [write:data]
identities:
{identities}"
        )
    }

    /// `proxy.yaml` of the sidecar beside one service.
    pub(crate) fn proxy(&self, cast: &Cast, ports: &Ports) -> String {
        let Cast { service, rules, .. } = cast;
        let Ports { app, outbound, inbound, admin } = ports;
        let place = cast.place();
        let control = self.control;
        let secret = quoted(&self.folder.join("secrets").join(service));
        let state = quoted(&self.folder.join("state").join(service));
        let tls = self.folder.join("tls");
        let certificate = quoted(&tls.join(format!("{service}.crt")));
        let key = quoted(&tls.join(format!("{service}.key")));
        let ca = quoted(&tls.join("ca.pem"));
        format!(
            "role: sidecar
service: {service}
place: {place}
control:
  url: \"http://{control}\"
  credential: {{ client_secret_file: {secret} }}
  state_dir: {state}
outbound:
  listen: \"{outbound}\"
inbound:
  listen: \"{inbound}\"
  app: \"http://{app}\"
  tls: {{ cert_file: {certificate}, key_file: {key} }}
  rules:
{rules}admin: {{ listen: \"{admin}\" }}
trust: {{ ca_file: {ca} }}
shutdown: {{ grace: 0s, deadline: 5s }}
log: {{ access: false }}
workers: 1
"
        )
    }

    /// What to paste into another terminal, each with what it shows.
    pub(crate) fn invitations(&self) -> String {
        let [web, data, _] = &self.ports;
        let [_, callee, _] = &CAST;
        let by_name = format!("curl -x http://{}", web.outbound);
        let mut text = String::new();
        for (shows, command) in [
            (
                "A call by name, from AWS to Azure: balanced, with a token, over TLS 1.3",
                format!("{by_name} http://data-intelligence/query -d '{{\"top\":2}}'"),
            ),
            (
                "The same without proxy settings: the name is in the Host",
                format!(
                    "curl -H 'Host: data-intelligence' http://{}/query -d '{{\"top\":2}}'",
                    web.outbound
                ),
            ),
            (
                "Bodies stream: five lines, one after the other",
                format!("{by_name} -N http://data-intelligence/stream"),
            ),
            (
                "403 scope-missing: web-application may query, not write",
                format!("{by_name} -i http://data-intelligence/data -d '{{}}'"),
            ),
            (
                "403 not-permitted: nobody granted this call",
                format!("{by_name} -i http://background-workers/run -d '{{}}'"),
            ),
            (
                "404 unknown-service: with the nearest name that there is",
                format!("{by_name} -i http://data-inteligence/query"),
            ),
            (
                "401 token-missing: past the sidecar, without a token",
                format!(
                    "curl -i -X POST --cacert {}/tls/ca.pem https://{}:{}/query",
                    self.folder.display(),
                    callee.host,
                    data.inbound.port()
                ),
            ),
            (
                "What this sidecar knows of the project",
                format!("curl http://{}/v1/snapshot", web.admin),
            ),
            ("The same as metrics", format!("curl http://{}/metrics", web.admin)),
            (
                "The page that needs all this, as its visitors see it",
                format!("curl http://{}/", web.app),
            ),
        ] {
            append(&mut text, format_args!("  # {shows}\n  {command}\n"));
        }
        text
    }

    /// What runs where.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let head = ("service", "place", "application", "outbound", "inbound (TLS)", "admin");
        append(&mut text, format_args!("{}", row(head)));
        for (cast, ports) in CAST.iter().zip(&self.ports) {
            let place = cast.place();
            let [app, outbound, inbound, admin] =
                [ports.app, ports.outbound, ports.inbound, ports.admin].map(|it| it.to_string());
            append(
                &mut text,
                format_args!("{}", row((cast.service, &place, &app, &outbound, &inbound, &admin))),
            );
        }
        append(&mut text, format_args!("  control plane at http://{}\n", self.control));
        append(&mut text, format_args!("  its files in {}\n", self.folder.display()));
        text
    }
}

fn row(cells: (&str, &str, &str, &str, &str, &str)) -> String {
    let (service, place, app, outbound, inbound, admin) = cells;
    format!("  {service:<19}{place:<17}{app:<17}{outbound:<17}{inbound:<17}{admin}\n")
}

/// A path as YAML: what JSON makes of a text is a YAML scalar too.
fn quoted(path: &Path) -> String {
    serde_json::Value::from(path.display().to_string()).to_string()
}

/// One call of the live traffic.
#[derive(Debug)]
pub(crate) struct Call {
    /// Index into [`CAST`].
    pub(crate) caller: usize,
    /// Index into [`CAST`].
    pub(crate) callee: usize,
    /// Method and path.
    pub(crate) asked: &'static str,
    /// The status, with the code of a refusal; or why nothing came back.
    pub(crate) answer: String,
    /// How long it took.
    pub(crate) took: Duration,
}

impl Call {
    /// The call as one line.
    pub(crate) fn line(&self, at: jiff::civil::Time) -> String {
        let side = |index: usize| {
            CAST.get(index)
                .map_or_else(String::new, |it| format!("{} ({})", it.service, it.place()))
        };
        let tenths = self.took.as_micros() / 100;
        format!(
            "{} {:<37} → {:<35} {:<12} {:<6} {}.{} ms",
            at.strftime("%H:%M:%S"),
            side(self.caller),
            side(self.callee),
            self.asked,
            self.answer,
            tenths / 10,
            tenths % 10,
        )
    }
}

/// Writing into a `String` cannot fail.
fn append(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    let _infallible = text.write_fmt(arguments);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene(folder: &Path) -> Scene<'_> {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let ports = |first| Ports {
            app: address(first),
            outbound: address(first + 1),
            inbound: address(first + 2),
            admin: address(first + 3),
        };
        Scene { folder, control: address(7), ports: [ports(100), ports(200), ports(300)] }
    }

    #[test]
    fn the_lines_to_paste_go_through_the_sidecar_of_the_caller() {
        let text = scene(Path::new("/tmp/demo")).invitations();
        assert!(
            text.contains("curl -x http://127.0.0.1:101 http://data-intelligence/query"),
            "{text}"
        );
        let direct = "--cacert /tmp/demo/tls/ca.pem https://data-intelligence.azure.localhost:202/";
        assert!(text.contains(direct), "{text}");
    }

    #[test]
    fn a_call_is_one_line_with_both_places() {
        let call = Call {
            caller: 0,
            callee: 1,
            asked: "POST /query",
            answer: "200".to_owned(),
            took: Duration::from_micros(3_187),
        };
        let line = call.line(jiff::civil::time(9, 5, 1, 0));
        let told: Vec<_> = line.split_whitespace().collect();
        assert_eq!(
            told,
            [
                "09:05:01",
                "web-application",
                "(aws_us_east_1)",
                "→",
                "data-intelligence",
                "(azure_eastus)",
                "POST",
                "/query",
                "200",
                "3.1",
                "ms"
            ]
        );
    }
}
