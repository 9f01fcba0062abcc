"""Which one of all the processes does something: who leads, for how long, and under which number.

A leader is heard of by the lock's server several times in each `LEASE`; where the server does not hear
of it for so long, it lets another one lead. By its own clock a leader gives up a third of that earlier.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any

import anyio
from anyio import CancelScope

from lifekit._util.redact import redact

from . import drivers
from .block import current_block
from .errors import DeclarationError, LifekitError, summary
from .resource import Resource

if TYPE_CHECKING:
    from .drivers import Lock  # which drivers give

LEASE = 10.0
"""Seconds after which a leader that its lock's server has not heard of leads no more."""


@dataclass(frozen=True, slots=True)
class Leadership:
    """That this code runs in no other process at the same time."""

    name: str
    """What it is: the names of a registry and its worker, or that of an exclusive block."""
    number: int
    """It grows from leader to leader: for writes that must refuse one who leads no more."""


_led: ContextVar[Leadership | None] = ContextVar("lifekit.leadership", default=None)
_in_blocks = count(1)
"""Numbers of leaders inside sandboxes, where nobody else can be."""


def leadership() -> Leadership:
    """Return the leadership under which this code runs: a ``leader=`` worker's, or `exclusive`'s.

    Raises:
        LifekitError: It runs under none.
    """
    found = _led.get()
    if found is None:
        raise LifekitError(
            "leadership() is asked for, and nothing leads here. Ask in a worker that has leader=, or "
            "inside `async with lifekit.exclusive(…)`."
        )
    return found


_STOOD_STILL = "the process stood still, or something blocked its event loop"


@asynccontextmanager
async def exclusive(lock: Any, name: str) -> AsyncGenerator[Leadership]:
    """Run code in one process at a time: ``async with lifekit.exclusive(db, "migrations"):``.

    It waits until nobody else is inside. Inside of a sandbox it waits for nobody.

    Args:
        lock: A pool or engine of PostgreSQL or a client of Redis, or its handle: where the lock is.
        name: What the code does. All that name the same thing there wait for each other.

    Raises:
        DeclarationError: That value can hold no lock.
        LifekitError: At the end: the lock was lost, and the code was cancelled.
        BaseException: What the driver raised, where the server is not reached.
    """
    value: Any = lock.get() if issubclass(type(lock), Resource) else lock
    if current_block.get() is not None:
        async with lead_alone(name) as alone:
            yield alone
        return
    found = lock_of(value, f"exclusive.{name}", name)
    async with lead(found, name, await acquire(found)) as term:
        yield term.leadership
        if anyio.current_time() > term.until:  # and nothing could tell meanwhile
            term.lost = term.lost or _STOOD_STILL
    if term.lost is not None:
        raise LifekitError(
            f"{name!r} was not exclusive any more, and was cancelled: {term.lost}. Another process may "
            "do it now; let what it writes carry lifekit.leadership().number."
        )


def lock_of(value: Any, key: str, name: str) -> Lock:
    """Return the lock that *value* can hold.

    Raises:
        DeclarationError: None.
    """
    driver = drivers.find(value)
    found = driver.lock(value, key) if driver is not None else None
    if found is None:
        raise DeclarationError(
            f"{name}: a {type(value).__name__} can hold no lock for several processes. A pool of "
            "asyncpg, aiopg or psycopg, an async engine of SQLAlchemy on asyncpg or psycopg, and a "
            "client of redis.asyncio can."
        )
    return found


class Term:
    """A time for which one leads: since when, until when at least, and how it was lost."""

    def __init__(self, name: str, number: int, until: float) -> None:
        self.leadership = Leadership(name, number)
        self.until = until
        self.lost: str | None = None
        """Why, where it was."""


async def acquire(lock: Lock, waits: Callable[[Exception], None] | None = None) -> tuple[int, float]:
    """Wait for the lock; return the number, and until when it is held at least.

    Without *waits*, which is told of it, a failure is raised.
    """
    try:
        return await _try_until_acquired(lock, waits)
    except BaseException:
        await give_up(lock)
        raise


async def give_up(lock: Lock) -> None:
    """Release the lock, through every cancellation, or leave it to the end of its lease."""
    with CancelScope(shield=True, deadline=anyio.current_time() + LEASE / 10):
        await lock.release()


async def _try_until_acquired(
    lock: Lock, waits: Callable[[Exception], None] | None
) -> tuple[int, float]:
    delay = LEASE / 100
    while True:
        try:
            with anyio.fail_after(3 * LEASE):
                await lock.open(LEASE)
            asked = anyio.current_time()
            with anyio.fail_after(LEASE):
                number = await lock.acquire(LEASE)
        except DeclarationError:
            raise
        except Exception as error:
            if waits is None:
                raise
            waits(error)
            delay = LEASE / 5
        else:
            if number is not None:
                return number, asked + LEASE * 2 / 3
        await anyio.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(delay * 1.5, LEASE / 10)


@asynccontextmanager
async def lead(lock: Lock, name: str, acquired: tuple[int, float]) -> AsyncGenerator[Term]:
    """Lead for as long as the body runs and the lock is held; cancel the body where it is lost."""
    term = Term(name, *acquired)
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_hold, lock, term, tasks.cancel_scope)
            outer = _led.set(term.leadership)
            try:
                yield term
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                failure = error  # out of the group, which would wrap it
            finally:
                with suppress(ValueError):  # it is left in another context
                    _led.reset(outer)
                tasks.cancel_scope.cancel()
    finally:
        await give_up(lock)
    if failure is not None:
        raise failure


@asynccontextmanager
async def lead_alone(name: str) -> AsyncGenerator[Leadership]:
    """Lead without a lock, where nobody else can be."""
    alone = Leadership(name, next(_in_blocks))
    outer = _led.set(alone)
    try:
        yield alone
    finally:
        with suppress(ValueError):
            _led.reset(outer)


async def _hold(lock: Lock, term: Term, scope: CancelScope) -> None:
    """Renew the lock for as long as that goes, then cancel what runs under it."""
    why = "its server did not answer in time"
    while (now := anyio.current_time()) < term.until:
        await lock.pause(min(LEASE / 10, term.until - now))
        asked = anyio.current_time()
        why = _STOOD_STILL if asked > now + LEASE / 2 else why
        with anyio.move_on_after(term.until - asked):
            try:
                if not await lock.renew(LEASE):
                    why, term.until = "another one has it, or its connection is lost", -inf
                    break
                term.until = asked + LEASE * 2 / 3
            except Exception as error:  # it may still be held: the next time tells, if it comes in time
                why = redact(summary(error))
    term.lost = term.lost or why
    scope.cancel()
