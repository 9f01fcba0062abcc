"""An application sees the same in asyncpg's sandbox as in production; and nothing of it lasts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifekit import Registry
from lifekit.embedded import Server
from lifekit.testing import sandboxing

from .applications import POOL, SCHEMA, Application, Op

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
    "SELECT pg_advisory_lock(7)",
    "SELECT pg_advisory_xact_lock(8)",
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
    "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) INSERT INTO app.item (v) VALUES (8)",
]

whos = st.sampled_from([0, 0, 0, 0, 1, 2, POOL])
kinds = (WRITES, WRITES, WRITES, CONTROL, CONTROL, CONTROL, SESSION, DDL, SCRIPTS, READS)
sql = st.one_of(*(st.sampled_from(each) for each in kinds))
isolations = st.sampled_from([None, None, "read_committed", "repeatable_read", "serializable"])
arguments: list[tuple[Any, ...]] = [
    ("INSERT INTO app.item (v) VALUES ($1)", 4),
    ("INSERT INTO app.item (v) VALUES ($1)", -4),
    ("INSERT INTO app.item (v) VALUES ($1)", "a text"),
    ("UPDATE app.parent SET v = $2 WHERE id = $1", 1, "new"),
]
rows = st.sampled_from([[(6,), (7,)], [(6,), (-7,)], [(6,), ("text",)]])
crowds: list[tuple[Any, ...]] = [
    ("UPDATE app.parent SET v = v || '!'", "SELECT 1/0", "INSERT INTO app.log VALUES ('at once')"),
    ("INSERT INTO app.watched VALUES (7)", "INSERT INTO app.watched VALUES (-7)", "SELECT 1"),
]
acts: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "execute": st.tuples(sql),
    "fetch": st.tuples(st.sampled_from(READS)),
    "with_arguments": st.sampled_from(arguments),
    "many": st.tuples(st.just("INSERT INTO app.item (v) VALUES ($1)"), rows),
    "copy_in": st.tuples(st.just("watched"), st.sampled_from([[(2,), (3,)], [(2,), (2,)], [(-2,)]])),
    "copy_out": st.tuples(st.sampled_from([*READS[:3], "SELECT 1/0"])),
    "interrupted": st.just(("SELECT pg_sleep(10)",)),
    "cancelled": st.just(("SELECT pg_sleep(10)",)),
    "begin": st.tuples(isolations, st.booleans(), st.booleans()),
    "commit": st.just(()),
    "rollback": st.just(()),
    "open_cursor": st.tuples(st.sampled_from(READS[:7])),
    "read_cursor": st.tuples(st.integers(1, 3)),
    "skip_cursor": st.tuples(st.integers(1, 3)),
    "iterate": st.tuples(st.sampled_from(READS[:7])),
    "prepare": st.tuples(st.sampled_from([*READS[:7], *DDL[:1], "COMMIT", "BEGIN"])),
    "run_prepared": st.tuples(st.sampled_from([*READS[:7], *DDL[:1], "COMMIT", "BEGIN"])),
    "reset": st.just(()),
    "at_once": st.sampled_from(crowds),
    "acquire": st.just(()),
    "release": st.just(()),
}
OFTEN = ["execute"] * 12 + ["fetch"] * 6 + ["begin", "commit", "rollback"] * 2
some_act = st.sampled_from([*OFTEN, *acts])


@st.composite
def operations(draw: st.DrawFn) -> Op:
    """One operation of one connection, or of the pool."""
    what = draw(some_act)
    return Op(what, POOL if what == "at_once" else draw(whos), draw(acts[what]))


# A list of lists, for one list would be of six on average.
sequences = st.lists(st.lists(operations(), min_size=1, max_size=5), max_size=8).map(
    lambda parts: [op for part in parts for op in part]
)


Seen = tuple[Any, ...]


def text_of(op: Op) -> str:
    """The SQL of an operation, if it has any."""
    return str(op.args[0]) if op.args and isinstance(op.args[0], str) else ""


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


SESSION_STATE = re.compile(
    "SHOW|current_setting|EXECUTE|FETCH|PREPARE|DEALLOCATE|currval|lastval|_lock|_unlock|own|CLOSE"
    "|TEMP TABLE"
)
REFUSED = re.compile(
    r"DEALLOCATE ALL|default_transaction|SESSION CHARACTERISTICS|READ ONLY|(BEGIN|COMMIT|ROLLBACK); \w+"
)
UNSYNCED = {"prepare", "iterate", "open_cursor", "with_arguments"}

LIMITS = [
    Limit(
        "refused: DEALLOCATE ALL, default modes of transactions, READ ONLY in the midst, and scripts "
        "that go on behind a transaction",
        lambda op, here, there, before: (
            there[0] == "SandboxUnsupportedError" and REFUSED.search(text_of(op)) is not None
        ),
    ),
    Limit(
        "the isolation level and DEFERRABLE are those of the real transaction, and SHOW tells so",
        lambda op, here, there, before: (
            text_of(op) in ("SHOW transaction_isolation", "SHOW transaction_deferrable")
            and here[0] == there[0]
        ),
        ends=False,
    ),
    Limit(
        "connections in use at once share one session: settings, PREPARE, held cursors, temporary "
        "tables, advisory locks, currval()",
        lambda op, here, there, before: (
            len({each.who for each in [*before, op]}) > 1
            and any(SESSION_STATE.search(text_of(each)) or "SET " in text_of(each) for each in before)
        ),
    ),
    Limit(
        "what a READ ONLY transaction sets for the session goes with it",
        lambda op, here, there, before: (
            SESSION_STATE.search(text_of(op)) is not None
            and any("READ ONLY" in text_of(each) or True in each.args[1:2] for each in before)
        ),
    ),
    Limit(
        "the real transaction never commits, so that ON COMMIT DROP and DELETE ROWS never come",
        lambda op, here, there, before: any("ON COMMIT" in text_of(each) for each in before),
    ),
    Limit(
        "asyncpg's prepare() leaves production inside of an implicit transaction, so that modes which "
        "come next are too late; the sandbox takes them",
        lambda op, here, there, before: (
            here[0] == "ActiveSQLTransactionError" and any(each.what in UNSYNCED for each in before)
        ),
    ),
    Limit(
        "a failed READ ONLY transaction that is chained: production forgets READ ONLY",
        lambda op, here, there, before: (
            there[0] == "ReadOnlySQLTransactionError"
            and any("AND CHAIN" in text_of(each) for each in before)
        ),
    ),
]


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
HOLDS = "SELECT " + ", ".join(
    [
        *(f"(SELECT array_agg(t::text ORDER BY t::text) FROM {each} AS t)" for each in TABLES),
        *(f"(SELECT count(*) FROM pg_{each})" for each in CATALOGS),
        "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')",
        "(SELECT count(*) FROM pg_stat_activity WHERE datname = 'boxed' AND state ~ 'transaction')",
    ]
)


class Worlds:
    """Production, and a sandbox, with the same in their databases."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self.url = url
        self.runner = runner
        self.complaints: list[str] = []

    async def open(self) -> None:
        self.stack = AsyncExitStack()
        admin = await asyncpg.connect(self.url)
        for name in ("production", "boxed"):
            await admin.execute(f"DROP DATABASE IF EXISTS {name}")
            await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        base = self.url.rpartition("/")[0]
        self.production, self.boxed = f"{base}/production", f"{base}/boxed"
        self.admins = [await asyncpg.connect(self.production), await asyncpg.connect(self.boxed)]
        for each in self.admins:
            await each.execute(SCHEMA)
        registry = Registry("stateful")

        async def pool() -> Any:
            return await self.pool(self.boxed)

        self.handle = registry.resource(pool)
        with sandboxing():
            self.lifespan = await self.stack.enter_async_context(registry.lifespan())
        self.boxed_pool = self.lifespan[self.handle]
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: self.complaints.append(context["message"].partition(" <")[0])
        )

    async def pool(self, url: str) -> Any:
        return await asyncpg.create_pool(url, min_size=0, max_size=4, server_settings={"app.name": ""})

    async def close(self) -> None:
        await self.stack.aclose()
        for each in self.admins:
            await each.close()

    async def in_production(self, ops: Sequence[Op]) -> tuple[list[Any], list[bool]]:
        """What an application sees, and which operations would wait for another connection."""
        await self.admins[0].execute(SCHEMA)
        pool = await self.pool(self.production)
        application = Application(pool)
        seen: list[Any] = [await application.do(Op("acquire", 0))]
        waits: list[bool] = []
        try:
            for op in ops:
                busy = application.who_is_in_transaction()
                waits.append(busy is not None and busy != op.who)
                seen.append(("another's turn",) if waits[-1] else await application.do(op))
            seen += await application.finish()
        finally:
            pool.terminate()
        return seen + self.heard(), waits

    async def in_sandbox(self, ops: Sequence[Op], waits: Sequence[bool]) -> list[Any]:
        """What it sees in the sandbox."""
        await self.admins[1].execute("SELECT setval('app.item_id_seq', 2)")
        before = await self.holds()
        async with self.lifespan.sandbox():
            application = Application(self.boxed_pool)
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
        return await self.admins[1].fetchrow(HOLDS)

    def compare(self, ops: Sequence[Op]) -> None:
        """Do *ops* here and there."""
        produced, waits = self.runner.run(self.in_production(ops))
        boxed = self.runner.run(self.in_sandbox(ops, waits))
        assert_same(ops, produced, boxed)


