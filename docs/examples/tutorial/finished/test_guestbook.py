from httpx2 import AsyncClient

ANN = {"name": "Ann", "text": "Hello!"}


async def test_an_entry_can_be_read(client: AsyncClient) -> None:
    await client.post("/entries", json=ANN)
    page = await client.get("/entries")
    assert page.json() == {"visits": 1, "entries": [ANN]}
