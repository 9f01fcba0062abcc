"""What the reader makes of SQL text, held against what a real PostgreSQL does with the same text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg.pq import ExecStatus

from lifekit import embedded
from lifekit._sandbox.postgres.sql import Script, Statement, Verb, read, unqualified

TAGS = {
    "BEGIN": {Verb.BEGIN},
    "START TRANSACTION": {Verb.BEGIN},
    "COMMIT": {Verb.COMMIT},
    "ROLLBACK": {Verb.ROLLBACK, Verb.ROLLBACK_TO, Verb.COMMIT},  # a failed transaction's COMMIT too
    "SAVEPOINT": {Verb.SAVEPOINT},
    "RELEASE": {Verb.RELEASE},
    "SET": {Verb.SET_TRANSACTION, Verb.PLAIN},
    "SET CONSTRAINTS": {Verb.SET_CONSTRAINTS},
    "LISTEN": {Verb.LISTEN},
    "UNLISTEN": {Verb.UNLISTEN},
    "NOTIFY": {Verb.NOTIFY},
}


@dataclass
class Answer:
    """What the server did with a script: the tags of the statements that it ran, and its complaint."""

    tags: list[str]
    error: str


class Session:
    """One connection to the real thing, whose transaction is ended before each use."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection

    def send(self, script: str) -> Answer:
        """Send *script* in one message, and see what became of each of its statements."""
        server = self.connection.pgconn
        server.send_query(script.encode())
        answer = Answer([], "")
        while (result := server.get_result()) is not None:
            if result.status == ExecStatus.FATAL_ERROR:
                answer.error = result.get_error_message()
            elif result.status != ExecStatus.EMPTY_QUERY:
                assert result.command_status is not None
                answer.tags.append(result.command_status.decode())
        return answer

    def run(self, script: str) -> Answer:
        """The same from the start: no transaction, no listening, nothing made."""
        self.send("rollback")
        self.send("unlisten *; deallocate all; close all; drop schema if exists scratch cascade")
        self.send("create schema scratch; set search_path to scratch; create table t (a int)")
        return self.send(script)

    def value(self, query: str) -> str:
        """The one value that *query* answers."""
        result = self.connection.pgconn.exec_(query.encode())
        found = result.get_value(0, 0)
        assert found is not None, result.get_error_message()
        return found.decode()

    def label(self, spelling: str) -> str:
        """The name that the server makes of *spelling*."""
        label = self.connection.pgconn.exec_(f"select 1 as {spelling}".encode()).fname(0)
        assert label is not None
        return label.decode()


@pytest.fixture(scope="module")
def session(postgres: embedded.Server) -> Iterator[Session]:
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        yield Session(connection)
        Session(connection).run("drop schema scratch cascade; drop procedure if exists public.p")


def verbs(script: str) -> list[Verb]:
    return [statement.verb for statement in read(script).statements]


def only(script: str) -> Statement:
    (statement,) = read(script).statements
    return statement


def check(script: str, answer: Answer) -> None:
    """Every statement that ran was seen for what it is; without an error, no other was seen."""
    seen = verbs(script)
    assert len(answer.tags) <= len(seen), (script, answer, seen)
    for tag, verb in zip(answer.tags, seen, strict=False):
        assert verb in TAGS.get(tag, {Verb.PLAIN}), (script, answer, seen)
    assert answer.error or len(answer.tags) == len(seen), (script, answer, seen)


