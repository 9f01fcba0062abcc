"""An application that does all that delays a shutdown: a request and a closing that never end."""

# --8<-- [start:stuck]
from collections.abc import AsyncGenerator

import anyio
from fastapi import FastAPI

from lifekit import Registry

registry = Registry("stuck", close_timeout=10, grace=1)


@registry.resource
async def report() -> AsyncGenerator[str]:
    yield "report"
    await anyio.sleep_forever()


app = FastAPI(lifespan=registry.lifespan)


@app.get("/")
async def never() -> None:
    print("asked", flush=True)
    await anyio.sleep_forever()


# --8<-- [end:stuck]
