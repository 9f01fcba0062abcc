"""A client of an application, whatever version of httpx there is."""

import asyncio

from fastapi import FastAPI

from lifekit import testing

app = FastAPI()


async def main() -> None:
    async with testing.client(app) as client:
        print(await client.get("/"))


asyncio.run(main())
