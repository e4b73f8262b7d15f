//! Other people's clients and servers, through the real binary: a control plane, a caller's sidecar and a callee's.
//!
//! Nothing here is ours but the proxies between: curl, Python's requests, httpx, aiohttp, grpcio and websockets call; aiohttp,
//! grpcio and nginx answer; h2load loads, promtool reads, and schemathesis asks the control plane everything that its document says. `scripts/foreign-clients.sh` brings them all. A story whose client is missing
//! says so and is skipped; under `CI=true` it fails instead.
#![expect(clippy::expect_used, clippy::panic, reason = "the helpers of a test may fail it")]

use std::{
    ffi::{OsStr, OsString},
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    time::{interval, timeout},
};

/// Long enough for a debug build on a busy machine; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test]
async fn requests_calls_by_name_with_nothing_but_http_proxy() {
    let Some(shop) = Shop::open(App::Http).await else { return };
    shop.tell("requests_client.py").await;
}

#[tokio::test]
async fn httpx_streams_both_ways_and_speaks_http2_to_the_port() {
    let Some(shop) = Shop::open(App::Http).await else { return };
    shop.tell("httpx_client.py").await;
}

#[tokio::test]
async fn aiohttp_sends_hundreds_of_requests_at_once() {
    let Some(shop) = Shop::open(App::Http).await else { return };
    shop.tell("aiohttp_client.py").await;
}

#[tokio::test]
async fn a_websocket_is_upgraded_through_both_proxies() {
    let Some(shop) = Shop::open(App::Http).await else { return };
    shop.tell("websockets_client.py").await;
}

#[tokio::test]
async fn grpc_streams_both_ways_and_keeps_its_statuses() {
    let Some(shop) = Shop::open(App::Grpc).await else { return };
    shop.tell("grpc_client.py").await;
}

