//! HTTP/1.1 as bytes: heads, framing and chunks, parsed strictly and written plainly.
//!
//! The one idea: what two parsers could read differently is refused, not repaired, because the difference is how
//! requests are smuggled. Both sides of the proxy use this room; it does no I/O, so every rule can be tested and
//! fuzzed with plain byte strings. RFC 9112 is meant wherever a section is named without a document.

mod body;
mod chunked;
mod encode;
mod framing;
mod head;

pub use body::{BodyDecoder, Piece};
pub use chunked::{Chunk, ChunkDecoder, encode_chunk, encode_last_chunk};
pub use encode::{encode_headers, encode_request_line, encode_status_line};
pub use framing::{Framing, keeps_alive, request_framing, response_framing};
pub use head::{
    HeadError, HeadLimits, ParsedRequest, ParsedResponse, is_host, parse_request, parse_response,
};
