"""The tests of the library application."""

# --8<-- [start:tests]
from httpx2 import AsyncClient
from sqlalchemy import func, select

from how_to import library
from lifekit import Lifespan


async def test_an_added_book_is_listed(client: AsyncClient) -> None:
    await client.put("/books/Emma")
    await client.put("/books/Persuasion")

    assert (await client.get("/books")).json() == ["Emma", "Persuasion"]


async def test_nothing_is_left_of_what_the_application_committed(lifespan: Lifespan) -> None:
    async with lifespan[library.sessions]() as session:
        assert await session.scalar(select(func.count()).select_from(library.Book)) == 0


# --8<-- [end:tests]
