"""`registry.run()`: what ends a worker process, its exit status, and what it prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import anyio
import pytest

from lifekit import LifekitError, Lifespan, Registry

ROOT = Path(__file__).parents[1]
LIMIT = 120.0
"""Seconds for what takes one, for a machine that is busy."""


class Process:
    """tests/apps/worker_process.py, and what it has noted."""

    def __init__(self, directory: Path, what: str) -> None:
        self._directory, self._notes = directory, directory / "notes"
        self._notes.touch()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.apps.worker_process", what],
            cwd=ROOT,
            env={**os.environ, "NOTES": str(self._notes)},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(self._notes.read_text().splitlines()))

    def wait_for(self, note: str) -> None:
        """Wait until it has noted that."""
        end = time.monotonic() + LIMIT
        while note not in self.notes:
            assert self.popen.poll() is None, self.popen.communicate()[1]
            assert time.monotonic() < end, self.notes
            time.sleep(0.01)

    def say(self, answer: str) -> None:
        """Let it go on."""
        (self._directory / answer).touch()

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its status and what it printed."""
        printed = self.popen.communicate(timeout=LIMIT)[1]
        return self.popen.returncode, printed


@pytest.mark.parametrize(
    ("what", "status"), [("returns", 0), ("stops", 0), ("exits", 3), ("raises", 1), ("crashes", 1)]
)
def test_the_exit_status_says_how_it_ended(tmp_path: Path, what: str, status: int) -> None:
    process = Process(tmp_path, what)
    process.say("finish")
    found, printed = process.end()
    assert found == status, printed
    assert process.notes[-1] == "closed"
    assert "hunter2" not in printed
    assert ("ValueError: no way to postgresql://shop:***@db/shop" in printed) == (status == 1)
    assert "CancelledError" not in printed


def test_a_start_that_fails_is_printed_once_without_secrets(tmp_path: Path) -> None:
    status, printed = Process(tmp_path, "fails-to-start").end()
    assert status == 1
    assert printed.count("StartupError: shop did not start: db failed") == 1
    assert "hunter2" not in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_workers_finish_and_ends_it_in_order(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = Process(tmp_path, "")
    process.wait_for("working")
    process.popen.send_signal(number)
    process.wait_for("finishing")
    process.say("finish")
    status, printed = process.end()
    assert (status, process.notes) == (0, ["working", "finishing", "finished", "closed"])
    assert "Traceback" not in printed


def test_a_signal_during_the_start_ends_it_at_once(tmp_path: Path) -> None:
    process = Process(tmp_path, "starts-slowly")
    process.wait_for("opening")
    process.popen.terminate()
    status, printed = process.end()
    assert (status, process.notes) == (0, ["opening"])
    assert "Traceback" not in printed


def test_an_error_of_lifekit_that_main_raises_after_a_signal_is_a_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def main(lifespan: Lifespan) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise LifekitError("'migrations' was not exclusive any more")

    assert Registry().run(main) == 1
    assert "'migrations' was not exclusive any more" in capsys.readouterr().err


def test_ctrl_c_pressed_again_ends_a_main_that_ignores_the_stop(tmp_path: Path) -> None:
    process = Process(tmp_path, "ignores")
    process.wait_for("ignoring")
    process.wait_for("working")
    process.say("finish")
    process.popen.terminate()
    process.wait_for("noticed")
    process.popen.terminate()  # which changes nothing
    process.popen.send_signal(signal.SIGINT)
    status, _ = process.end()
    assert status == 130
    assert process.notes[-1] == "closed"


def test_handlers_are_put_back_and_none_is_set_in_another_thread() -> None:
    registry = Registry()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def main(lifespan: Lifespan) -> None:
        await anyio.lowlevel.checkpoint()

    assert registry.run(main) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(registry.run(main)))
    thread.start()
    thread.join(LIMIT)
    assert statuses == [0]


@pytest.mark.anyio
async def test_in_an_event_loop_it_is_refused_with_the_way_out() -> None:
    with pytest.raises(LifekitError, match=r"async with registry\.lifespan\(\)"):
        Registry("looped").run()
