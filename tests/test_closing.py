"""How a value is closed: the first rule that fits it, once, and what comes when that fails."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from itertools import combinations
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, Self, cast

import anyio
import pytest
import sqlalchemy
from anyio.lowlevel import checkpoint

from lifekit import CrashError, Driver, Registry, ShutdownError, StartupError, drivers, events
from lifekit._core.value import reached_in

from .virtual_time import run

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)


class Value:
    """Notes what is called on it; what else it can do, its mixins say."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails: tuple[str, ...] = ()

    def note(self, what: str) -> None:
        """Note a call, and fail if it is one of those that fail."""
        self.log.append(what)
        if what in self.fails:
            raise ZeroDivisionError(what)


class Driven(Value):
    """A value whose type has a driver."""


class WithCloseAndWait(Value):
    """A value that is closed in two phases."""

    def close(self) -> None:
        self.note("close")

    async def wait_closed(self) -> None:
        await checkpoint()
        self.note("wait_closed")


class WithAclose(Value):
    """A value with an aclose."""

    async def aclose(self) -> None:
        await checkpoint()
        self.note("aclose")


class AsyncEntered(Value):
    """A value that is an async context manager."""

    async def __aenter__(self) -> Self:
        await checkpoint()
        self.note("aenter")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await checkpoint()
        self.note(f"aexit {exc}")


class WithClose(Value):
    """A value with a close."""

    def close(self) -> None:
        self.note("close")


class Entered(Value):
    """A value that is a context manager."""

    def __enter__(self) -> Self:
        self.note("enter")
        return self

    def __exit__(self, *exc: object) -> None:
        self.note(f"exit {exc}")


class WithDispose(Value):
    """A value that is closed by another name."""

    def dispose(self) -> None:
        self.note("dispose")


class WithTerminate(Value):
    """A value that can be cut off."""

    async def terminate(self) -> None:
        await checkpoint()
        self.note("terminate")


class NotingDriver(Driver[Driven]):
    """A driver that calls nothing on its values."""

    async def open(self, value: Driven) -> Driven:
        value.note("driver open")
        return value

    async def check(self, value: Driven) -> None:
        value.note("driver check")

    def close(self, value: Driven) -> None:
        value.note("driver close")

    def wait_closed(self, value: Driven) -> Awaitable[object]:
        async def wait() -> None:
            await checkpoint()
            value.note("driver wait_closed")

        return wait()

    def terminate(self, value: Driven) -> None:
        value.note("driver terminate")

    def describe(self, value: Driven) -> str:
        return "a driven value"


drivers.register(Driven, NotingDriver())

LEFT = (None, None, None)
OPENED_BY_DRIVER = ["driver open", "driver check"]
RULES: list[tuple[type[Value], list[str]]] = [  # in the order in which they win
    (Driven, [*OPENED_BY_DRIVER, "driver close", "driver wait_closed"]),
    (WithCloseAndWait, ["close", "wait_closed"]),
    (WithAclose, ["aclose"]),
    (AsyncEntered, ["aenter", f"aexit {LEFT}"]),
    (WithClose, ["close"]),
    (Entered, ["enter", f"exit {LEFT}"]),
    (WithDispose, ["dispose"]),
    (Value, []),
]


async def opened_and_closed(make: Callable[[], Any], **options: Any) -> Any:
    """Open what *make* returns, close it, and return it."""
    registry = Registry()
    handle = registry.resource(name="value", **options)(make)
    async with registry.lifespan() as lifespan:
        return lifespan[handle]


async def failures_of(make: Callable[[], Any], **options: Any) -> list[str]:
    """Open what *make* returns, and return the texts of what its closing failed with."""
    with pytest.raises(ShutdownError) as caught:
        await opened_and_closed(make, **options)
    return [str(error) for _, error in caught.value.failures]


def failing(kind: type[Value], *fails: str) -> Value:
    """Return a value of *kind* on which the calls named in *fails* fail."""
    value = kind()
    value.fails = fails
    return value


def kind_of(*abilities: type[Value]) -> type[Value]:
    """Return a class that has all of *abilities*."""
    # One that another one implies by inheritance would have no place of its own.
    bases = [each for each in abilities if each is not Value]
    return type("Kind", tuple(bases) or (Value,), {})


