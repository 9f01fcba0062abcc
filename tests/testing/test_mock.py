"""`mock(handle)`: what a resource's type allows, it does; what the type lacks, it refuses."""

from __future__ import annotations

import asyncio
import functools
import gc
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from unittest.mock import AsyncMock, create_autospec

import aiopg
import anyio
import asyncpg
import httpx
import psycopg
import psycopg_pool
import pytest
import redis.asyncio as redis
from asyncpg.transaction import Transaction
from redis.asyncio.client import Pipeline, PubSub
from redis.asyncio.lock import Lock
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from lifekit import OverrideError, Registry, Resource
from lifekit.testing._mock import mock

if TYPE_CHECKING:
    from decimal import Decimal

pytestmark = pytest.mark.anyio
T = TypeVar("T")


def declared(factory: Callable[..., Any]) -> Resource[Any]:
    return Registry().resource(factory)


def mock_of(kind: object) -> Any:
    def made() -> Any:
        raise NotImplementedError

    made.__annotations__["return"] = kind
    return mock(declared(made))


def is_a(value: object, kind: type) -> bool:
    # A bare isinstance would narrow a mock's type to the class, which has no return_value.
    return isinstance(value, kind)


class Row:
    def name(self) -> str:
        raise NotImplementedError


class Repository:
    LIMIT = 10
    rows: list[Row]

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def first(self) -> Row:
        raise NotImplementedError

    async def fetch(self, key: int, *, deep: bool = False) -> Row:
        raise NotImplementedError

    async def forget(self, key: int) -> None:
        raise NotImplementedError

    def count(self) -> int:
        raise NotImplementedError

    async def each(self) -> AsyncGenerator[Row]:
        yield Row()

    @asynccontextmanager
    async def locked(self, key: int) -> AsyncGenerator[Row]:
        yield Row()

    @contextmanager
    def traced(self) -> Generator[Row]:
        yield Row()

    def where(self, key: int) -> Repository:
        raise NotImplementedError

    @classmethod
    def connect(cls, url: str) -> Repository:
        raise NotImplementedError

    @staticmethod
    def parse(text: str) -> Row:
        raise NotImplementedError

    def untold(self):  # type: ignore[no-untyped-def]
        ...


class Clock(Protocol):
    def now(self) -> float:
        raise NotImplementedError


@dataclass
class Service:
    repository: Repository
    tags: list[str] = field(default_factory=list[str])
    limit: int = 3

    async def __call__(self, key: int) -> Row:
        raise NotImplementedError


# The two pains of unittest.mock alone.


async def test_a_redis_command_is_awaited_where_an_autospec_of_the_class_is_not_awaitable() -> None:
    plain = create_autospec(redis.Redis, instance=True)
    with pytest.raises(TypeError, match=r"MagicMock('? object)? can't be (used in 'await'|awaited)"):
        await plain.get("k")

    fake = mock_of(redis.Redis)
    fake.get.return_value = "x"
    assert await fake.get("k") == "x"
    fake.get.assert_awaited_once_with(name="k")
    with pytest.raises(AssertionError):
        fake.get.assert_awaited_once_with("other")


async def test_an_acquired_connection_is_entered_where_asyncmock_is_no_context_manager() -> None:
    plain = AsyncMock(asyncpg.Pool)
    plain.acquire = AsyncMock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match="asynchronous context manager protocol"):
            async with plain.acquire():
                pass
        gc.collect()

    fake = mock_of(asyncpg.Pool)
    async with fake.acquire() as connection:
        connection.fetchval.return_value = 3
    assert connection is fake.acquire.return_value
    assert await fake.acquire(timeout=2) is connection
    assert await connection.fetchval("select 3") == 3


# Drivers' own types.


