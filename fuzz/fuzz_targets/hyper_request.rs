//! See `infrar_fuzz::hyper_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::hyper_request(data));
