"""Annotations that name what is imported for type checkers only, which Python 3.14 evaluates late."""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lifekit import OverrideError, Registry
from lifekit.testing import mock

pytestmark = pytest.mark.anyio

MODULE = """
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Decimal

class Till:
    total: Decimal

    def __init__(self, rate: Decimal) -> None:
        self.rate = rate
        self.is_open = True

    def add(self, amount: Decimal, /) -> list[Decimal]:
        raise NotImplementedError

    async def close(self, last: Decimal | None = None) -> None:
        self.is_open = False

def rate() -> Decimal:
    return 2

async def till(rate: Decimal) -> AsyncIterator[Till]:
    yield Till(rate)

def plain(rate: Decimal, log: Callable[[Decimal], None] = print) -> Till:
    return Till(rate)

def rates(rate: Decimal) -> list[Decimal]:
    return [rate]

async def hidden() -> AsyncIterator[Decimal]:
    yield 2
"""


STYLES = {"texts": "from __future__ import annotations"}
if sys.version_info >= (3, 14):  # elsewhere the module would raise a NameError
    STYLES["evaluated late"] = ""


@pytest.fixture(params=STYLES)
def module(request: pytest.FixtureRequest) -> Any:
    names: dict[str, Any] = {"__name__": __name__}
    exec(STYLES[request.param] + MODULE, names)
    return SimpleNamespace(**names)


async def test_a_factory_and_the_closing_of_its_value_are_taken(module: Any) -> None:
    registry = Registry()
    rate = registry.resource(module.rate)
    till, plain = registry.resource(rate)(module.till), registry.resource(rate)(module.plain)
    async with registry.lifespan() as lifespan:
        assert lifespan[till].rate == lifespan[plain].rate == 2
        made = lifespan[plain]
    assert not made.is_open


@pytest.mark.parametrize("name", ["till", "plain"])
def test_what_it_makes_is_known_all_the_same(module: Any, name: str) -> None:
    registry = Registry()
    handle = registry.resource(registry.resource(module.rate))(getattr(module, name))
    with pytest.raises(OverrideError, match="is a Till, and a str would stand in for it"):
        registry.override(handle, "")
    fake = mock(handle)
    assert fake.add(1) is not None
    with pytest.raises(TypeError, match="missing a required"):
        fake.add()
    assert fake.total() is not None
    with pytest.raises(AttributeError, match="has no attribute 'sum'"):
        _ = fake.sum


def test_a_generic_class_is_known_without_its_parameter(module: Any) -> None:
    registry = Registry()
    handle = registry.resource(registry.resource(module.rate))(module.rates)
    with pytest.raises(OverrideError, match="is a list, and a str would stand in for it"):
        registry.override(handle, "")


@pytest.mark.parametrize("name", ["rate", "hidden"])
def test_a_class_that_is_not_known_may_be_anything(module: Any, name: str) -> None:
    registry = Registry()
    handle = registry.resource(getattr(module, name))
    with registry.override(handle, "2"):
        ...
    with pytest.raises(
        OverrideError, match=r"is annotated '.*Decimal\]?', .* not defined\)\. Import it"
    ):
        mock(handle)
