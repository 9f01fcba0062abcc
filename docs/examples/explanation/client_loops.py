"""How many event loops a `TestClient` uses, and whether the lifespan runs."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.testclient import TestClient


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    loops.append(asyncio.get_running_loop())
    yield


# --8<-- [start:story]
app = FastAPI(lifespan=lifespan)
loops: list[asyncio.AbstractEventLoop] = []


@app.get("/")
async def root() -> None:
    loops.append(asyncio.get_running_loop())


client = TestClient(app)
client.get("/")
client.get("/")
print("without `with`:", len(set(loops)), "loops, closed:", [loop.is_closed() for loop in loops])

loops.clear()
with TestClient(app) as client:
    client.get("/")
    client.get("/")
    print("with `with`:", len(set(loops)), "loop for the lifespan and", len(loops) - 1, "requests")
# --8<-- [end:story]
