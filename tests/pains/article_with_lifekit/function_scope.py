"""As isolated as an application for each test, and it starts once."""

import pytest
from httpx2 import AsyncClient

from .myapp import starts

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_user_is_created(client: AsyncClient) -> None:
    assert (await client.post("/api/users?name=ada")).status_code == 201


async def test_there_are_no_users_at_first(client: AsyncClient) -> None:
    assert (await client.get("/api/users")).json() == []


async def test_the_application_started_once(client: AsyncClient) -> None:
    assert len(starts) == 1
