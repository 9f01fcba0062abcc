"""Real servers: an application hears of the stop before they drain, and a crash stops them in order."""

from __future__ import annotations

import pytest

from .serving import SERVERS, Fleet, fleet

__all__ = ["fleet"]

FOUR = ("uvicorn-uvloop", "hypercorn", "granian", "gunicorn")
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


@pytest.mark.long
def test_a_delayed_stop_is_unready_and_serves_on_until_the_server_hears_of_it(fleet: Fleet) -> None:
    """A second SIGTERM, as a parent or a process group sends it, does not end the delay."""
    processes = fleet([name for name in FOUR if name != "granian"], "working:app", DELAY="15")
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
