//! RFC 9457 problem documents, the body of every answer that infrar makes up itself.

use serde::{Deserialize, Serialize};

/// The media type of RFC 9457 §3.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// A problem document. `code` is stable; everything else is for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `urn:infrar:problem:CODE`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind of problem in a few words.
    pub title: String,
    /// The HTTP status, repeated.
    pub status: u16,
    /// What happened this time, and what to do.
    pub detail: String,
    /// The stable code.
    pub code: String,
    /// The `x-request-id` of the request.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub request_id: String,
    /// For `unknown-service`: the nearest known names.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub nearest: Option<Vec<String>>,
}

impl Problem {
    /// A problem with this code; the title is the code in words.
    #[must_use]
    pub fn new(status: u16, code: &str, detail: String) -> Self {
        Self {
            kind: format!("urn:infrar:problem:{code}"),
            title: title(code),
            status,
            detail,
            code: code.to_owned(),
            request_id: String::new(),
            nearest: None,
        }
    }
}

/// The code as the beginning of a sentence.
fn title(code: &str) -> String {
    let words = code.replace('-', " ");
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_the_document_that_clients_read() {
        let problem = Problem::new(404, "unknown-service", "no such service".into());
        assert_eq!(
            serde_json::to_string(&problem).unwrap(),
            r#"{"type":"urn:infrar:problem:unknown-service","title":"Unknown service","status":404,"detail":"no such service","code":"unknown-service"}"#
        );
    }
}
