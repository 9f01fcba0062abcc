"""The article's session-scoped fixtures.

Mended, beside what `session_scope_as_it_stands` says: every test that uses them has to run in the
session's event loop, ``@pytest.mark.asyncio(loop_scope="session")``.
"""

from collections.abc import AsyncGenerator

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
