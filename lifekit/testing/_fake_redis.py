"""A Redis server that is none: fakeredis, where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redis.asyncio import Redis


def fake_redis(**options: Any) -> Redis:
    """Return a client of an empty fake server of its own, as a factory of an override.

    ``registry.override(cache, factory=fake_redis)``, or with *options* of the client
    ``factory=functools.partial(fake_redis, decode_responses=True)``. Inside a sandbox's block it has
    another server, as empty. Raises RuntimeError where fakeredis is not installed.
    """
    try:
        from fakeredis import FakeAsyncRedis, FakeServer
    except ImportError as error:
        raise RuntimeError("fakeredis is not installed: pip install fakeredis") from error
    return FakeAsyncRedis(server=FakeServer(), **options)
