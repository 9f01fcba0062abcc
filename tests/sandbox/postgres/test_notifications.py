"""LISTEN and NOTIFY in a block: heard as in production, and nothing lasts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import anyio
import asyncpg
import psycopg
import pytest

from .clients import Aiopg, Asyncpg, Connection, Psycopg, Psycopg2
from .conftest import House

pytestmark = pytest.mark.anyio

MADE = """
CREATE TABLE told (i int, late int);
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_notify('x', TG_OP || ' ' || NEW.i); RETURN NEW; END $$;
CREATE TRIGGER tell AFTER INSERT ON told FOR EACH ROW EXECUTE FUNCTION tell();
CREATE TABLE late (i int);
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION tell();
CREATE FUNCTION says() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    NOTIFY x, 'it''s'; NOTIFY x; EXECUTE format('NOTIFY %I, %L', 'x', E'a\\\\b'); NOTIFY y, 'no';
    PERFORM pg_notify('x', 'performed'); END $$;
CREATE FUNCTION catches() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_notify('x', '1');
    BEGIN PERFORM pg_notify('x', 'undone'); PERFORM 1/0; EXCEPTION WHEN division_by_zero THEN END;
    BEGIN PERFORM pg_notify('x', repeat('x', 8000)); EXCEPTION WHEN OTHERS THEN END;
    PERFORM pg_notify('x', '2');
    BEGIN PERFORM pg_notify('x', 'last'); PERFORM 1/0; EXCEPTION WHEN division_by_zero THEN END;
END $$;
CREATE FUNCTION speaks() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    RAISE DEBUG 'debug'; RAISE LOG 'log'; RAISE INFO 'info'; RAISE NOTICE 'notice';
    RAISE WARNING 'warning'; END $$;
CREATE FUNCTION hears() RETURNS void LANGUAGE plpgsql AS $$ BEGIN LISTEN x; END $$;
CREATE FUNCTION past_it() RETURNS void LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_catalog.pg_notify('x', 'past'); END $$;
CREATE FUNCTION own_path() RETURNS void LANGUAGE plpgsql SET search_path = public AS
    $$ BEGIN PERFORM pg_notify('x', 'past'); END $$;
CREATE FUNCTION in_sql() RETURNS void LANGUAGE sql AS $$ NOTIFY x, 'past' $$;
CREATE TABLE ruled (i int);
CREATE RULE ruled AS ON INSERT TO ruled DO ALSO NOTIFY x, 'past';
"""
DROPPED = """
DROP TABLE told, late, ruled CASCADE;
DROP FUNCTION tell, says, catches, speaks, hears, past_it, own_path, in_sql;
"""


@pytest.fixture
async def made(house: House) -> House:
    """A gateway to a database with functions and triggers that notify."""
    await house.past.execute(MADE)
    house.stack.push_async_callback(house.past.execute, DROPPED)
    return house


# -- the same as in production --------------------------------------------------------------------


class Cast:
    """Connections by their names, and what each of them sees."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url, self.stack = url, stack
        self.connections: dict[str, Any] = {}
        self.heard: dict[str, list[tuple[str, str, str]]] = {}
        self.notices: dict[str, list[str]] = {}

    async def connection(self, name: str) -> Any:
        """Connect, the first time."""
        if name not in self.connections:
            made = await psycopg.AsyncConnection.connect(self.url, autocommit=True, prepare_threshold=2)
            self.stack.push_async_callback(made.close)
            heard = self.heard[name] = []
            notices = self.notices[name] = []
            self.connections[name] = made
            made.add_notify_handler(lambda notify: heard.append(self._plain(notify)))
            made.add_notice_handler(lambda notice: notices.append(f"{notice.message_primary}"))
        return self.connections[name]

    def _plain(self, notify: psycopg.Notify) -> tuple[str, str, str]:
        who = {each.info.backend_pid: name for name, each in self.connections.items()}
        return who[notify.pid], notify.channel, notify.payload

    async def act(self, steps: list[str]) -> list[Any]:
        """Do all steps, and see to it that everything has been heard; return what was answered."""
        answers: list[Any] = []
        for step in steps:
            name, _, sql = step.partition(" ")
            connection = await self.connection(name)
            try:
                cursor = await connection.execute(sql)
                answers.append(await cursor.fetchall() if cursor.description else cursor.statusmessage)
            except psycopg.Error as error:
                answers.append((error.sqlstate, error.diag.message_primary))
        last = await self.connection("b")
        for connection in self.connections.values():
            await connection.execute("LISTEN fence")
        await last.execute("NOTIFY fence")
        for name, connection in self.connections.items():
            while not any(channel == "fence" for _, channel, _ in self.heard[name]):
                await connection.execute("SELECT 1")
        return answers


