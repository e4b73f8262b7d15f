//! Words that peers exchange: the body type, problem documents, proxy-status, request ids.
//!
//! What both ends of a connection must agree on lives here, without any opinion on when it is said.

mod body;
mod interim;
mod problem;
mod replay;
mod trace;

pub use body::{Body, BodyError, Prepended, StreamBody};
pub use interim::Interim;
pub use problem::{PROBLEM_JSON, Problem};
pub use replay::Replay;
pub use trace::{TraceContext, request_id};
