"""Which failures of an opening may pass when it is tried again."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any

from . import drivers
from .errors import members_of, note_once, summary
from .resource import Options

_Say = Callable[[Any], object]

BUGS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError),
    *(NameError, NotImplementedError, RecursionError, SyntaxError, TypeError, ValueError),
)
"""What says that the program is wrong, whatever happened before."""
_PASSING = (ConnectionError, TimeoutError, asyncio.IncompleteReadError)
_ERRNOS = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EADDRNOTAVAIL,
    errno.EAGAIN,
}
# A name that is not there yet is told in several ways, which differ from system to system.
_ASKED_WRONGLY = {socket.EAI_BADFLAGS, socket.EAI_FAMILY, socket.EAI_SERVICE, socket.EAI_SOCKTYPE}
# asyncio, uvloop and AnyIO sum up the failures of several addresses in an error of their own.
_SUMMED_UP = re.compile(r"\[Errno (\d+)\]")
_REFUSED = re.compile(r"Auth(?!or(?!i))|Password|Credential|Denied|Forbidden|Permission|Certificate")
# Not as a part of a host's name.
_REFUSED_TEXT = re.compile(
    r"(?<![\w./:@-])(authenticat\w+|authoriz\w+|unauthorized|passwords?|credentials?|denied|forbidden)"
    r"(?![\w/@-]|[.:]\w)",
    re.IGNORECASE,
)
_DEEPEST = 50
"""Groups in groups, and causes of causes, that are looked at."""


def is_transient(error: BaseException, options: Options | None = None) -> bool:
    """Return whether *error* says that a server is not there yet, rather than that it refuses us.

    What a declaration's *options* say adds to what lifekit and the registered drivers know. An error
    that can't be judged does not pass.
    """
    says: list[_Say] = [driver.transient for driver in drivers.registered()]
    declared = options.transient if options is not None else None
    if isinstance(declared, tuple):
        says.append(lambda each: isinstance(each, declared))
    elif declared is not None:
        says.append(declared)
    return _passes(error, says)


def is_known_to_pass(error: BaseException) -> bool:
    """Return what lifekit knows by itself."""
    return _passes(error, ())


def _passes(error: BaseException, says: Sequence[_Say]) -> bool:
    walk = _Walk(says)
    with suppress(BaseException):  # an error may be broken in any way
        if walk.passes(error, 0):
            return True
    if walk.broken is not None:
        note_once(error, walk.broken)
    return False


class _Walk:
    """One look at an error, at those that it groups, and at those that it was raised from."""

    def __init__(self, says: Sequence[_Say]) -> None:
        self.broken: str | None = None
        self._says = says
        self._answers: dict[int, bool] = {}

    def passes(self, error: BaseException, depth: int) -> bool:
        if depth > _DEEPEST:
            return False
        answer = self._answers.get(id(error))
        if answer is None:
            self._answers[id(error)] = False  # for a circle of causes
            self._answers[id(error)] = answer = self._judge(error, depth)
        return answer

    def _judge(self, error: BaseException, depth: int) -> bool:
        if any(self._says_so(say, error) for say in self._says):
            return True
        if isinstance(error, BaseExceptionGroup):
            return all(self.passes(each, depth + 1) for each in members_of(error))
        for judge in (drivers.judge, _known_of_os):
            if (answer := judge(error)) is not None:
                return answer
        wrapped = _wrapped(error)
        return wrapped is not None and self.passes(wrapped, depth + 1)

    def _says_so(self, say: _Say, error: BaseException) -> bool:
        try:
            answer = say(error)
            if isinstance(answer, Coroutine):
                answer.close()
                raise TypeError("it returned a coroutine")
            return bool(answer)
        except Exception as broken:
            self.broken = self.broken or (
                f"lifekit: transient= failed for this {type(error).__name__}, so it does not count as "
                f"transient: {summary(broken)}"
            )
            return False


def _known_of_os(error: BaseException) -> bool | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, socket.gaierror):
        return error.errno not in _ASKED_WRONGLY
    number = error.errno if isinstance(error, OSError) else None
    if number is None and _refuses_us(error):
        return False
    if isinstance(error, _PASSING) or number in _ERRNOS:
        return not meets_a_bad_certificate(error)
    if isinstance(error, FileNotFoundError):
        return error.filename is None  # connecting to a unix socket that is not there yet
    if number is not None:
        return False if _is_of_python(error) else None
    if not isinstance(error, OSError):
        return None
    text = str(error)
    if "All connection attempts failed" in text:
        return True
    return any(int(each) in _ERRNOS for each in _SUMMED_UP.findall(text)) or None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield what *error* was raised from, or amid, then what that was raised from, and so on."""
    for _ in range(_DEEPEST):  # they may go round in a circle
        behind = error.__cause__ or error.__context__
        if behind is None:
            return
        yield (error := behind)


def meets_a_bad_certificate(error: BaseException) -> bool:
    """Return whether a server's certificate, which stays bad, is behind it."""
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in causes(error))


def _refuses_us(error: BaseException) -> bool:
    kinds = [kind for kind in type(error).__mro__ if kind.__module__ != "builtins"]
    return any(_REFUSED.search(kind.__name__) for kind in kinds) or bool(
        _REFUSED_TEXT.search(str(error))
    )


def _wrapped(error: BaseException) -> BaseException | None:
    """Return what an error, of which nothing is known, was made of."""
    if isinstance(error, BUGS):
        return None
    package = type(error).__module__.partition(".")[0]
    if package == "sqlalchemy":
        return getattr(error, "orig", None) or error.__cause__
    if package == "urllib" and isinstance(reason := getattr(error, "reason", None), BaseException):
        return reason
    if error.__cause__ is not None or error.__suppress_context__ or _is_of_python(error):
        return error.__cause__
    # Most clients do not write `from`. What Python itself raises amid something else is a bug.
    return error.__context__


def _is_of_python(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in sys.stdlib_module_names
