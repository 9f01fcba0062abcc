"""The index of errors has every message that lifekit can give, and no other.

The messages are read from lifekit's own code: each string in it that is written for people, with ``…``
where a value is put in. The most common ones are raised as well, by the mistakes at the end.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import asyncpg
import pytest
import sqlalchemy

import lifekit
from lifekit import LifekitError, Registry, asgi, embedded, testing

from .pages import DOCS, ROOT, blocks, entries, pattern, plain, sections, words

PAGE = DOCS / "errors.md"
PACKAGE = ROOT / "lifekit"
ERRORS = [name for name in lifekit.__all__ if name.endswith("Error")]

GATEWAY = PACKAGE / "_sandbox" / "postgres"
"""Half of its words are PostgreSQL's own. What it says may stand on the page, and need not."""

NO_MESSAGE = (
    # The inner side of a machine: SQL, regular expressions, programs, configuration.
    *(
        "SELECT ",
        "select ",
        "\nif redis.call",
        "if redis.call",
        "\nlocal key",
        "(?",
        "connection (refused|reset)|",
        "authentication|",
    ),
    "<frozen importlib",
    *(
        "\nlocal now",
        "\nredis.call",
        "local redis, server = ",
        "lifekit refuses ",
        "\nimport ctypes",
        "requirepass ",
    ),
    *("session authorization", "time zone"),
    # What others say, and lifekit looks for.
    *("All connection attempts failed", "slots are not covered"),
    # Names of packages.
    "\n        a",
    # How something is called, where a message or a picture puts it in.
    *(
        "a pool of ",
        "a connection of ",
        "pool.putconn(connection)",
        "tuple[object, ",
        "a connection of aiosqlite",
        "a redis client",
        "a SQLAlchemy engine",
        "an engine of SQLAlchemy",
        "an unknown ",
    ),
    *("aiopg pool of ", "asyncpg pool of ", "psycopg pool of ", "any number", " of up to "),
    *(
        "aiopg connection, ",
        "aiosqlite connection, ",
        "asyncpg connection, ",
        "psycopg connection, ",
        "psycopg2 connection, ",
    ),
    "psycopg2 pool of ",
    *(
        "redis client, ",
        "redis cluster client, ",
        "a malformed ",
        "the server that ",
        "lifekit application",
        "lifekit check",
        "lifekit websocket",
        "of this test",
    ),
    *("another event loop", "the start of the application", "not set", "deadline exceeded"),
    *("tuple[object", "whether the application's workers"),
    *("with engine.connect() as connection, or ", "with pool.connection()"),
    *("async with pool.acquire()", "async with pool.connection()"),
    *("Server(url=", "<Lifespan of ", "<mock of ", "…, which runs ……", "dict[str, "),
    # What pytest shows in its own help, what Python asks of a module, the legend of a picture.
    *("lifekit(isolation=", "the ASGI application that is tested", "module … has no attribute"),
    "… (█ critical path)",
)
"""How the strings begin that read as if they were for people, and are no messages."""


@dataclass(frozen=True)
class Said:
    """A string of lifekit's code, the line that has it, and the error that it is given to, if any."""

    text: str
    where: str
    error: str | None

    @property
    def parts(self) -> list[str]:
        """Its words, without what is put in between."""
        return words(self.text)

    @property
    def pattern(self) -> re.Pattern[str]:
        """What matches it on the page."""
        return pattern("…".join(self.parts))


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[^{}\s]*\}", "…", node.value)  # of a template
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(each) or "…" for each in node.values)
    return None


