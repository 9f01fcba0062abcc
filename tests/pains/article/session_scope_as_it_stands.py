"""The article's session-scoped client: the application's loop is not the test's.

Mended: ``LifespanManager`` of asgi-lifespan is Starlette's own ``lifespan_context``;
``AsyncClient(app=…)`` is gone, and has to be given a transport.
"""

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from .myapp import app


@pytest_asyncio.fixture(scope="session")
async def app_with_lifespan() -> AsyncGenerator[FastAPI]:
    async with app.router.lifespan_context(app):
        yield app


@pytest_asyncio.fixture(scope="session")
async def async_client(app_with_lifespan: FastAPI) -> AsyncGenerator[AsyncClient]:
    transport = ASGITransport(app_with_lifespan)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.asyncio
async def test_endpoint(async_client: AsyncClient) -> None:
    response = await async_client.post("/api/users?name=ada")
    assert response.status_code == 201
