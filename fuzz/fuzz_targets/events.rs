//! See `infrar_fuzz::events`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::events(data));
