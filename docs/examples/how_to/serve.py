"""An application that serves itself: ``python -m how_to.serve``."""

# --8<-- [start:serve]
import logging

import uvicorn
from fastapi import FastAPI

from lifekit import Registry

registry = Registry("shop", close_timeout=5, grace=10)


@registry.resource
async def greeting() -> str:
    return "hello"


app = FastAPI(lifespan=registry.lifespan)


@app.get("/")
async def greet() -> str:
    return greeting.get()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)  # lifekit's lines beside uvicorn's own
    uvicorn.run("how_to.serve:app", port=0, timeout_graceful_shutdown=10)
# --8<-- [end:serve]
