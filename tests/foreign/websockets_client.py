"""websockets: an upgrade through both proxies, with messages of all sizes and a close code from the far end."""

import asyncio
import os

import websockets

OUTBOUND_HOST, OUTBOUND_PORT = os.environ["OUTBOUND"].split(":")


async def main() -> None:
    async with websockets.connect(
        "ws://data-intelligence/ws", host=OUTBOUND_HOST, port=int(OUTBOUND_PORT), proxy=None, subprotocols=["chat"], max_size=8 << 20
    ) as socket:
        assert socket.subprotocol == "chat", socket.subprotocol
        assert await socket.recv() == "caller web-application"
        for size in (0, 1, 125, 126, 65535, 65536, 3_000_000):
            message = os.urandom(size)
            await socket.send(message)
            assert await socket.recv() == message, size
        for n in range(500):
            await socket.send(f"message {n}")
            assert await socket.recv() == f"message {n}"
        await socket.ping()
        await socket.send("bye")
        try:
            await socket.recv()
            raise SystemExit("the far end did not close")
        except websockets.ConnectionClosed as closed:
            assert (closed.rcvd.code, closed.rcvd.reason) == (4001, "so long"), closed

    # What is refused is refused before the upgrade.
    try:
        await websockets.connect("ws://nowhere/ws", host=OUTBOUND_HOST, port=int(OUTBOUND_PORT), proxy=None)
        raise SystemExit("an unknown service was connected")
    except websockets.InvalidStatus as refused:
        assert refused.response.status_code == 404, refused


asyncio.run(main())
print("told")
