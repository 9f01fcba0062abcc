"""Real servers: an application hears of the stop before they drain, and a crash stops them in order."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import closing
from pathlib import Path
from typing import Literal

import anyio
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import unix_connect

import lifekit
from lifekit import CrashError, Registry, asgi

from .serving import LIMIT, SERVERS, Connection, Fleet, Process, fleet, until

__all__ = ["fleet"]

FOUR = ("uvicorn-uvloop", "hypercorn", "granian", "gunicorn")
SOON = 20.0
"""Seconds for what takes half of one, on a machine that is busy; less than any server's own limit."""
OTHERS = [
    name
    for name in SERVERS
    if name not in (*FOUR, "hypercorn-trio", "hypercorn-trio-no-workers", "granian-uvloop")
]
BUT_GRANIAN = [name for name in FOUR if name != "granian"]
"""Whose worker may hang, or be lost while it closes a websocket: see the page."""
SOME = [name for name in SERVERS if name not in ("hypercorn-trio", "hypercorn-trio-no-workers")]


def test_streams_and_workers_hear_of_sigterm_before_the_server_drains(fleet: Fleet) -> None:
    processes = fleet(FOUR, "working:app")
    asked = [(process, process.request("/stream")) for process in processes]
    for process, connection in asked:
        assert connection.getresponse().readline() == b"tick\n"
        process.terminate()
    for process, _ in asked:
        process.ended()
        notes = process.notes
        assert sorted(notes[-7:-2]) == sorted(
            ["noticed", "stream ended", "Stopping", "WorkerEnded outbox", "Closing ledger"]
        ), (notes, process.output)
        assert notes.index("stream ended") < notes.index("Stopping")
        assert notes.index("noticed") < notes.index("Stopping")
        assert notes[-2:] == ["Closed ledger", "Stopped"]


def test_a_crash_stops_the_server_in_order_and_is_told(fleet: Fleet) -> None:
    processes = fleet(FOUR, "working:app", CRASH="yes")
    asked = [(process, process.request("/stream")) for process in processes]
    for process, connection in asked:
        assert connection.getresponse().readline() == b"tick\n"
        process.tell("crash")
    for process, _ in asked:
        process.noted("Stopped")
        if process.server != "gunicorn":  # whose parent begins another worker
            process.ended()
        notes = process.notes
        assert notes.index("Crashed outbox") < notes.index("stream ended") < notes.index("Stopping")
        assert "Closed ledger" in notes
        assert "the outbox is broken" in process.output
        assert "CrashError" in process.output


WAYS: dict[str, Callable[[Process], None]] = {
    "SIGTERM": Process.terminate,
    "Ctrl-C": Process.interrupt,
    "a crash": lambda process: process.tell("crash"),
}
"""What ends an application."""
OTHERWISE = {"uvicorn": (1012, ""), "gunicorn": (1012, "")}
"""What a client sees where the server is faster than the application, as the page says."""


