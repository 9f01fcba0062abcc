"""The sandbox of SQLAlchemy's engines on SQLite, from `pool/impl.py` of SQLAlchemy 2.1.

As a block begins, the engine's pool is put aside with the connections that it has, and a new one stands
in its place, whose connections lead to the block's copies. As it ends, the pool is put back.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import anyio
from sqlalchemy.util import await_only, greenlet_spawn

from lifekit._core.block import Block, current_block
from lifekit._core.errors import SandboxBusyError, SandboxUnsupportedError
from lifekit._sandbox.postgres.sandbox import GIVING_BACK, PoolSandbox, lets_go
from lifekit.drivers._checkouts import Checkout, Pooled, current_task

from .copies import Layer, authorizer, copies_of, not_attached, place_of

T = TypeVar("T")


class _Inside(NamedTuple):
    """One block, as an engine is in it."""

    layer: Layer
    pool: Any
    """The pool that is put aside."""
    sources: list[Any]
    """Connections to databases of their own, in memory, whose content those of the block begin with."""


class EngineSandbox(PoolSandbox[T]):
    """The sandbox of one engine, and of what `execution_options()` derives from it."""

    def __init__(self, gateway: Any, driver: Pooled[T], value: T) -> None:
        super().__init__(gateway, driver, value)
        self._engine: Any = root(value)
        self._copies = copies_of(gateway)
        self._copies.share()
        self._inside: list[_Inside | None] = []
        self._denied: list[str] = []

    # -- blocks ----------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Put the pool aside.

        Raises:
            SandboxBusyError: A connection of it is in use.
            SandboxUnsupportedError: The application connects by itself.
        """
        self._inside.append(None)
        self._refuse_own_connecting()
        here = current_task()
        out = await self._out_at_last(lambda each: each.task is not None and each.task is not here)
        if out:
            lines = "".join(f"  a connection acquired at {line}\n" for line in self._lines(out))
            raise SandboxBusyError(
                "a sandbox can't begin while a connection of an engine on SQLite is in use: what it "
                f"does would be permanent.\n{lines}Give it back before the sandbox begins."
            )
        layer, pool = self._copies.enter(current_block.get()), self._engine.pool
        around = self._now()
        sources = [*_idle(pool), *(around.sources if around is not None else ())]
        self._inside[-1] = _Inside(layer, pool, sources)
        self._engine.pool, self._engine.dialect.connect = pool.recreate(), self._connect

    async def end(self) -> None:
        """Put the pool back, and throw away what the block's connections wrote.

        Raises:
            SandboxEscapedError: One of them was not given back.
            SandboxUnsupportedError: Another file was to be attached.
        """
        inside = self._inside[-1]
        if inside is None:
            self._inside.pop()
            return
        block = inside.layer.block
        out = await self._out_at_last(lambda each: each.is_over or _is_outside(block, each))
        told = self._escaped(out) if out else None
        pool, self._engine.pool = self._engine.pool, inside.pool
        self._inside.pop()
        try:
            for each in out:
                await self._take_back(each)
            await greenlet_spawn(pool.dispose)
        finally:
            self._copies.leave(inside.layer)
        denied, self._denied = self._denied, []
        if told is not None:
            raise told
        if denied:
            raise not_attached(denied)

    def end_at_once(self) -> bool:
        """Do nothing: closing connections may take waiting."""
        return False

    async def close(self) -> None:
        """Let the engine connect as it did."""
        self._copies.close()
        await super().close()

    def terminate(self) -> None:
        """Let the engine have its own pool again, and connect as it did."""
        left = [each for each in self._inside if each is not None]
        if left:
            self._engine.pool = left[0].pool
        self._inside = [None] * len(self._inside)
        for each in left:
            self._copies.leave(each.layer)
        super().terminate()

    def _now(self) -> _Inside | None:
        return next((each for each in reversed(self._inside) if each is not None), None)

    def _refuse_own_connecting(self) -> None:
        creator: Any = self._engine.pool._creator
        own = [
            *(["creator"] if creator.__module__ != "sqlalchemy.engine.create" else ()),
            *(["listener of do_connect"] if [*self._engine.dialect.dispatch.do_connect] else ()),
        ]
        if own:
            raise SandboxUnsupportedError(
                f"this engine's {own[0]} connects to SQLite by itself, so that what it does would be "
                "permanent. Let the URL and `connect_args` say where to, and listeners of `connect` "
                "prepare the connection."
            )

    async def _out_at_last(self, may_come_back: Callable[[Checkout], bool]) -> list[Any]:
        """Wait for connections that somebody gives back just now; return the others that are out."""
        out, checkouts = self.driver.out, self.driver.checkouts
        await lets_go(lambda: not out(self.value))
        until = anyio.current_time() + GIVING_BACK
        while left := [*out(self.value)]:
            known = map(checkouts.of, left)
            if anyio.current_time() >= until or not any(each and may_come_back(each) for each in known):
                break
            await anyio.sleep(0.005)
        return left

    def _lines(self, out: list[Any]) -> Iterator[str]:
        for each in out:
            checkout = self.driver.checkouts.of(each)
            yield checkout.in_full(self.driver.checkouts.package) if checkout else "an unknown line"

    async def _take_back(self, connection: Any) -> None:
        raw = connection.driver_connection
        if isinstance(raw, sqlite3.Connection):
            raw.interrupt()  # of another thread, perhaps
        taken = self.driver.take_back(self.value, connection)
        if taken is not None:
            await taken

    # -- connecting ------------------------------------------------------------------------------------

    def _connect(self, *given: Any, **options: Any) -> Any:
        dialect, inside = self._engine.dialect, self._now()
        connect: Any = dialect.__class__.connect
        if inside is None:
            return connect(dialect, *given, **options)
        place = place_of(given[0], bool(options.get("uri")))
        if place.path:
            made = connect(dialect, inside.layer.copy_of(place), *given[1:], **options)
        else:
            # Which has to be closed with the block, in whatever thread that ends.
            made = connect(dialect, *given, **{**options, "check_same_thread": False})
            if (source := self._source(inside)) is not None:
                _call(source, "backup", _raw(made))
        _call(made, "set_authorizer", authorizer(self._denied))
        return made

    def _source(self, inside: _Inside) -> Any:
        """Return whose content a connection to a database of its own begins with, if anybody's."""
        if inside.sources:
            return inside.sources.pop(0)
        for each in reversed(self._inside):  # SingletonThreadPool: a connection for each thread
            current = getattr(getattr(each and each.pool, "_conn", None), "current", None)
            record = current() if current is not None else None
            if record is not None and record.dbapi_connection is not None:
                return record.dbapi_connection
        return None


