"""taskiq: a worker process has one lifespan, in the loop that its tasks run in."""

# --8<-- [start:taskiq]
import os

from taskiq import TaskiqEvents, TaskiqState
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

from .jobs import db, store

broker = ListQueueBroker(os.environ["REDIS_URL"]).with_result_backend(
    RedisAsyncResultBackend(os.environ["REDIS_URL"])
)


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def start(state: TaskiqState) -> None:
    state.lifespan = await store.lifespan().__aenter__()


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def stop(state: TaskiqState) -> None:
    await state.lifespan.__aexit__(None, None, None)


@broker.task
async def send(recipient: str) -> int:
    await db.get().execute("INSERT INTO mails VALUES ($1)", recipient)
    return os.getpid()


# --8<-- [end:taskiq]
