"""How a value is closed: the first rule that fits it, once, and what comes when that fails."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from itertools import combinations
from typing import Any, Self

import anyio
import pytest
from anyio.lowlevel import checkpoint

from lifekit import Driver, LifekitError, Registry, ShutdownError, StartupError, drivers, events

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
    value = await opened_and_closed(
        Driven, wait_closed=lambda value: value.note("waited"), close=lambda value: value.note("closed")
    )
    assert value.log == [*OPENED_BY_DRIVER, "closed", "waited"]


async def test_a_declared_terminate_alone_leaves_the_closing_to_the_rules() -> None:
    def make() -> Driven:
        value = Driven()
        value.fails = ("driver close",)
        return value

    assert (await opened_and_closed(Driven, terminate="no matter")).log == []
    raise AssertionError(make)


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


async def test_a_stream_is_closed_by_its_aclose() -> None:
    closed: list[str] = []

    class Stream(anyio.streams.memory.MemoryObjectSendStream[int]):
        async def aclose(self) -> None:
            closed.append("aclose")
            await super().aclose()

    send, receive = anyio.create_memory_object_stream[int]()
    await opened_and_closed(lambda: Stream(send._state))  # pyright: ignore[reportPrivateUsage]
    assert closed == ["aclose"]
    send.close()
    receive.close()


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


class SlottedInventor(Inventor):
    """The same, with no dict of its own."""

    __slots__ = ()


@pytest.mark.parametrize("kind", [Inventor, SlottedInventor])
async def test_an_object_that_invents_attributes_is_not_closed_by_one(kind: type[Inventor]) -> None:
    assert isinstance(await opened_and_closed(kind), kind)


@pytest.mark.parametrize("kind", [kind for kind, _ in RULES])
async def test_a_class_that_is_itself_the_value_is_left_alone(kind: type[Value]) -> None:
    assert await opened_and_closed(lambda: kind) is kind


@pytest.mark.parametrize("value", [None, 0, "text", b"", [1], {"close": 1}, len, asyncio])
async def test_what_has_no_closing_is_left_alone(value: object) -> None:
    assert await opened_and_closed(lambda: value) is value


# -- drivers ---------------------------------------------------------------------------------------


class Derived(Driven):
    """A value whose nearest base with a driver is `Driven`, and then itself."""


async def test_the_driver_of_the_nearest_base_decides() -> None:
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
    value = await opened_and_closed(Driven, check=lambda value: value.note("declared check"))
    assert value.log == ["driver open", "declared check", "driver close", "driver wait_closed"]


async def test_what_its_driver_fails_to_open_is_terminated_and_not_closed() -> None:
    values: list[Driven] = []

    def make() -> Driven:
        values.append(Driven())
        values[0].fails = ("driver open",)
        return values[0]

    with pytest.raises(StartupError):
        await opened_and_closed(make)
    assert values[0].log == ["driver open", "driver terminate"]


async def test_what_fails_its_check_is_closed() -> None:
    values: list[Driven] = []

    def make() -> Driven:
        values.append(Driven())
        values[0].fails = ("driver check",)
        return values[0]

    with pytest.raises(StartupError):
        await opened_and_closed(make)
    assert values[0].log == [*OPENED_BY_DRIVER, "driver close", "driver wait_closed"]
