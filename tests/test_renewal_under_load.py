"""A pool on real PostgreSQL is renewed again and again, with a new login each time, amid requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import anyio
import asyncpg
import psycopg2
import pytest
from fastapi import Depends, FastAPI
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

import lifekit
from lifekit import Registry, embedded, events, testing

FEW, MANY, AT_ONCE = 300, 10_000, 20


class Logins:
    """Logins of a server, a new one each time it is asked for."""

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name, self._numbers = url, name, count(1)
        self._admin: Any = psycopg2.connect(url)
        self._admin.autocommit = True
        self.names: list[str] = []

    def new(self) -> str:
        """Make one, and return the URL with which it logs in."""
        name = f"{self._name}_{next(self._numbers)}"
        with self._admin.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
        self.names.append(name)
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(netloc=f"{name}:secret@{parts.hostname}:{parts.port}"))

    def connected(self) -> set[str]:
        """Return those that are connected."""
        with self._admin.cursor() as cursor:
            asked = "SELECT usename FROM pg_stat_activity WHERE usename LIKE %s"
            cursor.execute(asked, (f"{self._name}%",))
            return {row[0] for row in cursor.fetchall()}

    def drop(self) -> None:
        with self._admin.cursor() as cursor:
            for name in self.names:
                cursor.execute(f"DROP ROLE {name}")
        self._admin.close()


@pytest.fixture
def logins(postgres: embedded.Server) -> Iterator[Logins]:
    made = Logins(postgres.url, f"renewal_{uuid4().hex}")
    yield made
    made.drop()


def of_asyncpg(url: str) -> Any:
    return asyncpg.create_pool(url, min_size=1, max_size=5)


def of_psycopg(url: str) -> Any:
    return AsyncConnectionPool(url, min_size=1, max_size=5, open=False)


def of_sqlalchemy(url: str) -> AsyncEngine:
    return create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))


async def who(value: Any) -> str:
    """Return the login of a connection."""
    if isinstance(value, asyncpg.Pool):
        return str(await value.fetchval("SELECT current_user"))
    if isinstance(value, AsyncEngine):
        async with value.connect() as engaged:
            return str((await engaged.execute(text("SELECT current_user"))).scalar_one())
    async with value.connection() as connection:
        row = await (await connection.execute("SELECT current_user")).fetchone()
        return str(row[0])


ASYNCIO, UVLOOP = ("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})


@pytest.mark.anyio
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("driver", "anyio_backend", "requests"),
    [
        pytest.param(of_asyncpg, UVLOOP, FEW, id="asyncpg, uvloop"),
        pytest.param(of_psycopg, ASYNCIO, 2000, id="psycopg, asyncio", marks=pytest.mark.long),
        pytest.param(of_asyncpg, UVLOOP, MANY, id="asyncpg, uvloop, many", marks=pytest.mark.proof),
        pytest.param(of_asyncpg, ASYNCIO, MANY, id="asyncpg, asyncio, many", marks=pytest.mark.proof),
        pytest.param(of_psycopg, UVLOOP, MANY, id="psycopg, uvloop, many", marks=pytest.mark.proof),
        pytest.param(
            of_sqlalchemy, ASYNCIO, MANY, id="SQLAlchemy, asyncio, many", marks=pytest.mark.proof
        ),
    ],
)
async def test_no_request_fails_and_old_logins_are_gone(
    anyio_backend: object, logins: Logins, driver: Callable[[str], Any], requests: int
) -> None:
    heard: list[events.Event] = []
    registry = Registry("shop", on_event=heard.append)

    @registry.resource(renew_every=0.1 if requests == FEW else 0.2)
    def db() -> Any:
        return driver(logins.new())

    @registry.resource(db)
    def links(db: Any) -> list[Any]:
        return [db]

    working: list[str] = []

    @registry.worker(links, drain=60.0)  # to cancel asyncpg as it connects leaves a lost future
    async def purge(links: list[Any]) -> None:
        while not lifekit.stopping().is_set():
            working.append(await who(links[0]))
            await anyio.sleep(0.01)

    app = FastAPI(lifespan=registry.lifespan)
    taken: Any = Depends(db)

    @app.get("/")
    async def ask(value: Any = taken) -> list[str]:
        first = await who(value)
        await anyio.sleep(0.01)  # what it was given at its beginning serves it to its end
        return [first, await who(value), await who(db.get())]

    answers: list[list[str]] = []

    def renewals() -> int:
        return sum(isinstance(each, events.Renewed) for each in heard)

    async with testing.client(app) as client, anyio.create_task_group() as tasks:

        async def visitor() -> None:
            while len(answers) < requests or renewals() < 3:
                answer = await client.get("/")
                assert answer.status_code == 200, answer.text
                answers.append(answer.json())

        async with anyio.create_task_group() as visitors:
            for _ in range(AT_ONCE):
                visitors.start_soon(visitor)
        with anyio.fail_after(60):
            while not {logins.names[-1]} >= logins.connected():  # noqa: ASYNC110
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    print(f"{len(answers)} requests amid {renewals()} renewals, {len({*working})} seen by the worker")
    assert len(answers) >= requests
    assert renewals() >= 3
    assert all(first == second for first, second, _ in answers)
    assert len({first for first, _, _ in answers}) >= 2
    assert len({*working}) >= 2
    kinds = (events.RenewalFailed, events.HeldTooLong, events.CloseFailed, events.WorkerFailed)
    assert [each for each in heard if isinstance(each, kinds)] == []
