//! See `infrar_fuzz::chunked`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::chunked(data));
