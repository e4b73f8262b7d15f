//! W3C trace context, level 1 (<https://www.w3.org/TR/trace-context/>), and request ids.
//!
//! A proxy is a hop: it keeps the trace id and flags, and puts a span id of its own in the parent field. A trace it
//! begins itself is marked not sampled, because nobody has decided to record it.

use bytes::Bytes;
use http::HeaderValue;

/// Every byte as two hex digits.
#[expect(clippy::indexing_slicing, reason = "the compiler evaluates it, and checks it doing so")]
const HEX: [[u8; 2]; 256] = {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut table = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = [DIGITS[byte >> 4], DIGITS[byte & 15]];
        byte += 1;
    }
    table
};

/// The trace a request belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    trace: [u8; 32],
    flags: [u8; 2],
}

fn is_hex(text: &[u8]) -> bool {
    text.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex16(value: u64) -> [u8; 16] {
    let mut text = [0; 16];
    let (pairs, _none) = text.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(value.to_be_bytes()) {
        *pair = HEX.get(usize::from(byte)).copied().unwrap_or_default();
    }
    text
}

impl TraceContext {
    /// A trace that begins here.
    #[must_use]
    pub fn begin() -> Self {
        let mut trace = [0; 32];
        let (high, low) = trace.split_at_mut(16);
        high.copy_from_slice(&hex16(fastrand::u64(1..)));
        low.copy_from_slice(&hex16(fastrand::u64(1..)));
        Self { trace, flags: *b"00" }
    }

    /// Reads a `traceparent`; `None` when it is not valid, and a new trace must begin (§4.3).
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        // version "-" trace-id "-" parent-id "-" flags; a higher version may carry more after another dash.
        let version = text.get(..2)?;
        let trace: [u8; 32] = text.get(3..35)?.try_into().ok()?;
        let parent = text.get(36..52)?;
        let flags: [u8; 2] = text.get(53..55)?.try_into().ok()?;
        let dashes = [2, 35, 52].iter().all(|at| text.get(*at) == Some(&b'-'));
        let rest = match (version, text.len()) {
            (b"00", length) => length == 55,
            (_, 55) => true,
            (_, _) => text.get(55) == Some(&b'-'),
        };
        let digits = is_hex(version) && is_hex(&trace) && is_hex(parent) && is_hex(&flags);
        let nil = trace.iter().all(|b| *b == b'0') || parent.iter().all(|b| *b == b'0');
        (dashes && rest && digits && !nil && version != b"ff").then_some(Self { trace, flags })
    }

    /// The trace id as 32 hex digits.
    #[must_use]
    pub fn trace_id(&self) -> &str {
        std::str::from_utf8(&self.trace).unwrap_or_default()
    }

    /// The `traceparent` for the next hop, with a fresh span id.
    #[must_use]
    pub fn next_hop(&self) -> HeaderValue {
        let mut text = [b'-'; 55];
        let span = hex16(fastrand::u64(1..));
        let parts: [(usize, &[u8]); 4] =
            [(0, b"00"), (3, &self.trace), (36, &span), (53, &self.flags)];
        for (at, part) in parts {
            if let Some(slot) = text.get_mut(at..at + part.len()) {
                slot.copy_from_slice(part);
            }
        }
        HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&text))
            .unwrap_or_else(|_hex_and_dashes_only| HeaderValue::from_static(""))
    }
}

/// A fresh `x-request-id`: 128 random bits as hex.
#[must_use]
pub fn request_id() -> HeaderValue {
    let mut text = [0; 32];
    let (high, low) = text.split_at_mut(16);
    high.copy_from_slice(&hex16(fastrand::u64(..)));
    low.copy_from_slice(&hex16(fastrand::u64(..)));
    HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&text))
        .unwrap_or_else(|_hex_only| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &[u8] = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_trace_is_continued_with_a_span_of_our_own() {
        let context = TraceContext::parse(GOOD).unwrap();
        let next = context.next_hop();
        assert_eq!(context.trace_id(), "0af7651916cd43dd8448eb211c80319c");
        assert_ne!(next.as_bytes(), GOOD);
        assert_eq!(TraceContext::parse(next.as_bytes()), Some(context));
    }

    #[test]
    fn what_the_recommendation_calls_invalid_is_not_continued() {
        let cases: [&[u8]; 8] = [
            b"",
            b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            b"00-00000000000000000000000000000000-b7ad6b7169203331-01",
            b"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            b"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-extra",
            b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01extra",
            b"00-0af7651916cd43dd8448eb211c80319c_b7ad6b7169203331-01",
        ];
        for case in cases {
            assert_eq!(TraceContext::parse(case), None, "{:?}", String::from_utf8_lossy(case));
        }
        assert!(
            TraceContext::parse(b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x")
                .is_some()
        );
    }

    #[test]
    fn a_trace_that_begins_here_is_valid_and_not_sampled() {
        let next = TraceContext::begin().next_hop();
        assert!(TraceContext::parse(next.as_bytes()).is_some());
        assert!(next.as_bytes().ends_with(b"-00"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _parsed = TraceContext::parse(&bytes);
        }
    }
}
