"""What must pass mypy and pyright, both strict: every form of a factory, with its handle's type.

Only type checkers read this file; nothing runs it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import (
    _AsyncGeneratorContextManager,  # pyright: ignore[reportPrivateUsage]
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Self, assert_type

import aiopg
import asyncpg
import httpx
import redis.asyncio as redis
from fastapi import Depends, FastAPI, WebSocket
from starlette.applications import Starlette

import lifekit
from lifekit import Leadership, Lifespan, Registry, Resource, Stopping, Worker
from lifekit.asgi import combine

registry = Registry("typed", start_timeout=5, on_event=print)


class Settings:
    """A plain value, made by its own class."""

    database_url = "postgresql://localhost/app"
    redis_url = "redis://localhost"


@dataclass
class Links:
    """A value whose class is its factory, with needs."""

    db: asyncpg.Pool
    cache: redis.Redis


class Session:
    """A value that is its own context manager."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None: ...


class Lease:
    """A context manager whose value is another object."""

    def __enter__(self) -> bytes:
        return b""

    def __exit__(self, *exc: object) -> None: ...


# -- every form of a factory, without needs ------------------------------------------------------


@registry.resource
def by_function() -> int:
    return 1


@registry.resource
async def by_async_function() -> int:
    return 1


@registry.resource
def by_generator() -> Iterator[int]:
    yield 1


@registry.resource
def by_full_generator() -> Generator[int, None, None]:
    yield 1


@registry.resource
async def by_async_generator() -> AsyncIterator[int]:
    yield 1


@registry.resource
async def by_full_async_generator() -> AsyncGenerator[int]:
    yield 1


@registry.resource
@contextmanager
def by_context_manager() -> Generator[int]:
    yield 1


@registry.resource
@asynccontextmanager
async def by_async_context_manager() -> AsyncGenerator[int]:
    yield 1


@registry.resource
def by_entering() -> Lease:
    return Lease()


@registry.resource
async def open_already() -> Lease:
    return Lease()


@asynccontextmanager
async def managed() -> AsyncGenerator[int]:
    yield 1


async def managed_later() -> _AsyncGeneratorContextManager[int]:
    return managed()


by_context_manager_later = registry.resource(managed_later)


by_class = registry.resource(Settings)
by_class_that_is_entered = registry.resource(Session)
by_partial = registry.resource(name="by_partial")(partial(int, "1"))
by_lambda = registry.resource(name="by_lambda")(lambda: 1)

assert_type(by_function, Resource[int])
assert_type(by_async_function, Resource[int])
assert_type(by_generator, Resource[int])
assert_type(by_full_generator, Resource[int])
assert_type(by_async_generator, Resource[int])
assert_type(by_full_async_generator, Resource[int])
assert_type(by_context_manager, Resource[int])
assert_type(by_async_context_manager, Resource[int])
assert_type(by_entering, Resource[bytes])
assert_type(open_already, Resource[Lease])
assert_type(by_context_manager_later, Resource[int])
assert_type(by_class, Resource[Settings])
assert_type(by_class_that_is_entered, Resource[Session])
assert_type(by_partial, Resource[int])
assert_type(by_lambda, Resource[int])


# -- what drivers give -----------------------------------------------------------------------------


@registry.resource
def asyncpg_pool() -> asyncpg.Pool:
    return asyncpg.create_pool()


@registry.resource
async def asyncpg_pool_awaited() -> asyncpg.Pool:
    return await asyncpg.create_pool()


@registry.resource
async def asyncpg_pool_yielded() -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool() as pool:
        yield pool


@registry.resource
def redis_client() -> redis.Redis:
    return redis.Redis(host="localhost")


@registry.resource
async def redis_client_later() -> redis.Redis:
    return redis.Redis(host="localhost")


@registry.resource
def httpx_client() -> httpx.AsyncClient:
    return httpx.AsyncClient()


@registry.resource
async def httpx_client_later() -> httpx.AsyncClient:
    return httpx.AsyncClient()


@registry.resource
async def aiopg_pool_awaited() -> aiopg.Pool:
    return await aiopg.create_pool("")


@registry.resource
async def aiopg_pool_yielded() -> AsyncIterator[aiopg.Pool]:
    async with aiopg.create_pool("") as pool:
        yield pool


aiopg_pool = registry.resource(name="aiopg_pool")(lambda: aiopg.create_pool(""))
redis_class = registry.resource(name="redis_class")(redis.Redis)
httpx_class = registry.resource(httpx.AsyncClient)

assert_type(asyncpg_pool, "Resource[asyncpg.Pool]")
assert_type(asyncpg_pool_awaited, "Resource[asyncpg.Pool]")
assert_type(asyncpg_pool_yielded, "Resource[asyncpg.Pool]")
assert_type(redis_client, Resource[redis.Redis])
assert_type(redis_client_later, Resource[redis.Redis])
assert_type(redis_class, Resource[redis.Redis])
assert_type(httpx_client, Resource[httpx.AsyncClient])
assert_type(httpx_client_later, Resource[httpx.AsyncClient])
assert_type(httpx_class, Resource[httpx.AsyncClient])
assert_type(aiopg_pool, Resource[aiopg.Pool])
assert_type(aiopg_pool_awaited, Resource[aiopg.Pool])
assert_type(aiopg_pool_yielded, Resource[aiopg.Pool])


