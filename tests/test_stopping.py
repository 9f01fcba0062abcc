"""The notice of the stop, the stop itself, and signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Annotated, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fastapi import Depends, FastAPI

import lifekit
from lifekit import (
    CrashError,
    Lifespan,
    NotOpenError,
    Registry,
    ShutdownError,
    Stopping,
    events,
    testing,
)

from .virtual_time import run

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What a server's handlers of SIGTERM and SIGINT heard; as uvicorn's, they are methods."""
    log: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    class Server:
        def handle_exit(self, number: int, frame: object) -> None:
            log.append(signal.Signals(number).name)

    for number in before:
        signal.signal(number, Server().handle_exit)
    yield log
    for number, handler in before.items():
        signal.signal(number, handler)


async def test_a_signal_is_the_notice_and_the_servers_handler_hears_it_too(heard: list[str]) -> None:
    registry = Registry()
    found = signal.getsignal(signal.SIGTERM)
    async with registry.lifespan() as lifespan:
        chained: Any = signal.getsignal(signal.SIGTERM)
        assert chained.__self__ is found.__self__  # type: ignore[union-attr] # pyright: ignore
        assert not lifekit.stopping().is_set()
        signal.raise_signal(signal.SIGTERM)
        assert lifekit.stopping().is_set()
        with anyio.fail_after(20):
            await lifespan.stopping.wait()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert heard == ["SIGTERM", "SIGTERM", "SIGINT"]
    assert signal.getsignal(signal.SIGTERM) is found


async def test_the_notice_is_an_event_with_its_reason_before_the_stop(
    heard: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[events.Event] = []
    registry = Registry("shop", on_event=told.append)
    caplog.set_level(logging.INFO, "lifekit")
    async with registry.lifespan() as lifespan:
        for _ in range(2):  # a second signal is no other notice
            signal.raise_signal(signal.SIGTERM)
        with anyio.fail_after(20):
            await lifespan.stopping.wait()
    async with registry.lifespan() as lifespan:
        lifespan.stop("redis://:secret@host is gone")
        await anyio.sleep_forever()
    async with registry.lifespan():
        pass  # it is left, and nobody asks for that
    asked = "redis://:***@host is gone"
    notices = [event for event in told if isinstance(event, events.StopNoticed)]
    assert [(each.reason, each.from_outside) for each in notices] == [("SIGTERM", True), (asked, False)]
    kinds = [type(event) for event in told]
    assert kinds[1:3] == [events.StopNoticed, events.Stopping]
    lines = [(each.levelname, each.message) for each in caplog.records if "asked" in each.message]
    assert lines == [
        ("INFO", "shop is asked to stop: SIGTERM"),
        ("WARNING", f"shop is asked to stop: {asked}"),
    ]


async def test_handlers_are_put_back_by_the_last_one_and_a_newer_one_stays(heard: list[str]) -> None:
    found = signal.getsignal(signal.SIGTERM)
    async with Registry().lifespan():
        async with Registry().lifespan():
            pass
        assert signal.getsignal(signal.SIGTERM) is not found
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is found
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_lifespan_whose_loop_was_closed_listens_no_more(heard: list[str]) -> None:
    found = signal.getsignal(signal.SIGTERM)
    lost = Registry().lifespan()

    async def leave_open() -> None:
        await lost.__aenter__()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_open())
    loop.close()

    async def run() -> None:
        async with Registry().lifespan():
            assert signal.getsignal(signal.SIGTERM) is not found

    asyncio.run(run())
    assert signal.getsignal(signal.SIGTERM) is found


async def test_what_a_server_installs_later_is_chained_too(heard: list[str]) -> None:
    def of_another(number: int, frame: object) -> None:
        heard.append("another's")

    found = signal.getsignal(signal.SIGTERM)
    async with Registry().lifespan():
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, of_another)
        async with Registry().lifespan():
            signal.raise_signal(signal.SIGTERM)
            assert lifekit.stopping().is_set()
        signal.signal(signal.SIGTERM, before)  # as a server does that ends
    assert heard == ["another's"]
    assert signal.getsignal(signal.SIGTERM) is found