def _strings(node: ast.AST, error: str | None) -> Iterator[tuple[ast.expr, str, str | None]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
        error = node.func.id
    text = _text(node)
    if text is not None:
        assert isinstance(node, ast.expr)
        yield node, text, error
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from _strings(child, error)


@cache
def said(*, by_gateway: bool = False) -> list[Said]:
    """Return the strings of lifekit's code, or those of its gateway."""
    found: list[Said] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if (path.parent == GATEWAY and path.stem not in ("sandbox", "sql")) != by_gateway:
            continue
        for node, text, error in _strings(ast.parse(path.read_text("utf-8")), None):
            found.append(Said(text, f"{path.relative_to(ROOT)}:{node.lineno}", error))
    return found


def messages() -> list[Said]:
    """Return those that read as if they were for people, of several words, and are."""
    word = re.compile(r"(?<![\w.])[a-z]+(?:'t)?\b")
    return [
        each
        for each in said()
        if " " in each.text.strip()
        and len(word.findall(each.text)) > 1
        and not each.text.startswith(NO_MESSAGE)
    ]


@cache
def shown() -> dict[str, list[str]]:
    """Return the messages on the page, by section."""
    return {
        title: [text for _, text in blocks(section, "text")]
        for title, section in sections(PAGE).items()
    }


def test_lifekit_has_as_many_messages_as_it_seems() -> None:
    """Those of errors, of the log, of pytest's plugin, and the texts in constants."""
    texts = [each.text for each in messages()]
    some = {
        "the lifespan made at … has run: make another one",
        "… opened in … s: …",
        "client is for async tests, and this one is an ordinary function: use sync_client",
        "Still open when its event loop ended: …",
        "  it stood at",
        "its connection broke",
    }
    assert some <= set(texts)
    assert len(texts) > 150


@pytest.mark.parametrize("prefix", NO_MESSAGE)
def test_what_is_left_out_is_there_to_be_left_out(prefix: str) -> None:
    assert any(each.text.startswith(prefix) for each in said())


def test_every_message_of_lifekit_is_on_the_page() -> None:
    """In a block of text, and that of an error below the heading of that error."""
    missing: list[str] = []
    for each in messages():
        parts, match = each.parts, each.pattern
        found = [
            title
            for title, texts in shown().items()
            if any(
                all(part in text for part in parts) and match.search(text) for text in map(plain, texts)
            )
        ]
        if not found:
            missing.append(f"{each.where}: {each.text}")
        elif each.error is not None and each.error not in found:
            missing.append(f"{each.where}: below {found} and not {each.error}: {each.text}")
    assert not missing, "\n".join(missing)


def test_every_message_on_the_page_is_one_of_lifekits() -> None:
    """Nothing is left of a block of text when the words of lifekit's messages are taken out."""
    known = [*said(), *said(by_gateway=True)]
    parts = {part for each in known if " " in each.text for part in each.parts} | PUT_IN
    others: list[str] = []
    for text in (text for texts in shown().values() for text in texts):
        rest = plain(text)
        for part in sorted(parts, key=len, reverse=True):
            if part not in rest:
                continue
            start, end = (r"\b" * edge.isalnum() for edge in (part[0], part[-1]))
            rest = re.sub(start + re.escape(part) + end, " ", rest)
        if re.search(r"[A-Za-z]{2}", rest):
            others.append(f"{rest.strip()!r} of {text!r}")
    assert not others, "\n".join(others)


PUT_IN = {"close", "name", "resources", "SIGTERM"}
"""Words that lifekit's messages put in, from elsewhere than a text."""


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_a_heading_and_messages_below_it(error: str) -> None:
    assert shown()[error]


def test_a_heading_has_the_words_of_a_message_below_it() -> None:
    """Which is how a search finds them, and what stands in its list."""
    for section in sections(PAGE).values():
        for headings, texts in entries(section):
            parts = [part.strip(" .") for heading in headings for part in words(heading)]
            assert [part for part in parts if part not in " ".join(texts)] == [], headings


# -- mistakes ------------------------------------------------------------------------------------


def _declared(*factories: Callable[..., object], **options: Any) -> Registry:
    registry = Registry("shop", **options)
    for factory in factories:
        registry.resource(factory)
    return registry


def _twice_the_same_name() -> None:
    _declared(pool, pool)


def _no_handle() -> None:
    Registry().resource("no handle", 1)  # type: ignore[call-overload] # pyright: ignore


def _no_factory() -> None:
    Registry().resource(1)  # type: ignore[call-overload] # pyright: ignore


def _no_such_option() -> None:
    Registry().resource(retries=3)  # type: ignore[call-overload] # pyright: ignore


def _after_one_handle() -> None:
    Registry().resource(after=_handle())  # type: ignore[call-overload] # pyright: ignore


def _no_name() -> None:
    Registry().resource(lambda: 1)


def _needs_that_do_not_fit() -> None:
    registry = Registry()
    registry.resource(registry.resource(pool))(two)  # type: ignore[arg-type] # pyright: ignore


def _foreign_handle() -> None:
    registry = Registry()
    registry.resource(_handle())(one)
    registry.lifespan()


def _includes_in_a_cycle() -> None:
    registry, other = Registry(), Registry()
    registry.include(other)
    other.include(registry)


def _not_open() -> None:
    _handle().get()


def _not_entered() -> None:
    registry = _declared(pool)
    registry.lifespan()["pool"]


async def _wrong_loop() -> None:
    registry = Registry()
    handle = registry.resource(pool)

    async def elsewhere() -> None:
        handle.get()

    async with registry.lifespan():
        await asyncio.to_thread(asyncio.run, elsewhere())


async def _closes_with_arguments() -> None:
    class Odd:
        def close(self, how: str) -> None: ...

    async with _declared(Odd).lifespan():
        pass


async def _yields_twice() -> None:
    def twice() -> Iterator[int]:
        yield 1
        yield 2

    async with _declared(twice).lifespan():
        pass


async def _combined_twice() -> None:
    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[dict[str, int]]:
        yield {"db": 1}

    async with asgi.combine(lifespan, lifespan)(None):
        pass


async def _fails_to_start() -> None:
    registry = Registry("shop")
    first = registry.resource(pool)
    second = registry.resource(first)(refused)
    registry.resource(second)(one)
    async with registry.lifespan():
        pass


async def _fails_to_stop() -> None:
    def stubborn() -> Iterator[int]:
        yield 1
        raise OSError("no")

    async with _declared(stubborn).lifespan():
        pass


async def _takes_too_long() -> None:
    async with _declared(asyncio.Event().wait, start_timeout=0.01).lifespan():
        pass


async def _ignores_its_cancellation() -> None:
    released = asyncio.Event()

    async def stubborn() -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    try:
        async with _declared(stubborn, start_timeout=0.01, close_timeout=0.01).lifespan():
            pass
    finally:
        released.set()


async def _runs_twice() -> None:
    lifespan = _declared(pool).lifespan()
    async with lifespan:
        pass
    async with lifespan:
        pass


async def _checks_in_vain() -> None:
    registry = Registry()
    registry.resource(check=lambda _: False)(pool)
    async with registry.lifespan():
        pass


async def _overrides_too_late() -> None:
    registry = Registry()
    handle = registry.resource(pool)
    override = registry.override(handle, 2)
    async with registry.lifespan():
        override.__enter__()


def _overrides_with_another_type() -> None:
    registry = Registry()
    registry.override(registry.resource(pool), "2")  # pyright: ignore


def _overrides_elsewhere() -> None:
    Registry().override(_handle(), 2)


async def _sandboxes_what_was_not_prepared() -> None:
    async with _declared(pool).lifespan() as lifespan, lifespan.sandbox():
        pass


async def _leaves_a_task_behind() -> None:
    async with _sandboxed() as (db, lifespan), lifespan.sandbox():
        await db.acquire()


async def _works_after_its_test() -> None:
    go = asyncio.Event()

    async def late(db: Any) -> None:
        await go.wait()
        await db.execute("SELECT 1")

    async with _sandboxed() as (db, lifespan):
        async with lifespan.sandbox():
            task = asyncio.create_task(late(db))
            await asyncio.sleep(0)
        go.set()
        await task


async def _wants_one_more_than_there_are() -> None:
    async with _sandboxed() as (db, lifespan), lifespan.sandbox():
        for _ in range(3):
            await db.acquire()


async def _keeps_a_connection_of_before() -> None:
    registry = Registry()
    early: Any = await asyncpg.connect(os.environ["TEST_ERRORS_URL"])

    @registry.resource
    def db() -> asyncpg.Connection:
        return early  # type: ignore[no-any-return]

    with testing.sandboxing():
        async with registry.lifespan() as lifespan, lifespan.sandbox():
            pass


async def _names_several_servers() -> None:
    registry = Registry()

    @registry.resource
    def engine() -> sqlalchemy.Engine:
        return sqlalchemy.create_engine("postgresql+psycopg://?host=a&host=b")

    with testing.sandboxing():
        async with registry.lifespan():
            pass


@asynccontextmanager
async def _sandboxed() -> AsyncGenerator[tuple[Any, lifekit.Lifespan]]:
    registry = Registry()

    @registry.resource
    def db() -> asyncpg.Pool:
        return asyncpg.create_pool(os.environ["TEST_ERRORS_URL"], min_size=0, max_size=2)

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            yield lifespan[db], lifespan


def pool() -> int:
    return 1


def one(_: int) -> int:
    return 1


def two(_: int, __: int) -> int:
    return 1


def refused(_: int) -> int:
    raise ConnectionRefusedError


def _handle() -> lifekit.Resource[int]:
    return Registry("shop").resource(pool)


MISTAKES: list[Callable[[], Any]] = [
    _twice_the_same_name,
    _no_handle,
    _no_factory,
    _no_such_option,
    _after_one_handle,
    _no_name,
    _needs_that_do_not_fit,
    _foreign_handle,
    _includes_in_a_cycle,
    _closes_with_arguments,
    _yields_twice,
    _combined_twice,
    _not_open,
    _not_entered,
    _wrong_loop,
    _fails_to_start,
    _fails_to_stop,
    _takes_too_long,
    _ignores_its_cancellation,
    _overrides_too_late,
    _overrides_with_another_type,
    _overrides_elsewhere,
    _sandboxes_what_was_not_prepared,
    _leaves_a_task_behind,
    _works_after_its_test,
    _wants_one_more_than_there_are,
    _keeps_a_connection_of_before,
    _names_several_servers,
    _runs_twice,
    _checks_in_vain,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda each: each.__name__.strip("_"))
def test_a_mistake_gives_a_message_that_is_on_the_page(
    mistake: Callable[[], Any], postgres: embedded.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the heading of its error: its first line is that of a block."""
    monkeypatch.setenv("TEST_ERRORS_URL", postgres.url)
    with pytest.raises(LifekitError) as caught:
        if inspect.iscoroutinefunction(mistake):
            asyncio.run(mistake())
        else:
            mistake()

    raised = list(_tree(caught.value))
    assert any(
        pattern(text.partition("\n")[0]).match(str(error))
        for error in raised
        for text in shown().get(type(error).__name__, ())
    ), "\n".join(map(str, raised))


def _tree(error: BaseException) -> Iterator[BaseException]:
    yield error
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from _tree(each)  # pyright: ignore[reportUnknownArgumentType]
