"""The sandbox of aiosqlite's connections, from `core.py` of aiosqlite 0.22.

Such a connection has one of sqlite3 and a thread for it. In a block it has another one of sqlite3, to a
private copy, in the same thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from lifekit._core.block import current_block, refuse_stragglers
from lifekit._core.drivers import Sandbox
from lifekit._core.errors import SandboxBusyError, SandboxUnsupportedError
from lifekit.drivers.aiosqlite import given

from .copies import Layer, authorizer, copies_of, not_attached, place_of

_PRAGMAS = (
    *("foreign_keys", "recursive_triggers", "busy_timeout", "synchronous", "temp_store", "cache_size"),
    *("ignore_check_constraints", "query_only", "read_uncommitted", "trusted_schema"),
    *("legacy_alter_table", "automatic_index", "cell_size_check", "reverse_unordered_selects"),
)
"""Settings of a connection, which the one of a block takes over."""


class ConnectionSandbox(Sandbox):
    """The sandbox of one connection."""

    def __init__(self, gateway: Any, value: Any) -> None:
        self._value = value
        self._copies = copies_of(gateway)
        self._copies.share()
        self._begun: list[tuple[Layer, sqlite3.Connection] | None] = []
        self._denied: list[str] = []
        self._execute: Any = value._execute

    async def _guarded(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        refuse_stragglers("a connection of aiosqlite")
        return await self._execute(call, *args, **options)

    async def begin(self) -> None:
        """Connect to a private copy.

        Raises:
            SandboxBusyError: A transaction is open.
            SandboxUnsupportedError: It has attached a file, or is of a release that is not known.
        """
        self._begun.append(None)
        value = self._value
        value._execute = self._guarded
        known, own = given(value), value._connection
        if own is None:
            return  # it is closed
        if not known:
            raise SandboxUnsupportedError(
                "this aiosqlite connection was made in a way that lifekit does not know, so that the "
                "sandbox can't undo what it does. Let the factory return aiosqlite.connect(…)."
            )
        if own.in_transaction:
            raise SandboxBusyError(
                "a sandbox can't begin while a transaction of an aiosqlite connection is open, which "
                "would be lost or last. Commit it before the sandbox begins."
            )
        layer = self._copies.enter(current_block.get())
        try:
            copy = await self._execute(self._copy, own, layer, known["database"], known["kwargs"])
        except BaseException:
            self._copies.leave(layer)
            raise
        self._begun[-1] = layer, own
        value._connection = copy

    def _copy(
        self, own: sqlite3.Connection, layer: Layer, database: Any, options: dict[str, Any]
    ) -> sqlite3.Connection:
        attached = [name for _, name, *_ in _rows(own, "database_list") if name not in ("main", "temp")]
        if attached:
            raise SandboxUnsupportedError(
                f"this aiosqlite connection has attached {', '.join(attached)}, and the sandbox copies "
                "the main database alone. Attach it in the code that uses it, or override the resource."
            )
        place = place_of(database, bool(options.get("uri")))
        where = layer.copy_of(place) if place.path else database
        made: sqlite3.Connection = sqlite3.connect(where, **options)
        try:
            if not place.path:
                own.backup(made)
            made.row_factory, made.text_factory = own.row_factory, own.text_factory
            made.isolation_level = own.isolation_level
            for pragma in _PRAGMAS:
                for (setting,) in _rows(own, pragma):
                    made.execute(f"PRAGMA {pragma} = {setting}").close()
            made.set_authorizer(authorizer(self._denied))
        except BaseException:
            made.close()
            raise
        return made

    async def end(self) -> None:
        """Take its own connection of sqlite3 again, and throw the copy away.

        Raises:
            SandboxUnsupportedError: Another file was to be attached.
        """
        begun = self._begun.pop()
        if begun is None:
            return
        layer, own = begun
        copy = self._value._connection
        try:
            if copy is not None:  # else the block closed it
                await self._execute(copy.close)
                self._value._connection = own
        finally:
            self._copies.leave(layer)
        denied, self._denied = self._denied, []
        if denied:
            raise not_attached(denied)

    async def close(self) -> None:
        """Let the connection be as it was."""
        self._copies.close()
        self._value.__dict__.pop("_execute", None)

    def terminate(self) -> None:
        """Let it be as it was, and let nothing reach its own database that was meant for a copy."""
        self._value.__dict__.pop("_execute", None)


def _rows(connection: sqlite3.Connection, pragma: str) -> list[tuple[Any, ...]]:
    cursor = connection.cursor()
    cursor.row_factory = None
    try:
        return cursor.execute(f"PRAGMA {pragma}").fetchall()
    finally:
        cursor.close()