# -- the first rule that fits ----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "story"), RULES)
async def test_each_rule_alone(kind: type[Value], story: list[str]) -> None:
    assert (await opened_and_closed(kind)).log == story


@pytest.mark.parametrize(
    ("winner", "story", "loser"),
    [(*winner, loser) for winner, (loser, _) in combinations(RULES, 2)],
)
async def test_the_earlier_rule_wins_over_the_later_one(
    winner: type[Value], story: list[str], loser: type[Value]
) -> None:
    assert (await opened_and_closed(kind_of(winner, loser))).log == story


async def note_declared(value: Value) -> None:
    """A declared step that is async."""
    await checkpoint()
    value.note("declared")


def note_waited(value: Value) -> None:
    """A declared step that is sync."""
    value.note("waited")


class Declared(Value):
    """A value with methods that no rule knows."""

    def shut(self) -> None:
        self.note("declared")

    async def shut_later(self) -> None:
        await checkpoint()
        self.note("declared")


@pytest.mark.parametrize("step", ["close", "wait_closed"])
@pytest.mark.parametrize("how", ["shut", "shut_later", Declared.shut, note_declared])
@pytest.mark.parametrize(
    ("rule", "opening"),
    [
        (Driven, OPENED_BY_DRIVER),
        (WithCloseAndWait, []),
        (WithAclose, []),
        (AsyncEntered, []),
        (WithClose, []),
        (Entered, []),
        (Value, []),
    ],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_declared_step_wins_over_every_rule(
    rule: type[Value], opening: list[str], how: Any, step: str
) -> None:
    value = await opened_and_closed(kind_of(Declared, rule), **{step: how})
    assert value.log == [*opening, "declared"]


async def test_declared_close_and_wait_closed_run_in_this_order() -> None:
    value = await opened_and_closed(Driven, wait_closed=note_waited, close=note_declared)
    assert value.log == [*OPENED_BY_DRIVER, "declared", "waited"]


# -- values of real libraries ----------------------------------------------------------------------


@on_asyncio
async def test_a_server_is_closed_in_two_phases_and_not_entered() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0)

    server: asyncio.Server = await opened_and_closed(listen)
    assert not server.is_serving()
    assert not server.sockets


async def test_a_connection_whose_context_is_a_transaction_is_closed_and_not_entered() -> None:
    connection: sqlite3.Connection = await opened_and_closed(lambda: sqlite3.connect(":memory:"))
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


# -- where the closing is looked for ---------------------------------------------------------------


async def test_a_close_of_the_instance_alone_counts() -> None:
    def make() -> Value:
        value: Any = Value()
        value.close = lambda: value.note("own close")
        return value  # type: ignore[no-any-return]

    assert (await opened_and_closed(make)).log == ["own close"]


class Inventor:
    """Has every attribute that is asked for."""

    def __getattr__(self, name: str) -> Any:
        def invented(*args: object) -> None:
            raise AssertionError(f"{name} was called")

        return invented


class SlottedInventor:
    """The same, with no dict of its own."""

    __slots__ = ()
    __getattr__ = Inventor.__getattr__


@pytest.mark.parametrize("kind", [Inventor, SlottedInventor])
async def test_an_object_that_invents_attributes_is_not_closed_by_one(kind: type[Any]) -> None:
    assert isinstance(await opened_and_closed(kind), kind)


@pytest.mark.parametrize("kind", [kind for kind, _ in RULES])
async def test_a_class_that_is_itself_the_value_is_left_alone(kind: type[Value]) -> None:
    assert await opened_and_closed(lambda: kind) is kind


@pytest.mark.parametrize("value", [None, 0, "text", b"", [1], {"close": 1}, len, asyncio])
async def test_what_has_no_closing_is_left_alone(value: object) -> None:
    assert await opened_and_closed(lambda: value) is value


# -- drivers ---------------------------------------------------------------------------------------


async def test_the_driver_of_the_nearest_base_decides() -> None:
    class Derived(Driven): ...

    class Nearer(NotingDriver):
        def close(self, value: Driven) -> None:
            value.note("nearer close")

    assert drivers.find(Derived()) is drivers.find(Driven())
    drivers.register(Derived, Nearer())
    assert (await opened_and_closed(Derived)).log == (
        [*OPENED_BY_DRIVER, "nearer close", "driver wait_closed"]
    )
    assert "nearer close" not in (await opened_and_closed(Driven)).log


