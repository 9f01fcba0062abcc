"""Reading what an application sends to PostgreSQL, to find the transaction control in it.

The text is taken apart as PostgreSQL's own lexer does it with `standard_conforming_strings` on. Where
the two could differ, only texts differ that PostgreSQL refuses as a whole before it runs any of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property, lru_cache
from itertools import pairwise


class Verb(Enum):
    """What a statement does to the transaction."""

    PLAIN = auto()
    BEGIN = auto()
    COMMIT = auto()
    ROLLBACK = auto()
    SAVEPOINT = auto()
    RELEASE = auto()
    ROLLBACK_TO = auto()
    SET_TRANSACTION = auto()
    SET_CONSTRAINTS = auto()
    LISTEN = auto()
    UNLISTEN = auto()
    NOTIFY = auto()
    TWO_PHASE = auto()


PLAIN = frozenset({Verb.PLAIN, Verb.LISTEN, Verb.UNLISTEN, Verb.NOTIFY})
"""What may go to the server as it is."""
_READS = frozenset({Verb.PLAIN, Verb.LISTEN, Verb.UNLISTEN})


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a script.

    Args:
        text: As it was sent, with its comments and blanks, without the semicolon that ends it.
        verb: What it does to the transaction.
        read_only: True for READ ONLY, False for READ WRITE, None when it says neither.
        isolation: "serializable", "repeatable read", "read committed" or "read uncommitted".
        deferrable: True for DEFERRABLE, False for NOT DEFERRABLE, None when it says neither.
        chain: Whether a commit or rollback ends in AND CHAIN.
        name: The savepoint or channel, as PostgreSQL knows it; None for `UNLISTEN *`.
        payload: What NOTIFY sends along, None without.
        needs_transaction: What PostgreSQL calls it, where it runs in transactions only.
    """

    text: str
    verb: Verb = Verb.PLAIN
    read_only: bool | None = None
    isolation: str | None = None
    deferrable: bool | None = None
    chain: bool = False
    name: str | None = None
    payload: str | None = None
    needs_transaction: str | None = None


@dataclass(frozen=True)
class Script:
    """All that was sent in one message.

    Args:
        statements: Its statements; empty ones are left out.
        plain: Whether none of them controls a transaction.
        schema: Whether it may change the schema, other than by functions that it calls or by a
            rollback of what changed it.
        session: Whether it may leave anything on the session that a rollback does not take back, or
            that outlives the transaction, other than by functions that it calls.
        local: Whether it may set anything for the rest of the transaction: `SET LOCAL`.
        reads: Whether it surely does nothing but read, or listen: it calls no function that is not
            known for that.
    """

    statements: tuple[Statement, ...]
    plain: bool
    schema: bool
    session: bool
    local: bool
    reads: bool = False

    @cached_property
    def simple(self) -> bool:
        """Whether it is plain and does nothing of all that."""
        return self.plain and not (self.schema or self.session or self.local)


_LONG = 10_000


def read(text: str) -> Script:
    """Take apart what is sent to PostgreSQL in one message.

    Args:
        text: The SQL as the server gets it, that is after client-side parameters were filled in.
    """
    # Long texts are mostly data and do not come twice: kept, they would only cost memory.
    return _remembered(text) if len(text) < _LONG else _read(text)


def _read(text: str) -> Script:
    split = [(tokens, part) for tokens, part in _split(text) if tokens]
    statements = tuple(_statement(tokens, part) for tokens, part in split)
    others = [
        tokens for (tokens, _), found in zip(split, statements, strict=True) if found.verb is Verb.PLAIN
    ]
    return Script(
        statements,
        plain=all(found.verb in PLAIN for found in statements),
        schema=any(_changes_schema(tokens) for tokens in others),
        session=_LASTING.search(text) is not None
        or any(found.verb in (Verb.LISTEN, Verb.UNLISTEN) for found in statements)
        or any(_changes_session(tokens) for tokens in others),
        local=_SETTING.search(text) is not None or any(_sets_local(tokens) for tokens in others),
        reads=all(found.verb in _READS for found in statements) and all(map(_only_reads, others)),
    )


_remembered = lru_cache(maxsize=4096)(_read)


# The lexer

