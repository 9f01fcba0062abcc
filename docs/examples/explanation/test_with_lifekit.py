"""Async and sync tests of it, in whatever event loops pytest-asyncio gives them."""

# --8<-- [start:tests]
import pytest
from httpx2 import AsyncClient
from starlette.testclient import TestClient


@pytest.mark.asyncio
async def test_one(client: AsyncClient) -> None:
    assert (await client.get("/one")).json() == 1


def test_one_without_a_loop(sync_client: TestClient) -> None:
    assert sync_client.get("/one").json() == 1


# --8<-- [end:tests]
@pytest.mark.asyncio
async def test_once_more(client: AsyncClient) -> None:
    assert (await client.get("/one")).json() == 1