# -- every form of a factory, with a need and with options -----------------------------------------


@registry.resource(by_class)
def function_of(settings: Settings) -> int:
    return len(settings.redis_url)


@registry.resource(by_class, start_timeout=1.5, close_timeout=None, retry=3)
async def async_function_of(settings: Settings) -> int:
    return len(settings.redis_url)


def is_late(error: KeyError) -> bool:
    return error.args == ("late",)


@registry.resource(by_class, retry=3, transient=KeyError)
def by_a_type(settings: Settings) -> int:
    return len(settings.redis_url)


@registry.resource(by_class, retry=3, transient=(KeyError, OSError))
def by_several_types(settings: Settings) -> int:
    return len(settings.redis_url)


@registry.resource(by_class, retry=3, transient=is_late)
def by_a_function(settings: Settings) -> int:
    return len(settings.redis_url)


@registry.resource(by_class, check="check", close="close", wait_closed="join", terminate="kill")
def generator_of(settings: Settings) -> Iterator[int]:
    yield len(settings.redis_url)


@registry.resource(by_class, check=lambda value: value > 0, after=[by_function, redis_client])
async def async_generator_of(settings: Settings) -> AsyncIterator[int]:
    yield len(settings.redis_url)


@registry.resource(by_class)
@contextmanager
def context_manager_of(settings: Settings) -> Generator[int]:
    yield len(settings.redis_url)


@registry.resource(by_class)
@asynccontextmanager
async def async_context_manager_of(settings: Settings) -> AsyncGenerator[int]:
    yield len(settings.redis_url)


@registry.resource(by_class)
def asyncpg_pool_of(settings: Settings) -> asyncpg.Pool:
    return asyncpg.create_pool(settings.database_url)


@registry.resource(by_class)
def redis_client_of(settings: Settings) -> redis.Redis:
    return redis.from_url(settings.redis_url)


@registry.resource(by_class)
def aiopg_pool_of(settings: Settings) -> aiopg.utils._ContextManager[aiopg.Pool]:  # pyright: ignore[reportPrivateUsage]
    return aiopg.create_pool(settings.database_url)


@registry.resource(name="renamed", after=(by_class,))
async def named() -> str:
    return ""


class_of = registry.resource(asyncpg_pool, redis_client)(Links)

assert_type(function_of, Resource[int])
assert_type(async_function_of, Resource[int])
assert_type(generator_of, Resource[int])
assert_type(async_generator_of, Resource[int])
assert_type(context_manager_of, Resource[int])
assert_type(async_context_manager_of, Resource[int])
assert_type(asyncpg_pool_of, "Resource[asyncpg.Pool]")
assert_type(redis_client_of, Resource[redis.Redis])
assert_type(aiopg_pool_of, Resource[aiopg.Pool])
assert_type(named, Resource[str])
assert_type(class_of, Resource[Links])


# -- none to eight needs ---------------------------------------------------------------------------


def make(*values: object) -> list[object]:
    return list(values)


one = registry.resource(name="one")(lambda: 1)
two = registry.resource(name="two")(lambda: "2")
three = registry.resource(name="three")(lambda: b"3")
four = registry.resource(name="four")(lambda: 4.0)
five = registry.resource(name="five")(lambda: 5j)
six = registry.resource(name="six")(lambda: [6])


@registry.resource()
def of_none() -> None: ...


@registry.resource(one)
def of_one(a: int, /) -> tuple[int]:
    return (a,)


@registry.resource(one, two)
def of_two(a: int, b: str) -> tuple[int, str]:
    return a, b


@registry.resource(one, two, three)
async def of_three(a: int, b: str, c: bytes) -> tuple[int, str, bytes]:
    return a, b, c


@registry.resource(one, two, three, four)
def of_four(a: int, b: str, c: bytes, d: float) -> Iterator[tuple[int, str, bytes, float]]:
    yield a, b, c, d


@registry.resource(one, two, three, four, five)
async def of_five(
    a: int, b: str, c: bytes, d: float, e: complex
) -> AsyncIterator[tuple[int, str, bytes, float, complex]]:
    yield a, b, c, d, e


@registry.resource(one, two, three, four, five, six)
def of_six(
    a: int, b: str, c: bytes, d: float, e: complex, f: list[int]
) -> tuple[int, str, bytes, float, complex, list[int]]:
    return a, b, c, d, e, f


@registry.resource(one, two, three, four, five, six, one, two)
def of_eight(
    a: int, b: str, c: bytes, d: float, e: complex, f: list[int], g: int, h: str
) -> tuple[int, str]:
    return g, h


