//! See `infrar_fuzz::origin`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::origin(data));
