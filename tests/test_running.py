"""What holds while a lifespan runs: tasks, loops, threads, and nothing left behind."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import logging
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import MethodType
from typing import Any, cast, get_args, get_type_hints
from unittest.mock import create_autospec

import anyio
import psutil
import pytest
from anyio import CancelScope
from anyio.lowlevel import checkpoint
from starlette.requests import HTTPConnection

from lifekit import LifekitError, NotOpenError, Registry, Resource, StartupError, WrongLoopError, events

from .leaks import tasks_alive

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)


class Value:
    """Something that is closed in two phases, and knows in which task."""

    def __init__(self) -> None:
        self.opened_in = anyio.get_current_task().id
        self.story: list[str] = []

    async def close(self) -> None:
        await checkpoint()
        self.story.append("close")
        assert anyio.get_current_task().id == self.opened_in

    async def wait_closed(self) -> None:
        await checkpoint()
        self.story.append("wait_closed")
        assert anyio.get_current_task().id == self.opened_in


def note_in(log: list[str]) -> Callable[[events.Event], None]:
    """Return an on_event that notes each event's name."""
    return lambda event: log.append(type(event).__name__)


def registry_of_one(**options: Any) -> tuple[Registry, Resource[Value]]:
    """Return a registry with one `Value` in it, and its handle."""
    registry = Registry(**options)

    @registry.resource
    async def value() -> Value:
        await checkpoint()
        return Value()

    return registry, value


async def test_independent_resources_open_and_close_at_the_same_time() -> None:
    registry = Registry()
    opening, closing = anyio.Event(), anyio.Event()

    @registry.resource
    async def first() -> AsyncGenerator[int]:
        await opening.wait()
        yield 1
        await closing.wait()

    @registry.resource
    async def second() -> AsyncGenerator[int]:
        opening.set()
        yield 2
        closing.set()

    with anyio.fail_after(60):
        async with registry.lifespan() as lifespan:
            assert (lifespan[first], lifespan[second]) == (1, 2)


async def test_a_lifespan_may_be_entered_in_one_task_and_left_in_another() -> None:
    registry, value = registry_of_one()
    lifespan = registry.lifespan()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifespan.__aenter__)
    live = lifespan[value]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifespan.__aexit__, None, None, None)
    assert live.story == ["close", "wait_closed"]


async def test_opening_and_closing_run_in_one_task() -> None:
    registry, value = registry_of_one()
    async with registry.lifespan() as lifespan:
        live = lifespan[value]
        assert live.opened_in != anyio.get_current_task().id
    assert live.story == ["close", "wait_closed"]  # each asserted its task


async def test_a_lifespan_runs_once_and_its_registry_many_times() -> None:
    registry, value = registry_of_one()
    lifespan = registry.lifespan()
    async with lifespan:
        pass
    with pytest.raises(LifekitError, match="make another one"):
        await lifespan.__aenter__()
    async with registry.lifespan() as another:
        assert another[value].story == []


async def test_a_value_is_gone_when_its_closing_begins() -> None:
    registry, value = registry_of_one()
    async with registry.lifespan() as lifespan:
        assert value.get() is lifespan[value] is lifespan["value"]
        assert "value" in lifespan
    with pytest.raises(NotOpenError, match="closing or closed"):
        lifespan[value]
    with pytest.raises(NotOpenError):
        value.get()


async def test_a_body_that_raises_closes_everything_and_raises() -> None:
    registry, value = registry_of_one()
    live: list[Value] = []
    with pytest.raises(ZeroDivisionError):
        async with registry.lifespan() as lifespan:
            live.append(lifespan[value])
            raise ZeroDivisionError
    assert live[0].story == ["close", "wait_closed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_an_interrupt_in_the_body_is_delivered_after_the_closing(
    error: type[BaseException],
) -> None:
    registry, value = registry_of_one()
    live: list[Value] = []
    with pytest.raises(error):
        async with registry.lifespan() as lifespan:
            live.append(lifespan[value])
            raise error
    assert live[0].story == ["close", "wait_closed"]


async def test_the_innermost_lifespan_is_found_and_then_the_outer_one_again() -> None:
    registry, value = registry_of_one()
    async with registry.lifespan() as outer:
        async with registry.lifespan() as inner:
            assert value.get() is inner[value] is not outer[value]
        assert value.get() is outer[value]


async def test_code_in_the_loop_but_outside_the_context_finds_the_value() -> None:
    registry, value = registry_of_one()
    lifespan = registry.lifespan()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifespan.__aenter__)
    found: list[Value] = []

    async def elsewhere() -> None:
        found.append(value.get())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(elsewhere)
    assert found == [lifespan[value]]
    await lifespan.__aexit__(None, None, None)


async def test_worker_threads_find_the_value_of_who_started_them() -> None:
    registry, value = registry_of_one()
    async with registry.lifespan() as lifespan:
        assert await anyio.to_thread.run_sync(value.get) is lifespan[value]


