"""The outbox is tested without waiting for anything."""

from __future__ import annotations

# --8<-- [start:test]
from how_to.outbox import delivered, purge, registry
from lifekit import testing


async def test_purge_keeps_the_last_hundred() -> None:
    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            lifespan[delivered].extend(map(str, range(150)))
            await lifespan.run_once(purge)
            assert lifespan[delivered][0] == "50"


# --8<-- [end:test]