@pytest.mark.parametrize(
    ("how", "times", "names", "options"),
    [
        pytest.param("SIGTERM", 1, BUT_GRANIAN, [], id="SIGTERM"),
        pytest.param("a crash", 1, BUT_GRANIAN, [], id="a crash", marks=pytest.mark.long),
        pytest.param("SIGTERM", 2, BUT_GRANIAN, [], id="SIGTERM twice", marks=pytest.mark.long),
        pytest.param("Ctrl-C", 1, BUT_GRANIAN, [], id="Ctrl-C", marks=pytest.mark.long),
        pytest.param(
            "Ctrl-C", 2, ["uvicorn-uvloop", "hypercorn"], [], id="Ctrl-C twice", marks=pytest.mark.long
        ),
        *(
            pytest.param(how, 1, OTHERS, [], id=f"{how}, others", marks=pytest.mark.long)
            for how in WAYS
        ),
        *(
            pytest.param(
                how,
                1,
                ["uvicorn-uvloop"],
                ["--ws", "wsproto"],
                id=f"{how}, wsproto",
                marks=pytest.mark.long,
            )
            for how in WAYS
        ),
    ],
)
def test_an_endless_websocket_is_closed_and_the_process_ends(
    fleet: Fleet, how: str, times: int, names: list[str], options: list[str]
) -> None:
    """The application's own code closes it, before anything else closes."""
    environment = {"CRASH": "yes"} if how == "a crash" else {}
    processes = fleet(names, "working:app", options, **environment)
    for process in processes:
        process.connect().close()
        with unix_connect(str(process.socket), "ws://served/socket") as client:
            assert client.recv(LIMIT) == "tick"
            began = time.monotonic()
            for _ in range(times):
                WAYS[how](process)
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(LIMIT)
        received = caught.value.rcvd
        closed = (received.code, received.reason) if received is not None else None
        assert closed in ((1001, "the application stops"), OTHERWISE.get(process.server, ())), (
            process.output
        )
        process.noted("Stopped")
        if process.server != "gunicorn" or how != "a crash":  # whose parent begins another worker
            process.ended()
        took = time.monotonic() - began
        print(f"{process.name}: {closed}, ended after {took:.2f} s")
        assert took < SOON
        notes = process.notes[: process.notes.index("Stopped")]
        assert notes.index("websocket ended") < notes.index("Stopping")
        assert notes[-1] == "Closed ledger"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_crash_stops_a_uvicorn_that_runs_in_a_thread(
    loop: Literal["asyncio", "uvloop"], tmp_path: Path
) -> None:
    """Where no signal is heard."""
    registry = Registry("shop")
    go_on = threading.Event()

    @registry.resource
    async def db() -> AsyncGenerator[str]:
        yield "db"

    @registry.worker(db, restart="never")
    async def outbox(db: str) -> None:
        await anyio.to_thread.run_sync(go_on.wait)
        raise ZeroDivisionError

    async def slow(request: Request) -> PlainTextResponse:
        go_on.set()
        await lifekit.stopping().wait()
        return PlainTextResponse(db.get())

    app = Starlette(routes=[Route("/", slow)], lifespan=registry.lifespan)
    server = uvicorn.Server(uvicorn.Config(app, uds=str(tmp_path / "socket"), loop=loop))
    thread = threading.Thread(target=server.run)
    thread.start()
    connection = Connection(tmp_path / "socket")
    until(lambda: server.started, lambda: "it never listened")
    with closing(connection):
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"db"
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_a_crash_under_what_can_t_be_told_leaves_it_open_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such as Starlette's test client, which runs it in a thread."""
    registry = Registry("shop")

    @registry.worker(restart="never")
    async def outbox() -> None:
        raise ZeroDivisionError

    app = Starlette(routes=[Mount("/", asgi.health(registry))], lifespan=registry.lifespan)
    with pytest.raises(CrashError), TestClient(app) as client:
        until(lambda: "crashed" in caplog.text, lambda: "it never crashed")
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"ready": False, "live": True})
    assert "shop can't be ended from here" in caplog.text


@pytest.mark.long
def test_a_delayed_stop_is_unready_and_serves_on_until_the_server_hears_of_it(fleet: Fleet) -> None:
    """A second SIGTERM, as a parent or a process group sends it, does not end the delay."""
    processes = fleet(BUT_GRANIAN, "working:app", DELAY="15")
    for process in processes:
        connection = process.connect()
        process.terminate()
        process.noted("noticed")
        connection.request("GET", "/health/readyz")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (503, b'{"ready": false, "live": true}')
        process.terminate()
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"here"
    for process in processes:
        process.ended()
        assert process.notes[-2:] == ["Closed ledger", "Stopped"]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in SERVERS if name != "hypercorn-trio-no-workers"])
def test_every_server_is_heard_first_where_it_hears_at_all(fleet: Fleet, name: str) -> None:
    """The one that is left out hears of nothing: trio raises KeyboardInterrupt in some task of it."""
    (process,) = fleet([name], "working:app")
    connection = process.request("/stream")
    answer = connection.getresponse()
    assert answer.readline() == b"tick\n"
    process.terminate()
    assert answer.read() == b""
    connection.close()  # for which Hypercorn on trio waits
    process.ended()
    assert process.notes.index("stream ended") < process.notes.index("Stopping")
