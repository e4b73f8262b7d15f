//! Both sides of HTTP/2 frame by frame, for stories about servers and clients that a library would not play.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{
    PATIENCE,
    frames::{ACK, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, PING, SETTINGS},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// `:status: 200`, in HPACK.
pub(crate) const OK: &[u8] = &[0x88];

/// A connection on which frames are spoken; SETTINGS are acknowledged as they come.
pub(crate) struct Frames(TcpStream);

impl Frames {
    /// The client's side, with one setting.
    pub(crate) async fn client(stream: TcpStream, setting: (u16, u32)) -> Self {
        stream.set_nodelay(true).expect("our own socket");
        let mut frames = Self(stream);
        frames.write(PREFACE).await;
        let mut payload = setting.0.to_be_bytes().to_vec();
        payload.extend(setting.1.to_be_bytes());
        frames.say(SETTINGS, 0, 0, &payload).await;
        frames
    }

    /// The server's side.
    pub(crate) async fn server(mut stream: TcpStream) -> Option<Self> {
        let mut preface = [0; 24];
        stream.set_nodelay(true).expect("our own socket");
        stream.read_exact(&mut preface).await.ok()?;
        let mut frames = Self(stream);
        frames.say(SETTINGS, 0, 0, &[]).await;
        Some(frames)
    }

    pub(crate) async fn say(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.write(&frame).await;
    }

    /// A request without a body, or the head of one with a body.
    pub(crate) async fn ask(&mut self, stream: u32, method: &str, host: &str, flags: u8) {
        let mut block = match method {
            "GET" => vec![0x82, 0x84, 0x86, 0x01],
            _ => vec![0x83, 0x84, 0x86, 0x01],
        };
        block.push(u8::try_from(host.len()).expect("short"));
        block.extend(host.as_bytes());
        self.say(HEADERS, END_HEADERS | flags, stream, &block).await;
    }

    async fn write(&mut self, bytes: &[u8]) {
        // A peer that has gone is noticed when nothing comes from it.
        drop(self.0.write_all(bytes).await);
    }

    /// The next frame but SETTINGS and WINDOW_UPDATE; `None` when the other side has closed.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.ok()?;
            let [a, b, c, kind, flags, id @ ..] = head;
            let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).expect("24 bits");
            let mut payload = vec![0; length];
            self.0.read_exact(&mut payload).await.ok()?;
            match kind {
                SETTINGS if flags & ACK == 0 => self.say(SETTINGS, ACK, 0, &[]).await,
                SETTINGS | 8 => {}
                _ => return Some(Frame { kind, flags, stream: u32::from_be_bytes(id), payload }),
            }
        }
    }

    /// The next frame of this kind; what comes before it is passed over.
    pub(crate) async fn hear(&mut self, kind: u8) -> Frame {
        let heard = async {
            loop {
                let frame = self.next().await.expect("the connection stands");
                if frame.kind == kind {
                    return frame;
                }
            }
        };
        timeout(PATIENCE, heard).await.expect("a frame in time")
    }

    /// Makes sure that the other side has read everything up to here.
    pub(crate) async fn settle(&mut self) {
        self.say(PING, 0, 0, &[7; 8]).await;
        while self.hear(PING).await.flags & ACK == 0 {}
    }

    /// Reads requests until one is complete; which stream it is on.
    pub(crate) async fn request(&mut self) -> Option<u32> {
        loop {
            let frame = self.next().await?;
            if matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0 {
                return Some(frame.stream);
            }
            if frame.kind == PING && frame.flags & ACK == 0 {
                self.say(PING, ACK, 0, &frame.payload).await;
            }
        }
    }

    /// 200 and nothing else.
    pub(crate) async fn ok(&mut self, stream: u32) {
        self.say(HEADERS, END_HEADERS | END_STREAM, stream, OK).await;
    }
}
