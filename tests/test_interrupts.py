"""Ctrl-C and cancellations, however many, at every moment of a script: no closing is skipped or cut."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
import uvloop

from lifekit import DeadlineError, Registry, ShutdownError
from lifekit.events import Closed, Closing, Event, Opened, Started, Stopping

from . import virtual_time

ROOT = Path(__file__).parent.parent
LIMIT = 50.0
"""Seconds for what takes one or two, for a machine that is busy."""

RUNNERS = ["asyncio", "uvloop", "trio"]
ALL_RUNNERS = [*RUNNERS, "anyio", "runner"]
MOMENTS = ["open-second", "body", "close-second", "close-first"]
"""At which the script stands still."""


class Script:
    """tests/apps/script.py in a process, interrupted where it stands still."""

    def __init__(self, directory: Path, runner: str) -> None:
        self._notes, self._output = directory / "notes", directory / "output"
        self._notes.touch()
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.apps.script", runner],
                cwd=ROOT,
                env={**os.environ, "NOTES": str(self._notes)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines()

    @property
    def lines(self) -> list[str]:
        """What it has written, each line once."""
        return list(dict.fromkeys(self.notes))

    @property
    def output(self) -> str:
        return self._output.read_text()

    def goes_on(self, moment: str) -> None:
        """Wait until it has written two more lines of *moment*."""
        end, seen = time.monotonic() + LIMIT, self.notes.count(moment)
        while self.notes.count(moment) < seen + 2:
            told = f"{moment}: {self.process.poll()} {self.lines}\n{self.output}"
            assert self.process.poll() is None, told
            assert time.monotonic() < end, told
            time.sleep(0.002)

    def interrupt(self, moment: str, times: int) -> None:
        """Send SIGINT at *moment*, each when what came of the one before is over."""
        self.goes_on(moment)
        for left in reversed(range(times)):
            self.process.send_signal(signal.SIGINT)
            if left or moment not in ("open-second", "body"):  # which the first one ends
                self.goes_on(moment)

    def leave(self, *moments: str) -> None:
        """Let it go on."""
        for moment in moments:
            self._notes.with_name(moment).touch()


@pytest.fixture
def script(tmp_path: Path) -> Generator[Callable[[str], Script]]:
    started: list[Script] = []

    def start(runner: str) -> Script:
        directory = tmp_path / f"{len(started)}"
        directory.mkdir()
        started.append(Script(directory, runner))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait()


def ended_by_the_interrupt(script: Script) -> None:
    """All is closed, to the last line and in order; the rest is what Python makes of Ctrl-C."""
    assert script.process.wait(LIMIT) == -signal.SIGINT, script.output
    lines = [line for line in script.lines if line != "stuck closing"]  # trio has no order for it
    closed = ["close-second", "second closed"] if "second opened" in lines else []
    assert lines[-2 - len(closed) :] == [*closed, "close-first", "first closed"]
    assert script.output.rstrip().endswith("KeyboardInterrupt")
    assert re.search(r"stuck \(.*\): close took longer than 0\.2 s", script.output)


def interrupted(script: Script, times: dict[str, int]) -> None:
    """Run it from moment to moment, with so many interrupts at each."""
    for moment in MOMENTS:
        if moment == "close-second" and "open-second" in times:
            continue  # it never opened
        if moment in times or moment.startswith("close"):
            script.interrupt(moment, times.get(moment, 0))
        script.leave(moment)
    ended_by_the_interrupt(script)


@pytest.mark.parametrize("runner", RUNNERS)
def test_ctrl_c_once_and_again_skips_no_closing(script: Callable[[str], Script], runner: str) -> None:
    """In the body, then while the one closes, and twice while the other does."""
    interrupted(script(runner), {"body": 1, "close-second": 1, "close-first": 2})


@pytest.mark.parametrize("runner", RUNNERS)
def test_ctrl_c_during_a_start_and_during_its_rollback_skips_no_closing(
    script: Callable[[str], Script], runner: str
) -> None:
    interrupted(script(runner), {"open-second": 1, "close-first": 2})


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(1, marks=pytest.mark.long),
        pytest.param(2, marks=pytest.mark.proof),
        pytest.param(3, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("runner", ALL_RUNNERS)
def test_ctrl_c_at_any_moment_skips_no_closing(
    script: Callable[[str], Script], runner: str, moment: str, times: int
) -> None:
    later = "close-first" if moment in ("open-second", "close-first") else "close-second"
    first = {moment: 1, later: times - 1} if moment in MOMENTS[:2] else {moment: times}
    interrupted(script(runner), first)


# -- cancellations ----------------------------------------------------------------------------------


def run(main: Callable[[], Awaitable[None]], loop: str = "asyncio") -> None:
    """Run *main* in a new event loop of that kind."""

    async def bounded() -> None:
        async with asyncio.timeout(LIMIT):
            await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(bounded())


def cancel_all(over: Callable[[], bool]) -> None:
    """Cancel every task there is in every turn of the loop, until it is *over*."""
    if not over():
        for task in asyncio.all_tasks():
            task.cancel()
        asyncio.get_running_loop().call_soon(cancel_all, over)


class TwoPhases:
    """A value that is closed in two steps, one of several turns of the loop."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def close(self) -> None:
        self._log.append(f"closing {self._name}")

    async def wait_closed(self) -> None:
        await asyncio.sleep(0.01)
        self._log.append(f"closed {self._name}")


