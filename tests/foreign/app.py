"""The called service: an HTTP and WebSocket app that says what reached it. Prints `listening PORT`."""

import asyncio
import hashlib
import sys

from aiohttp import WSMsgType, web


async def echo(request: web.Request) -> web.Response:
    """What arrived, byte for byte as far as HTTP has bytes."""
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "target": request.raw_path,
            "headers": [[name.decode("latin-1").lower(), value.decode("latin-1")] for name, value in request.raw_headers],
            "length": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
            "text": body.decode("utf-8", "replace") if len(body) < 4096 else None,
        }
    )


async def large(request: web.Request) -> web.StreamResponse:
    """`n` bytes, chunked, each a function of its place."""
    left = int(request.query["n"])
    response = web.StreamResponse()
    await response.prepare(request)
    block = bytes(range(256)) * 256
    while left > 0:
        await response.write(block[:left])
        left -= len(block)
    await response.write_eof()
    return response


async def line_by_line(request: web.Request) -> web.StreamResponse:
    """Answers each line of the request before the next one arrives: only a proxy that streams lets this end."""
    response = web.StreamResponse()
    await response.prepare(request)
    async for line in request.content:
        await response.write(b"heard " + line)
    await response.write_eof()
    return response


async def ws(request: web.Request) -> web.WebSocketResponse:
    """Sends every message back; `bye` ends the conversation with a code of our own."""
    socket = web.WebSocketResponse(protocols=("chat",), max_msg_size=8 << 20)
    await socket.prepare(request)
    await socket.send_str("caller " + request.headers.get("infrar-caller", "unknown"))
    async for message in socket:
        if message.type is WSMsgType.TEXT and message.data == "bye":
            await socket.close(code=4001, message=b"so long")
        elif message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


async def status(request: web.Request) -> web.Response:
    return web.Response(status=int(request.match_info["code"]), text="as asked")


async def main() -> None:
    app = web.Application(client_max_size=64 << 20)
    app.router.add_get("/healthz", lambda _: web.Response(text="fine"))
    app.router.add_get("/large", large)
    app.router.add_post("/lines", line_by_line)
    app.router.add_get("/ws", ws)
    app.router.add_route("*", "/status/{code}", status)
    app.router.add_route("*", "/{rest:.*}", echo)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print("listening", site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # ends with the test that started it


asyncio.run(main())