async def test_a_driver_may_open_another_value_than_it_was_given() -> None:
    class Plan(Value): ...

    class Open(Value): ...

    class Opening(Driver[Any]):
        async def open(self, value: Any) -> Any:
            opened = Open()
            opened.log = value.log
            return opened

        def close(self, value: Any) -> None:
            value.note(f"close {type(value).__name__}")

    drivers.register(Plan, Opening())
    value = await opened_and_closed(Plan)
    assert isinstance(value, Open)
    assert value.log == ["close Open"]


async def test_a_declared_check_stands_in_for_the_drivers() -> None:
    value = await opened_and_closed(Driven, check=note_declared)
    assert value.log == ["driver open", "declared", "driver close", "driver wait_closed"]


async def test_what_its_driver_fails_to_open_is_terminated_and_not_closed() -> None:
    value = failing(Driven, "driver open")
    with pytest.raises(StartupError):
        await opened_and_closed(lambda: value)
    assert value.log == ["driver open", "driver terminate"]


async def test_what_fails_its_check_is_closed() -> None:
    value = failing(Driven, "driver check")
    with pytest.raises(StartupError):
        await opened_and_closed(lambda: value)
    assert value.log == [*OPENED_BY_DRIVER, "driver close", "driver wait_closed"]


# -- what comes when a closing fails ---------------------------------------------------------------


class WithAll(WithCloseAndWait, WithTerminate):
    """A value that is closed in two phases and can be cut off."""


@pytest.mark.parametrize(
    ("kind", "fails", "story"),
    [
        (WithAll, [], ["close", "wait_closed"]),
        (WithAll, ["close"], ["close", "terminate"]),
        (WithAll, ["wait_closed"], ["close", "wait_closed", "terminate"]),
        (WithAll, ["close", "terminate"], ["close", "terminate"]),
        (WithCloseAndWait, ["close"], ["close"]),
        (WithCloseAndWait, ["wait_closed"], ["close", "wait_closed"]),
        (kind_of(WithAclose, WithTerminate), ["aclose"], ["aclose", "terminate"]),
        (Driven, ["driver close"], [*OPENED_BY_DRIVER, "driver close", "driver terminate"]),
        (
            Driven,
            ["driver wait_closed"],
            [*OPENED_BY_DRIVER, "driver close", "driver wait_closed", "driver terminate"],
        ),
    ],
)
async def test_after_a_failed_step_only_terminate_is_called_and_all_failures_come_out(
    kind: type[Value], fails: list[str], story: list[str]
) -> None:
    value = failing(kind, *fails)
    if fails:
        assert await failures_of(lambda: value) == fails
    else:
        await opened_and_closed(lambda: value)
    assert value.log == story


@pytest.mark.parametrize("how", ["shut", "shut_later", Declared.shut, note_declared])
@pytest.mark.parametrize("kind", [Declared, kind_of(Declared, WithTerminate)])
async def test_a_declared_terminate_wins_over_the_values_own(kind: type[Value], how: Any) -> None:
    value = failing(kind_of(kind, WithClose), "close")
    assert await failures_of(lambda: value, terminate=how) == ["close"]
    assert value.log == ["close", "declared"]


async def test_a_declared_terminate_wins_over_the_drivers_and_leaves_its_closing() -> None:
    value = failing(Driven, "driver close")
    assert await failures_of(lambda: value, terminate=note_declared) == ["driver close"]
    assert value.log == [*OPENED_BY_DRIVER, "driver close", "declared"]


async def test_a_declared_close_that_fails_leaves_the_terminate_to_the_rules() -> None:
    value = failing(kind_of(Declared, WithAll), "declared")
    failures = await failures_of(lambda: value, close="shut", wait_closed="wait_closed")
    assert failures == ["declared"]
    assert value.log == ["declared", "terminate"]


