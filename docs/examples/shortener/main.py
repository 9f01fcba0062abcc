"""The application: ``uvicorn shortener.main:app``."""

from typing import Annotated

import aiopg
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, HttpUrl

from . import resources
from .links import Links

app = FastAPI(title="Shortener", lifespan=resources.registry.lifespan)


class NewLink(BaseModel):
    """What a short link is wanted for."""

    url: HttpUrl


class Link(BaseModel):
    """A short link and how often it was followed."""

    slug: str
    url: str
    visits: int = 0


@app.post("/links", status_code=201)
async def create(new: NewLink, links: Annotated[Links, Depends(resources.links)]) -> Link:
    url = str(new.url)
    return Link(slug=await links.create(url), url=url)


@app.get("/reports/top")
async def top(
    links: Annotated[Links, Depends(resources.links)],
    reports: Annotated[aiopg.Pool, Depends(resources.reports)],
) -> list[Link]:
    await links.save_visits()
    async with reports.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT slug, url, visits FROM links ORDER BY visits DESC LIMIT 10")
        return [Link(slug=slug, url=url, visits=visits) async for slug, url, visits in cursor]


@app.get("/{slug}")
async def follow(slug: str, links: Annotated[Links, Depends(resources.links)]) -> RedirectResponse:
    url = await links.follow(slug)
    if url is None:
        raise HTTPException(404, f"no link is called {slug}")
    return RedirectResponse(url, 307)
