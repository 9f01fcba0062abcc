"""The worker: it takes jobs from the queue until a signal comes."""

# --8<-- [start:worker]
import sys

import asyncpg
import redis.asyncio as redis

import lifekit
from lifekit import Registry

from .jobs import db, jobs, queue

worker = Registry("jobs-worker")
worker.include(jobs)


@worker.worker(db, queue, drain=5.0)
async def send(db: asyncpg.Pool, queue: redis.Redis) -> None:
    while not lifekit.stopping().is_set():
        if job := await queue.brpop(["mails"], timeout=1):
            await db.execute("INSERT INTO mails VALUES ($1)", job[1])
            print("sent a mail to", job[1], flush=True)


if __name__ == "__main__":
    sys.exit(worker.run())
# --8<-- [end:worker]
