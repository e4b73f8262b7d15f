//! See `infrar_fuzz::token`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::token(data));
