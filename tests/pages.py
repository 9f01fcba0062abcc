"""The pages of the documentation, as tests read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)
_HEADING = re.compile(r"^## (.+)$", re.M)


def name(page: Path) -> str:
    """Return a page's path as it is written."""
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> Iterator[tuple[str, str]]:
    """Yield the rest of the first line, and the lines, of each block of code in a page's text."""
    for found, header, lines in _BLOCK.findall(text):
        if found == language:
            yield header, lines


def sections(page: Path) -> dict[str, str]:
    """Return the texts between a page's headings of the second level."""
    _, *parts = _HEADING.split(page.read_text("utf-8"))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def plain(text: str) -> str:
    """Return a text without its line breaks and indents."""
    return " ".join(text.split())


def pattern(message: str) -> re.Pattern[str]:
    """Return what matches a message whose variable parts are written as ``…``."""
    return re.compile(re.escape(plain(message)).replace("…", ".*?"), re.S)


def entries(section: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the messages in each heading of the third level, and those in the blocks below it."""
    _, *parts = re.split(r"^### (.+)$", section, flags=re.M)
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        yield re.findall(r"`([^`]+)`", heading), [plain(each) for _, each in blocks(text, "text")]


def words(message: str) -> list[str]:
    """Return the constant parts of a message."""
    return [part for each in message.split("…") if (part := plain(each)).strip("\"'`.,:;()<>=/ ")]
