"""Five hundred tests of one application with workers: none sees what another one did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import asyncpg
import pytest
import redis.asyncio as redis

from lifekit import Lifespan, Registry, testing
from lifekit.embedded import Server

TESTS = 500


class Shop:
    """A heartbeat, a consumer of a stream, and a listener, each of which notes what it has seen."""

    def __init__(self, postgres: Server, valkey: Server) -> None:
        self.registry = registry = Registry("shop")
        self.beaten, self.consumed, self.heard = asyncio.Event(), list[str](), list[str]()
        self.errors: list[Exception] = []
        self.has_come = asyncio.Event()

        @registry.resource
        def db() -> asyncpg.Pool:
            return asyncpg.create_pool(postgres.url, min_size=1, max_size=4)

        @registry.resource
        def cache() -> redis.Redis:
            return redis.from_url(valkey.url, decode_responses=True)

        @registry.resource(db, cache)
        async def tables(db: asyncpg.Pool, cache: redis.Redis) -> AsyncGenerator[None]:
            await db.execute("DROP TABLE IF EXISTS long_beats")
            await db.execute("CREATE TABLE long_beats (at timestamptz)")
            await cache.xgroup_create("jobs", "shop", mkstream=True)
            yield
            await db.execute("DROP TABLE long_beats")

        @registry.worker(db, every=0.01, after=[tables])
        async def heartbeat(db: asyncpg.Pool) -> None:
            await db.execute("INSERT INTO long_beats VALUES (now())")
            self.beaten.set()

        @registry.worker(cache, after=[tables])
        async def consumer(cache: redis.Redis) -> None:
            while True:
                read: Any = await cache.xreadgroup("shop", "one", {"jobs": ">"}, block=1000)
                for _, entries in read or ():
                    for key, fields in entries:
                        self.consumed.append(fields["test"])
                        await cache.xack("jobs", "shop", key)
                        self.has_come.set()

        @registry.worker(db, after=[tables])
        async def listener(db: asyncpg.Pool) -> None:
            async with db.acquire() as connection:
                await connection.add_listener("jobs", self.hear)
                try:
                    await asyncio.Event().wait()
                finally:
                    await connection.remove_listener("jobs", self.hear)

        self.db, self.cache = db, cache
        self.workers = (heartbeat, consumer, listener)

    def hear(self, connection: object, pid: int, channel: str, payload: object) -> None:
        """Note what was told by NOTIFY."""
        self.heard.append(str(payload))
        self.has_come.set()

    async def test(self, lifespan: Lifespan, name: str) -> None:
        """Let each worker do something, and see that it did that alone."""
        self.beaten.clear()
        self.consumed.clear()
        self.heard.clear()
        await lifespan[self.cache].xadd("jobs", {"test": name})
        await self.beaten.wait()
        while not self.consumed or not self.heard:
            self.has_come.clear()
            await lifespan[self.db].execute("SELECT pg_notify('jobs', $1)", name)
            with anyio.move_on_after(1):
                await self.has_come.wait()
        assert set(self.consumed) == set(self.heard) == {name}
        assert await lifespan[self.db].fetchval("SELECT count(*) FROM long_beats") > 0


@pytest.mark.long
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_no_worker_of_a_test_touches_the_next_one(postgres: Server, valkey: Server) -> None:
    shop = Shop(postgres, valkey)
    with testing.sandboxing():
        async with shop.registry.lifespan() as lifespan:
            for number in range(TESTS):
                async with lifespan.sandbox():
                    await shop.test(lifespan, f"test {number}")
                    assert [lifespan[each].last_error for each in shop.workers] == [None] * 3
                assert await lifespan[shop.db].fetchval("SELECT count(*) FROM long_beats") == 0
                assert await lifespan[shop.cache].xlen("jobs") == 0
