"""Passwords taken out of every text that lifekit shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

KEPT = "***"

_WORD = (
    "password|passwd|passphrase|pwd|secret|token|credentials?"
    "|(?:api|access|private|secret|signing|encryption|account|shared)[_-]?key"
)
_KEY = rf"(?:[\w-]*(?:{_WORD})|(?:\w+[_-])?pass)"
# Before a colon a bare word may be the subject of a sentence; these are not.
_PLAIN_KEY = (
    r"(?:[\w-]*(?:password|passwd|passphrase|pwd|(?:api|access|private|secret)[_-]?key)"
    r"|\w[\w-]*[_-](?:secret|token|credentials?))"
)
_SCHEME = "(?:bearer|basic|digest|token|apikey|negotiate|aws4-hmac-sha256)"
# "Bearer token", "Basic AUTH", 'Basic realm="x"'
_PROSE = r"(?!(?-i:[A-Z]?[a-z]+|[A-Z]+)(?![\w~+/=-])|\w+=\")"
# In doubt too much is taken out: servers' own parsers disagree on which characters a password may
# hold as they are. Each repetition is bounded, or ends where another match may begin, so that the
# time for a text grows with its length.
_QUOTED = r"""[bru]{0,2}(?:'(?:\\.|[^'\\])*(?:'|\\?\Z)|"(?:\\.|[^"\\])*(?:"|\\?\Z))"""
_HELD = rf"\*\*\*(?=[\s,;)\]}}\\]|\Z)|{_QUOTED}|\\+['\"][^'\"\\]*|\{{[^{{}}]*\}}|\[[^\[\]]*\]"
_NOTHING = (
    r"(?!(?:none|null|true|false|''|\"\"|secret(?:str|bytes)\(b?'\**'\))(?:[\s,;)\]}]|\Z)"
    r"|(?:\$\d\d?|%s|%\(\w+\)s|\?)(?:::\w+)?(?:[\s,;)\]]|\Z))"  # a parameter of SQL
)
_SENTENCE = (  # "password: field required", and a signature
    r"(?!(?:argument|bytes|cannot|expected|expired|field|input|invalid|is|missing|must|not|required"
    r"|secretstr|str|the|this|unknown|value)(?:[\s,;.)\]|]|\Z))"
)
_URL = r"(?<![a-z0-9+.\-])[a-z][a-z0-9+.\-]*://"
_NO_PORT = r"(?!\d{1,5}(?:[/?#]|(?:\.\.\.|…)?(?:[\s,;)'\"]|\Z)))"
_SPACED = r"(?:[^\s:'\"<>][^\s'\"<>]{0,64}(?:[ \t][^\s'\"<>]{1,64}|\n(?=@)){1,3})"  # a file's last line
_NO_DIRECTORY = r"(?:(?<=;)|(?!(?-i:(?:OLD)?PWD=(?:/|[A-Z]:\\))))"
_FIRST = r"(?:(?m:^)|(?<=[{]))"
_KEYS = ("pass", "pwd", "secret", "token", "credential", "key")

_PATTERNS = [
    # (what the text must hold in any case, what stands before the secret, the secret)
    #
    # URLs: up to the last @ of the authority, or even beyond a slash or a space; but no port.
    (
        ("@",),
        rf"{_URL}[^\s:/?#]*:",
        rf"{_NO_PORT}(?:(?:[^\s/]+|\S{{1,256}})(?=@)|{_SPACED}(?=@))",
    ),
    # A number and a slash are a port and a path, and an @ ends the password; but only the paths of
    # HTTP have an @ of their own.
    (
        ("@",),
        rf"(?!(?:\w+\+)?https?:|wss?:){_URL}[^\s:/?#]*:",
        rf"(?:\d{{1,5}}/|{_NO_PORT})(?:(?!://)[^\s?#]){{1,256}}(?=@)",
    ),
    (
        ("...", "…"),
        rf"{_URL}[^\s:/?#]*:",
        rf"{_NO_PORT}[^\s'\"]{{0,64}}?(?:\.\.\.|…)[^\s'\"]*",
    ),  # cut short
    (("://:",), rf"{_URL}:", rf"{_NO_PORT}[^\s'\"/@,;)]+(?![^\s'\"/,;)]*@)"),
    (
        (*_KEYS, "auth", "pw", "sig"),
        rf"[?&](?:{_KEY}|auth|key|pw|sig|[\w-]*signature)=",
        r"[^\s&]*[^\s&'\"]",
    ),
    (
        ("%3a%2f%2f",),  # a URL in another's query
        r"%3A%2F%2F(?:(?!%3A|%2F|%40)\S){0,64}%3A",
        r"(?!\d{1,5}%2F)\S{1,256}(?=%40)",
    ),
    (("netloc", "authority"), r"\b(?:netloc|authority)\W{1,3}[^\s:@]{0,64}:", r"\S{1,256}(?=@)"),
    (("host",), r"(?<!\w)host(?:[ ]?name)?:?[ ]?['\"]", r"[^'\"\s]+(?=@)"),  # to some parser
    # Pairs with a quoted key, in Python's and JSON's form.
    (
        (*_KEYS, "authorization", "cookie"),
        rf"(?P<quote>\\*['\"])(?:{_KEY}|(?:proxy-)?authorization|(?:set-)?cookie)(?P=quote)\s*[:=]\s*",
        rf"{_NOTHING}(?:{_HELD}|[^\s,\]}}]+)",
    ),
    (
        (*_KEYS, "authorization"),
        rf"\([bru]?(?P<quote>['\"])(?:{_KEY}|(?:proxy-)?authorization)(?P=quote)\s*,\s*",
        _QUOTED,
    ),
    # Bare values end at a space; a comma or bracket behind them is punctuation. The shell's PWD is
    # the working directory.
    (
        _KEYS,
        (
            rf"(?<![/?&\w-]){_NO_DIRECTORY}"
            rf"(?:{_KEY}\s*=|(?:{_PLAIN_KEY}|{_FIRST}(?:secret|token))\s*:\s*(?!\s){_SENTENCE})\s*"
        ),
        rf"{_NOTHING}(?:{_HELD}|(?:\\.|[^\s\\])*[^\s\\,;)\]}}]|\S+)",
    ),
    (_KEYS, rf"(?<![\w-])--{_KEY}['\"],\s+", _QUOTED),
    (_KEYS, rf"(?<![\w-])--{_KEY}\s+", rf"{_PROSE}[^\s:]\S*"),
    (_KEYS, rf"<{_KEY}>", r"[^<]+(?=</)"),
    (("password", "identified"), r"\b(?:password|identified\s+by)\s+", r"[en]?'(?:[^']|'')*'?"),  # SQL
    # Headers of HTTP.
    (("authorization",), rf"\bauthorization['\"]?\s*[:=]\s*['\"]?{_SCHEME}\s+", r"[^\s'\"]+"),
    (("bearer ", "basic "), r"(?<!\w)(?:bearer|basic)\s+", rf"{_PROSE}[^\s'\",;<>()\[\]{{}}]+"),
    # Pydantic's lines: the value of a field by its name, and any that was cut short.
    (
        ("input_value=",),
        rf"(?m:^)[\w.\[\]-]*(?:{_WORD})\n[ ]+[^\n]{{0,2000}}?\binput_value=",
        r"[^\n]{1,200}?(?=, input_type=)",
    ),
    (("...",), r"\binput_value=", r"(?:[^\n]{1,100}?\.\.\.[^\n]{1,100}?)(?=, input_type=)"),
    ((" key-----",), r"-----BEGIN [A-Z ]*PRIVATE KEY-----", r".*?(?=-----END|\Z)"),
]
_NEEDLES = dict.fromkeys(needle for needles, _, _ in _PATTERNS for needle in needles)


@cache
def _compiled(number: int) -> re.Pattern[str]:
    # When the first text needs it: all of them take longer than the import of lifekit.
    _, before, secret = _PATTERNS[number]
    return re.compile(rf"(?P<before>{before})(?P<secret>{secret})", re.IGNORECASE | re.DOTALL)


def _patterns(text: str) -> Iterator[re.Pattern[str]]:
    lower = text.lower()
    if held := [needle for needle in _NEEDLES if needle in lower]:
        for number, (needles, _, _) in enumerate(_PATTERNS):
            if any(needle in held for needle in needles):
                yield _compiled(number)


def is_secret_name(name: str) -> bool:
    """Return whether a variable, a field or a header that is called so holds a secret."""
    lower = name.lower()
    return any(each in lower for each in _KEYS) and bool(_name_pattern().fullmatch(name))


@cache
def _name_pattern() -> re.Pattern[str]:
    return re.compile(_KEY, re.IGNORECASE)


def redact(text: str) -> str:
    """Return *text* with the passwords of URLs, ``password=…`` pairs and the like as ``***``."""
    for pattern in _patterns(text):
        text = pattern.sub(rf"\g<before>{KEPT}", text)
    return text


def secrets_in(text: str) -> Iterator[str]:
    """Yield what `redact` takes out of *text*."""
    for pattern in _patterns(text):
        for match in pattern.finditer(text):
            yield match["secret"]