async def test_a_delay_begins_no_thread_in_the_handler_and_leaves_none(
    heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which could wait for a lock that the interrupted code holds."""
    before = set(threading.enumerate())
    async with Registry(drain_delay=100.0).lifespan() as lifespan:
        with monkeypatch.context() as patched:
            patched.delattr(threading.Thread, "start")
            signal.raise_signal(signal.SIGTERM)
        assert lifespan.stopping.is_set()
        assert heard == []
    assert heard == ["SIGTERM"]
    assert set(threading.enumerate()) <= before


async def test_signals_are_left_alone_where_the_registry_says_so(heard: list[str]) -> None:
    found = signal.getsignal(signal.SIGTERM)
    async with Registry(signals=False).lifespan():
        assert signal.getsignal(signal.SIGTERM) is found
    assert heard == []


@on_asyncio
async def test_a_forked_process_is_not_told(heard: list[str]) -> None:
    async with Registry().lifespan() as lifespan:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(7 if lifespan.stopping.is_set() else 8)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 8


async def test_until_ends_with_the_notice_and_gives_what_has_come() -> None:
    closed: list[str] = []

    async def numbers() -> AsyncGenerator[int]:
        try:
            yield 1
            yield 2
            await anyio.sleep_forever()
        finally:
            closed.append("numbers")

    async def few() -> AsyncGenerator[int]:
        yield 1

    async with Registry().lifespan() as lifespan, anyio.create_task_group() as tasks:
        assert [each async for each in lifekit.stopping().until(few())] == [1]
        tasks.start_soon(_after_rounds, lifespan.stopping.set)
        assert [each async for each in lifekit.stopping().until(numbers())] == [1, 2]
        assert closed == ["numbers"]
        assert [each async for each in lifekit.stopping().until(few())] == []
        await lifekit.stopping().wait()


async def test_until_ends_though_the_notice_comes_between_two_waits_for_the_same_item() -> None:
    first = anyio.Event()

    async def slow() -> AsyncGenerator[int]:
        await first.wait()
        await anyio.sleep_forever()
        yield 1

    def both() -> None:
        first.set()
        lifespan.stopping.set()

    async with Registry().lifespan() as lifespan, anyio.create_task_group() as tasks:
        tasks.start_soon(_after_rounds, both)
        with anyio.fail_after(60):
            assert [each async for each in lifekit.stopping().until(slow())] == []


@on_asyncio
async def test_until_ends_though_what_it_waits_for_loses_a_cancellation() -> None:
    async def at_once() -> None:
        pass

    async def losing() -> AsyncGenerator[int]:
        await asyncio.wait_for(at_once(), 100)  # until Python 3.12, in its first two rounds
        await anyio.sleep_forever()
        yield 1

    for rounds in range(8):
        stopping = Stopping()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_after_rounds, stopping.set, rounds)
            with anyio.fail_after(60):
                assert [each async for each in stopping.until(losing())] == []


def test_until_asks_again_what_has_ignored_its_cancellation() -> None:
    async def ignoring() -> AsyncGenerator[int]:
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)
        await asyncio.sleep(1000)
        yield 1

    async def main() -> None:
        stopping, began = Stopping(), asyncio.get_running_loop().time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_after_rounds, stopping.set)
            assert [each async for each in stopping.until(ignoring())] == []
        assert asyncio.get_running_loop().time() - began < 10
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run(main, "asyncio")


async def test_until_gives_what_has_come_with_the_notice() -> None:
    first = anyio.Event()

    async def one() -> AsyncGenerator[int]:
        await first.wait()
        yield 1
        yield 2

    def both() -> None:
        first.set()
        lifespan.stopping.set()

    async with Registry().lifespan() as lifespan, anyio.create_task_group() as tasks:
        tasks.start_soon(_after_rounds, both)
        assert [each async for each in lifekit.stopping().until(one())] == [1]


async def test_a_cancellation_from_outside_goes_through_until_though_the_notice_comes_with_it() -> None:
    reached = False
    async with Registry().lifespan() as lifespan:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_after_rounds, lifespan.stopping.set)
                tasks.start_soon(_after_rounds, scope.cancel)
                async for _ in lifekit.stopping().until(_nothing()):
                    pass
                await checkpoint()
                reached = True
    assert scope.cancelled_caught
    assert not reached
    with anyio.CancelScope() as scope:
        await checkpoint()
    assert not scope.cancelled_caught


async def _nothing() -> AsyncGenerator[int]:
    await anyio.sleep_forever()
    yield 1


async def _after_rounds(call: Any, rounds: int = 5) -> None:
    for _ in range(rounds):
        await checkpoint()
    call()


@on_asyncio
async def test_it_is_a_dependency_of_the_requests_own_lifespan() -> None:
    registry = Registry()
    app = FastAPI(lifespan=registry.lifespan)

    @app.get("/")
    async def told(stopping: Annotated[Stopping, Depends(lifekit.stopping)]) -> bool:
        assert stopping is lifekit.stopping()
        return stopping.is_set()

    async with Registry().lifespan(), testing.client(app) as client:
        assert (await client.get("/")).json() is False
        registry.running[asyncio.get_running_loop()][0].stopping.set()
        assert (await client.get("/")).json() is True
    assert "stopping" not in app.openapi()["paths"]["/"]["get"]


async def test_where_no_lifespan_runs_it_says_so() -> None:
    with pytest.raises(NotOpenError, match="no lifespan runs here"):
        lifekit.stopping()


@pytest.mark.parametrize("by", ["the body", "a task", "a thread"])
async def test_stop_cancels_the_body_and_leaving_raises_nothing(by: str) -> None:
    reached = False
    async with Registry().lifespan() as lifespan:
        if by == "the body":
            lifespan.stop("enough")
        elif by == "a thread":
            await anyio.to_thread.run_sync(lifespan.stop)
        async with anyio.create_task_group() as tasks:
            if by == "a task":
                tasks.start_soon(_after_rounds, lifespan.stop)
            with anyio.fail_after(20):
                await anyio.sleep_forever()
        reached = True
    assert not reached
    with anyio.CancelScope() as scope:  # nothing of the cancellation is left
        await checkpoint()
    assert not scope.cancelled_caught


async def test_a_body_that_ends_as_it_is_stopped_is_not_cancelled_later() -> None:
    async with Registry().lifespan() as lifespan:
        lifespan.stop("enough")
    await checkpoint()
    await checkpoint()


async def test_a_cancellation_from_outside_is_delivered_though_it_stops() -> None:
    with anyio.CancelScope() as scope:
        async with Registry().lifespan() as lifespan:
            lifespan.stop("enough")
            scope.cancel()
            await anyio.sleep_forever()
        await checkpoint()
    assert scope.cancelled_caught


async def test_closings_that_fail_after_a_crash_are_told_as_well() -> None:
    registry = Registry("shop")

    @registry.resource
    async def broken() -> AsyncGenerator[None]:
        yield
        raise ValueError("broken")

    @registry.worker(restart="never")
    async def outbox() -> None:
        raise ZeroDivisionError

    with pytest.raises(CrashError) as caught:
        async with registry.lifespan():
            await anyio.sleep_forever()
    assert [name for name, _ in caught.value.failures] == ["outbox"]
    assert isinstance(caught.value.shutdown, ShutdownError)
    assert caught.group_contains(ValueError)


async def test_it_may_be_entered_under_a_limit_or_in_another_task_and_outlives_both() -> None:
    """A scope of lifekit's own would be open across the end of the one that it was opened in."""
    async with AsyncExitStack() as stack:
        with anyio.fail_after(20):
            await stack.enter_async_context(Registry().lifespan())
        lifespan = Registry().lifespan()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stack.enter_async_context, lifespan)
        assert not lifespan.stopping.is_set()


