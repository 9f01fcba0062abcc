"""The article's first strategy, one application for all tests: what one leaves, the next one finds."""

import pytest
from httpx import AsyncClient

pytest_plugins = ["tests.pains.article.fixtures"]
pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_user_is_created(async_client: AsyncClient) -> None:
    assert (await async_client.post("/api/users?name=ada")).status_code == 201


async def test_there_are_no_users_at_first(async_client: AsyncClient) -> None:
    assert (await async_client.get("/api/users")).json() == []


async def test_nobody_is_counted_at_first(async_client: AsyncClient) -> None:
    assert (await async_client.get("/api/users/count")).json() == 0


async def test_nothing_is_noted_at_first(async_client: AsyncClient) -> None:
    assert (await async_client.get("/api/audit")).json() == []
