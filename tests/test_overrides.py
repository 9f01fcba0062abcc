"""Overrides: what stands in for a resource, for whom, for how long, and what can't."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from contextvars import copy_context
from typing import Any
from unittest.mock import AsyncMock

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from fastapi import Depends, FastAPI, Request
from starlette.testclient import TestClient

from lifekit import (
    Lifespan,
    NotOpenError,
    OverrideError,
    Registry,
    Resource,
    ShutdownError,
    StartupError,
    events,
)
from lifekit._util.loops import running_loop
from lifekit.testing import client

pytestmark = pytest.mark.anyio


class Part:
    """A value that knows what it was made of."""

    def __init__(self, name: str, *made_of: object) -> None:
        self.name = name
        self.made_of = made_of

    def __repr__(self) -> str:
        return "-".join([self.name, *map(repr, self.made_of)])


class Other:
    """Something else."""


class Shop:
    """A registry of settings -> db, cache -> links; and mail, which needs nothing."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.registry = Registry("shop")
        self.settings = self.declare("settings")
        self.db = self.declare("db", self.settings)
        self.cache = self.declare("cache", self.settings)
        self.links = self.declare("links", self.db, self.cache)
        self.mail = self.declare("mail")

    def declare(self, name: str, *needs: Resource[Part]) -> Resource[Part]:
        """Declare a part that is made of others, and logs its life."""
        declare: Any = self.registry.resource(*needs, name=name) if needs else self.registry.resource
        return declare(self.factory(name)) if needs else declare(self.named(name))  # type: ignore[no-any-return]

    def named(self, name: str) -> Callable[..., AsyncGenerator[Part]]:
        """Return a factory of that name."""
        made = self.factory(name)
        made.__name__ = name
        return made

    def factory(self, name: str) -> Callable[..., AsyncGenerator[Part]]:
        """Return a factory that logs what it makes and ends."""

        async def make(*made_of: Part) -> AsyncGenerator[Part]:
            part = Part(name, *made_of)
            self.log.append(f"+{part!r}")
            yield part
            self.log.append(f"-{name}")

        return make


@pytest.fixture
def shop() -> Shop:
    return Shop()


# -- registry.override -----------------------------------------------------------------------------


async def test_an_overridden_resource_never_opens_and_what_needs_it_gets_the_other(shop: Shop) -> None:
    fake = Part("fake")
    with shop.registry.override(shop.cache, fake):
        async with shop.registry.lifespan() as lifespan:
            assert lifespan[shop.cache] is fake
            assert lifespan["cache"] is fake
            assert shop.cache.get() is fake
            assert lifespan[shop.links].made_of == (lifespan[shop.db], fake)
    assert not any("cache" in line for line in shop.log)


async def test_after_it_the_real_one_opens_again(shop: Shop) -> None:
    with shop.registry.override(shop.cache, Part("fake")):
        pass
    async with shop.registry.lifespan() as lifespan:
        assert lifespan[shop.cache].name == "cache"


async def test_what_counts_is_where_the_lifespan_is_opened_not_where_it_was_made(shop: Shop) -> None:
    before = shop.registry.lifespan()
    with shop.registry.override(shop.cache, Part("fake")):
        after = shop.registry.lifespan()
        async with before:
            assert before[shop.cache].name == "fake"
    async with after:
        assert after[shop.cache].name == "cache"


async def test_an_override_with_a_factory_has_a_lifecycle_of_its_own(shop: Shop) -> None:
    with shop.registry.override(shop.mail, factory=shop.factory("fake")):
        async with shop.registry.lifespan() as lifespan:
            assert lifespan[shop.mail].name == "fake"
    assert "+fake" in shop.log
    assert shop.log.count("-fake") == 1
    assert "+mail" not in shop.log


async def test_the_factory_gets_what_the_resource_needs_if_it_takes_that(shop: Shop) -> None:
    def make(settings: Part) -> Part:
        return Part("fake", settings)

    with shop.registry.override(shop.cache, factory=make):
        async with shop.registry.lifespan() as lifespan:
            assert lifespan[shop.cache].made_of == (lifespan[shop.settings],)


