"""The pytest plugin: which application a test talks to, in which loop, and with which options."""

from __future__ import annotations

from textwrap import dedent

import pytest

from .plugin_cases.inner import ANYIO, ASYNCIO, Inner

pytest_plugins = ["pytester"]


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    return Inner(pytester, monkeypatch)


def write(inner: Inner, **files: str) -> None:
    """Write Python files into folders: a__test_one is a/test_one.py."""
    for name, text in files.items():
        path = inner.pytester.path.joinpath(*f"{name}.py".split("__", 1))
        path.parent.mkdir(exist_ok=True)
        path.write_text(dedent(text))


# -- several applications --------------------------------------------------------------------------

SERVICES = """
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from lifekit import Registry
    from tests.testing.plugin_cases.memory import tell

    def make(name):
        registry = Registry(name)
        @registry.resource
        async def who():
            tell(f"+{name}")
            yield name
            tell(f"-{name}")
        async def get(request): return PlainTextResponse(who.get())
        return Starlette(lifespan=registry.lifespan, routes=[Route("/", get)])
    """
OWN = """
    import pytest, services
    @pytest.fixture(scope="{scope}")
    def lifekit_app(): yield services.make("{name}")
    """
ASKS = """
    async def test_async(client): assert (await client.get("/")).text == "{name}"
    def test_sync(sync_client): assert sync_client.get("/").text == "{name}"
    """
MANY = """
    import pytest, services
    class TestOwn:
        @pytest.fixture(params=["x", "y"])
        def lifekit_app(self, request): return services.make(request.param)
        async def test_async(self, client, request):
            assert (await client.get("/")).text == request.node.callspec.params["lifekit_app"]
    """


@pytest.mark.parametrize("loop", ["session", "function"])
def test_the_nearest_application_is_tested_for_as_long_as_its_fixture_and_its_loop(
    inner: Inner, loop: str
) -> None:
    inner.ini(
        None,
        pythonpath=".",
        asyncio_mode="auto",
        asyncio_default_test_loop_scope=loop,
        asyncio_default_fixture_loop_scope=loop,
    )
    write(
        inner,
        a__conftest=OWN.format(scope="session", name="a"),
        a__test_one=ASKS.format(name="a"),
        a__test_two=ASKS.format(name="a") + MANY,
        b__conftest=OWN.format(scope="module", name="b"),
        b__test_one=ASKS.format(name="b"),
        b__test_two=ASKS.format(name="b"),
        b__test_own=ASKS.format(name="own") + OWN.format(scope="function", name="own"),
    )
    result = inner.run(*ASYNCIO, "--import-mode=importlib", services=SERVICES)
    result.assert_outcomes(passed=12)
    told = inner.told()
    lasts = {"+a": 2, "+b": 4} if loop == "session" else {"+a": 3, "+b": 4}
    assert {line: told.count(line) for line in ("+a", "+b")} == lasts
    assert told.count("-a") == told.count("+a")
    for name, times in {"own": 2, "x": 1, "y": 1}.items():
        at = [place for place, line in enumerate(told) if line == f"+{name}"]
        assert len(at) == times
        assert [told[place + 1] for place in at] == [f"-{name}"] * times
    first = told.index("+b"), len(told) - 1 - told[::-1].index("+b")
    assert told[slice(*first)].count("-b") >= 2  # that of one module has ended before the next begins


def test_an_override_of_one_application_is_not_that_of_another(inner: Inner) -> None:
    """Though both are of one registry, and the fixture of the first lasts."""
    conftest = """
        import pytest
        from tests.testing.plugin_cases.memory import Notes, app, notes, registry
        fake = Notes()
        @pytest.fixture(scope="session")
        def lifekit_app():
            with registry.override(notes, fake):
                yield app
        """
    one = """
        from conftest import fake
        from tests.testing.plugin_cases.memory import notes
        def test_sync(lifespan): assert lifespan[notes] is fake
        """
    two = """
        import pytest
        from conftest import fake
        from tests.testing.plugin_cases.memory import app, notes
        @pytest.fixture(scope="session")
        def lifekit_app(): return app
        def test_sync(lifespan): assert lifespan[notes] is not fake
        class TestWrapped:
            @pytest.fixture
            def lifekit_app(self, lifekit_app): return lifekit_app
            def test_sync(self, lifespan): assert lifespan[notes] is not fake
        """
    three = """
        import pytest
        from conftest import fake
        from tests.testing.plugin_cases.memory import notes
        @pytest.fixture(scope="module")
        def lifekit_app(lifekit_app): return lifekit_app
        def test_sync(lifespan): assert lifespan[notes] is fake
        """
    inner.run(conftest=conftest, test_1=one, test_2=two, test_3=three).assert_outcomes(passed=4)


