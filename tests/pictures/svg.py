"""Pictures as plain SVG, in the text's own colour and one more that is seen on white and on dark.

They are put into the pages themselves, so that they follow the site's scheme; ids begin with the
picture's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 480
BLUE = "#6c7bcb"
LETTER = 7.25
"""The width of a letter of the names, at most."""

ROW = 24
BAR = 14


@dataclass(frozen=True)
class Bar:
    """What lasts from one second to another; *strong* is what the picture is about."""

    began: float
    ended: float
    strong: bool = False


@dataclass(frozen=True)
class Row:
    """A name, its bars, and what is written behind the last one."""

    name: str
    bars: tuple[Bar, ...]
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """Rows along one axis of seconds, with a title above."""

    title: str
    rows: tuple[Row, ...]


def picture(name: str, height: float, title: str, description: str, body: Iterable[str]) -> str:
    """Return a whole picture."""
    labelled = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    size = f'viewBox="0 0 {WIDTH} {number(height)}" width="100%" style="max-width: 30rem"'
    font = 'font-family="sans-serif" font-size="13" fill="currentColor" stroke="none"'
    lines = [
        f'<svg {size} {labelled} xmlns="http://www.w3.org/2000/svg" {font}>',
        f'<title id="{name}-title">{escape(title)}</title>',
        f'<desc id="{name}-desc">{escape(description)}</desc>',
        *body,
        "</svg>\n",
    ]
    return "\n".join(lines)


def text(x: float, y: float, words: str, *, more: str = "", code: bool = False) -> str:
    """Return a line of text; *code* has letters of one width."""
    font = ' font-family="ui-monospace, monospace" font-size="12"' if code else ""
    return f'<text x="{number(x)}" y="{number(y)}"{font}{more}>{escape(words)}</text>'


def number(value: float) -> str:
    """Return a number as short as it can be written."""
    return f"{value:.1f}".removesuffix(".0")


def timeline(name: str, title: str, description: str, panels: Sequence[Panel]) -> str:
    """Return panels of bars, one below the other, whose seconds are equally wide."""
    rows = [row for panel in panels for row in panel.rows]
    left = 4 + LETTER * max(len(row.name) for row in rows) + 10
    room = max(len(row.note) for row in rows) * 7.8 + 8
    seconds = max(bar.ended for row in rows for bar in row.bars)
    scale = (WIDTH - left - room) / seconds
    body: list[str] = []
    y = 0.0
    for panel in panels:
        body.append(text(4, y + 18, panel.title, more=' font-weight="bold"'))
        y += 28
        height = ROW * len(panel.rows)
        body.append(f'<path d="M{number(left)} {number(y)} v{height}" stroke="currentColor"/>')
        for row in panel.rows:
            body += _row(row, left, y, scale)
            y += ROW
        y += 10
    return picture(name, y, title, description, body)


def _row(row: Row, left: float, y: float, scale: float) -> Iterable[str]:
    yield text(4, y + 16, row.name, code=True)
    end = left
    for bar in row.bars:
        x, end = left + bar.began * scale, left + bar.ended * scale
        end = max(end, x + 2)
        fill = "" if bar.strong else ' fill-opacity="0.25"'
        yield (
            f'<rect x="{number(x)}" y="{number(y + (ROW - BAR) / 2)}" width="{number(end - x)}"'
            f' height="{BAR}" fill="{BLUE}"{fill} stroke="{BLUE}"/>'
        )
    if row.note:
        yield text(end + 6, y + 16, row.note)