async def test_asyncpg() -> None:
    fake = mock_of(asyncpg.Pool)
    fake.fetchval.return_value = 3
    assert await fake.fetchval("select 3", column=0) == 3
    fake.get_size.return_value = 4
    assert fake.get_size() == 4
    async with fake.acquire() as connection:
        assert repr(connection) == "<mock of asyncpg.connection.Connection>"
        async with connection.transaction(isolation="serializable"):
            await connection.execute("insert")
        transaction = connection.transaction()
        assert is_a(transaction, Transaction)
        await transaction.start()
        await transaction.rollback()
        connection.cursor.return_value.__aiter__.return_value = [1, 2]
        assert [row async for row in connection.cursor("select")] == [1, 2]
        statement = await connection.prepare("select 1")
        statement.fetchrow.return_value = {"n": 1}
        assert (await statement.fetchrow())["n"] == 1
    with pytest.raises(
        AttributeError, match=r"asyncpg\.connection\.Connection has no attribute 'fetchal'"
    ):
        connection.fetchal  # noqa: B018
    with pytest.raises(TypeError, match="unexpected keyword argument 'time'"):
        connection.fetchval("select", time=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'isolated'"):
        connection.transaction(isolated=True)
    assert await fake is fake


async def test_aiopg() -> None:
    fake = mock_of(aiopg.Pool)
    async with fake.acquire() as connection, connection.cursor() as cursor:
        assert is_a(connection, aiopg.Connection)
        assert is_a(cursor, aiopg.Cursor)
        await cursor.execute("select 1")
        cursor.fetchone.return_value = (1,)
        assert await cursor.fetchone() == (1,)
        cursor.__aiter__.return_value = [(1,), (2,)]
        assert [row async for row in cursor] == [(1,), (2,)]
    assert await fake.acquire() is connection is fake.acquire.return_value
    assert await connection.cursor() is cursor is connection.cursor.return_value
    cursor.execute.assert_awaited_once_with("select 1")
    fake.close()
    await fake.wait_closed()


async def test_redis() -> None:
    fake = mock_of(redis.Redis)
    assert is_a(fake, redis.Redis)
    async with fake.pipeline(transaction=True) as pipe:
        assert is_a(pipe, Pipeline)
        pipe.set("a", 1).incr("b")
        pipe.execute.return_value = [True, 2]
        assert await pipe.execute() == [True, 2]
    pipe.set.assert_called_once_with("a", 1)
    pipe.incr.assert_called_once_with("b")
    assert pipe is fake.pipeline.return_value

    pubsub = fake.pubsub()
    assert is_a(pubsub, PubSub)
    await pubsub.subscribe("news")
    pubsub.listen.return_value = [{"data": "x"}]
    assert [message async for message in pubsub.listen()] == [{"data": "x"}]
    async with fake.lock("one", timeout=3) as lock:
        assert is_a(lock, Lock)
    fake.scan_iter.return_value = ["a", "b"]
    assert [key async for key in fake.scan_iter(match="*")] == ["a", "b"]

    fake.incr.side_effect = [1, 2]
    assert [await fake.incr("n"), await fake.incr("n")] == [1, 2]
    fake.get.side_effect = ConnectionError("gone")
    with pytest.raises(ConnectionError, match="gone"):
        await fake.get("k")
    with pytest.raises(TypeError, match="missing a required argument: 'name'"):
        fake.get()
    assert fake.connection_pool is fake.connection_pool, "set by __init__ alone"


async def test_httpx() -> None:
    fake = mock_of(httpx.AsyncClient)
    fake.get.return_value = httpx.Response(404)
    assert (await fake.get("/", params={"q": 1})).status_code == 404
    async with fake.stream("GET", "/") as response:
        assert is_a(response, httpx.Response)
        response.aiter_lines.return_value = ["a"]
        assert [line async for line in response.aiter_lines()] == ["a"]
    with pytest.raises(TypeError, match="await"):
        await fake.stream("GET", "/")
    async with fake as entered:
        assert entered is fake


async def test_sqlalchemy() -> None:
    fake = mock_of(AsyncEngine)
    async with fake.begin() as connection:
        assert is_a(connection, AsyncConnection)
        connection.execute.return_value.scalar_one.return_value = 4
        assert (await connection.execute("select 4")).scalar_one() == 4
        async with connection.begin_nested():
            pass
    async with fake.connect() as connection:
        assert is_a(connection, AsyncConnection)
    sessions = mock_of(async_sessionmaker[AsyncSession])
    async with sessions() as session, session.begin():
        assert is_a(session, AsyncSession)
        await session.execute("select 1")
    await fake.dispose()


async def test_psycopg() -> None:
    fake = mock_of(psycopg_pool.AsyncConnectionPool)
    async with fake.connection(timeout=1) as connection, connection.transaction():
        assert is_a(connection, psycopg.AsyncConnection)
        cursor = await connection.execute("select 1")
        cursor.fetchone.return_value = (1,)
        assert await cursor.fetchone() == (1,)
        async with connection.cursor() as cursor:
            await cursor.execute("select 1")
    assert connection is fake.connection.return_value


# Classes of the application's own.


async def test_methods_of_every_kind_give_what_they_say() -> None:
    fake = mock_of(Repository)
    row = await fake.fetch(1, deep=True)
    assert is_a(row, Row)
    assert row is fake.fetch.return_value
    assert await fake.forget(1) is None
    fake.count.return_value = 3
    assert fake.count() == 3
    assert [each async for each in fake.each()] == []
    fake.each.return_value = [1, 2]
    assert [each async for each in fake.each()] == [1, 2]
    async with fake.locked(1) as held:
        assert is_a(held, Row)
        assert held is fake.locked.return_value
    with fake.traced() as traced:
        assert is_a(traced, Row)
    assert is_a(fake.where(1).where(2), Repository)
    assert is_a(fake.connect("url"), Repository)
    assert is_a(fake.parse("text"), Row)
    assert is_a(fake.parse(text="text").name(), str)
    fake.parse.assert_called_with("text")


async def test_a_method_that_says_nothing_gives_what_can_be_awaited_entered_and_iterated() -> None:
    result = mock_of(Repository).untold()
    assert await result is result
    async with result as entered:
        assert entered is result
    assert [item async for item in result] == []
    assert await result.anything(1) is result.anything.return_value


def test_attributes_are_those_of_instances() -> None:
    fake = mock_of(Repository)
    assert is_a(fake.first, Row)
    assert is_a(fake.rows, list)
    assert fake.LIMIT == 10
    fake.url = "set by __init__"
    assert fake.url == "set by __init__"
    fake.first = "given"
    assert fake.first == "given"


def test_what_the_type_lacks_can_be_neither_read_nor_set_nor_asserted() -> None:
    fake = mock_of(Repository)
    with pytest.raises(AttributeError, match="Repository has no attribute 'ftech'"):
        fake.ftech  # noqa: B018
    with pytest.raises(AttributeError, match="Repository has no attribute 'ftech'"):
        fake.ftech = 1
    with pytest.raises(AttributeError, match="has no attribute 'retrun_value'"):
        fake.fetch.retrun_value = 1
    with pytest.raises(AttributeError, match="has no attribute 'assert_called_onc'"):
        fake.count.assert_called_onc()
    with pytest.raises(TypeError, match="not callable"):
        fake()


@pytest.mark.parametrize(
    ("method", "args"), [("fetch", ()), ("count", (1,)), ("locked", ()), ("parse", ()), ("connect", ())]
)
def test_wrong_arguments_are_refused_by_the_call_itself(method: str, args: tuple[int, ...]) -> None:
    fake = mock_of(Repository)
    with pytest.raises(TypeError, match=rf"{method}\(\): (missing|too many)"):
        getattr(fake, method)(*args)
    getattr(fake, method).assert_not_called()


async def test_a_dataclass_has_its_fields_and_can_be_called_if_its_instances_can() -> None:
    fake = mock_of(Service)
    assert is_a(fake.repository, Repository)
    assert is_a(fake.tags, list)
    assert fake.limit == 3
    assert is_a(await fake(1), Row)
    fake.assert_awaited_once_with(1)
    with pytest.raises(TypeError, match="too many"):
        fake(1, 2)


async def test_an_exception_inside_async_with_goes_through() -> None:
    for manager in (
        mock_of(asyncpg.Pool).acquire(),
        mock_of(redis.Redis),
        mock_of(Repository).locked(1),
    ):
        with pytest.raises(KeyError):
            async with manager:
                raise KeyError


async def test_calls_are_seen_from_the_top_and_reset() -> None:
    fake = mock_of(asyncpg.Pool)
    async with fake.acquire() as connection:
        await connection.execute("delete")
    assert [str(each) for each in fake.mock_calls] == [
        "call.acquire()",
        "call.acquire().execute('delete')",
    ]
    fake.reset_mock()
    assert fake.mock_calls == []
    connection.execute.assert_not_called()


def test_needs_no_loop_and_what_is_not_awaited_warns_only_where_the_real_one_would() -> None:
    fake = mock_of(redis.Redis)
    pipe = fake.pipeline()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pipe.set("a", 1)
        fake.scan_iter()
        mock_of(asyncpg.Pool).acquire()
        gc.collect()
        assert [str(each.message) for each in seen] == []
        pipe.execute()
        gc.collect()
    assert ["never awaited" in str(each.message) for each in seen] == [True]


def test_a_command_can_be_a_task() -> None:
    async def main() -> list[Any]:
        fake = mock_of(redis.Redis)
        fake.get.return_value = "x"
        task = asyncio.create_task(fake.get("a"))
        return [await task, *await asyncio.gather(fake.get("b"), asyncio.wait_for(fake.get("c"), 1))]

    assert asyncio.run(main()) == ["x", "x", "x"]


async def test_it_stands_in_for_its_resource() -> None:
    registry = Registry()

    @registry.resource
    def cache() -> redis.Redis:
        raise AssertionError

    fake = mock(cache)
    calls = fake.mock_calls
    with registry.override(cache, fake):
        async with registry.lifespan() as lifespan:
            assert lifespan[cache] is fake
    assert calls == [], "neither opened nor closed"


# Whose type it is.


async def coroutine(settings: Decimal) -> redis.Redis:
    raise NotImplementedError


async def generator() -> AsyncGenerator[redis.Redis]:
    yield redis.Redis()


@asynccontextmanager
async def manager() -> AsyncGenerator[redis.Redis]:
    yield redis.Redis()


def sync_generator() -> Generator[redis.Redis]:
    yield redis.Redis()


def awaitable() -> Awaitable[redis.Redis]:
    raise NotImplementedError


def quoted() -> redis.Redis:
    raise NotImplementedError


class Entering:
    async def __aenter__(self) -> redis.Redis:
        raise NotImplementedError

    async def __aexit__(self, *error: object) -> None:
        raise NotImplementedError


def entering() -> Entering:
    raise NotImplementedError


@pytest.mark.parametrize(
    "factory",
    [coroutine, generator, manager, sync_generator, awaitable, quoted, entering, Entering, redis.Redis],
)
def test_it_is_the_type_that_the_handle_has(factory: Callable[..., Any]) -> None:
    handle = Registry().resource(Registry().resource(Row))(factory) if factory is coroutine else None
    fake = mock(handle or declared(factory))
    assert is_a(fake, redis.Redis)


def subscripted() -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    raise NotImplementedError


def test_a_subscript_that_only_type_checkers_know_is_no_hindrance() -> None:
    assert is_a(mock(declared(subscripted)), asyncpg.Pool)


def test_a_partial_and_a_protocol_have_a_type_too() -> None:
    def clock(zone: str) -> Clock:
        raise NotImplementedError

    handle = Registry().resource(name="clock")(functools.partial(clock, "UTC"))
    fake = mock(handle)
    fake.now.return_value = 1.5
    assert fake.now() == 1.5


def untold():  # type: ignore[no-untyped-def]
    ...


def anything() -> Any:
    raise NotImplementedError


def either() -> redis.Redis | Row:
    raise NotImplementedError


def variable() -> T:  # type: ignore[type-var]  # pyright: ignore[reportInvalidTypeVarUse]
    raise NotImplementedError


def classes() -> type[Row]:
    raise NotImplementedError


def unresolved() -> Decimal:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        (untold, "has no return annotation"),
        (anything, "is annotated typing.Any, which is no one class"),
        (either, "which is no one class"),
        (variable, "is annotated ~T, which is no one class"),
        (classes, "which is no one class"),
        (unresolved, "name 'Decimal' is not defined.*Import it outside `if TYPE_CHECKING:`"),
    ],
)
def test_where_there_is_no_one_class_it_says_which_line_to_mend(
    factory: Callable[..., Any], why: str
) -> None:
    handle = declared(factory)
    with pytest.raises(OverrideError, match=why) as refused:
        mock(handle)
    text = str(refused.value)
    assert handle.location in text
    assert (
        f"Annotate the factory with the class that it makes: def {handle.name}(…) -> TheClass" in text
    )


