"""The same test, with lifekit's own fixture."""

# --8<-- [start:after]
from httpx2 import AsyncClient


async def test_it_multiplies(client: AsyncClient) -> None:
    assert (await client.get("/times/21")).json() == 42


# --8<-- [end:after]
