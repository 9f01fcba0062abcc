# pyright: reportPrivateUsage=false
"""Fleets whose lock is on a server that restarts, in order or not; real servers, real processes."""

from __future__ import annotations

import os
import pwd
import random
import signal
import subprocess
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import asyncpg
import psutil
import pytest

import lifekit
from lifekit import LifekitError, embedded
from lifekit.embedded import Server

from .depth import TIMES
from .fleets import LIMIT, disturb, fleet_of, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The drivers are asyncio's own."""
    return "asyncio"


class Restarts:
    """A server of its own, which ends and begins again with the port and the files that it had."""

    def __init__(self, server: Server) -> None:
        process = psutil.Process(server.pid)
        port = str(urlsplit(server.url).port)
        self.is_valkey = server.url.startswith("redis:")
        # Valkey writes what it pleases over its command line.
        self._command = [process.exe(), "secret", "--port", port]
        home = Path(process.cwd())
        if not self.is_valkey:
            self._command, home = process.cmdline(), home.parent
        self._log = os.open(home / "log", os.O_RDWR | os.O_APPEND)
        user = pwd.getpwuid(process.uids().effective) if os.geteuid() == 0 else None
        self._home = embedded._Home(home, home / "secret", Path(process.exe()), self._log, user)
        self._process: psutil.Process | subprocess.Popen[bytes] = process

    async def restart(self, *, amid: bool) -> None:
        """End it, in order or *amid* what it does, and begin it again."""
        if self.is_valkey:
            self._process.send_signal(signal.SIGKILL if amid else signal.SIGTERM)
        else:
            self._process.send_signal(signal.SIGQUIT if amid else signal.SIGINT)
        await anyio.to_thread.run_sync(self._process.wait, LIMIT)
        # From this thread, with whose end it would end.
        death = signal.SIGKILL if self.is_valkey else signal.SIGQUIT
        self._process = embedded._launch(self._home, self._command, b"", death=death)

    def end(self) -> None:
        """End what was begun here."""
        if isinstance(self._process, subprocess.Popen):
            self._process.send_signal(signal.SIGKILL if self.is_valkey else signal.SIGQUIT)
            self._process.wait(LIMIT)
        os.close(self._log)


@asynccontextmanager
async def _restartable(kind: str) -> AsyncGenerator[tuple[Server, Restarts]]:
    async with embedded.valkey() if kind == "redis" else embedded.postgres() as server:
        restarts = Restarts(server)
        try:
            yield server, restarts
        finally:
            restarts.end()


async def test_numbers_grow_though_the_lock_s_server_breaks_down_at_once() -> None:
    numbers = list[int]()
    async with _restartable("asyncpg") as (server, restarts):

        async def answers() -> bool:
            with suppress(OSError, asyncpg.PostgresError):
                await (await asyncpg.connect(server.url)).close()
                return True
            return False

        for _ in range(2):
            await until(answers)
            async with asyncpg.create_pool(server.url, min_size=0) as pool:
                with pytest.raises(LifekitError, match="not exclusive any more"):
                    async with lifekit.exclusive(pool, "migrations") as held:
                        numbers.append(held.number)
                        await restarts.restart(amid=True)
                        await anyio.sleep_forever()
    first, second = numbers
    assert first < second


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["asyncpg", "redis"])
@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param(4, id="a few", marks=pytest.mark.long),
        pytest.param(60 * TIMES, id="many", marks=pytest.mark.proof),
    ],
)
async def test_never_two_at_once_though_the_lock_s_server_restarts(
    kind: str, rounds: int, postgres: Server, valkey: Server
) -> None:
    """At random among kills and stops; the rows are on a server that stays."""
    lease, waited = 2.0, list[tuple[float, str]]()
    ways = ["killed", "stopped", "restarted", "broken down"]
    hows = [*ways, *random.choices(ways, k=rounds)][:rounds]
    random.shuffle(hows)
    async with (
        _restartable(kind) as (server, restarts),
        fleet_of(kind, postgres, valkey, lease, server.url) as fleet,
    ):
        for _ in range(4):
            fleet.start()
        number, leader = await fleet.leader()
        for how in hows:
            if how in {"killed", "stopped"}:
                await disturb(fleet, how, leader)
            else:
                fleet.disturbed.add(leader)
                await restarts.restart(amid=how == "broken down")
            began, before = time.monotonic(), leader
            number, leader = await fleet.leader(after=number)
            waited.append((time.monotonic() - began, how))
            if how == "stopped":
                os.kill(before, signal.SIGCONT)
            await anyio.sleep(random.uniform(0, lease / 4))
        await fleet.check()
    waited.sort()
    print(f"{kind}: a new leader after {waited[rounds // 2][0]:.2f} s, {waited[-4:]} at most")
    assert waited[rounds // 2][0] < 2 * lease  # all of them, where the machine is idle
