"""Which event loop the application runs in for a test: that of the test, or of its async fixtures."""

from __future__ import annotations

import inspect
import sys
import unittest
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NoReturn

import pytest

SCOPES = ("function", "class", "module", "package", "session")
WAYS_OUT = {
    "pytest-asyncio": """\
in pytest's ini file (and no other loop_scope in markers):
    asyncio_default_test_loop_scope = "session"
    asyncio_default_fixture_loop_scope = "session\"""",
    "anyio": """\
in conftest.py:
    @pytest.fixture(scope="session")
    def anyio_backend(): ...""",
}


def as_written(config: pytest.Config, lines: str) -> str:
    """Return lines of TOML as the ini file of this run has them."""
    toml = config.inipath is None or config.inipath.suffix == ".toml"
    return lines if toml else lines.replace('"', "")


def fail(text: str) -> NoReturn:
    """End the test with that text alone."""
    raise pytest.fail.Exception(text, pytrace=False) from None


def is_isolated(item: pytest.Item) -> bool:
    """Return whether a test is to run in a sandbox."""
    marker = item.get_closest_marker("lifekit")
    return marker is None or marker.kwargs.get("isolation") != "none"


def asyncio_fixture(scope: str) -> Any:
    """Return what makes fixtures that run in pytest-asyncio's loop of that scope, if it is there."""
    pytest_asyncio: Any = sys.modules.get("pytest_asyncio")
    return None if pytest_asyncio is None else partial(pytest_asyncio.fixture, loop_scope=scope)


def fixture_plugin() -> tuple[ModuleType, Callable[..., None]]:
    """Return a new plugin of fixtures, and what adds a fixture to it."""
    made = ModuleType("lifekit_fixtures")

    def add(name: str, function: Any, scope: Any, make: Any = pytest.fixture) -> None:
        setattr(made, name, make(scope=scope, name=name)(function))

    return made, add


def kind_for(item: Any) -> str:
    """Return which kind of fixture runs the application in the event loop of a test."""
    loops = {
        definition.argname: kind
        for definition in requested(item, *item.fixturenames)
        if (kind := _kind_of_fixture(item, definition)) is not None and _uses_lifekit(item, definition)
    }
    if is_async(item):
        own = _kind_of_test(item)
        _refuse_several_loops(item, {f"the test {item.name}": own, **_described(loops)})
        return own
    _refuse_several_loops(item, _described(loops))
    asks_for_sync_client = any(
        definition.argname == "sync_client" and definition.func.__module__ == _PLUGIN
        for definition in requested(item, *item.fixturenames)
    )
    if loops and asks_for_sync_client:
        fail(IN_TWO_LOOPS.format(fixture=next(iter(loops)), loop=_loop(next(iter(loops.values())))))
    if not loops and not asks_for_sync_client:
        # They may ask by handle.get() for what they don't name in their parameters.
        kinds = {_kind_of_fixture(item, each) for each in requested(item, *item.fixturenames)} - {None}
        if len(kinds) == 1:
            return str(kinds.pop())
    return next(iter(loops.values()), "sync")


def loop_scope_of(kind: str) -> str:
    """Return for how long an event loop of that kind runs."""
    return "session" if kind == "sync" else kind.rpartition("_")[2]


def is_async(item: Any) -> bool:
    """Return whether a test is an async function."""
    function: Any = getattr(item, "obj", None)
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return inspect.iscoroutinefunction(function)


