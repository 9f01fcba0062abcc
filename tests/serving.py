# pyright: reportUnknownMemberType=false
"""Real servers as processes, for the tests that send them signals."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from redis import Redis

ROOT = Path(__file__).parent.parent
LIMIT = 50.0
"""Seconds for what takes one or two, for a machine that is busy."""

_HYPERCORN = ["hypercorn", "-b", "unix:{socket}", "--graceful-timeout", "30", "-k"]
_GRANIAN = ["granian", "--interface", "asgi", "--uds", "{socket}", "--loop"]
_GUNICORN = [
    *("gunicorn", "--no-control-socket", "-b", "unix:{socket}"),
    *("--graceful-timeout", "30", "-k"),
]

SERVERS = {
    "uvicorn": ["uvicorn", "--uds", "{socket}", "--loop", "asyncio"],
    "uvicorn-uvloop": ["uvicorn", "--uds", "{socket}", "--loop", "uvloop"],
    "hypercorn": [*_HYPERCORN, "asyncio"],
    "hypercorn-uvloop": [*_HYPERCORN, "uvloop"],
    "hypercorn-trio": [*_HYPERCORN, "trio"],
    "hypercorn-no-workers": [*_HYPERCORN, "asyncio", "-w", "0"],
    "hypercorn-trio-no-workers": [*_HYPERCORN, "trio", "-w", "0"],
    "granian": [*_GRANIAN, "asyncio"],
    "granian-uvloop": [*_GRANIAN, "uvloop"],
    "gunicorn": [*_GUNICORN, "uvicorn_worker.UvicornH11Worker"],  # asyncio
    "gunicorn-uvloop": [*_GUNICORN, "uvicorn_worker.UvicornWorker"],
}
"""The arguments of each."""


STARTED = [
    *("Opening db", "Opening cache", "Opened db", "Opened cache"),
    *("Opening ledger", "Opened ledger", "Started"),
]
CLOSED = [
    *("Stopping", "Closing ledger", "saved", "Closed ledger"),
    *("Closing cache", "Closing db", "Closed cache", "Closed db", "Stopped"),
]
"""What tests/apps/served.py notes; db and cache have no order between them."""


def until(holds: Callable[[], bool], why: Callable[[], str]) -> None:
    """Poll until *holds* does, or fail."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, why()
        time.sleep(0.005)


class Connection(HTTPConnection):
    """A connection to a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("served", timeout=LIMIT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT)
        self.sock.connect(str(self._path))


class Process:
    """A server with one of the applications in tests/apps, in a process group of its own."""

    def __init__(
        self, server: Sequence[str], app: str, environment: dict[str, str], options: Sequence[str]
    ) -> None:
        # The path of a unix socket may have some hundred characters, which pytest's own may exceed.
        self._directory = Path(tempfile.mkdtemp(prefix="lifekit-"))
        self._notes, self._output = self._directory / "notes", self._directory / "output"
        self._notes.touch()
        self._connections: list[Connection] = []
        self.socket = self._directory / "socket"
        self.server, self.name = server[0], environment.get("NAME", "")
        arguments = [each.format(socket=self.socket) for each in server]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments, *options, f"tests.apps.{app}"],
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT / "docs" / "examples"),
                    **environment,
                    "NOTES": str(self._notes),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def notes(self) -> list[str]:
        """What the application has written."""
        return self._notes.read_text().splitlines()

    @property
    def output(self) -> str:
        """What the server has written."""
        return self._output.read_text()

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Poll until *holds* does; fail if the process ends before."""

        def holds_or_ended() -> bool:
            return holds() or self.status is not None

        def why() -> str:
            return f"{what}: {self.status} {list(dict.fromkeys(self.notes))}\n{self.output}"

        until(holds_or_ended, why)
        assert holds(), why()

    def noted(self, line: str, times: int = 1) -> None:
        """Wait until the application has written *line*, and that often."""
        self.until(lambda: self.notes.count(line) >= times, f"waited in vain for {line!r}")

    def said(self, text: str) -> None:
        """Wait until the server has written *text*."""
        self.until(lambda: text in self.output, f"it never said {text!r}")

    def connect(self) -> Connection:
        """Return a connection over which it has served a request."""
        connection = Connection(self.socket)
        self._connections.append(connection)

        def connected() -> bool:
            try:
                if connection.sock is None:
                    connection.connect()
            except OSError:
                connection.close()
            return connection.sock is not None

        self.until(connected, "it never listened")
        connection.request("GET", "/")
        connection.getresponse().read()
        return connection

    def request(self, path: str) -> Connection:
        """Return a connection with a request under way."""
        connection = self.connect()
        connection.request("GET", path)
        return connection

    def tell(self, *answers: str) -> None:
        """Let what waits in the application for these go on."""
        for answer in answers:
            self._notes.with_name(answer).touch()

    def terminate(self) -> None:
        """Send SIGTERM to the process, as a container's runtime does."""
        self._process.terminate()

    def interrupt(self) -> None:
        """Send SIGINT to the process group, as a terminal does for Ctrl-C."""
        os.killpg(self._process.pid, signal.SIGINT)

    def ended(self) -> int:
        """Wait for the end and return the exit status."""
        return self._process.wait(LIMIT)

    def kill(self) -> None:
        """End it, and its children, if anything of it still runs."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._directory)


Fleet = Callable[..., list[Process]]


@pytest.fixture
def fleet() -> Generator[Fleet]:
    """Start servers, all at once; they are killed with the test at the latest."""
    started: list[Process] = []

    def start(
        names: Iterable[str], app: str, options: Sequence[str] = (), **environment: str
    ) -> list[Process]:
        processes = [
            Process(SERVERS[name], app, {**environment, "NAME": f"lifekit-{name}"}, options)
            for name in names
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()


def connections(process: Process, database_url: str, redis_url: str) -> tuple[int, int]:
    """Return how many connections of that process PostgreSQL and Redis count."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    with closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
        cursor.execute(query, (process.name,))
        (in_postgres,) = cursor.fetchone() or (0,)
    with closing(Redis.from_url(redis_url)) as client:
        clients: Any = client.client_list()
    return in_postgres, sum(each["name"] == process.name for each in clients)


@cache
def _tables() -> dict[tuple[str, str], str]:
    cells: dict[tuple[str, str], str] = {}
    head: list[str] = []
    page = ROOT / "docs" / "how-to" / "uvicorn-and-hypercorn.md"
    for line in page.read_text().splitlines():
        if not line.startswith("|"):
            continue
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if row[1] == "uvicorn":
            head = [cell.lower() for cell in row[1:]]
        cells.update(((row[0], name), cell) for name, cell in zip(head, row[1:], strict=True))
    return cells


def documented(row: str, server: str) -> str:
    """Return what the page on servers says in that *row* of *server*."""
    return _tables()[row, server]


def status(row: str, process: Process) -> int:
    """Return the exit status that the page names in that *row*: the last one for no workers."""
    numbers = re.findall(r"-?\d+", documented(row, process.server))
    return int(numbers[-1] if process.name.endswith("no-workers") else numbers[0])
