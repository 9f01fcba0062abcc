"""The pytest plugin: which event loop a test's application runs in, and what is left after any test."""

from __future__ import annotations

import re

import pytest

from .plugin_cases.inner import ANYIO, ASYNCIO, HINT, Inner

pytest_plugins = ["pytester"]


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    return Inner(pytester, monkeypatch)


# -- event loops -----------------------------------------------------------------------------------

TESTS = """
import pytest, pytest_asyncio

clients = []

@pytest_asyncio.fixture{loop}
async def author(client):
    assert (await client.get("/author")).json() == ["author"]
    yield "author"
    assert (await client.get("/bye")).json() == ["author", "a", "bye"]

@pytest.fixture
def early(lifespan):
    lifespan["notes"].lines.append("early")

{mark}
async def test_async_fixtures_are_in_the_block(author, client):
    assert (await client.get("/a")).json() == ["author", "a"]
    client.cookies["taste"] = "bitter"
    clients.append(client)

{mark}
async def test_sync_fixtures_are(early, client, sandbox, lifespan):
    assert (await client.get("/a")).json() == ["early", "a"]
    assert lifespan.block is sandbox
    assert not client.cookies
    assert clients[0].is_closed

{mark}
async def test_nothing_is_left(client):
    assert (await client.get("/a")).json() == ["a"]

class TestClass:
    {mark}
    async def test_one(self, client):
        assert (await client.get("/a")).json() == ["a"]

    {mark}
    async def test_two(self, lifespan):
        assert lifespan["notes"].lines == []
"""


@pytest.mark.parametrize("mode", ["strict", "auto"])
@pytest.mark.parametrize(
    ("scope", "opened"),
    [
        ("function", 5),
        pytest.param("class", 4, marks=pytest.mark.long),
        ("module", 1),
        pytest.param("package", 1, marks=pytest.mark.long),
        ("session", 1),
    ],
)
def test_pytest_asyncio_by_its_settings(inner: Inner, mode: str, scope: str, opened: int) -> None:
    """The application opens once for each loop, whatever the scope and the mode."""
    inner.ini(
        asyncio_mode=mode,
        asyncio_default_test_loop_scope=scope,
        asyncio_default_fixture_loop_scope=scope,
    )
    mark = "@pytest.mark.asyncio" if mode == "strict" else ""
    result = inner.run(*ASYNCIO, test_it=TESTS.format(mark=mark, loop=""))
    result.assert_outcomes(passed=5)
    assert inner.told() == ["open", "close 0"] * opened


@pytest.mark.parametrize(
    "scope", ["class", *(pytest.param(each, marks=pytest.mark.long) for each in ("module", "package"))]
)
def test_pytest_asyncio_by_markers_with_nothing_set(inner: Inner, scope: str) -> None:
    mark, loop = f'@pytest.mark.asyncio(loop_scope="{scope}")', f'(loop_scope="{scope}")'
    inner.run(*ASYNCIO, test_it=TESTS.format(mark=mark, loop=loop)).assert_outcomes(passed=5)
    assert inner.told() == ["open", "close 0"] * (4 if scope == "class" else 1)


