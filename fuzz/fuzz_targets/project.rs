//! See `infrar_fuzz::project`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::project(data));
