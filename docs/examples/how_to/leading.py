"""What one process of several does: a report each hour, and the tables at the start."""

from __future__ import annotations

# --8<-- [start:leader]
import os

import asyncpg

import lifekit
from lifekit import Registry

registry = Registry("reports")


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


@registry.worker(db, leader=db, every=3600.0)
async def report(db: asyncpg.Pool) -> None:
    number = lifekit.leadership().number
    await db.execute(
        """INSERT INTO reports (name, leader) VALUES ('hourly', $1)
        ON CONFLICT (name) DO UPDATE SET made = now(), leader = $1 WHERE reports.leader <= $1""",
        number,
    )


# --8<-- [end:leader]

# --8<-- [start:exclusive]
TABLES = """
CREATE TABLE IF NOT EXISTS reports (
    name text PRIMARY KEY, leader bigint NOT NULL, made timestamptz NOT NULL DEFAULT now()
)
"""


@registry.resource(db)
async def tables(db: asyncpg.Pool) -> None:
    async with lifekit.exclusive(db, "reports: tables"):
        await db.execute(TABLES)


# --8<-- [end:exclusive]
