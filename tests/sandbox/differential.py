"""The same application in production and in a sandbox: what it sees is compared, step by step."""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lifekit import Registry, SandboxBusyError, drivers
from lifekit.drivers._doors import by_way_of
from lifekit.embedded import Server
from lifekit.testing import sandboxing

SCHEMA = """
DROP SCHEMA IF EXISTS app CASCADE;
CREATE SCHEMA app;
CREATE TABLE app.parent (id int PRIMARY KEY, v text NOT NULL DEFAULT 'x');
CREATE TABLE app.child (
    id int PRIMARY KEY,
    parent int REFERENCES app.parent DEFERRABLE INITIALLY DEFERRED,
    strict int REFERENCES app.parent DEFERRABLE INITIALLY IMMEDIATE,
    u int CONSTRAINT child_u UNIQUE DEFERRABLE INITIALLY DEFERRED
);
CREATE TABLE app.item (id serial PRIMARY KEY, v int CONSTRAINT positive CHECK (v >= 0));
CREATE TABLE app.log (line text);
CREATE TABLE app.watched (id int PRIMARY KEY);
CREATE FUNCTION app.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.id < 0 THEN RAISE EXCEPTION 'watched: %', NEW.id; END IF;
    INSERT INTO app.log VALUES ('checked ' || NEW.id); RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER watch AFTER INSERT ON app.watched DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION app.note();
INSERT INTO app.parent VALUES (1, 'one'), (2, '2');
INSERT INTO app.child VALUES (1, 1, 1, 1);
INSERT INTO app.item (v) VALUES (10), (20);
"""

POOL = 3
"""Who acts: one of three connections, or the pool itself."""

SLEEPERS = """SELECT pid || ' ' || query_start FROM pg_stat_activity
WHERE wait_event = 'PgSleep' AND datname = current_database()"""


@dataclass(frozen=True)
class Op:
    """One operation: the name of one of the application's methods, who acts, and with what."""

    what: str
    who: int
    args: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        who = "pool" if self.who == POOL else f"c{self.who}"
        return f"{who}.{self.what}({', '.join(map(repr, self.args))})"


Seen = tuple[Any, ...]


def text_of(op: Op) -> str:
    """The SQL of an operation, if it has any."""
    return str(op.args[0]) if op.args and isinstance(op.args[0], str) else ""


def lends(op: Op) -> bool:
    """Whether a transaction that did this, and no more, lends the connection to others."""
    if op.what == "begin":
        return not any(op.args)
    return op.what in ("execute", "fetch") and text_of(op) in LENDING


class Application:
    """Does what it is told with a pool, and writes down what it sees.

    It acts in methods that take who acts, and what else the operation has.
    """

    admin: Any
    """A connection to its database that it does not see."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.held: dict[int, Any] = {}
        self.busy: int | None = None
        """Who is in a transaction that others may have to wait for."""

    @abstractmethod
    def in_transaction(self, who: int) -> bool:
        """Whether the connection is in a transaction."""

    async def do(self, op: Op) -> Seen:
        """What the application sees of one operation."""
        if op.who != POOL and op.what != "acquire" and op.who not in self.held:
            return ("not acquired",)
        try:
            async with asyncio.timeout(60):
                seen: Seen = ("fine", self.plain(await getattr(self, op.what)(op.who, *op.args)))
        except SandboxBusyError:
            return ("busy",)
        except Exception as error:
            seen = (type(error).__name__, getattr(error, "sqlstate", None), self.text(error))
        if op.who in self.held:
            seen += ("in transaction" if self.in_transaction(op.who) else "",)
        self.note(op)
        return seen

    async def asleep(self, statement: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a statement that sleeps; return its task once the server is at it, or it has failed."""
        before = await self._sleepers()
        task = asyncio.create_task(statement)
        while not task.done() and await self._sleepers() <= before:
            pass
        return task

    async def _sleepers(self) -> set[str]:
        return {row[0] for row in await self.admin.fetch(SLEEPERS)}

    def plain(self, value: Any) -> Any:
        """What can be compared of an answer."""
        return value

    def text(self, error: Exception) -> str:
        """What an error says, but for what is another each time."""
        # A session goes on calling a function as its search_path once let it.
        said = str(error).replace("function app.note()", "function note()")
        return re.sub(r"__asyncpg_(\w+?)_\w+__|0x[0-9a-f]+", r"\1", said)

    def note(self, op: Op) -> None:
        """Find who is in a transaction, which it lends as long as it only reads."""
        if op.who in self.held and self.in_transaction(op.who):
            if not lends(op):
                self.busy = op.who
        elif self.busy == op.who:
            self.busy = None

    async def finish(self) -> list[Any]:
        """Give everything back, first what others would wait for, and look at what there is."""
        held = sorted(self.held, key=lambda who: (who != self.busy, who))
        seen: list[Any] = [await self.do(Op("release", who)) for who in held]
        for table in ("parent", "child", "item", "log", "watched"):
            query = f"SELECT t::text FROM app.{table} AS t ORDER BY 1"
            seen.append((table, await self.do(Op("fetch", POOL, (query,)))))
        return seen


