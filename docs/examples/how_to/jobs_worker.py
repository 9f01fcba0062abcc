"""The worker: it takes jobs from the queue until a signal comes."""

# --8<-- [start:worker]
import signal
from collections.abc import AsyncIterator

import anyio

from .jobs import db, jobs, queue


async def main() -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with jobs.lifespan() as lifespan, anyio.create_task_group() as tasks:
            stop = anyio.Event()
            tasks.start_soon(note_signal, signals, stop)
            while not stop.is_set():
                if job := await lifespan[queue].brpop(["mails"], timeout=1):
                    await lifespan[db].execute("INSERT INTO mails VALUES ($1)", job[1])
                    print("sent a mail to", job[1], flush=True)
            tasks.cancel_scope.cancel()


async def note_signal(signals: AsyncIterator[signal.Signals], stop: anyio.Event) -> None:
    async for _ in signals:
        stop.set()


if __name__ == "__main__":
    anyio.run(main)
# --8<-- [end:worker]
