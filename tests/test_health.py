"""Health: what is checked, what it says, and what of it an orchestrator is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import httpx2 as httpx
import pytest
import trio
from anyio.lowlevel import checkpoint
from fastapi import FastAPI

from lifekit import Registry, Resource, asgi, testing
from lifekit._core.health import CHECK_SECONDS, KEPT_SECONDS, ResourceHealth

from .virtual_time import run

backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class Checked:
    """A registry of one resource whose check does as it is told."""

    def __init__(self) -> None:
        self.registry = Registry("shop")
        self.checks = 0
        self.fails: BaseException | None = None
        self.hangs = False
        self.db: Resource[object] = self.registry.resource(check=self._check, name="db")(object)

    async def _check(self, value: object) -> None:
        self.checks += 1
        await checkpoint()
        if self.hangs:
            await anyio.sleep_forever()
        if self.fails is not None:
            raise self.fails


@backends
def test_checks_are_run_again_shared_by_callers_and_kept_for_a_second(backend: str) -> None:
    shop = Checked()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan, anyio.create_task_group() as tasks:
            assert shop.checks == 1
            for _ in range(5):
                tasks.start_soon(lifespan.health)
            assert (await lifespan.health()).ready
            assert shop.checks == 2
            shop.fails = ConnectionError(f"postgresql://shop:{'hunter'}2@db/shop is away")
            assert (await lifespan.health()).ready
            await anyio.sleep(KEPT_SECONDS)
            health = await lifespan.health()
            assert (health.ready, health.live) == (False, True)
            assert health.resources["db"].state == "failing"
            assert "ConnectionError: postgresql://shop:***@db/shop" in health.resources["db"].message

    run(main, backend)


@backends
def test_a_check_that_hangs_is_given_up_and_one_whose_caller_is_cancelled_is_done_by_the_next(
    backend: str,
) -> None:
    shop = Checked()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            shop.hangs = True
            began = anyio.current_time()
            with anyio.move_on_after(1):
                await lifespan.health()
            health = await lifespan.health()
            assert round(anyio.current_time() - began, 3) == 1 + CHECK_SECONDS
            assert health.resources["db"].message == "its check took longer than 5 s"

    run(main, backend)


@pytest.mark.anyio
async def test_a_check_that_waits_for_a_thread_is_left_and_not_begun_again_until_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lifekit._core.health.CHECK_SECONDS", 0.05)
    monkeypatch.setattr("lifekit._core.health.KEPT_SECONDS", 0.0)
    registry, go_on, begun = Registry(), threading.Event(), list[int]()

    async def check(value: object) -> None:
        begun.append(len(begun))
        if len(begun) == 2:
            await anyio.to_thread.run_sync(go_on.wait)

    db = registry.resource(check=check, name="db")(object)
    assert isinstance(db, Resource)
    async with registry.lifespan() as lifespan:
        with anyio.fail_after(50):
            for _ in range(3):
                health = await lifespan.health()
                assert health.resources["db"].message == "its check took longer than 0.05 s"
        assert len(begun) == 2
        go_on.set()
        monkeypatch.setattr("lifekit._core.health.CHECK_SECONDS", 50.0)
        assert (await lifespan.health()).ready
        assert len(begun) == 3


@backends
def test_a_check_that_was_cancelled_has_failed(backend: str) -> None:
    shop = Checked()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            if backend == "trio":  # where nothing is cancelled but by a scope
                shop.fails = trio.Cancelled._create(source="nursery")  # pyright: ignore
            else:
                shop.fails = asyncio.CancelledError()
            assert (await lifespan.health()).resources["db"] == ResourceHealth(
                "failing", 0.0, "its check was cancelled, not by lifekit"
            )

    run(main, backend)


@backends
def test_a_check_that_asks_for_the_end_of_the_process_ends_the_application(backend: str) -> None:
    shop = Checked()

    async def main() -> None:
        with pytest.raises(SystemExit):
            async with shop.registry.lifespan() as lifespan:
                shop.fails = SystemExit(3)
                await lifespan.health()
                await anyio.sleep_forever()

    run(main, backend)


@backends
def test_it_is_not_ready_while_it_starts_from_the_notice_on_and_after_a_crash(backend: str) -> None:
    shop = Checked()

    @shop.registry.resource(shop.db)
    async def slow(db: object) -> AsyncGenerator[None]:
        await anyio.sleep(5)
        yield
        await anyio.sleep(5)

    @shop.registry.worker(restart="never", on_crash="unready")
    async def outbox() -> None:
        await anyio.sleep(10)
        raise ZeroDivisionError("no luck")

    seen: list[tuple[bool, dict[str, str]]] = []

    async def main() -> None:
        lifespan = shop.registry.lifespan()

        async def look() -> None:
            health = await lifespan.health()
            assert health.live
            seen.append((health.ready, {n: each.state for n, each in health.resources.items()}))

        async with anyio.create_task_group() as tasks:

            async def serve() -> None:
                async with lifespan:
                    await look()
                    await anyio.sleep(11)
                    await look()

            tasks.start_soon(serve)
            await anyio.sleep(2)
            await look()
            await anyio.sleep(16)
            await look()
        assert not (await lifespan.health()).live

    run(main, backend)
    assert seen == [
        (False, {"db": "ok", "slow": "starting", "outbox": "starting"}),
        (True, {"db": "ok", "slow": "ok", "outbox": "ok"}),
        (False, {"db": "ok", "slow": "ok", "outbox": "crashed"}),
        (False, {"db": "ok", "slow": "stopping", "outbox": "crashed"}),
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("mounted", ["/", "/health"])
async def test_the_application_answers_as_orchestrators_ask(mounted: str) -> None:
    shop = Checked()
    app = FastAPI(lifespan=shop.registry.lifespan)
    app.mount(mounted, asgi.health(shop.registry, details=True))
    prefix = mounted.rstrip("/")
    async with testing.client(app) as client:
        ready = await client.get(f"{prefix}/readyz")
        body: dict[str, Any] = ready.json()
        assert ready.status_code == 200
        assert body["resources"].pop("db").pop("seconds") >= 0
        assert body == {"ready": True, "live": True, "resources": {}}
        shop.registry.running[next(iter(shop.registry.running))][0].stopping.set()
        assert (await client.get(f"{prefix}/readyz")).status_code == 503
        alive = await client.get(f"{prefix}/livez")
        assert (alive.status_code, alive.json()["ready"]) == (200, False)
        assert (await client.post(f"{prefix}/livez")).status_code == 405
        assert (await client.get(f"{prefix}/other")).status_code == 404
    transport = httpx.ASGITransport(asgi.health(shop.registry))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        unready = await client.get("/readyz")
        assert (unready.status_code, unready.json()) == (503, {"ready": False, "live": True})