async def test_a_thread_of_a_pool_does_not_mean_the_lifespan_of_its_first_use() -> None:
    registry, value = registry_of_one()
    async with registry.lifespan() as lifespan:
        async with registry.lifespan():
            first_use = copy_context()  # which Python gives each thread, where threads inherit contexts
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(first_use.run, value.get)
            assert asked.result(10) is lifespan[value]


async def test_another_loop_is_told_where_the_value_is_open() -> None:
    registry, value = registry_of_one()

    def in_another_loop() -> None:
        async def main() -> None:
            with pytest.raises(WrongLoopError, match=r"test_running\.py") as caught:
                value.get()
            assert caught.value.resource == "value"
            with pytest.raises(WrongLoopError):
                lifespan[value]

        asyncio.run(main())

    async with registry.lifespan() as lifespan:
        await anyio.to_thread.run_sync(in_another_loop)


async def test_a_resource_being_opened_may_ask_for_those_that_are_open() -> None:
    registry, value = registry_of_one()

    @registry.resource(after=[value])
    async def follower() -> list[Value]:
        return [value.get()]

    async with registry.lifespan() as lifespan:
        assert lifespan[follower] == [lifespan[value]]


@on_asyncio
async def test_a_child_that_dies_in_a_task_group_of_a_factory_comes_out_at_the_closing() -> None:
    registry = Registry()
    died = anyio.Event()

    @registry.resource
    async def worker() -> AsyncGenerator[None]:
        async def child() -> None:
            died.set()
            raise ZeroDivisionError

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(child())
            yield

    with pytest.raises(ExceptionGroup) as caught:
        async with registry.lifespan():
            await died.wait()
            await checkpoint()
    assert caught.group_contains(ZeroDivisionError)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_ends_under_an_open_lifespan_closes_it(backend: str) -> None:
    registry, value = registry_of_one()
    live: list[Value] = []

    async def main() -> None:
        lifespan = registry.lifespan()
        await lifespan.__aenter__()
        live.append(lifespan[value])

    anyio.run(main, backend=backend)
    assert live.pop().story == ["close", "wait_closed"]
    assert not registry.running


def test_a_loop_that_is_closed_under_an_open_lifespan_lets_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # what other tests have left
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    registry, value = registry_of_one()
    loop = asyncio.new_event_loop()
    lifespan = registry.lifespan()
    loop.run_until_complete(lifespan.__aenter__())
    lifespan[value]
    loop.close()
    del lifespan
    registry.running.clear()
    logging.disable()  # asyncio says that the tasks were pending, and is right
    gc.collect()
    logging.disable(logging.NOTSET)
    assert unraisable == []


async def test_leaving_a_lifespan_in_another_loop_is_refused() -> None:
    registry, _ = registry_of_one()

    def leave_in_another_loop() -> None:
        async def main() -> None:
            with pytest.raises(WrongLoopError):
                await lifespan.__aexit__(None, None, None)

        asyncio.run(main())

    async with registry.lifespan() as lifespan:
        await anyio.to_thread.run_sync(leave_in_another_loop)


@on_asyncio
async def test_cancelling_every_task_there_is_skips_no_closing() -> None:
    log: list[str] = []
    registry, value = registry_of_one(on_event=note_in(log))
    live: list[Value] = []
    others = asyncio.all_tasks()

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            live.append(lifespan[value])
            await asyncio.sleep(60)

    task = asyncio.create_task(main())
    while not live:
        await checkpoint()
    for each in asyncio.all_tasks() - others:
        each.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert live[0].story == ["close", "wait_closed"]
    assert log.count("Closed") == 1


@on_asyncio
async def test_a_cancelled_start_is_not_hidden_from_asyncio_timeout() -> None:
    registry = Registry()

    @registry.resource
    async def never() -> None:
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            async with registry.lifespan():
                raise AssertionError("it can't have started")


async def test_move_on_after_around_a_lifespan_closes_and_moves_on() -> None:
    registry, value = registry_of_one()
    live: list[Value] = []
    with CancelScope() as scope:
        async with registry.lifespan() as lifespan:
            live.append(lifespan[value])
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert live[0].story == ["close", "wait_closed"]


async def test_an_empty_registry_starts_and_stops() -> None:
    log: list[str] = []
    async with Registry(on_event=note_in(log)).lifespan():
        assert log == ["Started"]
    assert log == ["Started", "Stopping", "Stopped"]


