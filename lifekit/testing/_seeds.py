"""Seeds: fixtures that put in what several tests need, each in a sandbox around those of the tests.

The fixture that a user sees is an ordinary one. It asks for another one, which its plugin runs in the
event loop of the application: that begins the sandbox, and runs the function if it is async. What is
open is a stack for each application, and ends in reverse. So a seed that outlasts others that are open
can't be made inside them: they are ended before, and are made anew for the next test that asks.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from types import CodeType
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from anyio.from_thread import BlockingPortal

from lifekit._core.block import Block, current_block
from lifekit._core.errors import SandboxError
from lifekit._util.call_sites import Site

from ._app import Running, lifespan_of
from ._client import OptionError
from ._loops import (
    SCOPES,
    WAYS_OUT,
    WHILE_RUNNING,
    as_written,
    asyncio_fixture,
    fail,
    fixture_plugin,
    is_isolated,
    kind_for,
    loop_scope_of,
    requested,
)

if TYPE_CHECKING:
    from ._pytest import AppFixture, Run  # which has the seeds

PLACE = "_lifekit_place"
_TAKEN = ("request", "lifekit_app", "_lifekit_run")


class Seed:
    """A function that a fixture is made of."""

    def __init__(self, function: Callable[..., Any], scope: str) -> None:
        self.function, self.scope = function, scope
        self.name = function.__name__
        self.parameters = inspect.signature(function).parameters
        self.is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)

    def signature(self) -> inspect.Signature:
        """Return that of the fixture: ``lifespan`` would be the test's own."""
        own = [each for name, each in self.parameters.items() if name != "lifespan"]
        more = [name for name in _TAKEN if name not in self.parameters]
        keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
        return inspect.Signature([*own, *keywords])


def fixture(function: Callable[..., Any], scope: Any) -> object:
    """Return the fixture that `lifekit.testing.seed` makes of a function."""
    seed = Seed(function, scope)

    def made(*args: Any, **values: Any) -> Iterator[Any]:
        run: Run = values["_lifekit_run"]
        request = values["request"]
        given = {name: value for name, value in values.items() if name in seed.parameters}
        yield from run.seeds.make(seed, request, args, given)

    made.__name__, made.__qualname__ = function.__name__, function.__qualname__
    made.__doc__, made.__module__ = function.__doc__, function.__module__
    told: Any = made
    told.__signature__, told.lifekit_seed = seed.signature(), seed
    return pytest.fixture(scope=scope)(made)


def _seed_of(definition: pytest.FixtureDef[Any]) -> Seed | None:
    function: Any = definition.func
    found: Seed | None = getattr(function, "lifekit_seed", None)
    return found


class Made:
    """A seed for one application: its sandbox, and what it gave."""

    def __init__(
        self, seed: Seed, served: Running, around: Block | None, call: Callable[[], Any]
    ) -> None:
        self.seed, self.served = seed, served
        self.block: Block | None = None
        self.request: Any = None
        self.kind: object = None  # of the application
        self._around, self._call = around, call

    @asynccontextmanager
    async def sandboxed(self) -> AsyncGenerator[Any]:
        """Begin its sandbox; run it inside if it is async, and give what it gave."""
        async with AsyncExitStack() as ending:
            with _within(self._around):
                self.block = await ending.enter_async_context(self.served.sandbox(workers=False))
            locate(self.seed.function, self.served)
            value = None
            if inspect.iscoroutinefunction(self.seed.function):
                with _within(self.block):
                    value = await self._call()
            elif self.seed.is_async:
                manager = asynccontextmanager(self._call)()
                with _within(self.block):
                    value = await manager.__aenter__()
                ending.push_async_callback(self._leave, manager)
            yield value

    async def _leave(self, manager: Any) -> None:
        with _within(self.block):
            await manager.__aexit__(None, None, None)

    @contextmanager
    def run(self) -> Generator[Any]:
        """Run what is not async, as any fixture."""
        if not inspect.isgeneratorfunction(self.seed.function):
            with _within(self.block):
                value = self._call()
            yield value
            return
        manager = contextmanager(self._call)()
        with _within(self.block):
            value = manager.__enter__()
        yield value
        with _within(self.block):
            manager.__exit__(None, None, None)


