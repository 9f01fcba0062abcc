"""svcs: what lives as long as the application is a value of its registry.

https://svcs.hynek.me/en/stable/integrations/fastapi.html
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import svcs
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from svcs.fastapi import DepContainer

from .work import Log, Plan, Pool, Repo, Service, opened_pool


def make_repo(svcs_container: svcs.Container) -> Repo:
    """Return what a request has of its own."""
    return Repo(svcs_container.get(Pool))


def make_service(svcs_container: svcs.Container) -> Service:
    """Return what a route asks for."""
    return Service(svcs_container.get(Repo))


def _application(log: Log) -> FastAPI:
    @svcs.fastapi.lifespan
    async def lifespan(
        _: FastAPI,
        registry: Any,  # as strict checkers see it: its methods take callables of no known type
    ) -> AsyncGenerator[dict[str, object] | None, None]:
        async with opened_pool(log) as pool:
            registry.register_value(Pool, pool)
            registry.register_factory(Repo, make_repo)
            registry.register_factory(Service, make_service)
            yield {}

    return FastAPI(lifespan=lifespan)


def one(log: Log) -> FastAPI:
    """Ask for the pool."""

    async def root(services: DepContainer) -> PlainTextResponse:
        return PlainTextResponse(services.get(Pool).name)

    app = _application(log)
    app.get("/")(root)
    return app


def chain(log: Log) -> FastAPI:
    """Ask for the service."""

    async def root(services: DepContainer) -> PlainTextResponse:
        return PlainTextResponse(services.get(Service).repo.pool.name)

    app = _application(log)
    app.get("/")(root)
    return app


@asynccontextmanager
async def graph(plan: Plan) -> AsyncGenerator[None]:
    """Open one after another; the registry closes them."""
    values: dict[str, object] = {}
    async with svcs.Registry() as opened:
        registry: Any = opened
        for node in plan.nodes:
            values[node.name] = await plan.open(node, [values[need.name] for need in node.needs])
            close = partial(plan.close, node)
            registry.register_value(node.kind, values[node.name], on_registry_close=close)
        yield
