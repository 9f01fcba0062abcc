"""A script that stands still at each of its moments, until it is told to go on.

``python -m tests.apps.script RUNNER``, where RUNNER is one of `RUNNERS`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import AsyncGenerator, Callable

import anyio

from lifekit import Registry

from .notes import note, told

registry = Registry("script", start_timeout=60, close_timeout=60, grace=120)


@registry.resource
async def first() -> AsyncGenerator[None]:
    yield
    await told("close-first", saying="close-first")
    note("first closed")


@registry.resource(first)
async def second(first: None) -> AsyncGenerator[None]:
    await told("open-second", saying="open-second")
    note("second opened")
    yield
    await told("close-second", saying="close-second")
    note("second closed")


@registry.resource(first, close_timeout=0.2)
async def stuck(first: None) -> AsyncGenerator[None]:
    """Its closing never ends by itself."""
    yield
    note("stuck closing")
    await anyio.sleep_forever()


async def main() -> None:
    """Run until the end of the body, or an interrupt."""
    async with registry.lifespan():
        await told("body", saying="body")


def _in_runner() -> None:
    with asyncio.Runner() as runner:
        runner.run(main())


RUNNERS: dict[str, Callable[[], object]] = {
    "asyncio": lambda: asyncio.run(main()),
    "runner": _in_runner,
    "uvloop": lambda: importlib.import_module("uvloop").run(main()),
    "trio": lambda: importlib.import_module("trio").run(main),
    "anyio": lambda: anyio.run(main),
}

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    RUNNERS[sys.argv[1]]()
