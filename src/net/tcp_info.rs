//! What the kernel knows of a TCP connection, and what that means on the wire.
//!
//! The only unsafe code of the crate: one `getsockopt(TCP_INFO)`. Clouds bill IP packets; the kernel counts payload
//! and segments, and headers follow from the two. The structure is read by offset into plain bytes, because libraries'
//! declarations of it end at different fields; the offsets are kernel interface and never change
//! (include/uapi/linux/tcp.h).

use std::os::fd::BorrowedFd;

use crate::model::ByteCount;

/// Long enough for every field read here; kernels copy as much as there is room for.
const ROOM: usize = 256;
/// Up to and including `tcpi_bytes_retrans`: Linux 4.19.
const ENOUGH: usize = 216;
/// `TCPI_OPT_TIMESTAMPS`.
const TIMESTAMPS: u8 = 1;

/// Which end opened the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// We did, with `connect`.
    Opened,
    /// The peer did; we accepted.
    Accepted,
}

/// The IP version, which decides the size of a header. An IPv4 peer of a dual socket is IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// 20 bytes.
    V4,
    /// 40 bytes.
    V6,
}

impl Family {
    /// The version that packets to `address` have.
    #[must_use]
    pub fn of(address: std::net::IpAddr) -> Self {
        if address.to_canonical().is_ipv4() { Self::V4 } else { Self::V6 }
    }

    const fn header(self) -> u64 {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }
}

/// One sample. Counters grow from the start of the connection; the 32-bit ones wrap, so take differences with
/// `wrapping_sub`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Whether segments carry the 12 bytes of a timestamp.
    pub timestamps: bool,
    /// Largest payload of a segment, bytes.
    pub snd_mss: u32,
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u32,
    /// Its variation, microseconds.
    pub rtt_var_us: u32,
    /// Payload the peer has acknowledged, bytes.
    pub bytes_acked: u64,
    /// Payload received, bytes, each counted once; the peer's FIN counts as one.
    pub bytes_received: u64,
    /// Segments sent: data, acknowledgements, SYN, FIN, probes, repeats. Wraps.
    pub segs_out: u32,
    /// Segments received. Wraps.
    pub segs_in: u32,
    /// Received segments with payload. Wraps.
    pub data_segs_in: u32,
    /// Sent segments with payload. Wraps.
    pub data_segs_out: u32,
    /// Payload handed to IP, repeats included, bytes.
    pub bytes_sent: u64,
    /// The part of `bytes_sent` that was repeated.
    pub bytes_retrans: u64,
}

impl TcpInfo {
    /// Asks the kernel. None where it does not know enough: not Linux, older than 4.19, a sandbox, not a TCP socket.
    /// Costs about a microsecond: for the end of a connection or once in a while, not for each request.
    #[must_use]
    pub fn of(socket: BorrowedFd<'_>) -> Option<Self> {
        let mut room = [0; ROOM];
        let length = query(socket, &mut room)?;
        (length >= ENOUGH).then(|| Self::read(&room))?
    }

    fn read(room: &[u8; ROOM]) -> Option<Self> {
        let options = *room.get(5)?;
        Some(Self {
            timestamps: options & TIMESTAMPS != 0,
            snd_mss: u32_at(room, 16)?,
            rtt_us: u32_at(room, 68)?,
            rtt_var_us: u32_at(room, 72)?,
            bytes_acked: u64_at(room, 120)?,
            bytes_received: u64_at(room, 128)?,
            segs_out: u32_at(room, 136)?,
            segs_in: u32_at(room, 140)?,
            data_segs_in: u32_at(room, 152)?,
            data_segs_out: u32_at(room, 156)?,
            bytes_sent: u64_at(room, 200)?,
            bytes_retrans: u64_at(room, 208)?,
        })
    }

    /// Bytes of IP and TCP headers in front of each segment.
    #[must_use]
    pub fn header_bytes(&self, family: Family) -> u64 {
        family.header() + 20 + if self.timestamps { 12 } else { 0 }
    }

    /// What opening the connection cost beyond the formula: the options of the SYN, or the SYN-ACK that the kernel
    /// does not count.
    #[must_use]
    pub fn opening_bytes(&self, side: Side, family: Family) -> u64 {
        match (side, self.timestamps) {
            (Side::Opened, true) => 8,
            (Side::Opened, false) => 12,
            (Side::Accepted, true) => family.header() + 40,
            (Side::Accepted, false) => family.header() + 32,
        }
    }
}

/// Bytes of IP packets that this end has sent so far: `bytes_sent + segs_out × header + opening`. Right to the byte
/// while `segs_out` has not wrapped (2³² segments); SACK options on pure acknowledgements are not in it.
#[must_use]
pub fn wire_tx(info: &TcpInfo, side: Side, family: Family) -> ByteCount {
    let headers = u64::from(info.segs_out) * info.header_bytes(family);
    ByteCount(info.bytes_sent + headers + info.opening_bytes(side, family))
}

