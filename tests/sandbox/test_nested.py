"""Blocks inside of blocks, on PostgreSQL: the inner one undoes its own part, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

from lifekit import SandboxBusyError, SandboxEscapedError

from .past import Past
from .pools import POOLS, Asyncpg
from .test_pools import ADD, House, anyio_backend, house, kind, opened, past, refused

__all__ = ["anyio_backend", "house", "kind", "past"]
pytestmark = pytest.mark.anyio
ASYNCPG = next(pool for pool in POOLS if isinstance(pool, Asyncpg))


@pytest.fixture(params=["loop", "thread"])
async def own(request: pytest.FixtureRequest, past: Past) -> AsyncGenerator[House]:
    """A lifespan of one pool of asyncpg's, with the gateway in its loop or in a thread."""
    async with AsyncExitStack() as stack:
        (house,) = await opened(stack, past, ASYNCPG)
        if request.param == "thread":
            postgres: Any = house.lifespan.postgres
            postgres.serves_threads()
        yield house


async def shown(run: Any, setting: str) -> str:
    """Return what a setting is."""
    ((value,),) = await run(f"SELECT current_setting('{setting}', true)")
    return str(value)


async def test_an_inner_block_undoes_its_own_and_no_more(house: House, past: Past) -> None:
    """Rows, failures in and outside of transactions, a schema; and a block inside of that one."""
    async with house.lifespan.sandbox():
        await house.run(ADD)
        for columns in ("a int", "b text, c int"):
            async with house.lifespan.sandbox():
                await house.run(ADD)
                async with house.acquire() as run:
                    assert await refused(run, "INSERT INTO rows VALUES (-1)") == "23514"
                    for sql in ("BEGIN", ADD, "COMMIT", "BEGIN", ADD, "ROLLBACK", "BEGIN"):
                        await run(sql)
                    assert await refused(run, "SELECT 1/0") == "22012"
                    await run("ROLLBACK")
                assert await house.count() == 3
                await house.run(f"CREATE TABLE fresh ({columns})")
                await house.run("INSERT INTO fresh DEFAULT VALUES")
                found = await house.run("SELECT * FROM fresh")
                assert len(found[0]) == columns.count(",") + 1
                async with house.lifespan.sandbox():
                    await house.run("DELETE FROM rows")
                    assert await house.count() == 0
                assert await house.count() == 3
            assert await house.count() == 1
            assert await house.kind.value(house.value, "SELECT to_regclass('fresh')") is None
        async with house.lifespan.sandbox():
            pass
        await house.run(ADD)
        assert await house.count() == 2
        assert past.ask("SELECT count(*) FROM rows") == 0


async def test_settings_of_a_connection_that_is_held_end_with_their_block(house: House) -> None:
    async with house.lifespan.sandbox(), house.acquire() as run, house.acquire() as other:
        await run("SET app.tenant TO 'outer'")
        async with house.lifespan.sandbox():
            assert await shown(run, "app.tenant") == "outer"
            await run("SET app.tenant TO 'inner'")
            await run("SET work_mem TO '99kB'")
            await other("SET app.tenant TO 'other'")
            assert await shown(run, "app.tenant") == "inner"
        assert await shown(run, "app.tenant") == "outer"
        assert await shown(run, "work_mem") == "4MB"
        assert await shown(other, "app.tenant") != "other"


async def test_deferred_constraints_are_checked_in_an_inner_block_as_ever(own: House) -> None:
    async with own.lifespan.sandbox():
        await own.run("INSERT INTO one VALUES (1)")
        async with own.lifespan.sandbox(), own.acquire() as run:
            await run("BEGIN")
            await run("INSERT INTO many VALUES (2)")
            assert await refused(run, "COMMIT") == "23503"
            await run("INSERT INTO many VALUES (1)")
        assert await refused(own.run, "INSERT INTO many VALUES (2)") == "23503"
        assert await own.kind.value(own.value, "SELECT count(*) FROM many") == 0


@pytest.mark.parametrize("keeps", [True, False], ids=["with one of the outer", "with none"])
async def test_session_locks_of_an_inner_block_alone_are_released(
    own: House, past: Past, keeps: bool
) -> None:
    # asyncpg releases all when a connection is given back.
    async with own.lifespan.sandbox(), own.acquire() as run:
        if keeps:
            await run("SELECT pg_advisory_lock(-7)")
        for _ in range(2):
            async with own.lifespan.sandbox():
                for lock in ("(-7)", "(8)", "(8)", "_shared(-1, -2)", "(3, 2000000000)"):
                    await run(f"SELECT pg_advisory_lock{lock}")
            for lock in ("8", "-1, -2", "3, 2000000000"):
                await past.until(f"SELECT pg_try_advisory_lock({lock})")
                past.ask(f"SELECT pg_advisory_unlock({lock})")
            assert past.ask("SELECT pg_try_advisory_lock(-7)") is not keeps
            past.ask("SELECT pg_advisory_unlock_all()")