@contextmanager
def _within(block: Block | None) -> Generator[None]:
    # For code that is started inside, whatever block it is started from.
    before = current_block.get()
    if block is not None:
        current_block.set(block)
    try:
        yield
    finally:
        current_block.set(before)


class Seeds:
    """Those of one run, of all its applications."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._open: list[Made] = []
        self._next: Made | None = None
        self._portal: BlockingPortal | None = None
        self._names: dict[tuple[Seed, str], str] = {}

    def around(self, served: Running) -> Any:
        """Return a context manager in which a block of an application is inside of its seeds'."""
        innermost = self._innermost(served)
        return nullcontext() if innermost is None else _within(innermost)

    def _innermost(self, served: Running) -> Block | None:
        return next((each.block for each in reversed(self._open) if each.served is served), None)

    # -- before a test -----------------------------------------------------------------------------

    def prepare(self, item: Any, asked: list[pytest.FixtureDef[Any]]) -> None:
        """End seeds that can't be open when those are made that a test asks for, or with that test.

        These are those of another application that it needs in its own, those that are outlasted by one
        that is still to be made, and all of them where it runs without a sandbox.
        """
        if not self._open or PLACE not in item.fixturenames:
            return
        kind = _kind(item)
        wanted = {_seed_of(each) for each in asked}
        here = [each for each in self._open if each.kind == kind]
        missing = wanted - {each.seed for each in here}
        longest = max((SCOPES.index(each.scope) for each in missing if each is not None), default=-1)
        for made in list(self._open):
            if made.kind != kind:
                ends = made.seed in wanted
            else:
                ends = not is_isolated(item) or SCOPES.index(made.seed.scope) < longest
            if ends and made in self._open:
                made.request._fixturedef.finish(made.request)

    # -- making one --------------------------------------------------------------------------------

    def make(
        self, seed: Seed, request: Any, args: tuple[Any, ...], values: dict[str, Any]
    ) -> Iterator[Any]:
        """Run a seed, for the application of the test that is set up."""
        item = request._pyfuncitem
        with readable():
            if asyncio._get_running_loop() is not None:
                _refuse_now(request)
            app = self._run.app_fixture(request, kind_for(item))
            opened: Any = request.getfixturevalue(app.name)
            served, self._portal = opened if app.kind == "sync" else (opened, None)
            around, lifespan = self._innermost(served), lifespan_of(served)
            if not _is_innermost(around, lifespan.block):  # but that of a test
                _refuse_now(request)
            if "lifespan" in seed.parameters:
                values["lifespan"] = lifespan
            made = Made(seed, served, around, lambda: seed.function(*args, **values))
            made.request, made.kind = request, _kind(item)
            yield from self._made(made, app)

    def _made(self, made: Made, app: AppFixture) -> Iterator[Any]:
        request = made.request
        name = self._block_fixture(made.seed, app, request.config)
        definition = request.session._fixturemanager.getfixturedefs(name, request._pyfuncitem)[-1]
        self._next = made
        try:
            value = request.getfixturevalue(name)
            self._open.append(made)
            # The application ends after this, whatever ends it.
            request._get_active_fixturedef(app.name).addfinalizer(
                lambda: request._fixturedef.finish(request)
            )
            if made.seed.is_async:
                yield value
            else:
                with made.run() as value:
                    yield value
        finally:
            self._end(made, definition, request)

    def _end(self, made: Made, definition: pytest.FixtureDef[Any], request: Any) -> None:
        try:
            later = self._open[self._open.index(made) + 1 :] if made in self._open else []
            for each in reversed(later):
                if each.served is made.served:
                    each.request._fixturedef.finish(each.request)
        finally:
            self._open = [each for each in self._open if each is not made]
            definition.finish(request)

    def _block_fixture(self, seed: Seed, app: AppFixture, config: pytest.Config) -> str:
        # The one that the plugin of the application's event loop runs.
        known = self._names.get((seed, app.name))
        if known is not None:
            return known
        number = len(self._names)
        name = self._names[seed, app.name] = f"_lifekit_seed_{app.kind}_{number}"
        made, add = fixture_plugin()
        if app.kind == "sync":
            add(name, self._in_thread(), seed.scope)
        elif app.kind.startswith("anyio"):
            add(name, self._in_anyio(), seed.scope)
        else:
            add(name, self._in_asyncio(), seed.scope, asyncio_fixture(app.loop_scope))
        config.pluginmanager.register(made, f"lifekit-seed-{number}")
        return name

    def _in_thread(self) -> Any:
        def function() -> Iterator[Any]:
            assert self._next is not None
            assert self._portal is not None
            with self._portal.wrap_async_context_manager(self._next.sandboxed()) as value:
                yield value

        return function

    def _in_anyio(self) -> Any:
        async def function(anyio_backend: object) -> AsyncIterator[Any]:
            assert self._next is not None
            async with self._next.sandboxed() as value:
                yield value

        return function

    def _in_asyncio(self) -> Any:
        async def function() -> AsyncIterator[Any]:
            assert self._next is not None
            async with self._next.sandboxed() as value:
                yield value

        return function


