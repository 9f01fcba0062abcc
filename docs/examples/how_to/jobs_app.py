"""The application: it puts jobs into the queue."""

# --8<-- [start:app]
from typing import Annotated

import redis.asyncio as redis
from fastapi import Depends, FastAPI

from .jobs import jobs, queue

app = FastAPI(lifespan=jobs.lifespan)


@app.post("/mails/{recipient}", status_code=202)
async def mail(recipient: str, queue: Annotated[redis.Redis, Depends(queue)]) -> None:
    await queue.lpush("mails", recipient)


# --8<-- [end:app]
