"""Which failures of an opening may pass when it is tried again."""

from __future__ import annotations

import errno
import socket
from typing import cast

from . import drivers

_ERRNOS = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EAGAIN,
}


def is_transient(error: BaseException) -> bool:
    """Return whether *error* says that a server is not there yet, rather than that it refuses us."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_transient, cast("BaseExceptionGroup[BaseException]", error).exceptions))
    if isinstance(error, OSError):
        return _is_transient_os_error(error)
    return any(driver.transient(error) for driver in drivers.loaded())


def _is_transient_os_error(error: OSError) -> bool:
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, FileNotFoundError):
        return error.filename is None  # connecting to a unix socket that is not there yet
    if error.errno is None:
        # asyncio and AnyIO sum up the failures of several addresses in an error of their own.
        text = str(error)
        return "Connect call failed" in text or "All connection attempts failed" in text
    return error.errno in _ERRNOS
