"""Names of statements that SQL prepares: each client has its own, and the session has them all."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .messages import Parse, close

_NAMED = re.compile(
    r"""(?P<before>\s*(?P<verb>prepare|execute|deallocate)\s+(?:prepare\s+(?!all\b|as\b|\())?)
    (?P<name>"(?:[^"]|"")+"|\w+)(?P<behind>.*)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_ALL = re.compile(r"\s*(?:(deallocate)\s+(?:prepare\s+)?all|discard\s+all)\s*", re.IGNORECASE)


class PreparedBySql:
    """What one client's SQL has prepared in a block, and what it has forgotten."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        """The names that the session has for it."""
        self.forgotten: dict[bytes, Parse] = {}
        """What the client had prepared before a DEALLOCATE ALL, which the block undoes."""
        self._marks: dict[int, tuple[set[bytes], set[bytes]]] = {}  # both, as each block began

    def mark(self, depth: int) -> None:
        """Note what there is when a block begins inside another one."""
        self._marks[depth] = set(self.known), set(self.forgotten)

    def back(self, depth: int) -> tuple[list[bytes], dict[bytes, Parse]]:
        """Return what closes all that came with the block inside of *depth*, and what is again."""
        known, forgotten = self._marks.pop(depth + 1, (set[bytes](), set[bytes]()))
        closed = [close(b"S", name) for name in self.known - known]
        self.known &= known
        again = {name: self.forgotten.pop(name) for name in self.forgotten.keys() - forgotten}
        return closed, again

    def close_all(self) -> list[bytes]:
        """Return what closes all that is there."""
        closed = [close(b"S", name) for name in self.known]
        self.known.clear()
        return closed


@dataclass(frozen=True)
class Forgets:
    """A statement that forgets all that is prepared, or more."""

    tag: str


def forgets(text: str) -> Forgets | None:
    """Return what a text is, where it is DEALLOCATE ALL or DISCARD ALL."""
    match = _ALL.fullmatch(text)
    return match and Forgets("DEALLOCATE ALL" if match[1] else "DISCARD ALL")


def renamed(text: str, prefix: str) -> tuple[str, str | None]:
    """Return a text in which the name is the session's; and that name, if it is prepared now."""
    match = _NAMED.fullmatch(text)
    if match is None or (match["verb"].lower() == "deallocate" and forgets(text)):
        return text, None
    name = match["name"]
    own = name[1:-1] if name.startswith('"') else name.lower()
    text = f'{match["before"]}"{prefix}{own}"{match["behind"]}'
    return text, prefix + own.replace('""', '"') if match["verb"].lower() == "prepare" else None