READS = [
    "SELECT id, v FROM app.parent ORDER BY id",
    "SELECT id, parent, strict, u FROM app.child ORDER BY id",
    "SELECT id, v FROM app.item ORDER BY id",
    "SELECT line FROM app.log ORDER BY line",
    "SELECT * FROM app.parent ORDER BY id",
    "SELECT v::int FROM app.parent ORDER BY id",
    "SELECT 1/0",
    "SELECT nonsense",
    "SHOW transaction_isolation",
    "SHOW transaction_read_only",
    "SHOW transaction_deferrable",
    "SHOW work_mem",
    "SHOW search_path",
    "SELECT current_setting('app.name', true)",
    "SELECT set_config('app.name', 'ann', true)",
    "SELECT set_config('app.name', 'bob', false)",
    "SELECT set_config('work_mem', '123kB', true)",
    "SELECT nextval('app.item_id_seq')",
    "SELECT currval('app.item_id_seq')",
    "SELECT lastval()",
    "SELECT setval('app.item_id_seq', 50)",
    "SELECT to_regclass('app.extra')::text",
    "SELECT * FROM app.extra",
    "SELECT pg_try_advisory_lock(7)",
    "SELECT pg_try_advisory_xact_lock(8)",
    "SELECT pg_advisory_unlock(7)",
    "SELECT count(*) FROM pg_cursors WHERE name NOT LIKE '%asyncpg%'",
    "FETCH 1 FROM own",
    "FETCH ALL FROM own",
    "EXECUTE saved",
    "DELETE FROM app.child WHERE id = 1 RETURNING id",
    "INSERT INTO app.item (v) VALUES (5) RETURNING id",
    "INSERT INTO app.parent VALUES (3) ON CONFLICT DO NOTHING RETURNING id",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT s1",
    "RELEASE s1",
    "ROLLBACK TO s1",
    "SELECT 1; SELECT 2",
    "",
]
WRITES = [
    "INSERT INTO app.parent VALUES (3, 'three')",
    "INSERT INTO app.parent VALUES (1, 'again')",
    "INSERT INTO app.child VALUES (2, 3, NULL, 2)",
    "INSERT INTO app.child VALUES (3, NULL, 3, 3)",
    "INSERT INTO app.child VALUES (4, 1, 1, 1)",
    "INSERT INTO app.item (v) VALUES (-1)",
    "INSERT INTO app.item (v) VALUES (1)",
    "INSERT INTO app.watched VALUES (1)",
    "INSERT INTO app.watched VALUES (-1)",
    "UPDATE app.parent SET v = v || '+'",
    "UPDATE app.child SET u = 2",
    "UPDATE app.item SET v = v - 15",
    "DELETE FROM app.parent WHERE id = 1",
    "DELETE FROM app.parent WHERE id = 3",
    "DELETE FROM app.child",
    "TRUNCATE app.item RESTART IDENTITY",
    "TRUNCATE app.parent CASCADE",
    "TRUNCATE app.parent",
]
CONTROL = [
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "COMMIT AND CHAIN",
    "ROLLBACK AND CHAIN",
    "END",
    "ABORT",
    "BEGIN READ ONLY",
    "BEGIN ISOLATION LEVEL SERIALIZABLE",
    "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY",
    "START TRANSACTION",
    "SAVEPOINT s1",
    "SAVEPOINT s2",
    "RELEASE s1",
    "RELEASE SAVEPOINT s2",
    "ROLLBACK TO s1",
    "ROLLBACK TO SAVEPOINT s2",
    "SET CONSTRAINTS ALL IMMEDIATE",
    "SET CONSTRAINTS ALL DEFERRED",
    "SET CONSTRAINTS app.child_u IMMEDIATE",
    "SET CONSTRAINTS app.child_strict_fkey DEFERRED",
    "SET TRANSACTION READ ONLY",
    "SET TRANSACTION READ WRITE",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET TRANSACTION ISOLATION LEVEL READ COMMITTED",
]
SESSION = [
    "SET LOCAL work_mem = '234kB'",
    "SET work_mem = '345kB'",
    "RESET work_mem",
    "RESET ALL",
    "SET app.name = 'eve'",
    "SET LOCAL app.name = 'joe'",
    "SET search_path = app",
    "SET LOCAL search_path = app",
    "SET LOCAL statement_timeout = '15s'",
    "SET default_transaction_read_only = on",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "DECLARE own CURSOR FOR SELECT id FROM app.parent ORDER BY id",
    "DECLARE own CURSOR WITH HOLD FOR SELECT id FROM app.parent ORDER BY id",
    "CLOSE own",
    "CLOSE ALL",
    "PREPARE saved AS SELECT id, v FROM app.parent ORDER BY id",
    "DEALLOCATE saved",
    "DEALLOCATE ALL",
    "DISCARD PLANS",
    "LOCK TABLE app.parent",
]
DDL = [
    "CREATE TABLE app.extra (a int)",
    "CREATE TABLE app.extra (b text)",
    "INSERT INTO app.extra VALUES (1)",
    "DROP TABLE app.extra",
    "ALTER TABLE app.parent ADD COLUMN w int",
    "ALTER TABLE app.parent DROP COLUMN w",
    "ALTER TABLE app.child ADD CONSTRAINT more UNIQUE (strict) DEFERRABLE INITIALLY DEFERRED",
    "ALTER TABLE app.child DROP CONSTRAINT child_u",
    "CREATE INDEX own_index ON app.item (v)",
    "CREATE TEMP TABLE temp (a int)",
    "CREATE TEMP TABLE temp (a int) ON COMMIT DROP",
    "CREATE TABLE app.copied AS SELECT id FROM app.parent",
    "SELECT id INTO app.copied FROM app.parent",
    "DO $$ BEGIN INSERT INTO app.item (v) VALUES (7); END $$",
    "DO $$ BEGIN INSERT INTO app.item (v) VALUES (-7); EXCEPTION WHEN OTHERS THEN NULL; END $$",
]
SCRIPTS = [
    "INSERT INTO app.item (v) VALUES (2); INSERT INTO app.item (v) VALUES (3)",
    "INSERT INTO app.item (v) VALUES (2); INSERT INTO app.item (v) VALUES (-3)",
    "BEGIN; INSERT INTO app.item (v) VALUES (2); COMMIT",
    "BEGIN; INSERT INTO app.item (v) VALUES (2); ROLLBACK",
    "BEGIN; INSERT INTO app.item (v) VALUES (-2); COMMIT",
    "BEGIN; INSERT INTO app.item (v) VALUES (2); SAVEPOINT s1; DELETE FROM app.item; ROLLBACK TO s1",
    "INSERT INTO app.item (v) VALUES (2); nonsense",
    "BEGIN; INSERT INTO app.item (v) VALUES (2); COMMIT; nonsense",
    "COMMIT; BEGIN",
    "BEGIN; COMMIT; BEGIN",
    "SELECT 1; -- nothing more",
    "SET LOCAL work_mem = '111kB'; SET work_mem = '222kB'",
    "NOTIFY nobody; NOTIFY nobody, 'news'",
    "WITH new AS (INSERT INTO app.item (v) VALUES (9) RETURNING v) SELECT v FROM new",
    "SELECT id FROM app.parent ORDER BY id FOR UPDATE",
    "EXPLAIN (ANALYZE, BUFFERS OFF, COSTS OFF, TIMING OFF, SUMMARY OFF) DELETE FROM app.item",
]

