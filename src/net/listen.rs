//! Listening sockets: one per worker on the same address.
//!
//! A second process that is bound to the same address with SO_REUSEPORT would silently get a share of the
//! connections. So the address is first taken alone, which fails when anybody listens there, and opened to the other
//! workers' sockets only then.

use std::{
    io,
    net::{SocketAddr, TcpListener as StdListener},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

/// Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// Rest after the system refused to accept for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why an address cannot be listened on. `key` is the setting that chose it.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody listens there.
    #[error("{addr} is in use; stop what listens there or set another address with {key}")]
    InUse {
        /// Where.
        addr: SocketAddr,
        /// What to change.
        key: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A port below 1024 without the right to it, or a sandbox.
    #[error("{addr} may not be listened on; set another address with {key}")]
    Denied {
        /// Where.
        addr: SocketAddr,
        /// What to change.
        key: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The address is not this machine's.
    #[error("{addr} is no address of this machine; set another with {key}")]
    NotLocal {
        /// Where.
        addr: SocketAddr,
        /// What to change.
        key: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot listen on {addr} (set by {key})")]
    Other {
        /// Where.
        addr: SocketAddr,
        /// What to change.
        key: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl BindError {
    fn new(addr: SocketAddr, key: &str, source: io::Error) -> Self {
        let (key, kind) = (key.to_owned(), source.kind());
        if kind == io::ErrorKind::AddrInUse {
            Self::InUse { addr, key, source }
        } else if kind == io::ErrorKind::PermissionDenied {
            Self::Denied { addr, key, source }
        } else if kind == io::ErrorKind::AddrNotAvailable {
            Self::NotLocal { addr, key, source }
        } else {
            Self::Other { addr, key, source }
        }
    }

    /// The address that was asked for.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        match self {
            Self::InUse { addr, .. }
            | Self::Denied { addr, .. }
            | Self::NotLocal { addr, .. }
            | Self::Other { addr, .. } => *addr,
        }
    }
}

/// Every address that cannot be listened on. Never empty.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(BindError::to_string).collect::<Vec<_>>().join("\n"))]
pub struct BindErrors(pub Vec<BindError>);

/// Tries every address, each with the key that chose it, and gives them all back: what is wrong with several is found
/// at once. Two that are the same are found too.
///
/// # Errors
/// [`BindErrors`] names all that cannot be had.
pub fn try_bind(addresses: &[(SocketAddr, String)]) -> Result<(), BindErrors> {
    // Held until all were tried.
    let tried: Vec<_> = addresses.iter().map(|(addr, key)| bind(*addr, 1, key)).collect();
    let faults: Vec<_> = tried.into_iter().filter_map(Result::err).collect();
    if faults.is_empty() { Ok(()) } else { Err(BindErrors(faults)) }
}

/// Listens on `addr` with one socket per worker; port 0 lets the kernel choose one port for all. `key` names the
/// setting in faults. The sockets do not block; accepted connections inherit TCP_NODELAY; `[::]` takes IPv4 too.
///
/// # Errors
/// [`BindError`] when the address cannot be had.
pub fn bind(addr: SocketAddr, workers: usize, key: &str) -> Result<Vec<StdListener>, BindError> {
    group(addr, workers).map_err(|source| BindError::new(addr, key, source))
}

fn group(addr: SocketAddr, workers: usize) -> io::Result<Vec<StdListener>> {
    let first = open(addr)?;
    first.listen(BACKLOG)?;
    if workers <= 1 {
        return Ok(vec![first.into()]);
    }
    let chosen = first.local_addr()?.as_socket().unwrap_or(addr);
    match share(&first, chosen, workers - 1) {
        Ok(others) => {
            let mut all = vec![first.into()];
            all.extend(others);
            Ok(all)
        }
        // Linux lets an address be shared after it was taken alone. Where a system does not, it is given back and
        // taken anew by all.
        Err(_unsupported) => {
            drop(first);
            let lead = open_shared(chosen)?;
            let mut all = vec![lead.into()];
            for _ in 1..workers {
                all.push(open_shared(chosen)?.into());
            }
            Ok(all)
        }
    }
}

fn share(first: &Socket, addr: SocketAddr, others: usize) -> io::Result<Vec<StdListener>> {
    first.set_reuse_port(true)?;
    (0..others).map(|_| open_shared(addr).map(Into::into)).collect()
}

fn open_shared(addr: SocketAddr) -> io::Result<Socket> {
    let socket = prepare(addr)?;
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn open(addr: SocketAddr) -> io::Result<Socket> {
    let socket = prepare(addr)?;
    socket.bind(&addr.into())?;
    Ok(socket)
}

fn prepare(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Connections of an earlier process in TIME_WAIT do not keep the address; a listener still does.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// The next connection. What goes wrong with one that is gone already, or for want of descriptors, is waited out
/// here: a listener does not end. Cancel-safe.
pub async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot accept; trying again"
                );
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The connections that wait to be accepted at this moment; the socket is closed behind the last. The kernel is asked
/// itself: what tokio knows of it is as old as its last look at all sockets.
pub fn accept_rest(listener: TcpListener) -> impl Iterator<Item = (TcpStream, SocketAddr)> {
    let listener = listener.into_std();
    // No more than can wait at once, so that a crowd does not keep the door open.
    (0..BACKLOG).map_while(move |_| {
        let (stream, peer) = listener.as_ref().ok()?.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        Some((TcpStream::from_std(stream).ok()?, peer))
    })
}

/// Errors that Linux reports on accept though they belong to the connection (accept(2), "Error handling").
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpStream as StdStream};

    use super::*;

    fn anywhere() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 0).into()
    }

    #[test]
    fn workers_share_one_port_and_each_gets_connections() {
        let listeners = bind(anywhere(), 2, "outbound.listen").unwrap();
        let addr = listeners[0].local_addr().unwrap();
        assert_eq!(listeners[1].local_addr().unwrap(), addr);
        // The kernel deals by a hash of the source port: 200 connections on one side of two is a chance of 2^-199.
        let _open: Vec<_> = (0..200).map(|_| StdStream::connect(addr).unwrap()).collect();
        let dealt = listeners.iter().map(|one| {
            let mut count = 0;
            while one.accept().is_ok() {
                count += 1;
            }
            count
        });
        let dealt: Vec<u32> = dealt.collect();
        assert_eq!(dealt.iter().sum::<u32>(), 200);
        assert!(dealt.iter().all(|count| *count > 0), "{dealt:?}");
    }

    #[test]
    fn a_port_in_use_is_found_and_the_fault_names_what_to_change() {
        for held in [1, 2] {
            let holder = bind(anywhere(), held, "outbound.listen").unwrap();
            let addr = holder[0].local_addr().unwrap();
            for wanted in [1, 2] {
                let fault = bind(addr, wanted, "outbound.listen").unwrap_err();
                assert!(matches!(fault, BindError::InUse { .. }), "{fault:?}");
                assert_eq!(fault.addr(), addr);
                let text = fault.to_string();
                assert!(text.contains("in use") && text.contains("outbound.listen"), "{text}");
            }
        }
    }

    #[test]
    fn all_ports_in_use_are_named_at_once() {
        let holder = bind(anywhere(), 1, "k").unwrap();
        let taken = holder[0].local_addr().unwrap();
        let elsewhere = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 0));
        let tried = [(taken, "a"), (anywhere(), "b"), (elsewhere, "c")];
        let BindErrors(faults) =
            try_bind(&tried.map(|(at, key)| (at, key.to_owned()))).unwrap_err();
        let told: Vec<String> = faults.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].ends_with(" with a") && told[1].ends_with(" with c"), "{told:?}");
    }

    #[test]
    fn an_address_of_another_machine_is_said_to_be_that() {
        // TEST-NET-1, RFC 5737.
        let addr = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 0));
        assert!(matches!(bind(addr, 1, "admin.listen"), Err(BindError::NotLocal { .. })));
    }

    #[tokio::test]
    async fn accepted_connections_do_not_wait_to_fill_packets() {
        let listener = bind(anywhere(), 1, "k").unwrap().remove(0);
        let listener = TcpListener::from_std(listener).unwrap();
        let addr = listener.local_addr().unwrap();
        let client = TcpStream::connect(addr);
        let (client, (accepted, peer)) = tokio::join!(client, accept(&listener));
        assert!(accepted.nodelay().unwrap());
        assert_eq!(client.unwrap().local_addr().unwrap(), peer);
    }

    #[tokio::test]
    async fn the_unspecified_v6_address_takes_v4_too() {
        let Ok(mut listeners) = bind((Ipv6Addr::UNSPECIFIED, 0).into(), 1, "k") else {
            println!("skipped: this machine has no IPv6");
            return;
        };
        let listener = TcpListener::from_std(listeners.remove(0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        let (client, (_accepted, peer)) = tokio::join!(client, accept(&listener));
        client.unwrap();
        assert_eq!(peer.ip().to_canonical(), Ipv4Addr::LOCALHOST);
    }
}