LONG = "repeat('x', 8000)"
PROGRAMS = {
    "payloads": """a LISTEN x
        b NOTIFY x, 'one'
        b NOTIFY x
        b NOTIFY y, 'no'
        b SELECT pg_notify('x', E'ü"''\\\n\t; --')
        b NOTIFY x, E'a\\b\nc'""",
    "names": """a LISTEN "A ""b""), 1"
        a LISTEN Ü
        b NOTIFY "A ""b""), 1", '1'
        b SELECT pg_notify('Ü', '')
        b SELECT pg_notify('A "b"), 1', '2')""",
    "to all": """a LISTEN x
        b LISTEN x
        c LISTEN x
        b NOTIFY x, '1'
        c SELECT 1""",
    "once in a transaction": """a LISTEN x
        b BEGIN
        b NOTIFY x, '1'
        b SELECT pg_notify('x', '2')
        b NOTIFY x, '1'
        b SELECT pg_notify('x', '2')
        b NOTIFY x
        b COMMIT""",
    "undone": """a LISTEN x
        b BEGIN
        b NOTIFY x, '1'
        b ROLLBACK
        b BEGIN
        b NOTIFY x, '2'
        b SELECT 1/0
        b COMMIT
        b NOTIFY x, '3'""",
    "savepoints": """a LISTEN x
        b BEGIN
        b NOTIFY x, '1'
        b SAVEPOINT s
        b SELECT pg_notify('x', '2')
        b SAVEPOINT t
        b NOTIFY x, '3'
        b ROLLBACK TO t
        b NOTIFY x, '4'
        b RELEASE t
        b ROLLBACK TO s
        b NOTIFY x, '5'
        b SELECT 1/0
        b ROLLBACK TO s
        b SAVEPOINT t
        b NOTIFY x, '6'
        b RELEASE t
        b RELEASE s
        b COMMIT""",
    "listening in a transaction": """a BEGIN
        a LISTEN x
        b NOTIFY x, '1'
        a COMMIT
        b NOTIFY x, '2'
        a BEGIN
        a LISTEN y
        a ROLLBACK
        b NOTIFY y, '3'""",
    "listening and savepoints": """a BEGIN
        a LISTEN x
        a SAVEPOINT s
        a LISTEN y
        a UNLISTEN x
        a ROLLBACK TO s
        a COMMIT
        b NOTIFY x, '1'
        b NOTIFY y, '2'""",
    "to itself": """a BEGIN
        a LISTEN x
        a NOTIFY x, '1'
        a COMMIT
        a NOTIFY x, '2'
        a BEGIN
        a NOTIFY x, '3'
        a COMMIT AND CHAIN
        a NOTIFY x, '4'
        a COMMIT""",
    "to itself after it has written": """a BEGIN
        a INSERT INTO wire VALUES (0)
        a LISTEN x
        a NOTIFY x, '1'
        a SELECT pg_notify('x', '2')
        a INSERT INTO told VALUES (3)
        a COMMIT
        b INSERT INTO told VALUES (4)
        b SELECT pg_notify('x', '5')""",
    "to itself after a savepoint": """a BEGIN
        a INSERT INTO wire VALUES (0)
        a SAVEPOINT s
        a LISTEN x
        a ROLLBACK TO s
        a SHOW search_path
        a LISTEN x
        a SELECT pg_notify('x', '1')
        a COMMIT
        b SELECT pg_notify('x', '2')""",
    "to who is in a transaction": """a LISTEN x
        a BEGIN
        b NOTIFY x, '1'
        a SELECT 1
        a COMMIT""",
    "unlisten": """a LISTEN x
        a LISTEN y
        a UNLISTEN x
        b NOTIFY x
        b NOTIFY y
        a UNLISTEN *
        b NOTIFY y
        a LISTEN x
        a BEGIN
        a UNLISTEN x
        a NOTIFY x, '1'
        a COMMIT
        a LISTEN x
        a DISCARD ALL
        b NOTIFY x, '2'""",
    "prepared": """a LISTEN x
        b PREPARE p AS SELECT pg_notify($1, $2)
        b EXECUTE p('x', '1')
        b EXECUTE p('y', '2')
        b BEGIN
        b EXECUTE p('x', '3')
        b EXECUTE p('x', '3')
        b COMMIT""",
    "pg_catalog": "a LISTEN x\nb SELECT pg_catalog.pg_notify('x', 'pg_catalog.pg_notify')",
    "many": "a LISTEN x\nb SELECT pg_notify('x', n::text) FROM generate_series(1, 20) AS n",
    "triggers": """a LISTEN x
        b INSERT INTO told VALUES (1), (2), (1)
        b INSERT INTO late VALUES (1)
        b BEGIN
        b INSERT INTO late VALUES (2)
        b NOTIFY x, 'first'
        b COMMIT""",
    "functions": """a LISTEN x
        b SELECT says()
        b BEGIN
        b SELECT says()
        b ROLLBACK
        b SELECT catches()
        b BEGIN
        b SELECT catches()
        b COMMIT
        b DO $$ BEGIN NOTIFY x, '1'; PERFORM pg_notify('x', '2'); END $$""",
    "listening in functions": """a DO $$ BEGIN LISTEN y; END $$
        a SELECT hears()
        b NOTIFY x
        b NOTIFY y""",
    "scripts": """a LISTEN x; LISTEN y; UNLISTEN y; NOTIFY x, '0'
        b NOTIFY x, '1'; SELECT pg_notify('x', '2'); NOTIFY x, '3'
        b BEGIN; NOTIFY x, '4'; SAVEPOINT s; NOTIFY x, '5'; ROLLBACK TO s; NOTIFY x, '6'; COMMIT
        b BEGIN; NOTIFY x, '7'; ROLLBACK; NOTIFY x, '8'
        b NOTIFY x, '9'; SELECT 1/0
        b SET search_path = public; NOTIFY x, '10'; SET client_min_messages = error; NOTIFY x, '11'
        b BEGIN
        b NOTIFY x, '12'; SAVEPOINT s; NOTIFY x, '13'; ROLLBACK TO s; NOTIFY x, '14'
        b COMMIT""",
    "what is wrong": f"""a LISTEN x
        b SELECT pg_notify('', 'p')
        b SELECT pg_notify(NULL, 'p')
        b LISTEN
        b LISTEN select
        b SELECT pg_notify('x', {LONG})
        b NOTIFY x, '{"x" * 8000}'
        b NOTIFY x, '{"x" * 7999}'
        b SELECT pg_notify(repeat('x', 64), 'p')
        b SELECT pg_notify('x', NULL)
        b NOTIFY x, 1
        a BEGIN
        a SELECT 1/0
        a LISTEN y
        a NOTIFY x
        a ROLLBACK
        b NOTIFY y""",
    "modes": """a LISTEN x
        b BEGIN READ ONLY
        b NOTIFY x, '1'
        b SELECT pg_notify('x', '2')
        b COMMIT
        b BEGIN ISOLATION LEVEL SERIALIZABLE
        b NOTIFY x, '3'
        b COMMIT""",
    "listening where nothing is written": """c BEGIN READ ONLY
        c SELECT 1
        c LISTEN x
        c SELECT pg_notify('x', '1')
        c COMMIT
        b SELECT pg_notify('x', '2')""",
    "search_path": """a LISTEN x
        b SHOW search_path
        b SELECT current_schemas(true)
        b SET search_path TO public, pg_temp
        b SELECT pg_notify('x', '1')
        b SHOW search_path
        b SELECT current_setting('search_path')
        b BEGIN
        b SET LOCAL search_path = public
        b SELECT says()
        b SHOW search_path
        b COMMIT
        b SHOW search_path
        b SELECT says()
        a SHOW search_path
        b RESET search_path
        b SHOW search_path
        b SELECT says()
        b SELECT set_config('search_path', current_setting('search_path') || ', app', false)
        b INSERT INTO told VALUES (1)""",
    "client_min_messages": """a LISTEN x
        b SELECT speaks()
        b SET client_min_messages = warning
        b SHOW client_min_messages
        b SELECT speaks()
        b NOTIFY x, '1'
        b BEGIN
        b SET LOCAL client_min_messages = log
        b SELECT speaks()
        b COMMIT
        b SELECT speaks()
        a SHOW client_min_messages
        a SELECT speaks()
        b RESET ALL
        b SELECT speaks()
        b SELECT says()
        b BEGIN
        b SELECT pg_notify('x', 'kept')
        b RESET ALL
        b SELECT pg_notify('x', 'too')
        b COMMIT
        b SHOW client_min_messages""",
    "pg_listening_channels": """a SELECT pg_listening_channels()
        a LISTEN x
        a LISTEN "Y y"
        b SELECT pg_listening_channels()
        a SELECT * FROM pg_listening_channels() AS c ORDER BY c
        a UNLISTEN *
        a SELECT count(*) FROM pg_listening_channels()""",
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("before", [False, True], ids=["", "after another block"])
async def test_a_program_hears_and_sees_the_same_as_in_production(
    made: House, name: str, before: bool
) -> None:
    steps = [line.strip() for line in PROGRAMS[name].splitlines()]
    with anyio.fail_after(60):
        async with AsyncExitStack() as stack:
            real, boxed = Cast(made.url, stack), Cast(made.through, stack)
            answers = await real.act(steps)
            await made.past.execute("TRUNCATE told, late")
            if before:
                async with made.block():
                    await boxed.act(steps)
                assert boxed.heard == real.heard
                boxed = Cast(made.through, stack)
            async with made.block():
                assert await boxed.act(steps) == answers
            assert (boxed.heard, boxed.notices) == (real.heard, real.notices)


CHANNELS = "SELECT count(*) FROM pg_listening_channels()"

# -- each client ----------------------------------------------------------------------------------

Told = tuple[int, str, str]
Hearing = AsyncGenerator[Told | None]
"""None when it listens to channel x; then what comes: who sent it, the channel and the payload."""


async def _asyncpg(connection: Any) -> Hearing:
    told: asyncio.Queue[Told] = asyncio.Queue()

    def hear(_: Any, number: int, channel: str, payload: object) -> None:
        told.put_nowait((number, channel, str(payload)))

    await connection.add_listener("x", hear)
    try:
        yield None
        while True:
            yield await told.get()
    finally:
        await connection.remove_listener("x", hear)


async def _aiopg(connection: Any) -> Hearing:
    async with connection.cursor() as cursor:
        await cursor.execute("LISTEN x")
    yield None
    while True:
        notify = await connection.notifies.get()
        yield notify.pid, notify.channel, notify.payload


async def _psycopg(connection: Any) -> Hearing:
    await connection.execute("LISTEN x")
    yield None
    async for notify in connection.notifies():
        yield notify.pid, notify.channel, notify.payload


async def _psycopg2(connection: Any) -> Hearing:
    with connection.cursor() as cursor:
        await asyncio.to_thread(cursor.execute, "LISTEN x")
    yield None
    while True:
        await anyio.wait_readable(connection)
        connection.poll()
        while connection.notifies:
            notify = connection.notifies.pop(0)
            yield notify.pid, notify.channel, notify.payload


HEARS: dict[type[Connection], Callable[[Any], Hearing]] = {
    Asyncpg: _asyncpg,
    Aiopg: _aiopg,
    Psycopg: _psycopg,
    Psycopg2: _psycopg2,
}
each = pytest.mark.parametrize("kind", HEARS, ids=lambda kind: kind.__name__)


@asynccontextmanager
async def listening(house: House, kind: type[Connection]) -> AsyncGenerator[Hearing]:
    """What a client of that kind hears."""
    connection = await house.connect(kind)
    async with aclosing(HEARS[kind](connection.real)) as hearing:
        assert await anext(hearing) is None
        yield hearing


async def heard(hearing: Hearing) -> Told:
    """Return what is heard next."""
    told = await anext(hearing)
    assert told is not None
    return told


async def send(house: House, sql: str) -> int:
    """Run something on a connection of its own; return its number."""
    connection = await asyncpg.connect(house.through)
    await connection.execute(sql)
    await connection.close()
    number: int = connection.get_server_pid()
    return number


@each
async def test_who_has_listened_since_before_hears_what_the_block_sends(
    house: House, kind: type[Connection]
) -> None:
    with anyio.fail_after(60):
        async with listening(house, kind) as hearing:
            for _ in range(2):
                async with house.block():
                    number = await send(house, "NOTIFY x, 'one'")
                    assert await anext(hearing) == (number, "x", "one")
                    number = await send(house, "BEGIN; SELECT pg_notify('x', 'two'); COMMIT")
                    assert await anext(hearing) == (number, "x", "two")
                await house.past.execute("NOTIFY x, 'real'")
                assert await anext(hearing) == (house.past.get_server_pid(), "x", "real")


@each
async def test_who_listens_inside_hears_it_and_nothing_afterwards(
    house: House, kind: type[Connection]
) -> None:
    connection = await house.connect(kind)
    with anyio.fail_after(60):
        async with listening(house, Asyncpg) as outside:
            async with house.block(), aclosing(HEARS[kind](connection.real)) as inside:
                await anext(inside)
                number = await send(house, "NOTIFY x, 'inside'")
                for hearing in (inside, outside):
                    assert await anext(hearing) == (number, "x", "inside")
                if kind is Asyncpg:  # which says UNLISTEN when it is closed
                    await connection.run("LISTEN y")
            assert await connection.value(CHANNELS) == 0
            await house.past.execute("NOTIFY x, 'outside'")
            assert await anext(outside) == (house.past.get_server_pid(), "x", "outside")
            async with house.block():
                assert await connection.value(CHANNELS) == 0


async def test_what_a_block_sends_is_heard_by_nobody_outside_of_it(house: House) -> None:
    async with aclosing(_asyncpg(house.past)) as hearing:
        await anext(hearing)
        early = await house.connect(Psycopg)
        await early.run("LISTEN x")
        await early.run("BEGIN")
        async with house.block():
            await send(house, "NOTIFY x, 'inside'")
            await early.run("COMMIT")
            await send(house, "NOTIFY x, 'now'")
            with anyio.fail_after(60):
                notify = await anext(early.real.notifies())
        assert notify.payload == "now"
        await send(house, "NOTIFY x, 'outside'")
        with anyio.fail_after(60):
            assert (await heard(hearing))[2] == "outside"


async def test_what_is_really_sent_reaches_who_has_listened_although_its_connection_is_lent(
    house: House,
) -> None:
    """At the latest when the block ends, for until then that connection is in a transaction."""
    listener = await house.connect(Psycopg)
    await listener.run("LISTEN x")
    with anyio.fail_after(60):
        async with house.block():
            assert await listener.value("SELECT 1") == 1
            number = await listener.value("SELECT pg_backend_pid()")
            await house.past.execute("NOTIFY x, 'real'")
        notify = await anext(listener.real.notifies())
        assert (notify.pid, notify.payload) == (house.past.get_server_pid(), "real")
        assert await listener.value("SELECT pg_backend_pid()") == number


async def test_a_pool_forgets_what_was_listened_to(made: House) -> None:
    async with asyncpg.create_pool(made.through, min_size=1, max_size=1) as pool, made.block():
        for sql in ("LISTEN x", "LISTEN x; SET work_mem = '1MB'", "SELECT hears()"):
            async with pool.acquire() as connection:
                await connection.execute(sql)
                assert await connection.fetchval(CHANNELS) == 1
            assert await pool.fetchval(CHANNELS) == 0


async def test_settings_that_clients_begin_with_stay_their_own(made: House) -> None:
    options = {"search_path": "pg_temp,public", "client_min_messages": "error"}
    async with listening(made, Psycopg) as hearing, made.block():
        one = (await made.connect(Asyncpg)).real
        other = await asyncpg.connect(made.through, server_settings=options)
        made.stack.push_async_callback(other.close)
        notices: list[str] = []

        def notice(_: Any, told: Any) -> None:
            notices.append(told.message)

        for connection in (one, other):
            connection.add_log_listener(notice)
        with anyio.fail_after(60):
            for _ in range(2):
                for connection, path, level in (
                    (one, '"$user", public', "notice"),
                    (other, "pg_temp,public", "error"),
                ):
                    await connection.execute("SELECT speaks(), pg_notify('x', 'p')")
                    assert await heard(hearing) == (connection.get_server_pid(), "x", "p")
                    assert await connection.fetchval("SHOW search_path") == path
                    assert await connection.fetchval("SHOW client_min_messages") == level
    assert notices == ["info", "notice", "warning", "info"] * 2


async def test_pipelines_of_psycopg(house: House) -> None:
    async with listening(house, Asyncpg) as hearing, house.block():
        connection: Any = (await house.connect(Psycopg)).real
        async with connection.pipeline():
            await connection.execute("SELECT pg_notify('x', %s)", ("1",))
            await connection.execute("NOTIFY x, '2'")
            await connection.execute("SHOW search_path")
            await connection.execute("NOTIFY x, '3'")
        async with connection.transaction(), connection.pipeline():
            await connection.execute("NOTIFY x, '4'")
            await connection.execute("SAVEPOINT s")
            await connection.execute("NOTIFY x, '5'")
            await connection.execute("ROLLBACK TO s")
            await connection.execute("NOTIFY x, '6'")
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with connection.pipeline():
                await connection.execute("NOTIFY x, '7'")
                await connection.execute("SELECT 1/0")
        await connection.execute("NOTIFY x, '8'")
        with anyio.fail_after(60):
            told = [await heard(hearing) for _ in range(6)]
        assert [payload for _, _, payload in told] == ["1", "2", "3", "4", "6", "8"]


# -- what can't be delivered ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "told_by"),
    [
        ("SELECT past_it()", "function past_it()"),
        ("SELECT own_path()", "function own_path()"),
        ("SELECT in_sql()", 'function "in_sql"'),
        ("INSERT INTO ruled VALUES (1)", "a statement of the client's"),
    ],
)
async def test_what_cant_be_known_is_refused_where_somebody_listens(
    made: House, sql: str, told_by: str
) -> None:
    async with listening(made, Psycopg) as hearing, made.block():
        connection = (await made.connect(Asyncpg)).real
        for texts in ([sql], ["BEGIN", "INSERT INTO wire VALUES (1)", sql, "COMMIT"]):
            *first, last = texts
            for text in first:
                await connection.execute(text)
            with pytest.raises(asyncpg.FeatureNotSupportedError, match='channel "x"') as caught:
                await connection.fetch(last)
            assert told_by in (caught.value.detail or "")
            assert not connection.is_in_transaction()
        assert await connection.fetchval("SELECT count(*) FROM wire") == 0
        await connection.execute("NOTIFY x, 'known'")
        with anyio.fail_after(60):
            assert (await heard(hearing))[2] == "known"