def test_what_is_no_handle_is_refused() -> None:
    with pytest.raises(OverrideError, match="a type can't be mocked; name the resource by its handle"):
        mock(Row)  # type: ignore[arg-type]


class Feed:
    def __aiter__(self) -> AsyncIterator[int]:
        raise NotImplementedError


async def waits(fake: Any) -> None:
    await fake.get("k")


async def waits_for_what_can_be_entered(fake: Any) -> None:
    await mock_of(asyncpg.Pool).acquire()


async def runs_as_a_coroutine(fake: Any) -> None:
    await _as_coroutine(mock_of(asyncpg.Pool).acquire())


async def _as_coroutine(coming: Any) -> Any:
    class Steps:
        def __await__(self) -> Generator[Any, Any, Any]:
            value: Any = None
            while True:
                try:
                    value = yield coming.send(value)
                except StopIteration as done:
                    return done.value

    return await Steps()


async def enters(fake: Any) -> None:
    async with mock_of(asyncpg.Pool).acquire():
        pass


async def enters_a_value(fake: Any) -> None:
    async with mock_of(Lock):
        pass


async def iterates_over_nothing(fake: Any) -> None:
    async for _ in fake.scan_iter():
        pass


async def iterates_over_a_value(fake: Any) -> None:
    async for _ in mock_of(Feed):
        pass


async def waits_for_something_unknown(fake: Any) -> None:
    await fake.connection_pool.whatever()


@pytest.mark.parametrize(
    "poll",
    [
        waits,
        waits_for_what_can_be_entered,
        runs_as_a_coroutine,
        enters,
        enters_a_value,
        iterates_over_nothing,
        iterates_over_a_value,
        waits_for_something_unknown,
    ],
)
async def test_what_is_awaited_gives_others_a_turn(poll: Callable[[Any], Awaitable[None]]) -> None:
    turns = 0

    async def neighbour() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    fake = mock_of(redis.Redis)
    async with anyio.create_task_group() as group:
        group.start_soon(neighbour)
        for _ in range(10):
            await poll(fake)
        assert turns >= 5
        group.cancel_scope.cancel()


async def test_a_call_that_is_cancelled_in_its_turn_was_not_made() -> None:
    fake = mock_of(redis.Redis)
    fake.get.side_effect = AssertionError("made")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await fake.get("k")
    assert scope.cancelled_caught
    assert fake.get.await_count == 0
