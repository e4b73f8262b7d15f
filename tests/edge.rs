//! Edges: one public listener for all services of a place, and the way out of a place for its sidecars.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use support::{Folder, Infrar, Line, Origin, Pair, Said, free_ports, get, header, talk, until};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Two clouds with an edge each: the caller in one, the callee and its app in the other.
struct Clouds {
    folder: Folder,
    control: SocketAddr,
    /// The caller's way out, directly.
    direct: SocketAddr,
    /// The way out of a second caller, which goes through its own cloud's edge.
    via: SocketAddr,
    /// The edge in front of the callee.
    edge: SocketAddr,
    app: Origin,
    processes: Vec<Infrar>,
    /// The admin APIs of the proxies, by name.
    admins: HashMap<&'static str, SocketAddr>,
    /// What stands behind a plaintext address of the edge's network; `None` on a machine without a network.
    plain: Option<Plain>,
}

impl Clouds {
    async fn open() -> Self {
        let folder = Folder::new();
        write_certificates(&folder);
        let [control, direct, via, edge, home, inbound] = free_ports();
        for name in ["web", "data", "azure-edge", "aws-edge"] {
            folder.write(&format!("secrets/{name}"), &format!("the secret of {name}\n"));
        }
        let app = Origin::plain("reached").await;
        let plain = Plain::open().await;
        let plain_url = plain
            .as_ref()
            .map_or_else(|| "http://192.0.2.1".to_owned(), |plain| format!("http://{}", plain.at));
        let identities: String = ["web", "data", "azure-edge", "aws-edge"]
            .map(|name| format!("  {name}: {{ client_secret_file: secrets/{name} }}\n"))
            .concat();
        folder.write(
            "project.yaml",
            &format!(
                "project: shop\nservices:\n  data:\n    scopes: [use]\n    endpoints: [{{ url: 'https://localhost:{}', \
                 private_url: 'https://{inbound}', provider: azure, region: eastus }}]\n  other:\n    scopes: [use]\n    \
                 endpoints: [{{ url: 'https://other.example', provider: azure, region: eastus }}]\n\
                 \x20 bare:\n    scopes: [use]\n    endpoints: [{{ url: 'https://bare.example', private_url: '{plain_url}', provider: azure, region: eastus, auth_method: none }}]\n\
                 permissions: {{ web: {{ data: [use], other: [use], bare: [use] }} }}\nidentities:\n{identities}",
                edge.port()
            ),
        );
        let tls = "tls: { cert_file: leaf.pem, key_file: leaf.key }";
        let mut processes = vec![Pair::start_control(&folder, control)];
        processes[0].ready(control).await;
        let settings = [
            (
                "azure-edge",
                "edge",
                "azure-edge",
                "azure_eastus",
                format!("inbound: {{ listen: '{edge}', {tls} }}\n"),
            ),
            (
                "aws-edge",
                "edge",
                "aws-edge",
                "aws_us_east_1",
                format!("inbound: {{ listen: '{home}', {tls} }}\n"),
            ),
            (
                "data",
                "sidecar",
                "data",
                "azure_eastus",
                format!("inbound: {{ listen: '{inbound}', app: 'http://{}', {tls} }}\n", app.at),
            ),
            (
                "direct",
                "sidecar",
                "web",
                "aws_us_east_1",
                format!("outbound: {{ listen: '{direct}' }}\n"),
            ),
            (
                "via",
                "sidecar",
                "web",
                "aws_us_east_1",
                format!(
                    "outbound: {{ listen: '{via}', via: 'https://localhost:{}' }}\n",
                    home.port()
                ),
            ),
        ];
        let mut admins = HashMap::new();
        for (name, role, service, place, keys) in settings {
            let [admin] = free_ports();
            folder.write(
                &format!("{name}.yaml"),
                &format!(
                    "role: {role}\nservice: {service}\nplace: {place}\ncontrol: {{ url: 'http://{control}', state_dir: {name}, \
                     credential: {{ client_secret_file: secrets/{service} }} }}\nadmin: {{ listen: '{admin}' }}\n\
                     trust: {{ ca_file: ca.pem }}\nlog: {{ format: json }}\n{keys}"
                ),
            );
            let mut proxy = Pair::start_proxy(&folder, name);
            proxy.ready(admin).await;
            processes.push(proxy);
            admins.insert(name, admin);
        }
        Self { folder, control, direct, via, edge, app, processes, admins, plain }
    }

