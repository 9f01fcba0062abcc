"""``TestClient(app)`` without ``with``: the request is told what is missing."""

import os
from typing import Annotated

import asyncpg
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from lifekit import NotOpenError, Registry

registry = Registry()


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"])


app = FastAPI(lifespan=registry.lifespan)


@app.get("/one")
async def one(db: Annotated[asyncpg.Pool, Depends(db)]) -> int:
    answer: int = await db.fetchval("SELECT 1")
    return answer


try:
    TestClient(app).get("/one")
except NotOpenError as error:
    print("NotOpenError:", error, *error.__notes__, sep="\n")
with TestClient(app) as client:
    print(client.get("/one").json())
