"""Which errors say that a server is not there yet, for each package of those that it raises.

An error is judged by the package of its own class, so that it does not matter what raised it: a pool,
a single connection, or another library that wraps it. Classes go by name, so nothing is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lifekit._core.transient import BUGS, meets_a_bad_certificate

# Of a connection that was never made they give no SQLSTATE, only libpq's text.
_LIBPQ_TRANSIENT = re.compile(
    r"connection (refused|reset)|timeout expired|timed out|EOF detected"
    r"|server closed the connection unexpectedly"
    r"|could not translate host name|failed to resolve host|name resolution"
    r"|(failed|server): no such file or directory"
    r"|the database system is (starting|shutting|in recovery|not (yet )?accepting)"
    r"|too many (clients|connections)|connection slots are reserved"
    r"|terminating connection due to administrator command",
    re.IGNORECASE,
)
# These win: one text tells of every host.
_LIBPQ_PERMANENT = re.compile(
    r"authentication|password|does not exist|not permitted|certificate", re.IGNORECASE
)
_QUOTED = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'")
_SQLSTATE_TRANSIENT = re.compile("08...|57P0[123]|53300")
_SQLITE_TRANSIENT = {5, 6}  # SQLITE_BUSY, SQLITE_LOCKED
_PGBOUNCER_REFUSES = "08P01"
"""It says "protocol violation" whenever it refuses."""


def known(error: BaseException) -> bool | None:
    """Return whether *error* may pass, or None where nothing is known of its package."""
    for kind in type(error).__mro__:
        package = kind.__module__.partition(".")[0]
        if (judge := _JUDGES.get(package)) is not None:
            return judge(error, _names(error, package))
    return None


def _names(error: BaseException, package: str) -> set[str]:
    return {
        kind.__name__ for kind in type(error).__mro__ if kind.__module__.partition(".")[0] == package
    }


def _asyncpg(_: BaseException, names: set[str]) -> bool:
    passing = {
        "PostgresConnectionError",
        "TooManyConnectionsError",
        "AdminShutdownError",
        "CrashShutdownError",
        "CannotConnectNowError",
    }
    return bool(names & passing) and "ProtocolViolationError" not in names


def _libpq(error: BaseException, names: set[str]) -> bool:
    if "OperationalError" not in names:
        return False
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if isinstance(state, str):
        return _SQLSTATE_TRANSIENT.fullmatch(state) is not None and state != _PGBOUNCER_REFUSES
    text = _QUOTED.sub("", str(error))  # hosts, roles and databases may have any name
    return _LIBPQ_PERMANENT.search(text) is None and _LIBPQ_TRANSIENT.search(text) is not None


def _redis(error: BaseException, names: set[str]) -> bool:
    if "RedisClusterException" in names:
        if (cause := error.__cause__) is not None:
            return known(cause) is True
        return "slots are not covered" in str(error)
    refused = {"AuthenticationError", "AuthorizationError", "MaxConnectionsError"}
    behind = error.__context__
    if behind is not None and refused & _names(behind, "redis"):
        return False
    if names & refused or isinstance(error.__cause__, BUGS) or meets_a_bad_certificate(error):
        return False  # they derive from ConnectionError, or hide behind one
    return bool(names & {"ConnectionError", "TimeoutError", "ClusterDownError", "TryAgainError"})


def _httpx(error: BaseException, names: set[str]) -> bool:
    return bool(names & {"ConnectTimeout", "ConnectError"}) and not meets_a_bad_certificate(error)


def _sqlite(error: BaseException, _: set[str]) -> bool:
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in _SQLITE_TRANSIENT  # the rest of the code says more of the same


def _lifekit(error: BaseException, _: set[str]) -> bool:
    return isinstance(error, TimeoutError)


_JUDGES: dict[str, Callable[[BaseException, set[str]], bool]] = {
    "asyncpg": _asyncpg,
    "httpx": _httpx,
    "httpx2": _httpx,
    "lifekit": _lifekit,
    "psycopg": _libpq,
    "psycopg2": _libpq,
    "redis": _redis,
    "sqlite3": _sqlite,
}
