//! Which endpoint serves this attempt: arithmetic only; nothing here waits, locks or reads a clock.