LENDING = {"BEGIN", *READS[:4]}


@dataclass(frozen=True)
class Limit:
    """Where an application may see something else than in production.

    Args:
        reason: What users are told.
        applies: Whether this is it, given the operation, what was seen in production, what in the
            sandbox, and the operations before.
        ends: Whether all that follows may differ as well, and is not compared.
    """

    reason: str
    applies: Callable[[Op, Seen, Seen, Sequence[Op]], bool]
    ends: bool = True


TABLES = ("app.parent", "app.child", "app.item", "app.log", "app.watched")
CATALOGS = (
    "class",
    "attribute",
    "constraint",
    "type",
    "proc",
    "namespace",
    "trigger",
    "index",
    "settings",
)
DEFERRABLE = Limit(
    "DEFERRABLE is accepted at any time, and means nothing",
    lambda op, here, there, before: (
        "DEFERRABLE must be called before any query" in str(here) and there[0] == "fine"
    ),
)

LEVEL_SHOWN = Limit(
    "the isolation level and DEFERRABLE are those of the real transaction, and SHOW tells so",
    lambda op, here, there, before: (
        (
            op.what == "isolation"
            or text_of(op) in ("SHOW transaction_isolation", "SHOW transaction_deferrable")
        )
        and here[0] == there[0]
    ),
    ends=False,
)
NEVER_COMMITS = Limit(
    "the real transaction never commits, so that ON COMMIT DROP and DELETE ROWS never come",
    lambda op, here, there, before: any("ON COMMIT" in text_of(each) for each in before),
)