def assert_same(ops: Sequence[Op], produced: Sequence[Any], boxed: Sequence[Any]) -> None:
    """Fail, with what was seen by whom, at the first difference that no limit names."""
    steps = [Op("acquire", 0), *ops]
    told: list[str] = []
    for index, (here, there) in enumerate(zip_longest(produced, boxed)):
        op = steps[index] if index < len(steps) else Op("finish", POOL)
        told.append(f"{op!r}: {here}")
        if here != there:
            known = [limit for limit in LIMITS if limit.applies(op, here, there, steps[:index])]
            if not known:
                pytest.fail("\n".join([*told, f"in the sandbox: {there}"]), pytrace=False)
            if any(limit.ends for limit in known):
                return


@pytest.fixture(scope="module")
def worlds(postgres: Server) -> Iterator[Worlds]:
    with asyncio.Runner() as runner:
        worlds = Worlds(postgres.url, runner)
        runner.run(worlds.open())
        yield worlds
        runner.run(worlds.close())


calm = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    database=None,
)


@settings(calm, max_examples=80, derandomize=True)
@given(sequences)
def test_an_application_sees_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """Results, errors and their texts, whatever it does; afterwards the database is as before."""
    worlds.compare(sequence)


ORPHAN = "INSERT INTO app.child VALUES (2, 3, NULL, 2)"
ONE = "INSERT INTO app.item (v) VALUES (1)"
TOLD = [
    [("BEGIN", ONE, "COMMIT", "BEGIN", ONE, "ROLLBACK")],
    [(ONE, "SELECT 1/0", "INSERT INTO app.item (v) VALUES (-1)", ONE)],
    [("BEGIN", ORPHAN, "COMMIT", ORPHAN, "SELECT 1")],
    [
        (
            "BEGIN",
            ORPHAN,
            "INSERT INTO app.parent VALUES (3, 'three')",
            "COMMIT",
            "BEGIN",
            "DELETE FROM app.child",
        )
    ],
    [
        (
            "BEGIN",
            "SET CONSTRAINTS ALL IMMEDIATE",
            ORPHAN,
            "COMMIT",
            "BEGIN",
            ORPHAN,
            "SELECT 1",
            "COMMIT",
        )
    ],
    [("BEGIN", ONE, "COMMIT", "BEGIN", ORPHAN, "SELECT 1", "ROLLBACK")],
    [("BEGIN", "SET LOCAL work_mem = '234kB'", "COMMIT", "SHOW work_mem")],
    [("SET LOCAL work_mem = '234kB'", "SHOW work_mem")],
    [("BEGIN", "SELECT 1/0", "COMMIT", "SELECT 1")],
    [("BEGIN READ ONLY", ONE, "ROLLBACK", ONE, "BEGIN READ ONLY", "COMMIT", ONE)],
    [("BEGIN", ONE, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", ONE, "COMMIT")],
    [("BEGIN; INSERT INTO app.watched VALUES (-1); COMMIT", "SELECT 1", "ROLLBACK")],
    [("SELECT lastval()", ONE, "SELECT lastval()"), ("SELECT lastval()",)],
    [("PREPARE saved AS SELECT 1", "SELECT pg_advisory_lock(7)"), ("PREPARE saved AS SELECT 1",)],
    [
        ("CREATE TABLE app.extra (a int)", "SELECT * FROM app.extra"),
        ("CREATE TABLE app.extra (b text)", "SELECT * FROM app.extra"),
    ],
    [("BEGIN", "DECLARE own CURSOR FOR SELECT 1", "FETCH 1 FROM own", "COMMIT", "FETCH 1 FROM own")],
]
"""Texts of one block after the other, on one connection."""


@pytest.mark.parametrize("way", ["execute", "fetch"])
@pytest.mark.parametrize("blocks", TOLD, ids=lambda blocks: blocks[0][0])
def test_what_matters_most(worlds: Worlds, blocks: list[tuple[str, ...]], way: str) -> None:
    """The same for what no random choice may leave out."""
    for texts in blocks:
        worlds.compare([Op("execute" if "; " in text else way, 0, (text,)) for text in texts])


@pytest.mark.long
@pytest.mark.timeout(300)
@settings(calm, max_examples=600)
@given(sequences)
def test_many_applications_see_the_same_as_in_production(worlds: Worlds, sequence: list[Op]) -> None:
    """The same, with others each time."""
    worlds.compare(sequence)
