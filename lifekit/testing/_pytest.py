"""Where the application runs for a test: what the pytest plugin imports when a test needs it.

A test's application runs in that test's own event loop. That loop is the async plugin's, so there are
fixtures for each plugin and each scope that its loops may have, and `kind_for` picks. The application
is open for as long as that loop and the fixture `lifekit_app` last: a fixture opens it, whose scope is
the shorter of the two, and each `lifekit_app` of a project gets its own.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Collection,
    Generator,
    Iterable,
    Iterator,
)
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypedDict, cast

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from lifekit._core.block import Block
from lifekit._core.lifespan import Lifespan
from lifekit._core.overrides import Override, entered, overrides
from lifekit._util.asgi import ASGIApp
from lifekit._util.loops import running_loop

from ._app import Running, lifespan_of, running
from ._client import client_of, known_options, sandbox_in, sync_client_of
from ._loops import (
    IN_TWO_LOOPS,
    SCOPES,
    WAYS_OUT,
    WHILE_RUNNING,
    as_written,
    asyncio_fixture,
    fail,
    fixture_plugin,
    is_async,
    is_isolated,
    kind_for,
    loop_scope_of,
    requested,
)
from ._seeds import Seeds, locate, readable

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from starlette.testclient import TestClient

WORTH_SAYING = 0.1
"""Seconds for which the application has to have been opened more than once."""


def load(value: str, config: pytest.Config) -> ASGIApp:
    """Return the application that the ini line's *value* names.

    Raises:
        UsageError: Importing it failed; how is the cause.
        Failed: There is no such thing.
    """
    if not value:
        line = as_written(config, 'lifekit_app = "shop.main:app"')
        fail(
            f"which application is to be tested? Write it into the ini file:\n    {line}\n"
            "or let a fixture of conftest.py that is called lifekit_app return it."
        )
    name, _, path = value.removesuffix("()").partition(":")
    root = str(config.rootpath)
    if root not in sys.path:
        sys.path.append(root)
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise pytest.UsageError(_wrong(value, f"importing {name} raised {error!r}")) from error
        hint = 'Does it need a line like pythonpath = ["src"]?'
        why = f"there is no module {error.name}, neither in {root} nor elsewhere on sys.path. {hint}"
        fail(_wrong(value, why))
    except Exception as error:
        raise pytest.UsageError(_wrong(value, f"importing {name} raised {error!r}")) from error
    for part in path.split("."):
        if not hasattr(found, part):
            fail(_wrong(value, f"{found!r} has no attribute {part!r}"))
        found = getattr(found, part)
    app: Any = found() if value.endswith("()") else found
    if not callable(app):
        fail(_wrong(value, f"an ASGI application is expected, not {app!r}"))
    return cast(ASGIApp, app)


def _wrong(value: str, why: str) -> str:
    return f'lifekit_app = "{value}": {why}'


def shorter(*scopes: str) -> Any:
    """Return the narrowest of some scopes."""
    return min(scopes, key=SCOPES.index)


def _lasting(scope: str) -> str:
    """Return for how long an application with that scope may run: a package's outlasts the package."""
    return "session" if scope == "package" else scope


def _overrides_for(app: AppFixture) -> tuple[Override, ...]:
    """Return those that last as long as the application: one test's must not serve the others."""
    here = overrides.get() if app.scope == "function" else ()
    enough = SCOPES[SCOPES.index(_lasting(app.scope)) :]

    def holds(override: Override) -> bool:
        by = override.fixture
        if by is None:
            return override in here
        if by.argname == "lifekit_app" and by not in app.definitions:
            return False  # that of another application
        return override in here or by.scope in enough

    return tuple(each for each in [*entered] if holds(each))  # a copy: other threads may change it


def _told(text: str, override: Override, app: AppFixture) -> str:
    name, declared = override.resource.name, override.resource.location
    scopes = {"scope": _lasting(app.scope), "fixture": getattr(override.fixture, "scope", "")}
    return f"{override.location}: {text.format(name=name, declared=declared, **scopes)}"


_NOT_YET = (
    "{name} ({declared}) is open already, in the application that lasts for this test's {scope}, and "
    'this override changes nothing. It is that of a fixture with scope "{fixture}". One with scope '
    '"{scope}" that lifekit_app asks for is there before the application. For less write, in a fixture '
    "of the test's, `async with lifespan.override({name}, …):`."
)
_OVER = (
    "this override of {name} ({declared}) is over, and the application that lasts for this test's "
    "{scope} was opened with it. A fixture with params= ends with each of them: write "
    "`async with lifespan.override({name}, …):` there, in a fixture of the test's."
)