    fn logs(&self) -> String {
        self.processes.iter().map(Infrar::log).collect::<Vec<_>>().join("\n---\n")
    }

    /// A token of the control plane's, as the caller gets it.
    async fn token(&self, audience: &str) -> String {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let secret = STANDARD.encode("web:the secret of web");
        let form = format!("grant_type=client_credentials&audience={audience}");
        let said = talk(
            self.control,
            format!(
                "POST /oauth2/token HTTP/1.1\r\nhost: control\r\nauthorization: Basic {secret}\r\nconnection: close\r\n\
                 content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\n\r\n{form}",
                form.len()
            ),
        )
        .await;
        let token =
            said.body.split("\"access_token\":\"").nth(1).and_then(|rest| rest.split('"').next());
        token.unwrap_or_else(|| panic!("no token: {said:?}")).to_owned()
    }

    /// The bytes that a proxy has counted on a path.
    async fn bytes(&self, proxy: &str, from: &str, to: &str, kind: &str) -> f64 {
        let admin = self.admins[proxy];
        let said = get(admin, &admin.to_string(), "/metrics").await;
        let labels = [
            format!("from=\"{from}\""),
            format!("to=\"{to}\""),
            format!("kind=\"{kind}\""),
            "callee=\"data\"".to_owned(),
        ];
        let rows = said.body.lines().filter(|line| {
            line.starts_with("infrar_egress_bytes_total{")
                && labels.iter().all(|it| line.contains(it))
        });
        rows.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Asks the public edge as anybody on the internet could; the answer's status.
    async fn asks_edge(&self, host: &str, sni: &str, further: &str) -> u16 {
        let request =
            format!("GET /x HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{further}\r\n");
        self.says_to_edge(sni, &request).await.status()
    }

    async fn says_to_edge(&self, sni: &str, request: &str) -> Said {
        let mut line = Line::over(self.handshake(sni).await);
        line.say(request).await;
        let said = line.rest().await;
        let (head, body) = said.split_once("\r\n\r\n").unwrap_or((&said, ""));
        Said { head: head.to_owned(), body: body.to_owned(), closed: true }
    }

    async fn handshake(&self, sni: &str) -> TlsStream<TcpStream> {
        let stream = TcpStream::connect(self.edge).await.expect("the edge listens");
        self.handshake_over(stream, sni).await
    }

    async fn handshake_over(&self, stream: TcpStream, sni: &str) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(self.folder.read("ca.pem").as_bytes());
        roots.add(ca.expect("a certificate")).expect("a CA");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions of this provider")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(sni.to_owned()).expect("a name");
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("TLS")
    }
}

/// An application that speaks plaintext on an address that is not loopback, and notes what it hears.
struct Plain {
    at: SocketAddr,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Plain {
    async fn open() -> Option<Self> {
        // No packet is sent: this only asks which address a way out would have.
        let probe = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
        probe.connect("192.0.2.1:9").ok()?;
        let here = probe.local_addr().ok()?.ip();
        let listener = tokio::net::TcpListener::bind((here, 0)).await.ok()?;
        let at = listener.local_addr().ok()?;
        let heard: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = Arc::clone(&heard);
        tokio::spawn(async move {
            while let Ok((stream, _peer)) = listener.accept().await {
                let mut line = Line::over(stream);
                let head = line.hear("\r\n\r\n").await;
                noted.lock().expect("nobody panics").push(head);
                line.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
                    .await;
            }
        });
        Some(Self { at, heard })
    }
}

fn write_certificates(folder: &Folder) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "the clouds' CA");
    let ca =
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA");
    let key = KeyPair::generate().expect("a key");
    let names = ["localhost", "edge.example"].map(str::to_owned);
    let leaf = CertificateParams::new(names).expect("names").signed_by(&key, &ca).expect("a leaf");
    folder.write("ca.pem", &ca.pem());
    folder.write("leaf.pem", &leaf.pem());
    folder.write("leaf.key", &key.serialize_pem());
}

