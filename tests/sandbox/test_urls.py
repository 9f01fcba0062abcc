"""What takes a URL is in the sandbox: subprocesses, and libraries that lifekit knows nothing of."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import databases
import psycopg2
import pytest
from tortoise import Tortoise, fields
from tortoise.exceptions import IntegrityError
from tortoise.models import Model
from tortoise.transactions import in_transaction

from lifekit import Lifespan, Registry, SandboxEscapedError, embedded
from lifekit.testing import sandboxing

pytestmark = pytest.mark.anyio
COUNT = "SELECT count(*) FROM item"


@pytest.fixture
def anyio_backend() -> object:
    """These clients are asyncio's."""
    return "asyncio", {"use_uvloop": False}


def program(name: str) -> str:
    """Return a program of PostgreSQL's."""
    found = embedded._find_postgres().with_name(name)  # pyright: ignore[reportPrivateUsage]
    if not found.exists():
        pytest.skip(f"{found} is not there")
    return str(found)


class House(NamedTuple):
    """A lifespan with a server as a value, and a pool that is connected by its URL."""

    lifespan: Lifespan
    server: embedded.Server
    pool: asyncpg.Pool[Any]

    @property
    def url(self) -> str:
        """Where others connect."""
        return self.server.url


@asynccontextmanager
async def house_of(
    postgres: embedded.Server, orm: Callable[[str], Any] | None = None
) -> AsyncGenerator[House]:
    """Open one, on a database of its own."""
    admin = await asyncpg.connect(postgres.url)
    await admin.execute("DROP DATABASE IF EXISTS urls WITH (FORCE)")
    await admin.execute("CREATE DATABASE urls")
    await admin.close()
    registry = Registry("urls")

    @registry.resource
    def server() -> Any:
        return embedded.postgres(f"{postgres.url.rpartition('/')[0]}/urls")

    @registry.resource(server)
    def pool(server: embedded.Server) -> asyncpg.Pool[Any]:
        return asyncpg.create_pool(server.url, min_size=1, max_size=4)

    @registry.resource(pool)
    async def schema(pool: asyncpg.Pool[Any]) -> None:
        await pool.execute("CREATE TABLE item (id serial PRIMARY KEY, name varchar(50) UNIQUE)")

    if orm is not None:
        registry.resource(server, after=(schema,), name="orm")(lambda server: orm(server.url))
    with sandboxing():
        async with registry.lifespan() as lifespan:
            yield House(lifespan, lifespan[server], lifespan[pool])
            assert await lifespan[pool].fetchval(COUNT) == 0


@pytest.fixture
async def house(postgres: embedded.Server) -> AsyncGenerator[House]:
    """One without a further library."""
    async with house_of(postgres) as house:
        yield house


