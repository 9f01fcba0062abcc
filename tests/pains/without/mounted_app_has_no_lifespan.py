"""An application that is mounted into another: its lifespan never runs."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.testclient import TestClient


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
    print("the shop opens")
    yield {"motd": "welcome"}


shop = FastAPI(lifespan=lifespan)


@shop.get("/motd")
async def motd(request: Request) -> str:
    text: str = request.state.motd
    return text


app = FastAPI()
app.mount("/shop", shop)

with TestClient(app) as client:
    print(client.get("/shop/motd").json())
