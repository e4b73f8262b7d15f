//! A DNS server whose answers a test changes: UDP, and TCP for what does not fit.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "the helper of a test may fail it, and each test uses a part"
)]

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use hickory_resolver::proto::{
    op::{Message, OpCode, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, SRV},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};

/// What a question is answered with.
#[derive(Clone, Debug)]
pub(crate) enum Says {
    Records(Vec<Record>),
    Code(ResponseCode),
    Nothing,
}

type Zone = Arc<Mutex<Book>>;

#[derive(Default)]
struct Book {
    answers: HashMap<(String, RecordType), Says>,
    asked: Vec<(String, RecordType, &'static str)>,
}

/// The server; it ends when dropped.
pub(crate) struct Server {
    pub(crate) at: SocketAddr,
    zone: Zone,
    _tasks: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let (udp, tcp) = sockets().await;
        let (at, zone, mut tasks) = (udp.local_addr().unwrap(), Zone::default(), JoinSet::new());
        tasks.spawn(by_udp(udp, Arc::clone(&zone)));
        tasks.spawn(by_tcp(tcp, Arc::clone(&zone)));
        Self { at, zone, _tasks: tasks }
    }

    /// From now on the question is answered like this. A name of which something is said, but not this, has no such
    /// record; a name of which nothing is said does not exist.
    pub(crate) fn say(&self, name: &str, kind: RecordType, says: Says) {
        let mut zone = self.zone.lock().unwrap_or_else(PoisonError::into_inner);
        zone.answers.insert((name.to_owned(), kind), says);
    }

    /// The name has these addresses.
    pub(crate) fn addresses(&self, name: &str, ttl: u32, addresses: &[IpAddr]) {
        for (kind, v4) in [(RecordType::A, true), (RecordType::AAAA, false)] {
            let of = addresses.iter().filter(|ip| ip.is_ipv4() == v4);
            let records: Vec<_> = of.map(|ip| address(name, ttl, *ip)).collect();
            self.say(name, kind, Says::Records(records));
        }
    }

    /// How often it was asked this, by `udp` or `tcp`.
    pub(crate) fn asked(&self, name: &str, kind: RecordType, by: &str) -> usize {
        let zone = self.zone.lock().unwrap_or_else(PoisonError::into_inner);
        zone.asked.iter().filter(|it| it.0 == name && it.1 == kind && it.2 == by).count()
    }
}

pub(crate) fn address(name: &str, ttl: u32, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(absolute(name), ttl, data)
}

pub(crate) fn alias(name: &str, ttl: u32, to: &str) -> Record {
    Record::from_rdata(absolute(name), ttl, RData::CNAME(CNAME(absolute(to))))
}

/// `offer` is priority, weight, port.
pub(crate) fn srv(name: &str, ttl: u32, offer: (u16, u16, u16), target: &str) -> Record {
    let (priority, weight, port) = offer;
    let data = SRV::new(priority, weight, port, absolute(target));
    Record::from_rdata(absolute(name), ttl, RData::SRV(data))
}

fn absolute(name: &str) -> Name {
    let mut name = Name::from_ascii(name).expect("a name");
    name.set_fqdn(true);
    name
}

/// The same free port for both.
async fn sockets() -> (UdpSocket, TcpListener) {
    loop {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
            return (udp, tcp);
        }
    }
}

async fn by_udp(socket: UdpSocket, zone: Zone) {
    let mut buffer = vec![0; 4096];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
        let Ok(query) = Message::from_vec(&buffer[..length]) else { continue };
        let Some(answer) = answer(&query, &zone, "udp") else { continue };
        let mut bytes = answer.to_vec().unwrap();
        if bytes.len() > usize::from(query.max_payload()) {
            bytes = answer.truncate().to_vec().unwrap();
        }
        drop(socket.send_to(&bytes, peer).await);
    }
}

async fn by_tcp(listener: TcpListener, zone: Zone) {
    let mut conversations = JoinSet::new();
    while let Ok((stream, _peer)) = listener.accept().await {
        conversations.spawn(converse(stream, Arc::clone(&zone)));
    }
}

async fn converse(mut stream: TcpStream, zone: Zone) -> io::Result<()> {
    loop {
        let length = stream.read_u16().await?;
        let mut question = vec![0; length.into()];
        stream.read_exact(&mut question).await?;
        let Ok(query) = Message::from_vec(&question) else { return Ok(()) };
        let Some(answer) = answer(&query, &zone, "tcp") else { continue };
        let bytes = answer.to_vec().unwrap();
        stream.write_u16(bytes.len().try_into().expect("a message")).await?;
        stream.write_all(&bytes).await?;
    }
}

fn answer(query: &Message, zone: &Zone, by: &'static str) -> Option<Message> {
    let question = query.queries.first()?;
    let name = question.name().to_ascii().to_ascii_lowercase().trim_end_matches('.').to_owned();
    let kind = question.query_type();
    let mut zone = zone.lock().unwrap_or_else(PoisonError::into_inner);
    zone.asked.push((name.clone(), kind, by));
    let exists = zone.answers.keys().any(|(known, _)| *known == name);
    let says = zone.answers.get(&(name, kind)).cloned();
    let says = says.unwrap_or(match exists {
        true => Says::Records(Vec::new()),
        false => Says::Code(ResponseCode::NXDomain),
    });
    let mut answer = Message::response(query.id, OpCode::Query);
    answer.add_query(question.clone());
    match says {
        Says::Records(records) => _ = answer.add_answers(records),
        Says::Code(code) => answer.metadata.response_code = code,
        Says::Nothing => return None,
    }
    Some(answer)
}
