import os
from contextlib import AbstractAsyncContextManager

import asyncpg
from lifekit import Registry, embedded
from lifekit.events import Event, Started, Stopped


def show(event: Event) -> None:
    if isinstance(event, Started | Stopped):
        print(event.timeline)


registry = Registry("guestbook", on_event=show)


@registry.resource
def postgres() -> AbstractAsyncContextManager[embedded.Server]:
    return embedded.postgres(os.environ.get("DATABASE_URL"))


@registry.resource(postgres)
def db(postgres: embedded.Server) -> asyncpg.Pool:
    return asyncpg.create_pool(postgres.url)


@registry.resource(db)
async def tables(db: asyncpg.Pool) -> None:
    await db.execute(
        "CREATE TABLE IF NOT EXISTS entries (id serial, name text, text text)"
    )
