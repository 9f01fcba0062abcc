# pyright: reportUnknownMemberType=false
"""A pool of PostgreSQL connections and a Redis client, whose connections say whose they are."""

from __future__ import annotations

import os

import asyncpg
from redis.asyncio import Redis


def open_pool() -> asyncpg.Pool[asyncpg.Record]:
    """Return a pool."""
    return asyncpg.create_pool(
        os.environ["DATABASE_URL"],
        min_size=2,
        max_size=4,
        server_settings={"application_name": os.environ["NAME"]},
    )


def open_client() -> Redis:
    """Return a client."""
    return Redis.from_url(os.environ["REDIS_URL"], client_name=os.environ["NAME"])
