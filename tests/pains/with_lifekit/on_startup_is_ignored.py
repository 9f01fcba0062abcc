"""An old lifespan and old startup handlers, adopted."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.testclient import TestClient

from lifekit import Registry
from lifekit.asgi import combine

registry = Registry()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    print("the lifespan begins")
    yield
    print("the lifespan ends")


@registry.resource
async def load_flags() -> None:
    print("the flags are loaded")


app = FastAPI(lifespan=combine(lifespan, registry.lifespan))

with TestClient(app):
    print("it serves")