Kind = Callable[[str, list[str]], Any]


def by_generator(name: str, log: list[str]) -> Any:
    async def resource() -> AsyncGenerator[None]:
        yield
        log.append(f"closing {name}")
        await asyncio.sleep(0.01)
        await anyio.sleep(0.01)
        log.append(f"closed {name}")

    return resource


def by_context_manager(name: str, log: list[str]) -> Any:
    @asynccontextmanager
    async def manager() -> AsyncGenerator[None]:
        async with anyio.create_task_group(), asyncio.timeout(LIMIT):
            yield
            log.append(f"closing {name}")
            await asyncio.sleep(0.01)
            log.append(f"closed {name}")

    return manager


def by_two_phases(name: str, log: list[str]) -> Any:
    return lambda: TwoPhases(name, log)


LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
KINDS = pytest.mark.parametrize("kind", [by_generator, by_context_manager, by_two_phases])
WHOLE = ["closing above", "closed above", "closing below", "closed below"]


def chain(kind: Kind, at: type[Event], log: list[str], *, close_timeout: float = 10.0) -> Registry:
    """A registry of two resources; at its first event *at* all tasks begin to be cancelled."""

    def begin(event: Event) -> None:
        if isinstance(event, at) and not begun:
            begun.append(event)
            asyncio.get_running_loop().call_soon(cancel_all, lambda: log[-1:] == WHOLE[-1:])

    begun: list[Event] = []
    registry = Registry(on_event=begin, close_timeout=close_timeout)
    below = registry.resource(name="below")(kind("below", log))
    registry.resource(after=[below], name="above")(kind("above", log))
    return registry


@LOOPS
@KINDS
@pytest.mark.parametrize("at", [Stopping, Closing, Closed])
def test_all_tasks_cancelled_in_every_turn_of_a_shutdown_cut_no_closing(
    kind: Kind, loop: str, at: type[Event]
) -> None:
    log: list[str] = []
    registry = chain(kind, at, log)

    async def main() -> None:
        async with registry.lifespan():
            pass

    with pytest.raises(asyncio.CancelledError):  # delivered afterwards, and no ShutdownError
        run(main, loop)
    assert log == WHOLE
    assert not registry.running


