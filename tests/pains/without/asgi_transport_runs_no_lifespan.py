"""httpx's client of an application: no lifespan runs."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
from fastapi import FastAPI, Request
from httpx import ASGITransport, AsyncClient


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"]) as app.state.db:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/one")
async def one(request: Request) -> int:
    answer: int = await request.app.state.db.fetchval("SELECT 1")
    return answer


async def main() -> None:
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        print((await client.get("/one")).json())


asyncio.run(main())
