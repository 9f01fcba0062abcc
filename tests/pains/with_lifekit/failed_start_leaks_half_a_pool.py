"""Pools that find no room for all of their connections: what they got is given up."""

import asyncio
import os
from urllib.parse import urlsplit

import aiopg
import asyncpg

from lifekit import Registry, StartupError

url = urlsplit(os.environ["DATABASE_URL"])
few = url._replace(netloc=f"fewer:secret@{url.hostname}:{url.port}").geturl()
with_aiopg, with_asyncpg = Registry(), Registry()


@with_aiopg.resource
async def aiopg_pool() -> aiopg.Pool:
    return await aiopg.create_pool(few, minsize=5)


@with_asyncpg.resource
def asyncpg_pool() -> asyncpg.Pool:
    return asyncpg.create_pool(few, min_size=5)


async def main() -> None:
    admin = await asyncpg.connect(url.geturl())
    await admin.execute("DROP ROLE IF EXISTS fewer")
    await admin.execute("CREATE ROLE fewer LOGIN PASSWORD 'secret' CONNECTION LIMIT 3")
    for registry in (with_aiopg, with_asyncpg):
        try:
            async with registry.lifespan():
                print("it started")
        except StartupError as error:
            print(error)
        while await admin.fetchval("SELECT 1 FROM pg_stat_activity WHERE usename = 'fewer'"):
            pass  # until the server has noticed
        print("no connection is open any more")
    await admin.close()


asyncio.run(main())
