//! A request and a response on their way through the proxy, whichever HTTP carried them.

use http::{Method, StatusCode, Uri, Version};

use crate::wire::{Body, Fields};

/// A request.
#[derive(Debug)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The target, in any of the four forms of RFC 9112 §3.2.
    pub uri: Uri,
    /// The version it came in.
    pub version: Version,
    /// The header lines.
    pub fields: Fields,
    /// The body.
    pub body: Body,
}

/// A response.
#[derive(Debug)]
pub struct Response {
    /// The status.
    pub status: StatusCode,
    /// The header lines.
    pub fields: Fields,
    /// The body.
    pub body: Body,
}
