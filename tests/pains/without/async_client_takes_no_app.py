"""``AsyncClient(app=app)``, as tutorials have it."""

import asyncio
from typing import Any

import httpx
from fastapi import FastAPI

app = FastAPI()
AsyncClient: Any = httpx.AsyncClient  # a type checker would see it


async def main() -> None:
    async with AsyncClient(app=app, base_url="http://test") as client:
        print(await client.get("/"))


asyncio.run(main())
