"""What can be declared, and how each declaration that can't work is refused, with its code lines."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, cast

import anyio
import pytest
import redis.asyncio as redis
from anyio.lowlevel import checkpoint

from lifekit import (
    DeclarationError,
    LifekitError,
    Registry,
    Resource,
    ShutdownError,
    StartupError,
    events,
)
from lifekit._core.plan import plan

from .virtual_time import run

HERE = "tests/test_declaring.py"


def line_of(function: Callable[..., object]) -> str:
    """Return the code line on which *function* is defined."""
    return f"{HERE}:{function.__code__.co_firstlineno}"


def refused(*texts: str) -> Any:
    """Expect a `DeclarationError` whose message holds each of *texts*, in that order."""
    return pytest.raises(DeclarationError, match=".*".join(map(re.escape, texts)))


def opened(registry: Registry, handle: Resource[Any]) -> Any:
    """Run *registry* once, and return the value of *handle*."""
    values: list[Any] = []

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            values.append(lifespan[handle])

    run(main, "asyncio")
    return values[0]


def failure_at_start(registry: Registry) -> Exception:
    """Run *registry*, and return what its one resource failed to open with."""
    failures: list[Exception] = []

    async def main() -> None:
        with pytest.raises(StartupError) as caught:
            async with registry.lifespan():
                pass
        failures.extend(caught.value.exceptions)

    run(main, "asyncio")
    assert len(failures) == 1
    return failures[0]


def nothing() -> None:
    """A factory."""


def swallow(*_: object) -> object:
    """A factory with any needs."""
    return object()


# -- names -----------------------------------------------------------------------------------------


def test_two_resources_of_one_name_are_refused_with_both_lines() -> None:
    registry = Registry()

    @registry.resource
    def db() -> int:
        return 1

    def other() -> int:
        return 2

    with refused("'db'", line_of(db.factory), line_of(other), "Rename one", "name='…'"):
        registry.resource(name="db")(other)
    assert registry.plan().resources == (db,)
    assert opened(registry, db) == 1


def test_two_resources_of_one_name_in_included_registries_are_refused_with_both_lines() -> None:
    registry, package = Registry("app"), Registry("package")

    @registry.resource
    def db() -> int:
        return 1

    mine = db.location

    @package.resource(name="db")
    def other() -> int:
        return 2

    with refused("'db'", mine, other.location):
        registry.include(package)
    assert registry.plan().resources == (db,)


def test_a_name_taken_in_an_included_registry_later_is_refused_before_anything_opens() -> None:
    registry, package = Registry("app"), Registry("package")
    began: list[str] = []
    registry.include(package)

    @registry.resource
    def db() -> None:
        began.append("db")

    @package.resource(name="db")
    def other() -> None:
        began.append("other")

    with refused("'db'", other.location, db.location):
        registry.lifespan()
    assert began == []


@pytest.mark.parametrize("name", ["<lambda>", "has space", "1st", "db-1", "db.1"])
def test_a_name_that_no_attribute_can_have_is_refused(name: str) -> None:
    registry = Registry()
    with refused(line_of(nothing), repr(name), "request.state", "name='…'"):
        registry.resource(name=name)(nothing)
    assert registry.plan().resources == ()


def test_a_lambda_and_a_partial_need_a_name() -> None:
    registry = Registry()
    with refused(f"{HERE}:", "'<lambda>'", "name='…'"):
        registry.resource(lambda: 1)
    with refused(line_of(nothing), "''", "name='…'"):
        registry.resource(functools.partial(nothing))


# -- handles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["needs", "after"])
def test_a_handle_of_another_registry_is_refused_with_both_lines(how: str) -> None:
    registry, package = Registry("app"), Registry("package")

    @package.resource
    def settings() -> int:
        return 1

    def db(*settings: int) -> int:
        return 2

    if how == "needs":
        handle = registry.resource(settings)(db)
    else:
        handle = registry.resource(after=[settings])(db)
    message = ["db", line_of(db), "settings", settings.location, "'package'", "'app'", "include"]
    with refused(*message):
        registry.lifespan()
    registry.include(package)
    assert opened(registry, handle) == 2


def test_a_handle_of_a_registry_that_is_included_later_is_fine() -> None:
    registry, package = Registry("app"), Registry("package")

    @package.resource
    def settings() -> int:
        return 1

    @registry.resource(settings)
    def db(settings: int) -> int:
        return settings + 1

    registry.include(package)

    @package.resource(settings)
    def late(settings: int) -> int:
        return settings + 2

    assert registry.plan().resources == (db, settings, late)
    assert opened(registry, db) == 2
    assert opened(registry, late) == 3


def test_a_resource_may_be_needed_across_registries_in_both_directions() -> None:
    registry, package = Registry("app"), Registry("package")
    registry.include(package)

    @registry.resource
    def settings() -> int:
        return 1

    @package.resource(settings)
    def db(settings: int) -> int:
        return settings + 1

    @registry.resource(db)
    def links(db: int) -> int:
        return db + 1

    assert opened(registry, links) == 3
    with refused("db", "settings", "'app'", "'package'", "include"):
        package.lifespan()


def test_a_registry_included_twice_or_by_two_ways_counts_once() -> None:
    registry, left, right, base = (Registry(name) for name in ("app", "left", "right", "base"))
    began: list[str] = []

    @base.resource
    def settings() -> None:
        began.append("settings")

    left.include(base)
    right.include(base)
    registry.include(left)
    registry.include(right)
    registry.include(left)
    assert registry.plan().resources == (settings,)
    opened(registry, settings)
    assert began == ["settings"]


# -- cycles ----------------------------------------------------------------------------------------


def chain(*names: str) -> list[Resource[Any]]:
    """Return handles of which each needs the one before."""
    registry = Registry()
    handles: list[Resource[Any]] = []
    for name in names:
        handles.append(registry.resource(*handles[-1:], name=name)(swallow))
    return handles


@pytest.mark.parametrize("how", ["needs", "after"])
def test_a_cycle_is_told_whole_each_step_with_its_line(how: str) -> None:
    apart, first, middle, last = chain("apart", "first", "middle", "last")
    object.__setattr__(first, how, (last,))
    with pytest.raises(DeclarationError) as caught:
        plan("app", [apart, first, middle, last])
    steps = [f"{each.name} ({each.location})" for each in (first, last, middle, first)]
    turns = [" -> ".join(steps[turn:-1] + steps[: turn + 1]) for turn in range(3)]
    assert str(caught.value) in [f"the resources need each other in a cycle: {turn}" for turn in turns]


def test_a_resource_that_needs_itself_is_a_cycle() -> None:
    (alone,) = chain("alone")
    object.__setattr__(alone, "after", (alone,))
    step = f"alone ({alone.location})"
    with refused(f"cycle: {step} -> {step}"):
        plan("app", [alone])


def test_a_plan_is_made_anew_of_handles_made_anew() -> None:
    first, last = chain("first", "last")
    other = replace(last, needs=(), name="other")
    assert plan("app", [first, last, other]).parents == ((), (0,), ())
    assert plan("app", [first, last, first]).resources == (first, last)
    with refused("last", last.location, "first", "include"):
        plan("app", [last, other])


def test_registries_that_include_each_other_are_refused_with_the_whole_path() -> None:
    first, middle, last = (Registry(name) for name in ("first", "middle", "last"))
    first.include(middle)
    middle.include(last)
    with refused(HERE, "'last' -> 'first' -> 'middle' -> 'last'"):
        last.include(first)
    with refused(HERE, "'first' -> 'first'"):
        first.include(first)
    assert first.plan().resources == ()


# -- options ---------------------------------------------------------------------------------------


def test_an_option_that_does_not_exist_is_refused() -> None:
    registry = Registry()
    options: Any = {"close_timout": 3}
    with refused(f"{HERE}:", "close_timout"):
        registry.resource(**options)
    assert registry.plan().resources == ()


def test_a_handle_alone_as_after_is_refused() -> None:
    registry = Registry()
    options: Any = {"after": registry.resource(nothing)}
    with refused(f"{HERE}:", "after"):
        registry.resource(**options)


# -- factories -------------------------------------------------------------------------------------


def test_a_ready_made_value_in_a_factorys_place_is_refused() -> None:
    registry = Registry()
    client: Any = redis.Redis()
    with refused(f"{HERE}:", "Redis", "factory is expected", "return it from a function"):
        registry.resource(client)
    with refused(f"{HERE}:", "Redis", "factory is expected"):
        registry.resource(name="client")(client)
    assert registry.plan().resources == ()


def test_a_ready_made_value_in_a_handles_place_is_refused() -> None:
    registry = Registry()
    client: Any = redis.Redis()
    handle = registry.resource(nothing)
    stranger: Any
    for stranger in (client, "nothing", nothing, None):
        message = [f"{HERE}:", type(stranger).__name__, "handle is expected"]
        with refused(*message):
            registry.resource(stranger, handle)
        with refused(*message):
            registry.resource(handle, stranger)
        with refused(*message):
            registry.resource(after=[stranger])
        with refused(*message):
            registry.resource(stranger, name="other")
    assert registry.plan().resources == (handle,)


def one(value: int) -> int:
    """A factory with one need."""
    return value


def keyword_only(*, value: int) -> int:
    """A factory that takes its need by name alone."""
    return value


class OfOne:
    """A class that is a factory with one need."""

    def __init__(self, value: int) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("factory", "count"),
    [(nothing, 1), (one, 0), (one, 2), (keyword_only, 1), (OfOne, 0), (functools.partial(one, 1), 1)],
)
def test_a_factory_with_too_many_or_too_few_parameters_is_refused(factory: Any, count: int) -> None:
    registry = Registry()
    needs = [registry.resource(name=f"need{index}")(lambda: 1) for index in range(count)]
    with refused("factory", f"{HERE}:", f"{count} needs"):
        registry.resource(*needs, name="factory")(factory)
    assert list(registry.plan().resources) == needs


def never() -> Generator[int]:
    """A generator that yields nothing."""
    return
    yield 1


async def never_async() -> AsyncGenerator[int]:
    """An async generator that yields nothing."""
    return
    yield 1


@pytest.mark.parametrize("factory", [never, never_async])
def test_a_generator_that_yields_nothing_fails_the_start(factory: Any) -> None:
    registry = Registry()
    registry.resource(factory)
    failure = failure_at_start(registry)
    assert isinstance(failure, DeclarationError)
    assert line_of(factory) in str(failure)
    assert "yields nothing" in str(failure)
    assert str(failure).endswith("Yield the value once.")


def forgetful() -> list[int]:  # type: ignore[return]
    """Lacks its return."""
    [1].copy()


async def forgetful_async() -> list[int]:  # type: ignore[return]
    """Lacks its return."""
    [1].copy()


def may_be_none() -> list[int] | None:
    """Says so."""
    return None


def any_object() -> object:
    """None is one."""
    return None


def without_result(function: Callable[[], object]) -> Callable[[], object]:
    """Return what does the same and returns None."""

    @functools.wraps(function)
    def dropped() -> None:
        function()

    return dropped


@without_result
def wrapped() -> list[int]:
    """Whose decorator has the last word."""
    return [1]


class Unasked(type):
    """The type of classes that answer no question."""

    def __instancecheck__(cls, instance: object) -> bool:
        raise LookupError


class Silent(metaclass=Unasked):
    """One of them."""


def may_be_silent() -> Silent:
    """It can't be told whether None is one."""
    return cast(Silent, None)


