"""The one function of a package by which all of its connections are made: in test mode it is a door.

Pools and engines are pointed at a gateway one by one, since lifekit has them. A connection that code
makes by itself goes through the door of its package, and from there to the gateway as well.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

from lifekit._stack import caller_frame

from . import Gateway
from ._checkouts import Checkout, current_task

_LIBPQS = ("aiopg", "psycopg", "psycopg2", "psycopg_pool")
_CLIENTS = ("asyncio", "asyncpg", "pg8000", "sqlalchemy", *_LIBPQS)


class Here(Protocol):
    """What a door asks."""

    def __call__(self, host: object = "", port: object = "") -> Any:
        """Return the gateway of the code that connects to there now; None where it is to pass."""


class Door(NamedTuple):
    """Where a package has that function, and what stands in for it."""

    owner: Any
    name: str
    through: Callable[[Any, Here], Any]
    """Makes it of the original."""


chosen: ContextVar[Gateway | None] = ContextVar("lifekit.gateway", default=None)
"""The gateway of what a value of lifekit's connects now, whoever made it do so."""


@contextmanager
def by_way_of(gateway: Gateway | None) -> Generator[None]:
    """Let what connects inside ``with`` go by that gateway."""
    token = chosen.set(gateway)
    try:
        yield
    finally:
        chosen.reset(token)


def checkout() -> Checkout:
    """Return the line outside the clients, and the task, that now ask for a connection."""
    return Checkout(caller_frame(*_CLIENTS), current_task())
