"""The called gRPC service, on bytes instead of generated messages. Prints `listening PORT`."""

import sys
import threading
from concurrent import futures

import grpc

left = threading.Event()


def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
    caller = dict(context.invocation_metadata()).get("infrar-caller", "unknown")
    context.send_initial_metadata((("x-initial", "first"),))
    context.set_trailing_metadata((("x-trailing", "last"), ("x-caller", caller), ("x-bytes-bin", b"\x00\xff")))
    return request


def fail(_: bytes, context: grpc.ServicerContext) -> bytes:
    context.set_trailing_metadata((("x-why", "because"),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today: 100 %")


def silent(_: bytes, context: grpc.ServicerContext) -> bytes:
    gone = threading.Event()
    context.add_callback(gone.set)
    gone.wait(30)
    return b""


def count(request: bytes, _: grpc.ServicerContext):
    for n in range(int(request)):
        yield str(n).encode()


def total(requests, _: grpc.ServicerContext) -> bytes:
    return str(sum(len(request) for request in requests)).encode()


def talk(requests, _: grpc.ServicerContext):
    for request in requests:
        yield b"heard " + request


def watched(requests, context: grpc.ServicerContext):
    context.add_callback(left.set)
    yield from talk(requests, context)


def has_left(_: bytes, __: grpc.ServicerContext) -> bytes:
    return b"yes" if left.wait(20) else b"no"


METHODS = {
    "/echo.Echo/Unary": grpc.unary_unary_rpc_method_handler(unary),
    "/echo.Echo/Fail": grpc.unary_unary_rpc_method_handler(fail),
    "/echo.Echo/Silent": grpc.unary_unary_rpc_method_handler(silent),
    "/echo.Echo/Count": grpc.unary_stream_rpc_method_handler(count),
    "/echo.Echo/Total": grpc.stream_unary_rpc_method_handler(total),
    "/echo.Echo/Talk": grpc.stream_stream_rpc_method_handler(talk),
    "/echo.Echo/Watched": grpc.stream_stream_rpc_method_handler(watched),
    "/echo.Echo/HasLeft": grpc.unary_unary_rpc_method_handler(has_left),
}


class Service(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails):
        return METHODS.get(details.method)


server = grpc.server(futures.ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", 16 << 20)])
server.add_generic_rpc_handlers((Service(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print("listening", port, flush=True)
sys.stdin.read()  # ends with the test that started it
server.stop(None)
