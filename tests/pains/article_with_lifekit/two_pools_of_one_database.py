"""What the sandbox does not give: two pools share nothing, though both lead to one database.

Each has a transaction of its own, and neither sees what the other has not committed.
"""

import pytest
from httpx2 import AsyncClient

from lifekit import Lifespan

from .myapp import audit, db

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_one_pool_sees_the_rows_of_the_other(client: AsyncClient, lifespan: Lifespan) -> None:
    assert (await client.post("/api/users?name=ada")).status_code == 201
    assert await lifespan[db].fetchval("SELECT count(*) FROM users") == 1
    async with lifespan[audit].acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT count(*) FROM users")
        assert await cursor.fetchone() == (1,)
