"""Which failures of an opening are tried again: what lifekit knows, and what a declaration adds."""

from __future__ import annotations

import asyncio
import errno
import socket
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import psycopg
import psycopg2
import pytest
import redis
import sqlalchemy.exc
from asyncpg import exceptions as asyncpg_errors

from lifekit import DeclarationError, Registry, StartupError, drivers
from lifekit._core.transient import is_transient

from . import virtual_time


def _named(option: Any) -> str:
    return getattr(option, "__name__", None) or type(option).__name__


class UnheardOfError(Exception):
    """What a client without a driver raises."""


class UnheardOfAuthError(UnheardOfError):
    """What it raises for a wrong password."""


class UnheardOfConnectionError(UnheardOfError, ConnectionError):
    """It may say itself that it is one of those."""


def raised(error: BaseException, *, of: BaseException | None = None, amid: Any = None) -> BaseException:
    """Return *error* as if it had been raised from *of*, or while *amid* was handled."""
    if of is not None:  # None would say that nobody shall see the context
        error.__cause__ = of
    error.__context__ = amid
    return error


def nested(error: Exception, depth: int, times: int = 1) -> Exception:
    """Return it in groups in groups, each of which holds the same several times."""
    for _ in range(depth):
        error = ExceptionGroup("nested", [error] * times)
    return error


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)")
NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
LATE = "FATAL:  the database system is starting up"
WRONG_PASSWORD = 'FATAL:  password authentication failed for user "shop"'


def by_state(kind: type[Exception], attribute: str, state: str) -> Exception:
    """Return an error of libpq's, of a server that speaks another language."""
    error: Exception = type(kind.__name__, (kind,), {attribute: state, "__module__": kind.__module__})(
        "?"
    )
    return error


PASSES: dict[str, BaseException] = {
    "refused": REFUSED,
    "timed out": TimeoutError(),
    "unreachable": OSError(errno.EHOSTUNREACH, "No route to host"),
    "hung up amid an answer": asyncio.IncompleteReadError(b"", 4),
    "several addresses, asyncio": OSError("Multiple exceptions: [Errno 111] Connect call failed, …"),
    "several addresses, uvloop": OSError(
        f"Multiple exceptions: [Errno {errno.ENETUNREACH}] x, [Errno {errno.ECONNREFUSED}] y"
    ),
    "several addresses, AnyIO": raised(
        OSError("All connection attempts failed"), of=ExceptionGroup("", [REFUSED])
    ),
    "several addresses, trio": raised(OSError("all attempts to connect failed"), of=REFUSED),
    "a unix socket that is not there yet": FileNotFoundError(2, "No such file or directory"),
    "no such name yet": NO_NAME,
    "no answer about a name": socket.gaierror(socket.EAI_AGAIN, "Temporary failure"),
    "a name without an address": socket.gaierror(
        getattr(socket, "EAI_NODATA", socket.EAI_NONAME), "No address associated with hostname"
    ),
    "psycopg, no such name": psycopg.OperationalError(
        "failed to resolve host 'password': [Errno -2] …"
    ),
    "psycopg2, no such name": psycopg2.OperationalError(
        'could not translate host name "auth.password.db" to address: nodename nor servname provided'
    ),
    "psycopg, starting": psycopg.OperationalError(LATE),
    "psycopg, starting, by its state": by_state(psycopg.OperationalError, "sqlstate", "57P03"),
    "psycopg2, full, by its state": by_state(psycopg2.OperationalError, "pgcode", "53300"),
    "asyncpg, starting": asyncpg_errors.CannotConnectNowError("starting up"),
    "sqlite, locked": raised(sqlite3.OperationalError("database is locked")),
    "redis, no such name": raised(
        redis.ConnectionError("Error -2 connecting to db:6379."), amid=NO_NAME
    ),
    "httpx, no such name": raised(httpx.ConnectError("[Errno -2]"), of=NO_NAME),
    "SQLAlchemy": sqlalchemy.exc.OperationalError("SELECT 1", {}, psycopg2.OperationalError(LATE)),
    "SQLAlchemy, wrapped twice": sqlalchemy.exc.DBAPIError(
        "SELECT 1", {}, raised(UnheardOfError(), of=asyncpg_errors.CannotConnectNowError("late"))
    ),
    "unheard of": raised(UnheardOfError("no broker"), of=REFUSED),
    "unheard of, without from": raised(UnheardOfError("auth-service:1 is not there"), amid=NO_NAME),
    "one's own words": raised(RuntimeError("no database"), of=REFUSED),
    "a group of such": ExceptionGroup("", [REFUSED, ExceptionGroup("", [NO_NAME, REFUSED])]),
}
PASSES["sqlite, locked"].sqlite_errorcode = sqlite3.SQLITE_BUSY  # type: ignore[attr-defined]

