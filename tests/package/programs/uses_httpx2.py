"""A client of httpx2's as a resource, and the clients of test mode, which use httpx2."""

import asyncio

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from lifekit import Registry, testing

registry = Registry("httpx2")


@registry.resource
def outside() -> httpx2.AsyncClient:
    """The client."""
    return httpx2.AsyncClient()


async def answer(request: Request) -> PlainTextResponse:
    """Say whether the client is open."""
    return PlainTextResponse(f"closed: {request.state.outside.is_closed}")


app = Starlette(routes=[Route("/", answer)], lifespan=registry.lifespan)


async def main() -> None:
    """Ask the application, whose client is open then, and closed after it."""
    async with testing.client(app, sandbox=True) as client:
        print(type(client).__module__.partition(".")[0], (await client.get("/")).text)
        used = outside.get()
    print(f"closed: {used.is_closed}")


asyncio.run(main())
with testing.sync_client(app) as client:
    print(client.get("/").text)
