"""A task that still uses the pool when its event loop is closed."""

import asyncio
import os

import asyncpg


async def watch(pool: asyncpg.Pool, ready: asyncio.Event) -> None:
    async with pool.acquire():
        ready.set()
        await asyncio.Event().wait()


async def main() -> None:
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)
    ready = asyncio.Event()
    background.append(asyncio.create_task(watch(pool, ready)))
    await ready.wait()


background: list[asyncio.Task[None]] = []
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
