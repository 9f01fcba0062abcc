"""A gateway, and connections through it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import asyncpg
import pytest

from lifekit.embedded import Server

from .clients import Connection, block, running_gateway, through


class House:
    """A gateway to a database of one test's own, and a connection past it."""

    in_thread = False

    def __init__(self, server: Server, stack: AsyncExitStack) -> None:
        self.url, self.stack = server.url, stack

    async def open(self) -> None:
        """Serve, and make the table that the tests use."""
        self.past: asyncpg.Connection = await asyncpg.connect(self.url)
        self.stack.push_async_callback(self.past.close)
        await self.past.execute("DROP TABLE IF EXISTS wire; CREATE TABLE wire (i int)")
        self.stack.push_async_callback(self.past.execute, "DROP TABLE wire")
        self.gateway = await self.stack.enter_async_context(running_gateway(in_thread=self.in_thread))
        self.through = through(self.url, self.gateway)

    def block(self) -> AbstractAsyncContextManager[None]:
        """Undo at the end what was done inside."""
        return block(self.gateway)

    async def connect(self, kind: type[Connection]) -> Connection:
        """Connect through the gateway."""
        connection = await kind.open(self.through)
        self.stack.push_async_callback(connection.close)
        return connection

    async def really(self) -> int:
        """Return how many rows are in the table for who does not go through the gateway."""
        found: int = await self.past.fetchval("SELECT count(*) FROM wire")
        return found


@pytest.fixture
def anyio_backend() -> object:
    """The gateway of a loop is asyncio's."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture
async def house(postgres: Server) -> AsyncGenerator[House]:
    """A gateway in this loop."""
    async with AsyncExitStack() as stack:
        house = House(postgres, stack)
        await house.open()
        yield house