MIXED = """
import asyncio, unittest
import pytest, pytest_asyncio
import lifekit.testing
from tests.testing.plugin_cases.memory import app

async def asks(client):
    assert (await client.get("/a")).json() == ["a"]

@pytest.mark.asyncio
async def test_function(client, sandbox, request):
    await asks(client)
    assert str(sandbox.location) == "test_it.py:9 in test_function"
    assert request.getfixturevalue("lifespan").block is sandbox

@pytest.mark.asyncio(loop_scope="session")
async def test_session(client): await asks(client)

@pytest.mark.asyncio(loop_scope="class")
class TestClass:
    async def test_one(self, client): await asks(client)
    async def test_two(self, client): await asks(client)
    @pytest.mark.asyncio(loop_scope="session")
    async def test_session(self, client): await asks(client)

@pytest.fixture
def written(sync_client):
    assert sync_client.get("/written").json() == ["written"]
    yield
    assert sync_client.get("/bye").json() == ["written", "a", "bye"]

def test_sync(written, sync_client, lifespan, sandbox):
    assert sync_client.get("/a").json() == ["written", "a"]
    assert lifespan.block is sandbox
    assert str(sandbox.location) == "test_it.py:31 in test_sync"

def test_sync_again(sync_client):
    assert sync_client.get("/a").json() == ["a"]

@pytest.mark.usefixtures("sandbox")
def test_no_client(lifespan):
    lifespan["notes"].lines.append("a")

class AsyncCase(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.client = await self.enterAsyncContext(lifekit.testing.client(app, sandbox=True))
    async def test_one(self): await asks(self.client)
    async def test_two(self): await asks(self.client)

class SyncCase(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def use_client(self, sync_client):
        self.client = sync_client
    def test_one(self): assert self.client.get("/a").json() == ["a"]
    def test_two(self): assert self.client.get("/a").json() == ["a"]
"""


def test_everything_in_one_run(inner: Inner) -> None:
    """All loops side by side: one application for each, and one for all sync tests."""
    result = inner.run(*ASYNCIO, *ANYIO, test_it=MIXED, test_more=ANYIO_TESTS)
    result.assert_outcomes(passed=16)
    told = inner.told()
    assert set(told) == {"open", "close 0"}
    # function, session, class, sync, two IsolatedAsyncioTestCases, asyncio and trio by AnyIO
    assert told.count("open") == told.count("close 0") == 8


ANYIO_TESTS = """
import pytest
pytestmark = pytest.mark.anyio

@pytest.fixture
async def author(client):
    assert (await client.get("/author")).json() == ["author"]
    yield
    assert (await client.get("/bye")).json() == ["author", "a", "bye"]

async def test_fixtures_are_in_the_block(author, client, lifespan, sandbox):
    assert (await client.get("/a")).json() == ["author", "a"]
    assert lifespan.block is sandbox

async def test_nothing_is_left(client):
    assert (await client.get("/a")).json() == ["a"]
"""
ANYIO_BACKEND = """
import pytest
uvloop = ("asyncio", {{"use_uvloop": True}})
@pytest.fixture(scope="{scope}", params=["asyncio", uvloop, "trio"], ids=str)
def anyio_backend(request): return request.param
"""


@pytest.mark.parametrize(
    ("scope", "opened"), [("", 4), ("function", 12), ("module", 6), ("session", 3)]
)
def test_anyio_on_every_backend(inner: Inner, scope: str, opened: int) -> None:
    """The application lives as long as the fixture anyio_backend, AnyIO's own or the project's."""
    backends = 3 if scope else 2
    files = {"conftest": ANYIO_BACKEND.format(scope=scope)} if scope else {}
    result = inner.run(*ANYIO, **files, test_it=ANYIO_TESTS, test_more=ANYIO_TESTS)
    result.assert_outcomes(passed=4 * backends)
    assert inner.told() == ["open", "close 0"] * opened


def test_what_no_loop_can_be_had_for(inner: Inner) -> None:
    """A fixture that can't work says what to write instead."""
    code = """
        import unittest, pytest
        async def test_nobody(client): ...
        def test_sync(client): ...
        @pytest.mark.asyncio
        async def test_async(sync_client): ...
        @pytest.mark.asyncio
        @pytest.mark.anyio
        async def test_both(client): ...
        @pytest.mark.lifekit(isolation="none")
        def test_none(sandbox): ...
        @pytest.mark.asyncio
        async def test_late(request): request.getfixturevalue("client")
        @pytest.mark.usefixtures("sandbox")
        class AsyncCase(unittest.IsolatedAsyncioTestCase):
            async def test_it(self): ...
        @pytest.mark.asyncio(loop_scope="session")
        async def test_well(client): ...
        """
    result = inner.run(*ASYNCIO, *ANYIO, test_it=code)
    result.assert_outcomes(errors=7, passed=1, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            "nothing runs this async test: it wants @pytest.mark.asyncio *",
            "client is for async tests, *: use sync_client",
            "sync_client would block *: use client, *",
            "both pytest-asyncio and AnyIO's plugin run this test, *",
            'this test is marked isolation="none", *',
            "this fixture can't be made while a test runs: *",
            "    self.client = await self.enterAsyncContext(lifekit.testing.client(app, sandbox=True))",
        ]
    )
    assert "Traceback" not in result.stdout.str()


