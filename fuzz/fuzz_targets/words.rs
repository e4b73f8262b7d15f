//! See `infrar_fuzz::words`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::words(data));
