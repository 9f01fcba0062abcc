"""A task that still uses the pool when its lifespan ends: it is named."""

import asyncio
import os

import asyncpg

from lifekit import Registry

registry = Registry(close_timeout=0.5)


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


async def watch(ready: asyncio.Event) -> None:
    async with db.get().acquire():
        ready.set()
        await asyncio.Event().wait()


async def main() -> None:
    async with registry.lifespan():
        ready = asyncio.Event()
        background.append(asyncio.create_task(watch(ready), name="watcher"))
        await ready.wait()


background: list[asyncio.Task[None]] = []
asyncio.run(main())
