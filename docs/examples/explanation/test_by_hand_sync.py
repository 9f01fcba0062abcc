"""Sync tests of an application without lifekit: `with` gives them one event loop and the lifespan."""

# --8<-- [start:sync]
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from .by_hand import app


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    with TestClient(app) as client:  # the lifespan runs, and one event loop serves all requests
        yield client


def test_one(client: TestClient) -> None:
    assert client.get("/one").json() == 1


# --8<-- [end:sync]
def test_once_more(client: TestClient) -> None:
    assert client.get("/one").json() == 1
