"""``TestClient(app)`` without ``with``: no lifespan, and a new event loop for each request."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"]) as app.state.db:
        yield


app = FastAPI(lifespan=lifespan)
loops: set[asyncio.AbstractEventLoop] = set()


@app.get("/ping")
async def ping() -> None:
    loops.add(asyncio.get_running_loop())


@app.get("/one")
async def one(request: Request) -> int:
    answer: int = await request.app.state.db.fetchval("SELECT 1")
    return answer


client = TestClient(app)
client.get("/ping")
client.get("/ping")
print(f"two requests, {len(loops)} event loops")
client.get("/one")