async def test_none_is_a_value_too(shop: Shop) -> None:
    registry = Registry()

    @registry.resource
    def nothing() -> Part | None:
        return Part("something")

    with registry.override(nothing, None):
        async with registry.lifespan() as lifespan:
            assert lifespan[nothing] is None


async def test_the_innermost_holds_and_each_undoes_only_itself(shop: Shop) -> None:
    async def served() -> list[str]:
        async with shop.registry.lifespan() as lifespan:
            return [lifespan[handle].name for handle in (shop.db, shop.cache)]

    with shop.registry.override(shop.cache, Part("outer")):
        with shop.registry.override(shop.cache, Part("inner")):
            assert await served() == ["db", "inner"]
            with shop.registry.override(shop.db, Part("other")):
                assert await served() == ["other", "inner"]
            assert await served() == ["db", "inner"]
        assert await served() == ["db", "outer"]
    assert await served() == ["db", "cache"]


async def test_a_failure_inside_undoes_it_and_nothing_else(shop: Shop) -> None:
    with shop.registry.override(shop.cache, Part("outer")):
        inner = shop.registry.override(shop.cache, Part("inner"))
        with pytest.raises(ZeroDivisionError), inner:
            raise ZeroDivisionError
        async with shop.registry.lifespan() as lifespan:
            assert lifespan[shop.cache].name == "outer"


async def test_it_holds_for_a_registry_that_includes_this_one() -> None:
    inner, outer = Shop(), Registry("outer")
    outer.include(inner.registry)
    with outer.override(inner.cache, Part("fake")):
        async with outer.lifespan() as lifespan:
            assert lifespan[inner.links].made_of[1] is lifespan[inner.cache]
            assert lifespan[inner.cache].name == "fake"


def test_two_threads_override_differently_at_once(shop: Shop) -> None:
    meet = threading.Barrier(2)
    seen: dict[str, str] = {}

    async def look(name: str) -> None:
        async with shop.registry.lifespan() as lifespan:
            meet.wait(60)
            seen[name] = lifespan[shop.links].made_of[1].name  # type: ignore[attr-defined]

    def run(name: str) -> None:
        with shop.registry.override(shop.cache, Part(name)):
            meet.wait(60)
            anyio.run(look, name)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"a": "a", "b": "b"}


def web_app(shop: Shop) -> FastAPI:
    """Return an application that says what it is served with, in each way to ask."""
    app = FastAPI(lifespan=shop.registry.lifespan)

    @app.get("/")
    async def look(request: Request, links: Any = Depends(shop.links)) -> list[str]:  # noqa: B008
        by_state = request.state.links
        return [repr(each) for each in (links, by_state, shop.links.get())]

    @app.get("/sync")
    def look_from_a_thread() -> list[str]:
        return [repr(shop.cache.get())]

    return app


REAL, FAKE = "links-db-settings-cache-settings", "links-db-settings-fake"


def test_it_holds_through_testclient_whose_loop_runs_in_another_thread(shop: Shop) -> None:
    app = web_app(shop)
    with shop.registry.override(shop.cache, Part("fake")), TestClient(app) as http:
        assert http.get("/").json() == [FAKE] * 3
    with TestClient(app) as http:
        assert http.get("/").json() == [REAL] * 3


async def test_it_is_left_in_another_context_than_it_was_entered_in(shop: Shop) -> None:
    override = shop.registry.override(shop.cache, Part("fake"))
    override.__enter__()
    copy_context().run(override.__exit__, None, None, None)
    async with shop.registry.lifespan() as lifespan:
        assert lifespan[shop.cache].name == "fake"  # this context still has it
    override.__exit__(None, None, None)
    async with shop.registry.lifespan() as lifespan:
        assert lifespan[shop.cache].name == "cache"


async def test_an_override_that_rebuilds_nothing_says_nothing() -> None:
    told: list[events.Event] = []
    registry = Registry(on_event=told.append)
    cache = registry.resource(name="cache")(lambda: Part("cache"))
    registry.resource(cache, name="links")(lambda cache: Part("links", cache))
    mail = registry.resource(name="mail")(lambda: Part("mail"))
    async with registry.lifespan() as lifespan:
        told.clear()
        async with lifespan.override(mail, Part("fake")):
            pass
        assert told == []
        async with lifespan.override(cache, Part("fake")):
            pass
        assert {each.resource for each in told if isinstance(each, events.Opened)} == {"links"}


