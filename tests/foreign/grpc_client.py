"""grpcio through both proxies: unary, the three ways of streaming, statuses, deadlines and cancellation."""

import os
import queue

import grpc

OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 16 << 20)]


def calls(target: str, authority: str) -> grpc.Channel:
    return grpc.insecure_channel(target, OPTIONS + [("grpc.default_authority", authority)])


def story(channel: grpc.Channel) -> None:
    # Unary: the message, the metadata at both ends and the status come through.
    answer, call = channel.unary_unary("/echo.Echo/Unary").with_call(b"hello", timeout=20)
    assert answer == b"hello"
    assert dict(call.initial_metadata())["x-initial"] == "first"
    trailing = dict(call.trailing_metadata())
    assert trailing["x-trailing"] == "last" and trailing["x-bytes-bin"] == b"\x00\xff", trailing
    assert trailing["x-caller"] == "web-application", trailing
    big = os.urandom(5 << 20)
    assert channel.unary_unary("/echo.Echo/Unary")(big, timeout=20) == big

    # A failure keeps its status, its message and its trailers.
    try:
        channel.unary_unary("/echo.Echo/Fail")(b"", timeout=20)
        raise SystemExit("no failure")
    except grpc.RpcError as error:
        assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "not today: 100 %"), error
        assert dict(error.trailing_metadata())["x-why"] == "because", error

    assert list(channel.unary_stream("/echo.Echo/Count")(b"2000", timeout=20)) == [str(n).encode() for n in range(2000)]
    assert channel.stream_unary("/echo.Echo/Total")((b"x" * n for n in range(1000)), timeout=20) == b"499500"

    # Both ways: each message is sent only when the answer to the one before it is there.
    said: queue.Queue = queue.Queue()
    heard = channel.stream_stream("/echo.Echo/Talk")(iter(said.get, None), timeout=20)
    for n in range(200):
        said.put(str(n).encode())
        assert next(heard) == b"heard " + str(n).encode()
    said.put(None)
    assert list(heard) == []
    assert heard.code() == grpc.StatusCode.OK

    # The caller's deadline ends a call that nobody answers.
    try:
        channel.unary_unary("/echo.Echo/Silent")(b"", timeout=0.3)
        raise SystemExit("the silent call was answered")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error


by_name = calls(os.environ["OUTBOUND"], "data-intelligence")
story(by_name)
story(calls(os.environ["OUTBOUND_PORT"], "anything"))

# A cancelled stream ends at the service too.
said: queue.Queue = queue.Queue()
said.put(b"hello")
heard = by_name.stream_stream("/echo.Echo/Watched")(iter(said.get, None), timeout=25)
assert next(heard) == b"heard hello"
heard.cancel()
assert by_name.unary_unary("/echo.Echo/HasLeft")(b"", timeout=20) == b"yes"
said.put(None)

# A refusal of ours is a gRPC status.
try:
    calls(os.environ["OUTBOUND"], "data-inteligence").unary_unary("/echo.Echo/Unary")(b"", timeout=20)
    raise SystemExit("an unknown service was called")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.NOT_FOUND, error
    assert "data-inteligence" in error.details(), error.details()

print("told")
