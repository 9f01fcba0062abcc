"""The servers' side of the drivers' tests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import anyio
import anyio.lowlevel
import psycopg2
import pytest

from lifekit._util.call_sites import code_line
from lifekit.embedded import Server


def below() -> str:
    """The line below the one that calls this, as `holders` shows it, with the running task."""
    here, task = inspect.currentframe(), asyncio.current_task()
    assert here is not None
    assert here.f_back is not None
    assert task is not None
    caller = here.f_back
    line = code_line(caller.f_code.co_filename, caller.f_lineno + 1)
    return f"{line} in {caller.f_code.co_qualname} (task {task.get_name()!r})"


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something outside of it is so."""
    with anyio.fail_after(60):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def ended(before: set[asyncio.Task[Any]]) -> None:
    """Wait until the tasks that were not there before have ended."""
    await until(lambda: all(task.done() for task in asyncio.all_tasks() - before))


class Sessions:
    """What PostgreSQL knows of one test's connections, by their `application_name`."""

    def __init__(self, url: str, admin: Any) -> None:
        self.url = url
        self.name = uuid4().hex
        self._admin = admin

    def run(self, sql: str, *values: object) -> Any:
        """Run SQL beside the test's own connections, and return the first value that it gives."""
        with self._admin.cursor() as cursor:
            cursor.execute(sql, values)
            return cursor.fetchone()[0] if cursor.description else None

    def count(self, state: str = "%") -> int:
        """How many connections of this test the server has, in all or in one state."""
        where = "application_name = %s AND coalesce(state, '') LIKE %s"
        count: int = self.run(f"SELECT count(*) FROM pg_stat_activity WHERE {where}", self.name, state)
        return count

    def end_all(self) -> None:
        """Let the server end them all."""
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        self.run(query, self.name)

    async def none_left(self) -> None:
        """Return once the server has none: it notices a little later that one was cut."""
        await until(lambda: self.count() == 0)


@pytest.fixture(scope="session")
def admin(postgres: Server) -> Iterator[Any]:
    """A connection that no driver under test made."""
    with closing(psycopg2.connect(postgres.url)) as connection:
        connection.autocommit = True
        yield connection


@pytest.fixture
def sessions(postgres: Server, admin: Any) -> Sessions:
    """The server's side."""
    return Sessions(postgres.url, admin)
