//! See `infrar_fuzz::variables`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::variables(data));
