"""Workers in tests: in blocks only, beside overrides, by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import anyio
import asyncpg
import pytest
from anyio.lowlevel import checkpoint
from fastapi import FastAPI

from lifekit import CrashError, Lifespan, Registry, Resource, SandboxEscapedError, testing
from lifekit.embedded import Server

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class Shop:
    """A queue, what it is paid by, and three that consume it: a worker, a task, and who needs that."""

    def __init__(self) -> None:
        self.registry = registry = Registry("shop")
        self.paid: list[str] = []
        self.log: list[str] = []

        @registry.resource
        def queue() -> Jobs:
            return Jobs()

        @registry.resource
        def way() -> str:
            return "real"

        @registry.resource(way)
        async def untouched(way: str) -> AsyncGenerator[list[str]]:
            self.log.append("untouched opened")
            yield [way]
            self.log.append("untouched closed")

        @registry.worker(queue, way)
        async def payer(queue: Jobs, way: str) -> None:
            async for who in queue.jobs():
                self.paid.append(f"{way} {who}")

        @registry.worker
        async def beside() -> None:
            self.log.append("beside begins")
            try:
                await anyio.sleep_forever()
            finally:
                self.log.append("beside ends")

        self.queue, self.way, self.untouched, self.payer = queue, way, untouched, payer

    async def pays(self, lifespan: Lifespan, who: str) -> str:
        """Return how somebody is paid."""
        before = len(self.paid)
        await lifespan[self.queue].put(who)
        for _ in range(20):
            await checkpoint()
        return ",".join(self.paid[before:])


class Jobs:
    """A queue on every backend."""

    def __init__(self) -> None:
        self.send, self.receive = anyio.create_memory_object_stream[str](10)

    async def put(self, job: str) -> None:
        await self.send.send(job)

    async def jobs(self) -> AsyncGenerator[str]:
        while True:
            yield await self.receive.receive()

    async def aclose(self) -> None:
        await self.send.aclose()
        await self.receive.aclose()


@pytest.fixture
def shop() -> Shop:
    return Shop()


async def test_an_override_ends_what_works_with_the_old_value_and_begins_it_anew(shop: Shop) -> None:
    async with shop.registry.lifespan() as lifespan:
        assert await shop.pays(lifespan, "Ann") == "real Ann"
        before = lifespan[shop.untouched]
        async with lifespan.override(shop.way, "fake") as patched:
            assert await shop.pays(lifespan, "Bea") == "fake Bea"
            async with patched.override(shop.way, "other"):
                assert await shop.pays(lifespan, "Cem") == "other Cem"
            assert await shop.pays(lifespan, "Dan") == "fake Dan"
        assert await shop.pays(lifespan, "Eve") == "real Eve"
        assert lifespan[shop.untouched] is before
        assert shop.log.count("beside begins") == 1
    assert shop.log[-2:] == ["beside ends", "untouched closed"] or shop.log[-2:] == [
        "untouched closed",
        "beside ends",
    ]


@pytest.mark.parametrize("fails", ["in the body", "while it opens"])
async def test_an_override_that_fails_begins_them_anew_as_well(shop: Shop, fails: str) -> None:
    def broken() -> str:
        if fails == "while it opens":
            raise ZeroDivisionError
        return "broken"

    async with shop.registry.lifespan() as lifespan:
        with pytest.raises((ZeroDivisionError, ExceptionGroup)):
            async with lifespan.override(shop.way, factory=broken):
                raise ZeroDivisionError
        assert await shop.pays(lifespan, "Ann") == "real Ann"


@on_asyncio
@pytest.mark.parametrize("how", ["group", "task"])
async def test_a_resource_with_tasks_rests_with_all_that_needs_it(shop: Shop, how: str) -> None:
    registry, seen = shop.registry, list[str]()

    @registry.resource(shop.way)
    async def clock(way: str) -> AsyncGenerator[str]:
        async def tick() -> None:
            while True:
                await asyncio.sleep(0)
                seen.append(way)

        if how == "group":
            async with asyncio.TaskGroup() as group:
                task = group.create_task(tick())
                yield f"clock of {way}"
                task.cancel()
        else:
            task = asyncio.create_task(tick())
            yield f"clock of {way}"
            task.cancel()

    @registry.resource(clock)
    async def reader(clock: str) -> AsyncGenerator[str]:
        shop.log.append(f"reads {clock}")
        yield clock
        shop.log.append(f"read {clock}")

    async with registry.lifespan() as lifespan:
        async with lifespan.override(shop.way, "fake"):
            seen.clear()
            await asyncio.sleep(0.01)
            assert set(seen) == {"fake"}
            assert lifespan[reader] == "clock of fake"
        seen.clear()
        await asyncio.sleep(0.01)
        assert set(seen) == {"real"}
        assert lifespan[reader] == "clock of real"
    reads = [line for line in shop.log if "read" in line]
    assert reads == [
        f"{word} clock of {way}" for way in ("real", "fake", "real") for word in ("reads", "read")
    ]


async def test_sandboxed_workers_run_in_blocks_only_each_anew(shop: Shop) -> None:
    with testing.sandboxing():
        async with shop.registry.lifespan() as lifespan:
            assert await shop.pays(lifespan, "Ann") == ""
            for _ in range(2):
                async with lifespan.sandbox():
                    assert "Bea" in await shop.pays(lifespan, "Bea")
                    assert lifespan[shop.payer].state == "running"
                assert lifespan[shop.payer].state == "ended"
            async with lifespan.sandbox(workers=False):
                assert await shop.pays(lifespan, "Cem") == ""
            async with lifespan.override(shop.way, "fake"):
                assert await shop.pays(lifespan, "Dan") == ""
                async with lifespan.sandbox():
                    assert await shop.pays(lifespan, "Eve") == "fake Cem,fake Dan,fake Eve"
            async with lifespan.sandbox():
                async with lifespan.override(shop.way, "fake"):
                    assert await shop.pays(lifespan, "Fay") == "fake Fay"
                assert await shop.pays(lifespan, "Gus") == "real Gus"
    assert shop.log.count("beside begins") == shop.log.count("beside ends") == 4


async def test_a_block_in_a_block_has_a_run_of_its_own_and_the_outer_one_begins_anew(
    shop: Shop,
) -> None:
    with testing.sandboxing():
        async with shop.registry.lifespan() as lifespan, lifespan.sandbox():
            assert await shop.pays(lifespan, "Ann") == "real Ann"
            async with lifespan.sandbox(workers=False):
                assert await shop.pays(lifespan, "Bea") == ""
            assert await shop.pays(lifespan, "Cem") == "real Bea,real Cem"
            async with lifespan.sandbox():
                assert await shop.pays(lifespan, "Dan") == "real Dan"
    assert shop.log.count("beside begins") == shop.log.count("beside ends") == 4


async def test_a_crash_in_a_block_is_told_at_its_end_and_ends_no_application() -> None:
    registry = Registry("shop")

    @registry.worker(restart="never")
    async def broken() -> None:
        raise ZeroDivisionError

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            for _ in range(2):
                with pytest.raises(CrashError) as caught:
                    async with lifespan.sandbox():
                        for _ in range(10):
                            await checkpoint()
                assert caught.group_contains(ZeroDivisionError)
            async with lifespan.sandbox(workers=False):
                await checkpoint()


@on_asyncio
async def test_a_resource_that_dies_in_a_block_is_told_at_its_end_and_stays_dead() -> None:
    registry, go_on = Registry("shop"), anyio.Event()

    async def fail() -> None:
        await go_on.wait()
        raise ZeroDivisionError

    @registry.resource
    async def clock() -> AsyncGenerator[str]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            yield "clock"

    lifespan = registry.lifespan()
    with testing.sandboxing(), pytest.raises(CrashError) as at_last:
        async with lifespan:
            with pytest.raises(CrashError, match="clock: a scope that it holds was cancelled"):
                async with lifespan.sandbox():
                    go_on.set()
                    for _ in range(20):
                        await checkpoint()
            async with lifespan.sandbox():
                assert not (await lifespan.health()).ready
    assert at_last.group_contains(ZeroDivisionError)


async def test_a_worker_that_crashes_in_a_block_makes_the_next_one_no_less_ready() -> None:
    registry, fails = Registry("shop"), [True]

    @registry.worker(restart="never", on_crash="unready")
    async def broken() -> None:
        if fails.pop():
            raise ZeroDivisionError

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                for _ in range(20):
                    await checkpoint()
                assert not (await lifespan.health()).ready
            assert (await lifespan.health()).ready
            fails.append(False)
            async with lifespan.sandbox():
                assert (await lifespan.health()).ready


async def test_what_exits_in_a_block_comes_out_of_the_block() -> None:
    registry = Registry("shop")

    @registry.worker
    async def exits() -> None:
        raise SystemExit(3)

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            with pytest.raises(SystemExit):
                async with lifespan.sandbox():
                    for _ in range(20):
                        await checkpoint()
            async with lifespan.sandbox(workers=False):
                await checkpoint()


async def test_an_override_that_is_built_while_the_block_ends_begins_no_worker(shop: Shop) -> None:
    building, go_on, leave = anyio.Event(), anyio.Event(), anyio.Event()

    async def slow() -> str:
        building.set()
        await go_on.wait()
        return "slow"

    async def override(lifespan: Lifespan) -> None:
        async with lifespan.override(shop.way, factory=slow):
            await leave.wait()

    with testing.sandboxing():
        async with shop.registry.lifespan() as lifespan, anyio.create_task_group() as tasks:
            async with lifespan.sandbox():
                tasks.start_soon(override, lifespan)
                await building.wait()
            go_on.set()
            assert await shop.pays(lifespan, "Ann") == ""
            async with lifespan.sandbox():
                assert await shop.pays(lifespan, "Bea") == "slow Ann,slow Bea"
            leave.set()


async def test_what_opens_again_as_an_override_begins_is_open_before_it_ends(shop: Shop) -> None:
    """Else nobody would ask it to close, and the override would wait for that."""
    registry, opening, go_on = shop.registry, anyio.Event(), anyio.Event()
    made: list[str] = []

    @registry.resource(shop.way)
    async def clock(way: str) -> AsyncGenerator[str]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            yield way
            tasks.cancel_scope.cancel()

    @registry.resource(clock)
    async def reader(clock: str) -> str:
        made.append(clock)
        if len(made) == 3:
            opening.set()
            await go_on.wait()
        return clock

    async def override(lifespan: Lifespan) -> None:
        async with lifespan.override(shop.way, "fake"):
            pass

    with anyio.fail_after(50):
        async with registry.lifespan() as lifespan, anyio.create_task_group() as tasks:
            tasks.start_soon(override, lifespan)
            await opening.wait()
            tasks.start_soon(_after_rounds, go_on.set)
            async with lifespan.override(shop.way, "other"):
                assert lifespan[reader] == "other"
            assert lifespan[reader] == "real"


async def _after_rounds(call: Callable[[], object]) -> None:
    for _ in range(20):
        await checkpoint()
    call()


async def test_a_worker_is_run_once_by_hand_with_what_is_served_now(shop: Shop) -> None:
    registry = shop.registry

    @registry.worker(shop.way, every=60.0)
    async def greet(way: str) -> None:
        shop.paid.append(way)
        if way == "broken":
            raise ZeroDivisionError

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            await lifespan.run_once(greet)
            async with lifespan.override(shop.way, "broken"):
                with pytest.raises(ZeroDivisionError):
                    await lifespan.run_once(greet)
    assert shop.paid == ["real", "broken"]


@on_asyncio
async def test_a_client_without_workers_has_none_sandboxed_or_not(shop: Shop) -> None:
    app = FastAPI(lifespan=shop.registry.lifespan)
    for sandbox in (True, False):
        async with testing.client(app, sandbox=sandbox, workers=False):
            await asyncio.sleep(0)
        assert "beside begins" not in shop.log
        async with testing.client(app, sandbox=sandbox):
            await asyncio.sleep(0)
        assert shop.log.count("beside begins") == 1
        shop.log.clear()


@on_asyncio
async def test_what_a_worker_wrote_in_a_block_is_undone_and_it_sees_no_error(postgres: Server) -> None:
    registry, errors, beaten = Registry("beats"), list[Exception](), asyncio.Event()

    @registry.resource
    def db() -> asyncpg.Pool:
        return asyncpg.create_pool(postgres.url, min_size=1, max_size=3)

    @registry.resource(db)
    async def table(db: asyncpg.Pool) -> None:
        await db.execute("DROP TABLE IF EXISTS worker_beats")
        await db.execute("CREATE TABLE worker_beats (at timestamptz)")

    @registry.worker(db, after=[table])
    async def heartbeat(db: asyncpg.Pool) -> None:
        while True:
            try:
                async with db.acquire() as connection, connection.transaction():
                    await connection.execute("INSERT INTO worker_beats VALUES (now())")
            except Exception as error:
                errors.append(error)
            beaten.set()
            await asyncio.sleep(0.001)

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            for _ in range(20):
                async with lifespan.sandbox():
                    beaten.clear()
                    await beaten.wait()
                    assert await lifespan[db].fetchval("SELECT count(*) FROM worker_beats") > 0
                assert await lifespan[db].fetchval("SELECT count(*) FROM worker_beats") == 0
    assert not errors


def test_a_worker_can_t_be_overridden(shop: Shop) -> None:
    worker: Resource[object] = shop.payer
    with pytest.raises(Exception, match="is a worker"):
        shop.registry.override(worker, object())


@on_asyncio
async def test_what_a_worker_started_is_refused_after_its_block(postgres: Server) -> None:
    registry, go_on = Registry("shop"), asyncio.Event()
    started: list[asyncio.Task[str]] = []

    @registry.resource
    def db() -> asyncpg.Pool:
        return asyncpg.create_pool(postgres.url, min_size=1)

    async def late(db: asyncpg.Pool) -> str:
        await go_on.wait()
        return str(await db.execute("CREATE TABLE late ()"))

    @registry.worker(db)
    async def starter(db: asyncpg.Pool) -> None:
        started.append(asyncio.create_task(late(db)))
        await anyio.sleep_forever()

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                while not started:
                    await checkpoint()
            go_on.set()
            with pytest.raises(SandboxEscapedError, match="started inside the sandbox"):
                await started[0]
