//! See `infrar_fuzz::authority`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::authority(data));
