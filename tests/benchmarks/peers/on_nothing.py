"""The bare work, without which no contestant comes out."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.responses import PlainTextResponse

from .work import Log, Plan, Repo, Service, opened_pool


def _application(log: Log) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with opened_pool(log):
            yield

    return FastAPI(lifespan=lifespan)


def one(log: Log) -> FastAPI:
    """Read a global in the route."""

    async def root() -> PlainTextResponse:
        return PlainTextResponse(log[-1].name)

    app = _application(log)
    app.get("/")(root)
    return app


def chain(log: Log) -> FastAPI:
    """Make everything in the route."""

    async def root() -> PlainTextResponse:
        service = Service(Repo(log[-1]))
        return PlainTextResponse(service.repo.pool.name)

    app = _application(log)
    app.get("/")(root)
    return app


@asynccontextmanager
async def graph(plan: Plan) -> AsyncGenerator[None]:
    """Open one after another, and close in reverse, whatever may fail."""
    values: dict[str, object] = {}
    for node in plan.nodes:
        values[node.name] = await plan.open(node, [values[need.name] for need in node.needs])
    yield
    for node in reversed(plan.nodes):
        await plan.close(node)