# -- sync tests with async fixtures ----------------------------------------------------------------

LOOPS = """
    import asyncio, pytest, pytest_asyncio
    from tests.testing.plugin_cases.memory import notes

    @pytest.fixture
    def live(lifespan): return lifespan

    @pytest_asyncio.fixture
    async def loop(live):
        await asyncio.sleep(0)
        live[notes].lines.append("async")
        yield asyncio.get_running_loop()
        assert live[notes].lines[0] == "async"

    @pytest_asyncio.fixture
    async def author(client): return (await client.get("/a")).json()

    @pytest_asyncio.fixture
    async def implicit():
        await asyncio.sleep(0)
        return notes.get()

    @pytest_asyncio.fixture(loop_scope="{other}")
    async def elsewhere(lifespan): ...

    @pytest_asyncio.fixture(scope="session", loop_scope="session", autouse=True)
    async def unrelated(): ...

    def test_sync(loop, live): assert live.loop is loop
    def test_client(author, live): assert author == ["a"] == live[notes].lines
    def test_implicit(lifespan, implicit): assert lifespan[notes] is implicit
    def test_nothing_async(sync_client): assert sync_client.get("/a").json() == ["a"]
    {mark}
    async def test_async(loop, live): assert live.loop is loop is asyncio.get_running_loop()

    def test_wants_both(loop, sync_client): ...
    def test_wants_client(author, client): ...
    def test_in_two_loops(loop, elsewhere): ...
    {mark}
    async def test_in_two_loops_async(elsewhere): ...
    """
LOOPS_OF_ANYIO = """
    import anyio, pytest
    from tests.testing.plugin_cases.memory import notes

    @pytest.fixture
    async def line(client, anyio_backend):
        await anyio.lowlevel.checkpoint()
        return (await client.get("/a")).json()

    def test_sync(line, lifespan): assert line == ["a"] == lifespan[notes].lines
    """


@pytest.mark.parametrize(
    ("mode", "scope", "other"), [("strict", "function", "class"), ("auto", "session", "module")]
)
def test_the_application_of_a_sync_test_runs_in_the_loop_of_its_async_fixtures(
    inner: Inner, mode: str, scope: str, other: str
) -> None:
    """Where that can't be, one sentence says what to change."""
    inner.ini(
        asyncio_mode=mode,
        asyncio_default_test_loop_scope=scope,
        asyncio_default_fixture_loop_scope=scope,
    )
    mark = "@pytest.mark.asyncio" if mode == "strict" else ""
    more = {"test_anyio": LOOPS_OF_ANYIO} if mode == "strict" else {}
    code = LOOPS.format(mark=mark, other=other)
    if scope == "function":  # the closure then has async fixtures of two loops, none of which asks
        code = code.replace("def test_implicit(", "def implicitly(")
    result = inner.run(*ASYNCIO, *ANYIO, test_it=code, **more)
    passed = {"strict": 4 + 2, "auto": 5}[mode]  # AnyIO has two backends
    result.assert_outcomes(passed=passed, errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "sync_client runs the application in a thread's *, and the async fixture loop uses it in *",
            "client is for async tests, and this one is an ordinary function: use sync_client",
            f"*several: *the fixture elsewhere in pytest-asyncio's loop of the {other}*loop_scope*",
            "*several: the test test_in_two_loops_async in pytest-asyncio's*",
        ]
    )
    assert "Traceback" not in result.stdout.str()