STAYS: dict[str, BaseException] = {
    "a bug": ValueError("a bug"),
    "a bug because of a refusal": raised(TypeError("a bug"), of=REFUSED),
    "a bug amid a refusal": raised(RuntimeError("a bug"), amid=REFUSED),
    "unheard of, alone": UnheardOfError("no broker"),
    "unheard of, which hides it": raised(UnheardOfError("no broker"), amid=ValueError()),
    "unheard of, by its name": raised(UnheardOfAuthError("no"), of=ConnectionResetError(104, "reset")),
    "unheard of, by its text": raised(UnheardOfError("authentication failed: no"), of=REFUSED),
    "its own connection error, by its text": UnheardOfConnectionError("wrong password"),
    "its own connection error, of a certificate": raised(
        UnheardOfConnectionError("no"), of=ssl.SSLCertVerificationError(1, "self-signed certificate")
    ),
    "not permitted": raised(PermissionError(13, "Permission denied"), of=REFUSED),
    "no such file": FileNotFoundError(2, "No such file", "settings.toml"),
    "asked for a name wrongly": socket.gaierror(socket.EAI_SERVICE, "Servname not supported"),
    "a certificate": ssl.SSLCertVerificationError(1, "self-signed certificate"),
    "psycopg, password": psycopg.OperationalError(WRONG_PASSWORD),
    "psycopg, password on the second host": psycopg.OperationalError(
        f'connection to server at "a" failed: Connection refused\n{WRONG_PASSWORD}'
    ),
    "psycopg, by its state": by_state(psycopg.OperationalError, "sqlstate", "28P01"),
    "psycopg, by PgBouncer's state": by_state(psycopg.OperationalError, "sqlstate", "08P01"),
    "psycopg, another class": psycopg.ProgrammingError(LATE),
    "asyncpg, password": asyncpg_errors.InvalidPasswordError("no"),
    "redis, password": redis.AuthenticationError("no"),
    "redis, a bug": raised(redis.ConnectionError("x"), of=TypeError("a bug")),
    "sqlite, no such table": sqlite3.OperationalError("no such table: database is locked"),
    "SQLAlchemy, password": sqlalchemy.exc.OperationalError(
        "SELECT 1", {}, psycopg2.OperationalError(WRONG_PASSWORD)
    ),
    "SQLAlchemy, its own": raised(sqlalchemy.exc.ArgumentError("a bug"), amid=REFUSED),
    "a group with another": ExceptionGroup("", [REFUSED, ValueError()]),
}


