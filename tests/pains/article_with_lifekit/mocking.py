"""A mock that knows the type of what it stands for: it refuses what that would refuse."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio
from httpx2 import AsyncClient

from lifekit import testing

from .myapp import app, audit, cache, db, registry

mocks: Any = {handle: testing.mock(handle) for handle in (db, audit, cache)}


@pytest_asyncio.fixture
async def client_with_mocks() -> AsyncGenerator[AsyncClient]:
    with (
        registry.override(db, mocks[db]),
        registry.override(audit, mocks[audit]),
        registry.override(cache, mocks[cache]),
    ):
        async with testing.client(app) as client:
            yield client


@pytest.mark.asyncio
async def test_first_with_mocks(client_with_mocks: AsyncClient) -> None:
    assert (await client_with_mocks.get("/api/users/first")).json() == "ada"


@pytest.mark.asyncio
async def test_create_with_mocks(client_with_mocks: AsyncClient) -> None:
    assert (await client_with_mocks.post("/api/users?name=ada")).status_code == 201
    mocks[db].execute.assert_awaited_with("INSERT INTO users VALUES ($1)", "ada")
