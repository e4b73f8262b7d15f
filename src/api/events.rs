//! Server-sent events as they arrive: bytes in any pieces → events.
//!
//! The grammar is that of the WHATWG HTML standard §9.2. What a peer may make us hold is bounded: a line by
//! 8 KiB, an event by 64 KiB, undelivered events by the size of the piece that was pushed.

use std::{collections::VecDeque, sync::Arc};

/// The longest line, in bytes.
const LINE_LIMIT: usize = 8 * 1024;

/// The most data in one event, in bytes.
const EVENT_LIMIT: usize = 64 * 1024;

/// Why a stream of events was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// A line longer than 8 KiB.
    #[error("a line of the event stream is longer than {LINE_LIMIT} bytes")]
    Line,
    /// Data longer than 64 KiB.
    #[error("an event carries more than {EVENT_LIMIT} bytes")]
    Event,
}

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Its `event` field; empty means `message`.
    pub name: String,
    /// Its `data` lines, joined by line feeds.
    pub data: String,
    /// The last `id` that was seen; shared, so that a long one cannot be multiplied by many small events.
    pub id: Arc<str>,
}

/// Puts events together from pieces.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    after_cr: bool,
    name: String,
    data: Option<String>,
    id: Arc<str>,
    ready: VecDeque<Event>,
}

impl Events {
    /// Takes the next piece.
    ///
    /// # Errors
    /// [`EventError`] when a bound is exceeded; the stream is then of no further use.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), EventError> {
        for &byte in piece {
            let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
            match byte {
                b'\n' if after_cr => {}
                b'\r' | b'\n' => self.end_line()?,
                _ if self.line.len() == LINE_LIMIT => return Err(EventError::Line),
                _ => self.line.push(byte),
            }
        }
        Ok(())
    }

    /// The next complete event, if there is one.
    pub fn pop(&mut self) -> Option<Event> {
        self.ready.pop_front()
    }

    fn end_line(&mut self) -> Result<(), EventError> {
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        if line.is_empty() {
            self.dispatch();
            return Ok(());
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.name),
            // The standard ignores an id with a NUL.
            "id" if !value.contains('\0') => self.id = value.into(),
            "data" => self.add_data(value)?,
            // An empty field name is a comment; unknown fields are ignored.
            _ => {}
        }
        Ok(())
    }

    fn add_data(&mut self, value: &str) -> Result<(), EventError> {
        let held = self.data.as_ref().map_or(0, |data| data.len() + 1);
        if held + value.len() > EVENT_LIMIT {
            return Err(EventError::Event);
        }
        match &mut self.data {
            Some(data) => {
                data.push('\n');
                data.push_str(value);
            }
            None => self.data = Some(value.to_owned()),
        }
        Ok(())
    }

    /// An empty line ends an event; one without data is none.
    fn dispatch(&mut self) {
        let name = std::mem::take(&mut self.name);
        if let Some(data) = self.data.take() {
            self.ready.push_back(Event { name, data, id: Arc::clone(&self.id) });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(pieces: &[&[u8]]) -> Vec<Event> {
        let mut events = Events::default();
        for piece in pieces {
            events.push(piece).unwrap();
        }
        std::iter::from_fn(|| events.pop()).collect()
    }

    #[test]
    fn events_are_read_with_every_kind_of_line_end() {
        let expected =
            Event { name: "change".to_owned(), data: "{\"a\":1}".to_owned(), id: "7".into() };
        for text in [
            "event: change\nid: 7\ndata: {\"a\":1}\n\n",
            "event: change\r\nid: 7\r\ndata: {\"a\":1}\r\n\r\n",
            "event: change\rid: 7\rdata: {\"a\":1}\r\r",
            ": hello\n\nevent:change\nid:7\ndata:{\"a\":1}\nretry: 5\n\n",
        ] {
            assert_eq!(all(&[text.as_bytes()]), std::slice::from_ref(&expected), "{text:?}");
        }
    }

    #[test]
    fn data_lines_are_joined_and_a_heartbeat_is_no_event() {
        let events = all(&[b"data: a\ndata: b\n\n", b":\n\n:\n\n", b"data: unfinished\n"]);
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].data, "a\nb");
    }

    #[test]
    fn a_peer_cannot_make_us_hold_more_than_the_bounds() {
        let mut events = Events::default();
        assert_eq!(events.push(&vec![b'x'; LINE_LIMIT + 1]), Err(EventError::Line));

        let mut events = Events::default();
        let line = format!("data: {}\n", "y".repeat(LINE_LIMIT - 6));
        let outcome: Result<Vec<()>, _> = (0..100).map(|_| events.push(line.as_bytes())).collect();
        assert_eq!(outcome, Err(EventError::Event));
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_makes_no_difference(
            text in "(data: [a-z]{0,4}|event: x|id: 1|: c|\r|\n|\r\n){0,30}",
            cut in 0usize..200,
        ) {
            let bytes = text.as_bytes();
            let (head, tail) = bytes.split_at(cut.min(bytes.len()));
            prop_assert_eq!(all(&[head, tail]), all(&[bytes]));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut events = Events::default();
            let _outcome = events.push(&bytes);
        }
    }
}
