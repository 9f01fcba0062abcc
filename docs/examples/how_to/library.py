"""An application on SQLAlchemy: one engine for each lifespan, one session for each request."""

# --8<-- [start:model]
import os
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lifekit import Registry


class Base(DeclarativeBase): ...


class Book(Base):
    __tablename__ = "books"
    title: Mapped[str] = mapped_column(primary_key=True)


# --8<-- [end:model]
# --8<-- [start:resources]
registry = Registry("library")


@registry.resource(retry=3)
def engine() -> AsyncEngine:
    url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://", 1)
    return create_async_engine(url)


@registry.resource(engine)
async def tables(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@registry.resource(engine, after=[tables])
def sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


# --8<-- [end:resources]
# --8<-- [start:app]
app = FastAPI(lifespan=registry.lifespan)
Sessions = Annotated[async_sessionmaker[AsyncSession], Depends(sessions)]


async def session(sessions: Sessions) -> AsyncGenerator[AsyncSession]:
    async with sessions.begin() as session:  # commits at the end, or rolls back after an error
        yield session


@app.put("/books/{title}", status_code=204)
async def add(title: str, session: Annotated[AsyncSession, Depends(session, scope="function")]) -> None:
    session.add(Book(title=title))


@app.get("/books")
async def books(session: Annotated[AsyncSession, Depends(session)]) -> list[str]:
    return list(await session.scalars(select(Book.title).order_by(Book.title)))


# --8<-- [end:app]