# -- what can't hold ---------------------------------------------------------------------------------


async def test_where_the_resource_is_open_already_it_is_refused(shop: Shop) -> None:
    async with shop.registry.lifespan() as lifespan:
        override = shop.registry.override(shop.cache, Part("fake"))
        with (
            pytest.raises(OverrideError, match=r"cache .* is open already.*lifespan\.override"),
            override,
        ):
            pytest.fail("it began")
        assert lifespan[shop.cache].name == "cache"


async def test_one_that_changed_nothing_says_so_when_it_ends(shop: Shop) -> None:
    async with client(web_app(shop)) as http:
        override = shop.registry.override(shop.cache, Part("fake"))
        with pytest.raises(OverrideError, match="this override changes nothing"), override:
            assert (await http.get("/")).json() == [REAL] * 3


async def test_beside_a_running_lifespan_another_may_be_opened_with_it(shop: Shop) -> None:
    async with client(web_app(shop)) as http:
        with shop.registry.override(shop.cache, Part("fake")):
            async with client(web_app(shop)) as other:
                assert (await other.get("/")).json() == [FAKE] * 3
        assert (await http.get("/")).json() == [REAL] * 3


def test_what_can_t_hold_is_refused_at_once_with_its_line(shop: Shop) -> None:
    override: Any = shop.registry.override
    other = Shop()
    wrong: list[tuple[Callable[[], object], str]] = [
        (
            lambda: override("cache", Part("x")),
            "a str can't be overridden; name the resource by its handle",
        ),
        (lambda: override(other.cache, Part("x")), "belongs to the registry 'shop', not to 'shop'"),
        (lambda: override(shop.cache), "takes a value, .*, or a factory"),
        (lambda: override(shop.cache, Part("x"), factory=Part), "takes a value, .*, or a factory"),
        (lambda: override(shop.cache, factory=Part("x")), "a Part stands where a factory is expected"),
        (lambda: override(shop.db, factory=shop.mail), "a Resource stands where a factory is expected"),
        (
            lambda: override(shop.links, factory=of_three),
            r"fits neither def links\(\) nor def links\(db, cache\)",
        ),
    ]
    for refused, why in wrong:
        with pytest.raises(OverrideError, match=why) as caught:
            refused()
        assert str(caught.value).startswith("tests/test_overrides.py:")


def of_three(a: Part, b: Part, c: Part) -> Part:
    """Make a part of more than links has."""
    return Part("x", a, b, c)


def test_a_value_of_another_type_is_refused_and_a_mock_is_not() -> None:
    registry = Registry()

    @registry.resource
    def plain() -> Part:
        return Part("x")

    @registry.resource
    async def made() -> Part:
        return Part("x")

    @registry.resource
    async def yielded() -> AsyncGenerator[Part]:
        yield Part("x")

    @registry.resource
    def untyped():  # type: ignore[no-untyped-def]
        return Part("x")

    override: Any = registry.override
    for handle in (plain, made, yielded):
        with pytest.raises(OverrideError, match="is a Part, and a Other would stand in for it"):
            override(handle, Other())
        override(handle, Part("y"))
        override(handle, AsyncMock())
    override(untyped, Other())


async def test_it_is_entered_once(shop: Shop) -> None:
    override = shop.registry.override(shop.cache, Part("fake"))
    with override:
        pass
    with pytest.raises(OverrideError, match="was entered before"), override:
        pytest.fail("it began again")


# -- lifespan.override ---------------------------------------------------------------------------------


async def test_a_running_lifespan_rebuilds_what_depends_on_it_and_shares_the_rest(shop: Shop) -> None:
    async with shop.registry.lifespan() as lifespan:
        before = dict(lifespan)
        shop.log.clear()
        async with lifespan.override(shop.cache, Part("fake")) as patched:
            assert repr(patched[shop.links]) == FAKE
            assert lifespan[shop.links] is patched[shop.links] is shop.links.get()
            for shared in (shop.settings, shop.db, shop.mail):
                assert patched[shared] is before[shared.name]
            assert shop.log == [f"+{FAKE}"]
        assert dict(lifespan) == before
        assert shop.log == [f"+{FAKE}", "-links"]
        assert repr(shop.links.get()) == REAL


