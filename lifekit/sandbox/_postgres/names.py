"""Names of statements that SQL prepares: each client has its own, and the session has them all."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMED = re.compile(
    r"""(?P<before>\s*(?P<verb>prepare|execute|deallocate)\s+(?:prepare\s+(?!all\b|as\b|\())?)
    (?P<name>"(?:[^"]|"")+"|\w+)(?P<behind>.*)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_ALL = re.compile(r"\s*(?:(deallocate)\s+(?:prepare\s+)?all|discard\s+all)\s*", re.IGNORECASE)


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
