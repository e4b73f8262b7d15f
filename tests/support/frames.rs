//! HTTP/2 frame by frame: a client that may say what no client should.

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::PATIENCE;

/// Frame types (RFC 9113 §6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

/// Flags.
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// Error codes (§7).
pub(crate) const NO_ERROR: u32 = 0;
pub(crate) const PROTOCOL_ERROR: u32 = 1;
pub(crate) const REFUSED_STREAM: u32 = 7;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

/// Settings (§6.5.2).
pub(crate) const HEADER_TABLE_SIZE: u16 = 1;
pub(crate) const MAX_CONCURRENT_STREAMS: u16 = 3;
pub(crate) const MAX_HEADER_LIST_SIZE: u16 = 6;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// The error code of RST_STREAM and GOAWAY.
    pub(crate) fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        self.word(at)
    }

    /// The last stream that GOAWAY names.
    pub(crate) fn last(&self) -> u32 {
        self.word(0)
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.payload.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_be_bytes(bytes.unwrap_or_default())
    }

    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The value of `:status` in HEADERS, 0 for one that was said in a way we do not read.
    pub(crate) fn status(&self) -> u16 {
        // A peer that may not use a table says first that it uses none (RFC 7541 §6.3).
        let block = self.payload.iter().position(|byte| byte >> 5 != 1).unwrap_or_default();
        match self.payload.get(block..).unwrap_or_default() {
            [indexed @ 0x88..=0x8e, ..] => {
                [200, 204, 206, 304, 400, 404, 500][usize::from(indexed - 0x88)]
            }
            // A literal under the name at index 8; three digits as they are, or in Huffman's code.
            [0x08 | 0x18 | 0x48, 3, digits @ ..] => digits
                .iter()
                .take(3)
                .fold(0, |sum, digit| sum * 10 + u16::from(digit.wrapping_sub(b'0'))),
            [0x08 | 0x18 | 0x48, length @ 0x82..=0x83, code @ ..] => {
                huffman_digits(&code[..usize::from(length & 0x7f)])
            }
            _ => 0,
        }
    }
}

/// Three digits in the code of RFC 7541 appendix B: 0 to 2 have five bits, the others six.
fn huffman_digits(code: &[u8]) -> u16 {
    let bits: Vec<u8> =
        code.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    let value = |bits: &[u8]| bits.iter().fold(0, |sum, bit| sum * 2 + u16::from(*bit));
    let (mut at, mut number) = (0, 0);
    for _ in 0..3 {
        let short = value(&bits[at..at + 5]);
        let (digit, length) =
            if short < 3 { (short, 5) } else { (value(&bits[at..at + 6]) - 0b1_1001 + 3, 6) };
        number = number * 10 + digit;
        at += length;
    }
    number
}

/// A frame as bytes.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short payload").to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A header block: every field as a literal, nothing indexed.
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        for text in [name, value] {
            // RFC 7541 §5.1, a prefix of seven bits.
            match text.len() {
                short @ 0..127 => bytes.push(u8::try_from(short).expect("seven bits")),
                long => {
                    bytes.push(127);
                    let mut rest = long - 127;
                    while rest >= 128 {
                        bytes.push(u8::try_from(rest % 128).expect("seven bits") | 128);
                        rest /= 128;
                    }
                    bytes.push(u8::try_from(rest).expect("seven bits"));
                }
            }
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// HEADERS in one frame.
pub(crate) fn headers(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, &block(fields))
}

/// The four pseudo-headers of a call to the service `data`.
pub(crate) fn request<'a>(method: &'a str, path: &'a str) -> [(&'a str, &'a str); 4] {
    [(":method", method), (":scheme", "http"), (":authority", "data"), (":path", path)]
}

/// GET without a body.
pub(crate) fn get(stream: u32, path: &str) -> Vec<u8> {
    headers(stream, END_STREAM, &request("GET", path))
}

/// RST_STREAM with CANCEL.
pub(crate) fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &8u32.to_be_bytes())
}

/// A connection on which one speaks HTTP/2 frame by frame.
pub(crate) struct Frames<S = TcpStream> {
    stream: S,
    read: Vec<u8>,
    /// What the server's settings say.
    pub(crate) settings: Vec<(u16, u32)>,
    pings: u64,
}

