"""A worker process: ``python -m tests.apps.worker_process WHAT``: one of `MAINS`, or its fate."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable

import anyio

import lifekit
from lifekit import Lifespan, Registry

from .notes import note, told

WHAT = sys.argv[1] if len(sys.argv) > 1 else ""
SECRET = "postgresql://shop:hunter2@db/shop"

registry = Registry("shop", close_timeout=60, grace=120)


@registry.resource
async def db() -> AsyncGenerator[str]:
    if WHAT == "fails-to-start":
        raise ConnectionError(f"no way to {SECRET}")
    if WHAT == "starts-slowly":
        note("opening")
        await anyio.sleep_forever()
    yield "db"
    note("closed")


@registry.worker(db, drain=60.0, restart="never")
async def outbox(db: str) -> None:
    if WHAT == "crashes":
        raise ValueError(f"no way to {SECRET}")
    note("working")
    await lifekit.stopping().wait()
    await told("finish", saying="finishing")
    note("finished")


async def returns(lifespan: Lifespan) -> None:
    assert lifespan[db] == "db"
    note("main returns")


async def stops(lifespan: Lifespan) -> None:
    lifespan.stop("it is done")
    await anyio.sleep_forever()


async def raises(lifespan: Lifespan) -> None:
    raise ValueError(f"no way to {SECRET}")


async def exits(lifespan: Lifespan) -> None:
    sys.exit(3)


async def ignores(lifespan: Lifespan) -> None:
    with anyio.CancelScope(shield=True):
        note("ignoring")
        await lifekit.stopping().wait()
        note("noticed")
        await anyio.sleep_forever()


MAINS: dict[str, Callable[[Lifespan], Awaitable[None]]] = {
    each.__name__: each for each in (returns, stops, raises, exits, ignores)
}

if __name__ == "__main__":
    sys.exit(registry.run(MAINS.get(WHAT)))
