"""Passwords taken out of every text that lifekit shows."""

import re
from contextlib import suppress
from typing import Any, cast

# Servers' own parsers disagree on which characters a password may hold as they are. In doubt too
# much is taken out: up to the last @ of the authority, or even beyond a slash; but no port.
_URL = re.compile(
    r"(?P<before>(?<![a-z0-9+.\-])[a-z][a-z0-9+.\-]*://[^\s:/?#]*:)(?!\d{1,5}[/?#])"
    r"(?:[^\s/]+|\S{1,256})(?=@)",
    re.IGNORECASE,
)
_QUOTED = r"""'(?:\\.|[^'\\])*(?:'|\\?\Z)|"(?:\\.|[^"\\])*(?:"|\\?\Z)"""
_KEY = r"\w*(?:password|passwd|secret|token)"
_PAIRS = [
    re.compile(rf"(?P<before>{before})(?:{value})", re.IGNORECASE | re.DOTALL)
    for before, value in [
        (rf"[?&]{_KEY}=", r"[^\s&]+"),
        (rf"(?P<quote>['\"]){_KEY}(?P=quote)\s*:\s*", rf"{_QUOTED}|[^\s,\]}}]+"),
        # Bare values end at a space; a comma or bracket behind them is punctuation.
        (
            rf"(?<![/?&\w])(?:{_KEY}\s*=|\w*(?:password|passwd)\s*:)\s*",
            rf"{_QUOTED}|(?:\\.|[^\s\\])*[^\s\\,;)\]}}]|\S+",
        ),
    ]
]


def redact_error(error: BaseException) -> None:
    """Redact the texts that *error*, its causes and the errors it holds were made with.

    Whoever prints the traceback of a failed start prints the driver's own words, DSN and all.
    """
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        with suppress(Exception):  # an error whose class forbids it
            _redact_texts(each)
        group = cast("BaseExceptionGroup[BaseException]", each)
        held = group.exceptions if isinstance(each, BaseExceptionGroup) else ()
        left += [linked for linked in (each.__cause__, each.__context__, *held) if linked is not None]


def _redact_texts(error: BaseException) -> None:
    if hasattr(error, "__notes__"):
        error.__notes__ = [_redacted(note) for note in error.__notes__]
    if isinstance(error, OSError):  # it shows these, whatever its args are
        for name in ("strerror", "filename", "filename2"):
            if isinstance(text := getattr(error, name), str):
                setattr(error, name, redact(text))
    if not isinstance(error, BaseExceptionGroup):
        error.args = tuple(map(_redacted, error.args))


def _redacted(value: object) -> Any:
    return redact(value) if isinstance(value, str) else value


def redact(text: str) -> str:
    """Return *text* with the passwords of URLs and of ``password=…`` pairs replaced by ``***``."""
    for pattern in (_URL, *_PAIRS):
        text = pattern.sub(r"\g<before>***", text)
    return text
