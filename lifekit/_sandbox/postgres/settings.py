"""What a text sets, and for how long: what one client sets is not another's, and ends in its time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from .sql import FOR_THE_SESSION, WORDS, read

_SETS = re.compile(
    r"""\bset\s+(?:(?P<local>local)\s+|session\s+(?!auth))?
    (?:(?P<word>role|session\s+authorization|time\s+zone|schema|names)\b
    |"?(?P<set>[\w.]+)"?\s*(?:=|\bto\b))
    |\breset\s+(?P<reset>role|session\s+authorization|time\s+zone|"?[\w.]+"?)
    |\bset_config\s*\(\s*(?:e?'(?P<called>[\w.]+)'(?P<rest>.*)|(?P<unknown>.))""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_OF_ONE_ROW = re.compile(
    r"""select\s+(?:pg_catalog\.)?set_config\s*\(\s*name\s*(?P<rest>,.*\))\s*
    from\s+(?:pg_catalog\.)?pg_settings\s+where\s+name\s*(?:=|in)\s*\(?\s*'(?P<called>[\w.]+)'\s*\)?\s*;?\s*""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
"""As pg_dump has it: of a setting that a server may not have."""
_FIXED = re.compile(
    r"\bstandard_conforming_strings\b(?![\"']?\s*(?:=|,|\bto\b)\s*'?(?:on|true|yes|1)\b)", re.IGNORECASE
)
"""What can't be set but to what it is, as each dump does."""
_CHARACTERISTICS = re.compile(r"\bset\s+session\s+characteristics\b", re.IGNORECASE)
_DEFAULTS = ("default_transaction_read_only", "default_transaction_isolation")
LIMITS = {
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "transaction_timeout",
}
"""Of those that may end the real transaction, or a wait."""


@dataclass(frozen=True)
class Sets:
    """The names of what a text sets."""

    local: frozenset[str] = frozenset()
    """For the rest of the transaction."""
    session: frozenset[str] = frozenset()
    resets_all: bool = False
    is_unknown: bool = False
    """It calls set_config() with a name that is not in the text."""
    is_fixed: bool = False
    """It sets what can't be set in a block."""

    @property
    def is_limit(self) -> bool:
        """Whether it sets what may end the real transaction."""
        return self.resets_all or bool(LIMITS & (self.local | self.session))

    def __bool__(self) -> bool:
        return bool(self.local or self.session or self.resets_all or self.is_unknown or self.is_fixed)


NOTHING = Sets()


def sets(text: str) -> Sets:
    """Return what a text sets."""
    script = read(text)
    return _sets(text) if script.local or script.session else NOTHING


@lru_cache(maxsize=1024)
def _sets(text: str) -> Sets:
    local: set[str] = set()
    session: set[str] = set()
    resets_all = is_unknown = False
    for match in _SETS.finditer(text):
        if match["unknown"]:
            one = _OF_ONE_ROW.fullmatch(text.strip())
            if one is None:
                is_unknown = True
            else:
                (session if FOR_THE_SESSION.search(one["rest"]) else local).add(one["called"].lower())
            continue
        word = " ".join((match["word"] or match["reset"] or "").lower().strip('"').split())
        if match["reset"] and word == "all":
            resets_all = True
            continue
        name = WORDS.get(word, word) or (match["set"] or match["called"]).lower()
        called_for_all = match["called"] and FOR_THE_SESSION.search(match["rest"])
        if match["local"] or (match["called"] and not called_for_all):
            local.add(name)
        else:
            session.add(name)
    if _CHARACTERISTICS.search(text):
        session.update(_DEFAULTS)
    is_fixed = _FIXED.search(text) is not None
    return Sets(frozenset(local), frozenset(session), resets_all, is_unknown, is_fixed)


def asking(names: Iterable[str], instead: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the query for the values of some settings, one column each.

    *instead* are expressions for those that are asked for otherwise.
    """
    usual = "pg_catalog.current_setting({}, true)".format
    return "SELECT " + ", ".join(instead.get(name) or usual(literal(name)) for name in names)


def setting(values: Mapping[str, str | None]) -> str:
    """Return the query that gives some settings their values, for the session."""
    calls = [
        f"pg_catalog.set_config({literal(name)}, {literal(value or '')}, false)"
        for name, value in values.items()
    ]
    return "SELECT " + ", ".join(calls)


def literal(value: str) -> str:
    """Return a text as SQL has it."""
    quoted = value.replace("'", "''")
    return f"'{quoted}'" if "\\" not in value else "E'" + quoted.replace("\\", "\\\\") + "'"
