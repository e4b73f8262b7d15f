//! What HTTP/1.1 costs as bytes: the head of a typical call and of its answer, read and written, and a body in chunks.

#![expect(clippy::expect_used, reason = "a bench that cannot be set up should end")]

use std::hint::black_box;

use bytes::{BufMut, BytesMut};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use http::Method;
use infrar::http1::{
    BodyDecoder, Framing, HeadLimits, Piece, encode_chunk, encode_headers, encode_last_chunk,
    encode_request_line, encode_status_line, parse_request, parse_response, request_framing,
    response_framing,
};

/// As an HTTP client of a service writes it.
const REQUEST: &[u8] = b"POST /query?limit=100&order=desc HTTP/1.1\r\n\
    Host: data-intelligence\r\n\
    User-Agent: python-httpx/0.28.1\r\n\
    Accept: application/json\r\n\
    Accept-Encoding: gzip, deflate, br, zstd\r\n\
    Connection: keep-alive\r\n\
    Content-Type: application/json\r\n\
    Content-Length: 27\r\n\
    X-Request-Id: 0199d3f07c1e7d529c1f6f1f5a3a2b10\r\n\
    Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\r\n";

/// As a service answers.
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\n\
    Date: Tue, 24 Nov 2026 08:00:00 GMT\r\n\
    Server: uvicorn\r\n\
    Content-Type: application/json\r\n\
    Content-Length: 512\r\n\
    Cache-Control: no-store\r\n\
    Vary: Accept-Encoding\r\n\r\n";

/// A body of this size, in chunks of what one read brings.
const BODY: usize = 64 * 1024;
const CHUNK: usize = 8 * 1024;

fn read(criterion: &mut Criterion) {
    let limits = HeadLimits::default();
    let mut group = criterion.benchmark_group("read");
    // The buffer is made anew for each head, as it is where the last one is still held by a request.
    group.bench_function("request", |bench| {
        bench.iter_batched_ref(
            || BytesMut::from(REQUEST),
            |buffer| {
                let head = parse_request(buffer, limits).expect("valid").expect("whole");
                let framing = request_framing(head.version, &head.fields);
                (head, framing)
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("response", |bench| {
        bench.iter_batched_ref(
            || BytesMut::from(RESPONSE),
            |buffer| {
                let head = parse_response(buffer, limits).expect("valid").expect("whole");
                let framing =
                    response_framing(&Method::POST, head.version, head.status, &head.fields);
                (head, framing)
            },
            BatchSize::SmallInput,
        );
    });
    let mut chunked = BytesMut::new();
    for part in vec![b'x'; BODY].chunks(CHUNK) {
        encode_chunk(part, &mut chunked);
    }
    encode_last_chunk(None, &mut chunked);
    group.throughput(Throughput::Bytes(BODY as u64));
    group.bench_function("chunked", |bench| {
        bench.iter_batched_ref(
            || (BodyDecoder::new(Framing::Chunked, limits), chunked.clone()),
            |(decoder, buffer)| {
                while !matches!(decoder.next(buffer).expect("valid"), Piece::End) {}
                assert!(buffer.is_empty());
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn write(criterion: &mut Criterion) {
    let limits = HeadLimits::default();
    let request = parse_request(&mut BytesMut::from(REQUEST), limits);
    let request = request.expect("valid").expect("whole");
    let target = request.uri.to_string();
    let response = parse_response(&mut BytesMut::from(RESPONSE), limits);
    let response = response.expect("valid").expect("whole");
    let mut out = BytesMut::with_capacity(2 * BODY);
    let mut group = criterion.benchmark_group("write");
    group.bench_function("request", |bench| {
        bench.iter(|| {
            out.clear();
            encode_request_line(&request.method, black_box(&target), &mut out);
            encode_headers(black_box(&request.fields).iter(), &mut out);
            out.put_slice(b"\r\n");
            out.len()
        });
    });
    group.bench_function("response", |bench| {
        bench.iter(|| {
            out.clear();
            encode_status_line(black_box(response.status), &mut out);
            encode_headers(black_box(&response.fields).iter(), &mut out);
            out.put_slice(b"\r\n");
            out.len()
        });
    });
    let body = vec![b'x'; BODY];
    group.throughput(Throughput::Bytes(BODY as u64));
    group.bench_function("chunked", |bench| {
        bench.iter(|| {
            out.clear();
            for part in black_box(&body).chunks(CHUNK) {
                encode_chunk(part, &mut out);
            }
            encode_last_chunk(None, &mut out);
            out.len()
        });
    });
    group.finish();
}

criterion_group!(benches, read, write);
criterion_main!(benches);