ACCEPTED = [
    "",
    " ;;\n; ",
    ";; commit",
    "\f\v\r\n\t commit\v;",
    "/* a */ -- b\n commit",
    "COMMIT/**/",
    "CoMmIt--",
    "BEGIN;/*;*/END;",
    "start transaction isolation level serializable, read only, deferrable; ABORT WORK",
    "begin work; commit and no chain",
    "begin; commit and chain; rollback transaction and chain; end transaction",
    "begin; savepoint a; rollback to a; rollback work to savepoint a; release a; rollback",
    "begin; savepoint savepoint; rollback to savepoint savepoint; release savepoint; rollback",
    "begin; set transaction read only; set local transaction isolation level serializable; commit",
    "begin; set session transaction read only; set transaction_read_only = on; commit",
    "begin; set constraints all deferred; set constraints all immediate; commit",
    "listen a; notify a; notify a, 'b;c'; unlisten a; unlisten *",
    "prepare transaction as select 1; execute transaction; deallocate transaction",
    "prepare x as select 1; execute x; deallocate prepare x",
    "set local.x = '1'; set session.x = '1'; reset local.x",
    "set session characteristics as transaction read write",
    # strings
    "select 'a;b'; select 'it''s; commit'; select ''';'''",
    "select 'a\\'; commit; select '\\'",
    "select E'a\\'; commit; --'",
    "select e'\\\\'; commit",
    "select E'''; commit; \\'; '",
    "select E'a'\n'\\'; commit; --'",
    "select E'a' -- it's\n -- two\n 'b\\'; commit; --'; select 1",
    "select E'a'\r--\r'\\'; commit; --'",
    "select 'a' -- it's\n '\\'; commit; select '\\'",
    "select 'a'\n'b;c'; commit",
    "select U&'\\0061;\\\\'; commit; select u&';'",
    "select U&'!0061;' uescape '!'; commit",
    "select B'01', X'1f', N'x;\\', b'', x''; commit",
    "select 1 as fooe, 'x\\'; commit; select '\\'",
    "select name 'x\\'; commit",
    "select nullif('\\', '); commit; (')",
    # names
    'select 1 as "a;b"; commit; select 1 as "c"";"";d"',
    'select 1 as "commit"; select 1 as commit; select 1 commit; commit',
    "select 1 as U&\"d!0061t;\" uescape '!'; commit",
    'select 1 as "\'"; commit; select 1 as "\'"',
    "select 1 as é$$; commit; select 2 as é$$",
    "select 1 as \ufeffcommit; commit",
    # dollars
    "select $$a;b$$; commit; select $$;$$",
    "select $a$ $$;commit; $b$ $a$; commit",
    "select $a$ $A$; commit; $a$; commit",
    "select $$ $a$$; commit; select $$ $a$$",
    "select $é$;$é$; commit; select $_1$;$_1$",
    "select 1 as a$$; commit; select 2 as b$$",
    "select 1 as a$b$; commit; select 2 as b$b$",
    "do $$begin perform 1; commit; end$$",
    "do $$begin perform 1; end$$; begin; commit",
    "select $$/*$$; commit; select $$*/$$",
    # comments
    "select 1 -- ; commit\n; commit",
    "select 1 --'\r; commit; select '--'",
    "select /* ; /* ; */ ; commit; */ 1; commit",
    "select /*/ ; */ 1; commit",
    "select /**/ 1; commit; /*/**/; commit; */",
    "select /* ' */ 1; commit; select /* ' */ 2",
    'select /* $$ */ 1; commit; select 1 as "/*"; commit --*/',
    "select 1+--;\n1; select 2*/*;*/3; commit",
    "select 1 --\v;\n; commit",
    "commit;/* */;-- \n",
    # what nests
    "create rule r as on insert to t do also (select 1; select (2); notify x); commit",
    "create function f() returns int begin atomic select 1; end; commit",
    "create procedure p() begin atomic end; commit",
    "create procedure p() begin /*;*/ ATOMIC insert into t values (1); /**/ end; begin; commit",
    "create procedure p() begin atomic select case case 1 when 1 then 2 end when 2 then 3 end; end",
    "create function f() returns int begin atomic select 1 as case; select 1 case; end; commit",
    "create function f() returns int begin atomic select 1 as end; select 2 end; end; commit; end",
    "create table z (atomic int); create procedure p() begin atomic select atomic end from z; end; end",
    "create table z (begin int); create procedure p() begin atomic select begin atomic from z; end",
    "create function f() returns int return 1; commit; select 1",
    "create view v as select begin atomic from (select 1 as begin) x; commit; end",
    "create table begin (atomic int); create table x as select begin atomic from begin; commit; end",
    "explain analyze create table b as select 1; explain (analyze) select 1; commit",
]


