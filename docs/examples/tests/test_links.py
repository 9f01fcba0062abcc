"""The shortener's own tests: real PostgreSQL, real Valkey, and nothing to clean up."""

import asyncio

import aiopg
import pytest
import redis.asyncio as redis
from httpx2 import AsyncClient
from shortener import resources
from starlette.testclient import TestClient

from lifekit import Lifespan, testing

URL = "https://example.org/"


# Rollback: each test finds the database as it was before.


async def test_a_short_link_leads_to_its_page(client: AsyncClient) -> None:
    made = await client.post("/links", json={"url": URL})
    answer = await client.get(f"/{made.json()['slug']}")

    assert made.status_code == 201
    assert (answer.status_code, answer.headers["location"]) == (307, URL)


async def test_nothing_is_left_of_the_tests_before(lifespan: Lifespan) -> None:
    assert await lifespan[resources.db].fetch("SELECT * FROM links") == []
    assert await lifespan[resources.cache].xrange("visits") == []


async def test_rows_that_a_test_needs_are_put_in_by_the_pool_that_reads_them(
    client: AsyncClient, lifespan: Lifespan
) -> None:
    # Pools of two drivers have a transaction each, and don't see each other's rows.
    async with lifespan[resources.reports].acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("INSERT INTO links (slug, url, visits) VALUES ('known', %s, 3)", [URL])

    assert (await client.get("/reports/top")).json() == [{"slug": "known", "url": URL, "visits": 3}]


# A plain function works as well: Starlette's TestClient, in the same sandbox.


def test_an_unknown_link_is_not_found(sync_client: TestClient) -> None:
    assert sync_client.get("/unknown").status_code == 404


# Override: another cache while the application runs; what needs it is built anew, the rest is shared.


async def test_a_known_link_is_not_looked_up(client: AsyncClient, lifespan: Lifespan) -> None:
    async with lifespan.override(resources.cache, factory=fake_cache) as patched:
        await patched[resources.cache].set("url:cached", URL)
        assert (await client.get("/cached")).headers["location"] == URL

    assert (await client.get("/cached")).status_code == 404


def fake_cache() -> redis.Redis:
    return testing.fake_redis(decode_responses=True)


# Mock: it knows redis.Redis, so that a call which the real one refuses fails the test.


@pytest.mark.lifekit(workers=False)
async def test_each_visit_is_noted_once(client: AsyncClient, lifespan: Lifespan) -> None:
    cache = testing.mock(resources.cache)
    cache.get.return_value = URL

    async with lifespan.override(resources.cache, cache):
        await client.get("/cached")

    cache.xadd.assert_called_once_with("visits", {"slug": "cached"})


# A failing dependency: the application goes on without its cache, and without reports.


@pytest.mark.lifekit(workers=False)
async def test_without_the_cache_links_still_work(client: AsyncClient, lifespan: Lifespan) -> None:
    slug = (await client.post("/links", json={"url": URL})).json()["slug"]
    cache = testing.mock(resources.cache)
    for command in (cache.get, cache.set, cache.xadd):
        command.side_effect = redis.ConnectionError("down")

    async with lifespan.override(resources.cache, cache):
        assert (await client.get(f"/{slug}")).headers["location"] == URL


async def test_without_reports_links_still_work(client: AsyncClient, lifespan: Lifespan) -> None:
    async with lifespan.override(resources.reports, factory=away):
        assert (await client.post("/links", json={"url": URL})).status_code == 201
        assert (await client.get("/reports/top")).status_code == 503


def away() -> aiopg.Pool:
    raise ConnectionRefusedError("the server of the reports is away")


# Workers run while a test does; `workers=False` leaves them out, `run_once` runs one by hand.


async def test_a_worker_counts_the_visits(client: AsyncClient) -> None:
    slug = (await client.post("/links", json={"url": URL})).json()["slug"]
    await client.get(f"/{slug}")

    async with asyncio.timeout(60):
        while (await client.get("/reports/top")).json()[0]["visits"] < 1:
            pass


@pytest.mark.lifekit(workers=False)
async def test_a_link_that_has_expired_is_removed(client: AsyncClient, lifespan: Lifespan) -> None:
    brief, lasting = [
        (await client.post("/links", json={"url": URL, "days": days})).json()["slug"]
        for days in (1, None)
    ]
    await lifespan[resources.db].execute("UPDATE links SET expires = expires - interval '2 days'")
    await lifespan.run_once(resources.remove_expired)

    assert (await client.get(f"/{brief}")).status_code == 404
    assert (await client.get(f"/{lasting}")).status_code == 307
