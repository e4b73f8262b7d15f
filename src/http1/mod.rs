//! HTTP/1.1 as bytes: heads, framing and chunks, parsed strictly and written plainly. No I/O here.
