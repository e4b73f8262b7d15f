//! Endpoints that DNS tells of: called under their name, followed when they move, kept when DNS fails.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a story may fail, may be long, and does what the product may not"
)]

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use hickory_resolver::proto::{op::ResponseCode, rr::RecordType};
use rcgen::{CertificateParams, KeyPair};
use support::{
    Folder, Infrar, Origin, Pair,
    dns::{Says, Server, srv},
    free_ports, get, header, until,
};

const NAME: &str = "data.internal.example";

const ONE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const TWO: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

/// A sidecar without a control plane whose `data` has no endpoint but those that DNS tells of.
struct Proxy {
    infrar: Infrar,
    folder: Folder,
    out: SocketAddr,
    admin: SocketAddr,
}

impl Proxy {
    async fn open(endpoints: &str, discovery: &str, more: &str) -> Self {
        let folder = Folder::new();
        Self::within(folder, endpoints, discovery, more).await
    }

    async fn within(folder: Folder, endpoints: &str, discovery: &str, more: &str) -> Self {
        let [out, admin] = free_ports();
        folder.write(
            "project.yaml",
            &format!(
                "project: shop\nservices: {{ data: {{ scopes: [use], endpoints: [{endpoints}] }} }}\n\
                 permissions: {{ web: {{ data: [use] }} }}\n"
            ),
        );
        folder.write("proxy.yaml", &Self::file(out, admin, discovery, more));
        let mut infrar = Infrar::start(&folder, "proxy", &["proxy", "--config", "proxy.yaml"]);
        infrar.ready(admin).await;
        Self { infrar, folder, out, admin }
    }

    fn file(out: SocketAddr, admin: SocketAddr, discovery: &str, more: &str) -> String {
        format!(
            "service: web\nplace: aws_us_east_1\nproject: project.yaml\noutbound: {{ listen: '{out}' }}\n\
             admin: {{ listen: '{admin}' }}\ndiscovery: [{discovery}]\nlog: {{ format: json }}\n{more}"
        )
    }

    /// Edits the list and waits until that was noticed `times` times in all.
    async fn looks_in(&self, discovery: &str, times: u32) {
        self.folder.write("proxy.yaml", &Self::file(self.out, self.admin, discovery, ""));
        let line = format!("infrar_settings_reloads_total{{outcome=\"applied\"}} {times}");
        until(&line, async || self.admin("/metrics").await.contains(&line)).await;
    }

    async fn body(&self) -> String {
        get(self.out, "data", "/").await.body
    }

    async fn admin(&self, path: &str) -> String {
        get(self.admin, &self.admin.to_string(), path).await.body
    }

    async fn metric(&self, series: &str) -> Option<f64> {
        let metrics = self.admin("/metrics").await;
        let line = metrics.lines().find(|line| line.starts_with(series))?;
        line.rsplit(' ').next()?.parse().ok()
    }
}

/// An entry of the list that is asked for often.
fn entry(server: &Server, keys: &str) -> String {
    let at = server.at;
    format!(
        "{{ dns: {{ service: data, resolver: '{at}', scheme: http, auth_method: none, min_ttl: 20ms, {keys} }} }}"
    )
}