@pytest.mark.parametrize("script", ACCEPTED)
def test_a_script_has_the_statements_that_the_server_runs(session: Session, script: str) -> None:
    answer = session.run(script)
    assert not answer.error, "this list is of what PostgreSQL accepts"
    check(script, answer)


NASTY = (
    r"' '' E' e'a' U&' X' N' \ \' U&\" $$ $$ $a$ $a $1 "
    r"-- -- /* */ /**/ ; ; ; ( ) , + - * / % %s"
)
WORDS = "a a é E e 1 1e5 .5 1. as case end begin atomic commit rollback select select"
PIECES: list[str] = [*NASTY.split(), *WORDS.split(), '"', '""', *"\n\r\t\v   "]
NOISE = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
STRINGS = [
    "select '{}'",
    "select E'{}'",
    "select U&'{}'",
    "select E'{}'\n'{}'",
    "select '{}' -- {}\n '{}'",
]
DOLLARS = ["select $${}$$", "select $a${}$a$", "select $${}$${}$$"]
NAMED = ['select 1 as "a{}"', "select 1 as a{}", "select 1{}", "(select 1{})"]
REMARKS = ["select 1 /*{}*/", "select 1 --{}\n"]
CONTROLS = ["{}", "{}commit", "commit{}", "{}begin{}", "begin; savepoint a; rollback{} to a"]
BODIES = ["create procedure p() begin atomic {}; end"]
NOISY: list[str] = STRINGS + DOLLARS + NAMED + REMARKS + CONTROLS + BODIES


def noised(noisy: str, noise: str) -> str:
    return noisy.replace("{}", noise)


STATEMENTS = st.builds(noised, st.sampled_from(NOISY), NOISE)
SCRIPTS = st.lists(STATEMENTS, min_size=1, max_size=4).map("; ".join)


@settings(
    max_examples=400,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=SCRIPTS)
@example(script="select E'\\'; commit; --'; commit")
def test_nothing_that_the_server_runs_is_missed(session: Session, script: str) -> None:
    """Scripts of nasty pieces: whatever part the server runs was read as what it is."""
    session.send("rollback")
    session.send("drop procedure if exists p")
    check(script, session.send(script))


NAMES = [
    "a",
    "ABC",
    '"ABC"',
    '"a""b;"',
    "É",
    "naïveÀ",
    "a$1",
    "savepoint",
    "work",
    "x" * 70,
    "é" * 40,
    '"' + "Y" * 70 + '"',
    'U&"d\\0061t\\+000061"',
    "u&\"d!0061!!\" /**/ uescape '!'",
    'U&"\\D83D\\DE00"',
]


@pytest.mark.parametrize("spelling", NAMES)
def test_a_savepoint_has_the_name_that_the_server_gives_it(session: Session, spelling: str) -> None:
    leads = ["savepoint", "rollback to", "rollback work to savepoint", "release", "release savepoint"]
    session.run("commit")
    (name,) = {only(f"{lead} {spelling}").name for lead in leads}
    assert name is not None
    assert name == session.label(spelling)
    quoted = name.replace('"', '""')
    assert not session.run(f'begin; savepoint {spelling}; release "{quoted}"').error
    assert not session.run(f'begin; savepoint "{quoted}"; release savepoint {spelling}').error


CONSTANTS = [
    "'a''b'",
    "''",
    "'\\'",
    "$$it''s$$",
    "$a$b$$'$a$",
    "'a'\n'b' --'\n'c'",
    "E'a' --'\n 'b\\''",
    "E'a\\'b\\\\\\n\\x41\\101\\u00e9\\q'''",
    "E'\\xc3\\xa9\\uD83D\\uDE00'",
    "e'\\U0001F600'",
    "U&'d\\0061\\\\\\D83D\\DE00'",
    "U&'d!0061' uescape '!'",
    "u&'a'\n'\\0061'",
]


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_notification_is_read_as_it_arrives(session: Session, constant: str) -> None:
    statement = only(f'notify "A""b", {constant}')
    assert not session.run(f'listen "A""b"; notify "A""b", {constant}').error
    session.connection.pgconn.consume_input()
    arrived = session.connection.pgconn.notifies()
    assert arrived is not None
    assert (statement.name, statement.payload) == (arrived.relname.decode(), arrived.extra.decode())


