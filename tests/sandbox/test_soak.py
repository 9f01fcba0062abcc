"""Random applications, cut off at random: nothing hangs, and nothing is left. See `soak`."""

from __future__ import annotations

import asyncio
import os

import pytest

from .soak import soak

BLOCKS = int(os.environ.get("LIFEKIT_SOAK_BLOCKS", "40"))
SEED = int(os.environ.get("LIFEKIT_SOAK_SEED", "1"))

pytestmark = [pytest.mark.proof, pytest.mark.timeout(0), pytest.mark.filterwarnings("ignore")]


def test_whatever_is_cut_off_nothing_hangs_and_nothing_is_left() -> None:
    """The server, too, is killed every so often."""
    figures = asyncio.run(soak(BLOCKS, SEED, crash_every=15))
    print(figures)
    assert figures.blocks == BLOCKS
    assert figures.outcomes["fine"] > BLOCKS
    assert min(figures.cancelled, figures.crashes) > 0