def _kind_of_test(item: Any) -> str:
    if isinstance(getattr(item, "cls", None), type) and issubclass(item.cls, unittest.TestCase):
        fail(
            "unittest runs this test in an event loop of its own, which no fixture reaches. Write, in "
            "asyncSetUp:\n    self.client = await self.enterAsyncContext("
            "lifekit.testing.client(app, sandbox=True))"
        )
    marker = item.get_closest_marker("asyncio")
    if marker is not None and _runs_pytest_asyncio(item):
        if "anyio_backend" in item.fixturenames:
            fail(
                "both pytest-asyncio and AnyIO's plugin run this test, in different event loops. Leave "
                "out one marker; with asyncio_mode = auto, which marks every test, set it to strict"
            )
        scope = marker.kwargs.get("loop_scope") or marker.kwargs.get("scope")
        return f"pytest-asyncio_{scope or item.config.getini('asyncio_default_test_loop_scope')}"
    if "anyio_backend" in item.fixturenames:
        return _kind_of_anyio(item)
    return fail(
        "nothing runs this async test: it wants @pytest.mark.asyncio and pytest-asyncio (with "
        "asyncio_mode = auto in the ini file instead), or @pytest.mark.anyio"
    )


def _kind_of_anyio(item: Any) -> str:
    return f"anyio_{item._fixtureinfo.name2fixturedefs['anyio_backend'][-1].scope}"


def _runs_pytest_asyncio(item: Any) -> bool:
    module = sys.modules.get("pytest_asyncio.plugin")
    return module is not None and bool(item.config.pluginmanager.is_registered(module))


def _kind_of_fixture(item: Any, definition: pytest.FixtureDef[Any]) -> str | None:
    """Return which event loop an async fixture runs in, as its plugin decides it; None for others."""
    function: Any = definition.func
    if not (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)):
        return None
    config = item.config
    if _runs_pytest_asyncio(item):
        mode = config.getoption("asyncio_mode", None) or config.getini("asyncio_mode")
        if mode == "auto" or getattr(function, "_force_asyncio_fixture", False):
            default = config.getini("asyncio_default_fixture_loop_scope")
            default = definition.scope if default == "fixture-scope" else default
            scope = getattr(function, "_loop_scope", None) or default or definition.scope
            return f"pytest-asyncio_{scope}"
    return _kind_of_anyio(item) if "anyio_backend" in item.fixturenames else None


def requested(item: Any, *names: str) -> Iterator[pytest.FixtureDef[Any]]:
    """Yield the fixtures that these names mean for a test, and those that they ask for in turn."""
    waiting, seen = [(name, 1) for name in names], set[tuple[str, int]]()
    while waiting:
        name, level = waiting.pop()
        found = item._fixtureinfo.name2fixturedefs.get(name, ())
        if (name, level) not in seen and level <= len(found):
            seen.add((name, level))
            yield found[-level]
            # One that asks for its own name means the one that it overrides.
            waiting += [(each, level + 1 if each == name else 1) for each in found[-level].argnames]


def _uses_lifekit(item: Any, definition: pytest.FixtureDef[Any]) -> bool:
    asked = requested(item, *definition.argnames)
    return any(each.argname == "_lifekit_place" for each in asked)


def _refuse_several_loops(item: Any, loops: dict[str, str]) -> None:
    if len(set(loops.values())) > 1:
        told = ", ".join(f"{name} in {_loop(kind)}" for name, kind in loops.items())
        lines = as_written(item.config, WAYS_OUT["pytest-asyncio"])
        fail(f"{_SEVERAL_LOOPS}: {told}. Give them the same loop_scope, or {lines}")


def _described(loops: dict[str, str]) -> dict[str, str]:
    return {f"the fixture {name}": kind for name, kind in loops.items()}


def _loop(kind: str) -> str:
    plugin, _, scope = kind.rpartition("_")
    return f"{plugin}'s loop of the {scope}"


WHILE_RUNNING = "this fixture can't be made while a test runs: ask for it in the test's parameters"
_PLUGIN = "lifekit.pytest_plugin"
_SEVERAL_LOOPS = (
    "the application's values belong to one event loop, and what uses them here runs in several"
)
IN_TWO_LOOPS = (
    "sync_client runs the application in a thread's event loop, and the async fixture {fixture} uses "
    "it in {loop}. Make the test async, with client instead of sync_client; or make {fixture} an "
    "ordinary function, which runs async code by sync_client.portal.call(function)."
)
