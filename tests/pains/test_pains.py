"""Each pain is shown by running a program, and the same program is run with lifekit.

`without` and `article` hold programs that have the pain, `with_lifekit` and `article_with_lifekit`
those of the same names that have lifekit instead. The texts are those of the installed versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from redis import Redis

from lifekit.embedded import Server

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LIFEKIT = {"without": "with_lifekit", "article": "article_with_lifekit"}


@dataclass(frozen=True)
class Pain:
    """One program, what it says without lifekit, and what it says with lifekit.

    Attributes: ``program``, its folder and name; ``texts``, each a symptom; ``cured``, what it says
    with lifekit; ``refused``, if an error comes there: the resource, the cause, the mend; ``named``,
    its name with lifekit, if it differs; ``options``, of pytest, which runs what is a test file;
    ``hurry``, how many times faster the clock of its event loops runs without lifekit.
    """

    program: str
    texts: tuple[str, ...]
    cured: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    named: str | None = None
    options: tuple[str, ...] | None = None
    hurry: float | None = None

    @property
    def folder(self) -> str:
        """Where the program is that hurts."""
        return self.program.partition("/")[0]

    @property
    def twin(self) -> str:
        """The program with lifekit."""
        return f"{LIFEKIT[self.folder]}/{self.named or self.program.partition('/')[2]}"

    @property
    def twin_options(self) -> tuple[str, ...] | None:
        """The options of pytest that go with it."""
        if self.options is None:
            return None
        module = "myapp" if self.folder == "article" else Path(self.twin).name
        app = f"tests.pains.{LIFEKIT[self.folder]}.{module}:app"
        return (*self.options, "-p", "lifekit.pytest_plugin", "-o", f"lifekit_app={app}")


OF_ANOTHER_LOOP = ("db was opened in", "by the lifespan at", "open a lifespan in this one")
BELONGS = (
    "ValueError: The future belongs to a different loop than the one specified as the loop argument"
    if sys.version_info < (3, 12)  # which has another wait_for()
    else "attached to a different loop"
)
IS_NEW = sys.version_info >= (3, 14)  # which has other words
PYTEST: tuple[str, ...] = ()
"""Run by pytest, with no line in its ini file."""

PAINS = [
    # -- one thing, several event loops ---------------------------------------------------------
    Pain(
        "without/asyncpg_pool_in_a_second_loop",
        (
            "attached to a different loop\n\nDuring handling of the above exception, another",
            "InterfaceError: cannot perform operation: another operation is in progress",
            "TimeoutError\n",  # the next use hangs
            "RuntimeError: Event loop is closed",
        ),
        refused=OF_ANOTHER_LOOP,
    ),
    Pain(
        "without/redis_client_made_at_import",
        ("None\nRuntimeError: Event loop is closed\nNone\n",),
        refused=("cache was opened in", *OF_ANOTHER_LOOP[1:]),
    ),
    Pain(
        "without/aiopg_pool_in_a_second_loop",
        (
            BELONGS,
            "RuntimeError: Event loop is closed",
        ),
        refused=OF_ANOTHER_LOOP,
    ),
    Pain(
        "without/sqlalchemy_engine_in_every_loop",
        (
            "attached to a different loop\nInterfaceError: (sqlalchemy",
            "InterfaceError) cannot perform operation: another operation is in progress\n",
        ),
        cured=("1\n1\n1\n1\n",),
    ),
    Pain(
        "without/psycopg_pool_closed_in_a_second_loop",
        (
            "(1,)\n(1,)\nRuntimeError: Event loop is closed\n",
            f"Exception ignored {'while closing generator' if IS_NEW else 'in:'} <coroutine object",
        ),
        refused=OF_ANOTHER_LOOP,
    ),
    Pain(
        "without/asyncpg_pool_made_at_import",
        ("InterfaceError: pool is not initialized",),
        refused=(
            "db (tests/pains/with_lifekit/asyncpg_pool_made_at_import.py:15)",
            "this asyncpg pool belongs to another event loop",
            "Return asyncpg.create_pool(...) from the factory",
        ),
    ),
    Pain(
        "without/psycopg_pool_opened_at_import",
        ("RuntimeError: AsyncConnectionPool open with no running loop",),
        cured=("(1,)\n",),
    ),
    # -- the end -----------------------------------------------------------------------------------
    Pain(
        "without/task_destroyed_while_pending",
        ("Task was destroyed but it is pending!", "unclosed connection <asyncpg."),
        cured=("it watches\n",),
    ),
    Pain(
        "without/task_destroyed_while_pending",
        (),
        named="task_that_still_holds_a_connection",
        refused=("db (tests/pains", "close took longer than 0.5 s", "in watch (task 'watcher')"),
    ),
    Pain(
        "without/aiopg_pool_not_waited_for",
        ("Unclosed 3 connections in <", "Unclosed connection <aiopg.connection"),
        cured=("0\n",),
    ),
    Pain(
        "without/redis_client_not_closed",
        ("unclosed Connection <redis.asyncio.connection.Connection",),
        cured=("None\n",),
    ),
    Pain(
        "without/aiopg_released_inside_a_transaction",
        ("Invalid transaction status on released connection: 2", "0 connections are left"),
        cured=("1 connections are left\n",),
    ),
    Pain(
        "without/asyncpg_pool_close_waits_for_ever",
        ("Pool.close() is taking over 60 seconds to complete", "TimeoutError\n"),
        refused=("db (tests/pains", "close took longer than 0.5 s", "for_ever.py:20 in main (task"),
        hurry=30,
    ),
    Pain(
        "without/aiopg_wait_closed_hangs",
        ("await pool.wait_closed()", "TimeoutError\n"),
        refused=("db (tests/pains", "wait_closed took longer than 0.5 s", "hangs.py:20 in main (task"),
    ),
    Pain(
        "without/failed_start_leaks_what_had_opened",
        ("Unclosed 2 connections in <",),
        refused=("cache (tests/pains", "Connect call failed", "opened, and closed again: db"),
    ),
    Pain(
        "without/failed_start_leaks_half_a_pool",
        (
            'TooManyConnectionsError: too many connections for role "few"\n',
            'FATAL:  too many connections for role "few"\n\n3 connections are open still',
            "Unclosed 3 connections in <",
        ),
        refused=(
            "aiopg_pool (tests/pains",
            'FATAL:  too many connections for role "fewer"',
            'TooManyConnectionsError: too many connections for role "fewer"',
            "no connection is open any more\n",
        ),
    ),
    Pain(
        "without/cancel_scope_left_in_another_task",
        ("RuntimeError: Attempted to exit cancel scope in a different task than it was entered in",),
        cured=("torn down\n",),
    ),
    # -- pytest-asyncio -------------------------------------------------------------------------
    Pain(
        "without/fixture_torn_down_in_another_task",
        ("RuntimeError: Attempted to exit cancel scope in a different task than it was entered in",),
        cured=("1 passed",),
        options=PYTEST,
    ),
    Pain(
        "without/scope_mismatch",
        ("ScopeMismatch: You tried to access the function scoped fixture _function_scoped_runner",),
        cured=("1 passed",),
        options=("-o", "asyncio_default_fixture_loop_scope=function"),
    ),
    Pain(
        "without/session_fixture_in_another_loop",
        (
            "attached to a different loop",
            "InterfaceError: cannot perform operation: another operation is in progress",
        ),
        cured=("2 passed",),
        options=PYTEST,
    ),
    Pain(
        "without/event_loop_fixture_is_gone",
        ("fixture 'event_loop' not found",),
        cured=("1 passed",),
        options=PYTEST,
    ),
    # -- clients ----------------------------------------------------------------------------------
    Pain(
        "without/client_without_with",
        ("two requests, 2 event loops", "AttributeError: 'State' object has no attribute 'db'"),
        refused=(
            "db (tests/pains",
            "came through a TestClient that ran no lifespan of this registry",
            "write `with TestClient(app) as client:`",
        ),
    ),
    Pain(
        "without/asgi_transport_runs_no_lifespan",
        ("AttributeError: 'State' object has no attribute 'db'",),
        refused=("db (tests/pains", "ASGITransport, which never runs one", "\n1\n"),
    ),
    Pain(
        "without/async_client_takes_no_app",
        ("TypeError: AsyncClient.__init__() got an unexpected keyword argument 'app'",),
        cured=("<Response [404 Not Found]>\n",),
    ),
    # -- stand-ins --------------------------------------------------------------------------------
    Pain(
        "without/mocks_that_cannot_be_awaited",
        (
            "TypeError: 'MagicMock' object can't be awaited"
            if IS_NEW
            else "TypeError: object MagicMock can't be used in 'await' expression",
            "TypeError: 'coroutine' object does not support the asynchronous context manager protocol",
        ),
        cured=("https://example.org/\n",),
    ),
    Pain(
        "without/override_of_a_built_singleton",
        ("None\n",),  # and not what the fake says
        refused=(
            "before: Hello from the fake\n",
            "cache (tests/pains",
            "what was built from it keeps it: this override changes nothing",
            "write `async with lifespan.override(cache, …):`",
            "while it runs: Hello from the fake\n",
        ),
    ),
    # -- applications -----------------------------------------------------------------------------
    Pain(
        # Nothing supervises yet: it goes on answering, and what happened is told when it closes.
        "without/background_task_dies_unseen",
        ("fine True\n",),
        refused=("fine\n", "refresher (tests/pains", "ConnectionError: the queue is gone"),
    ),
    Pain(
        "without/on_startup_is_ignored",
        ("the lifespan begins\nit serves\nthe lifespan ends\n",),  # and no flags are loaded
        cured=("the lifespan begins\nthe flags are loaded\nit serves\nthe lifespan ends\n",),
    ),
    Pain(
        "without/mounted_app_has_no_lifespan",
        ("AttributeError: 'State' object has no attribute 'motd'",),
        cured=("the shop opens\nwelcome\n",),
    ),
    # -- the article ------------------------------------------------------------------------------
    Pain(
        "article/event_loop_is_closed",
        (
            "RuntimeError: Event loop is closed",
            BELONGS,
            "InterfaceError: cannot perform operation: another operation is in progress",
            "3 failed, 3 passed",
        ),
        cured=("7 passed",),
        options=PYTEST,
    ),
    Pain(
        "article/garbage_collected_after_its_loop",
        (
            *(("ResourceWarning: loop is closed",) if sys.version_info[:2] != (3, 12) else ()),
            "unclosed connection <asyncpg.",
            "Unclosed 1 connections in <",
            "unclosed Connection <redis.",
        ),
        cured=("[]\n",),
    ),
    Pain(
        "article/lifespan_as_it_stands",
        ("AttributeError: 'Redis' object has no attribute 'wait_closed'", "Unclosed 1 connections in"),
        named="garbage_collected_after_its_loop",
        cured=("[]\n",),
    ),
    Pain(
        "article/session_scope_as_it_stands",
        (
            "attached to a different loop",
            "InterfaceError: cannot perform operation: another operation is in progress",
        ),
        named="session_scope",
        cured=("5 passed",),
        options=PYTEST,
    ),
    Pain(
        "article/session_scope",
        ("assert ['ada'] == []", "assert 1 == 0", "assert ['ada came'] == []", "3 failed, 1 passed"),
        cured=("5 passed",),
        options=PYTEST,
    ),
    Pain(
        "article/function_scope",
        ("assert 3 == 1", "1 failed, 2 passed"),  # the application started three times
        cured=("3 passed",),
        options=PYTEST,
    ),
    Pain(
        "article/transaction_rollback",
        ("assert [] == ['grace']", "assert 1 == 0", "2 failed, 1 passed"),
        cured=("3 passed",),
        options=PYTEST,
    ),
    Pain(
        "article/mocking",
        ("'Pool' object has no attribute 'fetchone'", "::test_first_as_it_is"),
        refused=(
            "asyncpg.pool.Pool has no attribute 'fetchone'",
            "::test_first_with_mocks",
            "1 failed, 1 passed",
        ),
        options=PYTEST,
    ),
]

LEFT_BEHIND = (
    "Exception ignored",
    "Unclosed ",
    "never awaited",
    "never retrieved",
    "unclosed Connection",
    "unclosed connection",
    "unclosed transport",
    "was destroyed",
)
"""What Python says of what nobody has ended."""

TWO_POOLS = "article_with_lifekit/two_pools_of_one_database"


@dataclass(frozen=True)
class Output:
    """What a program said, and the status that it ended with."""

    text: str
    status: int


class Programs:
    """Runs programs, and keeps what they said."""

    def __init__(
        self, forker: subprocess.Popen[str], folder: Path, servers: tuple[str, str], admin: Any
    ) -> None:
        self._forker = forker
        self._folder = folder
        self._servers = servers
        self._admin = admin
        self.schemas: list[int] = []
        self._numbers: dict[tuple[str, tuple[str, ...] | None], int] = {}
        self._ended: dict[int, Output] = {}

    def start(self, program: str, options: tuple[str, ...] | None, hurry: float | None) -> None:
        """Let it run; what creates tables has a schema of its own."""
        if (program, options) in self._numbers:
            return
        number = self._numbers[program, options] = len(self._numbers)
        postgres, valkey = (urlsplit(url) for url in self._servers)
        if program.startswith("article"):
            self._admin.execute(f"CREATE SCHEMA pain_{number}")
            self.schemas.append(number)
            postgres = postgres._replace(query=f"options=-csearch_path%3Dpain_{number}")
        request = {
            "number": number,
            "module": f"tests.pains.{program.replace('/', '.')}",
            "output": str(self._folder / str(number)),
            "environment": {
                "DATABASE_URL": postgres.geturl(),
                "REDIS_URL": valkey._replace(path=f"/{1 + number % 8}").geturl(),
            },
            "hurry": hurry,
            "pytest": None if options is None else pytest_arguments(program, options),
        }
        assert self._forker.stdin is not None
        print(json.dumps(request), file=self._forker.stdin, flush=True)

    def output(
        self, program: str, options: tuple[str, ...] | None, hurry: float | None = None
    ) -> Output:
        """Wait until it has ended."""
        self.start(program, options, hurry)
        number = self._numbers[program, options]
        assert self._forker.stdout is not None
        while number not in self._ended:
            line = self._forker.stdout.readline()
            assert line, (self._folder / "forker").read_text("utf-8")
            answer: Any = json.loads(line)
            text = (self._folder / str(answer["number"])).read_text("utf-8")
            self._ended[answer["number"]] = Output(text, answer["status"])
        return self._ended[number]


def pytest_arguments(program: str, options: Sequence[str]) -> list[str]:
    """Return the arguments with which pytest runs one file as if it were alone in the world."""
    file = ROOT / "tests" / "pains" / f"{program}.py"
    own = ["-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(file.parent)]
    own += [
        "-q",
        "--tb=short",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "-p",
        "pytest_asyncio.plugin",
    ]
    return [*own, *options, str(file)]


@pytest.fixture(scope="module")
def programs(
    request: pytest.FixtureRequest,
    postgres: Server,
    valkey: Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Programs]:
    """All programs that the tests of this run ask for, under way."""
    command = [sys.executable, "-W", "default", "-m", "tests.pains.forker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    folder = tmp_path_factory.mktemp("pains")
    with (
        closing(psycopg2.connect(postgres.url)) as admin,
        admin.cursor() as cursor,
        (folder / "forker").open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors, **pipes) as forker,
    ):
        admin.autocommit = True
        made = Programs(forker, folder, (postgres.url, valkey.url), cursor)
        # With several workers none of them knows which tests will be its own.
        for item in () if "PYTEST_XDIST_WORKER" in os.environ else request.session.items:
            pain = getattr(getattr(item, "callspec", None), "params", {}).get("pain")
            if isinstance(pain, Pain):
                made.start(pain.program, pain.options, pain.hurry)
                made.start(pain.twin, pain.twin_options, None)
        yield made
        for number in made.schemas:
            cursor.execute(f"DROP SCHEMA pain_{number} CASCADE")
    for number in range(1, 9):
        kind: Any = Redis
        with kind.from_url(urlsplit(valkey.url)._replace(path=f"/{number}").geturl()) as redis:
            redis.flushdb()


def is_answered(pain: Pain, output: Output) -> bool:
    """Return whether it said what it says with lifekit, and none of the texts that hurt."""
    told = [text for text in pain.refused or pain.cured if text not in output.text]
    hurt = [text for text in pain.texts if text in output.text]
    return not told and not hurt


@pytest.mark.long  # what others do hurts the same from one day to the next
@pytest.mark.parametrize(
    ("pain", "text"),
    [
        pytest.param(pain, text, id=f"{Path(pain.program).name}-{number}")
        for pain in PAINS
        for number, text in enumerate(pain.texts)
    ],
)
def test_without_lifekit_it_hurts(pain: Pain, text: str, programs: Programs) -> None:
    """The program without lifekit says the symptom's text."""
    assert text in programs.output(pain.program, pain.options, pain.hurry).text


