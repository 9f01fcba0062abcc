"""An application that keeps orders in PostgreSQL and has them paid by somebody else's service."""

# --8<-- [start:resources]
import os
from typing import Annotated

import asyncpg
import httpx2
from fastapi import Depends, FastAPI, HTTPException

from lifekit import Registry

registry = Registry("checkout")


@registry.resource
def db() -> asyncpg.Pool:
    return asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1)


@registry.resource
def payments() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url="https://payments.example")


class Orders:
    def __init__(self, db: asyncpg.Pool, payments: httpx2.AsyncClient) -> None:
        self.db, self.payments = db, payments

    async def place(self, cents: int) -> bool:
        answer = await self.payments.post("/charges", json={"cents": cents})
        if answer.status_code == 201:
            await self.db.execute("INSERT INTO orders VALUES ($1)", cents)
        return answer.status_code == 201


@registry.resource(db, payments)
async def orders(db: asyncpg.Pool, payments: httpx2.AsyncClient) -> Orders:
    await db.execute("CREATE TABLE IF NOT EXISTS orders (cents int NOT NULL)")
    return Orders(db, payments)


# --8<-- [end:resources]
# --8<-- [start:app]
app = FastAPI(lifespan=registry.lifespan)


@app.post("/orders", status_code=201)
async def order(cents: int, orders: Annotated[Orders, Depends(orders)]) -> None:
    if not await orders.place(cents):
        raise HTTPException(402, "the payment was declined")


@app.get("/orders")
async def all_orders(db: Annotated[asyncpg.Pool, Depends(db)]) -> list[int]:
    return [row["cents"] for row in await db.fetch("SELECT cents FROM orders ORDER BY cents")]


# --8<-- [end:app]