@LOOPS
def test_all_tasks_cancelled_in_every_turn_from_the_body_on_cut_no_closing(loop: str) -> None:
    log: list[str] = []
    registry = chain(by_generator, Started, log)

    async def main() -> None:
        async with registry.lifespan():
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        run(main, loop)
    assert log == WHOLE


@LOOPS
def test_all_tasks_cancelled_in_every_turn_of_a_start_cut_no_rollback(loop: str) -> None:
    log: list[str] = []
    registry = chain(by_generator, Opened, log)

    async def main() -> None:
        async with registry.lifespan():
            raise AssertionError

    with pytest.raises(asyncio.CancelledError):
        run(main, loop)
    assert log == WHOLE[2:]
    assert not registry.running


@LOOPS
def test_deadlines_hold_while_all_tasks_are_cancelled_in_every_turn(loop: str) -> None:
    """What hangs is cut off at its time, and its error names it."""

    def hanging(name: str, log: list[str]) -> Any:
        async def resource() -> AsyncGenerator[None]:
            yield
            log.append(f"closing {name}")
            try:
                await asyncio.Event().wait()
            finally:
                log.append(f"closed {name}")

        return resource

    log: list[str] = []
    registry = chain(hanging, Stopping, log, close_timeout=0.05)

    async def main() -> None:
        async with registry.lifespan():
            pass

    with pytest.raises(asyncio.CancelledError) as caught:
        run(main, loop)
    assert log == WHOLE
    failure = caught.value.__context__
    assert isinstance(failure, ShutdownError)
    assert all(isinstance(each, DeadlineError) for each in failure.exceptions)
    assert [getattr(each, "resource", None) for each in failure.exceptions] == ["above", "below"]


@LOOPS
def test_all_tasks_cancelled_cut_none_that_a_closing_has_made(loop: str) -> None:
    """gather(), wait_for(), a task group, and what those start; what outlives it is seen again."""
    log: list[str] = []
    left: list[asyncio.Task[None]] = []

    async def step(name: str) -> None:
        await asyncio.sleep(0.01)
        log.append(name)

    def many(name: str, _: list[str]) -> Any:
        async def resource() -> AsyncGenerator[None]:
            yield
            await asyncio.gather(step("gathered"), asyncio.wait_for(step("in time"), 60))
            async with asyncio.TaskGroup() as group:
                group.create_task(step("in a group"))
            left.append(asyncio.create_task(asyncio.sleep(60)))
            log.append(f"closed {name}")

        return resource

    registry = chain(many, Stopping, log)

    async def main() -> None:
        before = asyncio.get_running_loop().get_task_factory()
        try:
            async with registry.lifespan():
                pass
        finally:
            assert asyncio.get_running_loop().get_task_factory() is before
            assert set(left) <= asyncio.all_tasks()

    with pytest.raises(asyncio.CancelledError):
        run(main, loop)
    each = ["gathered", "in a group", "in time"]
    assert sorted(log) == sorted([*each, *each, "closed above", "closed below"])
    assert all(task.cancelled() for task in left)


@LOOPS
def test_a_closings_own_time_limits_hold_while_all_tasks_are_cancelled(loop: str) -> None:
    """asyncio.timeout and AnyIO's scopes cancel from within, and are heard."""
    log: list[str] = []

    def limited(name: str, _: list[str]) -> Any:
        async def resource() -> AsyncGenerator[None]:
            yield
            with anyio.move_on_after(0.01) as scope:
                await anyio.sleep_forever()
            assert scope.cancelled_caught
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await asyncio.Event().wait()
            await asyncio.sleep(0.01)
            log.append(f"closed {name}")

        return resource

    registry = chain(limited, Stopping, log)

    async def main() -> None:
        async with registry.lifespan():
            pass

    with pytest.raises(asyncio.CancelledError):
        run(main, loop)
    assert log == ["closed above", "closed below"]


