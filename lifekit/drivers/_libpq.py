"""What libpq says of a failed connection, for the drivers that stand on it."""

from __future__ import annotations

import re

# Of a connection that was never made they give no SQLSTATE, only libpq's text.
_TRANSIENT = re.compile(
    r"connection (refused|reset)|timeout expired|timed out|EOF detected"
    r"|server closed the connection unexpectedly|temporary failure in name resolution"
    r"|(failed|server): no such file or directory"
    r"|the database system is (starting|shutting|in recovery|not (yet )?accepting)"
    r"|too many (clients|connections)|connection slots are reserved"
    r"|terminating connection due to administrator command",
    re.IGNORECASE,
)
# These win: one text tells of every host, and quotes names that may say anything.
_PERMANENT = re.compile(r"authentication|password|does not exist|not permitted|certificate", re.I)


def is_transient(error: BaseException) -> bool:
    """Return whether the server is starting, stopping or full, or hung up on us."""
    text = str(error)
    return _PERMANENT.search(text) is None and _TRANSIENT.search(text) is not None