@pytest.mark.parametrize("factory", [forgetful, forgetful_async])
def test_a_factory_without_its_return_fails_the_start(factory: Any) -> None:
    registry = Registry()
    registry.resource(factory)
    failure = failure_at_start(registry)
    assert isinstance(failure, DeclarationError)
    assert line_of(factory) in str(failure)
    assert "returned None, and says that it returns list. Is `return` missing?" in str(failure)


@pytest.mark.anyio
@pytest.mark.parametrize("factory", [may_be_none, any_object, wrapped, may_be_silent, lambda: None])
async def test_none_is_a_value_where_nothing_else_is_said(factory: Any) -> None:
    registry = Registry()
    handle = registry.resource(name="value")(factory)
    async with registry.lifespan() as lifespan:
        assert lifespan[handle] is None


@pytest.mark.parametrize("is_async", [False, True])
def test_a_generator_that_yields_twice_fails_the_stop_and_is_closed(is_async: bool) -> None:
    registry = Registry()
    log: list[str] = []

    def twice() -> Generator[int]:
        try:
            yield 1
            log.append("closing")
            yield 2
        finally:
            log.append("closed")

    async def twice_async() -> AsyncGenerator[int]:
        task = anyio.get_current_task().id
        try:
            yield 1
            log.append("closing")
            yield 2
        finally:
            await checkpoint()
            assert anyio.get_current_task().id == task  # not by whoever collects it
            log.append("closed")

    factory: Callable[[], Any] = twice_async if is_async else twice
    handle = registry.resource(factory)
    with pytest.raises(ShutdownError) as caught:
        opened(registry, handle)
    ((name, failure),) = caught.value.failures
    assert (name, type(failure)) == (factory.__name__, DeclarationError)
    assert line_of(factory) in str(failure)
    assert "yields twice" in str(failure)
    assert log == ["closing", "closed"]