async def test_what_cant_be_known_passes_where_nobody_listens(made: House) -> None:
    async with made.block():
        connection = await made.connect(Asyncpg)
        await connection.run("LISTEN y")
        await connection.run("SELECT past_it()")
        await connection.run("BEGIN; SELECT past_it(); ROLLBACK; LISTEN x")
        await connection.run("BEGIN; SAVEPOINT s; SELECT past_it(); ROLLBACK TO s; COMMIT")


ROLES = """DROP ROLE IF EXISTS listener; CREATE ROLE listener LOGIN PASSWORD 'secret';
GRANT ALL ON wire TO listener"""


async def test_users_of_one_database_hear_each_other_and_may_create_nothing(made: House) -> None:
    """NOTIFY takes no rights; what pg_notify() is given is known where the role may create a schema."""
    await made.past.execute(ROLES)
    made.stack.push_async_callback(made.past.execute, "DROP OWNED BY listener; DROP ROLE listener")
    _, _, rest = made.through.rpartition("@")
    own = f"postgresql://listener:secret@{rest}"
    with anyio.fail_after(60):
        async with listening(made, Psycopg) as hearing, made.block():
            connection = await asyncpg.connect(own)
            made.stack.push_async_callback(connection.close)
            await connection.execute("NOTIFY x, 'one'")
            await connection.execute("DO $$ BEGIN NOTIFY x, 'two'; END $$")
            number = connection.get_server_pid()
            for payload in ("one", "two"):
                assert await anext(hearing) == (number, "x", payload)
            with pytest.raises(asyncpg.FeatureNotSupportedError, match='channel "x"'):
                await connection.execute("SELECT pg_notify('x', 'three')")
            async with aclosing(_asyncpg(connection)) as other:
                await anext(other)
                number = await send(made, "SELECT pg_notify('x', 'four')")
                assert await anext(other) == await anext(hearing) == (number, "x", "four")


async def test_a_role_that_is_set_sends_as_well(made: House) -> None:
    await made.past.execute(ROLES)
    made.stack.push_async_callback(made.past.execute, "DROP OWNED BY listener; DROP ROLE listener")
    async with listening(made, Psycopg) as hearing, made.block():
        connection = (await made.connect(Asyncpg)).real
        await connection.execute("SET ROLE listener")
        for _ in range(2):
            await connection.execute("SELECT pg_notify('x', current_user)")
            with anyio.fail_after(60):
                assert (await heard(hearing))[2] == "listener"
            await connection.execute("RESET ROLE; SET ROLE listener")


async def test_where_nobody_listens_nothing_is_done_for_it(house: House) -> None:
    async with house.block():
        connection = await house.connect(Asyncpg)
        await connection.run("NOTIFY x, 'one'")
        await connection.run("SELECT pg_notify('x', 'two')")
        assert await connection.value("SHOW trace_notify") == "off"
        assert await connection.value("SHOW client_min_messages") == "notice"
        own = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'lifekit%'"
        assert await connection.value(own) == 0
        await connection.run("LISTEN x")
        assert await connection.value(own) == 1
    assert await house.past.fetchval(own) == 0
