"""What mypy and pyright must both refuse, on exactly the lines that end in the mark.

Only type checkers read this file; nothing runs it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from typing import assert_type

import asyncpg
import redis.asyncio as redis

from lifekit import Registry, Resource

registry = Registry()


@registry.resource
def number() -> int:
    return 1


@registry.resource
def text() -> str:
    return ""


@registry.resource
def pool() -> asyncpg.Pool:
    return asyncpg.create_pool()


@registry.resource
def client() -> redis.Redis:
    return redis.Redis()


# -- what can't tell which failures pass -----------------------------------------------------------


@registry.resource(retry=3, transient="KeyError")  # error
def transient_by_name() -> int:
    return 1


@registry.resource(retry=3, transient=(KeyError, 5))  # error
def transient_by_number() -> int:
    return 1


# -- a parameter of the wrong type, for every form of a factory ------------------------------------


@registry.resource(number)  # error
def wrong_function(value: str) -> int:
    return len(value)


@registry.resource(number)  # error
async def wrong_async_function(value: str) -> int:
    return len(value)


@registry.resource(number)  # error
def wrong_generator(value: str) -> Generator[int]:
    yield len(value)


@registry.resource(number)  # error
async def wrong_async_generator(value: str) -> AsyncGenerator[int]:
    yield len(value)


@registry.resource(number)  # error
@asynccontextmanager
async def wrong_context_manager(value: str) -> AsyncGenerator[int]:
    yield len(value)


class WrongClass:
    def __init__(self, value: str) -> None: ...


registry.resource(number)(WrongClass)  # error


@registry.resource(client)  # error
def wrong_pool(pool: asyncpg.Pool) -> int:
    return pool.get_size()


@registry.resource(number, text, number, text, number, text)  # error
def wrong_last(a: int, b: str, c: int, d: str, e: int, f: int) -> None: ...


# -- what is not required, and what is renewed -------------------------------------------------------


@registry.resource(required="no")  # error
def perhaps() -> int:
    return 1


@registry.resource(renew_every="hourly")  # error
def hourly() -> int:
    return 1


async def renews() -> None:
    async with registry.lifespan() as lifespan:
        await lifespan.renew("number")  # error


# -- workers -----------------------------------------------------------------------------------------


@registry.worker(number)  # error
async def wrong_worker(value: str) -> None: ...


@registry.worker  # error
async def worker_of_nobody_named(value: int) -> None: ...


@registry.worker(number, text)  # error
async def worker_of_one_of_two(value: int) -> None: ...


@registry.worker(number)  # error
def worker_that_is_not_async(value: int) -> None: ...


@registry.worker(restart="sometimes")  # error
async def worker_that_restarts_oddly() -> None: ...


# -- the wrong count -------------------------------------------------------------------------------


@registry.resource  # error
def needs_nobody_named(value: int) -> int:
    return value


@registry.resource()  # error
def needs_nobody_named_here_either(value: int) -> int:
    return value


@registry.resource(name="alone")  # error
def needs_more_than_options(value: int) -> int:
    return value


@registry.resource(number)  # error
def takes_too_few() -> int:
    return 1


@registry.resource(number, text)  # error
async def takes_one_of_two(value: int) -> int:
    return value


@registry.resource(number)  # error
def takes_too_many(value: int, more: str) -> int:
    return value


@registry.resource(number, text)  # error
def takes_by_keyword_only(value: int, *, more: str) -> int:
    return value


# -- the wrong order -------------------------------------------------------------------------------


@registry.resource(number, text)  # error
def swapped(first: str, second: int) -> int:
    return second


@registry.resource(pool, client)  # error
async def swapped_drivers(client: redis.Redis, pool: asyncpg.Pool) -> int:
    return 1


# -- wrong options ---------------------------------------------------------------------------------

registry.resource(number, nam="other")  # error
registry.resource(number, name=1)  # error
registry.resource(number, timeout=3)  # error
registry.resource(number, start_timeout="3")  # error
registry.resource(number, retry=1.5)  # error
registry.resource(number, close=3)  # error
registry.resource(number, after=number)  # error
registry.resource(number, after=["number"])  # error
registry.worker(number, leader="number")  # error
registry.run(number)  # error
Registry(start_timeout="3")  # error
Registry("app", 30.0)  # error

# -- no handles ------------------------------------------------------------------------------------

registry.resource("number")  # error
registry.resource(number, "text")  # error
registry.resource(number, 3)  # error
registry.resource(3)  # error
registry.resource(redis.Redis())  # error
registry.include("package")  # error


# -- values of another type ------------------------------------------------------------------------

assert_type(number, Resource[str])  # error
narrower: Resource[bool] = number  # error


async def worker() -> None:
    async with registry.lifespan() as lifespan:
        lifespan[number].upper()  # error
        number.get().upper()  # error
        lifespan[3]  # error
        pool.acquire()  # error
