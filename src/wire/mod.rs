//! Words that peers exchange: requests and responses, header lines, the body type, problem documents, proxy-status, request ids.
//!
//! What both ends of a connection must agree on lives here, without any opinion on when it is said.

mod body;
mod fields;
mod interim;
mod message;
mod problem;
mod replay;
mod trace;
mod trailers;

pub use body::{Body, BodyError, NextFrame, Prepended, StreamBody};
pub use fields::Fields;
pub use interim::Interim;
pub use message::{Request, Response};
pub use problem::{PROBLEM_JSON, Problem};
pub use replay::Replay;
pub use trace::{TraceContext, request_id};
pub use trailers::trailers;