def prepare(item: Any, run: Run | None) -> None:
    """Prepare for a test, before any fixture of it is set up."""
    if getattr(item, "_fixtureinfo", None) is None:
        return
    asked = [each for each in requested(item, *item.fixturenames) if _seed_of(each) is not None]
    if asked and PLACE not in item.fixturenames:
        # Who finds what a seed made is in a sandbox inside of the seed's.
        known = item._fixtureinfo.name2fixturedefs
        names = item.fixturenames
        own = [name for name in names if name in known and known[name][-1].scope == "function"]
        names.insert(names.index(own[0]) if own else len(names), PLACE)
    for each in asked:
        _check(item, each)
    if run is not None:
        run.seeds.prepare(item, asked)


def _is_innermost(around: Block | None, block: Block | None) -> bool:
    # Of an application with several lifespans, which began their blocks together.
    if around is None or block is None:
        return around is block
    return block.contains(around)


def _refuse_now(request: Any) -> NoReturn:
    # For this test: what a fixture raises is kept for all that ask for it.
    request._pyfuncitem.addfinalizer(lambda: request._fixturedef.finish(request))
    fail(WHILE_RUNNING)


def _kind(item: Any) -> object:
    # What tells one application from another: its fixture, and its event loop.
    return item._fixtureinfo.name2fixturedefs["lifekit_app"][-1], kind_for(item)


def _check(item: Any, definition: pytest.FixtureDef[Any]) -> None:
    # Here, for what the fixture itself raises is raised for every test that asks for it.
    name = definition.argname
    if not is_isolated(item):
        fail(_NOT_ISOLATED.format(name=name))
    kind = kind_for(item)
    loop = loop_scope_of(kind)
    if SCOPES.index(loop) < SCOPES.index(definition.scope):
        way_out = WAYS_OUT["anyio" if kind.startswith("anyio") else "pytest-asyncio"]
        way_out = as_written(item.config, way_out)
        fail(_TOO_SHORT.format(name=name, scope=definition.scope, loop=loop, way_out=way_out))


_TOO_SHORT = (
    'the seed {name} has the scope "{scope}", and the event loop of this test lasts for the {loop} '
    "alone, and with it the application and what is put in. Let the loop last as long; {way_out}"
)
_NOT_ISOLATED = (
    'this test is marked isolation="none", and what the seed {name} makes is there in a sandbox alone. '
    "Let the test put in what it needs by itself."
)


class _FunctionSite(Site):
    # Where a sandbox begins, as messages tell it: at the test, not in the plugin that runs the fixture.
    __slots__ = ()

    def __init__(self, code: CodeType) -> None:
        self._code, self._line = code, code.co_firstlineno


def locate(function: Any, served: Running) -> None:
    """Let messages say that the blocks of an application began at a function."""
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    for lifespan in served.lifespans:
        if lifespan.block is not None and code is not None:
            lifespan.block.location = _FunctionSite(code)


@contextmanager
def readable() -> Generator[None]:
    """Let errors of sandboxes be told without a stack."""
    # Where a sandbox begins and ends, the stack shows pytest and lifekit, and nothing of the test.
    try:
        yield
    except (SandboxError, OptionError) as error:
        fail(f"{type(error).__name__}: {error}")
