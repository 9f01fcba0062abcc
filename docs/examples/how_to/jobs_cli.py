"""The command line: ``python -m how_to.jobs_cli`` counts the mails."""

# --8<-- [start:cli]
import asyncio

from .jobs import db, store


async def count() -> int:
    async with store.lifespan() as lifespan:  # the database alone: no queue is needed
        mails: int = await lifespan[db].fetchval("SELECT count(*) FROM mails")
        return mails


if __name__ == "__main__":
    print(asyncio.run(count()), "mails sent")
# --8<-- [end:cli]
