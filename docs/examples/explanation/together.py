"""dishka builds what requests need, from what lifekit has opened."""

# --8<-- [start:together]
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import redis.asyncio as redis
from dishka import Provider, Scope, make_async_container
from dishka.integrations.fastapi import DishkaRoute, FromDishka, setup_dishka
from fastapi import APIRouter, FastAPI

from lifekit import Registry, testing

registry = Registry()


@registry.resource
def cache() -> redis.Redis:
    return testing.fake_redis(decode_responses=True)


class Greeter:
    def __init__(self, cache: redis.Redis) -> None:
        self.cache = cache

    async def greet(self, name: str) -> str:
        return f"hello {name}, number {await self.cache.incr(name)}"


provider = Provider(scope=Scope.REQUEST)
provider.provide(Greeter)  # built by dishka, for each request
provider.provide(cache.get, provides=redis.Redis)  # opened and closed by lifekit
container = make_async_container(provider)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with registry.lifespan(app):
        try:
            yield
        finally:
            await container.close()


# --8<-- [end:together]
router = APIRouter(route_class=DishkaRoute)


@router.get("/{name}")
async def greet(name: str, greeter: FromDishka[Greeter]) -> str:
    return await greeter.greet(name)


app = FastAPI(lifespan=lifespan)
app.include_router(router)
setup_dishka(container, app)
