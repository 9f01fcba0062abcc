"""The application: ``uvicorn shortener.main:app``."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Annotated

import aiopg
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel, HttpUrl, PositiveInt

from lifekit import stopping
from lifekit.asgi import health

from . import resources
from .links import Links

app = FastAPI(title="Shortener", lifespan=resources.registry.lifespan)
app.mount("/health", health(resources.registry))  # /health/livez and /health/readyz


class NewLink(BaseModel):
    """What a short link is wanted for, and for how long."""

    url: HttpUrl
    days: PositiveInt | None = None


class Link(BaseModel):
    """A short link and how often it was followed."""

    slug: str
    url: str
    visits: int = 0


@app.post("/links", status_code=201)
async def create(new: NewLink, links: Annotated[Links, Depends(resources.links)]) -> Link:
    url = str(new.url)
    return Link(slug=await links.create(url, new.days), url=url)


@app.get("/reports/top")
async def top(reports: Annotated[aiopg.Pool, Depends(resources.reports)]) -> list[Link]:
    async with reports.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT slug, url, visits FROM links ORDER BY visits DESC LIMIT 10")
        return [Link(slug=slug, url=url, visits=visits) async for slug, url, visits in cursor]


@app.get("/reports/live")
async def live(reports: Annotated[aiopg.Pool, Depends(resources.reports)]) -> StreamingResponse:
    async def events() -> AsyncGenerator[str]:
        while True:
            report = [link.model_dump() for link in await top(reports)]
            yield f"data: {json.dumps(report)}\n\n"
            await asyncio.sleep(1)

    # Without this it would have no end, and the server would wait for it when it stops.
    return StreamingResponse(stopping().until(events()), media_type="text/event-stream")


@app.get("/{slug}")
async def follow(slug: str, links: Annotated[Links, Depends(resources.links)]) -> RedirectResponse:
    url = await links.follow(slug)
    if url is None:
        raise HTTPException(404, f"no link is called {slug}")
    return RedirectResponse(url, 307)
