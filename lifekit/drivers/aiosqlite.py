"""What lifekit knows about aiosqlite's connections, from `core.py` of aiosqlite 0.22."""

from __future__ import annotations

import inspect
from typing import Any

import aiosqlite

from lifekit._core.drivers import Driver, Gateway, Sandbox
from lifekit._util.redact import redact

from ._checkouts import sqlite_sandbox


class AiosqliteDriver(Driver[aiosqlite.Connection]):
    """Connections as `aiosqlite.connect()` returns them, awaited or not."""

    async def open(self, value: aiosqlite.Connection) -> aiosqlite.Connection:
        """Connect, where that has not been done."""
        connection: Any = value
        return value if connection._connection is not None else await value

    async def check(self, value: aiosqlite.Connection) -> None:
        """Run one `SELECT 1`."""
        await value.execute_fetchall("SELECT 1")

    async def close(self, value: aiosqlite.Connection) -> None:
        """Do what was asked of it before, then close it and end its thread."""
        await value.close()

    def terminate(self, value: aiosqlite.Connection) -> None:
        """Interrupt what it is at, and let its thread end."""
        connection: Any = value
        if connection._connection is not None:
            connection._connection.interrupt()
        connection.stop()

    def describe(self, value: aiosqlite.Connection) -> str:
        """Return its database."""
        return redact(f"aiosqlite connection, {given(value).get('database', 'unknown')}")

    def redirect(self, value: aiosqlite.Connection, gateway: Gateway) -> Sandbox | None:
        """Let it work on a private copy in blocks."""
        return sqlite_sandbox(gateway, self, value)


def given(value: Any) -> dict[str, Any]:
    """Return what `aiosqlite.connect()` was given: `database`, and `kwargs`; nothing if not known."""
    known = dict(inspect.getclosurevars(value._connector).nonlocals)
    return known if {"database", "kwargs"} <= known.keys() else {}


driver: AiosqliteDriver = AiosqliteDriver()
