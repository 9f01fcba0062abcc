"""Passwords taken out of every text that lifekit shows."""

import re

_URL_PASSWORD = re.compile(r"(?P<before>[a-z][a-z0-9+.\-]*://[^\s:/@?#]*):[^\s/?#]*@", re.IGNORECASE)
_KEY_PASSWORD = re.compile(
    r"(?P<before>\b(?:\w*password|\w*passwd|secret|token)\s*[=:]\s*)"
    r"(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[^\s&,;)]+)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return *text* with the passwords of URLs and of ``password=…`` pairs replaced by ``***``."""
    text = _URL_PASSWORD.sub(r"\g<before>:***@", text)
    return _KEY_PASSWORD.sub(r"\g<before>***", text)
