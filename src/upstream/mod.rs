//! Connections to endpoints: opened, kept warm, retired.