LEFT_BEHIND = (
    "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend'"
)
OTHERS = "FROM pg_stat_activity WHERE datname = 'boxed' AND pid <> pg_backend_pid()"
LOCKS = f"FROM pg_locks WHERE locktype <> 'virtualxid' AND pid IN (SELECT pid {OTHERS})"
ACTING = f"{OTHERS} AND (state = 'active' OR coalesce(backend_xid, backend_xmin) IS NOT NULL)"
HOLDS = "SELECT " + ", ".join(
    [
        *(f"(SELECT array_agg(t::text ORDER BY t::text) FROM {each} AS t)" for each in TABLES),
        *(f"(SELECT count(*) FROM pg_{each})" for each in CATALOGS),
        # The sandbox's next transaction may have begun, but neither holds nor sees anything.
        f"(SELECT count(*) {LOCKS})",
        f"(SELECT count(*) {ACTING})",
    ]
)


@dataclass(frozen=True)
class Client:
    """How applications talk to the server.

    Args:
        connect: Opens a pool, given a URL. Its connections set ``app.name`` to nothing.
        close: Closes it, whatever state its connections are in.
        application: What acts with the pool.
        limits: Where it may see something else in a sandbox.
    """

    connect: Callable[[str], Awaitable[Any]]
    close: Callable[[Any], Awaitable[None]]
    application: type[Application]
    limits: Sequence[Limit]


