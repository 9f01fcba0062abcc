"""A background task of the lifespan dies; the application goes on answering."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.testclient import TestClient


async def refresh() -> None:
    raise ConnectionError("the queue is gone")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    app.state.refresher = asyncio.create_task(refresh())
    yield
    app.state.refresher.cancel()


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> str:
    return "fine"


with TestClient(app) as client:
    client.get("/health")
    print(client.get("/health").json(), app.state.refresher.done())
