"""A task that has an owner, which ends it before the pool closes."""

import asyncio
import os
from collections.abc import AsyncGenerator

import asyncpg

from lifekit import Registry

registry = Registry()


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


async def watch(pool: asyncpg.Pool, ready: asyncio.Event) -> None:
    async with pool.acquire():
        ready.set()
        await asyncio.Event().wait()


@registry.resource(db)
async def watcher(db: asyncpg.Pool) -> AsyncGenerator[None]:
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch(db, ready))
        await ready.wait()
        yield
        task.cancel()


async def main() -> None:
    async with registry.lifespan():
        print("it watches")


loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
