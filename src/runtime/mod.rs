//! How tasks live and end, and what time it is.
