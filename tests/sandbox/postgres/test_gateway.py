"""What a block promises, for each client that goes through the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import asyncpg
import psycopg
import pytest

from .clients import CLIENTS, Aiopg, Asyncpg, Connection, Psycopg, Psycopg2
from .conftest import House

pytestmark = pytest.mark.anyio
each = pytest.mark.parametrize("kind", CLIENTS, ids=lambda kind: kind.__name__)

ADD = "INSERT INTO wire VALUES (1)"
COUNT = "SELECT count(*) FROM wire"
CONSTRAINED = """CREATE TABLE one (i int PRIMARY KEY);
CREATE TABLE many (one int REFERENCES one DEFERRABLE INITIALLY DEFERRED)"""


async def refused(connection: Connection, sql: str) -> str | None:
    """Return the SQLSTATE by which a statement is refused."""
    try:
        await connection.run(sql)
    except Exception as error:
        found: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return found
    return None


@each
async def test_what_a_block_did_is_undone_and_outside_all_lasts(
    house: House, kind: type[Connection]
) -> None:
    connection = await house.connect(kind)
    await connection.run(ADD)
    assert await house.really() == 1
    for _ in range(2):
        async with house.block():
            await connection.run(ADD)
            await connection.run("BEGIN")
            await connection.run(ADD)
            await connection.run("COMMIT")
            await connection.run("BEGIN")
            await connection.run(ADD)
            await connection.run("ROLLBACK")
            await connection.run(f"BEGIN; {ADD}; SAVEPOINT s; {ADD}; ROLLBACK TO s; COMMIT; {ADD}")
            assert await connection.value(COUNT) == 5
            assert await house.really() == 1
        assert await connection.value(COUNT) == 1
    await connection.run(ADD)
    assert await house.really() == 2


@each
async def test_a_failure_undoes_its_statement_or_its_transaction(
    house: House, kind: type[Connection]
) -> None:
    connection = await house.connect(kind)
    async with house.block():
        await connection.run(ADD)
        assert await refused(connection, "SELECT 1/0") == "22012"
        assert await refused(connection, "INSERT INTO nowhere VALUES (1)") == "42P01"
        assert await refused(connection, f"{ADD}; SELECT 1/0") == "22012"
        assert await refused(connection, f"BEGIN; {ADD}; COMMIT; nonsense") == "42601"
        assert await connection.value(COUNT) == 1
        await connection.run("BEGIN")
        await connection.run(ADD)
        assert await refused(connection, "SELECT 1/0") == "22012"
        assert await refused(connection, COUNT) == "25P02"
        await connection.run("COMMIT")
        assert await connection.value(COUNT) == 1
        assert await refused(connection, "SAVEPOINT s") == "25P01"


@each
async def test_all_clients_of_a_database_see_what_any_commits_and_no_more(
    house: House, kind: type[Connection]
) -> None:
    writer = await house.connect(kind)
    readers = [await house.connect(other) for other in CLIENTS]
    async with house.block():
        await writer.run(ADD)
        assert [await reader.value(COUNT) for reader in readers] == [1] * len(readers)
        await writer.run("BEGIN")
        await writer.run(ADD)
        reading = [asyncio.create_task(reader.value(COUNT)) for reader in readers]
        await writer.run(ADD)
        assert not any(task.done() for task in reading)
        await writer.run("COMMIT")
        assert await asyncio.gather(*reading) == [3] * len(readers)


@each
async def test_a_transaction_that_has_only_read_makes_nobody_wait(
    house: House, kind: type[Connection]
) -> None:
    reader, writer = await house.connect(kind), await house.connect(kind)
    with anyio.fail_after(60):
        async with house.block():
            await reader.run("BEGIN")
            assert await reader.value(COUNT) == 0
            await writer.run(ADD)
            assert await reader.value(COUNT) == 1
            await reader.run(ADD)
            await reader.run("ROLLBACK")
            await reader.run("BEGIN READ ONLY")
            assert await reader.value(COUNT) == 1
            await writer.run("DELETE FROM wire")
            await writer.run(ADD)
            assert await refused(reader, ADD) == "25006"
            await reader.run("ROLLBACK")
            assert await writer.value(COUNT) == 1
            await reader.run("BEGIN")
            assert await refused(reader, "SELECT 1/0") == "22012"
            await writer.run(ADD)
            assert await refused(reader, COUNT) == "25P02"
            await reader.run("ROLLBACK")
            assert await reader.value(COUNT) == 2


@each
async def test_settings_are_a_connections_own_and_end_with_their_transaction(
    house: House, kind: type[Connection]
) -> None:
    one, other = await house.connect(kind), await house.connect(kind)
    show = "SELECT current_setting('work_mem')"
    before = await one.value(show)
    async with house.block():
        await one.run("SET work_mem = '1MB'")
        await other.run("SET work_mem = '2MB'")
        assert (await one.value(show), await other.value(show)) == ("1MB", "2MB")
        await one.run("BEGIN")
        await one.run("SET LOCAL work_mem = '3MB'")
        assert await one.value(show) == "3MB"
        await one.run("COMMIT")
        assert await one.value(show) == "1MB"
        await one.run("BEGIN")
        await one.run("SET work_mem = '4MB'")
        await one.run("ROLLBACK")
        assert await one.value(show) == "1MB"
        await one.run("RESET work_mem")
        assert (await one.value(show), await other.value(show)) == (before, "2MB")
    assert (await one.value(show), await other.value(show)) == (before, before)


@each
async def test_deferred_constraints_are_checked_where_the_application_commits(
    house: House, kind: type[Connection]
) -> None:
    connection = await house.connect(kind)
    async with house.block():
        await connection.run(CONSTRAINED)
        await connection.run("BEGIN")
        await connection.run("INSERT INTO many VALUES (7)")
        assert await refused(connection, "COMMIT") == "23503"
        assert await refused(connection, "INSERT INTO many VALUES (7)") == "23503"
        assert await connection.value("SELECT count(*) FROM many") == 0
        await connection.run("BEGIN")
        await connection.run("INSERT INTO many VALUES (7)")
        await connection.run("INSERT INTO one VALUES (7)")
        await connection.run("COMMIT")
        assert await connection.value("SELECT count(*) FROM many") == 1


@each
async def test_what_sql_prepares_or_declares_is_a_connections_own(
    house: House, kind: type[Connection]
) -> None:
    one, other = await house.connect(kind), await house.connect(kind)
    for _ in range(2):
        async with house.block():
            await one.run("PREPARE saved AS SELECT 1")
            await other.run("PREPARE saved AS SELECT 2")
            assert (await one.value("EXECUTE saved"), await other.value("EXECUTE saved")) == (1, 2)
            await one.run("DEALLOCATE ALL")
            assert await other.value("EXECUTE saved") == 2
            await other.run("BEGIN")
            await other.run("DECLARE own CURSOR FOR SELECT 3")
            assert await other.value("FETCH own") == 3
            await other.run("COMMIT")
            assert await refused(other, "FETCH own") == "34000"


@each
async def test_an_open_transaction_that_does_nothing_is_told_to_who_waits_for_it(
    house: House, kind: type[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifekit._sandbox.postgres.session.PATIENCE", 0.05)
    holder, waiter = await house.connect(kind), await house.connect(kind)
    async with house.block():
        await holder.run("BEGIN")
        await holder.run(ADD)
        assert await refused(waiter, COUNT) == "55P03"
        await holder.run("COMMIT")
        assert await waiter.value(COUNT) == 1


@each
async def test_a_client_that_goes_leaves_nothing_of_what_it_did_not_commit(
    house: House, kind: type[Connection]
) -> None:
    other = await house.connect(Asyncpg)
    with anyio.fail_after(60):
        async with house.block():
            gone = await kind.open(house.through)
            await gone.run(ADD)
            await gone.run("BEGIN")
            await gone.run(ADD)
            await gone.close()
            assert await other.value(COUNT) == 1


async def test_a_cancelled_statement_is_cancelled_on_the_server_and_no_other_one_is(
    house: House,
) -> None:
    one, other = await house.connect(Asyncpg), await house.connect(Psycopg)
    with anyio.fail_after(60):
        async with house.block():
            for _ in range(10):
                with pytest.raises(TimeoutError):
                    await one.real.execute("SELECT pg_sleep(60)", timeout=0.02)
                assert await other.value("SELECT 1") == 1
                assert await one.value("SELECT 2") == 2


async def test_a_connection_cut_off_in_the_midst_of_a_statement_frees_the_session(
    house: House,
) -> None:
    other = await house.connect(Psycopg)
    with anyio.fail_after(60):
        async with house.block():
            one = await asyncpg.connect(house.through)
            task = asyncio.create_task(one.execute(f"{ADD}; SELECT pg_sleep(60)"))
            sleeps = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            while not await house.past.fetch(sleeps):
                pass
            one.terminate()
            with pytest.raises(asyncpg.PostgresConnectionError):
                await task
            assert await other.value(COUNT) == 0


async def test_pipelines_copy_and_server_side_cursors_of_psycopg(house: House) -> None:
    connection: Any = (await house.connect(Psycopg)).real
    async with house.block():
        async with connection.pipeline():
            for number in range(3):
                await connection.execute("INSERT INTO wire VALUES (%s)", (number,))
            cursor = await connection.execute(COUNT)
            assert await cursor.fetchone() == (3,)
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with connection.pipeline():
                await connection.execute(ADD)
                await connection.execute("SELECT 1/0")
                await connection.execute(ADD)
        async with connection.transaction(), connection.pipeline():
            await connection.execute(ADD)
            await connection.execute("SAVEPOINT s")
            await connection.execute(ADD)
            await connection.execute("ROLLBACK TO s")
        async with connection.cursor() as cursor:
            async with cursor.copy("COPY wire FROM STDIN") as copy:
                await copy.write("5\n6\n")
            with pytest.raises(psycopg.errors.InvalidTextRepresentation):
                async with cursor.copy("COPY wire FROM STDIN") as copy:
                    await copy.write("7\nnothing\n")
            async with cursor.copy("COPY wire TO STDOUT") as copy:
                assert [row async for row in copy.rows()] == [
                    ("0",),
                    ("1",),
                    ("2",),
                    ("1",),
                    ("5",),
                    ("6",),
                ]
        async with connection.transaction(), connection.cursor(name="far") as cursor:
            await cursor.execute("SELECT generate_series(1, 250)")
            assert len(await cursor.fetchall()) == 250
    assert await house.really() == 0


async def test_records_copied_and_cursors_of_asyncpg(house: House) -> None:
    connection: Any = (await house.connect(Asyncpg)).real
    async with house.block():
        await connection.copy_records_to_table("wire", records=[(1,), (2,)])
        with pytest.raises(TypeError):
            await connection.copy_records_to_table("wire", records=[(3,), ("no",)])
        async with connection.transaction():
            rows = [row["i"] async for row in connection.cursor("SELECT i FROM wire", prefetch=1)]
        assert rows == [1, 2]
        statement = await connection.prepare("SELECT i FROM wire WHERE i > $1")
        assert await statement.fetchval(1) == 2
    assert await statement.fetchval(1) is None
    async with house.block():
        await connection.execute("INSERT INTO wire VALUES (9)")
        assert await statement.fetchval(1) == 9


async def test_a_transaction_begun_before_the_block_stays_outside_of_it(house: House) -> None:
    early, other = await house.connect(Psycopg2), await house.connect(Aiopg)
    await early.run("BEGIN")
    await early.run(ADD)
    async with house.block():
        await early.run(ADD)
        await other.run("INSERT INTO wire VALUES (2)")
        await early.run("COMMIT")
        await early.run(ADD)
        assert await early.value("SELECT count(*) FROM wire WHERE i = 1") == 3
    assert await house.really() == 2


async def test_a_backend_that_is_killed_ends_the_block_and_not_the_gateway(house: House) -> None:
    connection = await house.connect(Psycopg)
    with anyio.fail_after(60):
        async with house.block():
            await connection.run(ADD)
            number = await connection.value("SELECT pg_backend_pid()")
            await house.past.execute("SELECT pg_terminate_backend($1)", number)
            with pytest.raises(psycopg.OperationalError):
                while True:
                    await connection.run(COUNT)
        again = await house.connect(Psycopg)
        async with house.block():
            await again.run(ADD)
    assert await house.really() == 0