#[tokio::test]
async fn curl_reaches_the_service_in_every_way_the_port_understands() {
    let Some(curl) = program("curl") else { return };
    let Some(shop) = Shop::open(App::Http).await else { return };
    let (outbound, port) = (format!("http://{}", shop.outbound), format!("http://{}", shop.port));
    let proxy = ["--proxy", &outbound];
    let named = ["--header", "host: data-intelligence"];
    let answer = async |arguments: &[&[&str]]| shop.curl(&curl, arguments).await;

    let said = answer(&[&proxy, &["http://data-intelligence/query?by=proxy"]]).await;
    assert!(said.contains(r#""target": "/query?by=proxy""#), "{said}");
    let said = answer(&[&named, &[&format!("{outbound}/query?by=host")]]).await;
    assert!(said.contains(r#""target": "/query?by=host""#), "{said}");
    let said = answer(&[&["--data", "12345"], &[&format!("{port}/query?by=port")]]).await;
    assert!(
        said.contains(r#""target": "/query?by=port""#) && said.contains(r#""length": 5"#),
        "{said}"
    );
    let said =
        answer(&[&named, &["--http2-prior-knowledge", &format!("{outbound}/query?by=h2")]]).await;
    assert!(said.contains(r#""target": "/query?by=h2""#), "{said}");
    let said = answer(&[&named, &["--head", &format!("{outbound}/query")]]).await;
    assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
}

#[tokio::test]
async fn curl_speaks_tls_with_the_endpoint_itself_through_a_connect_tunnel() {
    let Some(curl) = program("curl") else { return };
    let Some(shop) = Shop::open(App::Http).await else { return };
    let outbound = format!("http://{}", shop.outbound);
    let ca = shop.path("ca.pem");
    let tunnel = ["--proxytunnel", "--proxy", &outbound, "--cacert", &ca];

    // What is public needs no token; what is not is refused by the callee's proxy, for the tunnel puts none on.
    assert_eq!(shop.curl(&curl, &[&tunnel, &["https://data-intelligence/healthz"]]).await, "fine");
    let refused = shop.curl(&curl, &[&tunnel, &["https://data-intelligence/query"]]).await;
    assert!(refused.contains(r#""code":"token-missing""#), "{refused}");
    // A tunnel to anywhere else is none.
    let code = ["--output", "/dev/null", "--write-out", "%{http_connect}"];
    let output = output(
        Command::new(&curl)
            .args(["--silent", "--proxytunnel", "--proxy", &outbound])
            .args(code)
            .arg("https://elsewhere.example/"),
    )
    .await;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "403");
}

#[tokio::test]
async fn curl_waits_for_100_continue_before_it_uploads() {
    let Some(curl) = program("curl") else { return };
    let Some(shop) = Shop::open(App::Http).await else { return };
    let upload = shop.path("upload");
    fs::write(&upload, vec![b'u'; 3_000_000]).expect("a writable folder");
    let output = output(
        Command::new(&curl)
            .args([
                "--silent",
                "--verbose",
                "--expect100-timeout",
                "30",
                "--header",
                "expect: 100-continue",
            ])
            .args(["--proxy", &format!("http://{}", shop.outbound), "--upload-file", &upload])
            .arg("http://data-intelligence/query"),
    )
    .await;
    let (said, heard) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(r#""length": 3000000"#), "{said}\n{heard}");
    assert!(heard.contains("< HTTP/1.1 100 "), "{heard}");
}

#[tokio::test]
async fn nginx_answers_over_http2_and_over_http1_as_the_project_says() {
    let (Some(nginx), Some(curl)) = (program("nginx"), program("curl")) else { return };
    let Some(mut shop) = Shop::open(App::Http).await else { return };
    shop.nginx(&nginx).await;
    let asked = format!("http://{}", shop.outbound);

    let said = shop.curl(&curl, &[&["--proxy", &asked, "http://reports/"]]).await;
    assert_eq!(said, format!("HTTP/2.0 {}\n", shop.nginx));
    let said = shop.curl(&curl, &[&["--proxy", &asked, "http://archive/"]]).await;
    assert_eq!(said, format!("HTTP/1.1 {}\n", shop.nginx.replace("localhost", "127.0.0.1")));
    for name in ["reports", "archive"] {
        let size = ["--output", "/dev/null", "--write-out", "%{size_download}"];
        let size =
            shop.curl(&curl, &[&size, &["--proxy", &asked, &format!("http://{name}/large")]]).await;
        assert_eq!(size, "8000000", "{name}");
    }
}

#[tokio::test]
async fn h2load_keeps_many_streams_open_and_none_fails() {
    let Some(h2load) = program("h2load") else { return };
    let Some(shop) = Shop::open(App::Http).await else { return };
    let output = output(
        Command::new(h2load)
            .args([
                "-n",
                "3000",
                "-c",
                "4",
                "-m",
                "25",
                "--header",
                ":authority: data-intelligence",
            ])
            .arg(format!("http://{}/query", shop.outbound)),
    )
    .await;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("3000 succeeded, 0 failed, 0 errored, 0 timeout"),
        "{said}\n{}",
        shop.logs()
    );
    assert!(said.contains("status codes: 3000 2xx, 0 3xx, 0 4xx, 0 5xx"), "{said}");
}

#[tokio::test]
async fn promtool_finds_nothing_to_mend_in_the_metrics() {
    let (Some(promtool), Some(curl)) = (program("promtool"), program("curl")) else { return };
    let Some(shop) = Shop::open(App::Http).await else { return };
    let outbound = format!("http://{}", shop.outbound);
    shop.curl(&curl, &[&["--proxy", &outbound, "http://data-intelligence/query"]]).await;
    shop.curl(&curl, &[&["--proxy", &outbound, "http://nowhere/"]]).await;
    let metrics = shop.curl(&curl, &[&[&format!("http://{}/metrics", shop.admin)]]).await;
    assert!(metrics.contains("infrar_requests_total{"), "{metrics}");

    let mut check = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("promtool starts");
    let mut stdin = check.stdin.take().expect("its input is piped");
    stdin.write_all(metrics.as_bytes()).await.expect("promtool reads");
    drop(stdin);
    let output =
        timeout(PATIENCE, check.wait_with_output()).await.expect("in time").expect("ended");
    let said = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success() && said.is_empty(),
        "{}\n{metrics}",
        String::from_utf8_lossy(&said)
    );
}

#[tokio::test]
async fn schemathesis_finds_the_control_plane_to_be_what_its_document_says() {
    let Some(python) = foreign_python() else { return };
    let [listen] = free_ports();
    let mut shop = Shop {
        folder: tempfile::tempdir().expect("a temporary folder"),
        python,
        outbound: listen,
        port: listen,
        admin: listen,
        nginx: "localhost:1".to_owned(),
        running: Vec::new(),
    };
    shop.write("secrets/web-application", "the caller's secret\n");
    shop.write("secrets/data-intelligence", "the callee's secret\n");
    shop.write("project.yaml", &project(listen, "localhost:1"));
    let (project, data, listen) =
        (shop.path("project.yaml"), shop.path("control"), listen.to_string());
    // Nobody asks so often; that it is refused then is told by tests/api.rs.
    let rates = ["--read-rate", "0", "--write-rate", "0"];
    let arguments = ["control", "--project", &project, "--listen", &listen, "--data-dir", &data];
    shop.infrar("control", &[&arguments[..], &rates[..]].concat());
    shop.ready(shop.admin).await;

    // It says so after it listens.
    let log = shop.path("control.log");
    let told = || fs::read_to_string(&log).unwrap_or_default();
    shop.until("the first admin is told", async || told().contains("infrar token get")).await;
    let told = told();
    let secret = told.lines().find_map(|line| line.trim().strip_prefix("client_secret"));
    shop.write("admin", secret.expect("the first admin credential").trim());
    let url = format!("http://{listen}");
    let token = output(
        Command::new(env!("CARGO_BIN_EXE_infrar"))
            .args(["token", "get", "--control", &url, "--client-id", "infrar-admin"])
            .args(["--client-secret-file", &shop.path("admin")]),
    )
    .await;
    let token = String::from_utf8(token.stdout).expect("text");
    assert!(!token.trim().is_empty(), "no token\n{}", shop.logs());

    let output = output(
        Command::new(shop.python.with_file_name("schemathesis"))
            .current_dir(shop.folder.path())
            .arg("--config-file")
            .arg(repository().join("tests/foreign/schemathesis.toml"))
            .args(["run", &format!("{url}/openapi.json"), "--url", &url, "--no-color"])
            // It knows this header again by this spelling alone.
            .args(["--header", &format!("Authorization: Bearer {}", token.trim())]),
    )
    .await;
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        shop.logs()
    );
}

/// Which service stands behind the callee's sidecar.
#[derive(Clone, Copy)]
enum App {
    Http,
    Grpc,
}

/// A project of one caller and one callee, each behind its sidecar, and the control plane; all processes of their own,
/// ended by their ids when the shop is dropped.
struct Shop {
    folder: TempDir,
    python: PathBuf,
    /// The caller's outbound port, by name.
    outbound: SocketAddr,
    /// The caller's port for `data-intelligence` alone.
    port: SocketAddr,
    /// The caller's admin API.
    admin: SocketAddr,
    /// Where `reports` and `archive` are said to be.
    nginx: String,
    running: Vec<Child>,
}

impl Shop {
    /// Everything started and ready, or nothing where there is no Python with the foreign clients.
    async fn open(app: App) -> Option<Self> {
        let python = foreign_python()?;
        let [control, inbound, outbound, port, admin, callee_admin, nginx] = free_ports();
        let mut shop = Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
            python,
            outbound,
            port,
            admin,
            nginx: format!("localhost:{}", nginx.port()),
            running: Vec::new(),
        };
        shop.write_certificates();
        let script = match app {
            App::Http => "app.py",
            App::Grpc => "grpc_app.py",
        };
        let app = shop.start_app(script).await;
        shop.write("secrets/web-application", "the caller's secret\n");
        shop.write("secrets/data-intelligence", "the callee's secret\n");
        shop.write("project.yaml", &project(inbound, &shop.nginx));
        shop.write("caller.yaml", &caller(control, outbound, port, admin));
        shop.write("callee.yaml", &callee(control, inbound, app, callee_admin));

        let (project, data) = (shop.path("project.yaml"), shop.path("control"));
        let listen = control.to_string();
        shop.infrar(
            "control",
            &["control", "--project", &project, "--listen", &listen, "--data-dir", &data],
        );
        shop.ready(control).await;
        for (name, admin) in [("callee", callee_admin), ("caller", admin)] {
            let config = shop.path(&format!("{name}.yaml"));
            shop.infrar(name, &["proxy", "--config", &config]);
            shop.ready(admin).await;
        }
        Some(shop)
    }

    /// Runs one Python client to its end; it must have told its whole story.
    async fn tell(&self, script: &str) {
        let proxy = format!("http://{}", self.outbound);
        let output = output(
            Command::new(&self.python)
                .arg(repository().join("tests/foreign").join(script))
                .env("HTTP_PROXY", &proxy)
                .env("http_proxy", &proxy)
                .env("OUTBOUND", self.outbound.to_string())
                .env("OUTBOUND_PORT", self.port.to_string()),
        )
        .await;
        assert!(
            output.status.success() && output.stdout.ends_with(b"told\n"),
            "{script}: {}\n{}{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.logs()
        );
    }

    /// What curl prints; it must have had an answer, whatever its status.
    async fn curl(&self, curl: &Path, arguments: &[&[&str]]) -> String {
        let output =
            output(Command::new(curl).args(["--silent", "--show-error"]).args(arguments.concat()))
                .await;
        assert!(
            output.status.success(),
            "curl {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.logs()
        );
        String::from_utf8(output.stdout).expect("text")
    }

    fn infrar(&mut self, name: &str, arguments: &[&str]) {
        let log = fs::File::create(self.path(&format!("{name}.log"))).expect("a writable folder");
        self.run(
            Command::new(env!("CARGO_BIN_EXE_infrar"))
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("a second handle"))
                .stderr(log),
        );
    }

    async fn start_app(&mut self, script: &str) -> SocketAddr {
        let log = fs::File::create(self.path("app.log")).expect("a writable folder");
        let script = repository().join("tests/foreign").join(script);
        let mut command = Command::new(&self.python);
        // The app ends when its input does, which is when the shop is dropped.
        self.run(command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log));
        let stdout = self.running.last_mut().and_then(|app| app.stdout.take()).expect("piped");
        let mut lines = BufReader::new(stdout).lines();
        let line = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("readable");
        let line = line.unwrap_or_else(|| panic!("the app did not start\n{}", self.logs()));
        let port = line.strip_prefix("listening ").and_then(|port| port.parse().ok());
        SocketAddr::from((Ipv4Addr::LOCALHOST, port.expect("its port")))
    }

    async fn nginx(&mut self, nginx: &Path) {
        let folder = self.folder.path().display().to_string();
        fs::write(self.folder.path().join("large"), vec![b'n'; 8_000_000])
            .expect("a writable folder");
        self.write(
            "nginx.conf",
            &format!(
                "daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
                events {{ }}
                http {{
                  access_log off; default_type text/plain; client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2;
                  fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
                  ssl_certificate {folder}/leaf.pem; ssl_certificate_key {folder}/leaf.key; ssl_protocols TLSv1.3;
                  server {{
                    listen 127.0.0.1:{port} ssl http2;
                    location = /large {{ root {folder}; }}
                    location / {{ return 200 \"$server_protocol $http_host\\n\"; }}
                  }}
                }}",
                port = self.nginx.trim_start_matches("localhost:")
            ),
        );
        let configuration = self.path("nginx.conf");
        let log = self.path("nginx.log");
        self.run(Command::new(nginx).args(["-e", &log, "-c", &configuration]).stdin(Stdio::null()));
        let address = SocketAddr::from((
            Ipv4Addr::LOCALHOST,
            self.nginx.trim_start_matches("localhost:").parse().expect("a port"),
        ));
        self.until("nginx listens", async || TcpStream::connect(address).await.is_ok()).await;
    }

    fn run(&mut self, command: &mut Command) {
        for name in ["HTTP_PROXY", "http_proxy", "CI"] {
            command.env_remove(name);
        }
        self.running.push(command.kill_on_drop(true).spawn().expect("the program starts"));
    }

    async fn ready(&mut self, address: SocketAddr) {
        self.until(&format!("{address} is ready"), async || is_ready(address).await).await;
    }

    /// Asks until it is so; gives up when a process has ended or patience has.
    async fn until(&mut self, what: &str, so: impl AsyncFn() -> bool) {
        let asked = async {
            let mut again = interval(Duration::from_millis(20));
            loop {
                again.tick().await;
                if so().await {
                    return;
                }
                if let Some(status) =
                    self.running.iter_mut().find_map(|child| child.try_wait().ok()?)
                {
                    panic!(
                        "before {what}: a process ended with {status}\n{}",
                        logs(self.folder.path())
                    );
                }
            }
        };
        if timeout(PATIENCE, asked).await.is_err() {
            panic!("waited in vain until {what}\n{}", self.logs());
        }
    }

    fn write_certificates(&self) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A name of its own: to OpenSSL a leaf whose issuer has the leaf's name is self-signed.
        params.distinguished_name.push(DnType::CommonName, "the shop's CA");
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key"))
            .expect("a CA");
        let names = ["localhost", "127.0.0.1", "data-intelligence"].map(str::to_owned);
        let key = KeyPair::generate().expect("a key");
        let leaf =
            CertificateParams::new(names).expect("names").signed_by(&key, &ca).expect("a leaf");
        self.write("ca.pem", &ca.pem());
        self.write("leaf.pem", &leaf.pem());
        self.write("leaf.key", &key.serialize_pem());
    }

    fn write(&self, name: &str, content: &str) {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().expect("inside the folder")).expect("a writable folder");
        fs::write(&path, content).expect("a writable folder");
        restrict(&path);
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn logs(&self) -> String {
        logs(self.folder.path())
    }
}

/// The project: the callee in another cloud than its caller, and two services that nginx answers.
fn project(inbound: SocketAddr, nginx: &str) -> String {
    format!(
        "project: shop
services:
  data-intelligence:
    endpoints: [{{ url: 'https://localhost:{}', provider: azure, region: eastus }}]
    scopes: [read:data, write:query]
  reports:
    endpoints: [{{ url: 'https://{nginx}', provider: gcp, region: us-central1, auth_method: none }}]
    scopes: [read:reports]
    protocol: h2
  archive:
    endpoints: [{{ url: 'https://127.0.0.1:{port}', provider: gcp, region: us-central1, auth_method: none }}]
    scopes: [read:reports]
    protocol: h1
permissions:
  web-application:
    data-intelligence: [read:data, write:query]
    reports: [read:reports]
    archive: [read:reports]
identities:
  web-application: {{ client_secret_file: secrets/web-application }}
  data-intelligence: {{ client_secret_file: secrets/data-intelligence }}
",
        inbound.port(),
        port = nginx.trim_start_matches("localhost:"),
    )
}

fn caller(
    control: SocketAddr,
    outbound: SocketAddr,
    port: SocketAddr,
    admin: SocketAddr,
) -> String {
    format!(
        "role: sidecar
service: web-application
place: aws_us_east_1
control:
  url: http://{control}
  credential: {{ client_secret_file: secrets/web-application }}
  state_dir: caller-state
outbound:
  listen: {outbound}
  ports: {{ data-intelligence: '{port}' }}
admin: {{ listen: '{admin}' }}
trust: {{ ca_file: ca.pem }}
log: {{ format: json }}
"
    )
}

fn callee(control: SocketAddr, inbound: SocketAddr, app: SocketAddr, admin: SocketAddr) -> String {
    format!(
        "role: sidecar
service: data-intelligence
place: azure_eastus
control:
  url: http://{control}
  credential: {{ client_secret_file: secrets/data-intelligence }}
  state_dir: callee-state
inbound:
  listen: {inbound}
  app: http://{app}
  tls: {{ cert_file: leaf.pem, key_file: leaf.key }}
  rules:
    - {{ path: /healthz, public: true }}
    - {{ path: /*, scopes: [write:query] }}
admin: {{ listen: '{admin}' }}
log: {{ format: json }}
"
    )
}

/// Whether `/readyz` says 200.
async fn is_ready(address: SocketAddr) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    asked.await.is_ok_and(|answer| answer.ends_with(b" 200"))
}

/// Loopback addresses that are free at the moment of asking, all different. They lie below the ports that the kernel gives
/// to clients, so that no outgoing connection of a busy machine takes one meanwhile.
fn free_ports<const N: usize>() -> [SocketAddr; N] {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(10_000..32_000)));
    let free = || (0..1000).find_map(|_| bind().ok()).expect("a free port");
    let held: [TcpListener; N] = std::array::from_fn(|_| free());
    held.map(|listener| listener.local_addr().expect("bound"))
}

async fn output(command: &mut Command) -> Output {
    for name in ["NO_PROXY", "no_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        command.env_remove(name);
    }
    let running = command.stdin(Stdio::null()).kill_on_drop(true).output();
    timeout(PATIENCE, running).await.expect("it ends in time").expect("the program starts")
}

fn foreign_python() -> Option<PathBuf> {
    let python = repository().join("target/foreign/bin/python");
    if python.exists() {
        return Some(python);
    }
    missing("the Python clients are not installed: run scripts/foreign-clients.sh")
}

fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin"));
    let found = std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    found.or_else(|| missing(&format!("{name} is not installed: run scripts/foreign-clients.sh")))
}

fn missing<T>(what: &str) -> Option<T> {
    assert_ne!(std::env::var_os("CI").as_deref(), Some(OsStr::new("true")), "{what}");
    eprintln!("skipped: {what}");
    None
}

/// The end of each log, for the one who has to find out what went wrong.
fn logs(folder: &Path) -> String {
    let ends = ["app", "control", "callee", "caller", "nginx"].map(|name| {
        let log = fs::read_to_string(folder.join(format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let end = lines
            .iter()
            .skip(lines.len().saturating_sub(25))
            .copied()
            .collect::<Vec<_>>()
            .join("\n");
        format!("--- {name}\n{end}")
    });
    ends.join("\n")
}

/// Secrets are for their owner alone, as the proxy asks.
fn restrict(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("our own file");
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
