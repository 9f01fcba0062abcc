"""Seeds: what several tests find, made once in a sandbox around theirs."""

from __future__ import annotations

import pytest

from lifekit import DeclarationError
from lifekit.testing import seed

from .plugin_cases.inner import ANYIO, ASYNCIO, Inner
from .test_pytest_plugin import loops

pytest_plugins = ["pytester"]


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    return Inner(pytester, monkeypatch)


CONFTEST = """
import asyncio, pytest
from lifekit.testing import seed
from tests.testing.plugin_cases.memory import notes, tell

@pytest.fixture(scope="session")
def made(): return []

@pytest.fixture(scope="session")
def anyio_backend(): return "asyncio"

@seed(scope="session")
async def catalog(lifespan, made):
    asyncio.get_running_loop()
    made.append("catalog")
    assert notes.get() is lifespan["notes"]
    lifespan["notes"].lines.append("catalog")
    return "a catalog"

@seed(scope="session")
def prices(catalog, lifespan, request):
    lifespan["notes"].lines.append("prices")
    yield f"prices of {catalog}"
    tell("prices end with " + " ".join(lifespan["notes"].lines))

@seed(scope="module")
async def users(lifespan):
    lifespan["notes"].lines.append("users")
    yield 3
    tell("users end with " + " ".join(lifespan["notes"].lines))
"""
TESTS = """
import pytest
from lifekit.testing import seed

def lines(lifespan, *expected):
    assert lifespan["notes"].lines == list(expected)
    lifespan["notes"].lines.append("of a test")

{mark}
async def test_first(lifespan, catalog):
    assert catalog == "a catalog"
    lines(lifespan, "catalog")

{mark}
async def test_more(client, users, catalog, lifespan, sandbox):
    assert users == 3
    assert lifespan.block is sandbox
    assert (await client.get("/a")).json() == ["catalog", "users", "a"]

@seed(scope="class")
async def own(request, lifespan, users):
    lifespan["notes"].lines.append(f"{{users}} of {{request.cls.__name__}}")

class TestClass:
    {mark}
    async def test_in_class(self, own, lifespan): lines(lifespan, "catalog", "users", "3 of TestClass")

    {mark}
    async def test_one_that_asks_for_none_finds_what_is_there(self, lifespan):
        lines(lifespan, "catalog", "users", "3 of TestClass")

{mark}
@pytest.mark.usefixtures("users")
async def test_after_the_class(lifespan): lines(lifespan, "catalog", "users")

{mark}
async def test_one_that_outlasts_what_is_open(prices, lifespan):
    assert prices == "prices of a catalog"
    lines(lifespan, "catalog", "prices")

{mark}
async def test_what_it_outlasts_is_made_anew(users, made, lifespan):
    lines(lifespan, "catalog", "prices", "users")
    assert made == ["catalog"]
"""


@pytest.mark.parametrize("plugin", ["strict", "auto", "anyio"])
def test_each_test_finds_what_a_seed_made_and_none_spoils_it(inner: Inner, plugin: str) -> None:
    """For as long as its scope, in the sandboxes of those that last longer."""
    mark = {"strict": "@pytest.mark.asyncio", "auto": "", "anyio": "@pytest.mark.anyio"}[plugin]
    if plugin != "anyio":
        inner.ini(
            asyncio_mode=plugin,
            asyncio_default_test_loop_scope="session",
            asyncio_default_fixture_loop_scope="session",
        )
    args = ANYIO if plugin == "anyio" else ASYNCIO
    result = inner.run(*args, conftest=CONFTEST, test_it=TESTS.format(mark=mark))
    result.assert_outcomes(passed=7)
    assert inner.told() == [
        "open",
        "users end with catalog users",
        "users end with catalog prices users",
        "prices end with catalog prices",
        "close 0",
    ]


KINDS = """
import pytest
from tests.testing.plugin_cases.memory import kept
pytestmark = pytest.mark.filterwarnings("error")

@pytest.mark.asyncio
async def test_async(catalog, lifespan, made):
    assert lifespan["notes"].lines == ["catalog"]
    assert len(made) == 1

def test_sync(sync_client, catalog, made):
    assert sync_client.get("/a").json() == ["catalog", "a"]
    assert len(made) == 2

def test_sync_that_asks_for_the_seed_alone(prices):
    assert kept == ["catalog", "prices"]
    kept.append("undone")

def test_without_a_client(lifespan):
    assert lifespan["notes"].lines == ["catalog", "prices"]

@pytest.mark.lifekit(isolation="none")
def test_that_lasts(lifespan):
    assert kept == []

@pytest.mark.lifekit(isolation="none")
def test_that_lasts_and_asks(prices): ...

def test_that_asks_too_late(sync_client, request):
    request.getfixturevalue("users")

def test_after_it(users, prices, made):
    assert kept == ["catalog", "prices", "users"]
    assert len(made) == 3
"""


def test_the_application_that_a_test_has_is_the_one_that_is_seeded(inner: Inner) -> None:
    """That of a sync test is another one; and a test that runs without a sandbox finds none."""
    loops(inner, "session")
    result = inner.run(*ASYNCIO, conftest=CONFTEST, test_it=KINDS)
    result.assert_outcomes(passed=6, errors=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            '*this test is marked isolation="none", and what the seed * makes*',
            "*can't be made while a test runs: ask for it in the test's parameters*",
        ]
    )


BROKEN = """
import pytest
from lifekit.testing import seed

@seed(scope="module")
async def broken(lifespan):
    lifespan["notes"].lines.append("half")
    raise ZeroDivisionError("no seed")

@seed(scope="module")
def stray(lifespan):
    lifespan["notes"].lines.append("stray")

@pytest.mark.asyncio(loop_scope="module")
async def test_broken(broken): ...

@pytest.mark.asyncio(loop_scope="module")
async def test_again(broken, lifespan): ...

@pytest.mark.asyncio(loop_scope="module")
async def test_nothing_is_left(lifespan):
    assert lifespan["notes"].lines == []

@pytest.mark.asyncio(loop_scope="module")
async def test_last(stray, lifespan):
    lifespan["notes"].lines.remove("stray")
"""
SHORT = """
import pytest
from lifekit.testing import seed

@seed(scope="session")
async def longer(lifespan): ...

@pytest.mark.asyncio
async def test_short(longer): ...

@pytest.mark.asyncio(loop_scope="session")
async def test_long(longer): ...
"""


def test_errors_of_seeds_are_those_of_their_fixtures(inner: Inner) -> None:
    result = inner.run(*ASYNCIO, test_it=BROKEN, test_short=SHORT)
    result.assert_outcomes(passed=3, errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "*ERROR at setup of test_broken*",
            "E *ZeroDivisionError: no seed",
            "*ERROR at teardown of test_last*",
            "*SandboxEscapedError: a stray was noted*",
            '*the seed longer has the scope "session", and * this test lasts for the function alone*',
            '*asyncio_default_test_loop_scope = "session"',
        ]
    )


@pytest.mark.long
def test_workers_of_xdist_have_seeds_of_their_own(inner: Inner) -> None:
    loops(inner, "session")
    tests = TESTS.format(mark="@pytest.mark.asyncio")
    result = inner.run_apart(
        *ASYNCIO, "-p", "xdist", "-n", "2", "--dist", "loadfile", "--setup-show",
        conftest=CONFTEST, test_it=tests, test_other=tests,
    )  # fmt: skip
    result.assert_outcomes(passed=14)


def test_a_seed_of_one_test_alone_is_refused() -> None:
    with pytest.raises(DeclarationError, match="not 'function'"):
        seed(scope="function")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
