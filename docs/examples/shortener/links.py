"""What the application is about."""

import secrets
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import asyncpg
import redis.asyncio as redis

TABLES = """
CREATE TABLE IF NOT EXISTS links (
    slug    text PRIMARY KEY,
    url     text NOT NULL,
    visits  bigint NOT NULL DEFAULT 0,
    expires timestamptz
)
"""

Visits = list[tuple[str, dict[str, str]]]
"""Entries of the stream: the id of each, and what it says."""


class Links:
    """Short links, kept in PostgreSQL and remembered in Redis, where a stream has their visits."""

    def __init__(self, db: asyncpg.Pool, cache: redis.Redis) -> None:
        self.db = db
        self.cache = cache

    async def create(self, url: str, days: int | None = None) -> str:
        """Keep *url*, forever or for some days, and return its slug."""
        slug = secrets.token_urlsafe(6)
        await self.db.execute(
            "INSERT INTO links (slug, url, expires) VALUES ($1, $2, now() + $3 * interval '1 day')",
            slug,
            url,
            days,
        )
        return slug

    async def follow(self, slug: str) -> str | None:
        """Return where *slug* leads, or None, and note the visit."""
        url: str | None = None
        with suppress(redis.ConnectionError):  # without its cache it is slower, and does not count
            cached = await self.cache.get(f"url:{slug}")
            url = str(cached) if cached is not None else None
        if url is None:
            url = await self.db.fetchval("SELECT url FROM links WHERE slug = $1", slug)
        if url is not None:
            with suppress(redis.ConnectionError):
                await self.cache.set(f"url:{slug}", url, ex=60)
                await self.cache.xadd("visits", {"slug": slug})
        return url

    async def visits(self) -> AsyncGenerator[Visits]:
        """Yield the visits that are not saved, and then those that come, some at a time."""
        while True:
            if await self.cache.xread({"visits": "0"}, count=1, block=1000):
                visits: Any = await self.cache.xrange("visits", count=1000)
                yield visits

    async def save(self, visits: Visits) -> None:
        """Count *visits* in PostgreSQL; only then does the stream forget them."""
        counts = Counter(visit["slug"] for _, visit in visits)
        await self.db.executemany(
            "UPDATE links SET visits = visits + $2 WHERE slug = $1", counts.items()
        )
        await self.cache.xdel("visits", *(entry for entry, _ in visits))