# -- the ini line and the marker ---------------------------------------------------------------------

ONE = "def test_it(sync_client): assert sync_client.get('/a').json() == ['a']"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("shop.main", "*a module and what the application is called there are expected, such as*"),
        ("shop main:app", "*a module and what the application is called there are expected, such as*"),
        ("shop.main:", "*a module and what the application is called there are expected, such as*"),
    ],
)
def test_an_ini_line_that_can_not_be_read_ends_the_run(inner: Inner, value: str, says: str) -> None:
    inner.ini(value)
    result = inner.run(test_it="def test_it(): ...")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: lifekit_app = {value!r}: {says}"])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "*which application is to be tested? Write it into the ini file:"),
        ("nowhere.main:app", '*lifekit_app = "nowhere.main:app": there is no module nowhere, *'),
        ("own.nowhere:app", '*lifekit_app = "own.nowhere:app": there is no module own.nowhere, *'),
        ("broken:app", '*lifekit_app = "broken:app": importing broken raised ZeroDivisionError*'),
        ("needy:app", "*importing needy raised ModuleNotFoundError(\"No module named 'nowhere'\"*"),
        ("own:missing", "*lifekit_app = \"own:missing\": <module 'own' *> has no attribute 'missing'"),
        ("own:number", '*lifekit_app = "own:number": an ASGI application is expected, not 5'),
        ("own:inside.app", None),
        ("own:make()", None),
    ],
)
def test_the_ini_line_leads_to_the_application(inner: Inner, value: str, says: str | None) -> None:
    """It is found in the root directory; what is wrong with it is told where a test wants it."""
    own = """
        from tests.testing.plugin_cases.memory import app as made
        class inside: app = made
        def make(): return made
        number = 5
        """
    inner.ini(value)
    inner.pytester.mkdir("tests_of_own").joinpath("test_it.py").write_text(ONE)
    result = inner.run(own=own, broken="1 / 0", needy="import nowhere")
    if says is None:
        result.assert_outcomes(passed=1)
    else:
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines([says])


@pytest.mark.parametrize("quote", ["", '"'])
def test_an_ini_file_may_have_quotes_and_is_shown_none(inner: Inner, quote: str) -> None:
    inner.pytester.path.joinpath("pyproject.toml").unlink()
    line = f"lifekit_app = {quote}tests.testing.plugin_cases.memory:app{quote}"
    inner.pytester.makeini(f"[pytest]\n{line}")
    inner.run(test_it=ONE).assert_outcomes(passed=1)
    inner.pytester.makeini("[pytest]")
    result = inner.run(test_it=ONE)
    result.stdout.fnmatch_lines(["*Write it into the ini file:", "*  lifekit_app = shop.main:app"])


def test_a_project_may_make_the_application_itself(inner: Inner) -> None:
    inner.ini(None)
    own = """
        import pytest
        from tests.testing.plugin_cases import memory
        @pytest.fixture(scope="session")
        def lifekit_app(): return memory.app
        """
    inner.run(conftest=own, test_it=ONE).assert_outcomes(passed=1)


def test_without_isolation_it_lasts(inner: Inner) -> None:
    """The marker works on functions, classes and modules, and the nearest one holds."""
    code = """
        import pytest
        pytestmark = pytest.mark.lifekit(isolation="none")
        def test_one(sync_client): assert sync_client.get("/1").json() == ["1"]
        @pytest.mark.lifekit(isolation="rollback")
        def test_two(sync_client): assert sync_client.get("/2").json() == ["1", "2"]
        def test_three(sync_client, lifespan): assert sync_client.get("/3").json() == ["1", "3"]
        @pytest.mark.lifekit
        class TestClass:
            def test_four(self, sync_client): assert sync_client.get("/4").json() == ["1", "3", "4"]
            @pytest.mark.lifekit(isolation="none")
            def test_five(self, sync_client): assert sync_client.get("/5").json() == ["1", "3", "5"]
        """
    inner.run(test_it=code).assert_outcomes(passed=5)
    assert inner.told() == ["open", "close 3"]


