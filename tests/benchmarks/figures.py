"""Figures of the page, as tables and as bars; pure, so that the same numbers give the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from .measure import Row

# Each at least 3.5 to 1 on white, and on the site's dark background: an image can't know which.
TEXT, PLAIN, OURS, FLOOR = "#7a7f8a", "#8f949e", "#4f7fe0", "#d9534f"
BACKGROUNDS = ("#ffffff", "#1e2129")
WIDTH, LABELS, ROW, TOP, FONT = 520, 200, 26, 4, 12


@dataclass(frozen=True, eq=False)
class Figure:
    """One comparison: its rows' key, its title, and what to call its rows."""

    key: str
    title: str
    floor: str
    per: str
    labels: dict[str, str] = field(default_factory=dict[str, str])
    ours: str = "lifekit"
    within: float = 0.0
    """A difference of so much of the floor is none, where rounds differ by less."""

    def label(self, name: str) -> str:
        """Return what a row is called."""
        return self.labels.get(name, name)


def shown(seconds: float, unit: Literal["ms", "us", "B"] | str) -> str:
    """Return a time with three digits, or fewer where it is small."""
    scale, name = (1e6, "µs") if unit == "us" else (1e3, "ms")
    value = seconds * scale
    digits = 0 if abs(value) >= 99.5 else 1 if abs(value) >= 9.95 else 2
    return f"{value:,.{digits}f} {name}".replace("-0.00 ", "0.00 ")


def roughly(value: float) -> str:
    """Return a number with two digits."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2g}"


def ordered(figure: Figure, rows: dict[str, Row]) -> list[tuple[str, Row]]:
    """Return the floor, the others from the fastest to the slowest, and those that are missing."""
    return sorted(
        rows.items(),
        key=lambda item: (bool(item[1].missing), item[0] != figure.floor, item[1].ours),
    )


def compared(figure: Figure, rows: dict[str, Row]) -> str:
    """Say in words who is faster than lifekit, who is slower, and who is neither."""
    ours = rows[figure.ours]
    groups: dict[str, list[str]] = {"faster": [], "alike": [], "slower": []}
    for name, row in ordered(figure, rows):
        if row.missing or name in (figure.floor, figure.ours):
            continue
        apart = abs(row.ratio - ours.ratio) > figure.within * ours.ratio
        if apart and row.high < ours.low:
            groups["faster"].append(figure.label(name))
        elif apart and row.low > ours.high:
            groups["slower"].append(figure.label(name))
        else:
            groups["alike"].append(figure.label(name))
    faster = ", ".join(groups["faster"]) or "none"
    rest = [
        f"{text}: {', '.join(groups[group])}."
        for text, group in (("As fast", "alike"), ("Slower", "slower"))
        if groups[group]
    ]
    return " ".join([f"Faster than lifekit: {faster}.", *rest])


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def as_table(figure: Figure, rows: dict[str, Row]) -> str:
    """Return the figure as a Markdown table."""
    lines = [
        f"| {figure.title} | {figure.per} | above the floor | times the floor | half of the rounds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in ordered(figure, rows):
        label = f"**{figure.label(name)}**" if name == figure.ours else figure.label(name)
        if row.missing:
            lines.append(f"| {label} | was not installed | | | |")
        elif name == figure.floor:
            lines.append(f"| *{label}* (the floor) | {shown(row.ours, row.unit)} | | 1 | |")
        else:
            more = shown(row.floor * (row.ratio - 1), row.unit)
            lines.append(
                f"| {label} | {shown(row.ours, row.unit)} | {more} | {times(row.ratio)} "
                f"| {times(row.low)} to {times(row.high)} |"
            )
    return "\n".join(lines)


def times(ratio: float) -> str:
    """Return a ratio with three digits."""
    return f"{ratio:.0f}" if ratio >= 99.5 else f"{ratio:.1f}" if ratio >= 9.95 else f"{ratio:.2f}"


def overview(figures: dict[Figure, dict[str, Row]]) -> str:
    """Return a table of who is fastest in each figure, and where lifekit comes in."""
    lines = ["| | fastest | lifekit | place |", "|---|---|---:|---:|"]
    for figure, rows in figures.items():
        others = [
            (name, row)
            for name, row in ordered(figure, rows)
            if not row.missing and name != figure.floor
        ]
        fastest, row = others[0]
        place = [name for name, _ in others].index(figure.ours) + 1
        ours = rows[figure.ours]
        lines.append(
            f"| {figure.title} | {figure.label(fastest)}, {times(row.ratio)} "
            f"| {times(ours.ratio)} | {place} of {len(others)} |"
        )
    return "\n".join(lines)


def as_svg(figure: Figure, rows: dict[str, Row]) -> str:
    """Return the figure as bars, with a line where the floor is."""
    present = [(name, row) for name, row in ordered(figure, rows) if not row.missing]
    most = max(row.ours for _, row in present)
    room = WIDTH - LABELS - 70
    height = TOP + ROW * len(present) + 6
    floor = rows[figure.floor]
    line = LABELS + room * floor.ours / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"',
        f'  font-family="system-ui, sans-serif" font-size="{FONT}" font-weight="600" fill="{TEXT}">',
        f"<title>{escape(figure.title)}, {escape(figure.per)}</title>",
    ]
    for index, (name, row) in enumerate(present):
        top = TOP + ROW * index
        width = max(room * row.ours / most, 1)
        colour = OURS if name == figure.ours else PLAIN
        label = escape(figure.label(name))
        parts += [
            f'<text x="{LABELS - 8}" y="{top + 16}" text-anchor="end">{label}</text>',
            f'<rect x="{LABELS}" y="{top + 4}" width="{width:.1f}" height="16" fill="{colour}"/>',
            f'<text x="{LABELS + width + 6:.1f}" y="{top + 16}">{shown(row.ours, row.unit)}</text>',
        ]
    parts += [
        f'<path d="M{line:.1f} {TOP - 2}V{height - 4}" stroke="{FLOOR}" stroke-dasharray="4 3"/>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
