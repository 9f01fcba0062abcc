"""The one function of a package by which all of its connections are made: in test mode it is a door.

Pools and engines are pointed at a gateway one by one, since lifekit has them. A connection that code
makes by itself goes through the door of its package, and from there to the gateway as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from lifekit._core.drivers import Gateway, load
from lifekit._util.call_sites import caller_frame

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


gateways: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Those by which libpq's connections were made, and which cancel what these do.

libpq's own `PQcancel` waits for the server, and both its clients let no other thread of Python run
meanwhile (`connection_type.c` of psycopg2 2.9, `pgcancel.pyx` of psycopg 3.3): a gateway, which is such
a thread, would never answer.
"""


@contextmanager
def by_way_of(gateway: Gateway | None) -> Generator[None]:
    """Let what connects inside ``with`` go by that gateway."""
    token = chosen.set(gateway)
    try:
        yield
    finally:
        chosen.reset(token)


DOORS = {
    "asyncpg": "asyncpg.door",
    "pg8000": "pg8000.door",
    "psycopg": "psycopg_connection.door",
    "psycopg2": "psycopg2.door",
}
"""By package."""


def doors(known: Collection[str]) -> Iterator[tuple[str, Door]]:
    """Yield the doors of the packages that have been imported and are not *known*, with their names."""
    for package, door in DOORS.items():
        if package not in known and sys.modules.get(package) is not None:
            with suppress(ImportError, AttributeError):  # a stand-in for the package
                yield package, load(door)


def checkout() -> Checkout:
    """Return the line outside the clients, and the task, that now ask for a connection."""
    return Checkout(caller_frame(*_CLIENTS), current_task())