every_pain = pytest.mark.parametrize(
    "pain",
    PAINS,
    ids=[f"{pain.folder}-{Path(pain.program).name}-{pain.named or ''}".strip("-") for pain in PAINS],
)


@pytest.mark.long
@every_pain
def test_with_lifekit_it_is_cured_or_refused(pain: Pain, programs: Programs) -> None:
    """The same program with lifekit works in silence, or ends by an error that says what to do."""
    output = programs.output(pain.twin, pain.twin_options)
    for text in pain.refused or pain.cured:
        assert text in output.text
    for text in (*pain.texts, *LEFT_BEHIND):
        assert text not in output.text
    if pain.cured:
        assert output.status == 0
    if pain.cured and pain.options is None:
        assert output.text == "".join(pain.cured)  # nor does anything warn when it ends


@pytest.mark.long
@every_pain
def test_what_is_claimed_of_lifekit_does_not_hold_without(pain: Pain, programs: Programs) -> None:
    """The claims above can fail: the program without lifekit fails them."""
    assert not is_answered(pain, programs.output(pain.program, pain.options, pain.hurry))


def test_two_pools_of_one_database_see_what_the_other_has_committed(programs: Programs) -> None:
    """Of two drivers, in one sandbox."""
    options = Pain("article/session_scope", (), options=PYTEST).twin_options
    output = programs.output(TWO_POOLS, options)

    assert "1 passed" in output.text


def test_every_program_is_run() -> None:
    """No program lies about that nobody runs."""
    known = {pain.program for pain in PAINS} | {pain.twin for pain in PAINS} | {TWO_POOLS}
    parts = {"dependencies", "fixtures", "myapp", "__init__"}
    files = [file for folder in (*LIFEKIT, *LIFEKIT.values()) for file in (HERE / folder).glob("*.py")]
    assert {f"{file.parent.name}/{file.stem}" for file in files if file.stem not in parts} == known
