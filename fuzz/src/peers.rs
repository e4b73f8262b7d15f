//! The same bytes read by our codec and by hyper's: what we accept, hyper reads alike, and what we write as well.
//!
//! A difference here is how requests are smuggled. We may refuse what hyper repairs, never the other way round.

use std::{cell::RefCell, convert::Infallible, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use infrar::http1::{
    BodyDecoder, Framing, HeadError, HeadLimits, Piece, encode_chunk, encode_headers,
    encode_last_chunk, encode_request_line, encode_status_line, keeps_alive, parse_request,
    parse_response, request_framing, response_framing,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    runtime::{Builder, Runtime},
    time::timeout,
};

/// One whole message, as somebody read it.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Method, target and version, or version and status.
    pub line: String,
    /// The header lines.
    pub headers: HeaderMap,
    /// The bytes of the body.
    pub body: Vec<u8>,
    /// The trailers, if there are any.
    pub trailers: HeaderMap,
}

/// What a byte string holds: the messages up to the end, or up to what is refused.
#[derive(Debug)]
pub struct Reading {
    /// Whole messages.
    pub messages: Vec<Message>,
    /// Why there are no more.
    pub refused: Option<HeadError>,
    /// The messages as our encoder writes them.
    printed: BytesMut,
}

/// Every request that we accept, hyper reads as the same one, and again when we have written it.
pub fn hyper_request(data: &[u8]) {
    let ours = read_requests(data);
    let theirs = hyper_requests(data);
    let (messages, refused) = (&ours.messages, ours.refused);
    assert!(theirs.starts_with(messages), "we: {messages:#?} {refused:?}\nhyper: {theirs:#?}");
    let written = hyper_requests(&ours.printed);
    assert_eq!(written, ours.messages, "written as {:?}", ours.printed);
}

/// Every response that we accept, hyper reads as the same one, and again when we have written it.
pub fn hyper_response(data: &[u8]) {
    for method in [Method::GET, Method::HEAD] {
        let ours = read_response(&method, data);
        if let Some(message) = ours.messages.first() {
            let theirs = hyper_answer(&method, data);
            assert_eq!(theirs.as_ref(), Some(message), "{method}: we left, hyper right");
            let written = hyper_answer(&method, &ours.printed);
            assert_eq!(written.as_ref(), Some(message), "written as {:?}", ours.printed);
        }
    }
}

/// Our reading of requests that follow each other on one connection.
pub fn read_requests(data: &[u8]) -> Reading {
    let mut reading = Reading { messages: Vec::new(), refused: None, printed: BytesMut::new() };
    let mut buffer = BytesMut::from(data);
    loop {
        match next_request(&mut buffer, &mut reading.printed) {
            Ok(Some((message, Afterwards::KeepAlive))) => reading.messages.push(message),
            Ok(Some((message, Afterwards::Close))) => {
                reading.messages.push(message);
                return reading;
            }
            Ok(None) => return reading,
            Err(refused) => return Reading { refused: Some(refused), ..reading },
        }
    }
}

enum Afterwards {
    KeepAlive,
    Close,
}

fn next_request(
    buffer: &mut BytesMut,
    printed: &mut BytesMut,
) -> Result<Option<(Message, Afterwards)>, HeadError> {
    let Some(head) = parse_request(buffer, HeadLimits::default())? else { return Ok(None) };
    let framing = request_framing(head.version, &head.fields)?;
    let Some((body, trailers)) = read_body(framing, buffer)? else { return Ok(None) };
    let last = head.method == Method::CONNECT || !keeps_alive(head.version, &head.fields);
    let line = format!("{} {} {:?}", head.method, head.uri, head.version);
    encode_request_line(&head.method, &head.uri.to_string(), printed);
    as_version(head.version, printed.len() - 3, printed);
    let headers = HeaderMap::from(head.fields);
    encode_message(&headers, framing, &body, &trailers, printed);
    let message = Message { line, headers, body, trailers };
    Ok(Some((message, if last { Afterwards::Close } else { Afterwards::KeepAlive })))
}

/// Our reading of the answer to `method`, interim ones passed over; the connection ends with the bytes.
pub fn read_response(method: &Method, data: &[u8]) -> Reading {
    let mut printed = BytesMut::new();
    match final_response(method, &mut BytesMut::from(data), &mut printed) {
        Ok(message) => Reading { messages: message.into_iter().collect(), refused: None, printed },
        Err(refused) => Reading { messages: Vec::new(), refused: Some(refused), printed },
    }
}