impl Frames {
    /// With prior knowledge (RFC 9113 §3.3).
    pub(crate) async fn to(at: std::net::SocketAddr) -> Self {
        let stream = TcpStream::connect(at).await.expect("somebody listens");
        stream.set_nodelay(true).expect("our own socket");
        Self::over(stream).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Frames<S> {
    /// Speaks the preface, and reads the server's.
    pub(crate) async fn over(stream: S) -> Self {
        let mut frames = Self { stream, read: Vec::new(), settings: Vec::new(), pings: 0 };
        frames.say(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        // Without a table of headers every status comes as a literal.
        let setting = [&HEADER_TABLE_SIZE.to_be_bytes()[..], &0u32.to_be_bytes()].concat();
        frames.say(frame(SETTINGS, 0, 0, &setting)).await;
        let theirs = frames.next_of(SETTINGS).await;
        let pair = |bytes: &[u8]| {
            let name = u16::from_be_bytes([bytes[0], bytes[1]]);
            (name, u32::from_be_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]))
        };
        frames.settings = theirs.payload.chunks_exact(6).map(pair).collect();
        frames.say(frame(SETTINGS, ACK, 0, &[])).await;
        frames
    }

    pub(crate) fn setting(&self, name: u16) -> Option<u32> {
        self.settings.iter().find(|(one, _)| *one == name).map(|(_, value)| *value)
    }

    /// Whether it could be said: who misbehaves may find the connection closed.
    pub(crate) async fn say(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        let said = self.stream.write_all(bytes.as_ref()).await.is_ok();
        said && self.stream.flush().await.is_ok()
    }

    /// The next frame; `None` when the connection is closed.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        let next = async {
            loop {
                if let Some(frame) = self.take() {
                    return Some(frame);
                }
                self.read.reserve(16 * 1024);
                let read = self.stream.read_buf(&mut self.read).await;
                if !read.is_ok_and(|count| count > 0) {
                    return None;
                }
            }
        };
        timeout(PATIENCE, next).await.expect("a frame, or the end")
    }

    fn take(&mut self) -> Option<Frame> {
        let head = self.read.get(..9)?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let (kind, flags) = (head[3], head[4]);
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        if self.read.len() < 9 + length {
            return None;
        }
        let payload = self.read[9..9 + length].to_vec();
        self.read.drain(..9 + length);
        Some(Frame { kind, flags, stream, payload })
    }

    /// The next frame of a kind; others are passed over, but for GOAWAY, which nobody may miss.
    pub(crate) async fn next_of(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.next().await.expect("the connection stands");
            if frame.kind == kind {
                return frame;
            }
            assert_ne!(frame.kind, GOAWAY, "{frame:?}");
        }
    }

    /// Waits until everything that was said so far has been read; `false` when the connection was closed instead.
    pub(crate) async fn settled(&mut self) -> bool {
        self.pings += 1;
        let sent = self.pings.to_be_bytes();
        self.say(frame(PING, 0, 0, &sent)).await;
        loop {
            match self.next().await {
                Some(frame) if frame.kind == PING && frame.has(ACK) && frame.payload == sent => {
                    return true;
                }
                Some(frame) if frame.kind != GOAWAY => {}
                Some(_) | None => return false,
            }
        }
    }

    /// The answer on a stream: its status and body, or the code it was reset with. Frames of other streams are passed
    /// over.
    pub(crate) async fn answer(&mut self, stream: u32) -> Result<(u16, String), u32> {
        let (mut status, mut body) = (0, Vec::new());
        loop {
            let frame = self.next().await.expect("the connection stands");
            if frame.kind == GOAWAY && frame.code() != NO_ERROR {
                return Err(frame.code());
            }
            if frame.stream != stream {
                continue;
            }
            match frame.kind {
                HEADERS if status < 200 => status = frame.status(),
                DATA => body.extend(&frame.payload),
                RST_STREAM => return Err(frame.code()),
                _ => {}
            }
            if frame.has(END_STREAM) && matches!(frame.kind, HEADERS | DATA) {
                return Ok((status, String::from_utf8_lossy(&body).into_owned()));
            }
        }
    }

    /// How the connection ends: the code of its GOAWAY, if it said one.
    pub(crate) async fn end(&mut self) -> Option<u32> {
        let mut code = None;
        while let Some(frame) = self.next().await {
            if frame.kind == GOAWAY {
                code = Some(frame.code());
            }
        }
        code
    }
}
