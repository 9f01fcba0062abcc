"""An application on aiopg and Redis, and the ways to isolate one test of it."""

# Not `from __future__ import annotations`: FastAPI evaluates them, and here they are local.

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any

import aiopg
import redis.asyncio as redis
from fastapi import Depends, FastAPI, Request
from httpx2 import ASGITransport, AsyncClient

from lifekit import Registry
from lifekit.testing import sandboxing

from .per_test import Test, Way

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


def application(lifespan: Lifespan, db: Any, cache: Any) -> tuple[FastAPI, Callable[..., Any]]:
    """Return the application, and its dependency that gives a connection; *db* and *cache* are two."""
    app = FastAPI(lifespan=lifespan)

    async def connection(db: Annotated[Any, Depends(db)]) -> AsyncGenerator[Any]:
        async with db.acquire() as acquired:
            yield acquired

    @app.post("/api/users", status_code=201)
    async def create(
        name: str,
        connection: Annotated[Any, Depends(connection)],
        cache: Annotated[Any, Depends(cache)],
    ) -> None:
        async with connection.cursor() as cursor:
            await cursor.execute("INSERT INTO notes (body) VALUES (%s)", [name])
        await cache.incr("users")

    @app.get("/api/users/last")
    async def last(
        connection: Annotated[Any, Depends(connection)], cache: Annotated[Any, Depends(cache)]
    ) -> str:
        assert await cache.get("users")
        async with connection.cursor() as cursor:
            await cursor.execute("SELECT body FROM notes ORDER BY id DESC LIMIT 1")
            [name] = await cursor.fetchone()
        return str(name)

    return app, connection


async def use(client: AsyncClient) -> None:
    """Do what a test does."""
    assert (await client.post("/api/users?name=ada")).status_code == 201
    assert (await client.get("/api/users/last")).json() == "ada"


def client_of(app: FastAPI) -> AsyncClient:
    """Return a client of an application whose lifespan runs."""
    return AsyncClient(transport=ASGITransport(app), base_url="http://test")


def ways(postgres: str, valkey: str) -> dict[str, Way]:
    """Return the ways to isolate a test of the application, in a database that has the table."""

    def of_state(name: str) -> Callable[[Request], Any]:
        def dependency(request: Request) -> Any:
            return getattr(request.app.state, name)

        return dependency

    @asynccontextmanager
    async def by_hand(app: FastAPI) -> AsyncGenerator[None]:
        root = valkey.rpartition("/")[0]
        async with (
            aiopg.create_pool(postgres, minsize=1) as app.state.db,
            redis.from_url(f"{root}/9") as app.state.cache,
        ):
            yield

    @asynccontextmanager
    async def nothing() -> AsyncGenerator[Test]:
        app, _ = application(by_hand, of_state("db"), of_state("cache"))
        async with app.router.lifespan_context(app), client_of(app) as client:

            async def test() -> None:
                await use(client)

            yield test

    @asynccontextmanager
    async def rollback() -> AsyncGenerator[Test]:
        app, connection = application(by_hand, of_state("db"), of_state("cache"))
        async with app.router.lifespan_context(app), client_of(app) as client:

            async def test() -> None:
                async with app.state.db.acquire() as acquired, acquired.cursor() as cursor:
                    app.dependency_overrides[connection] = lambda: acquired
                    await cursor.execute("BEGIN")
                    try:
                        await use(client)
                    finally:
                        await cursor.execute("ROLLBACK")
                        await app.state.cache.flushdb()

            yield test

    @asynccontextmanager
    async def sandbox() -> AsyncGenerator[Test]:
        registry = Registry("users")

        @registry.resource
        async def db() -> aiopg.Pool:
            return await aiopg.create_pool(postgres, minsize=1)

        @registry.resource
        def cache() -> redis.Redis:
            return redis.from_url(valkey)

        app, _ = application(registry.lifespan, db, cache)
        with sandboxing():
            async with registry.lifespan() as lifespan, client_of(app) as client:

                async def test() -> None:
                    async with lifespan.sandbox():
                        await use(client)

                yield test

    return {
        "nothing": Way(nothing, isolates=False),
        "rollback and FLUSHDB": Way(rollback),
        "lifekit's sandbox": Way(sandbox, stays=False),
    }
