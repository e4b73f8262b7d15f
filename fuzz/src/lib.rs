//! One function per parser of foreign bytes: what must hold whatever arrives.
//!
//! The fuzz targets call these, and `tests/parsers.rs` runs them under proptest on stable. None only asks that nothing panics: each states
//! something that a wrong parser breaks, mostly that bytes mean the same however they are cut, and that what was read prints back to
//! what reads the same.

mod config;
mod http1;
mod identity;
mod peers;
mod proxy;
mod words;

pub use self::{
    config::{project, settings, variables},
    http1::{chunked, http1_request, http1_response},
    identity::{claims, keys, path, token},
    peers::{hyper_request, hyper_response},
    proxy::{authority, headers},
    words::{events, origin, traceparent, words},
};

/// A parser under test: its name, what must hold, and bytes that reach its inside.
pub struct Target {
    /// The name of the fuzz target.
    pub name: &'static str,
    /// What must hold for any bytes.
    pub holds: fn(&[u8]),
    /// Inputs worth changing a little.
    pub seeds: &'static [&'static [u8]],
}

/// Every parser of foreign bytes that is our own.
pub const TARGETS: &[Target] = &[
    Target { name: "http1_request", holds: http1_request, seeds: http1::HTTP1_REQUESTS },
    Target { name: "http1_response", holds: http1_response, seeds: http1::HTTP1_RESPONSES },
    Target { name: "chunked", holds: chunked, seeds: http1::CHUNKED },
    Target { name: "hyper_request", holds: hyper_request, seeds: http1::HTTP1_REQUESTS },
    Target { name: "hyper_response", holds: hyper_response, seeds: http1::HTTP1_RESPONSES },
    Target { name: "authority", holds: authority, seeds: proxy::AUTHORITIES },
    Target { name: "headers", holds: headers, seeds: proxy::HEADS },
    Target { name: "traceparent", holds: traceparent, seeds: words::TRACEPARENTS },
    Target { name: "path", holds: path, seeds: identity::PATHS },
    Target { name: "token", holds: token, seeds: identity::TOKENS },
    Target { name: "claims", holds: claims, seeds: identity::CLAIMS },
    Target { name: "keys", holds: keys, seeds: identity::KEYS },
    Target { name: "events", holds: events, seeds: words::EVENTS },
    Target { name: "words", holds: words, seeds: words::WORDS },
    Target { name: "origin", holds: origin, seeds: words::ORIGINS },
    Target { name: "project", holds: project, seeds: config::PROJECTS },
    Target { name: "settings", holds: settings, seeds: config::SETTINGS },
    Target { name: "variables", holds: variables, seeds: config::VARIABLES },
];

/// The two ways of receiving `data`: at once, and cut where its first byte says.
fn cut(data: &[u8]) -> (&[u8], &[u8]) {
    let at = data.first().map_or(0, |first| usize::from(*first) * data.len() / 256);
    data.split_at(at)
}
