"""An engine of SQLAlchemy made at import: one event loop poisons it for all that follow."""

import asyncio
import os

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

url = os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:")
engine = create_async_engine(url)


async def main() -> None:
    try:
        async with engine.connect() as connection:
            print(await connection.scalar(text("SELECT 1")))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


for _ in range(4):
    asyncio.run(main())
