"""The cache is overridden while the application runs: what needs it is rebuilt; or it is refused."""

import asyncio
import os
from typing import Annotated

import redis.asyncio as redis
from fastapi import Depends, FastAPI

from lifekit import OverrideError, Registry, testing

registry = Registry()


@registry.resource
def cache() -> redis.Redis:
    return redis.from_url(os.environ["REDIS_URL"], decode_responses=True)


class Greeter:
    def __init__(self, cache: redis.Redis) -> None:
        self.cache = cache


@registry.resource(cache)
def greeter(cache: redis.Redis) -> Greeter:
    return Greeter(cache)


app = FastAPI(lifespan=registry.lifespan)


@app.get("/")
async def greet(greeter: Annotated[Greeter, Depends(greeter)]) -> str | bytes | None:
    return await greeter.cache.get("greeting")


async def main() -> None:
    fake = testing.mock(cache)
    fake.get.return_value = "Hello from the fake"
    with registry.override(cache, fake):
        async with testing.client(app) as client:
            print("before:", (await client.get("/")).json())
    async with registry.lifespan() as lifespan:
        try:
            with registry.override(cache, fake):
                print("never reached")
        except OverrideError as error:
            print(f"OverrideError: {error}")
        async with lifespan.override(cache, fake) as patched:
            print("while it runs:", await patched[greeter].cache.get("greeting"))


asyncio.run(main())