@LOOPS
def test_the_end_of_a_runner_under_an_open_lifespan_closes_everything(loop: str) -> None:
    """As a server does whose shutdown skips the lifespan's: its loop cancels what is left, and ends."""
    log: list[str] = []
    registry = chain(by_generator, Stopping, log)

    async def serve(ready: asyncio.Event) -> None:
        async with registry.lifespan():
            ready.set()
            await asyncio.Event().wait()

    async def main() -> None:
        ready = asyncio.Event()
        tasks.append(asyncio.create_task(serve(ready)))
        await ready.wait()

    tasks: list[asyncio.Task[None]] = []
    run(main, loop)
    assert log == WHOLE
    assert tasks[0].cancelled()


@LOOPS
def test_a_runner_that_ends_amid_a_shutdown_leaves_no_handler_of_its_own_behind(loop: str) -> None:
    log: list[str] = []

    async def main() -> None:
        opened, closing = asyncio.Event(), asyncio.Event()
        registry = Registry(
            on_event=lambda event: closing.set() if isinstance(event, Closing) else None
        )
        registry.resource(name="below")(by_generator("below", log))

        async def serve() -> None:
            async with registry.lifespan():
                opened.set()

        tasks.append(asyncio.create_task(serve()))
        await opened.wait()
        await closing.wait()

    tasks: list[asyncio.Task[None]] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(main, loop)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert log == WHOLE[2:]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_an_interrupt_raised_in_a_closing_is_delivered_after_the_last_one(
    error: type[BaseException], loop: str
) -> None:
    log: list[str] = []
    registry = Registry()
    below = registry.resource(name="below")(by_sleeping("below", log))

    @registry.resource(after=[below])
    async def above() -> AsyncGenerator[None]:
        yield
        await anyio.lowlevel.checkpoint()
        raise error

    async def main() -> None:
        async with registry.lifespan():
            pass

    with pytest.raises(error):
        if loop == "trio":
            trio.run(main)
        else:
            run(main, loop)
    assert log == WHOLE[2:]


def by_sleeping(name: str, log: list[str]) -> Any:
    """As `by_generator`, on any backend."""

    async def resource() -> AsyncGenerator[None]:
        yield
        log.append(f"closing {name}")
        await anyio.sleep(0.01)
        log.append(f"closed {name}")

    return resource


@LOOPS
def test_a_loop_that_was_closed_under_an_open_lifespan_is_reported(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be awaited any more: what was never closed is named in the log."""
    log: list[str] = []
    registry = Registry("shop")
    registry.resource(name="below")(by_generator("below", log))
    runs = uvloop.new_event_loop() if loop == "uvloop" else asyncio.new_event_loop()
    ready = asyncio.Event()

    async def serve() -> None:
        async with registry.lifespan():
            ready.set()
            await asyncio.Event().wait()

    task = runs.create_task(serve())
    runs.run_until_complete(ready.wait())
    runs.close()
    del task, runs
    gc.collect()
    told = [record.getMessage() for record in caplog.records if record.name == "lifekit"]
    assert any("below" in line and "event loop" in line for line in told), told
    assert not registry.running


def test_ctrl_c_is_heard_again_where_something_blocks_long_after_the_grace() -> None:
    registry, log = Registry(grace=1), list[str]()

    @registry.resource
    def below() -> Generator[None]:
        yield
        log.append("below closed")

    @registry.resource(below)
    def stuck(_: None) -> Generator[None]:
        yield
        for _times in range(2):  # asyncio's runner raises at the second
            signal.raise_signal(signal.SIGINT)
        log.append("held back")
        virtual_time.block(9)
        signal.raise_signal(signal.SIGINT)
        log.append("never")

    async def main() -> None:
        async with registry.lifespan():
            pass

    with (
        pytest.raises(KeyboardInterrupt),
        asyncio.Runner(loop_factory=virtual_time.JumpingLoop) as runner,
    ):
        runner.run(main())
    assert log == ["held back", "below closed"]