class Worlds:
    """Production, and a sandbox, with the same in their databases."""

    def __init__(self, url: str, runner: asyncio.Runner, client: Client) -> None:
        self.url = url
        self.runner = runner
        self.client = client
        self.complaints: list[str] = []

    async def open(self) -> None:
        """Make both databases, and open a pool in the sandbox."""
        await self.make_databases()
        registry = Registry("stateful")

        async def pool() -> Any:
            return await self.client.connect(self.boxed)

        self.handle = registry.resource(pool)
        with sandboxing():
            self.lifespan = await self.stack.enter_async_context(registry.lifespan())
        self.boxed_pool = self.lifespan[self.handle]

    async def make_databases(self) -> None:
        """Make the same twice, and connect to both past whatever is tested."""
        self.stack = AsyncExitStack()
        admin = await asyncpg.connect(self.url)
        for name in ("production", "boxed"):
            await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        base = self.url.rpartition("/")[0]
        self.production, self.boxed = f"{base}/production", f"{base}/boxed"
        self.admins = [await asyncpg.connect(self.production), await asyncpg.connect(self.boxed)]
        for each in self.admins:
            await each.execute(SCHEMA)
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: self.complaints.append(context["message"].partition(" <")[0])
        )

    async def close(self) -> None:
        await self.stack.aclose()
        for each in self.admins:
            await each.close()

    def block(self) -> Any:
        """What undoes all that is done in it."""
        return self.lifespan.sandbox()

    async def in_production(self, ops: Sequence[Op]) -> tuple[list[Any], list[bool]]:
        """What an application sees, and which operations would wait for another connection."""
        past: Any = object()
        with by_way_of(past):
            return await self._in_production(ops)

    async def _in_production(self, ops: Sequence[Op]) -> tuple[list[Any], list[bool]]:
        await self.admins[0].execute(f"SELECT pg_terminate_backend(pid) {LEFT_BEHIND}")
        await self.admins[0].execute(SCHEMA)
        pool = await self.client.connect(self.production)
        application = self.client.application(pool)
        application.admin = self.admins[0]
        seen: list[Any] = [await application.do(Op("acquire", 0))]
        waits: list[bool] = []
        try:
            for op in ops:
                waits.append(application.busy not in (None, op.who))
                seen.append(("another's turn",) if waits[-1] else await application.do(op))
            seen += await application.finish()
        finally:
            await self.client.close(pool)
        return seen + self.heard(), waits

    async def in_sandbox(self, ops: Sequence[Op], waits: Sequence[bool]) -> list[Any]:
        """What it sees in the sandbox."""
        await self.admins[1].execute("SELECT setval('app.item_id_seq', 2)")
        before = await self.holds()
        # As in production, where each application has connections of its own, which know nothing yet.
        driver: Any = drivers.find(self.boxed_pool)
        await driver.reconnect(self.boxed_pool)
        async with self.block():
            application = self.client.application(self.boxed_pool)
            application.admin = self.admins[1]
            seen: list[Any] = [await application.do(Op("acquire", 0))]
            for op, wait in zip(ops, waits, strict=True):
                seen.append(("another's turn",) if wait else await application.do(op))
            seen += await application.finish()
        heard = self.heard()
        assert await self.holds() == before
        return seen + heard

    def heard(self) -> list[Any]:
        complaints, self.complaints[:] = self.complaints[:], []
        return complaints

    async def holds(self) -> Any:
        """All that is in the database, but for the counts of sequences, which never go back."""
        found: Any = await self.admins[1].fetchrow(HOLDS)
        async with asyncio.timeout(60):
            while any(tuple(found)[-2:]):  # a server notices in its time that a connection was cut
                await asyncio.sleep(0.01)
                found = await self.admins[1].fetchrow(HOLDS)
        return found

    def compare(self, ops: Sequence[Op]) -> None:
        """Do *ops* here and there."""
        produced, waits = self.runner.run(self.in_production(ops))
        boxed = self.runner.run(self.in_sandbox(ops, waits))
        assert_same(ops, produced, boxed, self.client.limits)


@contextmanager
def worlds_of(server: Server, client: Client, kind: type[Worlds] | None = None) -> Generator[Worlds]:
    """Production and sandbox for *client*, in a loop of their own; *kind* says how that is undone."""
    with asyncio.Runner() as runner:
        worlds = (kind or Worlds)(server.url, runner, client)
        runner.run(worlds.open())
        yield worlds
        runner.run(worlds.close())


def assert_same(
    ops: Sequence[Op], produced: Sequence[Any], boxed: Sequence[Any], limits: Sequence[Limit]
) -> None:
    """Fail, with what was seen by whom, at the first difference that no limit names."""
    steps = [Op("acquire", 0), *ops]
    told: list[str] = []
    for index, (here, there) in enumerate(zip_longest(produced, boxed, fillvalue=())):
        op = steps[index] if index < len(steps) else Op("finish", POOL)
        told.append(f"{op!r}: {here}")
        if here != there:
            known = [limit for limit in limits if limit.applies(op, here, there, steps[:index])]
            if not known:
                pytest.fail("\n".join([*told, f"in the sandbox: {there}"]), pytrace=False)
            if any(limit.ends for limit in known):
                return


whos = st.sampled_from([0, 0, 0, 0, 1, 2, POOL])
kinds = (WRITES, WRITES, WRITES, CONTROL, CONTROL, CONTROL, SESSION, DDL, SCRIPTS, READS)
sql = st.one_of(*(st.sampled_from(each) for each in kinds))


def sequences_of(
    acts: Mapping[str, st.SearchStrategy[tuple[Any, ...]]], often: Sequence[str], of_pool: str
) -> st.SearchStrategy[list[Op]]:
    """Operations of connections and of the pool, one after the other.

    Args:
        acts: The methods of an application, with what they may be given.
        often: Those that come more often than once each.
        of_pool: The one that only a pool does.
    """
    some_act = st.sampled_from([*often, *acts])

    @st.composite
    def operations(draw: st.DrawFn) -> Op:
        what = draw(some_act)
        return Op(what, POOL if what == of_pool else draw(whos), draw(acts[what]))

    # A list of lists, for one list would be of six on average.
    return st.lists(st.lists(operations(), min_size=1, max_size=5), max_size=8).map(
        lambda parts: [op for part in parts for op in part]
    )


calm = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    database=None,
)
