"""Renewal: new values serve, the old ones close when nobody holds them, a failure changes nothing."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import pytest
from anyio import CancelScope
from anyio.lowlevel import checkpoint
from fastapi import Depends, FastAPI, Request

from lifekit import (
    DeclarationError,
    LifekitError,
    Lifespan,
    NotOpenError,
    OverrideError,
    Registry,
    Resource,
    SandboxUnsupportedError,
    StartupError,
    UnavailableError,
    events,
    testing,
)
from lifekit._core.node import Node

from .drivers.conftest import until
from .virtual_time import in_time

backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class Shop:
    """Settings, a database that counts its generations, and what is built from it."""

    def __init__(self, renew_every: float | None = None, **options: Any) -> None:
        self.lines: list[str] = []
        self.events: list[events.Event] = []
        self.made = 0
        self.fails: BaseException | None = None
        self.takes = 1.0
        self.registry = registry = Registry("shop", on_event=self.events.append, **options)

        @registry.resource
        async def settings() -> AsyncGenerator[str]:
            yield "settings"
            self.lines.append("settings closes")

        @registry.resource(settings, renew_every=renew_every)
        async def db(settings: str) -> AsyncGenerator[str]:
            self.made += 1
            name = f"db{self.made}"
            if self.made > 1:
                await anyio.sleep(self.takes)
            yield name
            self.lines.append(f"{name} closes")

        @registry.resource(db)
        async def links(db: str) -> AsyncGenerator[str]:
            if self.fails is not None:
                raise self.fails
            yield f"links of {db}"
            self.lines.append(f"links of {db} closes")

        @registry.resource(settings)
        async def cache(settings: str) -> AsyncGenerator[str]:
            yield "cache"
            self.lines.append("cache closes")

        self.db, self.links, self.cache = db, links, cache

    def told(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@backends
def test_it_and_what_is_built_from_it_are_built_anew_and_the_old_ones_close(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            assert lifespan[shop.links] == "links of db1"
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lifespan.renew, shop.db)
                await anyio.sleep(0.5)
                assert shop.db.get() == "db1"  # until all of the new ones are open
            assert lifespan[shop.db] == shop.db.get() == "db2"
            assert lifespan["links"] == shop.links.get() == "links of db2"
            assert lifespan[shop.cache] == "cache"
            await anyio.sleep(1)
            assert shop.lines == ["links of db1 closes", "db1 closes"]

    in_time(main, backend)
    assert shop.lines[2:4] in (
        ["cache closes", "links of db2 closes"],
        ["links of db2 closes", "cache closes"],
    )
    assert shop.lines[4:] == ["db2 closes", "settings closes"]
    (renewed,) = shop.told(events.Renewed)
    assert (renewed.resource, renewed.seconds) == ("db", pytest.approx(1.0))


@backends
def test_where_a_new_one_does_not_open_the_old_ones_stay(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            shop.fails = ConnectionError("postgresql://shop:hunter2@db/shop is away")
            with pytest.raises(StartupError) as caught:
                await lifespan.renew(shop.db)
            assert shop.lines == ["db2 closes"]
            assert lifespan[shop.links] == "links of db1"
            assert caught.value.failures == (("links", shop.fails),)
            assert caught.value.opened == ("db",)
            text = str(caught.value)
            assert text.startswith("db of shop was not renewed, and the old one stays: links failed")
            assert "hunter2" not in text
            shop.fails = None
            await lifespan.renew(shop.db)
            assert lifespan[shop.links] == "links of db3"

    in_time(main, backend)
    assert "db was not renewed, and stays: StartupError: db of shop was not renewed" in caplog.text
    assert len(shop.told(events.RenewalFailed)) == 1


@backends
def test_it_is_renewed_by_the_clock_and_a_failure_is_told(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop(renew_every=100.0)

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            await anyio.sleep(99.5)
            assert lifespan[shop.db] == "db1"
            await anyio.sleep(2)
            assert lifespan[shop.links] == "links of db2"
            shop.fails = ValueError("no luck")
            await anyio.sleep(101)
            assert lifespan[shop.links] == "links of db2"
            assert "db was not renewed, and stays" in caplog.text
            assert "no luck" in caplog.text
            shop.fails = None
            await anyio.sleep(100)
            assert lifespan[shop.links] == "links of db4"

    in_time(main, backend)
    assert [type(event) for event in shop.events if "Renew" in type(event).__name__] == [
        *(events.Renewed, events.RenewalFailed, events.Renewed)
    ]


@backends
def test_workers_end_and_are_run_again_with_the_new_values(backend: str) -> None:
    shop = Shop()
    at_work: list[str] = []

    @shop.registry.worker(shop.links, drain=5.0)
    async def outbox(links: str) -> None:
        at_work.append(f"begins with {links}")
        try:
            await anyio.sleep_forever()
        finally:
            with CancelScope(shield=True):
                await anyio.sleep(2)
            at_work.append(f"ends with {links}")

    @shop.registry.worker(shop.cache)
    async def other(cache: str) -> None:
        at_work.append("other begins")
        await anyio.sleep_forever()

    @shop.registry.worker(shop.db)
    async def once(db: str) -> None:
        at_work.append(f"once with {db}")

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            await checkpoint()
            await checkpoint()
            await lifespan.renew(shop.db)
            assert shop.lines == []
            await anyio.sleep(20)
            assert lifespan[outbox].state == "running"
            assert shop.lines == ["links of db1 closes", "db1 closes"]

    in_time(main, backend)
    assert {*at_work[:3]} == {"begins with links of db1", "other begins", "once with db1"}
    assert at_work[3:] == [
        *("ends with links of db1", "begins with links of db2", "ends with links of db2")
    ]


@backends
def test_renewals_come_one_after_the_other(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan, anyio.create_task_group() as tasks:
            for handle in (shop.db, shop.db, shop.cache, shop.links):
                tasks.start_soon(lifespan.renew, handle)
                await anyio.sleep(0.1)
            await anyio.sleep(1.5)
            assert shop.made == 3
            await anyio.sleep(1)
            assert lifespan[shop.links] == "links of db3"
        assert shop.made == 3

    in_time(main, backend)
    assert sorted(shop.lines) == sorted(
        [
            *(f"db{number} closes" for number in (1, 2, 3)),
            *(f"links of db{number} closes" for number in (1, 2, 3, 3)),
            *("cache closes", "cache closes", "settings closes"),
        ]
    )


@backends
def test_the_end_of_the_lifespan_ends_a_renewal(backend: str) -> None:
    shop = Shop()
    raised: list[BaseException] = []

    async def main() -> None:
        lifespan = shop.registry.lifespan()

        async def renew() -> None:
            try:
                await lifespan.renew(shop.db)
            except LifekitError as error:
                raised.append(error)

        async with anyio.create_task_group() as tasks, lifespan:
            for _ in range(2):
                tasks.start_soon(renew)
            await anyio.sleep(0.5)
        with pytest.raises(NotOpenError):
            await lifespan.renew(shop.db)

    in_time(main, backend)
    assert [str(error) for error in raised] == ["shop was stopped while db was renewed"] * 2
    assert shop.lines[-1] == "settings closes"
    assert not any("db2" in line for line in shop.lines)  # it never opened


@backends
def test_a_caller_that_is_cancelled_leaves_the_old_one(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            with anyio.move_on_after(0.5) as scope:
                await lifespan.renew(shop.db)
            assert scope.cancelled_caught
            assert lifespan[shop.db] == "db1"
            await lifespan.renew(shop.db)
            assert lifespan[shop.db] == "db3"

    in_time(main, backend)
    assert not any("db2" in line for line in shop.lines)


@backends
def test_a_caller_that_is_cancelled_while_it_waits_disturbs_no_other(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan, anyio.create_task_group() as tasks:
            tasks.start_soon(lifespan.renew, shop.db)
            await anyio.sleep(0.5)
            with anyio.move_on_after(0.1) as scope:
                await lifespan.renew(shop.db)
            assert scope.cancelled_caught
            await anyio.sleep(5)
            assert (lifespan[shop.db], shop.made) == ("db2", 2)

    in_time(main, backend)
    assert shop.lines.count("db1 closes") == shop.lines.count("db2 closes") == 1


@backends
def test_renewals_by_the_clock_that_take_longer_than_it_do_not_pile_up(backend: str) -> None:
    shop = Shop(renew_every=1.0)
    shop.takes = 9.5

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            await anyio.sleep(100)
            made, shop.takes = shop.made, 0.0
            await anyio.sleep(10)
            assert shop.made - made < 13
            assert lifespan[shop.db] == f"db{shop.made}"

    in_time(main, backend)


@backends
def test_one_that_hangs_is_cut_off_at_its_time(backend: str) -> None:
    shop = Shop(start_timeout=3.0)
    shop.takes = 1000.0

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            with pytest.raises(StartupError, match="open took longer than 3 s"):
                await lifespan.renew(shop.db)
            assert lifespan[shop.db] == "db1"

    in_time(main, backend)


@backends
def test_what_only_comes_after_it_stays_and_is_closed_before_the_new_one(backend: str) -> None:
    shop = Shop()

    @shop.registry.resource(after=[shop.db])
    async def audit() -> AsyncGenerator[str]:
        yield "audit"
        shop.lines.append("audit closes")

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            await lifespan.renew(shop.db)
            await anyio.sleep(1)
            assert shop.lines == ["links of db1 closes", "db1 closes"]

    in_time(main, backend)
    assert shop.lines.index("audit closes") < shop.lines.index("db2 closes")


@backends
def test_a_closing_of_the_old_one_that_fails_is_told_and_not_raised_hours_later(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry()

    @registry.resource(close=lambda value: value.append(1 / len(value)))
    def db() -> list[float]:
        return []

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            await lifespan.renew(db)
            await anyio.sleep(1)
            assert "db failed in close: ZeroDivisionError" in caplog.text
            lifespan[db].append(1.0)

    in_time(main, backend)


@backends
def test_an_optional_dependent_that_is_away_does_not_hinder_it_and_comes_with_the_new_one(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop()
    up: list[bool] = []

    @shop.registry.resource(shop.db, required=False)
    async def search(db: str) -> AsyncGenerator[str]:
        if not up:
            raise ConnectionError
        await anyio.sleep(0.3)
        yield f"search in {db}"
        shop.lines.append(f"search in {db} closes")

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            await lifespan.renew(shop.db)
            with pytest.raises(UnavailableError):
                lifespan[search]
            with pytest.raises(UnavailableError):
                await lifespan.renew(search)
            assert "search is not there to be renewed, and opens by itself: Unav" in caplog.text
            assert "search was not renewed" not in caplog.text
            up.append(True)
            await lifespan.renew(shop.db)  # amid which it opens with the value before
            await anyio.sleep(20)
            assert lifespan[search] == "search in db3"
            assert "db2 closes" in shop.lines

    in_time(main, backend)


@backends
def test_a_factory_that_renews_while_a_renewal_waits_for_it_is_refused_by_name(backend: str) -> None:
    """Its own resource or another one: either would wait for itself forever."""
    registry = Registry("shop")
    asks: list[Resource[str]] = []
    running: list[Lifespan] = []

    @registry.resource
    async def db() -> AsyncGenerator[str]:
        if asks:
            await running[0].renew(asks.pop())
        yield "db"

    @registry.resource
    def other() -> str:
        return "other"

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            running.append(lifespan)
            for asked in (db, other):
                asks.append(asked)
                with pytest.raises(StartupError) as caught:
                    await lifespan.renew(db)
                ((name, error),) = caught.value.failures
                assert name == "db"
                assert str(error).startswith(f"{asked.name} (")
                assert "can't be renewed by the factory of db (" in str(error)
            await lifespan.renew(db)
            await lifespan.renew(other)

    in_time(main, backend)


@backends
def test_what_can_not_be_renewed_is_refused_by_name(backend: str) -> None:
    shop = Shop()

    @shop.registry.worker(shop.db)
    async def outbox(db: str) -> None:
        await anyio.sleep_forever()

    foreign = Registry("other").resource(name="mail")(object)

    async def main() -> None:
        with shop.registry.override(shop.cache, "fake"):
            async with shop.registry.lifespan() as lifespan:
                with pytest.raises(LifekitError, match=r"outbox \(.*\) is a worker"):
                    await lifespan.renew(outbox)
                with pytest.raises(LifekitError, match=r"cache \(.*\) is a value that an override"):
                    await lifespan.renew(shop.cache)
                with pytest.raises(NotOpenError, match="belongs to the registry 'other'"):
                    await lifespan.renew(foreign)
                async with lifespan.override(shop.links, "fake") as patched:
                    for each in (lifespan, patched):
                        with pytest.raises(OverrideError, match=r"db .* while the override made at"):
                            await each.renew(shop.db)
                await lifespan.renew(shop.db)

    in_time(main, backend)
    with pytest.raises(DeclarationError, match="renew_every=0"):
        shop.registry.resource(name="mail", renew_every=0)(object)


@backends
def test_an_override_that_begins_amid_a_renewal_ends_that(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan, anyio.create_task_group() as tasks:

            async def renew() -> None:
                with pytest.raises(OverrideError, match=r"db .* can't be renewed while the override"):
                    await lifespan.renew(shop.db)

            tasks.start_soon(renew)
            await anyio.sleep(0.5)
            async with lifespan.override(shop.cache, "fake"):
                await anyio.sleep(5)
                assert shop.db.get() == "db1"
                assert shop.lines == ["links of db2 closes", "db2 closes"]

    in_time(main, backend)


@backends
def test_a_worker_that_still_ends_for_a_renewal_is_not_run_again_inside_an_override(
    backend: str,
) -> None:
    shop = Shop()
    at_work: list[str] = []

    @shop.registry.worker(shop.db, drain=5.0)
    async def outbox(db: str) -> None:
        at_work.append(f"begins with {db}")
        try:
            await anyio.sleep_forever()
        finally:
            with CancelScope(shield=True):
                await anyio.sleep(2)
            at_work.append(f"ends with {db}")

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            await anyio.sleep(1)
            await lifespan.renew(shop.db)
            async with lifespan.override(shop.db, "fake"):
                await anyio.sleep(20)
            await anyio.sleep(20)
            assert lifespan[outbox].state == "running"

    in_time(main, backend)
    assert at_work == [
        f"{what} with {db}" for db in ("db1", "fake", "db2") for what in ("begins", "ends")
    ]


@pytest.mark.anyio
@on_asyncio
async def test_a_block_refuses_it_and_between_blocks_it_is_fine(anyio_backend: object) -> None:
    shop = Shop(renew_every=0.01)
    shop.takes = 0.0
    with testing.sandboxing():
        async with shop.registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                with pytest.raises(SandboxUnsupportedError, match=r"db .* while the sandbox at"):
                    await lifespan.renew(shop.db)
            assert shop.made == 1  # nor does the clock
            await lifespan.renew(shop.db)
            async with lifespan.sandbox():
                assert lifespan[shop.db] == "db2"


@backends
def test_many_renewals_leave_nothing_behind_and_the_picture_of_the_start_as_it_was(
    backend: str,
) -> None:
    shop = Shop(renew_every=10.0)

    @shop.registry.worker(shop.links)
    async def outbox(links: str) -> None:
        await anyio.Event().wait()  # whose end leaves no timer of the loop's

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            picture = str(lifespan.startup)
            await anyio.sleep(30)
            gc.collect()
            before = sum(isinstance(each, Node) for each in gc.get_objects())
            await anyio.sleep(1000)
            gc.collect()
            assert shop.made > 70
            assert sum(isinstance(each, Node) for each in gc.get_objects()) < before + 50
            assert str(lifespan.startup) == picture

    in_time(main, backend)


class Application:
    """An application whose requests wait until they are let go."""

    def __init__(self, shop: Shop) -> None:
        self.go_on = anyio.Event()
        self.waiting = 0
        self.app = app = FastAPI(lifespan=shop.registry.lifespan)

        @app.get("/slow")
        async def slow(request: Request, db: str = Depends(shop.db)) -> list[str]:
            before = [db, request.state.db]
            self.waiting += 1
            await self.go_on.wait()
            return [*before, shop.db.get()]

        @app.get("/fast")
        async def fast(request: Request, db: str = Depends(shop.db)) -> list[str]:
            return [db, request.state.db, shop.db.get()]

        @app.get("/renew")
        async def renew() -> str:
            (lifespan,) = next(iter(shop.registry.running.values()))
            await lifespan.renew(shop.db)
            return shop.db.get()


@pytest.mark.anyio
@on_asyncio
async def test_the_old_one_closes_when_the_requests_that_began_with_it_are_over(
    anyio_backend: object,
) -> None:
    shop = Shop()
    shop.takes = 0.0
    web = Application(shop)
    answers: list[list[str]] = []
    async with testing.client(web.app) as client, anyio.create_task_group() as tasks:

        async def ask() -> None:
            answers.append((await client.get("/slow")).json())

        tasks.start_soon(ask)
        await until(lambda: web.waiting)
        assert (await client.get("/renew")).json() == "db2"
        assert (await client.get("/fast")).json() == ["db2"] * 3
        assert (await client.get("/renew")).json() == "db3"
        assert (await client.get("/fast")).json() == ["db3"] * 3
        for _ in range(20):
            await checkpoint()
        assert shop.lines == []  # the second one too: the slow request might have it since
        web.go_on.set()
        await until(lambda: len(shop.lines) == 4)
        assert {*shop.lines} == {
            *("links of db1 closes", "db1 closes", "links of db2 closes", "db2 closes")
        }
    assert answers == [["db1", "db1", "db3"]]


@pytest.mark.anyio
@on_asyncio
async def test_requests_that_hold_it_for_too_long_are_named_and_it_is_closed(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop(grace=0.05)
    shop.takes = 0.0
    web = Application(shop)
    async with testing.client(web.app) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(client.get, "/slow")
        await until(lambda: web.waiting)
        await client.get("/renew")
        await until(lambda: len(shop.lines) == 2)
        web.go_on.set()
    (held,) = shop.told(events.HeldTooLong)
    assert (held.resource, held.holders) == ("db, links", ("GET /slow",))
    assert "requests that began before go on: GET /slow" in caplog.text
