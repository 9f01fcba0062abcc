"""One process of a fleet whose leader writes rows: LOCK is where the lock is, DATABASE the rows.

Each row has the number of its leader. One that comes after a higher number is refused, and noted.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import anyio
import asyncpg
import redis.asyncio as redis
from sqlalchemy.ext.asyncio import create_async_engine

import lifekit
from lifekit import Registry
from lifekit._core import leading

LOCK, DATABASE, KIND = os.environ["LOCK"], os.environ["DATABASE"], os.environ["KIND"]
leading.LEASE = float(os.environ["LEASE"])

registry = Registry("fleet")

WRITE = """
with row as (update fence set number = $1 where number <= $1 returning number)
insert into written (number, process, accepted)
select $1, $2, exists (select from row)
"""


@registry.resource
def rows() -> asyncpg.Pool:
    return asyncpg.create_pool(DATABASE, min_size=1, max_size=2)


@registry.resource(retry=100)
def lock() -> Any:
    if KIND == "redis":
        return redis.from_url(LOCK)
    if KIND == "sqlalchemy":
        return create_async_engine(LOCK.replace("postgresql:", "postgresql+psycopg:"))
    return asyncpg.create_pool(LOCK, min_size=0)


@registry.worker(rows, leader=lock, limit=(1000, 60.0))
async def write(rows: asyncpg.Pool) -> None:
    number = lifekit.leadership().number
    while True:
        await rows.execute(WRITE, number, os.getpid())
        await anyio.sleep(0.02)


@registry.worker(rows, after=[lock])
async def migrate(rows: asyncpg.Pool) -> None:
    async with lifekit.exclusive(lock, "migrations"):
        if not await rows.fetchval("select exists (select from migrated)"):
            await asyncio.sleep(0.1)
            await rows.execute("insert into migrated values ($1)", os.getpid())


if __name__ == "__main__":
    raise SystemExit(registry.run())
