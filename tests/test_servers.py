# pyright: reportUnknownMemberType=false
"""Real servers as processes: what uvicorn and Hypercorn pass on, and what lifekit makes of it.

uvicorn 0.54:

- After SIGTERM requests end, then the lifespan closes, then uvicorn sends itself the signal again:
  its status is -15, not 0. After SIGINT it is 0, after a start that failed 3.
- During the start a signal is only noted: a start that hangs goes on until a ``start_timeout``.
- A second SIGINT while requests are waited for cuts them off and skips the ASGI shutdown; the end of
  the event loop still closes everything. While resources close it changes nothing.

Hypercorn 0.18:

- Requests have ``--graceful-timeout`` seconds to end, 3 unless it is given.
- A worker process serves, and its status is lost: it is 0 also after a start or a closing that
  failed. With ``--workers 0`` there is none, and the status is 1.
- SIGTERM must go to the parent alone (systemd: ``KillMode=mixed``): a worker that gets it is gone at
  once, with nothing closed. So is the process with ``--workers 0`` and trio.
- The worker ignores SIGINT, so that a start that hangs goes on until a ``start_timeout``, and a
  second SIGINT changes nothing. With ``--workers 0`` and trio it cancels the start.
- With trio a closing that failed is told of by nothing but lifekit's log.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from redis import Redis

from lifekit.embedded import Server

ROOT = Path(__file__).parent.parent
LIMIT = 20.0
"""Seconds for what takes one or two, for a machine that is busy."""
MARGIN = 4.0
"""Seconds beside a deadline: for the rest of the stop, on such a machine."""

UVICORN = {
    "uvicorn": ["uvicorn", "--port", "0", "--loop", "asyncio"],
    "uvicorn-uvloop": ["uvicorn", "--port", "0", "--loop", "uvloop"],
}
UVLOOP = {"uvicorn-uvloop": UVICORN["uvicorn-uvloop"]}
_HYPERCORN = ["hypercorn", "-b", "127.0.0.1:0", "--graceful-timeout", "20", "-k"]
HYPERCORN = {
    "hypercorn": [*_HYPERCORN, "asyncio"],
    "hypercorn-trio": [*_HYPERCORN, "trio"],
}
WITHOUT_WORKERS = {
    "hypercorn-no-workers": [*_HYPERCORN, "asyncio", "-w", "0"],
    "hypercorn-trio-no-workers": [*_HYPERCORN, "trio", "-w", "0"],
}

OPENING = ["Opening store", "Opened store", "Opening queue"]
STARTED = [*OPENING, "Opened queue", "Started"]
CLOSING = ["Closing store", "Closed store", "Stopped"]
STOPPING = ["Stopping", "Closing queue", "Closed queue", *CLOSING]


def each(servers: dict[str, list[str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", servers.values(), ids=servers)


def until(holds: Callable[[], bool], why: Callable[[], str]) -> None:
    """Poll until *holds* does, or fail."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, why()
        time.sleep(0.005)


class Process:
    """A server with one of the applications in tests/apps, killed with the test at the latest."""

    def __init__(
        self, directory: Path, server: Sequence[str], app: str, environment: dict[str, str]
    ) -> None:
        self._notes, self._output = directory / "notes", directory / "output"
        self._notes.touch()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *server, f"tests.apps.{app}"],
                cwd=ROOT,
                env={**os.environ, **environment, "NOTES": str(self._notes)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, as a terminal gives it
            )

    @property
    def notes(self) -> list[str]:
        """What the application has written."""
        return self._notes.read_text().splitlines()

    @property
    def output(self) -> str:
        """What the server has written."""
        return self._output.read_text()

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Poll until *holds* does; fail if the process ends before."""

        def holds_or_ended() -> bool:
            return holds() or self._process.poll() is not None

        until(holds_or_ended, lambda: f"{what}: {self.notes}\n{self.output}")
        assert holds(), f"{what}: {self.notes}\n{self.output}"

    def noted(self, line: str, times: int = 1) -> None:
        """Wait until the application has written *line*, and that often."""
        self.until(lambda: self.notes.count(line) >= times, f"waited in vain for {line!r}")

    def listening(self) -> int:
        """Wait until it says that it listens, and return the port."""
        pattern = re.compile(r"unning on http://127\.0\.0\.1:(\d+) ")
        self.until(lambda: pattern.search(self.output) is not None, "it never listened")
        return int(pattern.findall(self.output)[0])

    def connect(self) -> HTTPConnection:
        """Return a connection that is open."""
        connection = HTTPConnection("127.0.0.1", self.listening(), timeout=LIMIT)
        connection.connect()
        return connection

    def tell(self, answer: str = "go") -> None:
        """Let what waits in the application for *answer* go on."""
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
        """End it, and its children, if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