fn final_response(
    method: &Method,
    buffer: &mut BytesMut,
    printed: &mut BytesMut,
) -> Result<Option<Message>, HeadError> {
    loop {
        let Some(head) = parse_response(buffer, HeadLimits::default())? else { return Ok(None) };
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(None);
        }
        if head.status.is_informational() {
            continue;
        }
        let framing = response_framing(method, head.version, head.status, &head.fields)?;
        let Some((body, trailers)) = read_body(framing, buffer)? else { return Ok(None) };
        let line = format!("{:?} {}", head.version, head.status.as_u16());
        encode_status_line(head.status, printed);
        as_version(head.version, "HTTP/1.".len(), printed);
        let headers = HeaderMap::from(head.fields);
        encode_message(&headers, framing, &body, &trailers, printed);
        return Ok(Some(Message { line, headers, body, trailers }));
    }
}

/// We always write 1.1. What is compared is the rest, so the version is put back at `at`.
fn as_version(version: Version, at: usize, printed: &mut BytesMut) {
    if version == Version::HTTP_10 {
        printed[at] = b'0';
    }
}

/// A whole body; `None` when it does not come to its end.
fn read_body(
    framing: Framing,
    buffer: &mut BytesMut,
) -> Result<Option<(Vec<u8>, HeaderMap)>, HeadError> {
    let mut decoder = BodyDecoder::new(framing, HeadLimits::default());
    let (mut body, mut trailers) = (Vec::new(), HeaderMap::new());
    loop {
        match decoder.next(buffer)? {
            Piece::Data(part) => body.extend_from_slice(&part),
            Piece::Trailers(found) => trailers = found,
            Piece::End => return Ok(Some((body, trailers))),
            Piece::More if framing == Framing::UntilClose => return Ok(Some((body, trailers))),
            Piece::More => return Ok(None),
        }
    }
}

/// What follows the first line. The headers still say how the body is framed.
fn encode_message(
    headers: &HeaderMap,
    framing: Framing,
    body: &[u8],
    trailers: &HeaderMap,
    printed: &mut BytesMut,
) {
    encode_headers(headers.iter(), printed);
    printed.put_slice(b"\r\n");
    if framing == Framing::Chunked {
        for part in body.chunks(7) {
            encode_chunk(part, printed);
        }
        encode_last_chunk(Some(trailers), printed);
    } else {
        printed.put_slice(body);
    }
}

/// Longer than anything here takes: nothing waits for a peer.
const STUCK: Duration = Duration::from_secs(20);

fn on_runtime<T>(work: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: Runtime =
            Builder::new_current_thread().enable_time().build().expect("a runtime");
    }
    RUNTIME
        .with(|runtime| runtime.block_on(async { timeout(STUCK, work).await }))
        .expect("hyper comes to an end")
}

async fn whole(line: String, headers: HeaderMap, body: Incoming) -> Option<Message> {
    let body = body.collect().await.ok()?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    Some(Message { line, headers, body: body.to_bytes().to_vec(), trailers })
}

/// hyper's reading of requests that follow each other on one connection.
pub fn hyper_requests(data: &[u8]) -> Vec<Message> {
    let read = RefCell::new(Vec::new());
    let service = service_fn(|request: Request<Incoming>| async {
        let (head, body) = request.into_parts();
        let line = format!("{} {} {:?}", head.method, head.uri, head.version);
        let message = whole(line, head.headers, body).await;
        read.borrow_mut().extend(message);
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    on_runtime(async {
        let (mut client, server) = duplex(1 << 20);
        client.write_all(data).await.expect("there is room");
        client.shutdown().await.expect("a pipe can be closed");
        let mut server = hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(server), service);
        // Its refusal is as good as its end: what counts is what it read before.
        let _end = (&mut server).await;
        drop(client);
    });
    read.into_inner()
}

/// hyper's reading of the answer to `method`; the connection ends with the bytes.
pub fn hyper_answer(method: &Method, data: &[u8]) -> Option<Message> {
    on_runtime(async {
        let (client, mut peer) = duplex(1 << 20);
        let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client))
            .await
            .expect("no handshake");
        let asking = async move {
            let mut request = Request::new(Empty::<Bytes>::new());
            *request.method_mut() = method.clone();
            request.headers_mut().insert(header::HOST, "a".parse().expect("a host"));
            let (head, body) = send.send_request(request).await.ok()?.into_parts();
            let line = format!("{:?} {}", head.version, head.status.as_u16());
            whole(line, head.headers, body).await
        };
        let answering = async move {
            let mut asked = [0; 1024];
            let _length = peer.read(&mut asked).await.expect("a request comes");
            peer.write_all(data).await.expect("there is room");
            peer.shutdown().await.expect("a pipe can be closed");
            peer
        };
        let (answer, _end, _peer) = tokio::join!(asking, connection, answering);
        answer
    })
}
