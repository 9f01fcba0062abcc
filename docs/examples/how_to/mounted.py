"""An application with another one mounted in it, whose lifespan a resource runs."""

from __future__ import annotations

# --8<-- [start:mounted]
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI

from lifekit import Registry
from lifekit.asgi import lifespan_of


@asynccontextmanager
async def opened(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
    yield {"tool": "hammer"}


tools_app = FastAPI(lifespan=opened)  # or: mcp.streamable_http_app()

registry = Registry("shop")


@registry.resource
def tools() -> AbstractAsyncContextManager[dict[str, Any]]:
    return lifespan_of(tools_app)


app = FastAPI(lifespan=registry.lifespan)
app.mount("/tools", tools_app)
# --8<-- [end:mounted]
