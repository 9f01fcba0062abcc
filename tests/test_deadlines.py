"""Deadlines: what is cut off, what the error says, and what is left behind."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio import CancelScope

from lifekit import DeadlineError, Registry, ShutdownError, StartupError, events

from . import virtual_time

BACKENDS = ["asyncio", "trio"]
in_virtual_time = pytest.mark.parametrize("backend", BACKENDS)


class Closable:
    """A value whose phases are given."""

    def __init__(self, **phases: Callable[[], Awaitable[None]]) -> None:
        self.calls: list[str] = []
        self.phases = phases

    async def run(self, phase: str) -> None:
        self.calls.append(phase)
        if phase in self.phases:
            await self.phases[phase]()

    async def close(self) -> None:
        await self.run("close")

    async def wait_closed(self) -> None:
        await self.run("wait_closed")

    async def terminate(self) -> None:
        await self.run("terminate")


async def stubborn() -> None:
    """Ignore every cancellation for a thousand seconds."""
    with CancelScope(shield=True):
        await anyio.sleep(1000)


@in_virtual_time
def test_a_start_that_hangs_says_where_and_how_long(backend: str) -> None:
    async def connect() -> None:
        await anyio.sleep(math.inf)  # the line that hangs

    async def main() -> None:
        registry = Registry()

        @registry.resource(start_timeout=7)
        async def db() -> None:
            await connect()

        began = anyio.current_time()
        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert anyio.current_time() - began == pytest.approx(7, abs=0.1)
        (error,) = caught.value.exceptions
        assert isinstance(error, DeadlineError)
        assert isinstance(error, TimeoutError)
        assert (error.resource, error.phase, error.seconds) == ("db", "open", 7)
        assert any("the line that hangs" in line and "connect" in line for line in error.stack)
        assert "test_deadlines.py" in str(error)

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_generator_that_hangs_while_it_closes_shows_its_line(backend: str) -> None:
    async def main() -> None:
        registry = Registry(close_timeout=3)

        @registry.resource
        async def worker() -> AsyncGenerator[int]:
            yield 1
            await anyio.sleep(math.inf)  # the drain

        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                pass
        (error,) = caught.value.exceptions
        assert isinstance(error, DeadlineError)
        assert (error.phase, error.seconds) == ("close", 3)
        assert any("the drain" in line for line in error.stack)

    virtual_time.run(main, backend)


@in_virtual_time
def test_close_and_wait_closed_share_one_deadline(backend: str) -> None:
    async def main() -> None:
        value = Closable(close=lambda: anyio.sleep(6), wait_closed=lambda: anyio.sleep(6))
        registry = Registry(close_timeout=10)
        registry.resource(name="value")(lambda: value)
        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                pass
        assert value.calls == ["close", "wait_closed", "terminate"]
        (error,) = caught.value.exceptions
        assert isinstance(error, DeadlineError)
        assert (error.phase, error.seconds) == ("wait_closed", 10)

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_value_that_arrives_after_its_deadline_is_closed_too(backend: str) -> None:
    async def main() -> None:
        value = Closable()
        log: list[str] = []
        registry = Registry(start_timeout=5, on_event=lambda event: log.append(type(event).__name__))

        @registry.resource
        async def late() -> Closable:
            with CancelScope(shield=True):
                await anyio.sleep(8)
            return value

        with pytest.raises(StartupError):
            async with registry.lifespan():
                pass
        assert value.calls == ["close", "wait_closed"]
        assert log == ["Opening", "OpenFailed", "Closing", "Closed", "Stopping", "Stopped"]

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_start_that_ignores_its_cancellation_is_left_behind_and_closed_when_it_comes(
    backend: str,
) -> None:
    async def main() -> None:
        value = Closable()
        registry = Registry(start_timeout=5, close_timeout=4)

        @registry.resource
        async def late() -> Closable:
            await stubborn()
            return value

        began = anyio.current_time()
        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert anyio.current_time() - began == pytest.approx(5 + 4, abs=0.1)
        (error,) = caught.value.exceptions
        assert isinstance(error, DeadlineError)
        assert error.abandoned
        assert value.calls == []
        await anyio.sleep(1000)
        assert value.calls == ["close", "wait_closed"]

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_closing_that_ignores_its_cancellation_is_terminated_and_left_behind(
    backend: str,
) -> None:
    async def main() -> None:
        parent, child = Closable(), Closable(close=stubborn)
        registry = Registry(close_timeout=4)
        below = registry.resource(name="parent")(lambda: parent)
        registry.resource(below, name="child")(lambda _: child)
        began = anyio.current_time()
        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                pass
        assert anyio.current_time() - began == pytest.approx(4 + 1, abs=0.1)
        assert child.calls == ["close", "terminate"]
        assert parent.calls == ["close", "wait_closed"]
        (error,) = caught.value.exceptions
        assert isinstance(error, DeadlineError)
        assert error.abandoned
        assert "left behind" in str(error)

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_terminate_that_hangs_has_a_limit_of_its_own(backend: str) -> None:
    async def close() -> None:
        raise OSError

    async def main() -> None:
        registry = Registry()
        value = Closable(close=close, terminate=anyio.sleep_forever)
        registry.resource(name="value")(lambda: value)
        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                pass
        told = str(caught.value.exceptions[-1])
        assert "terminate took longer than 1 s" in told
        assert "grace" not in told

    virtual_time.run(main, backend)


@in_virtual_time
def test_the_whole_shutdown_keeps_to_its_grace(backend: str) -> None:
    async def main() -> None:
        registry = Registry(close_timeout=10, grace=25)
        values = [Closable(close=lambda: anyio.sleep(math.inf)) for _ in range(5)]
        below: tuple[Any, ...] = ()
        for index, value in enumerate(values):

            def make(*_: Closable, value: Closable = value) -> Closable:
                return value

            below = (registry.resource(*below, name=f"r{index}")(make),)
        began = anyio.current_time()
        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                pass
        assert anyio.current_time() - began == pytest.approx(25, abs=0.1)
        assert all(value.calls == ["close", "terminate"] for value in values)
        seconds = [
            error.seconds for error in caught.value.exceptions if isinstance(error, DeadlineError)
        ]
        assert seconds == [10, 10, pytest.approx(5, abs=0.1), 0, 0]
        assert "grace" in str(caught.value.exceptions[-1])

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_rollback_has_a_budget_of_its_own(backend: str) -> None:
    async def main() -> None:
        slow = Closable(close=lambda: anyio.sleep(8))
        registry = Registry(start_timeout=5, close_timeout=10)
        first = registry.resource(name="first")(lambda: slow)

        @registry.resource(first)
        async def second(first: Closable) -> None:
            await anyio.sleep(math.inf)

        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert slow.calls == ["close", "wait_closed"]
        assert caught.value.rollback is None
        assert caught.value.opened == ("first",)

    virtual_time.run(main, backend)


@in_virtual_time
def test_failures_of_the_rollback_follow_the_first_failure(backend: str) -> None:
    async def main() -> None:
        async def boom() -> None:
            raise ValueError("on the way back")

        registry = Registry()
        first = registry.resource(name="first")(lambda: Closable(close=boom))

        @registry.resource(first)
        def second(first: Closable) -> None:
            raise KeyError("the cause")

        registry.resource(registry.resource(second, name="third")(lambda _: None), name="fourth")(
            lambda _: None
        )
        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        error = caught.value
        assert isinstance(error.exceptions[0], KeyError)
        assert error.failures == (("second", error.exceptions[0]),)
        assert error.rollback is error.exceptions[1]
        assert isinstance(error.rollback, ShutdownError)
        assert isinstance(error.rollback.exceptions[0], ValueError)
        assert error.not_begun == ("third", "fourth")
        assert "never began: third, fourth" in str(error)

    virtual_time.run(main, backend)


@in_virtual_time
def test_siblings_that_still_open_are_cancelled_when_one_fails(backend: str) -> None:
    async def main() -> None:
        log: list[tuple[str, str]] = []
        registry = Registry(
            on_event=lambda event: log.append((type(event).__name__, getattr(event, "resource", "")))
        )
        cleaned: list[str] = []

        @registry.resource
        async def slow() -> AsyncGenerator[None]:
            try:
                await anyio.sleep(math.inf)
                yield
            finally:
                cleaned.append("slow")

        @registry.resource
        async def failing() -> None:
            await anyio.sleep(1)
            raise ZeroDivisionError

        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]
        assert caught.value.cut_off == ("slow",)
        assert "cancelled while it opened: slow" in str(caught.value)
        assert cleaned == ["slow"]
        assert ("OpenFailed", "slow") in log
        assert ("Opened", "slow") not in log

    virtual_time.run(main, backend)


@in_virtual_time
def test_no_deadline_is_a_deadline_too(backend: str) -> None:
    async def main() -> None:
        registry = Registry(start_timeout=math.inf, close_timeout=math.inf, grace=math.inf)

        @registry.resource
        async def slow() -> AsyncGenerator[None]:
            await anyio.sleep(10_000)
            yield
            await anyio.sleep(10_000)

        async with registry.lifespan():
            pass

    virtual_time.run(main, backend)


class RefusedError(ConnectionRefusedError):
    """What a server that is not up gives."""


@in_virtual_time
def test_a_transient_failure_is_tried_again_and_the_undone_attempts_are_closed(
    backend: str,
) -> None:
    async def main() -> None:
        log: list[events.Event] = []
        registry = Registry(on_event=log.append)
        made: list[Closable] = []

        async def check(value: Closable) -> None:
            if len(made) < 3:
                raise RefusedError

        @registry.resource(retry=5, check=check)
        def server() -> Closable:
            made.append(Closable())
            return made[-1]

        async with registry.lifespan() as lifespan:
            assert lifespan[server] is made[2]
            assert [value.calls for value in made] == [["close", "wait_closed"]] * 2 + [[]]
        retries = [event for event in log if isinstance(event, events.Retrying)]
        assert [event.attempt for event in retries] == [1, 2]
        assert 0.05 <= retries[0].delay <= 0.1 <= retries[1].delay <= 0.2

    virtual_time.run(main, backend)


@in_virtual_time
def test_retries_end_with_the_last_failure_not_with_a_deadline(backend: str) -> None:
    async def main() -> None:
        attempts: list[float] = []
        registry = Registry()

        @registry.resource(retry=1000, start_timeout=20)
        def server() -> None:
            attempts.append(anyio.current_time())
            raise RefusedError

        began = anyio.current_time()
        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert isinstance(caught.value.exceptions[0], RefusedError)
        assert "gave up" in str(caught.value.exceptions[0].__notes__)
        assert anyio.current_time() - began <= 20
        assert 6 <= len(attempts) <= 20

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_deadline_during_a_later_attempt_still_shows_the_failure_before(backend: str) -> None:
    async def main() -> None:
        registry = Registry(start_timeout=5)
        attempts: list[None] = []

        @registry.resource(retry=3)
        async def server() -> None:
            attempts.append(None)
            if len(attempts) == 1:
                raise RefusedError
            await anyio.sleep(math.inf)

        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        (error,) = caught.value.exceptions
        assert isinstance(error, DeadlineError)
        assert isinstance(error.__cause__, RefusedError)

    virtual_time.run(main, backend)


@pytest.mark.parametrize(
    "error", [ValueError, PermissionError, FileNotFoundError(2, "no", "settings.toml")]
)
def test_what_is_not_transient_is_not_tried_again(error: Any) -> None:
    async def main() -> None:
        attempts: list[None] = []
        registry = Registry()

        @registry.resource(retry=3)
        def server() -> None:
            attempts.append(None)
            raise error

        with pytest.raises(StartupError):
            async with registry.lifespan():
                pass
        assert len(attempts) == 1

    virtual_time.run(main, "asyncio")