class CloseIsNoMethod:
    """A value whose close is something else."""

    close = "later"
    log: list[str]

    def terminate(self) -> None:
        self.log.append("terminate")


class CloseWantsArguments:
    """A value whose close can't be called without more."""

    log: list[str]

    def close(self, how: str) -> None:
        raise AssertionError(how)

    def terminate(self) -> None:
        self.log.append("terminate")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [(CloseIsNoMethod, "close is str, not a method"), (CloseWantsArguments, "close() wants arguments")],
)
def test_a_value_with_a_broken_close_fails_the_start_and_is_cut_off(kind: Any, problem: str) -> None:
    registry = Registry()
    log: list[str] = []

    @registry.resource
    def below() -> Generator[None]:
        yield
        log.append("below closed")

    def broken(_: None) -> Any:
        value = kind()
        value.log = log
        return value

    registry.resource(below)(broken)
    failure = failure_at_start(registry)
    assert isinstance(failure, DeclarationError)
    assert line_of(broken) in str(failure)
    assert problem in str(failure)
    assert "close=lambda value: …" in str(failure)
    assert log == ["terminate", "below closed"]
    assert opened_with_a_declared_close(kind) == ["declared"]


def opened_with_a_declared_close(kind: Any) -> list[str]:
    registry = Registry()
    log: list[str] = []
    handle = registry.resource(name="mended", close=lambda _: log.append("declared"))(kind)
    opened(registry, handle)
    return log