async def test_requests_of_the_same_client_are_served_with_it(shop: Shop) -> None:
    app = web_app(shop)
    async with shop.registry.lifespan() as lifespan:
        pass
    async with client(app) as http:
        lifespan = running(shop)
        assert (await http.get("/")).json() == [REAL] * 3
        async with lifespan.override(shop.cache, Part("fake")):
            assert (await http.get("/")).json() == [FAKE] * 3
            assert (await http.get("/sync")).json() == ["fake"]
        assert (await http.get("/")).json() == [REAL] * 3


def running(shop: Shop) -> Lifespan:
    """Return the lifespan that runs."""
    ((lifespan,),) = shop.registry.running.values()
    return lifespan


def test_requests_of_a_testclient_are_served_with_it(shop: Shop) -> None:
    with TestClient(web_app(shop)) as http:
        assert http.portal is not None
        override = running(shop).override(shop.cache, Part("fake"))
        with http.portal.wrap_async_context_manager(override):
            assert http.get("/").json() == [FAKE] * 3
        assert http.get("/").json() == [REAL] * 3


async def test_overrides_of_a_running_lifespan_nest_from_either_of_them(shop: Shop) -> None:
    async with shop.registry.lifespan() as lifespan:
        async with lifespan.override(shop.cache, Part("one")) as patched:
            for outer in (patched, lifespan):
                async with outer.override(shop.db, factory=shop.factory("two")) as inner:
                    for each in (inner, patched, lifespan):
                        assert repr(each[shop.links]) == "links-two-one"
                assert repr(lifespan[shop.links]) == "links-db-settings-one"
        assert repr(lifespan[shop.links]) == REAL


async def test_a_value_given_for_a_dependent_stays_when_what_it_needs_is_overridden(shop: Shop) -> None:
    given = Part("given")
    with shop.registry.override(shop.links, given):
        async with (
            shop.registry.lifespan() as lifespan,
            lifespan.override(shop.db, Part("fake")) as patched,
        ):
            assert patched[shop.links] is given


async def test_when_the_rebuild_fails_half_way_all_is_as_before(shop: Shop) -> None:
    broken = False

    @shop.registry.resource(shop.links)
    def late(links: Part) -> Part:
        if broken:
            raise ZeroDivisionError
        return Part("late", links)

    async with shop.registry.lifespan() as lifespan:
        before = dict(lifespan)
        shop.log.clear()
        broken = True
        with pytest.raises(StartupError, match="late"):
            async with lifespan.override(shop.cache, factory=shop.factory("fake")):
                pytest.fail("it opened")
        assert shop.log == ["+fake", f"+{FAKE}", "-links", "-fake"]
        assert dict(lifespan) == before
        assert late.get() is before["late"]
        broken = False
        async with lifespan.override(shop.cache, Part("fake")):
            assert repr(late.get()) == f"late-{FAKE}"


async def test_a_body_that_fails_or_is_cancelled_puts_everything_back(shop: Shop) -> None:
    async with shop.registry.lifespan() as lifespan:
        before = dict(lifespan)
        with pytest.raises(ZeroDivisionError):
            async with lifespan.override(shop.cache, Part("fake")):
                raise ZeroDivisionError
        assert dict(lifespan) == before
        with anyio.CancelScope() as scope:
            async with lifespan.override(shop.cache, Part("fake")):
                scope.cancel()
                await anyio.sleep_forever()
        assert dict(lifespan) == before
        assert shop.log.count("-links") == 2


