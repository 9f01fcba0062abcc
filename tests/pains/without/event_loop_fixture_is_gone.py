"""A test that takes the ``event_loop`` fixture, as those of some years ago do."""

import asyncio
import os

import asyncpg


def test_one(event_loop: asyncio.AbstractEventLoop) -> None:
    pool = event_loop.run_until_complete(asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1))
    assert event_loop.run_until_complete(pool.fetchval("SELECT 1")) == 1
    event_loop.run_until_complete(pool.close())