def root(value: Any) -> Any:
    """Return the sync engine that has the pool of an engine."""
    engine = getattr(value, "sync_engine", value)
    while hasattr(engine, "_proxied"):  # as `execution_options()` derived it
        engine = engine._proxied
    return engine


def _is_outside(block: Block | None, checkout: Checkout) -> bool:
    return block is not None and block.is_outside(checkout.block)


def _idle(pool: Any) -> list[Any]:
    """Return the connections of a pool that are not in use, in the order in which it gives them."""
    queue = getattr(pool, "_pool", None)
    queued: Any = getattr(getattr(queue, "_queue", None), "_queue", None) or getattr(queue, "queue", ())
    records = [*queued][:: -1 if getattr(queue, "use_lifo", False) else 1]
    records.append(pool.__dict__.get("connection"))  # StaticPool's
    return [each.dbapi_connection for each in records if each is not None and each.dbapi_connection]


def _raw(connection: Any) -> Any:
    adapted = getattr(connection, "_connection", None)  # aiosqlite's
    return connection if adapted is None else adapted._conn


def _call(connection: Any, method: str, *given: Any) -> None:
    """Call a method of the connection of sqlite3, in the thread that it belongs to."""
    call = getattr(_raw(connection), method)
    if (adapted := getattr(connection, "_connection", None)) is None:
        call(*given)
    else:
        await_only(adapted._execute(call, *given))
