//! Words that peers exchange: the body type, problem documents, proxy-status, request ids.