assert_type(of_none, Resource[None])
assert_type(of_one, Resource[tuple[int]])
assert_type(of_two, Resource[tuple[int, str]])
assert_type(of_three, Resource[tuple[int, str, bytes]])
assert_type(of_four, Resource[tuple[int, str, bytes, float]])
assert_type(of_five, Resource[tuple[int, str, bytes, float, complex]])
assert_type(of_six, Resource[tuple[int, str, bytes, float, complex, list[int]]])
assert_type(of_eight, Resource[tuple[int, str]])


# -- what a factory takes may be wider, more, or have defaults --------------------------------------


@registry.resource(one, six)
def of_wider(a: object, b: list[int], *more: int, c: str = "") -> int:
    return 1


of_anything = registry.resource(one, two, name="of_anything")(make)
assert_type(of_wider, Resource[int])
assert_type(of_anything, Resource[list[object]])
wider: Resource[object] = of_anything  # what gives a list gives an object


# -- reaching values -------------------------------------------------------------------------------


async def worker() -> None:
    async with registry.lifespan() as lifespan:
        assert_type(lifespan, Lifespan)
        assert_type(lifespan[redis_client], redis.Redis)
        assert_type(lifespan[aiopg_pool], aiopg.Pool)
        assert_type(lifespan[of_three], tuple[int, str, bytes])
        assert_type(lifespan["of_three"], Any)
        assert_type(of_three.get(), tuple[int, str, bytes])
        assert_type(by_entering.get(), bytes)
        async with lifespan[asyncpg_pool].acquire() as connection:
            await connection.execute("SELECT 1")
        async with lifespan.override(asyncpg_pool, asyncpg_pool_awaited) as patched:
            assert_type(patched, Lifespan)
    with (
        registry.override(redis_client, redis.Redis()),
        registry.override(aiopg_pool, aiopg_pool_yielded),
    ):
        pass


app = FastAPI(lifespan=registry.lifespan)
starlette = Starlette(lifespan=registry.lifespan)
both = FastAPI(lifespan=combine(registry.lifespan, Registry("other").lifespan))


@app.get("/")
async def read(
    cache: Annotated[redis.Redis, Depends(redis_client)],
    pair: Annotated[tuple[int, str], Depends(of_two)],
) -> int:
    return pair[0] + await cache.exists(pair[1])


@app.get("/sync")
def read_in_a_thread(pair: tuple[int, str] = Depends(of_two)) -> int:
    return pair[0]


@app.websocket("/socket")
async def talk(socket: WebSocket, cache: Annotated[redis.Redis, Depends(redis_client)]) -> None:
    await socket.accept()


package = Registry("package")
registry.include(package)


# -- what is not required, and what is renewed -------------------------------------------------------


@registry.resource(required=False, renew_every=900.0)
def optional() -> int:
    return 1


assert_type(optional, Resource[int])


async def renews() -> None:
    async with registry.lifespan() as lifespan:
        assert_type(await lifespan.renew(optional), None)
        try:
            assert_type(lifespan[optional], int)
        except lifekit.UnavailableError as error:
            assert_type(error.resource, str)
            assert_type(error.error, Exception)
            assert_type(error.retry_after, float)


# -- workers -----------------------------------------------------------------------------------------


@registry.worker
async def by_itself() -> None: ...


@registry.worker(by_function, every=60.0, limit=(3, 10.0), on_crash="unready", drain=5.0)
async def at_intervals(value: int) -> str:
    return str(value)


@registry.worker(by_function, by_entering, restart="always", after=[by_itself])
async def with_needs(value: int, lease: bytes) -> None:
    async for each in lifekit.stopping().until(numbers()):
        assert_type(each, int)


@registry.worker(
    by_function, by_function, by_function, by_function, by_function, by_function, by_function
)
async def with_many_needs(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> None: ...


@registry.worker(by_function, leader=redis_client)
async def in_one_process(value: int) -> None:
    assert_type(lifekit.leadership().number, int)


async def numbers() -> AsyncGenerator[int]:
    yield 1


assert_type(by_itself, Worker)
assert_type(at_intervals, Worker)
assert_type(with_needs, Worker)
assert_type(with_many_needs, Worker)
assert_type(in_one_process, Worker)
assert_type(lifekit.stopping(), Stopping)


async def of_a_lifespan(
    lifespan: Lifespan, stopping: Annotated[Stopping, Depends(lifekit.stopping)]
) -> None:
    assert_type(lifespan[with_needs].restarts, int)
    assert_type(lifespan[with_needs].last_error, BaseException | None)
    lifespan.stop("enough")
    await stopping.wait()


# -- elsewhere ---------------------------------------------------------------------------------------


async def main(lifespan: Lifespan) -> None:
    async with lifekit.exclusive(redis_client, "migrations") as held:
        assert_type(held, Leadership)


def without_a_loop(other: FastAPI) -> None:
    assert_type(registry.run(), int)
    assert_type(registry.run(main), int)
    with registry.blocking() as lifespan:
        assert_type(lifespan[by_function], int)
        assert_type(lifespan.call(with_needs_by_hand, 1), bytes)
        assert_type(lifespan.call(len, "text"), int)


async def with_needs_by_hand(value: int) -> bytes:
    return bytes(value)
