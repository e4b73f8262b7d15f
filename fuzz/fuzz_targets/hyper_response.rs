//! See `infrar_fuzz::hyper_response`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::hyper_response(data));
