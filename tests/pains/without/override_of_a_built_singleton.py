"""The cache is overridden after what needs it was built: nothing happens."""

import os
from functools import cache
from unittest.mock import AsyncMock

import redis.asyncio as redis
from fastapi import FastAPI
from fastapi.testclient import TestClient


@cache
def get_cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"], decode_responses=True)


class Greeter:
    def __init__(self, cache: redis.Redis) -> None:
        self.cache = cache


app = FastAPI()
app.state.greeter = Greeter(get_cache())


@app.get("/")
async def greet() -> str | None:
    async with app.state.greeter.cache as cache:
        greeting: str | None = await cache.get("greeting")
        return greeting


fake = AsyncMock()
fake.get.return_value = "Hello from the fake"
app.dependency_overrides[get_cache] = lambda: fake
print(TestClient(app).get("/").json())