# -- options for clients ---------------------------------------------------------------------------

OPTIONS = """
    import pytest
    from httpx2 import AsyncClient
    from starlette.testclient import TestClient

    class Mine(AsyncClient): ...
    class MineToo(TestClient): ...

    @pytest.fixture(scope="{scope}")
    def lifekit_client_options(): return {options}
    """
OPTIONS_SEEN = """
    import pytest
    from conftest import Mine, MineToo
    from tests.testing.plugin_cases.memory import app

    def seen(client):
        return str(client.base_url), client.headers["x-key"], client.cookies["taste"]

    def test_sync(sync_client):
        assert seen(sync_client) == ("https://shop.test", "1", "bitter")
        assert type(sync_client) is MineToo
        assert sync_client.headers["user-agent"] == "testclient"

    @pytest.mark.asyncio
    async def test_async(client):
        assert seen(client) == ("https://shop.test", "1", "bitter")
        assert type(client) is Mine
        assert client.headers["user-agent"] != "testclient"
        assert client.timeout.read == 7

    class TestNearer:
        @pytest.fixture
        def lifekit_client_options(self, lifekit_client_options):
            return {**lifekit_client_options, "headers": {"x-key": "2"}}
        @pytest.mark.asyncio
        async def test_async(self, client): assert client.headers["x-key"] == "2"

    class TestUnknown:
        @pytest.fixture
        def lifekit_client_options(self): return {"base_uri": "https://shop.test"}
        def test_sync(self, sync_client): ...
        @pytest.mark.asyncio
        async def test_async(self, client): ...

    class TestNoDict:
        @pytest.fixture
        def lifekit_client_options(self): return ["https://shop.test"]
        def test_sync(self, sync_client): ...
    """


def test_options_of_clients_are_a_fixture(inner: Inner) -> None:
    options = (
        '{"base_url": "https://shop.test", "headers": {"x-key": "1"}, "cookies": {"taste": "bitter"}, '
        '"timeout": 7, "raise_server_exceptions": False, "client_class": Mine, '
        '"sync_client_class": MineToo}'
    )
    conftest = OPTIONS.format(scope="session", options=options)
    result = inner.run(*ASYNCIO, conftest=conftest, test_it=OPTIONS_SEEN)
    result.assert_outcomes(passed=3, errors=3)
    result.stdout.fnmatch_lines_random(
        [
            "OptionError: lifekit_client_options has base_uri, which neither client knows. *",
            "OptionError: lifekit_client_options gives a list, and a dict is expected: *",
        ]
    )
    assert "Traceback" not in result.stdout.str()


# -- overrides in a test ---------------------------------------------------------------------------

LATE = """
    import pytest
    from lifekit import OverrideError, testing
    from tests.testing.plugin_cases.memory import Notes, app, notes, registry

    fake = Notes()
    refused = pytest.raises(OverrideError, match="this override changes nothing")

    def test_sync(sync_client, lifespan):
        with refused, registry.override(notes, fake): sync_client.get("/a")
        with refused, registry.override(notes, fake): lifespan[notes]
        with registry.override(notes, fake):
            with testing.sync_client(app) as own: own.get("/b")
        with sync_client.portal.wrap_async_context_manager(lifespan.override(notes, fake)):
            assert lifespan[notes] is fake
            sync_client.get("/c")
        assert lifespan[notes] is not fake

    @pytest.mark.asyncio
    async def test_async(client, lifespan):
        with refused, registry.override(notes, fake): await client.get("/a")
        with refused, registry.override(notes, fake): notes.get()
        with registry.override(notes, fake):
            async with testing.client(app) as own: await own.get("/b")
        with pytest.raises(ZeroDivisionError) as failed, registry.override(notes, fake): 1 / 0
        assert ["changes nothing" in note for note in failed.value.__notes__] == [True]
    """


def test_an_override_inside_a_test_is_refused_by_the_first_request_that_misses_it(inner: Inner) -> None:
    inner.run(*ASYNCIO, test_it=LATE).assert_outcomes(passed=2)