@pytest.mark.parametrize("by", ["exit stack", "context manager"])
async def test_a_body_behind_context_managers_is_cancelled_where_that_can_be(
    by: str, anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def around() -> AsyncGenerator[Lifespan]:
        async with Registry("shop").lifespan() as lifespan:
            yield lifespan

    ended = False
    async with AsyncExitStack() as stack:
        if by == "exit stack":
            lifespan = await stack.enter_async_context(around())
            lifespan.stop("enough")
            with anyio.move_on_after(0.1):
                await anyio.sleep_forever()
            ended = True
        else:
            async with around() as lifespan:
                lifespan.stop("enough")
                await anyio.sleep_forever()
    can_be = by == "context manager" or anyio_backend_name != "trio"
    assert ended != can_be
    assert ("shop can't be ended from here" in caplog.text) != can_be


@pytest.fixture
async def crashing() -> AsyncGenerator[Lifespan]:
    """A lifespan of a fixture, which the same task enters and leaves as runs the test."""
    registry = Registry("shop")

    @registry.worker(restart="never")
    async def outbox() -> None:
        raise ZeroDivisionError

    with pytest.raises(CrashError):
        async with registry.lifespan() as lifespan:
            yield lifespan


async def test_a_crash_does_not_cancel_the_test_whose_fixture_entered_the_lifespan(
    crashing: Lifespan, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        await checkpoint()
    assert not (await crashing.health()).ready
    records = (*caplog.get_records("setup"), *caplog.records)
    assert any("shop can't be ended from here" in record.message for record in records)


@on_asyncio
async def test_a_crash_in_a_test_client_comes_out_of_it() -> None:
    registry = Registry("shop")

    @registry.worker(restart="never")
    async def outbox() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(CrashError):
        async with testing.client(FastAPI(lifespan=registry.lifespan)):
            await asyncio.sleep(0.05)