#[tokio::test]
async fn a_call_enters_the_other_cloud_through_its_edge_and_keeps_its_host_and_token() {
    let clouds = Clouds::open().await;
    let said = get(clouds.direct, "data", "/query?x=1").await;
    assert_eq!((said.status(), &*said.body), (200, "reached"), "{said:?}\n{}", clouds.logs());
    let head = clouds.app.heads().pop().expect("a request");
    assert!(head.starts_with("GET /query?x=1 HTTP/1.1\r\n"), "{head}");
    assert_eq!(
        header(&head, "host"),
        Some(&*format!("localhost:{}", clouds.edge.port())),
        "{head}"
    );
    assert_eq!(header(&head, "infrar-caller"), Some("web"), "{head}");
    // The caller, the edge and the callee: three hops of ours, none twice.
    assert_eq!(head.matches("infrar-").count() - head.matches("\r\ninfrar-").count(), 3, "{head}");

    // Through the caller's own edge it is one hop more.
    let said = get(clouds.via, "data", "/query").await;
    assert_eq!((said.status(), &*said.body), (200, "reached"), "{said:?}\n{}", clouds.logs());
    let head = clouds.app.heads().pop().expect("a request");
    assert_eq!(
        header(&head, "host"),
        Some(&*format!("localhost:{}", clouds.edge.port())),
        "{head}"
    );
    assert_eq!(header(&head, "infrar-caller"), Some("web"), "{head}");
    assert_eq!(head.matches("infrar-").count() - head.matches("\r\ninfrar-").count(), 4, "{head}");
}

#[tokio::test]
async fn an_edge_knows_the_service_by_host_by_handshake_or_by_audience_and_checks_the_token_for_it()
{
    let clouds = Clouds::open().await;
    let host = format!("localhost:{}", clouds.edge.port());
    let good = format!("authorization: Bearer {}\r\n", clouds.token("data").await);
    let other = format!("authorization: Bearer {}\r\n", clouds.token("other").await);

    assert_eq!(clouds.asks_edge(&host, "localhost", &good).await, 200, "{}", clouds.logs());
    // The host of no endpoint: the token says who is meant.
    assert_eq!(
        clouds.asks_edge("edge.example", "edge.example", &good).await,
        200,
        "{}",
        clouds.logs()
    );
    let seen = clouds.app.heads().len();
    assert_eq!(clouds.asks_edge(&host, "localhost", "").await, 401);
    assert_eq!(clouds.asks_edge(&host, "localhost", &other).await, 401);
    assert_eq!(clouds.asks_edge(&host, "localhost", "authorization: Bearer x.y.z\r\n").await, 401);
    assert_eq!(clouds.asks_edge("edge.example", "edge.example", "").await, 404);
    assert_eq!(clouds.app.heads().len(), seen);
}