Serve = Callable[..., Process]


@pytest.fixture
def serve(tmp_path: Path) -> Generator[Serve]:
    started: list[Process] = []

    def start(server: Sequence[str], app: str, **environment: str) -> Process:
        started.append(Process(tmp_path, server, app, environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def drain(process: Process, requests: int) -> list[tuple[int, str]]:
    """Send SIGTERM while *requests* are in flight, and return their answers."""
    with ExitStack() as stack:
        idle = stack.enter_context(closing(process.connect()))
        connections = [stack.enter_context(closing(process.connect())) for _ in range(requests)]
        for connection in connections:
            connection.request("GET", "/hold")
        process.noted("asked", requests)
        process.terminate()
        # An idle connection is closed as soon as the server begins to drain.
        assert idle.sock.recv(1) == b""
        assert "Stopping" not in process.notes
        process.tell()
        responses = [connection.getresponse() for connection in connections]
        return [(response.status, response.read().decode()) for response in responses]


@each(UVICORN | HYPERCORN)
def test_requests_in_flight_are_answered_before_their_resources_close(
    serve: Serve, server: Sequence[str]
) -> None:
    """uvicorn then ends by the SIGTERM that it got, -15; Hypercorn with 0."""
    process = serve(server, "shop:steady")
    assert drain(process, 3) == [(200, "read")] * 3
    assert process.ended() == (-signal.SIGTERM if server[0] == "uvicorn" else 0)
    assert process.notes == [*STARTED, *["asked"] * 3, *["answered"] * 3, *STOPPING]


@each(UVLOOP)
def test_no_connection_is_left_at_postgresql_and_redis(
    serve: Serve, server: Sequence[str], postgres: Server, valkey: Server
) -> None:
    """Requests that hold connections are answered, then pool and client close."""
    process = serve(server, "links:app", DATABASE_URL=postgres.url, REDIS_URL=valkey.url)
    process.listening()
    assert all(connections(postgres, valkey))
    assert drain(process, 3) == [(200, "42")] * 3
    # While the process lives, since its end would close whatever it left open.
    process.noted("Stopped")
    process.until(lambda: not any(connections(postgres, valkey)), "connections were left open")
    process.tell("exit")
    assert process.ended() == -signal.SIGTERM
    after = process.notes[process.notes.index("Stopping") :]
    assert after[:3] == ["Stopping", "Closing links", "Closed links"]
    assert sorted(after[3:-1]) == ["Closed cache", "Closed db", "Closing cache", "Closing db"]
    assert after[-1] == "Stopped"
    for url in (postgres.url, valkey.url):
        assert str(urlsplit(url).password) not in process.output


def connections(postgres: Server, valkey: Server) -> tuple[int, int]:
    """Return how many connections of the application each server counts."""
    name = "lifekit-links"
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    with closing(psycopg2.connect(postgres.url)) as connection, connection.cursor() as cursor:
        cursor.execute(query, (name,))
        (in_postgres,) = cursor.fetchone() or (0,)
    with closing(Redis.from_url(valkey.url)) as client:
        clients: Any = client.client_list()
    return in_postgres, sum(each["name"] == name for each in clients)


@each(UVLOOP | WITHOUT_WORKERS)
def test_a_failed_start_ends_the_process_with_a_readable_error(
    serve: Serve, server: Sequence[str]
) -> None:
    """Resource, code line and cause stand in it; the status is uvicorn's 3 or Hypercorn's 1."""
    process = serve(server, "shop:failing", QUEUE_URL="redis://queue.example:6379/0")
    assert process.ended() == (3 if server[0] == "uvicorn" else 1)
    assert process.notes == [*OPENING, "OpenFailed queue", "Stopping", *CLOSING]
    assert "StartupError: app did not start: queue failed\n" in process.output
    cause = r"queue \(tests/apps/shop\.py:\d+\): ConnectionError: no answer from redis://queue\."
    assert re.search(cause, process.output)
    assert "  opened, and closed again: store" in process.output


@each(UVLOOP)
def test_a_failed_start_says_no_password(serve: Serve, server: Sequence[str]) -> None:
    """Not even where the driver's own error says it, whose traceback the server prints."""
    process = serve(server, "shop:failing", QUEUE_URL="redis://shop:hunter2@queue.example/0")
    assert process.ended() == 3
    assert "ConnectionError: no answer from redis://shop:***@queue.example/0" in process.output
    assert "hunter2" not in process.output


@each(UVICORN | HYPERCORN)
def test_ctrl_c_during_a_start_that_hangs_ends_it_at_its_deadline(
    serve: Serve, server: Sequence[str]
) -> None:
    """The servers only note the signal: what ends the start is ``start_timeout``, here 0.5 s."""
    process = serve(server, "shop:stuck_opening")
    process.noted("Opening queue")
    began = time.monotonic()
    process.interrupt()
    status = process.ended()
    assert time.monotonic() - began < 0.5 + MARGIN
    assert process.notes == [*OPENING, "OpenFailed queue", "Stopping", *CLOSING]
    assert re.search(r"queue \(tests/apps/shop\.py:\d+\): open took longer than 0\.5 s", process.output)
    if server[0] == "uvicorn":
        assert status == 3


@each({"hypercorn-trio-no-workers": WITHOUT_WORKERS["hypercorn-trio-no-workers"]})
def test_ctrl_c_that_reaches_the_application_cancels_its_start(
    serve: Serve, server: Sequence[str]
) -> None:
    """trio raises KeyboardInterrupt in it; what had opened is closed."""
    process = serve(server, "shop:stuck_opening")
    process.noted("Opening queue")
    process.interrupt()
    assert process.ended() == 1
    assert process.notes == [*OPENING, "Stopping", "OpenFailed queue cancelled", *CLOSING]


@each(UVICORN | HYPERCORN)
def test_a_closing_that_hangs_ends_at_its_deadline_whatever_signals_come(
    serve: Serve, server: Sequence[str]
) -> None:
    """Its ``close_timeout`` is 0.5 s; the rest is closed after it, and the process ends with 0."""
    process = serve(server, "shop:stuck_closing")
    process.listening()
    began = time.monotonic()
    process.interrupt()
    process.noted("Closing queue")
    process.interrupt()
    process.interrupt()
    assert process.ended() == 0
    assert time.monotonic() - began < 0.5 + MARGIN
    cut_off = ["Stopping", "Closing queue", "CloseFailed queue", "Closed queue"]
    assert process.notes == [*STARTED, *cut_off, *CLOSING]
    late = r"queue \(tests/apps/shop\.py:\d+\): close took longer than 0\.5 s"
    assert re.search(late, process.output)


@each(UVICORN)
def test_a_second_ctrl_c_while_requests_are_waited_for_skips_no_closing(
    serve: Serve, server: Sequence[str]
) -> None:
    """uvicorn then cuts requests off and shuts no lifespan down: the end of its event loop does."""
    process = serve(server, "shop:steady")
    with closing(process.connect()) as connection:
        connection.request("GET", "/hold")
        process.noted("asked")
        process.interrupt()
        process.until(lambda: "Waiting for connections" in process.output, "it did not drain")
        process.interrupt()
        if sys.version_info >= (3, 12):  # from then on asyncio's servers wait for their connections
            connection.close()
        assert process.ended() == 0
    assert process.notes == [*STARTED, "asked", *STOPPING]
