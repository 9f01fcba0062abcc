"""A client of an application that runs its lifespan, in this event loop."""

import asyncio
import os
from typing import Annotated

import asyncpg
from fastapi import Depends, FastAPI
from httpx import ASGITransport, AsyncClient

from lifekit import NotOpenError, Registry, testing

registry = Registry()


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"])


app = FastAPI(lifespan=registry.lifespan)


@app.get("/one")
async def one(db: Annotated[asyncpg.Pool, Depends(db)]) -> int:
    answer: int = await db.fetchval("SELECT 1")
    return answer


async def main() -> None:
    try:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            await client.get("/one")
    except NotOpenError as error:
        print("NotOpenError:", error, *error.__notes__, sep="\n")
    async with testing.client(app) as client:
        print((await client.get("/one")).json())


asyncio.run(main())