async def test_a_failed_closing_names_its_phase_and_the_closing_before_it_goes_on() -> None:
    heard: list[tuple[str, ...]] = []

    def hear(event: events.Event) -> None:
        if isinstance(event, events.CloseFailed):
            heard.append((event.resource, event.phase))
        elif isinstance(event, events.Terminated):
            heard.append((event.resource, "terminated"))
        elif isinstance(event, events.Closed):
            heard.append((event.resource, "clean" if event.clean else "not clean"))

    registry = Registry(on_event=hear)
    below, above = failing(WithAll, "wait_closed", "terminate"), failing(WithAll, "close")
    base = registry.resource(name="below")(lambda: below)
    registry.resource(name="above", after=[base])(lambda: above)
    with pytest.raises(ShutdownError) as caught:
        async with registry.lifespan():
            pass
    assert heard == [
        ("above", "close"),
        ("above", "terminated"),
        ("above", "not clean"),
        ("below", "wait_closed"),
        ("below", "terminated"),
        ("below", "terminate"),
        ("below", "not clean"),
    ]
    assert [name for name, _ in caught.value.failures] == ["above", "below", "below"]
    assert (below.log, above.log) == (
        ["close", "wait_closed", "terminate"],
        ["close", "terminate"],
    )


async def test_a_value_with_a_terminate_alone_is_not_cut_off_at_an_ordinary_end() -> None:
    with pytest.warns(RuntimeWarning, match=r"would stay open .* which has terminate\(\)"):
        assert (await opened_and_closed(WithTerminate)).log == []


# -- what is open already, or closed by another name -----------------------------------------------


def as_found_open(value: Value) -> Callable[[], Any]:
    """Return an async factory that returns *value*."""

    async def factory() -> Value:
        await checkpoint()
        return value

    return factory


class Shutdown(Value):
    """A value that is closed by a shutdown that takes options."""

    async def shutdown(self, *, wait: bool = True) -> None:
        await checkpoint()
        self.note(f"shutdown {wait}")


class Stop(Value):
    """A value whose stop has to be told how long it may take."""

    async def stop(self, grace: float) -> None:
        await checkpoint()
        self.note(f"stop {grace}")


class StartedByEntering(Value):
    """A broker: entering it starts it, and returns nothing."""

    async def __aenter__(self) -> None:
        self.note("started")

    async def __aexit__(self, *exc: object) -> None:
        self.note("left")


@pytest.mark.parametrize(
    ("kind", "story"),
    [
        (Shutdown, ["shutdown True"]),
        (Stop, ["stop 2.0"]),
        (AsyncEntered, [f"aexit {LEFT}"]),
        (Entered, [f"exit {LEFT}"]),
        (kind_of(AsyncEntered, Shutdown), ["shutdown True"]),
        (kind_of(AsyncEntered, WithClose), ["close"]),
        (StartedByEntering, ["left"]),
    ],
)
async def test_what_an_async_function_returns_is_open_already(
    kind: type[Value], story: list[str]
) -> None:
    value = kind()
    assert await opened_and_closed(as_found_open(value), close_timeout=4) is value
    assert value.log == story


@pytest.mark.parametrize("kind", [Shutdown, Stop])
async def test_other_names_of_a_closing_count_where_nothing_else_does(kind: type[Value]) -> None:
    assert len((await opened_and_closed(kind)).log) == 1
    assert (await opened_and_closed(kind_of(WithClose, kind))).log == ["close"]


async def test_a_value_that_is_entered_and_gives_nothing_is_the_value() -> None:
    value = StartedByEntering()
    assert await opened_and_closed(lambda: value) is value
    assert value.log == ["started", "left"]


async def test_a_value_passed_on_is_closed_by_the_resource_that_it_came_from() -> None:
    registry = Registry()
    first = registry.resource(name="first")(WithCloseAndWait)
    registry.resource(first, name="alias")(lambda value: value)
    registry.resource(first, name="both")(lambda value: [value])
    async with registry.lifespan() as lifespan:
        value = lifespan[first]
    assert value.log == ["close", "wait_closed"]


@on_asyncio
async def test_a_task_is_cancelled_and_waited_for() -> None:
    log: list[str] = []

    async def poll() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await checkpoint()
            log.append("ended")

    async def start() -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(poll())
        await checkpoint()
        return task

    task = await opened_and_closed(start)
    assert (task.cancelled(), log) == (True, ["ended"])


@on_asyncio
async def test_a_task_that_failed_while_it_was_open_is_told_of_at_the_end() -> None:
    async def fail() -> None:
        raise ZeroDivisionError("poller")

    async def start() -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(fail())

    assert await failures_of(start) == ["poller"]