async def test_one_that_ends_before_those_inside_it_ends_them_too_and_says_so(shop: Shop) -> None:
    async with shop.registry.lifespan() as lifespan:
        before = dict(lifespan)
        outer, inner = AsyncExitStack(), AsyncExitStack()
        await outer.enter_async_context(lifespan.override(shop.cache, factory=shop.factory("outer")))
        await inner.enter_async_context(lifespan.override(shop.db, factory=shop.factory("inner")))
        shop.log.clear()
        with pytest.raises(OverrideError, match="ended while one inside it was in use"):
            await outer.aclose()
        assert shop.log == ["-links", "-inner", "-links", "-outer"]
        assert dict(lifespan) == before
        await inner.aclose()
        assert dict(lifespan) == before


async def test_the_end_of_the_lifespan_ends_its_overrides_first(shop: Shop) -> None:
    left = AsyncExitStack()
    async with shop.registry.lifespan() as lifespan:
        await left.enter_async_context(lifespan.override(shop.cache, factory=shop.factory("fake")))
        shop.log.clear()
    assert shop.log[:2] == ["-links", "-fake"]
    assert shop.log.index("-links", 2) < shop.log.index("-db")
    await left.aclose()


async def test_a_lifespan_that_does_not_run_or_does_not_declare_it_refuses(shop: Shop) -> None:
    lifespan = shop.registry.lifespan()
    with pytest.raises(OverrideError, match="does not run"):
        async with lifespan.override(shop.cache, Part("fake")):
            pytest.fail("it began")
    async with lifespan:
        with pytest.raises(OverrideError, match="belongs to the registry"):
            lifespan.override(Shop().cache, Part("fake"))
    with pytest.raises(OverrideError, match="does not run"):
        async with lifespan.override(shop.cache, Part("fake")):
            pytest.fail("it began")
    with pytest.raises(NotOpenError):
        lifespan[shop.cache]


async def test_fastapi_s_own_dependency_overrides_keep_working(shop: Shop) -> None:
    app = web_app(shop)
    app.dependency_overrides[shop.links] = lambda: Part("mine")
    async with client(app) as http:
        assert (await http.get("/")).json() == ["mine", REAL, REAL]


def test_a_portal_of_one_s_own_carries_the_override_of_its_thread(shop: Shop) -> None:
    async def look() -> str:
        async with shop.registry.lifespan() as lifespan:
            return lifespan[shop.cache].name

    with shop.registry.override(shop.cache, Part("fake")), start_blocking_portal() as portal:
        assert portal.call(look) == "fake"


async def test_an_inner_end_that_fails_leaves_the_lifespan_as_it_was(shop: Shop) -> None:
    async def failing() -> AsyncGenerator[Part]:
        yield Part("failing")
        raise ZeroDivisionError

    async with shop.registry.lifespan() as lifespan:
        before = dict(lifespan)
        outer, inner = AsyncExitStack(), AsyncExitStack()
        await outer.enter_async_context(lifespan.override(shop.cache, factory=shop.factory("outer")))
        await inner.enter_async_context(lifespan.override(shop.mail, factory=failing))
        with pytest.raises(ShutdownError):
            await outer.aclose()
        assert dict(lifespan) == before
        assert "-outer" in shop.log
        await inner.aclose()


async def test_of_two_overrides_built_at_once_the_second_is_refused(shop: Shop) -> None:
    began, go = anyio.Event(), anyio.Event()

    async def slow() -> Part:
        began.set()
        await go.wait()
        return Part("slow")

    async with shop.registry.lifespan() as lifespan:

        async def first() -> None:
            with pytest.raises(OverrideError, match="another override of this lifespan began"):
                async with lifespan.override(shop.cache, factory=slow):
                    pytest.fail("it began")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            await began.wait()
            async with lifespan.override(shop.mail, Part("other")):
                go.set()
                await anyio.wait_all_tasks_blocked()
                assert lifespan[shop.mail].name == "other"
        assert lifespan[shop.cache].name == "cache"


# -- one resource stands in for another ------------------------------------------------------------


async def test_another_resource_stands_in_and_is_opened_and_closed_once(shop: Shop) -> None:
    """What needs either gets the one value, and is closed before it."""
    reader = shop.declare("reader", shop.mail)
    with shop.registry.override(shop.mail, shop.db):
        async with shop.registry.lifespan() as lifespan:
            assert lifespan[shop.mail] is lifespan[shop.db] is lifespan[reader].made_of[0]
    assert not [line for line in shop.log if "mail" in line and "reader" not in line]
    assert shop.log.count("+db-settings") == shop.log.count("-db") == 1
    assert shop.log.index("-reader") < shop.log.index("-db")