@pytest.mark.parametrize("error", PASSES.values(), ids=PASSES.keys())
def test_a_server_that_is_not_there_yet_passes(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", STAYS.values(), ids=STAYS.keys())
def test_what_refuses_us_and_what_is_a_bug_stays(error: BaseException) -> None:
    assert not is_transient(error)


# -- without the pool's package --------------------------------------------------------------------

SINGLE = {
    "psycopg": "await psycopg.AsyncConnection.connect('host=127.0.0.1 port=1')",
    "psycopg2": "psycopg2.connect('host=127.0.0.1 port=1')",
    "sqlalchemy": "create_engine('postgresql+psycopg2://x@127.0.0.1:1/x').connect()",
    "sqlalchemy.ext.asyncio": "await create_async_engine('postgresql+psycopg://x@127.0.0.1:1/x').connect()",
}


@pytest.mark.parametrize("package", SINGLE)
def test_a_single_connection_is_tried_again_though_no_pool_is_imported(package: str) -> None:
    """What is known of an error is known by the package that raised it."""
    script = f"""
import asyncio, sys, {package}
from {package} import *
from lifekit._core.transient import is_transient
async def main():
    try: {SINGLE[package]}
    except Exception as error: assert is_transient(error), error
    else: raise SystemExit("it connected")
    assert not {{"psycopg_pool", "aiopg"}} & sys.modules.keys()
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# -- transient= ------------------------------------------------------------------------------------


async def attempts(error: BaseException, **options: Any) -> tuple[int, BaseException]:
    """Return how often a resource whose opening fails is tried, and what it failed with."""
    registry, made = Registry(), list[None]()

    async def client() -> None:
        made.append(None)
        raise error

    options = {"retry": 2, **options}
    registry.resource(**options)(client)

    with pytest.raises(StartupError) as caught:
        async with registry.lifespan():
            pass
    return len(made), caught.value.exceptions[0]


def in_virtual_time(main: Callable[[], Any]) -> Any:
    """Return what *main* does where nobody waits for real."""
    found: list[Any] = []

    async def run() -> None:
        found.append(await main())

    virtual_time.run(run, "asyncio")
    return found[0]


class Answer:
    """What a function may answer with."""

    def __init__(self, what: bool | Exception) -> None:
        self._what = what

    def __bool__(self) -> bool:
        if isinstance(self._what, Exception):
            raise self._what
        return self._what


def _says_no_broker(error: object) -> bool:
    return str(error) == "no broker"


def _answers(what: object) -> Callable[[object], object]:
    return lambda _: what


@pytest.mark.parametrize(
    "transient",
    [
        UnheardOfError,
        (LookupError, UnheardOfError),
        [UnheardOfError],
        {UnheardOfError},
        Exception,
        _says_no_broker,
        _answers(Answer(True)),
    ],
    ids=_named,
)
def test_a_declaration_says_what_else_passes(transient: Any) -> None:
    for error in (
        UnheardOfError("no broker"),
        ExceptionGroup("", [UnheardOfError("no broker"), REFUSED]),
    ):
        assert in_virtual_time(partial(attempts, error, transient=transient))[0] == 3


@pytest.mark.parametrize(
    "transient", [LookupError, (), _answers(None), _answers(Answer(False))], ids=_named
)
def test_it_adds_to_what_lifekit_knows(transient: Any) -> None:
    assert in_virtual_time(partial(attempts, REFUSED, transient=transient))[0] == 3
    assert in_virtual_time(partial(attempts, UnheardOfError(), transient=transient))[0] == 1


async def _async(_: object) -> bool:
    return True


def _raises(error: Any) -> bool:
    return error.code() is not None


def _has_no_truth(_: object) -> Answer:
    return Answer(ValueError("no truth"))


def _hides_that_it_is_async(error: object) -> object:
    return _async(error)


@pytest.mark.parametrize(
    "transient",
    [_raises, _has_no_truth, _hides_that_it_is_async],
    ids=_named,
)
def test_a_function_that_fails_leaves_the_failure_as_it_is(transient: Any) -> None:
    """It counts as no; a note says so."""
    made, error = in_virtual_time(partial(attempts, UnheardOfError("no broker"), transient=transient))
    assert made == 1
    assert str(error) == "no broker"
    (note,) = error.__notes__
    assert note.startswith(
        "lifekit: transient= failed for this UnheardOfError, so it does not count as"
    )
    made, error = in_virtual_time(partial(attempts, REFUSED, transient=transient))
    assert made == 3


def test_it_is_asked_only_while_there_are_attempts_left() -> None:
    asked: list[BaseException] = []
    in_virtual_time(partial(attempts, UnheardOfError(), retry=0, transient=asked.append))
    assert asked == []


@pytest.mark.parametrize(
    "transient",
    ["ConnectionError", int, UnheardOfError(), 5, [UnheardOfError, "x"], BaseException, True, _async],
    ids=_named,
)
def test_what_can_not_tell_is_refused_where_it_is_declared(transient: Any) -> None:
    with pytest.raises(
        DeclarationError, match=r"test_retry\.py:\d+.*: transient=.*exception types, or a"
    ):
        Registry().resource(retry=1, transient=transient)(lambda: 1)


def test_without_retry_it_would_do_nothing_and_is_refused() -> None:
    with pytest.raises(DeclarationError, match=r"test_retry\.py:\d+.* retry= is missing"):
        Registry().resource(transient=UnheardOfError)(lambda: 1)
    Registry().resource(transient=UnheardOfError, retry=None, name="one")(
        lambda: 1
    )  # as settings may say


def test_a_registered_driver_is_asked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own failure does not hide the one that it is asked about."""

    class Mine(drivers.Driver[UnheardOfError]):
        def transient(self, error: BaseException) -> bool:
            return error.args == ("no broker",)

    monkeypatch.setattr("lifekit._core.drivers._registered", {UnheardOfError: Mine()})
    assert is_transient(UnheardOfError("no broker"))
    assert not is_transient(UnheardOfError())


# -- errors that are broken ------------------------------------------------------------------------


class BrokenGroup(ExceptionGroup[Exception]):
    """It says nothing of what it holds."""

    @property
    def exceptions(self) -> Any:
        raise RuntimeError("broken")

    def __str__(self) -> str:
        raise RuntimeError("broken")


class MuteError(Exception):
    """It has no text."""

    def __str__(self) -> str:
        raise RuntimeError("broken")


def circle() -> BaseException:
    """Return an error that comes from one that comes from it."""
    one, two = UnheardOfError(), UnheardOfError()
    one.__cause__, two.__cause__ = two, one
    return one


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (BrokenGroup("x", [REFUSED]), True),
        (MuteError(), False),
        (raised(MuteError(), of=REFUSED), False),
        (circle(), False),
        (raised(UnheardOfConnectionError(), of=circle()), True),
        (nested(REFUSED, 30, times=10), True),
        (nested(REFUSED, 20), True),
        (nested(REFUSED, 5000), False),
    ],
    ids=["group", "mute", "mute of", "circle", "of a circle", "wide", "nested", "deep"],
)
def test_an_error_that_is_broken_is_judged_as_far_as_it_can_be(error: Exception, passes: bool) -> None:
    assert is_transient(error) is passes
