"""Processes of which one leads, and the rows that tell who did: for tests of fleets."""

from __future__ import annotations

import inspect
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import asyncpg

from lifekit.embedded import Server

ROOT = Path(__file__).parents[1]
LIMIT = 120.0
"""Seconds for what takes one, for a machine that is busy."""

TABLES = """
create table fence (number bigint not null);
insert into fence values (0);
create table written (
    id bigserial primary key, number bigint, process bigint, accepted bool,
    at timestamptz default clock_timestamp()
);
create table migrated (process bigint);
"""


async def until(is_so: Callable[[], Any]) -> None:
    """Wait until something is so; a function that says it may be async."""
    with anyio.fail_after(LIMIT):
        # Whatever it is, no event tells of it here.
        while not (  # noqa: ASYNC110
            await said if inspect.isawaitable(said := is_so()) else said
        ):
            await anyio.sleep(0.01)


class Processes:
    """A fleet of processes, tests/apps/fleet.py, and the rows that they write."""

    def __init__(self, environment: dict[str, str], rows: asyncpg.Connection) -> None:
        self._environment, self.rows = environment, rows
        self.all: list[subprocess.Popen[bytes]] = []
        self.disturbed: set[int] = set()

    def start(self) -> subprocess.Popen[bytes]:
        """Start another one."""
        self.all.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.apps.fleet"],
                cwd=ROOT,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
            )
        )
        return self.all[-1]

    async def leader(self, after: int = 0) -> tuple[int, int]:
        """Wait for a row with a higher number than that; return it and its process."""
        with anyio.fail_after(LIMIT):
            while True:
                row = await self.rows.fetchrow(
                    "select number, process from written where number > $1 order by id desc limit 1",
                    after,
                )
                if row is not None:
                    return row["number"], row["process"]
                await anyio.sleep(0.02)

    async def check(self) -> None:
        """Raise unless there was one leader at a time."""
        rows = await self.rows.fetch("select number, process, accepted from written order by id")
        accepted = [row["number"] for row in rows if row["accepted"]]
        assert accepted == sorted(accepted)
        assert len({(row["number"], row["process"]) for row in rows}) == len({*accepted})
        refused = [row for row in rows if not row["accepted"]]
        # One whose own lock was taken from it may have one row under way, and no more.
        assert {row["process"] for row in refused} <= self.disturbed
        assert len(refused) <= len({row["number"] for row in refused})


@asynccontextmanager
async def fleet_of(
    kind: str, postgres: Server, valkey: Server, lease: float, lock: str = ""
) -> AsyncGenerator[Processes]:
    """Give a fleet without processes, whose lock is on one of the servers, or at the URL *lock*."""
    admin = await asyncpg.connect(postgres.url)
    name = f"fleet_{random.randrange(10**9)}"
    await admin.execute(f"create database {name}")
    url = f"{postgres.url.rpartition('/')[0]}/{name}"
    rows = await asyncpg.connect(url)
    await rows.execute(TABLES)
    lock = lock or (valkey.url if kind == "redis" else url)
    fleet = Processes({"LOCK": lock, "DATABASE": url, "KIND": kind, "LEASE": str(lease)}, rows)
    try:
        yield fleet
    finally:
        for each in fleet.all:
            each.kill()
            each.wait()
        await rows.close()
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()


async def disturb(fleet: Processes, how: str, leader: int) -> None:
    """Do that to the leader, and start another process where it ends."""
    if how == "killed":
        os.kill(leader, signal.SIGKILL)
        fleet.start()
    elif how == "terminated":
        os.kill(leader, signal.SIGTERM)
        fleet.start()
    elif how == "disconnected":
        fleet.disturbed.add(leader)
        await fleet.rows.fetch(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where application_name = 'lifekit fleet.write'"
        )
    else:
        fleet.disturbed.add(leader)
        os.kill(leader, signal.SIGSTOP)