class Closable:
    """A value that notes what was called."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def close(self) -> None:
        self.log.append("close")


@pytest.mark.parametrize("step", ["check", "close", "wait_closed", "terminate"])
def test_a_declared_method_that_the_value_lacks_fails_the_start_and_leaves_nothing_open(
    step: str,
) -> None:
    registry = Registry()
    values: list[Closable] = []
    options: Any = {step: "no_such_method"}

    @registry.resource(**options)
    def value() -> Closable:
        values.append(Closable())
        return values[0]

    failure = failure_at_start(registry)
    assert isinstance(failure, DeclarationError)
    assert value.location in str(failure)
    assert f"{step}='no_such_method'" in str(failure)
    assert "Closable has no such method" in str(failure)
    assert values[0].log == ["close"]


def test_a_declared_method_that_a_generators_value_lacks_fails_the_start_and_ends_it() -> None:
    registry = Registry()
    log: list[str] = []

    @registry.resource(close="no_such_method")
    async def value() -> AsyncGenerator[int]:
        yield 1
        log.append("ended")

    assert isinstance(failure_at_start(registry), DeclarationError)
    assert log == ["ended"]


# -- the good forms --------------------------------------------------------------------------------


def make_one() -> int:
    return 1


async def make_one_async() -> int:
    await checkpoint()
    return 1


def yield_one() -> Generator[int]:
    yield 1


async def yield_one_async() -> AsyncGenerator[int]:
    await checkpoint()
    yield 1


def return_coroutine() -> Any:
    return make_one_async()


class CallMe:
    """A factory that is an object."""

    def __call__(self) -> int:
        return 1


FORMS: list[Any] = [
    make_one,
    make_one_async,
    yield_one,
    yield_one_async,
    contextmanager(yield_one),
    asynccontextmanager(yield_one_async),
    return_coroutine,
    CallMe(),
    functools.partial(int, "1"),
    functools.partial(make_one_async),
    functools.partial(yield_one_async),
    lambda: 1,
]


@pytest.mark.parametrize("factory", FORMS)
def test_every_form_of_a_factory_gives_its_value(factory: Any) -> None:
    registry = Registry()
    handle = registry.resource(name="value")(factory)
    assert opened(registry, handle) == 1
    assert opened(registry, handle) == 1  # and again, in another loop


def test_a_handle_is_made_by_a_bare_decorator_with_needs_and_by_a_plain_call() -> None:
    registry = Registry()

    @registry.resource
    def bare() -> int:
        return 1

    @registry.resource()
    def with_nothing() -> int:
        return 2

    @registry.resource(bare, with_nothing)
    async def with_needs(first: int, second: int) -> tuple[int, int]:
        return first, second

    def make(first: int, second: int) -> list[int]:
        return [first, second]

    plain = registry.resource(with_nothing, bare)(make)
    of_class = registry.resource(bare)(OfOne)
    partial = registry.resource(bare, name="partial")(functools.partial(make, 0))
    handles = (bare, with_nothing, with_needs, plain, of_class, partial)
    assert [handle.name for handle in handles] == (
        ["bare", "with_nothing", "with_needs", "make", "OfOne", "partial"]
    )
    assert registry.plan().resources == handles
    assert opened(registry, with_needs) == (1, 2)
    assert opened(registry, plain) == [2, 1]
    assert opened(registry, of_class).value == 1
    assert opened(registry, partial) == [0, 1]
    assert partial.location == line_of(make)


def test_a_need_named_twice_is_passed_twice() -> None:
    registry = Registry()
    number = registry.resource(name="number")(lambda: 1)
    pair = registry.resource(number, number, name="pair")(lambda a, b: (a, b))
    assert opened(registry, pair) == (1, 1)


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_after_orders_and_passes_nothing(kind: Callable[[list[Any]], Any]) -> None:
    registry = Registry()
    log: list[str] = []

    @registry.resource
    async def slow() -> AsyncGenerator[None]:
        await anyio.sleep(1)
        log.append("slow opened")
        yield
        log.append("slow closed")

    @registry.resource(after=kind([slow]))
    def quick() -> Generator[None]:
        log.append("quick opened")
        yield
        log.append("quick closed")

    opened(registry, quick)
    assert log == ["slow opened", "quick opened", "quick closed", "slow closed"]


def test_a_handle_shows_its_name_its_registry_and_its_line_and_no_value() -> None:
    registry = Registry("shop")

    @registry.resource(name="renamed")
    def db() -> str:
        return "postgresql://app:hunter2@db"

    assert repr(db) == f"<Resource 'renamed' of 'shop', {line_of(db.factory)}>"
    assert repr(registry) == "<Registry 'shop', 1 resources>"
    assert opened(registry, db) == "postgresql://app:hunter2@db"
    assert "hunter2" not in repr(db)


def test_a_handle_is_frozen_and_counts_as_itself_alone() -> None:
    first, last = chain("first", "last")
    with pytest.raises(AttributeError):
        first.name = "other"  # type: ignore[misc]
    assert first != replace(first)
    assert len({first, last, first}) == 2


# -- checks ----------------------------------------------------------------------------------------


class Checked:
    """A value that can be checked."""

    def __init__(self) -> None:
        self.checked = 0

    def ping(self) -> None:
        self.checked += 1

    async def ping_async(self) -> bool:
        await checkpoint()
        self.checked += 1
        return True


async def check_it(value: Checked) -> None:
    await value.ping_async()


def say_nothing(_: object) -> None: ...


def say_zero(_: object) -> int:
    return 0


def say_yes(_: object) -> bool:
    return True


def say_no_at_once(_: object) -> bool:
    return False


async def say_no(_: object) -> bool:
    await checkpoint()
    return False


@pytest.mark.parametrize("check", ["ping", "ping_async", Checked.ping, check_it])
def test_a_check_is_a_methods_name_or_a_function_sync_or_async(check: Any) -> None:
    registry = Registry()
    handle = registry.resource(check=check)(Checked)
    assert opened(registry, handle).checked == 1


@pytest.mark.parametrize("check", [say_no_at_once, say_no])
def test_a_check_that_returns_false_fails_the_start_and_closes_the_value(check: Any) -> None:
    registry = Registry()
    log: list[str] = []

    @registry.resource(check=check, close=lambda _: log.append("closed"))
    def value() -> int:
        return 1

    failure = failure_at_start(registry)
    assert type(failure) is LifekitError
    assert "the check of value returned False" in str(failure)
    assert log == ["closed"]


@pytest.mark.parametrize("check", [say_nothing, say_zero, say_yes])
def test_a_check_that_returns_anything_else_passes(check: Any) -> None:
    registry = Registry()
    handle = registry.resource(name="value", check=check)(lambda: 1)
    assert opened(registry, handle) == 1


def test_a_check_that_raises_is_the_cause() -> None:
    registry = Registry()
    registry.resource(name="value", check=lambda value: value / 0)(lambda: 1)
    assert isinstance(failure_at_start(registry), ZeroDivisionError)


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_declaration_order_decides_every_tie_in_every_run(backend: str) -> None:
    importlib.import_module("hypothesis")  # which makes trio shuffle what can run, anew each time
    story: list[tuple[str, str]] = []
    registry, package = Registry(on_event=lambda event: story.append(told(event))), Registry()
    names = ["delta", "alpha", "charlie", "bravo"]

    async def make(*_: object) -> AsyncGenerator[None]:
        await checkpoint()
        yield
        await checkpoint()

    roots = [registry.resource(name=name)(make) for name in names]
    registry.include(package)
    for root in reversed(roots):
        package.resource(root, roots[0], name=f"of_{root.name}")(make)

    async def main() -> None:
        async with registry.lifespan():
            pass

    for _ in range(20):
        story.clear()
        run(main, backend)
        leaves = [f"of_{name}" for name in reversed(names)]
        assert [name for what, name in story if what == "Opening"][:4] == names
        assert [name for what, name in story if what == "Opened"] == names + leaves
        assert [name for what, name in story if what == "Closing"][:4] == leaves[::-1]
        assert [name for what, name in story if what == "Closed"] == leaves + names


def told(event: events.Event) -> tuple[str, str]:
    return type(event).__name__, getattr(event, "resource", "")
