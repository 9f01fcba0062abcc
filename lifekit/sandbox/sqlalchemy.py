"""The sandbox of SQLAlchemy's async engines on asyncpg, learned from SQLAlchemy 2.0 and 2.1.

Inside a block the engine has another pool, of the same class with the same limits and listeners. What
its creator returns are the dialect's own connections, over an `asyncpg.Connection` that is a lane of
the one real connection. So sessions, transactions and isolation levels are SQLAlchemy's own.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool
from sqlalchemy.util import greenlet_spawn

from lifekit._errors import SandboxEscapedError, SandboxUnsupportedError
from lifekit._sandbox import refuse_stragglers
from lifekit.drivers import Sandbox
from lifekit.drivers._loans import mix_in
from lifekit.drivers.sqlalchemy import loans, root, use_of, user_frame

from ._holders import ALONE, escaped_strays, lets_go
from ._lane import Lane
from .asyncpg import OutsideProtocol, RealConnection, connect, lane_of

_POOL: Any = Pool


class EngineSandbox(Sandbox):
    """The sandbox of one engine, and of all that `execution_options()` derives from it."""

    def __init__(self, engine: Any) -> None:
        self.fairies: set[Any] = set()  # the block's connections that are out, or were
        self.engine = engine
        self._wire: RealConnection | None = None
        self._real: Any = None  # the record, as SQLAlchemy calls it, of the real connection
        self._lanes: list[Any] = []  # connections of the dialect's
        self._inside: Any = None
        self._outside: Any = None
        self._redirected: list[tuple[Any, Any, Any]] = []
        self._guarded: list[tuple[Any, Any]] = []

    async def begin(self) -> None:
        """Give the engine a pool whose connections are lanes of one real connection."""
        engine = self.engine
        if self._wire is None or self._wire.lost() or self._wire.is_cut():
            await self._drop_inside()
            self._real = await greenlet_spawn(_POOL._create_connection, engine.pool)
            await greenlet_spawn(self._adapted().commit)  # what listeners set is there to stay
            self._wire = RealConnection(self._adapted()._connection)
        if self._inside is None:
            self._inside = engine.pool.recreate()
            self._inside.__dict__["dispatch"] = engine.pool.dispatch
            self._inside._creator = self._made_lane
        assert self._wire is not None
        self._outside, engine.pool = engine.pool, self._inside
        for fairy in self._outside._use.out():
            self.redirect(fairy)
        self._wire.shared.begin()

    async def end(self) -> None:
        """Take the pool back, and undo what was done."""
        if self._outside is None:
            return
        assert self._wire is not None
        if self._strays():
            await lets_go(lambda: not self._strays())
        strays = self._strays()
        told = (
            escaped_strays(
                strays, "async with engine.connect() as connection, or AsyncSession(engine) as session"
            )
            if strays
            else None
        )
        self._inside = self.engine.pool  # another one, if the application disposed of it
        self._take_out()
        try:
            await self._wire.shared.end()
        finally:
            if self._wire.shared.dirty:  # what was prepared, or is known of types, may be of no use
                await self._close_real()
            elif told is not None or any(lane_of(made._connection) is None for made in self._lanes):
                await self._drop_inside()
        if told is not None:
            raise told

    async def close(self) -> None:
        """Close the real connection."""
        with suppress(SandboxEscapedError):
            await self.end()
        await self._close_real()

    def terminate(self) -> None:
        """Cut the real connection off."""
        if self._outside is not None:
            self._take_out()
        if self._real is not None and self._real.dbapi_connection is not None:
            self.engine.dialect.do_terminate(self._real.dbapi_connection)

    def _adapted(self) -> Any:
        return self._real.dbapi_connection

    def _made_lane(self) -> Any:
        assert self._wire is not None
        real = self._adapted()
        cache = real._prepared_statement_cache
        made = type(real)(
            real.dbapi,
            connect(self._wire.shared, real._connection),
            prepared_statement_cache_size=cache.capacity if cache is not None else 0,
            prepared_statement_name_func=real._prepared_statement_name_func,
        )
        made._connection._protocol.lane.acquired(user_frame())  # while it is made, nobody has it yet
        self._lanes.append(made)
        return made

    @property
    def active(self) -> bool:
        """Whether a block runs."""
        return self._outside is not None

    def is_outside(self, pool: Any) -> bool:
        """Return whether a block runs, and *pool* is what the engine has otherwise."""
        return self.active and pool is self._outside

    def _strays(self) -> list[Lane]:
        out = [fairy.dbapi_connection for fairy in self.fairies if fairy.dbapi_connection is not None]
        lanes = [lane_of(adapted._connection) for adapted in out]
        before = [lane_of(adapted._connection) for adapted, _, _ in self._redirected]
        lanes += [lane for lane in before if lane is not None and lane.in_transaction]
        return [lane for lane in lanes if lane is not None]

    def _take_out(self) -> None:
        self.engine.pool, self._outside = self._outside, None
        for fairy in self.fairies:
            if fairy.dbapi_connection is not None:
                self.engine.dialect.do_terminate(fairy.dbapi_connection)
                if fairy._connection_record is not None:
                    fairy._connection_record.fairy_ref = None  # so that no collection warns of it
        self.fairies.clear()
        for adapted, connection, statements in self._redirected:
            lane = lane_of(adapted._connection)
            if lane is None:  # it was closed
                connection.terminate()
            elif lane.in_transaction:
                adapted._transaction = None
            adapted._connection.terminate()
            adapted._connection, adapted._prepared_statement_cache = connection, statements
        self._redirected.clear()
        for connection, protocol in self._guarded:
            if connection._protocol is not None:
                connection._protocol = protocol
        self._guarded.clear()
        # A pool may take connections back as they are: pool_reset_on_return=None.
        self._lanes = [made for made in self._lanes if lane_of(made._connection) is not None]
        for made in self._lanes:
            if made._connection._protocol.lane.in_transaction:
                made._connection.terminate()

    def redirect(self, fairy: Any) -> None:
        """Let a connection that was taken before the block be a lane as well while that lasts."""
        # What it prepared itself, it prepared elsewhere.
        adapted = fairy.dbapi_connection
        connection, statements = adapted._connection, adapted._prepared_statement_cache
        if connection._protocol is None:
            return
        if connection.is_in_transaction():
            self._guarded.append((connection, connection._protocol))
            connection._protocol = OutsideProtocol(connection._protocol, "ROLLBACK;")
            return
        made = self._made_lane()
        made._connection._protocol.lane.acquired_before(loans.of(fairy))
        self._redirected.append((adapted, connection, statements))
        adapted._connection = made._connection
        adapted._prepared_statement_cache = made._prepared_statement_cache

    async def _drop_inside(self) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            await greenlet_spawn(inside.dispose)

    async def _close_real(self) -> None:
        await self._drop_inside()
        real, self._real, self._wire = self._real, None, None
        if real is not None:
            adapted = real.dbapi_connection
            try:
                await greenlet_spawn(real.close)
            finally:  # a listener of the application's may fail
                self.engine.dialect.do_terminate(adapted)


class _SandboxedPool(Pool):
    """What the class of a pool is mixed with, so that its sandbox knows who takes connections."""

    _sandbox: EngineSandbox

    def connect(self) -> Any:
        refuse_stragglers("a SQLAlchemy engine")
        fairy: Any = super().connect()
        lane = lane_of(fairy.dbapi_connection._connection)
        sandbox = self._sandbox
        if lane is None and sandbox.is_outside(self):  # a block began while it waited
            sandbox.redirect(fairy)
        elif lane is not None and not sandbox.active:  # it ended
            fairy.invalidate()
            refuse_stragglers("a SQLAlchemy engine")
            return sandbox.engine.pool.connect()
        elif lane is not None:
            lane.acquired(user_frame())
            sandbox.fairies.add(fairy)
        return fairy

    def recreate(self) -> Any:
        return _watched(super().recreate(), self._sandbox)


class UnsupportedSandbox(Sandbox):
    """The sandbox of an engine that can have none."""

    def __init__(self, dialect: Any) -> None:
        self._name = f"{dialect.name}+{dialect.driver}"

    async def begin(self) -> None:
        """Say so."""
        raise SandboxUnsupportedError(
            f"a SQLAlchemy engine on {self._name} can't be sandboxed, one on postgresql+asyncpg can. "
            "Let the engine's factory make that under test, override the resource, or run the test "
            f"without a sandbox: {ALONE}."
        )


def _watched(pool: Any, sandbox: EngineSandbox) -> Any:
    mix_in(_SandboxedPool, pool)
    pool._sandbox = sandbox
    return pool


def sandbox(value: AsyncEngine) -> Sandbox | None:
    """Let *value* get its pool from a sandbox, and return that."""
    engine = root(value.sync_engine)
    if engine.dialect.driver != "asyncpg":
        return UnsupportedSandbox(engine.dialect)
    if use_of(value).opened > 1:
        return None  # its pool is that of another engine, which has a sandbox
    made = EngineSandbox(engine)
    _watched(engine.pool, made)
    return made
