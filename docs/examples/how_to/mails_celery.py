"""Celery: each process of a worker has a lifespan of its own, from its start to its end."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

# --8<-- [start:celery]
import os
from typing import Any

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

from .jobs import db, store

mails = Celery("mails", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
lifespan = store.blocking()


@worker_process_init.connect
def start(**_: Any) -> None:
    lifespan.__enter__()


@worker_process_shutdown.connect
def stop(**_: Any) -> None:
    lifespan.__exit__(None, None, None)


@mails.task
def send(recipient: str) -> int:
    lifespan.call(lifespan[db].execute, "INSERT INTO mails VALUES ($1)", recipient)
    return os.getpid()


# --8<-- [end:celery]
