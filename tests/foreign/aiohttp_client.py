"""aiohttp, told of the proxy by HTTP_PROXY; many requests at once on one event loop."""

import asyncio

import aiohttp

NAME = "http://data-intelligence"


async def main() -> None:
    async with aiohttp.ClientSession(trust_env=True, connector=aiohttp.TCPConnector(limit=40)) as session:

        async def one(n: int) -> tuple[int, str]:
            async with session.post(f"{NAME}/query?n={n}", data=b"z" * n) as answer:
                assert answer.status == 200, await answer.text()
                seen = await answer.json()
                return seen["length"], seen["target"]

        answers = await asyncio.gather(*(one(n) for n in range(400)))
        assert answers == [(n, f"/query?n={n}") for n in range(400)]

        async def blocks():
            for _ in range(32):
                yield b"b" * 100_000

        async with session.put(NAME + "/query", data=blocks()) as answer:
            assert (await answer.json())["length"] == 3_200_000

        async with session.get(NAME + "/large?n=10000000") as answer:
            assert sum([len(part) async for part in answer.content.iter_any()]) == 10_000_000

        # A caller that leaves in the middle of an answer harms nobody else.
        async with session.get(NAME + "/large?n=50000000") as answer:
            await answer.content.readexactly(1000)
            answer.close()
        assert await one(7) == (7, "/query?n=7")


asyncio.run(main())
print("told")