class Place:
    """Where the application runs for one test."""

    def __init__(
        self, item: pytest.Item, served: Running, portal: BlockingPortal | None = None
    ) -> None:
        self._item = item
        self._served = served
        self._portal = portal
        self.clients = ExitStack()
        self.async_clients = AsyncExitStack()

    def client(self, options: dict[str, Any]) -> AsyncClient:
        """Return a client for the test's loop."""
        asked = cast("Any", self._item)._fixtureinfo.argnames
        if self._portal is not None or ("client" in asked and not is_async(self._item)):
            fail("client is for async tests, and this one is an ordinary function: use sync_client")
        with readable():
            made = client_of(self._served, **known_options(options, "client"))
        self.async_clients.push_async_callback(made.aclose)
        return made

    def sync_client(self, options: dict[str, Any]) -> TestClient:
        """Return a client for the test's thread."""
        if self._portal is None and not is_async(self._item):
            fail(IN_TWO_LOOPS.format(fixture="of this test", loop="its own"))
        if self._portal is None:
            fail(
                "sync_client would block the event loop that this async test runs in: use client, or "
                "make the test an ordinary function"
            )
        with readable():
            known = known_options(options, "sync_client")
        return self.clients.enter_context(sync_client_of(self._served, self._portal, **known))

    def lifespan(self) -> Lifespan:
        """Return the lifespan of lifekit's that the application opened first."""
        return lifespan_of(self._served)

    def sandbox(self) -> Block:
        """Return the block of that lifespan."""
        block = self.lifespan().block
        if block is None:
            fail('this test is marked isolation="none", which leaves no sandbox to be had')
        return block


@asynccontextmanager
async def place(run: Run, item: pytest.Item, served: Running) -> AsyncGenerator[Place]:
    """Give a test its place, in its own event loop; how that ends is told by *run*."""
    made, ending = Place(item, served), AsyncExitStack()
    if is_isolated(item):
        ending.enter_context(run.seeds.around(served))
        await ending.enter_async_context(served.sandbox(workers=_works(item)))
        locate(getattr(item, "obj", None), served)
    ending.push_async_exit(made.async_clients)
    yield made
    try:
        await ending.aclose()
    except Exception as error:
        # Raised here, it would keep pytest-asyncio from taking the block out of the main context.
        run.escaped = error


@contextmanager
def sync_place(
    run: Run, item: pytest.Item, served: Running, portal: BlockingPortal
) -> Generator[Place]:
    """Give a test its place, in the event loop of *portal*."""
    made = Place(item, served, portal)
    with ExitStack() as ending:
        ending.enter_context(readable())
        if is_isolated(item):
            ending.enter_context(run.seeds.around(served))
            ending.enter_context(sandbox_in(portal, served, _works(item)))
            locate(getattr(item, "obj", None), served)
        ending.enter_context(made.clients)
        yield made


def _works(item: pytest.Item) -> bool:
    for marker in item.iter_markers("lifekit"):  # the nearest first
        if "workers" in marker.kwargs:
            return bool(marker.kwargs["workers"])
    return bool(item.config.getini("lifekit_workers"))


# -- what a run is told of at its end -------------------------------------------------------------


class Account(TypedDict):
    """What one process has to say; plain data, for pytest-xdist carries it."""

    costs: dict[str, tuple[int, float]]
    """By kind of loop: how many times the application was opened, and the seconds that took."""
    left: list[str]
    not_isolated: list[str]
    """Resources that are declared with ``sandbox=False``."""
    lasting: list[str]
    """Tests that are marked ``isolation="none"``."""


@dataclass(eq=False)
class AppFixture:
    """A fixture that opens an application in one kind of event loop."""

    name: str
    kind: str
    definitions: list[pytest.FixtureDef[Any]]
    """Those of `lifekit_app` that it is made by: the nearest, and those that this one asks for."""

    @property
    def scope(self) -> Any:
        """Return for how long it runs."""
        return shorter(self.definitions[0].scope, self.loop_scope)

    @property
    def loop_scope(self) -> str:
        """Return for how long its event loop runs."""
        return loop_scope_of(self.kind)


