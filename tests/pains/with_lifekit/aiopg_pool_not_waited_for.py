"""A pool and a connection of aiopg that have an owner, which closes them and waits."""

import asyncio
import os

import aiopg

from lifekit import Registry

registry = Registry()


@registry.resource
async def db() -> aiopg.Pool:
    return await aiopg.create_pool(os.environ["DATABASE_URL"], minsize=3)


@registry.resource
async def connection() -> aiopg.Connection:
    return await aiopg.connect(os.environ["DATABASE_URL"])


async def main() -> None:
    async with registry.lifespan() as lifespan:
        print(lifespan[connection].closed)


asyncio.run(main())
