"""An application of which one process closes slowly, and the other at once."""

import os
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
from fastapi import FastAPI

from lifekit import Registry

registry = Registry("uneven")


@registry.resource
async def report() -> AsyncGenerator[str]:
    place = Path(os.environ["PLACE"])
    try:
        (place / "first").mkdir()
    except FileExistsError:
        yield "fast"
    else:
        yield "slow"
        await anyio.sleep(1)
        (place / "slow").touch()


app = FastAPI(lifespan=registry.lifespan)