def test_a_marker_that_says_nothing_known_is_an_error_of_collection(inner: Inner) -> None:
    code = """
        import unittest, pytest
        @pytest.mark.lifekit({})
        def test_it(): ...
        def test_two(): ...
        """
    for marker in ("isolation='savepoint'", "'none'", "isolate='none'"):
        result = inner.run(test_it=code.format(marker))
        assert result.ret == pytest.ExitCode.INTERRUPTED
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines([f"test_it.py::test_it: the marker is *, not {marker}"])


# -- what fails --------------------------------------------------------------------------------------

TWICE = """
import pytest
async def test_one(client): ...
async def test_two(client): ...
def test_sync(sync_client): ...
"""


@pytest.mark.parametrize("scope", ["function", "session"])
def test_an_application_that_does_not_start_is_tried_once(
    inner: Inner, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    """Every test that wants it says why; another kind of event loop gets its own try."""
    monkeypatch.setenv("FAIL_AT", "start")
    inner.ini(asyncio_mode="auto", asyncio_default_test_loop_scope=scope)
    result = inner.run(*ASYNCIO, test_it=TWICE)
    result.assert_outcomes(errors=3)
    assert inner.told() == ["open"]
    for each in ("test_two", "test_sync"):
        result.stdout.fnmatch_lines(
            [
                f"_* ERROR at setup of {each} _*",
                "StartupError: memory did not start: notes failed",
                "  notes (*memory.py:*): ConnectionError: no notes to be had*",
                "test_it.py::test_one shows where. It was not tried again.",
            ],
            consecutive=True,
        )


def test_an_application_that_does_not_stop_fails_the_run(
    inner: Inner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL_AT", "stop")
    result = inner.run(test_it="def test_one(sync_client): ...\ndef test_two(sync_client): ...")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_two*", "*ConnectionError: the notes would not go"]
    )


def test_a_stray_fails_its_own_test_and_no_other(inner: Inner) -> None:
    code = """
        import pytest
        @pytest.mark.asyncio
        async def test_stray(client): await client.get("/stray")
        @pytest.mark.anyio
        async def test_stray_too(client, anyio_backend): await client.get("/stray")
        @pytest.fixture
        def anyio_backend(): return "trio"
        def test_stray_sync(sync_client): sync_client.get("/stray")
        @pytest.mark.asyncio
        async def test_good(client): assert (await client.get("/a")).json() == ["a"]
        def test_good_sync(sync_client): assert sync_client.get("/a").json() == ["a"]
        """
    result = inner.run(*ASYNCIO, *ANYIO, "-rE", test_it=code)
    result.assert_outcomes(passed=5, errors=3)
    lines = [
        f"ERROR test_it.py::{each} *" for each in ("test_stray", "test_stray_too", "test_stray_sync")
    ]
    result.stdout.fnmatch_lines(lines)
    assert result.outlines.count("SandboxEscapedError: a stray was noted") == 3
    assert not [line for line in result.outlines if line.startswith("E ")], "a stack of pytest's own"


def test_what_was_not_isolated_is_listed_at_the_end(inner: Inner) -> None:
    """Resources that are declared so, once for all processes, and tests that are marked so."""
    app = """
        import sqlite3
        from fastapi import FastAPI
        from lifekit import Registry
        registry = Registry()
        @registry.resource(sandbox=False)
        def lasting(): return sqlite3.connect(":memory:")
        @registry.resource
        def other(): return object()
        app = FastAPI(lifespan=registry.lifespan)
        """
    code = """
        import pytest
        def test_undone(sync_client): pass
        @pytest.mark.lifekit(isolation="none")
        def test_lasting(sync_client): pass
        @pytest.mark.lifekit(isolation="none")
        def test_lasting_too(lifespan): pass
        def test_without(): pass
        """
    inner.ini(lifekit_app="app:app")
    result = inner.run(app=app, test_it=code)
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(
        [
            "=* lifekit =*",
            "not isolated: lasting (app.py:5), which is declared with sandbox=False",
            'not isolated: test_it.py::test_lasting and 1 more, marked isolation="none"',
        ]
    )
    assert str(result.stdout).count("not isolated") == 2


def test_what_is_still_open_at_the_end_is_named(inner: Inner) -> None:
    code = """
        import pytest
        from tests.testing.plugin_cases.memory import registry
        @pytest.mark.asyncio
        async def test_it(client):
            await registry.lifespan().__aenter__()
        """
    result = inner.run(*ASYNCIO, test_it=code)
    result.stdout.fnmatch_lines(
        [
            "=* lifekit =*",
            "Still open when its event loop ended: the lifespan of 'memory' made at *:5 in test_it",
        ]
    )


# -- what it costs -------------------------------------------------------------------------------------

SLOW = """
import time, pytest
from starlette.applications import Starlette
from contextlib import asynccontextmanager
from lifekit import Registry
registry = Registry()
@registry.resource
def slow(): time.sleep(0.03)
app = Starlette(lifespan=registry.lifespan)
"""
FOUR = """
import pytest
{0}
async def test_one(client): ...
{0}
async def test_two(client): ...
{0}
async def test_three(client): ...
{0}
async def test_four(client): ...
"""


def test_a_run_says_what_many_loops_cost_and_what_avoids_it(inner: Inner) -> None:
    inner.ini("slow:app")
    hint = re.compile(HINT)
    files = {"slow": SLOW, "test_it": FOUR.format("@pytest.mark.asyncio")}
    text = inner.run(*ASYNCIO, **files).stdout.str()
    told = hint.search(text)
    assert told is not None
    assert told.groups()[:2] == ("4", "pytest-asyncio")
    assert 0.12 <= float(told[3]) < 60
    settings = dict(re.findall(r'^ +(asyncio_\w+) = "(\w+)"$', text, re.MULTILINE))
    assert len(settings) == 2
    inner.ini("slow:app", **settings)
    result = inner.run(*ASYNCIO, **files)
    result.assert_outcomes(passed=4)
    assert hint.search(result.stdout.str()) is None

    inner.ini("slow:app")
    backend = 'import pytest\n@pytest.fixture\ndef anyio_backend(): return "asyncio"'
    files = {"slow": SLOW, "test_it": FOUR.format("@pytest.mark.anyio")}
    text = inner.run(*ANYIO, **files, conftest=backend).stdout.str()
    told = hint.search(text)
    assert told is not None
    assert told.groups()[:2] == ("4", "anyio")
    assert '    @pytest.fixture(scope="session")\n    def anyio_backend(): ...' in text
    text = inner.run(*ANYIO, **files, conftest=ANYIO_BACKEND.format(scope="session")).stdout.str()
    assert hint.search(text) is None


def test_a_run_that_uses_none_of_it_imports_none_of_it(inner: Inner) -> None:
    code = """
        import sys
        def test_it():
            heavy = {"starlette", "httpx", "httpx2", "trio", "asyncpg", "redis", "fastapi"}
            assert not heavy & sys.modules.keys()
            assert not [each for each in sys.modules if each.startswith("lifekit.testing")]
        """
    inner.run_apart(test_it=code).assert_outcomes(passed=1)


OVERRIDDEN = """
    import pytest, pytest_asyncio
    from tests.testing.plugin_cases.memory import Notes, app, notes, registry

    fake = Notes()

    @{fixture}(scope="{scope}")
    {define} lasting():
        with registry.override(notes, fake):
            yield

    @pytest.fixture(scope="session")
    def lifekit_app(): return app
    """
SEEN = """
    import pytest
    from conftest import fake
    from tests.testing.plugin_cases.memory import notes

    pytestmark = pytest.mark.usefixtures("lasting")

    @pytest.mark.asyncio
    async def test_async(lifespan): assert lifespan[notes] is fake

    def test_sync(sync_client, lifespan): assert lifespan[notes] is fake
    """


@pytest.mark.parametrize("loop", ["function", "module", "session"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_override_of_a_fixture_that_lasts_is_the_applications(
    inner: Inner, loop: str, asynchronous: bool
) -> None:
    fixture = 'pytest_asyncio.fixture(loop_scope="session", scope="session")'
    options = {"scope": "session", "fixture": "pytest.fixture", "define": "def"}
    conftest = OVERRIDDEN.format(**options)
    if asynchronous:
        asynchronously = OVERRIDDEN.replace('@{fixture}(scope="{scope}")', f"@{fixture}")
        conftest = asynchronously.format(define="async def")
    inner.ini(asyncio_default_test_loop_scope=loop, asyncio_default_fixture_loop_scope=loop)
    inner.run(*ASYNCIO, conftest=conftest, test_it=SEEN).assert_outcomes(passed=2)


def test_an_override_of_the_fixture_for_the_application_is_for_all_tests(inner: Inner) -> None:
    conftest = OVERRIDDEN.format(scope="session", fixture="pytest.fixture", define="def").replace(
        "def lifekit_app(): return app",
        "def lifekit_app():\n        with registry.override(notes, fake):\n            yield app",
    )
    code = SEEN.replace('"lasting"', '"lifekit_app"')
    inner.run(*ASYNCIO, conftest=conftest, test_it=code).assert_outcomes(passed=2)


def loops(inner: Inner, scope: str) -> None:
    inner.ini(asyncio_default_test_loop_scope=scope, asyncio_default_fixture_loop_scope=scope)


@pytest.mark.parametrize("loop", ["function", "class", "module"])
def test_an_override_of_a_module_reaches_the_applications_of_modules(inner: Inner, loop: str) -> None:
    """And the next module has none of it, even if the application did not start with it."""
    conftest = OVERRIDDEN.format(scope="module", fixture="pytest.fixture", define="def")
    conftest += """
    @pytest.fixture(scope="module")
    def broken():
        def factory(): raise ValueError("no such fake")
        with registry.override(notes, factory=factory):
            yield
    """
    code = """
        import pytest
        from conftest import fake
        from tests.testing.plugin_cases.memory import notes

        pytestmark = [pytest.mark.asyncio, {mark}]

        async def test_async(lifespan): assert lifespan[notes] {operator} fake
        """
    loops(inner, loop)
    told = inner.run(
        *ASYNCIO,
        conftest=conftest,
        test_a=code.format(mark='pytest.mark.usefixtures("lasting")', operator="is"),
        test_b=code.format(mark='pytest.mark.usefixtures("broken")', operator="is"),
        test_c=code.format(mark="pytest.mark.filterwarnings('error')", operator="is not"),
    )
    told.assert_outcomes(passed=2, errors=1)
    told.stdout.fnmatch_lines("*ERROR*test_b*no such fake*")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("loop", ["session", "package"])
def test_an_override_of_less_than_the_application_is_refused_at_each_test(
    inner: Inner, loop: str, asynchronous: bool
) -> None:
    """Whatever loop it was made in, and with no second error at its end."""
    fixture, define = "pytest.fixture", "def"
    if asynchronous:
        fixture, define = "pytest_asyncio.fixture", "async def"
    loops(inner, loop)
    conftest = OVERRIDDEN.format(scope="module", fixture=fixture, define=define)
    told = inner.run(*ASYNCIO, conftest=conftest, test_it=SEEN)
    told.assert_outcomes(errors=2)
    told.stdout.fnmatch_lines('*notes (*memory.py:*) is open already*with scope "module"*')


def test_an_override_that_begins_after_the_application_is_refused(inner: Inner) -> None:
    conftest = OVERRIDDEN.format(scope="session", fixture="pytest.fixture", define="def")
    first = """
        def test_first(sync_client): ...
        """
    loops(inner, "session")
    told = inner.run(*ASYNCIO, conftest=conftest, test_a=first, test_b=SEEN)
    told.assert_outcomes(passed=2, errors=1)
    told.stdout.fnmatch_lines("*ERROR*test_b*test_sync*")


def test_an_override_that_a_test_does_not_ask_for_is_not_missed(inner: Inner) -> None:
    """Though another test asked for it, with a client of its own, and it lasts."""
    conftest = OVERRIDDEN.format(scope="session", fixture="pytest.fixture", define="def")
    code = """
        from conftest import fake
        from starlette.testclient import TestClient
        from lifekit import testing
        from tests.testing.plugin_cases.memory import app, notes

        def test_first(sync_client): ...

        def test_own(lasting):
            with TestClient(app) as client:
                assert client.app_state["notes"] is fake

        def test_last(lifespan): assert lifespan[notes] is not fake
        """
    inner.run(*ASYNCIO, conftest=conftest, test_it=code).assert_outcomes(passed=3)


def test_an_override_that_is_over_is_not_used_any_more(inner: Inner) -> None:
    conftest = OVERRIDDEN.format(scope="session", fixture="pytest.fixture", define="def")
    conftest = conftest.replace(
        'scope="session")\n    def lasting', 'scope="session", params="xy")\n    def lasting'
    )
    loops(inner, "session")
    code = """
        def test_with_each(lasting, sync_client): ...
        """
    told = inner.run(*ASYNCIO, conftest=conftest, test_it=code)
    told.assert_outcomes(passed=1, errors=1)
    told.stdout.fnmatch_lines("*: this override of notes (*memory.py:*) is over, and the application*")


def test_an_override_of_another_thread_is_its_own(inner: Inner) -> None:
    """Though a fixture that lasts is made meanwhile."""
    conftest = """
        import threading, pytest
        from tests.testing.plugin_cases.memory import Notes, app, notes, registry

        def run(begun, end):
            with registry.override(notes, Notes()):
                begun.set()
                end.wait()

        @pytest.fixture(scope="session", autouse=True)
        def slow():
            begun, end = threading.Event(), threading.Event()
            thread = threading.Thread(target=run, args=(begun, end))
            thread.start()
            begun.wait()
            yield
            end.set()
            thread.join()

        @pytest.fixture(scope="session")
        def lifekit_app(): return app
        """
    code = """
        from lifekit._core.overrides import entered
        from tests.testing.plugin_cases.memory import notes

        def test_sync(sync_client, lifespan):
            assert entered
            assert not any(lifespan[notes] is each.value for each in entered)
        """
    inner.run(conftest=conftest, test_it=code).assert_outcomes(passed=1)


def test_the_innermost_override_wins_whoever_made_it(inner: Inner) -> None:
    conftest = (
        OVERRIDDEN.format(scope="module", fixture="pytest.fixture", define="def")
        + """
    def pytest_configure(config):
        config.outer = registry.override(notes, Notes())
        config.outer.__enter__()

    def pytest_unconfigure(config):
        config.outer.__exit__(None, None, None)
    """
    )
    code = SEEN.replace("def test_sync(sync_client, lifespan): assert lifespan[notes] is fake", "")
    loops(inner, "function")
    inner.run(*ASYNCIO, conftest=conftest, test_it=code).assert_outcomes(passed=1)


def test_an_override_around_one_test_never_reaches_the_others(inner: Inner) -> None:
    code = """
        import pytest
        from lifekit import OverrideError
        from tests.testing.plugin_cases.memory import Notes, notes, registry

        @pytest.fixture
        def other():
            with pytest.raises(OverrideError, match="this override changes nothing"):
                with registry.override(notes, Notes()):
                    yield

        @pytest.mark.asyncio
        async def test_first(other, client): ...

        @pytest.mark.asyncio
        async def test_second(client, lifespan):
            assert "notes" in lifespan
        """
    inner.ini(asyncio_default_test_loop_scope="session", asyncio_default_fixture_loop_scope="session")
    inner.run(*ASYNCIO, test_it=code).assert_outcomes(passed=2)