async def test_an_engine_of_sync_sqlalchemy_is_disposed() -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    pool = engine.pool
    assert await opened_and_closed(lambda: engine) is engine
    assert engine.pool is not pool


@on_asyncio
@pytest.mark.parametrize("make", [asyncio.Lock, asyncio.Condition, threading.Lock, anyio.Lock])
async def test_a_lock_is_not_taken(make: Callable[[], Any]) -> None:
    registry = Registry()
    handle = registry.resource(name="lock")(make)
    async with registry.lifespan() as lifespan:
        locked = lifespan[handle].locked
        assert not (locked() if callable(locked) else locked)


@pytest.mark.parametrize("value", [Path("file"), SimpleNamespace(shutdown=None)])
async def test_a_path_is_not_entered_and_an_attribute_is_no_method(value: object) -> None:
    assert await opened_and_closed(lambda: value) is value


@on_asyncio
async def test_the_event_loop_is_left_to_whoever_runs_it() -> None:
    loop = asyncio.get_running_loop()
    assert await opened_and_closed(lambda: loop) is loop
    assert await opened_and_closed(lambda: {"loop": loop}) == {"loop": loop}


async def test_what_a_module_has_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(logging, "shutdown", lambda: called.append(1))
    assert await opened_and_closed(lambda: logging) is logging
    assert not called


class StopsWith(Value):
    """A value whose stop wants what nobody knows."""

    def stop(self, reason: str) -> None: ...


class Process(Value):
    """A value that can be killed, and not closed."""

    def kill(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (StopsWith, r"a StopsWith, which has stop\(\)"),
        (Process, r"a Process, which has kill\(\)"),
        (lambda: [1, WithClose()], "the WithClose in a list"),
        (lambda: {"a": AsyncEntered(), "b": Driven()}, "the Driven in a dict"),
    ],
)
async def test_what_would_stay_open_is_told_of_as_it_opens(make: Callable[[], Any], what: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"value \(.*test_closing\.py:\d+.*{what}.*close=lambda"):
        await opened_and_closed(make)
    await opened_and_closed(make, close=note_nothing)


def note_nothing(value: object) -> None: ...


# -- generators and context managers carry their own closing ---------------------------------------


def as_generator(value: Value) -> Callable[[], Any]:
    """Return a factory that yields *value*."""

    def factory() -> Generator[Value]:
        yield value
        value.note("end")

    return factory


def as_async_generator(value: Value) -> Callable[[], Any]:
    """Return an async factory that yields *value*."""

    async def factory() -> AsyncGenerator[Value]:
        yield value
        await checkpoint()
        value.note("end")

    return factory


def as_manager(value: Value) -> Callable[[], Any]:
    """Return a factory that returns a context manager around *value*."""
    return contextmanager(as_generator(value))


def as_async_manager(value: Value) -> Callable[[], Any]:
    """Return a factory that returns an async context manager around *value*."""
    return asynccontextmanager(as_async_generator(value))


def as_manager_later(value: Value) -> Callable[[], Any]:
    """Return an async factory that returns an async context manager around *value*."""

    async def factory() -> Any:
        return as_async_manager(value)()

    return factory


def as_object(value: Value) -> Callable[[], Any]:
    """Return a factory that returns an object of a class with ``__aenter__``."""

    class Manager:
        async def __aenter__(self) -> Value:
            await checkpoint()
            return value

        async def __aexit__(self, *exc: object) -> None:
            await checkpoint()
            assert exc == LEFT
            value.note("end")

    return Manager


CARRIERS = [as_generator, as_async_generator, as_manager, as_async_manager, as_manager_later]
carried = pytest.mark.parametrize("carry", CARRIERS)


@pytest.mark.parametrize("carry", [*CARRIERS, as_object])
async def test_what_is_yielded_or_entered_is_the_value_and_its_end_the_closing(carry: Any) -> None:
    value = kind_of(WithCloseAndWait, WithAclose, AsyncEntered, WithTerminate)()
    assert await opened_and_closed(carry(value)) is value
    assert value.log == ["end"]


