"""A start or a stop as a picture: a bar for each resource along the time axis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

WIDTH = 48


@dataclass(frozen=True, slots=True)
class Span:
    """When one resource opened, or closed: seconds since the start, or the stop, began."""

    resource: str
    began: float
    ended: float
    critical: bool = False
    """Whether it is on the critical path: the chain that made the whole take this long."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one start or stop; ``print`` it."""

    title: str
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """How long the whole took."""
        return max((span.ended for span in self.spans), default=0.0)

    @property
    def critical_path(self) -> tuple[str, ...]:
        """The names of the chain that made the whole take this long, in the order they ran."""
        return tuple(span.resource for span in self.spans if span.critical)

    def __str__(self) -> str:
        """Return the picture: bars on the critical path are solid, the others light."""
        names = max((len(span.resource) for span in self.spans), default=0)
        total = self.seconds or 1.0
        lines = [f"{self.title} (█ critical path)"]
        for span in self.spans:
            left = min(round(span.began / total * WIDTH), WIDTH - 1)
            right = max(left + 1, round(span.ended / total * WIDTH))
            bar = " " * left + ("█" if span.critical else "░") * (right - left)
            lines.append(f"  {span.resource:<{names}} │{bar:<{WIDTH}}│ {span.seconds:.3f} s")
        return "\n".join(lines)


def timeline(
    title: str,
    names: Sequence[str],
    times: Sequence[tuple[float | None, float | None]],
    before: Sequence[Sequence[int]],
    began: float,
    *,
    last_first: bool = False,
    behind: Collection[int] = (),
) -> Timeline:
    """Build a timeline.

    *times* holds each resource's begin and end, None where there was none; *before* the positions of
    what each had to wait for; *began* is the time of the whole's begin, on the same clock.
    Of those that begin together the first declared comes first, or the last where *last_first*.
    Those *behind* waited for all the others, and are on no critical path.
    """
    ran = {
        index: (begin, end)
        for index, (begin, end) in enumerate(times)
        if begin is not None and end is not None
    }
    critical: set[int] = set()
    latest = max(ran.keys() - behind, key=lambda index: (ran[index][1], -index), default=None)
    while latest is not None:
        critical.add(latest)
        earlier = [index for index in before[latest] if index in ran]
        latest = max(earlier, key=lambda index: ran[index][1], default=None)
    ranked = sorted(ran, key=lambda index: (ran[index][0], -index if last_first else index))
    spans = [
        Span(names[index], ran[index][0] - began, ran[index][1] - began, index in critical)
        for index in ranked
    ]
    seconds = max((end - began for _, end in ran.values()), default=0.0)
    return Timeline(
        f"{title} in {seconds:.3f} s, {len(spans)} resource{'s'[: len(spans) != 1]}", tuple(spans)
    )