async def test_stand_ins_chain_and_nest_and_hold_on_a_running_lifespan(shop: Shop) -> None:
    other = shop.declare("other")
    fake = Part("fake")
    with shop.registry.override(shop.mail, other), shop.registry.override(other, shop.cache):
        with shop.registry.override(shop.cache, fake):
            async with shop.registry.lifespan() as lifespan:
                assert lifespan[shop.mail] is lifespan[other] is fake
        shop.log.clear()
        async with shop.registry.lifespan() as lifespan:
            assert lifespan[shop.mail] is lifespan[shop.cache] is not fake
            async with lifespan.override(shop.cache, shop.db) as patched:
                assert patched[shop.mail] is patched[shop.links].made_of[1] is patched[shop.db]
            assert shop.log.count("-db") == 0
    assert shop.log.count("-db") == 1


class Special(Part):
    """A part with more to it."""


def test_what_can_not_stand_in_is_refused_at_once(shop: Shop) -> None:
    registry = Registry("typed")

    @registry.resource
    def part() -> Part:
        return Part("part")

    @registry.resource
    def special() -> Special:
        return Special("special")

    @registry.resource
    def text() -> str:
        return ""

    registry.override(part, special)
    with pytest.raises(OverrideError, match=r"text \(.*\), a str, would stand in"):
        registry.override(part, text)  # type: ignore[arg-type]
    with pytest.raises(OverrideError, match=r"part \(.*\), a Part, would stand in"):
        registry.override(special, part)  # type: ignore[arg-type]
    with pytest.raises(OverrideError, match=r"mail .* belongs to the registry 'shop', not to 'typed'"):
        registry.override(part, shop.mail)
    with pytest.raises(OverrideError, match=r"in a cycle: \w+ .*-> \w+"):
        shop.registry.override(shop.db, shop.links)  # which needs it
    with (
        shop.registry.override(shop.db, shop.mail),
        pytest.raises(OverrideError, match="can't hold: the resources need each other in a cycle"),
    ):
        shop.registry.override(shop.mail, shop.db)


# -- an override that came too late ----------------------------------------------------------------


def late(shop: Shop) -> Any:
    return shop.registry.override(shop.cache, Part("fake"))


LATE = r"cache \(.*\) is open already.*this override changes nothing"


async def test_what_is_open_is_refused_where_code_inside_an_override_comes_to_it(shop: Shop) -> None:
    """By a client, a handle or a lifespan; and what is opened inside uses the override."""
    async with client(web_app(shop)) as http:
        lifespan = shop.registry.running[running_loop()][0]
        with pytest.raises(OverrideError, match=LATE), late(shop):
            await http.get("/")
        asked: list[Callable[[], object]] = [lambda: lifespan[shop.cache], shop.cache.get]
        for ask in asked:
            with pytest.raises(OverrideError, match=LATE), late(shop):
                ask()
        with late(shop):
            async with client(web_app(shop)) as inner:
                assert (await inner.get("/")).json() == [FAKE] * 3
            assert (await http.get("/")).json() == [REAL] * 3
        outer = shop.registry.override(shop.cache, Part("outer"))
        with outer, late(shop):
            async with client(web_app(shop)) as inner:
                assert (await inner.get("/")).json() == [FAKE] * 3


def test_what_another_thread_serves_is_refused_too(shop: Shop) -> None:
    with TestClient(web_app(shop)) as http, pytest.raises(OverrideError, match=LATE), late(shop):
        http.get("/")


def test_a_body_that_fails_is_told_of_an_override_that_changed_nothing(shop: Shop) -> None:
    with TestClient(web_app(shop)):
        with pytest.raises(AssertionError) as failed, late(shop):
            raise AssertionError("1 == 2")
        with pytest.raises(AssertionError) as well, late(shop), TestClient(web_app(shop)):
            raise AssertionError("1 == 2")
    assert [bool(re.search(LATE, note)) for note in failed.value.__notes__] == [True]
    assert not hasattr(well.value, "__notes__")
