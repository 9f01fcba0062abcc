"""A lifespan that fails half-way: what had opened by then is closed again."""

import os

import aiopg
import redis.asyncio as redis
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lifekit import Registry, StartupError

registry = Registry("links")


@registry.resource
async def db() -> aiopg.Pool:
    return await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=2)


@registry.resource(after=(db,))
def cache() -> redis.Redis:
    return redis.from_url("redis://127.0.0.1:1")  # where nothing listens


app = FastAPI(lifespan=registry.lifespan)

try:
    with TestClient(app) as client:
        print("it started")
except StartupError as error:
    print(f"StartupError: {error}")
