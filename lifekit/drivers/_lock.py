"""A lock on PostgreSQL: an advisory lock of a session of its own, which must not fall silent.

`idle_session_timeout` makes a lease of it: a leader that was stopped, or whose machine is gone, loses
its session, and the lock with that. Its number is that of a transaction, which grows for as long as the
cluster lives; a record in the write-ahead log lets it outlive a crash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

import anyio

from lifekit._core.errors import DeclarationError

# A commit that is not on disk yet is forgotten where the server breaks down, and its number given anew.
_DURABLE = """select set_config('synchronous_commit',
    coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false)"""
_NUMBER = "select pg_current_xact_id()::text::bigint from pg_logical_emit_message(true, 'lifekit', '')"


class Session(Protocol):
    """A connection of its own, outside of any transaction, on which each statement is one."""

    number: int
    """Its server's process, as the connection was told."""

    async def fetch(self, statement: str) -> Any:
        """Return the first column of the first row."""
        ...

    async def ping(self) -> None:
        """Let the server hear of it, in one message: between two it would wait forever."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait for so long, or until the connection is lost, where that is noticed."""
        ...

    async def close(self) -> None:
        """Close it in order."""
        ...

    def terminate(self) -> None:
        """Cut it off."""
        ...


class PostgresLock:
    """An advisory lock, held by a session that *connect* opens."""

    def __init__(self, connect: Callable[[], Awaitable[Session]], key: str) -> None:
        self._connect, self._key = connect, key
        digest = hashlib.blake2b(f"lifekit.{key}".encode(), digest_size=8).digest()
        self._id = int.from_bytes(digest, signed=True)
        self._session: Session | None = None

    async def open(self, lease: float) -> None:
        """Begin a session, where there is none."""
        if self._session is None:
            self._session = await self._begin(lease)

    async def acquire(self, lease: float) -> int | None:
        """Try to lock."""
        assert self._session is not None
        try:
            if not await self._session.fetch(f"select pg_try_advisory_lock({self._id})"):
                return None
            return int(await self._session.fetch(_NUMBER))
        except BaseException:
            self._cut()
            raise

    async def pause(self, seconds: float) -> None:
        """Wait, or until the connection is lost."""
        if self._session is not None:
            await self._session.pause(seconds)

    async def renew(self, lease: float) -> bool:
        """Let the server hear of it. Where the session fails, the lock is lost with it."""
        if self._session is None:
            return False
        try:
            await self._session.ping()
        except Exception:
            return False
        return True

    async def release(self) -> None:
        """End the session."""
        if (session := self._session) is not None:
            try:
                with suppress(Exception):
                    await session.close()
            finally:
                self._cut()

    def _cut(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):
                session.terminate()

    async def _begin(self, lease: float) -> Session:
        session = await self._connect()
        try:
            if await session.fetch("select pg_is_in_recovery()"):
                raise DeclarationError(f"{self._key}: {_STANDBY}")
            if int(await session.fetch("show server_version_num")) < 140000:
                raise DeclarationError(f"{self._key}: {_TOO_OLD}")
            if await session.fetch("select pg_backend_pid()") != session.number:
                await self._refuse_shared(session)
            label = f"lifekit {self._key}".replace("'", "''")[:63]
            settings = {
                "application_name": label,
                "idle_session_timeout": str(round(lease * 1000)),
                **dict.fromkeys(("statement_timeout", "lock_timeout"), "0"),
            }
            each = (f"set_config('{name}', '{value}', false)" for name, value in settings.items())
            await session.fetch(f"{_DURABLE}, {', '.join(each)}")
        except BaseException:
            session.terminate()
            raise
        return session

    async def _refuse_shared(self, session: Session) -> None:
        # A pooler stands between. Where it gives a client's statements to any session, two clients that
        # take turns meet in one, or one of them is moved.
        other = await self._connect()
        try:
            seen: set[tuple[int, int]] = set()
            for _ in range(10):
                mine = await session.fetch("select pg_backend_pid()")
                seen.add((mine, await other.fetch("select pg_backend_pid()")))
            if len(seen) > 1 or any(mine == others for mine, others in seen):
                raise DeclarationError(f"{self._key}: {_POOLED}")
            await other.close()
        finally:
            with suppress(Exception):
                other.terminate()


_STANDBY = "this PostgreSQL is a standby, which knows nothing of the locks of others. Name the primary."
_TOO_OLD = "a lock with a lease needs PostgreSQL 14 or later."
_POOLED = (
    "between here and PostgreSQL stands a pooler in transaction mode, such as PgBouncer, in which a "
    "session's lock belongs to nobody. Let leader= or exclusive() name a pool that connects to "
    "PostgreSQL itself, or to the pooler in session mode."
)


# -- sessions, by what their connections are ---------------------------------------------------------


class AsyncpgSession:
    """A connection of asyncpg, which tells when it is lost."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._lost = anyio.Event()
        self.number: int = connection.get_server_pid()
        connection.add_termination_listener(self._note_lost)

    def _note_lost(self, _: object) -> None:
        self._lost.set()

    async def fetch(self, statement: str) -> Any:
        """Return the first column of the first row."""
        return await self._connection.fetchval(statement)

    async def ping(self) -> None:
        """Send a statement that is not prepared."""
        await self._connection.execute("select 1")

    async def pause(self, seconds: float) -> None:
        """Wait for so long, or until the connection is lost."""
        with anyio.move_on_after(seconds):
            await self._lost.wait()

    async def close(self) -> None:
        """Say goodbye to the server."""
        await self._connection.close()

    def terminate(self) -> None:
        """Cut it off."""
        self._connection.terminate()


def _tuples(_: object) -> Callable[[Any], Any]:
    return tuple  # whatever the application has rows made of


class PsycopgSession:
    """A connection of psycopg, with autocommit."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.number: int = connection.info.backend_pid

    async def fetch(self, statement: str) -> Any:
        """Return the first column of the first row."""
        async with self._connection.cursor(row_factory=_tuples) as cursor:
            await cursor.execute(statement)
            return (await cursor.fetchone())[0]

    async def ping(self) -> None:
        """Send a statement."""
        await self.fetch("select 1")

    async def pause(self, seconds: float) -> None:
        """Wait for so long, or until the server says something unasked: that it is going, mostly."""
        with anyio.move_on_after(seconds):
            await anyio.wait_readable(self._connection.fileno())

    async def close(self) -> None:
        """Say goodbye to the server."""
        await self._connection.close()

    def terminate(self) -> None:
        """Cut it off."""
        self._connection.pgconn.finish()


class AiopgSession:
    """A connection of aiopg."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.number: int = connection.raw.info.backend_pid

    async def fetch(self, statement: str) -> Any:
        """Return the first column of the first row."""
        async with self._connection.cursor() as cursor:
            await cursor.execute(statement)
            return (await cursor.fetchone())[0]

    async def ping(self) -> None:
        """Send a statement."""
        await self.fetch("select 1")

    async def pause(self, seconds: float) -> None:
        """Wait: a lost connection is seen when it is used."""
        await anyio.sleep(seconds)

    async def close(self) -> None:
        """Say goodbye to the server."""
        await self._connection.close()

    def terminate(self) -> None:
        """Cut it off."""
        if not self._connection.closed:
            self._connection.close()
