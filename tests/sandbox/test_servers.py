"""Servers that take encrypted connections only, and poolers, which are refused.

Something of the tests' own stands before the suite's server: its wheel is built without encryption.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import anyio
import pytest
import trustme
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.tls import TLSStream

from lifekit import Registry, Resource
from lifekit.embedded import Server
from lifekit.testing import sandboxing

from .past import Past, database
from .pools import POOLS, Pool

pytestmark = pytest.mark.anyio
COUNT = "SELECT count(*) FROM rows"
KEPT = "SELECT count(*) FROM pg_prepared_statements WHERE position('lifekit' IN name) > 0"
_SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
_VERSION = b"\0\x03\0\0"


@pytest.fixture
def anyio_backend() -> object:
    """These clients are asyncio's."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(params=POOLS, ids=lambda each: each.name)
def pool(request: pytest.FixtureRequest) -> Pool:
    """Each kind of client."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def past(postgres: Server) -> Iterator[Past]:
    """A database of this module's own."""
    with database(postgres.url, "servers", Past) as past:
        past.ask("CREATE TABLE rows (n int)")
        yield past


class Before:
    """What stands before a server: it encrypts, or alters what is said."""

    def __init__(
        self, url: str, context: ssl.SSLContext | None, alter: Callable[[bytes], bytes]
    ) -> None:
        self._server, self._context, self._alter = urlsplit(url), context, alter
        self.encrypted = self.logins = 0

    async def __call__(self, client: SocketStream) -> None:
        """Serve one."""
        async with client:
            with suppress(*_OVER):
                await self._serve(client)

    async def _serve(self, client: ByteStream) -> None:
        first = await client.receive(8)
        if first == _SSL_REQUEST and self._context is not None:
            await client.send(b"S")
            client = await TLSStream.wrap(client, ssl_context=self._context, standard_compatible=False)
            self.encrypted += 1
            first = await client.receive()
        elif first == _SSL_REQUEST:
            await client.send(b"N")
            first = await client.receive()
        elif self._context is not None:
            return  # as where pg_hba.conf has nothing but hostssl
        assert self._server.hostname is not None
        assert self._server.port is not None
        self.logins += first[4:8] == _VERSION
        async with (
            await anyio.connect_tcp(self._server.hostname, self._server.port) as there,
            anyio.create_task_group() as both,
        ):
            await there.send(first)
            both.start_soon(self._carry, client, there, both.cancel_scope)
            both.start_soon(self._carry, there, client, both.cancel_scope)

    async def _carry(self, source: ByteStream, to: ByteStream, scope: anyio.CancelScope) -> None:
        with suppress(*_OVER):
            async for data in source:
                await to.send(self._alter(data))
        scope.cancel()


_OVER = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError)


@asynccontextmanager
async def before(
    url: str,
    context: ssl.SSLContext | None = None,
    alter: Callable[[bytes], bytes] = bytes,
) -> AsyncGenerator[tuple[str, Before]]:
    """Stand before the server of a URL, and give the URL of that."""
    stands, parts = Before(url, context, alter), urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as serving,
    ):
        serving.start_soon(listener.serve, stands)
        port = listener.extra(SocketAttribute.local_port)
        yield urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{port}")), stands
        serving.cancel_scope.cancel()


def declared(pool: Pool, url: str) -> tuple[Registry, Resource[Any]]:
    """Return a registry of one pool."""
    registry = Registry("servers")

    @registry.resource
    def db() -> object:
        return pool.make(url, 1)

    return registry, db


# -- encryption ---------------------------------------------------------------------------------------


def _named(*names: str) -> list[Pool]:
    return [each for each in POOLS if each.name in names]


_ENCRYPT = [each for each in POOLS if "pg8000" not in each.name]
"""That one reads no environment."""
_TELL_WHY = _named("asyncpg", "psycopg, no pooling", "psycopg2", "SQLAlchemy on asyncpg, async")
"""The others wait, or say less."""


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ssl.SSLContext:
    """What a server shows that all clients trust: they take no other one."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.cert_pem.write_to_path(str(tmp_path / "root.crt"))
    authority.issue_cert("127.0.0.1").configure_cert(context)  # pyright: ignore[reportUnknownMemberType]
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", str(tmp_path / "root.crt"))
    return context


@pytest.mark.parametrize("pool", _ENCRYPT, ids=lambda each: each.name)
async def test_an_encrypted_server_is_reached_by_all_and_undone(
    pool: Pool, past: Past, trusted: ssl.SSLContext
) -> None:
    async with before(past.url, trusted) as (url, server):
        registry, handle = declared(pool, url)
        with sandboxing():
            async with registry.lifespan() as lifespan:
                db = lifespan[handle]
                async with lifespan.sandbox():
                    await pool.run(db, "INSERT INTO rows VALUES (1)")
                    assert await pool.value(db, COUNT) == 1
                    assert past.ask(COUNT) == 0
                assert await pool.value(db, COUNT) == 0
        assert server.encrypted == server.logins > 0


@pytest.mark.parametrize("pool", _TELL_WHY, ids=lambda each: each.name)
async def test_a_server_that_nobody_trusts_is_told_nothing(
    pool: Pool, past: Past, trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.crt"))
    monkeypatch.setenv("PGSSLROOTCERT", str(tmp_path / "other.crt"))
    async with before(past.url, trusted) as (url, server):
        registry, _ = declared(pool, url)
        with sandboxing(), pytest.raises(ExceptionGroup, match="CERTIFICATE_VERIFY_FAILED"):
            async with registry.lifespan():
                pass
        assert server.logins == 0


# -- a pooler -----------------------------------------------------------------------------------------


def _renumber(data: bytes) -> bytes:
    """Give clients other numbers than the server has, as PgBouncer does."""
    at = data.find(b"K\0\0\0\x0c")  # what is followed by the number of a process, and a secret
    return data[: at + 5] + bytes(4) + data[at + 9 :] if at >= 0 else data


async def test_a_pooler_is_refused_by_name_and_keeps_nothing(pool: Pool, past: Past) -> None:
    async with before(past.url, alter=_renumber) as (url, _):
        registry, handle = declared(pool, url)
        with sandboxing(), anyio.fail_after(60):
            async with registry.lifespan() as lifespan:
                db = lifespan[handle]
                with pytest.raises(Exception, match="PgBouncer"):
                    async with lifespan.sandbox():
                        await pool.run(db, "SELECT 1")
                kept = (
                    "SELECT count(*) FROM pg_prepared_statements WHERE position('lifekit' IN name) > 0"
                )
                assert await pool.value(db, kept) == 0
                assert await pool.value(db, "SELECT current_setting('lock_timeout')") == "0"


async def test_who_is_there_is_asked_again_where_that_fails(past: Past) -> None:
    """A client that gives up meanwhile lets the server cancel it."""
    left = [2]

    def fail(data: bytes) -> bytes:
        if left[0] and b"pg_backend_pid" in data:
            left[0] -= 1
            return data.replace(b"pg_backend_pid", b"pg_backend_pig")
        return data

    pool = POOLS[0]
    async with before(past.url, alter=fail) as (url, _):
        registry, handle = declared(pool, url)
        with sandboxing():
            async with registry.lifespan() as lifespan, lifespan.sandbox():
                assert await pool.value(lifespan[handle], "SELECT 1") == 1
    assert left == [0]