fn u32_at(room: &[u8; ROOM], offset: usize) -> Option<u32> {
    room.get(offset..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn u64_at(room: &[u8; ROOM], offset: usize) -> Option<u64> {
    room.get(offset..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

/// How many bytes the kernel wrote; None when it refused.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "std and socket2 offer no TCP_INFO")]
fn query(socket: BorrowedFd<'_>, room: &mut [u8; ROOM]) -> Option<usize> {
    use std::os::fd::AsRawFd;

    let mut length = libc::socklen_t::try_from(ROOM).ok()?;
    // SAFETY: the descriptor is open for as long as it is borrowed; `room` and `length` are valid for writes during
    // the call, the kernel writes at most `length` bytes into `room`, and every byte pattern is a valid `u8`.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            room.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    (outcome == 0).then(|| usize::try_from(length).ok())?
}

#[cfg(not(target_os = "linux"))]
fn query(_socket: BorrowedFd<'_>, _room: &mut [u8; ROOM]) -> Option<usize> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    #[cfg(target_env = "gnu")]
    fn the_offsets_are_those_of_the_kernel_header() {
        use std::mem::offset_of;
        type C = libc::tcp_info;
        assert_eq!(offset_of!(C, tcpi_options), 5);
        assert_eq!(offset_of!(C, tcpi_snd_mss), 16);
        assert_eq!(offset_of!(C, tcpi_rtt), 68);
        assert_eq!(offset_of!(C, tcpi_rttvar), 72);
        assert_eq!(offset_of!(C, tcpi_bytes_acked), 120);
        assert_eq!(offset_of!(C, tcpi_bytes_received), 128);
        assert_eq!(offset_of!(C, tcpi_segs_out), 136);
        assert_eq!(offset_of!(C, tcpi_segs_in), 140);
        assert_eq!(offset_of!(C, tcpi_data_segs_in), 152);
        assert_eq!(offset_of!(C, tcpi_data_segs_out), 156);
        assert_eq!(offset_of!(C, tcpi_bytes_sent), 200);
        assert_eq!(offset_of!(C, tcpi_bytes_retrans), 208);
    }

    #[test]
    fn a_connection_counts_what_it_carried() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(&[7; 1000]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.read_to_end(&mut Vec::new()).unwrap(), 1000);
        server.write_all(&[7; 300]).unwrap();
        drop(server);
        assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 300);

        let info = TcpInfo::of(client.as_fd()).unwrap();
        assert_eq!((info.bytes_sent, info.bytes_received), (1000, 300 + 1)); // 1: the FIN
        assert!(info.snd_mss > 0 && info.rtt_us > 0);
        // At least SYN, the data, a FIN and one acknowledgement.
        assert!(info.segs_out >= 4 && info.data_segs_out >= 1, "{info:?}");
        let header = info.header_bytes(Family::V4);
        let sent = wire_tx(&info, Side::Opened, Family::V4).0;
        assert_eq!(
            sent,
            1000 + u64::from(info.segs_out) * header + info.opening_bytes(Side::Opened, Family::V4)
        );
    }

    #[test]
    fn the_formula_gives_the_figures_of_the_measurements() {
        let with =
            TcpInfo { timestamps: true, bytes_sent: 1000, segs_out: 10, ..TcpInfo::default() };
        let without = TcpInfo { timestamps: false, ..with };
        let tx = |info, side, family| wire_tx(info, side, family).0;
        assert_eq!(tx(&with, Side::Opened, Family::V4), 1000 + 10 * 52 + 8);
        assert_eq!(tx(&without, Side::Opened, Family::V4), 1000 + 10 * 40 + 12);
        assert_eq!(tx(&with, Side::Accepted, Family::V4), 1000 + 10 * 52 + 60);
        assert_eq!(tx(&with, Side::Accepted, Family::V6), 1000 + 10 * 72 + 80);
        assert_eq!(tx(&without, Side::Accepted, Family::V4), 1000 + 10 * 40 + 52);
        assert_eq!(tx(&without, Side::Accepted, Family::V6), 1000 + 10 * 60 + 72);
    }

    #[test]
    fn what_is_no_tcp_socket_has_no_answer() {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        assert_eq!(TcpInfo::of(socket.as_fd()), None);
    }

    #[test]
    fn a_v4_peer_of_a_dual_socket_is_v4() {
        assert_eq!(Family::of("::ffff:10.0.0.1".parse().unwrap()), Family::V4);
        assert_eq!(Family::of("fd00::1".parse().unwrap()), Family::V6);
    }
}
