"""A transaction around each test, for all connections of the application and of the test."""

import pytest
from httpx2 import AsyncClient

from lifekit import Lifespan

from .myapp import db

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_application_sees_the_user(client: AsyncClient, lifespan: Lifespan) -> None:
    await lifespan[db].execute("INSERT INTO users VALUES ('grace')")
    assert (await client.get("/api/users")).json() == ["grace"]


async def test_a_user_is_created(client: AsyncClient) -> None:
    assert (await client.post("/api/users?name=ada")).status_code == 201


async def test_there_are_no_users_at_first(client: AsyncClient, lifespan: Lifespan) -> None:
    assert (await client.get("/api/users")).json() == []
    assert await lifespan[db].fetchval("SELECT count(*) FROM users") == 0
