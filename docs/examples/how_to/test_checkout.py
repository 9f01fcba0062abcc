"""The tests of the checkout application: rolled back, and with one dependency mocked."""

# --8<-- [start:rollback]
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from httpx2 import AsyncClient

from how_to import checkout
from lifekit import Lifespan, testing


async def test_orders_are_listed(client: AsyncClient, lifespan: Lifespan) -> None:
    await lifespan[checkout.db].execute("INSERT INTO orders VALUES (300), (500)")

    assert (await client.get("/orders")).json() == [300, 500]


async def test_a_new_shop_has_no_orders(client: AsyncClient) -> None:
    assert (await client.get("/orders")).json() == []


# --8<-- [end:rollback]
# --8<-- [start:seed]
@testing.seed(scope="module")
async def many_orders(lifespan: Lifespan) -> list[int]:
    prices = list(range(100, 10_000, 100))
    await lifespan[checkout.db].executemany(
        "INSERT INTO orders VALUES ($1)", [[each] for each in prices]
    )
    return prices


async def test_all_orders_are_listed(client: AsyncClient, many_orders: list[int]) -> None:
    assert (await client.get("/orders")).json() == many_orders


async def test_deleted_orders_are_not(
    client: AsyncClient, lifespan: Lifespan, many_orders: list[int]
) -> None:
    await lifespan[checkout.db].execute("DELETE FROM orders WHERE cents > 100")

    assert (await client.get("/orders")).json() == [100]


# --8<-- [end:seed]
# --8<-- [start:lasts]
@pytest.mark.lifekit(isolation="none")
async def test_a_vacuum_is_possible(lifespan: Lifespan) -> None:
    await lifespan[checkout.db].execute("VACUUM orders")


# --8<-- [end:lasts]
# --8<-- [start:mock]
def payments_that_answer(status: int) -> Any:
    payments = testing.mock(checkout.payments)
    payments.post.return_value = httpx2.Response(status)
    return payments


async def test_what_is_paid_is_ordered(client: AsyncClient, lifespan: Lifespan) -> None:
    payments = payments_that_answer(201)

    async with lifespan.override(checkout.payments, payments):
        assert (await client.post("/orders?cents=900")).status_code == 201

    payments.post.assert_awaited_once_with("/charges", json={"cents": 900})
    assert (await client.get("/orders")).json() == [900]


# --8<-- [end:mock]
# --8<-- [start:refuses]
async def test_a_mock_refuses_what_the_client_refuses() -> None:
    payments = testing.mock(checkout.payments)

    with pytest.raises(TypeError, match="unexpected keyword argument 'body'"):
        await payments.post("/charges", body={"cents": 900})
    with pytest.raises(AttributeError):
        await payments.charge(900)


# --8<-- [end:refuses]
# --8<-- [start:factory]
def declining() -> httpx2.AsyncClient:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(402 if request.url.path == "/charges" else 404)

    return httpx2.AsyncClient(base_url="https://test", transport=httpx2.MockTransport(answer))


async def test_what_is_declined_is_not_ordered(client: AsyncClient, lifespan: Lifespan) -> None:
    async with lifespan.override(checkout.payments, factory=declining):
        assert (await client.post("/orders?cents=900")).status_code == 402

    assert (await client.get("/orders")).json() == []


# --8<-- [end:factory]
# --8<-- [start:before]
def test_the_application_starts_without_the_service() -> None:
    with (
        checkout.registry.override(checkout.payments, payments_that_answer(201)),
        testing.sync_client(checkout.app, sandbox=True) as client,
    ):
        assert client.post("/orders?cents=900").status_code == 201


# --8<-- [end:before]
# --8<-- [start:route]
class NoOrders:
    async def place(self, cents: int) -> bool:
        return False


def test_a_declined_payment_is_a_402() -> None:
    checkout.app.dependency_overrides[checkout.orders] = NoOrders
    try:
        assert TestClient(checkout.app).post("/orders?cents=900").status_code == 402
    finally:
        checkout.app.dependency_overrides.clear()


# --8<-- [end:route]
