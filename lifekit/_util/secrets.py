"""What is known to be secret in a failure, so that a part of it is noticed in any text.

The parser of a malformed URL quotes the part of it that it stumbled over: "invalid literal for int()
with base 10: 'hunter2'". No pattern knows that for a password. But the whole URL stands in a local
variable of the parser's frame, in the value that was being opened, in what that was built from, or in
the environment.
"""

from __future__ import annotations

import gc
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, lru_cache
from itertools import chain, islice
from types import CodeType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any, cast
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from .redact import KEPT, is_secret_name, redact, secrets_in

OBJECTS, FRAMES, WIDTH, LENGTH, ALL_LENGTHS = 1000, 200, 100, 10_000, 200_000
"""How many objects are looked at, frames and elements of each, the longest text, and all of them."""

_UNASKED = (type, ModuleType, FunctionType, CodeType, FrameType, TracebackType)
_DELIMITER = re.compile(r"([^\w.~*-]+)")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*://\S*")
_LOCATOR = re.compile(r"(?:\w+_)?(?:dsn|url|uri|conninfo)", re.IGNORECASE)
_NO_SCHEME = re.compile(r"(?:(?:postgres|redis|https?|amqp|mysql|mongodb)\w*:)?/*[^\s:/@]*:(\S+)@")
_NO_QUOTES = re.compile(r"\bpassword\s*=\s*([^\s'](?:\S|\s+(?![^\s=]+\s*=))*)")
_OTHER_NAME = re.compile(r"(?:\w+_)?(?:user|username|host|hostname|db|dbname|database)", re.IGNORECASE)
_DIRECTORIES = {"PWD", "OLDPWD"}


def cleaner(errors: Iterable[BaseException], about: Iterable[object]) -> Callable[[str], str]:
    """Return a `redact` that also takes out what is known to be secret where *errors* came from."""

    @cache
    def patterns() -> list[tuple[str, re.Pattern[str]]]:
        found = _Found()
        for name, text in os.environ.items():
            if name not in _DIRECTORIES:
                found.look_at(name, text)
        for name, text in _texts(chain(_locals(errors), (("", each) for each in about))):
            found.look_at(name, text)
        return found.patterns()

    @lru_cache(maxsize=64)
    def clean(text: str) -> str:
        text = redact(text)
        for secret, pattern in patterns() if text else ():
            if secret in text:
                text = pattern.sub(KEPT, text)
        return text

    return clean


class _Found:
    """Secrets, and the words that are none although a password may be the same."""

    def __init__(self) -> None:
        self._named: set[str] = set()
        self._quoted: set[str] = set()  # in a URL, or in another text
        self._other_names: set[str] = set()
        self._words = {"true", "false", "none", "null", "password", "passwd", "secret", "token"}

    def look_at(self, name: str, text: str) -> None:
        """Take the secrets of *text*, which has this name or none."""
        if is_secret_name(name):
            # A plain word may be anything else that is called a token or a key.
            if (
                "pass" in name.lower()
                or "pwd" in name.lower()
                or not (text.isalpha() or text.isdigit())
            ):
                self._named.update(_spellings(text))
        elif _OTHER_NAME.fullmatch(name):
            self._other_names.add(text.lower())
        elif _LOCATOR.fullmatch(name) and "://" not in text:
            found = _NO_SCHEME.match(text) or _NO_QUOTES.search(text)
            for part in _parts(found[1]) if found else ():
                self._quoted.update(_spellings(part))
        is_url = _URL.fullmatch(text) is not None
        held = [each for each in secrets_in(text) if is_url or "=" in text or not each.isalpha()]
        for each in held:
            for part in _parts(_bare(each)):
                self._quoted.update(_spellings(part))
        if held and is_url:
            self._words.update(re.findall(r"\w+", redact(text).lower()))

    def patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        """Return each secret with what finds it, the longest first."""
        wanted = {each for each in self._quoted if each.lower() not in self._words}
        others = self._words | self._other_names
        wanted |= {each for each in self._named if each.lower() not in others}
        return [(each, self._pattern(each)) for each in sorted(wanted, key=len, reverse=True)]

    def _pattern(self, secret: str) -> re.Pattern[str]:
        # A short one, or one that is a part of a common word, counts only where it stands alone.
        if len(secret) > 5 and not any(secret.lower() in word for word in self._words):
            return re.compile(re.escape(secret))
        return re.compile(rf"(?<!\w){re.escape(secret)}(?!\w)")


def _bare(value: str) -> str:
    return value.lstrip("bruBRU").strip("'\"") if value[-1:] in {"'", '"'} else value


def _spellings(secret: str) -> Iterator[str]:
    """Yield the forms in which a text may have it."""
    if KEPT in secret:
        return
    for each in {secret, unquote(secret), unquote_plus(secret), secret.replace("\\", "")}:
        for written in (each, quote(each, safe=""), quote_plus(each), repr(each)[1:-1]):
            if 4 <= len(written) <= LENGTH:
                yield written


def _parts(secret: str) -> Iterator[str]:
    """Yield what parsers may take for a part of it: whatever lies between two delimiters."""
    yield secret
    for text in {secret, unquote(secret)}:
        pieces = _DELIMITER.split(text)[:25]
        for start in range(0, len(pieces), 2):
            for end in range(start + 1, len(pieces) + 1):
                yield "".join(pieces[start:end])


def _locals(errors: Iterable[BaseException]) -> Iterator[tuple[str, object]]:
    seen = set[int]()
    for error in errors:
        traceback: TracebackType | None = vars(BaseException)["__traceback__"].__get__(error)
        while traceback is not None and len(seen) < FRAMES:
            frame, traceback = traceback.tb_frame, traceback.tb_next
            ours = str(frame.f_globals.get("__name__")).startswith("lifekit.")
            if id(frame) not in seen and not ours:  # ours hold every resource
                seen.add(id(frame))
                yield from list(frame.f_locals.items())[:WIDTH]


def _texts(roots: Iterable[tuple[str, object]]) -> Iterator[tuple[str, str]]:
    """Yield the texts that can be reached, and their names, the nearest first.

    No code of the objects is run: only exact types are read.
    """
    left, seen, length = deque(roots), set[int](), 0
    while left and len(seen) < OBJECTS and length < ALL_LENGTHS:
        name, value = left.popleft()
        if type(value) is str or type(value) is bytes:
            if 4 <= len(value) <= LENGTH:
                length += len(value)
                yield name, value if type(value) is str else _decoded(value)
        elif id(value) not in seen and not issubclass(type(value), _UNASKED):
            seen.add(id(value))
            with suppress(Exception):  # it changes in another thread
                left.extend(islice(_inside(value), WIDTH))


def _inside(value: Any) -> Iterator[tuple[str, object]]:
    kind: Any = cast("Any", type(value))
    if kind is dict:
        items: list[tuple[object, object]] = list(islice(value.items(), WIDTH))
        yield from ((_name(key), held) for key, held in items)
        yield from (("", key) for key, _ in items)
        return
    if kind not in {list, tuple, set, frozenset}:
        with suppress(Exception):
            if type(own := object.__getattribute__(value, "__dict__")) is dict:
                yield from _inside(cast("Any", own))
    fields: Any = getattr(kind, "_fields", None)
    if type(fields) is tuple and issubclass(kind, tuple):
        yield from zip(map(_name, cast("Any", fields)), value, strict=False)
    yield from (("", held) for held in gc.get_referents(value))


def _name(key: object) -> str:
    return key if type(key) is str else _decoded(key)


def _decoded(value: object) -> str:
    return value.decode("utf-8", "replace") if type(value) is bytes else ""
