"""The pytest plugin: clients of the application as fixtures, and each test in a sandbox.

It imports what it needs when the first test asks for one of its fixtures.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from threading import get_ident
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from starlette.testclient import TestClient

    from ._core.block import Block
    from ._core.lifespan import Lifespan
    from ._core.overrides import Override
    from ._core.requests import ASGIApp
    from .testing._pytest import Account, Place, Run

_INI = "lifekit_app"
_ISOLATIONS = ("rollback", "none")
_MARKER = 'lifekit(isolation="rollback"): undo what the test does to the application\'s resources, or, \
with isolation="none", let it last.'


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the ini line."""
    parser.addini(
        "lifekit_workers", "whether the application's workers run in tests", type="bool", default=True
    )
    parser.addini(_INI, 'the ASGI application that is tested, such as "shop.main:app"')


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and read the ini line as far as that needs no import."""
    config.addinivalue_line("markers", _MARKER)
    value = _named(config)
    module, _, attribute = value.removesuffix("()").partition(":")
    if value and not all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
        raise pytest.UsageError(
            f"{_INI} = {value!r}: a module and what the application is called there are expected, such "
            'as "shop.main:app", or "shop.main:create_app()" for what a function returns'
        )


def _named(config: pytest.Config) -> str:
    return str(config.getini(_INI)).strip("\"'")  # as in TOML, where an ini file wants no quotes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Refuse markers that say nothing known, where pytest collects the test."""
    _check_marker(metafunc.definition)


def _check_marker(item: pytest.Item) -> None:
    for marker in item.iter_markers("lifekit"):
        isolation = marker.kwargs.get("isolation", "rollback")
        odd = set(marker.kwargs) - {"isolation", "workers"}
        odd_workers = not isinstance(marker.kwargs.get("workers", True), bool)
        if marker.args or odd or isolation not in _ISOLATIONS or odd_workers:
            known = " or ".join(f'@pytest.mark.lifekit(isolation="{each}")' for each in _ISOLATIONS)
            known += ", with workers=False or without it"
            said = [*map(repr, marker.args), *(f"{k}={v!r}" for k, v in marker.kwargs.items())]
            text = f"{item.nodeid}: the marker is {known}, not {', '.join(said)}"
            pytest.fail(text, pytrace=False)


# -- fixtures ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lifekit_app(pytestconfig: pytest.Config) -> ASGIApp:
    """The application that `lifekit_app` in the ini file names.

    A fixture of the same name, of any scope, takes its place for the tests that see it: in a
    conftest.py for those of its folder, in a module or a class for those there. The application is open
    for as long as the fixture lasts, and as the event loop of the tests does.
    """
    from .testing._pytest import load

    return load(_named(pytestconfig), pytestconfig)


@pytest.fixture(scope="session")
def lifekit_client_options() -> dict[str, Any]:
    """Options for `client` and `sync_client`: a fixture of the same name, of any scope, says them.

    A dict: ``base_url``, ``headers``, ``cookies`` and what else httpx's ``AsyncClient`` or Starlette's
    ``TestClient`` takes; each client gets what it knows. ``client_class`` is the class of `client`,
    ``sync_client_class`` that of `sync_client`.
    """
    return {}


@pytest.fixture
def client(_lifekit_place: Place, lifekit_client_options: dict[str, Any]) -> AsyncClient:
    """A client of the application, for an async test; it runs in that test's event loop."""
    return _lifekit_place.client(lifekit_client_options)


@pytest.fixture
def sync_client(_lifekit_place: Place, lifekit_client_options: dict[str, Any]) -> TestClient:
    """Starlette's ``TestClient`` of the application, for a sync test; it runs in a thread."""
    return _lifekit_place.sync_client(lifekit_client_options)


@pytest.fixture
def lifespan(_lifekit_place: Place) -> Lifespan:
    """The application's running lifespan.

    In a sync test it is the one that `sync_client` talks to; where async fixtures of such a test use
    it, it runs in their event loop.
    """
    return _lifekit_place.lifespan()


@pytest.fixture
def sandbox(_lifekit_place: Place) -> Block:
    """The block at whose end everything is undone that the test did to the lifespan's values."""
    return _lifekit_place.sandbox()


@pytest.fixture
def _lifekit_place(request: pytest.FixtureRequest, lifekit_app: ASGIApp, _lifekit_run: Run) -> Place:
    """Where the application runs for this test, in the block of this test."""
    from .testing._pytest import place_of

    _check_marker(request.node)  # of a test of unittest's, which is collected otherwise
    return place_of(request, _lifekit_run)


@pytest.fixture(scope="session")
def _lifekit_run(pytestconfig: pytest.Config) -> Run:
    """What is known of this run."""
    from .testing import _pytest

    run = pytestconfig.stash[_KEY] = _pytest.Run()
    pytestconfig.pluginmanager.register(_pytest.fixtures(run), "lifekit-fixtures")
    return run


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let a test that asks for seeds be in a sandbox, and end seeds that it can't be with."""
    module: Any = sys.modules.get("lifekit.testing._seeds")
    if module is not None:
        module.prepare(item, item.config.stash.get(_KEY, None))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any],
) -> Generator[None, object, object]:
    """Note which overrides are made by a fixture that lasts, as the application may."""
    __tracebackhide__ = True
    if fixturedef.scope == "function":
        return (yield)
    before = _entered_here()
    made = yield
    for override in _entered_here() - before:
        if override.fixture is None:  # else it is that of one that this asked for
            override.fixture = fixturedef
    return made


def _entered_here() -> set[Override]:
    module = sys.modules.get("lifekit._core.overrides")
    entered: dict[Override, int] = {} if module is None else module.entered.copy()
    return {override for override, thread in entered.items() if thread == get_ident()}


# -- the end of the run ------------------------------------------------------------------------

_KEY: pytest.StashKey[Run] = pytest.StashKey()
_WORKERS: pytest.StashKey[list[Account]] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    """Tell the process that pytest-xdist reports from what this worker has to say."""
    done = yield  # until the fixtures are gone
    run = session.config.stash.get(_KEY, None)
    if run is not None:
        output = getattr(session.config, "workeroutput", None)
        if output is None:
            _said(session.config).append(run.account())
        else:
            output["lifekit"] = run.account()
    return done


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear what a worker of pytest-xdist has to say."""
    told = getattr(node, "workeroutput", {}).get("lifekit")
    if told is not None:
        _said(node.config).append(told)


def _said(config: pytest.Config) -> list[Account]:
    return config.stash.setdefault(_WORKERS, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what would make the run faster, and what is open still."""
    accounts = _said(config)
    if accounts:
        from .testing._pytest import summary

        for number, line in enumerate(summary(accounts, config)):
            if not number:
                terminalreporter.section("lifekit")
            terminalreporter.line(line)