class Run:
    """One run of pytest, in one process."""

    def __init__(self) -> None:
        self._costs: dict[str, tuple[int, float]] = {}
        self._apps: dict[object, AppFixture] = {}
        self._failed: dict[object, tuple[ASGIApp, Exception]] = {}
        self._used: dict[Running, tuple[Override, ...]] = {}
        self._told: list[tuple[Exception, str]] = []
        self._left: list[Lifespan] = []
        self.seeds = Seeds(self)
        self._not_isolated: dict[str, None] = {}
        self.lasting: dict[str, None] = {}
        """The tests that nothing undoes."""
        self.escaped: Exception | None = None
        self.asked: Any = None
        """The test whose place is made next, and what its fixture for the application gave."""

    def app_fixture(self, request: Any, kind: str) -> AppFixture:
        """Return the fixture that opens this test's `lifekit_app` in that kind of loop."""
        found = request._get_active_fixturedef("lifekit_app")
        known = self._apps.get((found, kind))
        if known is None:
            number = len(self._apps)
            known = AppFixture(f"_lifekit_app_{kind}_{number}", kind, _overridden_by(request, found))
            self._apps[found, kind] = known
            plugin = app_fixtures(self, known)
            request.config.pluginmanager.register(plugin, f"lifekit-fixtures-{number}")
        return known

    @asynccontextmanager
    async def opened(self, app: ASGIApp, fixture: AppFixture) -> AsyncGenerator[Running]:
        """Run the application in this event loop.

        One that did not start in a loop of this type is not tried again: it may have taken long.
        """
        loop = running_loop()
        here, used = overrides.get(), _overrides_for(fixture)
        attempt = fixture.definitions[0], type(loop), used
        tried, failure = self._failed.get(attempt, (None, None))
        if failure is not None and tried is app:
            raise failure
        # An application that its own fixture ends is opened as often in whatever loop.
        kind = fixture.kind if fixture.scope != fixture.definitions[0].scope else ""
        service = running(app, sandboxed=True)
        overrides.set(used)
        try:
            with self._timed(kind, 1):
                served = await service.__aenter__()
        except Exception as error:
            self._failed[attempt] = app, error
            raise
        finally:
            overrides.set(here)
        self._used[served] = used
        for lifespan in served.lifespans:
            for each in lifespan._plan.resources:  # pyright: ignore[reportPrivateUsage]
                if not each.options.sandbox:
                    self._not_isolated[f"{each.name} ({each.location})"] = None
        registries = {each.registry for each in served.lifespans}
        yield served
        del self._used[served]
        with self._timed(kind, 0):
            await service.__aexit__(None, None, None)
        for registry in registries:
            self._left += registry.running.get(loop, ())

    def check_overrides(
        self, app: AppFixture, served: Running, fixtures: Collection[pytest.FixtureDef[Any]]
    ) -> None:
        """Refuse an application without an override of these fixtures, or with one that is over."""
        used = self._used[served]
        asked = [each for each in [*entered] if each.fixture in fixtures]
        if not (used or asked):
            return
        live = {resource for lifespan in served.lifespans for resource in lifespan.live}
        late = [each for each in asked if each.resource in live and each not in used]
        for override in late:
            override.used = True  # so that its end does not say it again
        for override in used:
            if override.resource in live and override not in entered:
                fail(_told(_OVER, override, app))
        for override in late:
            fail(_told(_NOT_YET, override, app))

    @contextmanager
    def told_once(self, test: str) -> Generator[None]:
        """Let an error through that no test has told of, and the text of any other."""
        try:
            yield
        except Exception as error:
            first = next((first for told, first in self._told if told is error), None)
            if first is None:
                self._told.append((error, test))
                raise
            fail(f"{type(error).__name__}: {error}\n{first} shows where. It was not tried again.")

    def leave(self) -> None:
        """Raise what the end of the last test's block raised."""
        self.asked = None
        escaped, self.escaped = self.escaped, None
        if escaped is not None:
            with readable():
                raise escaped

    @contextmanager
    def _timed(self, kind: str, times: int) -> Generator[None]:
        begun = perf_counter()
        try:
            yield
        finally:
            count, seconds = self._costs.get(kind, (0, 0.0))
            self._costs[kind] = (count + times, seconds + perf_counter() - begun)

    def account(self) -> Account:
        """Return what is to be said when all fixtures are gone."""
        left = [
            f"the lifespan of {each.registry.name!r} made at {each.location}"
            for each in self._left
            if not each._left  # pyright: ignore[reportPrivateUsage]
        ]
        return {
            "costs": self._costs,
            "left": left,
            "not_isolated": [*self._not_isolated],
            "lasting": [*self.lasting],
        }