@pytest.mark.parametrize("carry", [*CARRIERS, as_object])
async def test_a_driven_value_that_is_yielded_is_checked_and_not_closed_by_its_driver(
    carry: Any,
) -> None:
    value = Driven()
    await opened_and_closed(carry(value))
    assert value.log == ["driver check", "end"]


@carried
@pytest.mark.parametrize("how", ["shut", "shut_later", note_declared])
async def test_a_declared_close_runs_before_the_end(carry: Any, how: Any) -> None:
    value = Declared()
    await opened_and_closed(carry(value), close=how)
    assert value.log == ["declared", "end"]


@carried
async def test_the_end_comes_also_after_a_declared_close_that_failed(carry: Any) -> None:
    value = failing(kind_of(Declared, WithTerminate), "declared")
    failures = await failures_of(carry(value), close="shut", wait_closed=note_waited)
    assert failures == ["declared"]
    assert value.log == ["declared", "end", "terminate"]


@carried
async def test_an_end_that_fails_is_followed_by_the_terminate(carry: Any) -> None:
    value = failing(WithTerminate, "end")
    assert await failures_of(carry(value)) == ["end"]
    assert value.log == ["end", "terminate"]


@carried
async def test_the_end_comes_also_when_the_check_fails(carry: Any) -> None:
    value = failing(Driven, "driver check")
    with pytest.raises(StartupError):
        await opened_and_closed(carry(value))
    assert value.log == ["driver check", "end"]


async def test_closing_and_aclosing_of_the_standard_library_do_what_they_say() -> None:
    with_close, with_aclose = WithClose(), WithAclose()
    assert await opened_and_closed(lambda: closing(with_close)) is with_close
    assert await opened_and_closed(lambda: aclosing(with_aclose)) is with_aclose
    assert (with_close.log, with_aclose.log) == (["close"], ["aclose"])


async def test_an_iterator_that_is_no_generator_is_a_value() -> None:
    iterator: Iterator[int] = iter([1, 2])
    assert await opened_and_closed(lambda: iterator) is iterator
    assert list(iterator) == [1, 2]


# -- scopes held open across the yield -------------------------------------------------------------


def held_open(scope: Callable[[], Any], log: list[int]) -> Callable[[], AsyncGenerator[Any]]:
    """Return a factory that yields inside of *scope*, and notes the tasks it runs in."""

    async def factory() -> AsyncGenerator[Any]:
        log.append(anyio.get_current_task().id)
        async with scope() as held:
            yield held
            await checkpoint()
            log.append(anyio.get_current_task().id)
        log.append(anyio.get_current_task().id)

    return factory


@asynccontextmanager
async def cancel_scope() -> AsyncGenerator[anyio.CancelScope]:
    with anyio.CancelScope() as scope:
        yield scope


@asynccontextmanager
async def fail_after() -> AsyncGenerator[anyio.CancelScope]:
    with anyio.fail_after(60) as scope:
        yield scope


async def check_that_it_holds(scope: Callable[[], Any]) -> None:
    log: list[int] = []
    registry = Registry()
    inner = registry.resource(name="inner")(held_open(scope, log))
    registry.resource(name="outer", after=[inner])(held_open(scope, log))
    lifespan = registry.lifespan()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifespan.__aenter__)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifespan.__aexit__, None, None, None)
    first, second = log[:2]
    assert first != second
    assert log == [first, second, second, second, first, first]


@pytest.mark.parametrize("scope", [anyio.create_task_group, cancel_scope, fail_after])
async def test_a_scope_held_open_across_the_yield_is_left_in_its_task(
    scope: Callable[[], Any],
) -> None:
    await check_that_it_holds(scope)


@on_asyncio
@pytest.mark.parametrize("scope", [asyncio.TaskGroup, lambda: asyncio.timeout(60)])
async def test_a_scope_of_asyncio_held_open_across_the_yield_is_left_in_its_task(
    scope: Callable[[], Any],
) -> None:
    await check_that_it_holds(scope)


async def test_children_of_a_held_task_group_run_as_long_as_the_lifespan() -> None:
    registry = Registry()
    ticked, stop = anyio.Event(), anyio.Event()
    log: list[str] = []

    @registry.resource
    async def worker() -> AsyncGenerator[None]:
        async def child() -> None:
            await checkpoint()
            ticked.set()
            await stop.wait()
            log.append("child ended")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            yield
            stop.set()
        log.append("group left")

    async with registry.lifespan():
        await ticked.wait()
        assert log == []
    assert log == ["child ended", "group left"]