_START = r"A-Za-z_\x80-\U0010ffff"
_BLANK = r" \t\n\r\f\v"
_REMARK = r"--[^\n\r]*+"
_ESCAPED = r"'(?:[^'\\]++|\\.|'')*+'?+"
_QUOTED = r"'(?:[^']++|'')*+'?+"
# A constant goes on, with the escapes it began with, after a line break and another quote.
_GAP = rf"(?:[ \t\f\v]|{_REMARK})*+[\n\r](?:[{_BLANK}]++|{_REMARK}[\n\r])*+"
_TOKEN = re.compile(
    rf"""(?P<blank>[{_BLANK}]++|{_REMARK})
    |(?P<comment>/\*)
    |(?P<string>[eE]{_ESCAPED}(?:{_GAP}{_ESCAPED})*+|(?:[uU]&|[bBnNxX])?{_QUOTED}(?:{_GAP}{_QUOTED})*+)
    |(?P<dollar>\$(?P<tag>(?:[{_START}][{_START}0-9]*+)?+)\$.*?(?:\$(?P=tag)\$|\Z))
    |(?P<quoted>(?:[uU]&)?"(?:[^"]++|"")*+"?+)
    |(?P<word>[{_START}][{_START}0-9$]*+)
    |(?P<number>\$[0-9]++|(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+)
    |(?P<mark>.)""".replace("\n    ", ""),
    re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")


def _split(text: str) -> Iterator[tuple[list[str], str]]:
    """Each statement's tokens, unquoted words in capitals, and its text."""
    tokens: list[str] = []
    start = position = depth = body = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None
        position = match.end()
        kind, token = match.lastgroup, match[0]
        if kind == "blank":
            continue
        if kind == "comment":
            position = _after_comment(text, position)
            continue
        if token == "\0":
            break  # the server sees nothing behind it
        if token == ";" and not depth and not body:
            yield tokens, text[start : match.start()]
            tokens, start = [], position
            continue
        if kind == "word":
            token = _capitals(token)
            if body:
                # Elsewhere END belongs to a CASE or is a column's label.
                if token == "END" and (tokens[-1] == ";" or len(tokens) == body):
                    body = depth = 0
            elif (
                token == "ATOMIC" and not depth and tokens[-1:] == ["BEGIN"] and _makes_routine(tokens)
            ):
                body = len(tokens) + 1
        elif token == "(":
            depth += 1
        elif token == ")":
            depth = max(depth - 1, 0)
        tokens.append(token)
    yield tokens, text[start:]


def unqualified(text: str, schema: str, name: str) -> str:
    """Return a text in which *schema*, where it qualifies *name*, is blanks. Both are in capitals."""
    found: list[tuple[str, int]] = []
    cuts: list[tuple[int, int]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None
        start, position = match.span()
        if match.lastgroup == "comment":
            position = _after_comment(text, position)
        elif match.lastgroup != "blank":
            token = _capitals(match[0]) if match.lastgroup == "word" else match[0]
            found = [*found[-2:], (token, start)]
            if [each for each, _ in found] == [schema, ".", name]:
                cuts.append((found[0][1], start))
    for begin, end in cuts:
        text = text[:begin] + " " * (end - begin) + text[end:]
    return text


def _after_comment(text: str, position: int) -> int:
    depth = 1
    while depth:
        edge = _COMMENT_EDGE.search(text, position)
        if edge is None:
            return len(text)
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return position


def _makes_routine(tokens: Sequence[str]) -> bool:
    match tokens:
        case ["CREATE", "FUNCTION" | "PROCEDURE", *_]:
            return True
        case ["CREATE", "OR", "REPLACE", "FUNCTION" | "PROCEDURE", *_]:
            return True
        case _:
            return False


# PostgreSQL folds ASCII letters alone, so that str.upper() would find words that are none.
_TO_UPPER = {ord(letter): ord(letter) - 32 for letter in "abcdefghijklmnopqrstuvwxyz"}
_TO_LOWER = {capital: letter for letter, capital in _TO_UPPER.items()}


def _capitals(word: str) -> str:
    return word.upper() if word.isascii() else word.translate(_TO_UPPER)


# The few statements that matter

_ISOLATION = r"ISOLATION LEVEL (SERIALIZABLE|REPEATABLE READ|READ COMMITTED|READ UNCOMMITTED)"
_MODE = re.compile(rf"{_ISOLATION}|READ (ONLY|WRITE)|(NOT )?(DEFERRABLE)")
_ASSIGNED = ("=", "TO", ".")
# PostgreSQL takes any clear beginning of true, false, yes, no and off.
_TRUTH: dict[str, bool] = {
    **dict.fromkeys(["t", "tr", "y", "ye", "on", "1"], True),
    **dict.fromkeys(["f", "fa", "n", "no", "of", "0"], False),
}


def _statement(tokens: Sequence[str], text: str) -> Statement:
    plain = Statement(text)
    match tokens:
        case ["BEGIN", *modes] | ["START", "TRANSACTION", *modes]:
            return _with_modes(replace(plain, verb=Verb.BEGIN), modes)
        case ["COMMIT" | "ROLLBACK", "PREPARED", *_]:
            return replace(plain, verb=Verb.TWO_PHASE)
        case ["PREPARE", "TRANSACTION", *rest] if rest[:1] not in (["AS"], ["("]):
            return replace(plain, verb=Verb.TWO_PHASE)
        case ["ROLLBACK", "TO", *rest] | ["ROLLBACK", "WORK" | "TRANSACTION", "TO", *rest]:
            return replace(plain, verb=Verb.ROLLBACK_TO, name=_savepoint(rest))
        case ["COMMIT" | "END", *rest]:
            return replace(plain, verb=Verb.COMMIT, chain=rest[-2:] == ["AND", "CHAIN"])
        case ["ROLLBACK" | "ABORT", *rest]:
            return replace(plain, verb=Verb.ROLLBACK, chain=rest[-2:] == ["AND", "CHAIN"])
        case ["SAVEPOINT", *rest]:
            return replace(plain, verb=Verb.SAVEPOINT, name=_name(rest))
        case ["RELEASE", *rest]:
            return replace(plain, verb=Verb.RELEASE, name=_savepoint(rest))
        case ["LISTEN" | "UNLISTEN" as verb, *rest]:
            return replace(plain, verb=Verb[verb], name=None if rest == ["*"] else _name(rest))
        case ["NOTIFY", *rest]:
            payload = rest[rest.index(",") + 1 :] if "," in rest else []
            return replace(plain, verb=Verb.NOTIFY, name=_name(rest), payload=_constant(payload))
        case ["SET", "CONSTRAINTS", after, *_] if after not in _ASSIGNED:
            return replace(plain, verb=Verb.SET_CONSTRAINTS)
        case ["SET", "LOCAL" | "SESSION", *rest] if rest[:1] and rest[0] not in _ASSIGNED:
            return _set(plain, rest)
        case ["SET", *rest]:
            return _set(plain, rest)
        case ["LOCK", *_]:
            return replace(plain, needs_transaction="LOCK TABLE")
        case ["DECLARE", *rest] if not any(two == ("WITH", "HOLD") for two in pairwise(rest)):
            return replace(plain, needs_transaction="DECLARE CURSOR")
        case _:
            return plain


def _set(plain: Statement, rest: Sequence[str]) -> Statement:
    if len(rest) < 2:
        return plain
    changed = replace(plain, verb=Verb.SET_TRANSACTION)
    if rest[0] == "TRANSACTION" and rest[1] not in _ASSIGNED:
        return _with_modes(changed, rest[1:])
    if rest[1] in ("=", "TO"):
        variable = (_name(rest) or "").translate(_TO_LOWER)
        value = (_constant(rest[2:]) or "".join(rest[2:]).strip('"')).translate(_TO_LOWER)
        if variable == "transaction_isolation":
            return replace(changed, isolation=value)
        if variable == "transaction_read_only":
            return replace(changed, read_only=_TRUTH.get(value[:2]))
        if variable == "transaction_deferrable":
            return replace(changed, deferrable=_TRUTH.get(value[:2]))
    return plain


def _with_modes(statement: Statement, modes: Sequence[str]) -> Statement:
    for isolation, access, negated, deferrable in _MODE.findall(" ".join(modes)):
        if isolation:
            statement = replace(statement, isolation=isolation.lower())
        elif access:
            statement = replace(statement, read_only=access == "ONLY")
        elif deferrable:
            statement = replace(statement, deferrable=not negated)
    return statement


def _savepoint(rest: Sequence[str]) -> str | None:
    return _name(rest[1:] if rest[:1] == ["SAVEPOINT"] and len(rest) > 1 else rest)


# Names and constants

_NAME_BYTES = 63
_ESCAPE = re.compile(
    rb"''|\\(?:([0-7]{1,3})|x([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL
)
_LETTERS = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}
_ESCAPED_PIECE = re.compile(rf"'((?:[^'\\]++|\\.|'')*+)'?+(?:{_GAP})?", re.DOTALL)
_QUOTED_PIECE = re.compile(rf"'((?:[^']++|'')*+)'?+(?:{_GAP})?")


def _name(tokens: Sequence[str]) -> str | None:
    """The name that these tokens begin with, folded, unquoted and cut as PostgreSQL does."""
    if not tokens:
        return None
    first = tokens[0]
    if '"' not in first:
        name = first.translate(_TO_LOWER)
    else:
        prefix, _, rest = first.partition('"')
        name = rest.removesuffix('"').replace('""', '"')
        if prefix:
            name = _unicode(name, tokens[1:])
    return name.encode("utf-8", "surrogatepass")[:_NAME_BYTES].decode("utf-8", "ignore")


def _constant(tokens: Sequence[str]) -> str | None:
    """The value of the string constant that these tokens begin with."""
    first = tokens[0] if tokens else ""
    if first.startswith("$"):
        tag, _, body = first[1:].partition("$")
        return body.removesuffix(f"${tag}$")
    prefix, quote, _ = first.partition("'")
    if not quote:
        return None
    if prefix in ("e", "E"):
        escaped = "".join(_ESCAPED_PIECE.findall(first, 1))
        return _joined(_ESCAPE.sub(_unescape, escaped.encode("utf-8", "surrogatepass")))
    value = "".join(_QUOTED_PIECE.findall(first, len(prefix))).replace("''", "'")
    return _unicode(value, tokens[1:]) if prefix in ("u&", "U&") else value


def _unescape(match: re.Match[bytes]) -> bytes:
    octal, byte, short, full, letter = match.groups()
    if octal:
        return bytes([int(octal, 8) & 0xFF])
    if byte:
        return bytes([int(byte, 16)])
    if code := short or full:
        return _character(code.decode()).encode("utf-8", "surrogatepass")
    return _LETTERS.get(letter, letter) if letter else b"'"


def _unicode(value: str, following: Sequence[str]) -> str:
    """The meaning of a U& constant or name, given what follows it: perhaps an UESCAPE."""
    escape = following[1][1:2] if following[:1] == ["UESCAPE"] and len(following) > 1 else "\\"
    mark = re.escape(escape)
    pattern = rf"{mark}(?:{mark}|\+([0-9A-Fa-f]{{6}})|([0-9A-Fa-f]{{4}}))"
    found = re.sub(
        pattern, lambda match: _character(match[1] or match[2]) if match.lastindex else escape, value
    )
    return _joined(found.encode("utf-8", "surrogatepass"))


def _character(code: str) -> str:
    # What is beyond Unicode PostgreSQL refuses.
    return chr(min(int(code, 16), 0x10FFFF))


def _joined(text: bytes) -> str:
    """The text, with pairs of surrogates joined."""
    try:
        halves = text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace")
    return halves.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# What it may set

FOR_THE_SESSION = re.compile(r",\s*(?:false|'(?:f|false|0|no|off)')(?:::\w+)?\s*\)", re.IGNORECASE)
"""What ends a call of set_config() for longer than the transaction."""
WORDS = {
    "session authorization": "session_authorization",
    "time zone": "timezone",
    "schema": "search_path",
    "names": "client_encoding",
}
"""Settings that SQL has words of its own for."""


# What else a statement may change

_LASTING = re.compile(r"set_config|pg_settings|advisory|setseed|u&\"", re.IGNORECASE)
_SETTING = re.compile(r"set_config|u&\"", re.IGNORECASE)
_LASTING_WORDS = re.compile(
    "CALL|DEALLOCATE|DECLARE|DISCARD|DO|EXECUTE|LISTEN|LOAD|PREPARE|RESET|SET|UNLISTEN"
)
_SCHEMA_KEPT = re.compile(
    "ANALY[SZ]E|CHECKPOINT|CLOSE|COPY|DEALLOCATE|DECLARE|DELETE|DISCARD|EXECUTE|EXPLAIN|FETCH|INSERT|LOAD"
    "|LOCK|MERGE|MOVE|PREPARE|RESET|SELECT|SET|SHOW|TABLE|TRUNCATE|UPDATE|VALUES|WITH"
)


def _changes_schema(tokens: Sequence[str]) -> bool:
    first = _first(tokens)
    if not _SCHEMA_KEPT.fullmatch(first):
        return True
    if first == "EXPLAIN" and ("CREATE" in tokens or "REFRESH" in tokens):
        return True
    if first not in ("SELECT", "WITH", "EXPLAIN"):
        return False
    return any(
        word == "INTO" and (first == "SELECT" or before not in ("INSERT", "MERGE"))
        for before, word in pairwise(tokens)
    )


def _changes_session(tokens: Sequence[str]) -> bool:
    return _LASTING_WORDS.fullmatch(_first(tokens)) is not None and not _sets_local(tokens)


_READING = frozenset({"SELECT", "WITH", "VALUES", "TABLE", "SHOW"})
_WRITING = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "INTO", "SHARE"})
# Keywords, types, and functions that change nothing.
_BEFORE_BRACKET = re.compile(
    """ALL|AND|ANY|ARRAY|AS|BETWEEN|BY|CASE|CAST|DISTINCT|ELSE|EXCEPT|EXISTS|FILTER|FROM|GROUP|HAVING
    |ILIKE|IN|INTERSECT|IS|JOIN|LATERAL|LIKE|LIMIT|MATERIALIZED|NOT|OFFSET|ON|OR|OVER|RECURSIVE|ROW
    |SELECT|SETS|SOME|THEN|UNION|USING|VALUES|WHEN|WHERE|WITH|WITHIN
    |BIT|CHAR|CHARACTER|DECIMAL|INTERVAL|NUMERIC|TIME|TIMESTAMP|VARCHAR|VARYING
    |ABS|ARRAY_AGG|ARRAY_LENGTH|AVG|BOOL_AND|BOOL_OR|CARDINALITY|CEIL|CHAR_LENGTH|COALESCE|CONCAT
    |CONCAT_WS|COUNT|CURRENT_SCHEMA|CURRENT_SETTING|DATE_PART|DATE_TRUNC|DENSE_RANK|EXTRACT
    |FIRST_VALUE|FLOOR|FORMAT_TYPE|GENERATE_SERIES|GREATEST|JSONB_AGG|JSONB_BUILD_OBJECT|JSON_AGG
    |JSON_BUILD_OBJECT|LAG|LAST_VALUE|LEAD|LEAST|LENGTH|LOWER|LTRIM|MAX|MD5|MIN|NOW|NULLIF|OVERLAY
    |PG_BACKEND_PID|PG_GET_CONSTRAINTDEF|PG_GET_EXPR|PG_TABLE_IS_VISIBLE|POSITION|RANK|REPLACE|ROUND
    |ROW_NUMBER|ROW_TO_JSON|RTRIM|STRING_AGG|SUBSTRING|SUM|TO_CHAR|TO_TSQUERY|TO_TSVECTOR|TRIM
    |UNNEST|UPPER|VERSION""",
    re.VERBOSE,
)


def _only_reads(tokens: Sequence[str]) -> bool:
    # A function may do anything, and so it counts as writing unless it is known. What a view calls is
    # not seen.
    if _first(tokens) not in _READING or not _WRITING.isdisjoint(tokens):
        return False
    for at in range(1, len(tokens)):
        name, schema = tokens[at - 1], tokens[at - 3] if tokens[max(at - 2, 0)] == "." else "PG_CATALOG"
        called = tokens[at] == "(" and (name[0] in '_"' or name[0].isalpha())
        if called and not (_BEFORE_BRACKET.fullmatch(name) and schema == "PG_CATALOG"):
            return False
    return True


def _sets_local(tokens: Sequence[str]) -> bool:
    match tokens:
        case ["SET", "LOCAL", after, *_]:
            return after not in _ASSIGNED
        case _:
            return False


def _first(tokens: Sequence[str]) -> str:
    return next((token for token in tokens if token != "("), "")
