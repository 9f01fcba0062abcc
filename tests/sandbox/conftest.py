"""What the tests of one client compare its applications in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from lifekit.embedded import Server

from .differential import Worlds, worlds_of


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, postgres: Server) -> Iterator[Worlds]:
    """Production and a sandbox for the module's ``CLIENT``."""
    module: Any = cast(Any, request).module
    with worlds_of(postgres, module.CLIENT) as worlds:
        yield worlds