async def test_a_held_task_group_may_be_cancelled_at_the_end() -> None:
    registry = Registry()

    @registry.resource
    async def worker() -> AsyncGenerator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            yield
            tasks.cancel_scope.cancel()

    async with registry.lifespan():
        pass


async def check_a_failing_child(group: Callable[[], Any], start: str, steps: int = 1) -> None:
    registry = Registry()
    failed = anyio.Event()
    log: list[str] = []
    with_steps = [WithCloseAndWait(), WithCloseAndWait()]

    async def child() -> None:
        for _ in range(steps):
            await checkpoint()
        failed.set()
        raise ZeroDivisionError

    below = registry.resource(name="below")(lambda: with_steps[0])

    @registry.resource(after=[below])
    async def worker() -> AsyncGenerator[None]:
        try:
            async with group() as tasks:
                run_child = getattr(tasks, start)
                run_child(child() if start == "create_task" else child)
                yield
        finally:
            log.append("worker left")
            assert with_steps[0].log == []
            assert with_steps[1].log == ["close", "wait_closed"]

    registry.resource(name="above", after=[worker])(lambda: with_steps[1])
    with pytest.raises(CrashError) as caught:
        async with registry.lifespan():
            await failed.wait()
            await anyio.sleep_forever()
    ((name, failure),) = caught.value.failures
    assert name == "worker"
    assert isinstance(failure, ExceptionGroup)
    assert caught.group_contains(ZeroDivisionError)
    assert log == ["worker left"]
    assert with_steps[0].log == ["close", "wait_closed"]


async def test_a_child_that_fails_is_a_crash_that_ends_the_body_and_all_is_closed_in_order() -> None:
    await check_a_failing_child(anyio.create_task_group, "start_soon")


async def test_a_child_that_fails_as_the_body_begins_ends_it_too() -> None:
    for steps in [*range(1, 5)] * 8:  # trio's tasks run in a random order
        with anyio.fail_after(60):
            await check_a_failing_child(anyio.create_task_group, "start_soon", steps)


@on_asyncio
async def test_a_child_of_asyncio_that_fails_is_a_crash_likewise() -> None:
    await check_a_failing_child(asyncio.TaskGroup, "create_task")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_held_deadline_that_passes_under_the_body_comes_out_at_the_closing(backend: str) -> None:
    log: list[str] = []
    registry = Registry()

    @registry.resource
    async def patient() -> AsyncGenerator[None]:
        with anyio.move_on_after(1):
            yield
            await anyio.sleep_forever()
        await checkpoint()
        log.append("patient left")

    @registry.resource(after=[patient])
    async def strict() -> AsyncGenerator[None]:
        with anyio.fail_after(1):
            yield
            log.append("strict closing")
            await anyio.sleep_forever()

    @registry.resource(after=[strict])
    async def asyncios() -> AsyncGenerator[None]:
        if backend == "asyncio":
            async with asyncio.timeout(1):
                yield
                await checkpoint()  # its cancellation came, and went, before
        else:
            yield
        log.append("asyncios left")

    async def main() -> None:
        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                await anyio.sleep(10)
                log.append("body ended")
        ((name, failure),) = caught.value.failures
        assert (name, type(failure)) == ("strict", TimeoutError)

    run(main, backend)
    assert log == ["body ended", "asyncios left", "strict closing", "patient left"]


@pytest.mark.parametrize(
    ("names", "server"),
    [
        ({"url": f"amqp://a:{'x' * 7}@mq/x?y=1", "host": "localhost", "port": 1}, "amqp://a:***@mq/x"),
        ({"host": "db", "port": 5432}, "db:5432"),
        ({"conninfo": "host=db", "params": {"host": "db", "port": "5432"}}, "db:5432"),
        ({"params": [1], "url": "/relative"}, ""),
    ],
)
def test_what_a_hanging_frame_was_to_reach_is_its_url_before_a_default_host(
    names: dict[str, object], server: str
) -> None:
    frame = SimpleNamespace(f_globals={}, f_locals=names)
    assert reached_in([cast("FrameType", frame)], ()) == server