def test_two_threads_run_one_registry_in_two_loops_at_once() -> None:
    registry, value = registry_of_one()
    both_open = threading.Barrier(2, timeout=60)
    seen: list[Value] = []

    async def main() -> None:
        for _ in range(20):
            async with registry.lifespan() as lifespan:
                await anyio.to_thread.run_sync(both_open.wait)
                assert value.get() is lifespan[value]
                seen.append(value.get())
                await anyio.to_thread.run_sync(both_open.wait)

    def run(backend: str) -> None:
        anyio.run(main, backend=backend)

    threads = [threading.Thread(target=run, args=[backend]) for backend in ("asyncio", "trio")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({id(live) for live in seen}) == len(seen) == 40
    assert all(live.story == ["close", "wait_closed"] for live in seen)
    assert not registry.running


@pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop", marks=pytest.mark.long),
        pytest.param("trio", marks=pytest.mark.long),
    ],
)
async def test_two_thousand_lifespans_leak_no_task_descriptor_or_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, value = registry_of_one()

    @registry.resource(value)
    async def dependent(value: Value) -> AsyncGenerator[Value]:
        async with anyio.create_task_group():
            yield value

    @registry.resource(dependent)
    def failing(dependent: Value) -> None:
        if fail:
            raise ZeroDivisionError

    fail = False

    async def cycle(times: int) -> None:
        nonlocal fail
        for turn in range(times):
            fail = turn % 10 == 9
            try:
                async with registry.lifespan():
                    pass
            except StartupError:
                assert fail
        gc.collect()

    monkeypatch.setattr(events.logger, "disabled", True)  # pytest keeps every line
    await cycle(50)
    process, tasks = psutil.Process(), tasks_alive()
    descriptors, threads, objects = process.num_fds(), process.num_threads(), len(gc.get_objects())
    await cycle(2000)
    assert len(gc.get_objects()) - objects < 500  # a leak of one object a lifespan would be 2000
    assert process.num_fds() == descriptors
    assert process.num_threads() <= threads
    assert tasks_alive() == tasks
    assert not registry.running


async def test_the_story_is_the_same_every_time() -> None:
    stories: set[tuple[str, ...]] = set()
    for _ in range(20):
        log: list[str] = []

        def note(event: events.Event, log: list[str] = log) -> None:
            log.append(f"{type(event).__name__} {getattr(event, 'resource', '')}")

        def leaf(*_: Value) -> Value:
            return Value()

        registry = Registry(on_event=note)
        roots = [registry.resource(name=f"root{index}")(Value) for index in range(5)]
        for index, root in enumerate(roots):
            registry.resource(root, roots[0], name=f"leaf{index}")(leaf)
        async with registry.lifespan():
            pass
        stories.add(tuple(log))
    assert len(stories) == 1


# -- a handle is not the value ---------------------------------------------------------------------


async def entered(handle: Any) -> None:
    async with handle:
        pass


def entered_sync(handle: Any) -> None:
    with handle:
        pass


USES: list[tuple[Callable[[Any], object], str]] = [
    (lambda handle: handle.connect(), "value.get().connect"),
    (lambda handle: handle.acquire, "value.get().acquire"),
    (lambda handle: handle.get("key"), "value.get().get(…)"),
    (lambda handle: handle["key"], "value.get()[…]"),
    (list, "value.get()[…]"),
    (entered_sync, "with value.get()"),
    (lambda handle: entered(handle).send(None), "async with value.get()"),
]


@pytest.mark.parametrize(("use", "line"), USES)
def test_a_handle_used_as_its_value_is_told_how_to_take_that(
    use: Callable[[Any], object], line: str
) -> None:
    _, value = registry_of_one()
    with pytest.raises((AttributeError, TypeError)) as caught:
        use(value)
    text = str(caught.value)
    assert text.startswith(f"value ({value.location}) is a handle, not the value")
    assert f"`{line}`" in text
    assert "Depends(value)" in text
    assert "lifespan[value]" in text


def test_code_that_looks_at_a_handle_finds_an_ordinary_object() -> None:
    _, value = registry_of_one()
    for name in ("connect", "__enter__", "__aenter__", "__getitem__", "__origin__"):
        assert not hasattr(value, name)
    assert inspect.iscoroutinefunction(inspect.unwrap(value))  # which is all that FastAPI asks of it
    assert not inspect.isawaitable(value)
    assert not isinstance(value, Iterable)
    assert dict(inspect.getmembers(value))["name"] == "value"
    assert copy.copy(value) is copy.deepcopy(value) is value
    with pytest.raises(AttributeError):
        getattr(object.__new__(type(value)), "name")  # noqa: B009
    assert create_autospec(value).get is not None
    assert isinstance(value.get, MethodType)


def test_the_annotations_of_a_handle_can_be_resolved() -> None:
    """As taskiq and Litestar do; `import lifekit` alone imports no framework for it."""
    _, value = registry_of_one()
    for call in (type(value).__call__, value.__call__):
        assert HTTPConnection in get_args(get_type_hints(call)["connection"])
        assert HTTPConnection in get_args(
            inspect.signature(call, eval_str=True).parameters["connection"].annotation
        )
    [parameter] = inspect.signature(value, eval_str=True).parameters.values()
    assert parameter.annotation is HTTPConnection
    assert parameter.default is None  # for injectors that know no requests, such as FastStream's
    assert not inspect.signature(value.get).parameters


async def test_an_injector_that_knows_no_requests_calls_a_handle_with_nothing() -> None:
    registry, value = registry_of_one()
    bare: Callable[[], Awaitable[Value]] = cast(Any, value)
    with pytest.raises(NotOpenError):
        await bare()
    async with registry.lifespan() as lifespan:
        assert await bare() is lifespan[value]