def test_no_payload_and_no_channel_are_told_from_empty_ones() -> None:
    assert only("notify a").payload is None
    assert only("notify a, ''").payload == ""
    assert only("unlisten *").name is None
    assert only('unlisten "*"').name == "*"


MODES = [
    "isolation level serializable read only deferrable",
    "READ WRITE, not deferrable",
    "isolation level repeatable read",
    "isolation level read committed, read only",
    "read/**/only, read write",
    "isolation level read uncommitted, isolation level serializable",
]


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("opening", ["begin work", "start transaction", "begin; set transaction"])
def test_modes_are_read_as_the_server_takes_them(session: Session, opening: str, modes: str) -> None:
    assert not session.run(f"{opening} {modes}").error
    check_modes(session, read(f"{opening} {modes}").statements[-1])


SETTINGS = [
    "transaction_read_only = on",
    "local transaction_read_only to 'tr'",
    "transaction_deferrable = no",
    "session transaction_deferrable = 1",
    "transaction_isolation to 'Repeatable read'",
    '"Transaction_Isolation" = serializable',
    "transaction_read_only = 'of'",
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_are_modes_are_read_as_modes(session: Session, setting: str) -> None:
    assert only(f"set {setting}").verb is Verb.SET_TRANSACTION
    assert not session.run(f"begin isolation level serializable; set {setting}").error
    check_modes(session, only(f"set {setting}"))


def check_modes(session: Session, statement: Statement) -> None:
    said = (statement.isolation, statement.read_only, statement.deferrable)
    assert said != (None, None, None)
    for value, setting in zip(said, ("isolation", "read_only", "deferrable"), strict=True):
        if value is not None:
            shown = session.value(f"show transaction_{setting}")
            assert shown == ({True: "on", False: "off"}[value] if isinstance(value, bool) else value)


def test_a_chained_end_is_told_from_one_that_is_not() -> None:
    chained = [
        "commit and chain",
        "end work and/**/chain",
        "rollback and chain",
        "abort transaction and chain",
    ]
    assert all(only(script).chain for script in chained)
    assert not any(only(script.replace("and", "and no ")).chain for script in chained)
    assert not only("commit").chain


@pytest.mark.parametrize(
    "script", ["prepare transaction 'x'", "commit prepared 'x'", "Rollback\nPrepared 'x'"]
)
def test_two_phase_commit_is_recognised(session: Session, script: str) -> None:
    assert verbs(script) == [Verb.TWO_PHASE]
    error = session.run(f"begin; {script}").error
    assert (
        "prepared transactions are disabled" in error
        or "cannot run inside a transaction block" in error
    )


def test_texts_are_kept_as_they_were_sent() -> None:
    texts = [
        statement.text for statement in read("select 1 ; /* a; */ commit -- b;\n;; -- c").statements
    ]
    assert texts == ["select 1 ", " /* a; */ commit -- b;\n"]


UNFINISHED = ["'", '"', "E'\\", "$$", "$a$ $$", "/* /* */", "(", ")", "\\"]


@pytest.mark.parametrize("ending", UNFINISHED)
def test_what_the_server_refuses_as_a_whole_may_be_read_in_any_way(
    session: Session, ending: str
) -> None:
    script = f"commit; select {ending}; begin"
    assert verbs(script)[0] is Verb.COMMIT
    assert session.run(script).tags == []


def test_a_number_ends_where_older_servers_end_it() -> None:
    """PostgreSQL 14 takes 1e5E'' for a number and a string with escapes; later ones refuse it."""
    assert verbs("select 1e5E'\\''; commit; --'") == [Verb.PLAIN, Verb.COMMIT]


def test_nothing_behind_a_nul_counts_and_half_characters_do_no_harm() -> None:
    assert verbs("rollback \0 to a") == [Verb.ROLLBACK]
    assert verbs("select 1; \0 commit") == [Verb.PLAIN]
    assert verbs("select \ud800; savepoint \ud800") == [Verb.PLAIN, Verb.SAVEPOINT]


KEPT = [
    "select 1",
    "insert into t select 1",
    "(select 1)",
    "update t set a = 1",
    "begin; savepoint a; commit",
]
SCHEMA = [
    "create table a ()",
    "drop table t",
    "select 1 into b",
    "(select 1 a into b)",
    "select 1 insert into b",
    "with x as (select 1) select * into b from x",
    "explain analyze create table b as select 1",
]
LOCAL = ["set local x.y = 1", "SET/**/LOCAL role none"]
LOCAL_CALL = "select set_config('x.y', '1', true)"
SESSION = [
    "set x.y = 1",
    "set local.y = 1",
    "set session role none",
    "reset all",
    "prepare a as select 1",
    "execute a",
    "deallocate all",
    "declare a cursor for select 1",
    "discard all",
    "load 'x'",
    "listen a",
    "unlisten *",
    "select pg_advisory_lock(1)",
    "select pg_catalog.SET_CONFIG('a.b', '1', false)",
    "update pg_settings set setting = 1",
    "select U&\"set_confi\\0067\"('a.b', '1', false)",
    "do '1'",
    "set session characteristics as transaction read only",
    "set local = 1",
    "call p()",
    LOCAL_CALL,
]
CONTROL = ["begin", "select 1; commit", "set constraints all deferred"]
WITH_INSERT = "with a as (insert into t select 1 returning 1) table a"


@pytest.mark.parametrize(
    ("flag", "expected", "scripts"),
    [
        ("schema", False, [*KEPT, *LOCAL, LOCAL_CALL, WITH_INSERT, "set x.y = 1"]),
        ("schema", True, [*SCHEMA, "do '1'", "call p()"]),
        ("session", False, [*KEPT, *SCHEMA, *LOCAL, "set transaction read only", CONTROL[-1]]),
        ("session", True, SESSION),
        ("local", False, [*KEPT, *SESSION[:4]]),
        ("local", True, [*LOCAL, LOCAL_CALL]),
        ("plain", False, CONTROL),
        ("plain", True, [*KEPT[:-1], *SCHEMA, "notify a", "listen a", "unlisten *"]),
        ("reads", True, ["listen a", "unlisten *"]),
        ("reads", False, ["notify a", "select pg_notify('a', '')"]),
    ],
)
def test_flags_say_what_a_script_may_change(flag: str, expected: bool, scripts: list[str]) -> None:
    for script in scripts:
        for text in (script, f"select 1; {script}", f"/**/;{script} --"):
            assert getattr(read(text), flag) is expected, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("select Pg_catalog.pg_Notify('a', 'b')", "select            pg_Notify('a', 'b')"),
        ("pg_catalog /* x */ . pg_notify(", "                     pg_notify("),
        ("pg_catalog.f(), 'pg_catalog.pg_notify', \"pg_catalog.pg_notify\"", None),
        ("$$ pg_catalog.pg_notify('a', '') $$, /* pg_catalog.pg_notify */ x.pg_notify()", None),
    ],
)
def test_a_schema_becomes_blanks_where_it_qualifies_a_name(text: str, expected: str | None) -> None:
    assert unqualified(text, "PG_CATALOG", "PG_NOTIFY") == (expected or text)


def test_a_text_that_comes_again_is_not_read_again() -> None:
    assert read("select 1; commit") is read("select 1; commit")
    long = "select '" + "x" * 20_000 + "'"
    assert read(long) is not read(long), "long texts are not kept"


HEAVY = [
    "'",
    "''",
    "/*",
    "$a",
    "$a$",
    "$a$b",
    "-- \n",
    "(",
    "\\",
    "E'\\'",
    '"',
    "case ",
    "1e",
    "'\n",
    "'--\n",
]


@pytest.mark.parametrize("piece", HEAVY)
def test_reading_takes_time_in_proportion_to_the_length(piece: str) -> None:
    """A reader that goes back and forth would need minutes for these."""
    started = time.process_time()
    assert isinstance(read("select " + piece * 10_000), Script)
    assert time.process_time() - started < 5
