//! See `infrar_fuzz::path`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::path(data));
