"""arq: a worker has one lifespan, in the loop that its jobs run in."""

# --8<-- [start:arq]
import os
from typing import Any

from arq.connections import RedisSettings

from .jobs import db, store


async def send(ctx: dict[str, Any], recipient: str) -> int:
    await db.get().execute("INSERT INTO mails VALUES ($1)", recipient)
    return os.getpid()


async def start(ctx: dict[str, Any]) -> None:
    ctx["lifespan"] = await store.lifespan().__aenter__()


async def stop(ctx: dict[str, Any]) -> None:
    await ctx["lifespan"].__aexit__(None, None, None)


class WorkerSettings:
    functions = (send,)
    on_startup = start
    on_shutdown = stop
    redis_settings = RedisSettings.from_dsn(os.environ["REDIS_URL"])


# --8<-- [end:arq]