#[tokio::test]
async fn each_proxy_meters_the_leg_that_it_sends_and_a_tunnel_goes_past_the_edge() {
    let clouds = Clouds::open().await;
    let (aws, azure) = ("aws_us_east_1", "azure_eastus");
    let said = get(clouds.via, "data", "/").await;
    assert_eq!(said.status(), 200, "{said:?}\n{}", clouds.logs());
    until("both legs are counted", async || {
        clouds.bytes("via", aws, aws, "http").await > 0.0
            && clouds.bytes("aws-edge", aws, azure, "http").await > 0.0
    })
    .await;
    let sent = |kind| clouds.bytes("via", aws, azure, kind);
    assert_eq!((sent("http").await, sent("tunnel").await), (0.0, 0.0));

    let token = clouds.token("data").await;
    let mut line = Line::to(clouds.via).await;
    line.say("CONNECT data:443 HTTP/1.1\r\nhost: data:443\r\n\r\n").await;
    assert!(line.hear("\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
    let mut line = Line::over(clouds.handshake_over(line.stream, "localhost").await);
    let host = format!("localhost:{}", clouds.edge.port());
    line.say(format!("GET / HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n")).await;
    let said = line.rest().await;
    assert!(said.starts_with("HTTP/1.1 200 "), "{said}\n{}", clouds.logs());
    let head = clouds.app.heads().pop().expect("a request");
    // The edge of the callee and the callee: nobody else has seen it.
    assert_eq!(head.matches("infrar-").count() - head.matches("\r\ninfrar-").count(), 2, "{head}");
    drop(line);
    assert!(sent("tunnel").await > 0.0);
    assert_eq!(sent("http").await, 0.0);
}

#[tokio::test]
async fn an_edge_tells_strangers_no_names_and_sends_no_token_in_plaintext() {
    let clouds = Clouds::open().await;
    let stranger = "GET / HTTP/1.1\r\nhost: dat\r\nconnection: close\r\n\r\n";
    let said = clouds.says_to_edge("edge.example", stranger).await;
    assert_eq!((said.status(), said.code()), (404, "unknown-service"), "{said:?}");
    assert!(said.body.contains("\"nearest\":[]"), "{said:?}");
    let long = "data".repeat(1000);
    assert_eq!(clouds.asks_edge(&long, "edge.example", "").await, 400);

    let Some(plain) = &clouds.plain else {
        println!("skipped: this machine has no address but loopback");
        return;
    };
    let good = format!("authorization: Bearer {}\r\n", clouds.token("bare").await);
    assert_eq!(
        clouds.asks_edge("bare.example", "edge.example", &good).await,
        200,
        "{}",
        clouds.logs()
    );
    let head = plain.heard.lock().expect("nobody panics").pop().expect("a request");
    assert_eq!(header(&head, "authorization"), None, "{head}");
    assert_eq!(header(&head, "host"), Some("bare.example"), "{head}");
}

#[tokio::test]
async fn the_handshake_names_the_service_where_the_host_says_nothing() {
    let clouds = Clouds::open().await;
    let data = clouds.token("data").await;
    let good = format!("authorization: Bearer {data}\r\n");
    let other = format!("authorization: Bearer {}\r\n", clouds.token("other").await);
    // A name that is no endpoint's: the handshake's is.
    assert_eq!(
        clouds.asks_edge("front.example", "localhost", &good).await,
        200,
        "{}",
        clouds.logs()
    );
    let head = clouds.app.heads().pop().expect("a request");
    assert_eq!(header(&head, "host"), Some("front.example"), "{head}");
    assert_eq!(header(&head, "authorization"), Some(&*format!("Bearer {data}")), "{head}");
    assert_eq!(header(&head, "infrar-caller"), Some("web"), "{head}");
    // No host at all, as HTTP/1.0 allows.
    let said = clouds.says_to_edge("localhost", &format!("GET /old HTTP/1.0\r\n{good}\r\n")).await;
    assert_eq!((said.status(), &*said.body), (200, "reached"), "{said:?}\n{}", clouds.logs());
    let seen = clouds.app.heads().len();
    // Then the token must be for that service, whatever else it is good for.
    assert_eq!(clouds.asks_edge("front.example", "localhost", &other).await, 401);
    assert_eq!(clouds.asks_edge("front.example", "localhost", "").await, 401);
    // The host comes before the handshake: `other` has an endpoint of that name, but none this edge may dial.
    let said = clouds
        .says_to_edge(
            "localhost",
            &format!("GET / HTTP/1.1\r\nhost: other.example\r\nconnection: close\r\n{other}\r\n"),
        )
        .await;
    assert_eq!((said.status(), said.code()), (503, "no-healthy-endpoint"), "{said:?}");
    assert_eq!(clouds.asks_edge("other.example", "localhost", &good).await, 401);
    // Neither host nor handshake: the audience, and only as far as the token is good.
    let said = clouds
        .says_to_edge(
            "edge.example",
            &format!("GET / HTTP/1.1\r\nhost: front.example\r\nconnection: close\r\n{other}\r\n"),
        )
        .await;
    assert_eq!((said.status(), said.code()), (503, "no-healthy-endpoint"), "{said:?}");
    let (head, rest) = data.split_once('.').expect("three parts");
    let forged = format!("authorization: Bearer {head}.{rest}x\r\n");
    assert_eq!(clouds.asks_edge("front.example", "edge.example", &forged).await, 401);
    assert_eq!(clouds.app.heads().len(), seen);
}

#[tokio::test]
async fn hosts_are_told_apart_without_regard_to_case_port_or_final_dot() {
    let clouds = Clouds::open().await;
    let good = format!("authorization: Bearer {}\r\n", clouds.token("data").await);
    let other = format!("authorization: Bearer {}\r\n", clouds.token("other").await);
    let port = clouds.edge.port();
    for host in [
        format!("localhost:{port}"),
        format!("LocalHost:{port}"),
        "localhost".to_owned(),
        "localhost.".to_owned(),
        "localhost:443".to_owned(),
    ] {
        assert_eq!(clouds.asks_edge(&host, "edge.example", &good).await, 200, "{host}");
        let head = clouds.app.heads().pop().expect("a request");
        assert_eq!(header(&head, "host"), Some(&*host), "{head}");
        assert_eq!(clouds.asks_edge(&host, "edge.example", &other).await, 401, "{host}");
    }
    for host in ["other.example", "OTHER.example", "other.example:443", "other.example.:443"] {
        assert_eq!(clouds.asks_edge(host, "edge.example", &other).await, 503, "{host}");
        assert_eq!(clouds.asks_edge(host, "edge.example", &good).await, 401, "{host}");
    }
}
