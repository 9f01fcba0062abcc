"""Real servers as processes: what they pass on, and what lifekit makes of it.

The tables of docs/how-to/uvicorn-and-hypercorn.md are what is expected here. Of each server there is
one with its defaults; tests/test_servers_at_length.py has the others, and every combination.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence

import pytest

from lifekit.embedded import Server

from .serving import CLOSED, STARTED, Fleet, connections, fleet, status

__all__ = ["fleet"]

FOUR = ("uvicorn-uvloop", "hypercorn", "granian", "gunicorn")
MARGIN = 20.0
"""Seconds beside a deadline: for the rest of the stop, on a machine that is busy."""


def all_closed(notes: Sequence[str]) -> bool:
    """Whether all closings ran to their end, each once; cache and db have no order."""
    return [*notes[:4], notes[-1]] == [*CLOSED[:4], "Stopped"] and sorted(notes) == sorted(CLOSED)


def test_requests_in_flight_are_answered_and_then_no_connection_is_left(
    fleet: Fleet, postgres: Server, valkey: Server
) -> None:
    """SIGTERM comes twice; PostgreSQL and Redis are asked while the process still lives."""
    urls = postgres.url, valkey.url
    processes = fleet(FOUR, "served:app", DATABASE_URL=urls[0], REDIS_URL=urls[1], EXIT="told")
    asked = [(process, process.request("/hold")) for process in processes]
    for process in processes:
        process.noted("asked")
        assert all(connections(process, *urls))
        process.terminate()
        process.terminate()
    for process, connection in asked:
        process.tell("go", "background")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"held")
    for process in processes:
        process.noted("Stopped")
        process.until(lambda: not any(connections(process, *urls)), "connections were left open")  # noqa: B023
        process.tell("exit")
    for process in processes:
        assert process.ended() == status("stopped by SIGTERM", process)
        after = process.notes[len(STARTED) :]
        assert after[:2] == ["asked", "answered"]
        # granian does not wait for these two, and another server has no reason to end them early.
        background = [note for note in after if note.startswith("background")]
        assert background == ["background", "background done"]
        assert all_closed([note for note in after[2:] if note not in background])
        assert not any(url in process.output for url in urls)


def test_a_failed_start_ends_the_process_with_a_readable_error(fleet: Fleet) -> None:
    """Resource, code line and cause stand in it, and no password, though the driver's error has it."""
    url = "redis://shop:hunter2@queue.example/0"
    for process in fleet(FOUR, "shop:failing", QUEUE_URL=url):
        row = "the start failed" if process.name != "lifekit-hypercorn-no-workers" else "without"
        expected = status("the start failed", process) if row != "without" else 1
        assert process.ended() == expected, process.output
        opening = ["Opening store", "Opened store", "Opening queue", "OpenFailed queue"]
        assert process.notes == [*opening, "Stopping", "Closing store", "Closed store", "Stopped"]
        assert "StartupError: app did not start: queue failed\n" in process.output
        cause = (
            r"queue \(tests/apps/shop\.py:\d+\): ConnectionError: no answer from redis://shop:\*\*\*@"
        )
        assert re.search(cause, process.output)
        assert "  opened, and closed again: store" in process.output
        assert "hunter2" not in process.output


@pytest.mark.long
def test_ctrl_c_during_a_start_that_hangs_ends_it_at_its_deadline(fleet: Fleet) -> None:
    """The servers only note the signal: what ends the start is ``start_timeout``, here 0.5 s."""
    names = ("uvicorn-uvloop", "hypercorn", "gunicorn")  # granian hangs: see the page
    processes = fleet(names, "served:app", MODE="start", START_TIMEOUT="0.5")
    for process in processes:
        process.noted("Opening ledger")
        process.interrupt()
        process.interrupt()
    for process in processes:
        process.ended()
        assert process.notes[5:7] == ["OpenFailed ledger", "Stopping"]
        assert sorted(process.notes[7:]) == sorted([*CLOSED[4:]])
        late = r"ledger \(tests/apps/served\.py:\d+\): open took longer than 0\.5 s"
        assert re.search(late, process.output)


def test_a_closing_that_hangs_ends_at_its_deadline_whatever_signals_come(fleet: Fleet) -> None:
    """It ignores its cancellation too; the rest is closed after it, and the error names it."""
    processes = fleet(FOUR, "served:app", MODE="deaf", CLOSE_TIMEOUT="0.5")
    for process in processes:
        process.connect().close()  # before, granian may lose a signal
    began = time.monotonic()
    for process in processes:
        process.interrupt()
    for process in processes:
        process.noted("Closing ledger")
        if process.server != "granian":  # whose worker a third signal may hang
            process.interrupt()
            process.interrupt()
    for process in processes:
        assert process.ended() == status("stopped by Ctrl-C", process)
        cut = ["Stopping", "Closing ledger", "CloseFailed ledger", "Closed ledger"]
        after = process.notes[len(STARTED) :]
        assert after[:4] == cut
        assert sorted(after[4:]) == sorted(CLOSED[4:])
        late = r"ledger \(tests/apps/served\.py:\d+\): close took longer than 0\.5 s"
        assert re.search(late, process.output)
    assert time.monotonic() - began < MARGIN


def test_a_second_and_third_ctrl_c_under_uvicorn_skip_no_closing(fleet: Fleet) -> None:
    """The second cuts requests off and shuts no lifespan down: the end of its event loop does."""
    processes = fleet(("uvicorn", "uvicorn-uvloop"), "served:app", MODE="closing")
    for process in processes:
        connection = process.request("/hold")
        process.noted("asked")
        process.interrupt()
        process.said("Waiting for connections")
        process.interrupt()
        if sys.version_info >= (3, 12):  # from then on asyncio's servers wait for their connections
            connection.close()
        for _ in range(2):
            process.noted("turn", process.notes.count("turn") + 2)
            process.interrupt()
        process.noted("turn", process.notes.count("turn") + 2)
        process.tell("close")
        process.ended()
        notes = [note for note in process.notes if note != "turn"]
        assert notes[len(STARTED)] == "asked"
        assert all_closed(notes[len(STARTED) + 1 :])
