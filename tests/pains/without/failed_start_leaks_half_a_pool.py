"""A pool that finds no room for all of its connections: those that aiopg got stay open.

asyncpg, whose connects are gathered, gives them up since 0.32.
"""

import asyncio
import os
from urllib.parse import urlsplit

import aiopg
import asyncpg

url = urlsplit(os.environ["DATABASE_URL"])
few = url._replace(netloc=f"few:secret@{url.hostname}:{url.port}").geturl()


async def main() -> None:
    admin = await asyncpg.connect(url.geturl())
    await admin.execute("DROP ROLE IF EXISTS few")
    await admin.execute("CREATE ROLE few LOGIN PASSWORD 'secret' CONNECTION LIMIT 3")
    count = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'few'"
    try:
        await asyncpg.create_pool(few, min_size=5)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    while await admin.fetchval(count):  # until the server has noticed
        pass
    try:
        await aiopg.create_pool(few, minsize=5)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    print(f"{await admin.fetchval(count)} connections are open still")
    await admin.close()


asyncio.run(main())
