//! The one seam to the network: dialling, listening, TLS.
