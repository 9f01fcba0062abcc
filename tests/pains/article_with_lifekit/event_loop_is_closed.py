"""Sync tests with a sync client: one event loop, in a thread, for all of them."""

import pytest
from fastapi.testclient import TestClient


@pytest.mark.parametrize("path", ["/api/users/count", "/api/audit", "/api/users"])
@pytest.mark.parametrize("time", ["first", "second"])
def test_something(sync_client: TestClient, path: str, time: str) -> None:
    assert sync_client.get(path).status_code == 200


def test_a_user_is_created(sync_client: TestClient) -> None:
    assert sync_client.post("/api/users?name=ada").status_code == 201
