"""What the application is about."""

import secrets
from contextlib import suppress

import asyncpg
import redis.asyncio as redis

TABLES = """
CREATE TABLE IF NOT EXISTS links (
    slug   text PRIMARY KEY,
    url    text NOT NULL,
    visits bigint NOT NULL DEFAULT 0
)
"""


class Links:
    """Short links, kept in PostgreSQL, remembered and counted in Redis."""

    def __init__(self, db: asyncpg.Pool, cache: redis.Redis) -> None:
        self.db = db
        self.cache = cache

    async def create(self, url: str) -> str:
        """Keep *url* and return its slug."""
        slug = secrets.token_urlsafe(6)
        await self.db.execute("INSERT INTO links (slug, url) VALUES ($1, $2)", slug, url)
        return slug

    async def follow(self, slug: str) -> str | None:
        """Return where *slug* leads, or None, and count the visit."""
        with suppress(redis.ConnectionError):  # without its cache it is slower, and does not count
            cached = await self.cache.get(f"url:{slug}")
            if cached is not None:
                await self.cache.hincrby("visits", slug)
                return str(cached)
        url: str | None = await self.db.fetchval("SELECT url FROM links WHERE slug = $1", slug)
        if url is not None:
            with suppress(redis.ConnectionError):
                await self.cache.set(f"url:{slug}", url, ex=3600)
                await self.cache.hincrby("visits", slug)
        return url

    async def save_visits(self) -> None:
        """Move the visits counted so far from Redis to PostgreSQL."""
        async with self.cache.pipeline() as both:
            both.hgetall("visits")
            both.delete("visits")
            visits, _ = await both.execute()
        await self.db.executemany(
            "UPDATE links SET visits = visits + $2 WHERE slug = $1",
            [(slug, int(count)) for slug, count in visits.items()],
        )