#[tokio::test]
async fn a_service_that_only_dns_knows_is_called_by_its_name_there_and_followed() {
    let server = Server::start().await;
    let one = Origin::plain("one").await;
    let port = one.at.port();
    let two = Origin::at((TWO, port).into(), |visit| visit.plainly("two")).await;
    server.addresses(NAME, 0, &[ONE]);
    let keys = format!("name: {NAME}, port: {port}");
    let proxy = Proxy::open("", &entry(&server, &keys), "").await;

    // Whoever is ready has asked.
    assert_eq!(proxy.body().await, "one", "{}", proxy.infrar.log());
    let host = header(&one.heads()[0], "host").map(str::to_owned);
    assert_eq!(host, Some(format!("{NAME}:{port}")));

    server.addresses(NAME, 0, &[TWO]);
    until("the other address is called", async || proxy.body().await == "two").await;
    let calls = one.heads().len();
    let snapshot = proxy.admin("/v1/snapshot").await;
    assert!(snapshot.contains(&format!("\"dns-127-0-0-1-{port}\"")), "it drains: {snapshot}");
    assert!(snapshot.contains("\"draining\""), "{snapshot}");
    let series = format!("{{service=\"data\",name=\"{NAME}\"}}");
    assert_eq!(proxy.metric(&format!("infrar_dns_endpoints{series}")).await, Some(2.0));

    // Whatever DNS says from now on, the service is where it was last found.
    server.say(NAME, RecordType::A, Says::Code(ResponseCode::ServFail));
    let failed =
        format!("infrar_dns_lookups_total{{service=\"data\",name=\"{NAME}\",outcome=\"failed\"}}");
    until("DNS has failed", async || proxy.metric(&failed).await >= Some(1.0)).await;
    assert_eq!(proxy.body().await, "two", "{}", proxy.infrar.log());
    assert_eq!(one.heads().len(), calls, "nothing new for whoever drains");
    let told = proxy.infrar.log().matches("could not be looked up").count();
    assert_eq!(told, 1, "{}", proxy.infrar.log());
    server.addresses(NAME, 0, &[ONE]);
    until("it is found again", async || proxy.body().await == "one").await;
    drop(two);
}

#[tokio::test]
async fn srv_records_say_port_and_order() {
    let server = Server::start().await;
    let (near, far) = (Origin::plain("near").await, Origin::plain("far").await);
    let name = "_http._tcp.data.example";
    let say = |priorities: (u16, u16)| {
        let near = srv(name, 0, (priorities.0, 1, near.at.port()), "near.example");
        let far = srv(name, 0, (priorities.1, 1, far.at.port()), "far.example");
        server.say(name, RecordType::SRV, Says::Records(vec![near, far]));
    };
    server.addresses("near.example", 0, &[ONE]);
    server.addresses("far.example", 0, &[ONE]);
    say((1, 2));
    let keys = format!("type: srv, name: {name}");
    let proxy = Proxy::open("", &entry(&server, &keys), "").await;
    for _ in 0..5 {
        assert_eq!(proxy.body().await, "near", "{}", proxy.infrar.log());
    }
    let host = header(&near.heads()[0], "host").map(str::to_owned);
    assert_eq!(host, Some(format!("near.example:{}", near.at.port())));
    say((2, 1));
    until("the order is the other one", async || proxy.body().await == "far").await;
}

#[tokio::test]
async fn who_cannot_be_found_is_missing_and_the_caller_is_told_why() {
    let server = Server::start().await;
    let keys = format!("name: {NAME}, port: 1");
    // It is ready all the same: of one name that is not there its callers alone have the harm.
    let proxy = Proxy::open("", &entry(&server, &keys), "").await;
    let said = get(proxy.out, "data", "/").await;
    assert_eq!((said.status(), said.code()), (503, "no-healthy-endpoint"));
    assert!(said.body.contains("DNS knows no such name"), "{}", said.body);
}

#[tokio::test]
async fn an_edited_list_is_followed_without_a_moment_in_which_nobody_is_there() {
    let server = Server::start().await;
    let (base, found) = (Origin::plain("base").await, Origin::plain("found").await);
    server.addresses(NAME, 0, &[ONE]);
    let endpoints = format!(
        "{{ url: 'http://{}', provider: aws, region: us-east-1, auth_method: none }}",
        base.at
    );
    let proxy = Proxy::open(&endpoints, "", "").await;
    assert_eq!(proxy.body().await, "base");
    let port = found.at.port();
    proxy.looks_in(&entry(&server, &format!("name: {NAME}, port: {port}")), 1).await;
    until("DNS is believed", async || proxy.body().await == "found").await;

    // A name that is not there takes nobody's place.
    proxy.looks_in(&entry(&server, &format!("name: wrong.example, port: {port}")), 2).await;
    let asked = async || server.asked("wrong.example", RecordType::A, "udp") > 1;
    until("the wrong name was asked for", asked).await;
    assert_eq!(proxy.body().await, "found", "{}", proxy.infrar.log());
    server.addresses("wrong.example", 0, &[ONE]);
    let gone = async || !proxy.admin("/metrics").await.contains(NAME);
    until("the first name is not asked for any more", gone).await;
    assert_eq!(proxy.body().await, "found");

    proxy.looks_in("", 3).await;
    until("the project is believed again", async || proxy.body().await == "base").await;
}

