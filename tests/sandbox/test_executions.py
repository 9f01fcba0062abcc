"""What is sent once is run once. See `executions`."""

from __future__ import annotations

import asyncio

import pytest

from lifekit.embedded import Server

from ..depth import TIMES
from .executions import CLIENTS, compare

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("runs", [30, pytest.param(150 * TIMES, marks=pytest.mark.long)])
def test_rows_and_sequences_are_those_of_a_fresh_database(postgres: Server, runs: int) -> None:
    """Of many rows at once, in and outside of transactions, failing or not."""
    found = asyncio.run(compare(postgres, runs, seed=runs))
    assert not [each for differing in found.values() for each in differing]
    assert len(found) >= len(CLIENTS)