async def test_a_transaction_that_has_only_read_goes_on_in_the_inner_block(own: House) -> None:
    async with own.lifespan.sandbox(), own.acquire() as run:
        for sql in ("BEGIN", "SELECT 1"):
            await run(sql)
        async with own.lifespan.sandbox():
            await own.run(ADD)
            assert [tuple(row) for row in await run("SELECT count(*) FROM rows")] == [(1,)]
        assert [tuple(row) for row in await run("SELECT count(*) FROM rows")] == [(0,)]
        await run(ADD)
        await run("COMMIT")
        assert await own.count() == 1


async def test_one_that_has_written_is_waited_for_or_keeps_the_inner_block_from_beginning(
    own: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own.lifespan.sandbox(), own.acquire() as run:
        for sql in ("BEGIN", ADD):
            await run(sql)

        async def inner() -> None:
            async with own.lifespan.sandbox():
                await own.run(ADD)
                assert await own.count() == 2

        waiting = asyncio.create_task(inner())
        await asyncio.sleep(0)
        await run("COMMIT")
        await waiting
        assert await own.count() == 1
        for sql in ("BEGIN", ADD):
            await run(sql)
        with monkeypatch.context() as patch:
            patch.setattr("lifekit._sandbox.postgres.session.PATIENCE", 0.1)
            with pytest.raises(SandboxBusyError, match=r"is open: its end would .*acquired at"):
                await inner()
        await run("COMMIT")
        assert await own.count() == 2
        await inner_that_is_cancelled(own, run)
        await inner_counts(own, 2)


async def inner_that_is_cancelled(own: House, run: Any) -> None:
    """Cancel one while it waits for a transaction."""
    await run("BEGIN")
    await run("DELETE FROM rows")
    with anyio.move_on_after(0):
        async with own.lifespan.sandbox():
            pytest.fail("it began")
    await run("ROLLBACK")


async def inner_counts(own: House, rows: int) -> None:
    """Find that many rows in an inner block, which begins at once."""
    async with own.lifespan.sandbox():
        assert await own.count() == rows


async def test_the_applications_own_loop_goes_on_through_inner_blocks(own: House) -> None:
    """What it does belongs to the block in which it does it."""
    is_over = False
    beat = asyncio.Condition()

    async def heartbeat() -> None:
        while not is_over:
            async with own.acquire() as run:
                for sql in ("BEGIN", ADD, "COMMIT"):
                    await run(sql)
            async with beat:
                beat.notify_all()

    async with own.lifespan.sandbox(), anyio.create_task_group() as tasks:
        tasks.start_soon(heartbeat)
        for _ in range(5):
            async with own.lifespan.sandbox(), beat:
                for _ in range(3):
                    await beat.wait()
        is_over = True


async def test_what_a_test_leaves_behind_is_cut_off_and_the_outer_block_stays(
    own: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifekit._sandbox.postgres.session.PATIENCE", 0.1)
    async with own.lifespan.sandbox(), own.acquire() as held:
        await held(ADD)
        with pytest.raises(SandboxEscapedError, match="in a transaction acquired at"):
            async with own.lifespan.sandbox():
                taken = await own.value.acquire()
                await taken.execute(f"BEGIN; {ADD}")
        for sql in (f"BEGIN; {ADD}", f"{ADD}; SELECT pg_sleep(600)"):
            taken = await own.value.acquire()
            running: list[asyncio.Task[Any]] = []
            with pytest.raises(SandboxEscapedError, match="in the midst of a transaction"):
                async with own.lifespan.sandbox():
                    running.append(asyncio.create_task(taken.execute(sql)))
                    await asyncio.wait(running, timeout=0.1)
            await asyncio.gather(*running, return_exceptions=True)
            await own.value.release(taken)
            assert await own.count() == 1


async def test_an_outer_block_whose_connection_is_lost_lets_no_other_begin(
    own: House, past: Past
) -> None:
    others = "FROM pg_stat_activity WHERE datname = 'pools' AND pid <> pg_backend_pid()"
    async with own.lifespan.sandbox():
        async with own.lifespan.sandbox():  # of which alone it is the work that is lost
            await own.run(ADD)
            await kill(past, own, others)
        await own.run(ADD)
        async with own.lifespan.sandbox():
            await kill(past, own, others)
        for _ in range(2):
            with pytest.raises(SandboxEscapedError, match="has lost its connection to PostgreSQL"):
                async with own.lifespan.sandbox():
                    pytest.fail("it began")
    async with own.lifespan.sandbox():
        await inner_counts(own, 0)


async def kill(past: Past, own: House, others: str) -> None:
    """End all connections, and let the clients hear of it."""
    past.ask(f"SELECT count(pg_terminate_backend(pid)) {others}")
    await past.until(f"SELECT count(*) = 0 {others}")
    for _ in range(6):
        await refused(own.run, "SELECT 1")