def summary(accounts: Iterable[Account], config: pytest.Config) -> Iterator[str]:
    """Yield the lines in which a run ends."""
    told = list(accounts)
    for plugin, way_out in WAYS_OUT.items():
        costs = [
            cost
            for account in told
            for kind, cost in account["costs"].items()
            if kind.startswith(plugin) and cost[0] > 1
        ]
        times, seconds = sum(count for count, _ in costs), sum(each for _, each in costs)
        if seconds >= WORTH_SAYING:
            if plugin == "pytest-asyncio":
                way_out = as_written(config, way_out)
            yield (
                f"The application was opened {times} times, once for each event loop of {plugin}'s, "
                f"which took {seconds:.2f} s.\nWith one loop it opens once; {way_out}"
            )
    named = dict.fromkeys(each for account in told for each in account["not_isolated"])
    yield from (f"not isolated: {each}, which is declared with sandbox=False" for each in named)
    tests = [each for account in told for each in account["lasting"]]
    if tests:
        more = f" and {len(tests) - 1} more" if tests[1:] else ""
        yield f'not isolated: {tests[0]}{more}, marked isolation="none"'
    for account in told:
        yield from (f"Still open when its event loop ended: {each}" for each in account["left"])


# -- the fixtures ---------------------------------------------------------------------------------


def place_of(request: pytest.FixtureRequest, run: Run) -> Place:
    """Return the place that the fixtures of the right kind make for a test."""
    if asyncio._get_running_loop() is not None:
        fail(WHILE_RUNNING)
    with readable():
        kind = kind_for(request.node)
        fixture = run.app_fixture(request, kind)
        with run.told_once(request.node.nodeid):
            run.asked = request.node, request.getfixturevalue(fixture.name)
        app: Any = run.asked[1]
        asked = [*requested(request.node, *request.fixturenames), *fixture.definitions]
        run.check_overrides(fixture, app[0] if kind == "sync" else app, asked)
        if not is_isolated(request.node):
            run.lasting[request.node.nodeid] = None
        request.node.addfinalizer(run.leave)  # after the place's own, which is added next
        made: Place = request.getfixturevalue(f"_lifekit_place_{kind}")
    return made


def _overridden_by(request: Any, definition: pytest.FixtureDef[Any]) -> list[pytest.FixtureDef[Any]]:
    """Return a fixture, and those of the same name that it asks for, so that it overrides them."""
    known: Any = request._arg2fixturedefs.get(definition.argname, [definition])
    made = [definition]
    for outer in reversed(known[: known.index(definition)]):
        if definition.argname not in made[-1].argnames:
            break
        made.append(outer)
    return made


def fixtures(run: Run) -> ModuleType:
    """Return the fixtures that make a test's place, for all kinds of loops, as a plugin."""
    made, add = fixture_plugin()
    add("_lifekit_place_sync", _sync_place(run), "function")
    for scope in SCOPES:
        add(f"_lifekit_place_anyio_{scope}", _anyio_place(run), "function")
        if (make := asyncio_fixture(scope)) is not None:
            add(f"_lifekit_place_pytest-asyncio_{scope}", _asyncio_place(run), "function", make)
    return made


def app_fixtures(run: Run, fixture: AppFixture) -> ModuleType:
    """Return the fixture that opens an application, as a plugin."""
    made, add = fixture_plugin()
    if fixture.kind == "sync":
        add(fixture.name, _sync_app(run, fixture), fixture.scope)
    elif fixture.kind.startswith("anyio"):
        add(fixture.name, _anyio_app(run, fixture), fixture.scope)
    else:
        make = asyncio_fixture(fixture.loop_scope)
        add(fixture.name, _asyncio_app(run, fixture), fixture.scope, make)
    return made


def _sync_app(run: Run, fixture: AppFixture) -> Any:
    def app(lifekit_app: ASGIApp) -> Iterator[tuple[Running, BlockingPortal]]:
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(run.opened(lifekit_app, fixture)) as served,
        ):
            yield served, portal

    return app


def _sync_place(run: Run) -> Any:
    def function() -> Iterator[Place]:
        item, (served, portal) = run.asked
        with sync_place(run, item, served, portal) as made:
            yield made

    return function


def _anyio_app(run: Run, fixture: AppFixture) -> Any:
    async def app(lifekit_app: ASGIApp, anyio_backend: object) -> AsyncIterator[Running]:
        async with run.opened(lifekit_app, fixture) as served:
            yield served

    return app


def _asyncio_app(run: Run, fixture: AppFixture) -> Any:
    async def app(lifekit_app: ASGIApp) -> AsyncIterator[Running]:
        async with run.opened(lifekit_app, fixture) as served:
            yield served

    return app


def _anyio_place(run: Run) -> Any:
    async def function(anyio_backend: object) -> AsyncIterator[Place]:
        async with place(run, *run.asked) as made:
            yield made

    return function


def _asyncio_place(run: Run) -> Any:
    async def function() -> AsyncIterator[Place]:
        async with place(run, *run.asked) as made:
            yield made

    return function
