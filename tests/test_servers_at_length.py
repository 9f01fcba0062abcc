"""Each server, each signal, at each moment: every closing runs, but for what the page says of a server.

Where one of the flaws is not found any more, docs/how-to/uvicorn-and-hypercorn.md has to change.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from lifekit.embedded import Server

from .serving import (
    CLOSED,
    SERVERS,
    STARTED,
    Fleet,
    Process,
    connections,
    documented,
    fleet,
    status,
    until,
)
from .test_servers import all_closed

__all__ = ["fleet"]

pytestmark = pytest.mark.long

ALIKE = ["hypercorn-trio", "hypercorn-uvloop", "gunicorn-uvloop"]
"""What differs from others in nothing that is looked at here."""
TRIO = ["hypercorn-trio", "hypercorn-trio-no-workers"]
BY_NAME = pytest.mark.parametrize("name", [name for name in SERVERS if name not in ALIKE])
Send = Callable[[Process], None]
SIGNALS: list[tuple[str, Send, int]] = [
    (kind, send, times)
    for kind, send in (("SIGTERM", Process.terminate), ("Ctrl-C", Process.interrupt))
    for times in (1, 3)
]


def stories(
    fleet: Fleet,
    name: str,
    skip: Callable[[str, int], bool] = lambda kind, times: False,
    **environment: str,
) -> list[tuple[Process, Send, int, str]]:
    """Start the server once for each signal and number of times, but for what is known to be lost."""
    signals = [each for each in SIGNALS if not _kills(name, each[0]) and not skip(each[0], each[2])]
    if name.startswith("granian"):  # Ctrl-C is two signals to its worker, which may hang
        signals = signals[:1]
    processes = fleet([name] * len(signals), "served:app", **environment)
    return [
        (process, send, times, f"stopped by {kind}")
        for process, (kind, send, times) in zip(processes, signals, strict=True)
    ]


def _kills(name: str, kind: str) -> bool:
    # With no handler for SIGTERM, see below.
    return name == "hypercorn-trio-no-workers" and kind == "SIGTERM"


def _hurries_gunicorn(name: str) -> Callable[[str, int], bool]:
    # It may be draining still, see below.
    return lambda kind, times: name.startswith("gunicorn") and kind == "Ctrl-C" and times > 1


@BY_NAME
def test_everything_closes_whatever_comes_while_nothing_is_served(
    fleet: Fleet, name: str, postgres: Server, valkey: Server
) -> None:
    urls = {"DATABASE_URL": postgres.url, "REDIS_URL": valkey.url} if name not in TRIO else {}
    told = stories(fleet, name, _hurries_gunicorn(name), **urls)
    for process, send, times, row in told:
        process.noted("Started")
        process.connect().close()
        for _ in range(times):
            send(process)
        ended = process.ended()
        assert all_closed(process.notes[len(STARTED) :]), (row, times, process.output)
        if times == 1 and name not in TRIO:
            assert ended == status(row, process), (row, times, process.output)
    if urls:
        process = told[0][0]  # they share its name
        until(lambda: connections(process, *urls.values()) == (0, 0), lambda: "connections are left")


@BY_NAME
def test_everything_closes_whatever_comes_while_it_closes(fleet: Fleet, name: str) -> None:
    if name.startswith("granian"):
        pytest.skip("its worker may hang by itself, which the page says")
    for process, send, times, row in stories(fleet, name, MODE="closing"):
        process.connect().close()  # before, granian may lose a signal
        send(process)
        process.noted("Closing ledger")
        for _ in range(times - 1):
            send(process)
            process.noted("turn", process.notes.count("turn") + 2)
        process.tell("close")
        process.ended()
        notes = [note for note in process.notes if note != "turn"]
        assert all_closed(notes[len(STARTED) :]), (row, times, process.output)


@BY_NAME
def test_a_closing_that_hangs_is_cut_off_and_named_whatever_comes(fleet: Fleet, name: str) -> None:
    for process, send, times, row in stories(fleet, name, MODE="closing", CLOSE_TIMEOUT="1"):
        process.connect().close()  # before, granian may lose a signal
        send(process)
        process.noted("Closing ledger")
        for _ in range(times - 1):
            send(process)
        process.ended()
        notes = [note for note in process.notes if note != "turn"]
        cut = ["Stopping", "Closing ledger", "CloseFailed ledger", "Closed ledger"]
        assert notes[len(STARTED) :][:4] == cut, (row, times, process.output)
        assert sorted(notes[len(STARTED) + 4 :]) == sorted(CLOSED[4:])
        assert "close took longer than 1 s" in process.output


@BY_NAME
def test_requests_are_answered_and_everything_closes_whatever_comes(fleet: Fleet, name: str) -> None:
    """But for a second Ctrl-C under the servers that it hurries, of which the page tells."""
    for process, send, times, row in stories(fleet, name):
        hurried = name.startswith(("uvicorn", "gunicorn", "granian", "hypercorn-trio-no"))
        if times > 1 and row.endswith("Ctrl-C") and hurried:
            continue
        connection = process.request("/hold")
        process.noted("asked")
        for _ in range(times):
            send(process)
        process.tell("go", "background")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"held"), (row, times, process.output)
        process.ended()
        notes = process.notes[len(STARTED) :]
        assert notes[:3] == ["asked", "answered", "background"], (row, times, process.output)
        if documented("a `BackgroundTask` behind an answer", process.server) == "is waited for":
            assert notes.index("background done") == 3, (row, times, process.output)
        if "background done" in notes:
            notes.remove("background done")
        assert all_closed(notes[3:]), (row, times, process.output)


@BY_NAME
def test_a_start_that_hangs_ends_at_its_deadline_whatever_comes(fleet: Fleet, name: str) -> None:
    """But for Ctrl-C under granian, which hangs, and trio without workers, where it ends the start."""
    for process, send, times, row in stories(fleet, name, MODE="start", START_TIMEOUT="2"):
        process.noted("Opening ledger")
        if name.startswith("granian") and row.endswith("Ctrl-C"):
            continue
        for _ in range(times):
            send(process)
        process.ended()
        failed = process.notes[len(STARTED) - 2 :]
        if name == "hypercorn-trio-no-workers":
            assert failed[:2] == ["Stopping", "OpenFailed ledger cancelled"]
        else:
            assert failed[:2] == ["OpenFailed ledger", "Stopping"], (row, times, process.output)
            assert "open took longer than 2 s" in process.output
        assert sorted(failed[2:]) == sorted(CLOSED[4:])


@pytest.mark.parametrize("name", ["uvicorn-uvloop", "hypercorn", "granian", "gunicorn"])
def test_background_tasks_are_waited_for_or_not_as_the_page_says(fleet: Fleet, name: str) -> None:
    (process,) = fleet([name], "served:app")
    idle, connection = process.connect(), process.request("/hold")
    process.noted("asked")
    process.tell("go")
    connection.getresponse().read()
    process.noted("background")
    process.terminate()
    said = documented("a `BackgroundTask` behind an answer", process.server)
    if said == "is waited for":
        assert idle.sock is not None
        assert idle.sock.recv(1) == b""  # it is closed as soon as the server begins to drain
        process.tell("background")
        process.ended()
        assert process.notes.index("background done") < process.notes.index("Stopping")
    else:
        assert said.startswith("is not waited for")
        process.ended()
        assert "background done" not in process.notes
    assert all_closed(process.notes[process.notes.index("Stopping") :])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("uvicorn-uvloop", ["--timeout-graceful-shutdown", "1"]),
        ("hypercorn", ["--graceful-timeout", "1"]),
        ("granian", ["--workers-kill-timeout", "2"]),
        ("gunicorn", ["--graceful-timeout", "2"]),
        ("gunicorn", ["-k", "tests.apps.impatient.ImpatientWorker"]),
    ],
)
def test_endless_streams_are_cut_off_or_end_the_worker_as_the_page_says(
    fleet: Fleet, name: str, options: list[str]
) -> None:
    (process,) = fleet([name], "served:app", options)
    process.request("/stream").getresponse().readline()
    process.terminate()
    ended = process.ended()
    if (
        "nothing closes" in documented("a stream that never ends", process.server)
        and "-k" not in options
    ):
        assert process.notes[len(STARTED) :] == ["streaming"]
        assert ended == 0
    else:
        notes = process.notes[len(STARTED) :]
        assert notes.index("stream ended") < 3  # the server does not wait for what it cut off
        assert all_closed([note for note in notes if not note.startswith("stream")])
        assert ended == status("stopped by SIGTERM", process)


@pytest.mark.parametrize(
    "name", ["uvicorn", "hypercorn", "granian", "gunicorn", "hypercorn-no-workers"]
)
def test_the_exit_status_after_failures_is_as_the_page_says(fleet: Fleet, name: str) -> None:
    (failing,) = fleet([name], "shop:failing", QUEUE_URL="redis://queue.example")
    (stuck,) = fleet([name], "served:app", MODE="closing", CLOSE_TIMEOUT="0.2")
    stuck.noted("Started")
    stuck.connect().close()
    stuck.interrupt()
    assert failing.ended() == status("the start failed", failing)
    said = documented("a closing failed", stuck.server)
    row = "stopped by Ctrl-C" if said == "as if it had not" else "a closing failed"
    assert stuck.ended() == status(row, stuck)


# -- flaws of the servers ---------------------------------------------------------------------------


def test_gunicorn_ends_its_worker_at_the_second_ctrl_c_and_closes_nothing(fleet: Fleet) -> None:
    (process,) = fleet(["gunicorn"], "served:app")
    process.request("/hold")
    process.noted("asked")
    process.interrupt()
    process.said("Waiting for connections")
    process.interrupt()
    process.ended()
    assert process.notes[len(STARTED) :] == ["asked"]


def test_hypercorn_on_trio_without_workers_has_no_handler_for_sigterm(fleet: Fleet) -> None:
    (process,) = fleet(["hypercorn-trio-no-workers"], "served:app")
    process.connect().close()
    process.terminate()
    assert process.ended() == -signal.SIGTERM
    assert process.notes == STARTED or process.notes[-1] == "Started"
