"""Errors made by others show no password, whatever their classes make of their texts."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import aiopg
import anyio
import asyncpg
import httpx
import httpx2
import psycopg
import psycopg_pool
import pydantic
import pytest
import redis.asyncio as redis
import sqlalchemy
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from lifekit import Registry, StartupError, events
from lifekit._core.errors import note_once, summary
from lifekit._core.stand_in import redact_error

SECRET = "hunter2"
DSN = f"postgresql://app:{SECRET}@db.example.org/shop"


def printed(error: BaseException) -> str:
    """Return all that is printed of an error, without the lines of this file's code."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    code = [at + 1 for at, line in enumerate(lines) if __file__ in line]
    shown = [line for at, line in enumerate(lines) if at not in code]
    return "\n".join([*shown, str(error), repr(error), summary(error)])


async def told(factory: Callable[[], Any]) -> tuple[str, StartupError | None]:
    """Open what *factory* makes, and return every text that came of it, and the error."""
    heard: list[events.Event] = []
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    events.logger.addHandler(handler)
    registry = Registry("secret", start_timeout=20, on_event=heard.append)
    registry.resource(name="db", retry=1)(factory)
    error = None
    try:
        async with registry.lifespan():
            pass
    except StartupError as raised:
        error = raised
    finally:
        events.logger.removeHandler(handler)
    texts = [log.getvalue(), *map(repr, heard)]
    errors = [error, *(getattr(event, "error", None) for event in heard)]
    return "\n".join([*texts, *(printed(each) for each in errors if each is not None)]), error


# -- a part of a malformed URL -----------------------------------------------------------------------


CLIENTS: dict[str, Callable[[str], Any]] = {
    "asyncpg": lambda at: asyncpg.create_pool(f"postgresql://{at}/db"),
    "aiopg": lambda at: aiopg.create_pool(f"postgresql://{at}/db"),
    "psycopg": lambda at: psycopg.AsyncConnection.connect(f"postgresql://{at}/db"),
    "psycopg_pool": lambda at: psycopg_pool.AsyncConnectionPool(f"postgresql://{at}/db", open=False),
    "sqlalchemy-asyncpg": lambda at: create_async_engine(f"postgresql+asyncpg://{at}/db"),
    "sqlalchemy-psycopg": lambda at: create_async_engine(f"postgresql+psycopg://{at}/db"),
    "sqlalchemy-sync": lambda at: sqlalchemy.create_engine(f"postgresql+psycopg2://{at}/db"),
    "redis": lambda at: redis.from_url(f"redis://{at}/0"),  # pyright: ignore[reportUnknownMemberType]
    "httpx": lambda at: httpx.AsyncClient(base_url=f"https://{at}"),
    "httpx2": lambda at: httpx2.AsyncClient(base_url=f"https://{at}"),
}
MALFORMED = [
    "hunter2/x",
    "hunter2%zz",
    "hunter2#x",
    "x@hunter2",
    "hunter2 x",
    "hun%74er2/x",
    "a/hunter2]",
]


@pytest.mark.anyio
@pytest.mark.long
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_no_driver_quotes_a_part_of_the_password(client: str) -> None:
    for password in MALFORMED:
        shown, _ = await told(partial(CLIENTS[client], f"app:{password}@127.0.0.1:1"))
        assert SECRET not in shown, password


@pytest.mark.parametrize(
    "dsn",
    [
        f"app:{SECRET}@127.0.0.1:1/db",
        f"postgresql:/app:{SECRET}@127.0.0.1:1/db",
        f"postgresql:app:{SECRET}@127.0.0.1:1/db",
        f"host=127.0.0.1 password=x {SECRET} port=1",
    ],
)
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_dsn_without_its_scheme_or_quotes_shows_no_password(dsn: str) -> None:
    for connect in (aiopg.create_pool, asyncpg.create_pool, psycopg.AsyncConnection.connect):
        shown, error = await told(partial(connect, dsn))
        assert error is not None
        assert SECRET not in shown


@pytest.mark.anyio
async def test_what_was_cancelled_for_the_sake_of_a_failure_is_not_searched_for_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[BaseException] = []

    def search(error: BaseException, *about: object) -> BaseException:
        searched.append(error)
        return redact_error(error, *about)

    monkeypatch.setattr("lifekit._core.life.redact_error", search)
    registry = Registry()
    for number in range(3):
        registry.resource(name=f"slow_{number}")(anyio.sleep_forever)

    @registry.resource
    async def db() -> None:
        raise error

    error = ValueError("no")
    with pytest.raises(StartupError):
        async with registry.lifespan():
            pass
    assert searched == [error]


words = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=4, max_size=20)
others = st.text("ab.-_:/?#@%&=[]", max_size=5)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(words, others, others)
@example("hunter2", "a/", "@%zz")
@example("hunter2", "a@/", "")
def test_no_part_of_a_password_that_a_parser_quotes_is_shown(part: str, left: str, right: str) -> None:
    assume(
        part.lower() not in {"true", "none", "null", "false", "secret", "token", "password", "redis"}
    )
    assume(not left or left[-1] in "/?#@:&=[]")
    assume(not right or right[0] in "/?#@:&=[]")
    assume(not part[:5].isdigit())  # else it may be a port
    assume("//" not in left + right)  # or another URL
    assume("@" not in left + right or not {"?", "#"} & {*left, *right})  # or a host and its query

    def parse(url: str) -> None:
        raise ValueError(f"invalid port: {part!r}")

    with pytest.raises(ValueError, match="invalid port") as caught:
        parse(f"redis://u:{left}{part}{right}@h/0")
    assert f"'{part}'" not in str(redact_error(caught.value))


@pytest.mark.parametrize("where", ["environment", "value"])
def test_the_secret_is_known_by_what_the_failure_is_about(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Settings:
        def __init__(self, url: str) -> None:
            self.urls = {"main": [url]}

    about: list[object] = []
    if where == "environment":
        monkeypatch.setenv("SHOP_DATABASE_URL", f"redis://app:{SECRET}/x@cache")
    else:
        about.append(Settings(f"redis://app:{SECRET}/x@cache"))
    error = ValueError(f"no port: '{SECRET}', app, cache")
    assert redact_error(error, *about) is error
    assert str(error) == "no port: '***', app, cache"


# -- texts that can't be changed ---------------------------------------------------------------------


class OwnTextError(Exception):
    def __init__(self, url: str, *, code: int = 3) -> None:
        self.url, self.code = url, code

    def __str__(self) -> str:
        return f"cannot connect to {self.url}"


class FinalError(OwnTextError):
    def __init_subclass__(cls) -> None:
        raise TypeError("final")


class Login(pydantic.BaseModel):
    url: pydantic.PostgresDsn
    password: int
    missing: str


def validation_error(url: str) -> pydantic.ValidationError:
    with pytest.raises(pydantic.ValidationError) as caught:
        Login.model_validate({"url": url, "password": SECRET})
    return caught.value


UNCHANGEABLE: list[BaseException] = [
    OwnTextError(DSN),
    FinalError(DSN),
    KeyError({"password": SECRET}),
    RuntimeError({"dsn": [DSN]}),
    ValueError(DSN.encode()),
    UnicodeDecodeError("utf-8", DSN.encode(), 1, 2, "bad"),
    DBAPIError("INSERT", {"password": SECRET}, ValueError("no")),
    validation_error(f"postgresql://app:{SECRET}/x@h/db"),
    validation_error(f"postgresql://app:{SECRET}-and-a-long-rest-of-it@db.example.org:99999999/db"),
    ExceptionGroup(f"connecting to {DSN}", [ValueError("no")]),
    ExceptionGroup("several", [ExceptionGroup("more", [OwnTextError(DSN)])]),
]


@pytest.mark.parametrize("error", UNCHANGEABLE, ids=lambda error: type(error).__name__)
def test_a_stand_in_is_printed_in_its_place(error: Any) -> None:
    try:
        raise error
    except BaseException as raised:
        before = printed(raised)
    assert SECRET in before
    shown: Any = redact_error(error)
    assert shown is not error
    assert shown.original is error
    assert SECRET not in printed(shown)
    assert "***" in printed(shown)
    assert isinstance(shown, type(error))
    assert type(shown).__qualname__ == type(error).__qualname__
    assert type(shown).__module__ == type(error).__module__
    assert shown.__traceback__ is error.__traceback__
    assert len(printed(shown).splitlines()) == len(before.splitlines())
    assert redact_error(shown) is shown
    again = redact_error(error, "something else")
    assert printed(again) == printed(shown)
    assert printed(copy.copy(shown)).endswith(str(summary(shown)))


def test_a_stand_in_is_caught_as_its_original_and_has_its_attributes() -> None:
    error = OwnTextError(DSN)
    error.__cause__ = cause = OwnTextError(DSN)
    error.add_note(f"at {DSN}")
    with pytest.raises(OwnTextError) as caught:
        raise redact_error(error)
    shown = caught.value
    assert (shown.code, shown.url) == (3, DSN.replace(SECRET, "***"))
    assert shown.__notes__ == ["at " + DSN.replace(SECRET, "***")]
    assert isinstance(shown.__cause__, OwnTextError)
    assert shown.__cause__ is not cause
    assert error.url == DSN
    shown.add_note("more")
    assert "more" in printed(shown)
    copied = pickle.loads(pickle.dumps(redact_error(RuntimeError({"dsn": DSN}))))
    assert SECRET not in printed(copied)
    assert copied.original.args == ({"dsn": DSN},)


def test_a_group_that_holds_a_stand_in_is_split_as_before() -> None:
    plain = ValueError("plain")
    group = redact_error(ExceptionGroup("several", [OwnTextError(DSN), plain]))
    parts: list[BaseException] = []
    with pytest.raises(ExceptionGroup) as caught:
        try:
            raise group
        except* OwnTextError as part:
            parts.append(part)
    assert caught.value.exceptions == (plain,)
    assert len(parts) == 1
    assert SECRET not in printed(parts[0])


def test_an_error_without_a_secret_stays_the_same_and_so_do_those_around_it() -> None:
    held = OwnTextError("redis://cache:6379/0")
    group = ExceptionGroup("several", [held, KeyError({"user": "app"})])
    group.__context__ = context = OwnTextError(DSN)
    suppressed = group.__suppress_context__
    assert redact_error(group) is group
    assert group.exceptions[0] is held
    assert group.__suppress_context__ is suppressed
    assert group.__context__ is not context


@pytest.mark.parametrize("name", ["text", "print_file_and_line", "filename", "msg"])
def test_a_syntax_error_shows_no_line_with_a_password(name: str) -> None:
    error = SyntaxError("bad")
    setattr(error, name, f"url = {DSN}")
    error.lineno, error.offset = 1, 1
    assert SECRET not in printed(redact_error(error))


# -- errors that are broken --------------------------------------------------------------------------


def raises(*_: object) -> Any:
    raise KeyboardInterrupt


BROKEN = [
    "__str__",
    "__repr__",
    "__notes__",
    "__cause__",
    "__context__",
    "__class__",
    "__getattribute__",
]


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_that_breaks_when_it_is_touched_is_still_shown(name: str) -> None:
    is_method = name in {"__str__", "__repr__", "__getattribute__"}
    kind = type("BrokenError", (Exception,), {name: raises if is_method else property(raises)})
    shown = redact_error(kind(f"no {DSN}"))
    note_once(shown, "lifekit: a note")
    assert summary(shown).startswith("BrokenError: ")
    text = "".join(traceback.format_exception(shown))
    assert "BrokenError" in text
    assert SECRET not in text


def test_a_text_that_never_ends_is_unavailable() -> None:
    class EndlessError(Exception):
        def __str__(self) -> str:
            return str(self)

    assert summary(EndlessError()) == "EndlessError: message unavailable: RecursionError"


def test_what_is_nested_or_linked_thousands_deep_is_shown() -> None:
    deepest = OwnTextError(DSN)
    chain, group = ValueError("no"), ExceptionGroup[Exception]("0", [deepest])
    chain.__cause__ = group
    for number in range(3000):
        group = ExceptionGroup(str(number), [group])
        link = ValueError(str(number))
        link.__cause__ = chain
        chain = link
    chain.__context__ = group
    shown = redact_error(chain)
    assert SECRET not in "".join(traceback.format_exception(shown))
    assert summary(redact_error(group)).endswith(f"OwnTextError: {deepest}".replace(SECRET, "***"))


def test_a_ring_of_causes_has_its_stand_ins() -> None:
    first, second = OwnTextError(DSN), OwnTextError(DSN)
    first.__cause__, second.__cause__ = second, first
    shown = redact_error(first)
    assert shown.__cause__ is not None
    assert shown.__cause__.__cause__ is shown
    assert SECRET not in printed(shown)


def test_a_text_of_megabytes_is_cut() -> None:
    shown = redact_error(ValueError("x" * 5_000_000 + DSN))
    assert isinstance(shown, ValueError)
    assert len(str(shown)) < 100_000


# -- what is behind an error -------------------------------------------------------------------------


def caused(error: Exception, cause: BaseException) -> Exception:
    """Return *error* with its cause."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ExceptionGroup("g", [OSError("a")]), "ExceptionGroup: g (1 sub-exception): OSError: a"),
        (
            ExceptionGroup("g", [ExceptionGroup("h", [OSError("a"), OSError("a")]), KeyError("b")]),
            "ExceptionGroup: g (2 sub-exceptions): OSError: a; KeyError: 'b'",
        ),
        (
            ExceptionGroup("g", [OSError(str(number)) for number in range(7)]),
            "ExceptionGroup: g (7 sub-exceptions): OSError: 0; OSError: 1; OSError: 2; and 4 more",
        ),
        (
            caused(RuntimeError("could not start"), ConnectionError("refused")),
            "RuntimeError: could not start, caused by ConnectionError: refused",
        ),
        (
            caused(RuntimeError("no"), ExceptionGroup("g", [OSError("a")])),
            "RuntimeError: no, caused by ExceptionGroup: g (1 sub-exception): OSError: a",
        ),
        (caused(RuntimeError("no"), TimeoutError()), "RuntimeError: no, caused by TimeoutError"),
        (
            caused(RuntimeError("it was refused: no"), OSError("refused")),
            "RuntimeError: it was refused: no",
        ),
    ],
)
def test_a_line_says_what_is_behind_an_error(error: Exception, line: str) -> None:
    assert summary(error) == line


def test_a_failed_start_shows_the_members_of_a_group_below_it() -> None:
    group = ExceptionGroup("unhandled", [ConnectionError("feed refused"), OSError("no route")])
    error = StartupError.of("app", [("feeds", "app.py:7", group)])
    assert error.message.splitlines()[1:] == [
        "  feeds (app.py:7): ExceptionGroup: unhandled (2 sub-exceptions)",
        "      ConnectionError: feed refused",
        "      OSError: no route",
    ]