def run(*command: str, said: str = "", **variables: str) -> str:
    """Run a program to its end, blocking the event loop; return what it wrote."""
    environment = {**os.environ, **variables}
    done = subprocess.run(command, input=said, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_psql_and_the_application_see_the_same_rows(house: House) -> None:
    """Though it is waited for by code that blocks the event loop."""
    psql = program("psql")
    for _ in range(2):
        async with house.lifespan.sandbox():
            await house.pool.execute("INSERT INTO item (name) VALUES ('a')")
            script = "BEGIN; INSERT INTO item (name) VALUES ('b'); COMMIT; SELECT count(*) FROM item"
            assert run(psql, house.url, "-qAtc", script) == "2\n"
            assert await house.pool.fetchval(COUNT) == 2
        assert run(psql, house.url, "-Atc", COUNT) == "0\n"


async def test_a_dump_has_the_blocks_rows_and_can_be_restored(house: House) -> None:
    async with house.lifespan.sandbox():
        await house.pool.execute("INSERT INTO item (name) VALUES ('only here')")
        dump = run(program("pg_dump"), "-t", "item", house.url)
        assert "only here" in dump
        await house.pool.execute("DROP TABLE item")
        run(program("psql"), "-qv", "ON_ERROR_STOP=1", house.url, said=dump)
        assert await house.pool.fetchval("SELECT name FROM public.item") == "only here"


async def test_its_password_is_the_servers_own_and_is_not_shown(
    house: House, postgres: embedded.Server
) -> None:
    secret = urlsplit(postgres.url).password or ""
    assert secret in house.url
    assert secret not in repr(house.server)
    assert f":{urlsplit(house.url).port}/urls" in repr(house.server)
    assert urlsplit(house.url).port != urlsplit(postgres.url).port
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(house.url.replace(secret, "wrong"))


async def test_a_client_of_lifekits_goes_by_one_gateway(house: House) -> None:
    """It leads to the server, not to the port that leads to the server by the gateway."""
    await house.pool.fetchval("SELECT 1")
    sandbox: Any = house.lifespan.postgres
    connected = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'urls'"
    assert await house.pool.fetchval(connected) == len(sandbox.gateway.hub.clients)


async def test_its_url_is_as_it_was_when_the_lifespan_has_ended(postgres: embedded.Server) -> None:
    registry = Registry("given")
    given = embedded.Server(postgres.url, None)
    server = registry.resource(name="server")(lambda: given)
    with sandboxing():
        async with registry.lifespan() as lifespan:
            assert lifespan[server].url != postgres.url
    assert given.url == postgres.url


async def test_a_subprocess_that_is_left_in_a_transaction_is_cut_off_and_named(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifekit._sandbox.postgres.session.PATIENCE", 0.2)
    command = [program("psql"), "-qAt", house.url]
    process = await asyncio.create_subprocess_exec(*command, stdin=-1, stdout=-1, stderr=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    with pytest.raises(SandboxEscapedError, match="It calls itself 'psql'"):
        async with house.lifespan.sandbox():
            process.stdin.write(b"BEGIN; INSERT INTO item DEFAULT VALUES RETURNING 'there';\n")
            await process.stdin.drain()
            assert await process.stdout.readline() == b"there\n"
    with suppress(OSError):
        process.stdin.write(b"SELECT 1;\n")
    _, complaint = await process.communicate()
    assert b"lifekit's sandbox ended while this was under way" in complaint


# -- Alembic ------------------------------------------------------------------------------------------

RUN = """
def run(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
SYNC = f"""
import os
from alembic import context
from sqlalchemy import NullPool, create_engine
{RUN}
url = os.environ["URL"].replace("postgresql:", "postgresql+%s:")
with create_engine(url, poolclass=NullPool).connect() as connection:
    run(connection)
"""
ASYNC = f"""
import asyncio, os
from alembic import context
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import create_async_engine
{RUN}
async def main():
    url = os.environ["URL"].replace("postgresql:", "postgresql+%s:")
    async with create_async_engine(url, poolclass=NullPool).connect() as connection:
        await connection.run_sync(run)

asyncio.run(main())
"""
MIGRATION = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "1", None

def upgrade():
    id = sa.Column("id", sa.Integer, primary_key=True)
    op.create_table("migrated", id, sa.Column("name", sa.String))
    table = sa.table("migrated", sa.column("name", sa.String))
    op.bulk_insert(table, [{"name": "a"}, {"name": "b"}])

def downgrade():
    op.drop_table("migrated")
"""
ENVIRONMENTS = {
    **{f"sync on {driver}": SYNC % driver for driver in ("psycopg2", "psycopg", "pg8000")},
    **{f"async on {driver}": ASYNC % driver for driver in ("asyncpg", "psycopg")},
}


@pytest.mark.long
@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
async def test_a_migration_is_undone(house: House, tmp_path: Path, environment: str) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(environment)
    (tmp_path / "versions" / "one.py").write_text(MIGRATION)
    (tmp_path / "alembic.ini").write_text(f"[alembic]\nscript_location = {tmp_path}\n")
    alembic = (sys.executable, "-m", "alembic", "-c", str(tmp_path / "alembic.ini"))
    table = "SELECT to_regclass('migrated')"
    async with house.lifespan.sandbox():
        run(*alembic, "upgrade", "head", URL=house.url)
        names = await house.pool.fetch("SELECT name FROM migrated ORDER BY id")
        assert [name for (name,) in names] == ["a", "b"]
        assert await house.pool.fetchval("SELECT version_num FROM alembic_version") == "1"
        run(*alembic, "downgrade", "base", URL=house.url)
        assert await house.pool.fetchval(table) is None
        run(*alembic, "upgrade", "head", URL=house.url)
    assert await house.pool.fetchval(table) is None


# -- libraries ----------------------------------------------------------------------------------------


class Item(Model):
    """A row, as Tortoise has it."""

    id = fields.IntField(primary_key=True)
    name = fields.CharField(max_length=50, unique=True)

    class Meta:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where it is."""

        table = "item"


@asynccontextmanager
async def tortoise_on(url: str, driver: str) -> AsyncGenerator[None]:
    """Open Tortoise's connections."""
    # By a name of its own: Tortoise remembers how to speak to a connection of that name.
    config = {
        "connections": {driver: url.replace("postgresql:", f"{driver}:")},
        "apps": {"models": {"models": [__name__], "default_connection": driver}},
    }
    await Tortoise.init(config=config, _enable_global_fallback=True)
    yield
    await Tortoise.close_connections()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_tortoise_is_undone(postgres: embedded.Server, driver: str) -> None:
    """Transactions, failures, many at once, get_or_create."""
    async with house_of(postgres, lambda url: tortoise_on(url, driver)) as house:
        for _ in range(2):
            async with house.lifespan.sandbox():
                await Item.create(name="a")
                async with in_transaction():
                    await Item.create(name="b")
                    async with in_transaction():
                        await Item.create(name="c")
                with suppress(KeyError):
                    async with in_transaction():
                        await Item.create(name="never")
                        raise KeyError
                with pytest.raises(IntegrityError):
                    await Item.create(name="a")
                await Item.bulk_create([Item(name=f"bulk {n}") for n in range(50)])
                await asyncio.gather(*(Item.create(name=f"at once {n}") for n in range(10)))
                model: Any = Item
                assert [(await model.get_or_create(name=name))[1] for name in "ad"] == [False, True]
                await Item.select_for_update().filter(name="a").update(name="e")
                assert await Item.all().count() == 64
                assert await Item.filter(name__in=["a", "e", "never"]).values_list("name") == [("e",)]
                assert await house.pool.fetchval(COUNT) == 64


async def test_databases_is_undone(postgres: embedded.Server) -> None:
    """Where code opens it by itself."""
    async with house_of(postgres) as house, databases.Database(house.url) as opened:
        library: Any = opened
        add = "INSERT INTO item (name) VALUES (:name)"
        for _ in range(2):
            async with house.lifespan.sandbox():
                await library.execute(add, {"name": "a"})
                async with library.transaction():
                    await library.execute_many(add, [{"name": f"{n}"} for n in range(5)])
                with suppress(KeyError):
                    async with library.transaction():
                        await library.execute(add, {"name": "never"})
                        raise KeyError
                adding: list[Awaitable[Any]] = [
                    library.execute(add, {"name": f"at once {n}"}) for n in range(8)
                ]
                await asyncio.gather(*adding)
                assert [row[0] async for row in library.iterate(COUNT)] == [14]
                assert await house.pool.fetchval(COUNT) == 14
