//! Whether an address is one that we listen on ourselves, however it is written.

use std::net::{IpAddr, SocketAddr, UdpSocket};

/// Whether a connection to `address` would arrive at one of the listeners `own`. An IPv4 address within IPv6 is the
/// IPv4 address; the unspecified address leads to this machine; a listener on the unspecified address hears on all of
/// this machine's.
#[must_use]
pub fn is_own(own: &[SocketAddr], address: SocketAddr) -> bool {
    let target = address.ip().to_canonical();
    own.iter().filter(|listener| listener.port() == address.port()).any(|listener| {
        let ip = listener.ip().to_canonical();
        ip == target
            || (target.is_unspecified() && (ip.is_unspecified() || ip.is_loopback()))
            || (ip.is_unspecified() && is_here(target))
    })
}

/// Whether an address is one of this machine's: only those can be bound to.
fn is_here(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(own: &str, address: &str) -> bool {
        is_own(&[own.parse().unwrap()], address.parse().unwrap())
    }

    #[test]
    fn a_listener_is_known_however_its_address_is_written() {
        for written in ["127.0.0.1:9", "[::ffff:127.0.0.1]:9", "0.0.0.0:9", "[::]:9"] {
            assert!(reaches("127.0.0.1:9", written), "{written}");
            assert!(reaches("0.0.0.0:9", written), "{written}");
            assert!(reaches("[::]:9", written), "{written}");
        }
        assert!(reaches("[::ffff:127.0.0.1]:9", "127.0.0.1:9"));
    }

    #[test]
    fn another_port_and_another_machine_are_not_ours() {
        assert!(!reaches("127.0.0.1:9", "127.0.0.1:8"));
        assert!(!reaches("127.0.0.1:9", "127.0.0.2:9"));
        // TEST-NET-1, RFC 5737.
        assert!(!reaches("0.0.0.0:9", "192.0.2.1:9"));
    }

    #[test]
    fn a_wildcard_listener_hears_on_every_address_of_the_machine() {
        // No packet is sent: connecting only asks which address would be used. Without a route out there is none.
        let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
        let routed = probe.connect("192.0.2.1:9").and_then(|()| probe.local_addr());
        let Ok(here) = routed else {
            println!("skipped: this machine has no way out");
            return;
        };
        assert!(is_own(&["0.0.0.0:9".parse().unwrap()], (here.ip(), 9).into()));
    }
}