#[tokio::test]
async fn what_dns_tells_lies_over_the_catalog_and_never_on_disk() {
    let server = Server::start().await;
    let app = Origin::plain("app").await;
    server.addresses(NAME, 0, &[TWO]);
    // Nobody listens where the control plane says: the call arrives because DNS says otherwise. With a token, which
    // travels in the clear to this machine alone.
    let [nobody] = free_ports::<1>();
    let at = server.at;
    let more = format!(
        "  other:\n    scopes: [use]\n    endpoints: [{{ url: 'http://{nobody}', provider: azure, region: eastus }}]\n"
    );
    let port = app.at.port();
    let discovery = format!(
        "discovery: [{{ dns: {{ service: data, name: {NAME}, port: {port}, scheme: http, resolver: '{at}', place: azure_eastus, min_ttl: 20ms }} }}]\n"
    );
    let origin = Origin::at((TWO, port).into(), |visit| visit.plainly("found")).await;
    let pair = Pair::open(app.at, &more, &discovery).await;
    assert_eq!(get(pair.out, "data", "/").await.body, "found", "{}", pair.logs());
    let bearer = header(&origin.heads()[0], "authorization").map(str::to_owned);
    assert!(bearer.is_some_and(|it| it.starts_with("Bearer ")), "{:?}", origin.heads());
    let kept = pair.folder.read("caller/snapshot.json");
    assert!(kept.contains(&pair.inbound.to_string()), "{kept}");
    assert!(!kept.contains("dns-127") && !kept.contains("found_at"), "{kept}");
}

#[tokio::test]
async fn the_certificate_is_that_of_the_name_whatever_the_address() {
    let folder = Folder::new();
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec![NAME.to_owned()]).expect("a name");
    let certificate = params.self_signed(&key).expect("a certificate").pem();
    folder.write("tls.crt", &certificate);
    folder.write("tls.key", &key.serialize_pem());
    let app = Origin::plain("app").await;
    let [listen, admin] = free_ports();
    folder.write(
        "callee.yaml",
        &format!(
            "service: data\nplace: azure_eastus\nproject: project.yaml\nadmin: {{ listen: '{admin}' }}\n\
             inbound: {{ listen: '{listen}', app: 'http://{}', tls: {{ cert_file: tls.crt, key_file: tls.key }}, rules: [{{ path: /*, public: true }}] }}\n",
            app.at
        ),
    );
    folder.write("project.yaml", "project: shop\nservices: { data: { scopes: [use] } }\n");
    let mut callee = Infrar::start(&folder, "callee", &["proxy", "--config", "callee.yaml"]);
    callee.ready(admin).await;

    let server = Server::start().await;
    server.addresses(NAME, 0, &[ONE]);
    let (at, port) = (server.at, listen.port());
    let dns = |name: &str| {
        format!(
            "{{ dns: {{ service: data, name: {name}, port: {port}, resolver: '{at}', auth_method: none, min_ttl: 20ms }} }}"
        )
    };
    let trust = "trust: { ca_file: tls.crt }\n";
    let proxy = Proxy::within(folder, "", &dns(NAME), trust).await;
    assert_eq!(proxy.body().await, "app", "{}", proxy.infrar.log());

    // Another name at the same address is somebody else.
    server.addresses("other.example", 0, &[ONE]);
    let file = Proxy::file(proxy.out, proxy.admin, &dns("other.example"), trust);
    proxy.folder.write("proxy.yaml", &file);
    let refused = async || get(proxy.out, "data", "/").await.code() == "tls-failed";
    until("the other name is refused", refused).await;
}
