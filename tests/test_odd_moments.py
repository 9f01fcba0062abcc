"""What comes at a bad moment, or in a bad shape, hides nothing and hangs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import pickle
import sys
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from anyio import CancelScope

from lifekit import (
    DeadlineError,
    DeclarationError,
    Driver,
    LifekitError,
    NotOpenError,
    Registry,
    ShutdownError,
    StartupError,
)
from lifekit._util import loops as _backend
from lifekit.drivers import register

from . import virtual_time


@pytest.fixture(autouse=True)
def own_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers that a test registers are forgotten after it."""
    monkeypatch.setattr("lifekit._core.drivers._registered", {})


in_virtual_time = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.mark.parametrize("place", [1, 2, 3], ids=["owner", "first", "second"])
def test_a_task_of_lifekits_cancelled_before_its_first_step_hangs_nothing(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    log: list[str] = []

    @registry.resource
    async def first() -> AsyncGenerator[None]:
        yield
        log.append("first closed")

    registry.resource(first, name="second")(lambda _: None)

    made: list[asyncio.Task[Any]] = []

    def spawn(*given: Any) -> object:
        made.append(cast("asyncio.Task[Any]", _backend.spawn(*given)))
        if len(made) == place:
            made[-1].cancel()
        return made[-1]

    monkeypatch.setattr("lifekit._core.engine.spawn", spawn)

    async def main() -> None:
        with pytest.raises(LifekitError):
            async with asyncio.timeout(5), registry.lifespan():
                raise AssertionError("it can't have started")

    asyncio.run(main())
    assert log == (["first closed"] if place == 3 else [])
    assert not registry.running


@in_virtual_time
def test_a_rolled_back_tree_of_task_groups_hides_no_failure(backend: str) -> None:
    async def main() -> None:
        registry = Registry()

        @registry.resource
        async def tree() -> None:
            async with anyio.create_task_group() as outer:
                for _ in range(2):

                    async def branch() -> None:
                        async with anyio.create_task_group() as inner:
                            inner.start_soon(anyio.sleep_forever)
                            inner.start_soon(anyio.sleep_forever)

                    outer.start_soon(branch)

        @registry.resource
        async def failing() -> None:
            await anyio.sleep(1)
            raise ValueError("real")

        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert [str(error) for error in caught.value.exceptions] == ["real"]

    virtual_time.run(main, backend)


class Slow:
    """A value whose driver fails to open it once, and then hangs."""


class SlowDriver(Driver[Slow]):
    """Its driver."""

    def __init__(self) -> None:
        self.attempts = 0

    async def open(self, value: Slow) -> Slow:
        self.attempts += 1
        if self.attempts == 1:
            raise ConnectionRefusedError
        await anyio.sleep_forever()
        return value


@in_virtual_time
def test_a_later_attempt_keeps_to_the_deadline_too(backend: str) -> None:
    async def main() -> None:
        register(Slow, SlowDriver())
        registry = Registry(start_timeout=5)
        registry.resource(retry=3, name="slow")(Slow)
        began = anyio.current_time()
        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        (error,) = caught.value.exceptions
        assert isinstance(error, DeadlineError)
        assert not error.abandoned
        assert anyio.current_time() - began == pytest.approx(5, abs=0.1)

    virtual_time.run(main, backend)


@in_virtual_time
def test_what_was_left_behind_ends_once(backend: str) -> None:
    async def main() -> None:
        log: list[str] = []

        async def deaf(seconds: float) -> None:
            with CancelScope(shield=True):
                await anyio.sleep(seconds)

        class Deaf:
            async def aclose(self) -> None:
                await deaf(100)

        registry = Registry(start_timeout=1, close_timeout=1)

        @registry.resource
        async def parent() -> AsyncGenerator[None]:
            yield
            log.append("parent closed")

        @registry.resource(after=[parent], close_timeout=20)
        async def slow() -> AsyncGenerator[None]:
            yield
            await anyio.sleep(15)
            log.append("slow closed")

        @registry.resource(after=[parent])
        async def late() -> Deaf:
            await deaf(4)
            return Deaf()

        with pytest.raises(StartupError):
            async with registry.lifespan():
                pass
        assert log == ["slow closed", "parent closed"]

    virtual_time.run(main, backend)


@in_virtual_time
def test_an_async_terminate_of_what_was_left_behind_is_waited_for(backend: str) -> None:
    async def main() -> None:
        log: list[str] = []

        class Stuck:
            async def aclose(self) -> None:
                with CancelScope(shield=True):
                    await anyio.sleep(100)

            async def terminate(self) -> None:
                await anyio.sleep(0.5)
                log.append("terminated")

        registry = Registry()
        registry.resource(name="stuck")(Stuck)
        with pytest.raises(ShutdownError):
            async with registry.lifespan():
                pass
        assert log == ["terminated"]

    virtual_time.run(main, backend)


def test_a_sync_factory_that_outlives_its_deadline_fails_and_is_closed() -> None:
    log: list[str] = []

    async def main() -> None:
        registry = Registry(start_timeout=0.05)

        @registry.resource
        def blocking() -> Any:
            time.sleep(0.1)  # the loop stands still; nothing can cut this off
            return SimpleNamespace(close=lambda: log.append("closed"))

        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert isinstance(caught.value.exceptions[0], DeadlineError)

    anyio.run(main)
    assert log == ["closed"]


@in_virtual_time
def test_a_scope_left_open_is_a_failure_of_its_resource_alone(backend: str) -> None:
    async def main() -> None:
        log: list[str] = []
        registry = Registry()

        @registry.resource
        async def parent() -> AsyncGenerator[None]:
            yield
            log.append("parent closed")

        @registry.resource(parent)
        async def careless(parent: None) -> None:
            CancelScope().__enter__()

        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                log.append("body")
        assert caught.value.failures[0][0] == "careless"
        assert log == ["body", "parent closed"]

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_dead_task_group_that_was_entered_by_hand_is_waited_out_without_spinning(
    backend: str,
) -> None:
    async def main() -> None:
        class Workers:
            async def start(self) -> Workers:
                self.tasks = await anyio.create_task_group().__aenter__()
                self.tasks.start_soon(self.die)
                return self

            async def die(self) -> None:
                raise ValueError("worker")

            async def aclose(self) -> None:
                await self.tasks.__aexit__(None, None, None)

        registry = Registry()
        registry.resource(name="workers")(lambda: Workers().start())
        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                began = time.process_time()
                await anyio.sleep(1)
                assert time.process_time() - began < 0.5
        assert isinstance(caught.value.exceptions[0], ExceptionGroup)

    virtual_time.run(main, backend)


class Odd(Exception):
    """An error with attributes and a text that are not what they seem."""

    exceptions = None
    __notes__: Any = None

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError

    def __str__(self) -> str:
        raise RuntimeError


def test_an_error_of_an_odd_shape_is_still_told() -> None:
    async def main() -> None:
        registry = Registry()

        @registry.resource
        def odd() -> None:
            raise Odd

        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert isinstance(caught.value.exceptions[0], Odd)

    anyio.run(main)


@pytest.mark.parametrize("notes", [None, 5, [5], ("a",)])
def test_odd_notes_of_a_drivers_error_hide_nothing(
    monkeypatch: pytest.MonkeyPatch, notes: object
) -> None:
    class Value:
        """What the driver is for."""

    class Failing(Driver[Value]):
        async def open(self, value: Value) -> Value:
            raise Odd

    register(Value, Failing())
    monkeypatch.setattr(Odd, "__notes__", notes)

    async def main() -> None:
        registry = Registry()
        registry.resource(name="odd")(Value)
        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert isinstance(caught.value.exceptions[0], Odd)

    anyio.run(main)


def test_a_driver_that_fails_beside_a_failure_does_not_replace_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(Driver[Odd]):
        def salvage(self, error: BaseException) -> None:
            raise KeyError

        def holders(self, value: Odd) -> Any:
            return None

    register(Odd, Failing())
    monkeypatch.setitem(sys.modules, "aiopg", None)

    async def main() -> None:
        registry = Registry()

        @registry.resource
        def failing() -> None:
            raise ZeroDivisionError

        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert isinstance(caught.value.exceptions[0], ZeroDivisionError)

    anyio.run(main)


@pytest.mark.parametrize(
    "options",
    [{"start_timeout": None}, {"close_timeout": "1"}, {"grace": -1}, {"grace": math.nan}],
    ids=repr,
)
def test_a_registry_takes_seconds(options: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError, match=r"test_odd_moments\.py.*seconds"):
        Registry(**options)


def test_an_on_event_that_would_have_to_be_awaited_is_refused() -> None:
    async def hear(event: object) -> None: ...

    class Listener:
        async def __call__(self, event: object) -> None: ...

    for listener in (hear, Listener(), partial(hear)):
        with pytest.raises(DeclarationError, match="not awaited"):
            Registry(on_event=listener)


class HalfBuilt:
    """A value whose opening ignores its cancellation until it is terminated, and then succeeds."""

    def __init__(self) -> None:
        self.terminated = anyio.Event()
        self.log: list[str] = []


class HalfBuiltDriver(Driver[HalfBuilt]):
    """Its driver."""

    async def open(self, value: HalfBuilt) -> HalfBuilt:
        with CancelScope(shield=True):
            await value.terminated.wait()
        return value

    async def close(self, value: HalfBuilt) -> None:
        value.log.append("closed")

    def terminate(self, value: HalfBuilt) -> None:
        value.log.append("terminated")
        value.terminated.set()


@in_virtual_time
def test_a_half_built_value_left_behind_is_terminated_and_closed_if_it_opens_after_all(
    backend: str,
) -> None:
    async def main() -> None:
        register(HalfBuilt, HalfBuiltDriver())
        values: list[HalfBuilt] = []
        registry = Registry(start_timeout=1)

        @registry.resource
        async def half() -> HalfBuilt:
            values.append(HalfBuilt())
            return values[0]

        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        assert isinstance(caught.value.exceptions[0], DeadlineError)
        await anyio.sleep(10)
        assert values[0].log == ["terminated", "closed"]

    virtual_time.run(main, backend)


@pytest.mark.parametrize(
    "options",
    [
        {"start_timeout": -1},
        {"close_timeout": "1"},
        {"retry": "3"},
        {"retry": -1},
        {"close": False},
        {"name": 5},
    ],
    ids=repr,
)
def test_an_option_of_the_wrong_kind_is_refused_where_it_stands(options: dict[str, Any]) -> None:
    registry = Registry()
    with pytest.raises(DeclarationError, match=rf"test_odd_moments\.py.*{next(iter(options))}"):
        registry.resource(**options)(lambda: None)


async def failed_start() -> StartupError:
    """Return an error with a deadline and a failed rollback in it."""
    registry = Registry(start_timeout=0.01)

    class Broken:
        def close(self) -> None:
            raise OSError(5, "broken")

    @registry.resource(registry.resource(name="broken", start_timeout=60)(Broken))
    async def hanging(_: Broken) -> None:
        await anyio.sleep_forever()

    with pytest.raises(StartupError) as caught:
        async with registry.lifespan():
            pass
    return caught.value


async def cut_short() -> StartupError:
    """Return an error of a start in which one opens, one fails, and one never begins."""
    registry = Registry()

    @registry.resource
    async def slow() -> None:
        await anyio.sleep_forever()

    @registry.resource(slow)
    def never(_: None) -> None: ...

    @registry.resource
    async def opened() -> AsyncGenerator[int]:
        with anyio.CancelScope() as scope:
            yield 1
            scope.cancel()
            await anyio.sleep_forever()

    @registry.resource(opened)
    def failing(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(StartupError) as caught:
        async with registry.lifespan():
            pass
    return caught.value


def test_a_failed_start_tells_each_resource_once() -> None:
    error = anyio.run(cut_short)
    assert [name for name, _ in error.failures] == ["failing"]
    assert (error.opened, error.cut_off, error.not_begun) == (("opened",), ("slow",), ("never",))
    assert "\n  cancelled while it opened: slow\n" in str(error)


def test_a_part_of_a_group_has_notes_of_its_own() -> None:
    error = anyio.run(cut_short)
    error.add_note("of all")
    part = error.derive(error.exceptions)
    part.add_note("of a part")
    assert (error.__notes__, part.__notes__) == (["of all"], ["of all", "of a part"])


def test_an_error_of_the_users_own_may_be_mixed() -> None:
    class Named:
        title: str

        def __init_subclass__(cls, *, title: str) -> None:
            cls.title = title

    class NoShop(LifekitError, Named, title="shop"):
        """Theirs."""

    assert (NoShop.title, NoShop.__module__) == ("shop", __name__)


def through_pickle(error: Any) -> Any:
    """Return *error* as another process would get it."""
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("again", [copy.copy, through_pickle], ids=["copy", "pickle"])
def test_errors_survive_being_copied_with_all_that_they_carry(again: Any) -> None:
    error: StartupError = again(anyio.run(failed_start))
    assert (error.opened, error.not_begun) == (("broken",), ())
    deadline = again(error.exceptions[0])
    assert isinstance(deadline, DeadlineError)
    assert (deadline.resource, deadline.phase, str(deadline)) == (
        "hanging",
        "open",
        str(error.exceptions[0]),
    )
    assert isinstance(again(error.rollback), ShutdownError)


def test_what_except_star_leaves_of_a_group_is_still_lifekits() -> None:
    error = anyio.run(failed_start)
    caught: list[BaseException] = []
    try:
        try:
            raise error
        except* DeadlineError as part:
            caught.append(part)
    except LifekitError as rest:
        caught.append(rest)
    assert [(type(part), getattr(part, "opened", None)) for part in caught] == [
        (StartupError, ("broken",)),
        (StartupError, ("broken",)),
    ]


def test_a_value_gone_in_the_inner_lifespan_is_not_taken_from_the_outer_one() -> None:
    registry = Registry()
    inner_closing: list[type[BaseException]] = []

    @registry.resource
    def number() -> Any:
        return SimpleNamespace(close=ask)

    def ask() -> None:
        try:
            number.get()
        except LifekitError as error:
            inner_closing.append(type(error))

    async def main() -> None:
        async with registry.lifespan() as outer:
            async with registry.lifespan():
                pass
            assert inner_closing == [NotOpenError]
            assert number.get() is outer[number]

    anyio.run(main)


def test_leaving_what_was_not_entered_is_refused_and_leaving_twice_is_nothing() -> None:
    async def main() -> None:
        lifespan = Registry().lifespan()
        with pytest.raises(LifekitError, match="not entered"):
            await lifespan.__aexit__(None, None, None)
        async with lifespan:
            pass
        await lifespan.__aexit__(None, None, None)

    anyio.run(main)


# -- errors and values that break whatever touches them --------------------------------------------


class Hostile(Exception):
    """An error that answers nothing."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("class")

    def __str__(self) -> str:
        raise RuntimeError("text")

    def add_note(self, note: str, /) -> None:
        raise RuntimeError("note")


class BrokenGroup(ExceptionGroup[Exception]):
    """A group that can't be taken apart."""

    def derive(self, *_: Any) -> Any:
        raise TypeError("derive")

    def split(self, *_: Any) -> Any:
        raise TypeError("split")

    subgroup = split

    @property
    def exceptions(self) -> Any:
        raise RuntimeError("exceptions")


def nested(depth: int) -> Exception:
    """Return a group in a group in a group."""
    error: list[Any] = [OSError("leaf")]
    for _ in range(depth):
        error = [ExceptionGroup("group", error)]
    return ExceptionGroup("group", error)


ODD: list[Callable[[], Exception]] = [
    lambda: Hostile("x"),
    lambda: BrokenGroup("x", [OSError("leaf"), OSError("leaf")]),
    lambda: ExceptionGroup("x", [BrokenGroup("y", [Hostile("z")])]),
    lambda: nested(5000),
]


@pytest.mark.parametrize("odd", ODD, ids=["hostile", "broken", "nested", "deep"])
@pytest.mark.parametrize("phase", ["open", "close"])
@in_virtual_time
def test_an_odd_error_ends_what_it_comes_from_and_is_told(
    backend: str, phase: str, odd: Callable[[], Exception]
) -> None:
    registry, closed = Registry(), list[str]()

    @registry.resource
    async def below() -> AsyncGenerator[None]:
        yield
        closed.append("below")

    @registry.resource(below, retry=1)
    async def failing(_: None) -> AsyncGenerator[None]:
        if phase == "open":
            raise odd()
        yield
        raise odd()

    async def main() -> None:
        with anyio.fail_after(100), pytest.raises((StartupError, ShutdownError)) as caught:
            async with registry.lifespan():
                pass
        assert [name for name, _ in caught.value.failures] == ["failing"]

    virtual_time.run(main, backend)
    assert closed == ["below"]


async def hangs_beside_hostile_names() -> AsyncGenerator[None]:
    host: Any = Hostile("x")
    await anyio.sleep_forever()
    yield host


async def hangs_while_it_closes() -> AsyncGenerator[None]:
    yield
    await anyio.sleep_forever()


def nameless(factory: Callable[[], AsyncGenerator[None]]) -> Any:
    """Return *factory* as code that was run in a namespace of no module has it."""
    return FunctionType(factory.__code__, {"__name__": None, "anyio": anyio})


@pytest.mark.parametrize(
    "factory",
    [hangs_beside_hostile_names, nameless(hangs_while_it_closes)],
    ids=["hostile", "nameless"],
)
@in_virtual_time
def test_where_something_hangs_may_be_broken_and_its_deadline_still_ends_it(
    backend: str, factory: Callable[[], AsyncGenerator[None]]
) -> None:
    registry = Registry()
    registry.resource(name="hanging")(factory)

    async def main() -> None:
        with anyio.fail_after(100), pytest.raises((StartupError, ShutdownError)) as caught:
            async with registry.lifespan():
                pass
        ((name, error),) = caught.value.failures
        assert (name, type(error)) == ("hanging", DeadlineError)

    virtual_time.run(main, backend)


@pytest.mark.parametrize("phase", ["open", "close"])
@in_virtual_time
def test_a_generator_exit_of_the_users_own_is_a_failure_like_any(backend: str, phase: str) -> None:
    registry, closed = Registry(), list[str]()

    @registry.resource
    async def below() -> AsyncGenerator[None]:
        yield
        closed.append("below")

    @registry.resource(below)
    async def exiting(_: None) -> SimpleNamespace:
        if phase == "open":
            raise GeneratorExit
        return SimpleNamespace(close=raise_generator_exit)

    async def main() -> None:
        with anyio.fail_after(1), pytest.raises((StartupError, ShutdownError)) as caught:
            async with registry.lifespan():
                pass
        assert [name for name, _ in caught.value.failures] == ["exiting"]

    virtual_time.run(main, backend)
    assert closed == ["below"]


def raise_generator_exit() -> None:
    raise GeneratorExit


def test_a_cancelled_part_of_a_broken_group_is_left_out_of_what_failed() -> None:
    registry = Registry()

    @registry.resource
    async def failing() -> None:
        raise BaseExceptionGroup("x", [asyncio.CancelledError(), BrokenGroup("y", [OSError("leaf")])])

    async def main() -> None:
        async with registry.lifespan():
            pass

    with pytest.raises(StartupError, match="leaf") as caught:
        asyncio.run(main())
    (group,) = caught.value.exceptions
    assert isinstance(group, ExceptionGroup)
    assert repr(group.exceptions) == "(OSError('leaf'),)"  # pyright: ignore


class Rude(Driver[SimpleNamespace]):
    """A driver that fails at all that is asked of it."""

    def describe(self, value: SimpleNamespace) -> str:
        raise SystemExit

    def holders(self, value: SimpleNamespace) -> list[str]:
        raise KeyboardInterrupt


def test_a_driver_that_exits_when_asked_leaves_nothing_open() -> None:
    register(SimpleNamespace, Rude())
    registry, closed = Registry(close_timeout=0), list[str]()

    @registry.resource
    async def below() -> AsyncGenerator[None]:
        yield
        closed.append("below")

    registry.resource(after=[below], name="rude")(SimpleNamespace)

    async def main() -> None:
        async with registry.lifespan():
            pass

    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        asyncio.run(main())
    assert closed == ["below"]


def test_a_task_factory_has_no_part_in_lifekits_own_tasks() -> None:
    def refuse(*_: Any, **more: Any) -> Any:
        raise RuntimeError("no task")

    registry, closed = Registry(), list[str]()

    @registry.resource
    async def value() -> AsyncGenerator[int]:
        yield 1
        closed.append("value")

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(refuse)
        async with registry.lifespan() as lifespan:
            assert lifespan[value] == 1
        asyncio.get_running_loop().set_task_factory(None)

    asyncio.run(main())
    assert closed == ["value"]
