//! See `infrar_fuzz::traceparent`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infrar_fuzz::traceparent(data));
