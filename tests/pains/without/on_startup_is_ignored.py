"""An application that got ``lifespan=`` and kept its old startup handlers."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.testclient import TestClient


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    print("the lifespan begins")
    yield
    print("the lifespan ends")


async def load_flags() -> None:
    print("the flags are loaded")


app = FastAPI(lifespan=lifespan, on_startup=[load_flags])

with TestClient(app):
    print("it serves")
