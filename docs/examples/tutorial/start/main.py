from typing import Annotated

import asyncpg
from fastapi import Depends, FastAPI
from pydantic import BaseModel

import resources

app = FastAPI(title="Guestbook", lifespan=resources.registry.lifespan)

Db = Annotated[asyncpg.Pool, Depends(resources.db)]


class Entry(BaseModel):
    name: str
    text: str


@app.post("/entries", status_code=201)
async def sign(entry: Entry, db: Db) -> Entry:
    await db.execute(
        "INSERT INTO entries (name, text) VALUES ($1, $2)",
        entry.name,
        entry.text,
    )
    return entry


@app.get("/entries")
async def read(db: Db) -> list[Entry]:
    rows = await db.fetch("SELECT name, text FROM entries ORDER BY id")
    return [Entry(**row) for row in rows]
