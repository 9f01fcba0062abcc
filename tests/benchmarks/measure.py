"""How benchmarks are taken and shown: floor and ours in turns, one row for each comparison."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import anyio

Take = Callable[[], Awaitable[float]]
"""Runs one thing once and returns what it cost, in seconds or in bytes."""

Collector = Literal["on", "frozen", "off"]
"""The garbage collector: as Python starts it, blind to what was there before, or off."""

Unit = Literal["ms", "us", "B"]
_SHOWN = {"ms": "ms", "us": "µs", "B": "B"}
_PER_UNIT = {"ms": 1e3, "us": 1e6, "B": 1.0}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; *floor* and *ours* are in seconds or in bytes."""

    what: str
    floor: float
    ours: float
    ratio: float
    unit: Unit
    most: float = math.inf
    """The bar: the highest ratio allowed."""
    most_more: float = math.inf
    """The other kind of bar: by how much *ours* may exceed *floor*, in their own unit."""
    key: str = ""
    """``figure/contestant``, or a name by itself: under which it is saved."""
    low: float = math.nan
    """A quarter of the rounds had a smaller ratio."""
    high: float = math.nan
    """A quarter of the rounds had a higher ratio."""
    each: int = 1
    """How many tests *floor* and *ours* are for."""
    missing: str = ""
    """The package that is not installed, so that nothing was measured."""

    @property
    def has_bar(self) -> bool:
        """Whether there is a bar; without one the row is information."""
        return min(self.most, self.most_more) < math.inf

    @property
    def met(self) -> bool:
        """Whether it keeps its bar."""
        return self.ratio <= self.most and self.ours - self.floor <= self.most_more

    def cells(self) -> tuple[str, ...]:
        """Return what the table shows."""
        if self.missing:
            return (self.what, "", "", "", "", f"{self.missing} is not installed")
        scale, unit = _PER_UNIT[self.unit], _SHOWN[self.unit]
        bar = verdict = ""
        if self.most < math.inf:
            bar = f"{self.most:.2f} x"
        elif self.most_more < math.inf:
            bar = f"+{self.most_more * scale:.2f} {unit}"
        if self.has_bar:
            verdict = "met" if self.met else "NOT MET"
        digits = {"ms": 1, "us": 2, "B": 0}[self.unit]
        numbers = [f"{value * scale:,.{digits}f} {unit}" for value in (self.floor, self.ours)]
        return (self.what, *numbers, f"{self.ratio:.3f}", bar, verdict)


HEADER = ("what", "floor", "ours", "ratio", "bar", "")


def table(rows: Sequence[Row]) -> str:
    """Return the table as text."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


async def interleave(rounds: int, *takes: Take) -> list[list[float]]:
    """Return what each of *takes* cost in each round, after a warm-up that does not count."""
    # In turns, so that a host that gets slower meanwhile slows each of them by as much.
    for take in takes:
        await take()
    costs: list[list[float]] = [[] for _ in takes]
    for _ in range(rounds):
        for cost, take in zip(costs, takes, strict=True):
            cost.append(await take())
    return costs


def best_ratio(floor: Sequence[float], ours: Sequence[float]) -> float:
    """Return the least of *ours* over the least of *floor*.

    For what is long or rare: noise only adds, so the least is the nearest to the cost itself.
    """
    return min(ours) / min(floor)


def paired_ratio(floor: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median of the ratios of neighbours in time.

    For what is short and often taken: both neighbours ran at the same speed of the host, and one
    lucky or unlucky round counts for nothing.
    """
    return statistics.median(mine / base for base, mine in zip(floor, ours, strict=True))


def contest(
    figure: str, costs: dict[str, list[float] | None], unit: Unit, *, floor: str | None = None
) -> list[Row]:
    """Return one row for each contestant, against *floor* or the first one of them.

    Ratios are those of neighbours in time; the floor's time is its median, the others' follow.
    """
    base = costs[floor or next(iter(costs))]
    assert base is not None
    rows: list[Row] = []
    for name, cost in costs.items():
        key, what = f"{figure}/{name}", f"{figure}: {name}"
        if cost is None:
            rows.append(Row(what, math.nan, math.nan, math.nan, unit, key=key, missing=name))
            continue
        ratios = [mine / of_floor for of_floor, mine in zip(base, cost, strict=True)]
        low, middle, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        took = statistics.median(base)
        rows.append(Row(what, took, took * middle, middle, unit, key=key, low=low, high=high))
    return rows


@contextmanager
def collecting(mode: Collector) -> Generator[None]:
    """Run a block with the garbage collector in *mode*, and none of what came before to collect."""
    gc.collect()
    if mode == "frozen":
        gc.freeze()
    elif mode == "off":
        gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if mode == "frozen":
            gc.unfreeze()


BACKENDS = ("asyncio", "uvloop", "trio")


def on(backend: str, measured: Callable[[], Awaitable[list[Row]]]) -> list[Row]:
    """Run a benchmark on ``asyncio``, ``uvloop`` or ``trio``."""
    if backend == "trio":
        return anyio.run(measured, backend="trio")
    return anyio.run(measured, backend_options={"use_uvloop": backend == "uvloop"})
