"""An application that is mounted into another: its registry becomes a part of the other's."""

from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from lifekit import Registry

shop_registry = Registry("shop")


@shop_registry.resource
def motd() -> str:
    print("the shop opens")
    return "welcome"


shop = FastAPI(lifespan=shop_registry.lifespan)


@shop.get("/motd")
async def read_motd(motd: Annotated[str, Depends(motd)]) -> str:
    return motd


registry = Registry("app")
registry.include(shop_registry)
app = FastAPI(lifespan=registry.lifespan)
app.mount("/shop", shop)

with TestClient(app) as client:
    print(client.get("/shop/motd").json())
