"""Passwords taken out of every text that lifekit shows."""

import re

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


def redact(text: str) -> str:
    """Return *text* with the passwords of URLs and of ``password=…`` pairs replaced by ``***``."""
    for pattern in (_URL, *_PAIRS):
        text = pattern.sub(r"\g<before>***", text)
    return text
