"""What the article's application is connected to, and how its routes get it."""

import aiopg
import asyncpg
import redis.asyncio as redis


class Connected:
    """Filled by the application's lifespan."""

    db: asyncpg.Pool
    audit: aiopg.Pool
    cache: redis.Redis


async def get_db() -> asyncpg.Pool:
    return Connected.db


async def get_audit() -> aiopg.Pool:
    return Connected.audit


async def get_redis() -> redis.Redis:
    return Connected.cache
