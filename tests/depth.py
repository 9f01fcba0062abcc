"""How much is tried: what `make test` leaves to `make test-long`, and how often that asks chance."""

import os

import pytest

TIMES = int(os.environ.get("TIMES", "1"))
"""`make test-long TIMES=10` asks chance ten times as often."""

LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop", marks=pytest.mark.long),
]
"""Those of drivers that are asyncio's own."""
