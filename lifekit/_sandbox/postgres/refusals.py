"""What a client is told in a block that PostgreSQL itself would not tell it."""

from __future__ import annotations

from . import messages
from .control import ACTIVE_TRANSACTION as ACTIVE_TRANSACTION
from .control import ALONE

LOCK_NOT_AVAILABLE = "55P03"

IDLE = "lifekit's sandbox: another connection has a transaction open, and does nothing in it"
OTHER_ROWS = "cached plan must not change result type"
CYCLE = "lifekit's sandbox: this waits for another connection's transaction, and that for this"
WAY_OUT = (
    "In production these are two connections, and the second does not see what the first has not "
    "committed. Pass the connection on to what runs inside its transaction, or commit first."
)
_NEEDS_NO_TRANSACTION = {ACTIVE_TRANSACTION, "2D000"}
_RUNS_OUTSIDE = (
    "PostgreSQL runs this outside of transactions only, and in lifekit's sandbox all runs inside one. "
    f"Run the test without a sandbox: {ALONE}."
)
_LOCKED = (
    "Another transaction has the lock and did not end within ten seconds. In lifekit's sandbox that is "
    "most likely another test process on the same database, or another database user of this test. Let "
    "each make rows and keys of its own, or run the test without a sandbox: "
    f"{ALONE}."
)


def hinted(error: bytes, *, in_transaction: bool) -> bytes:
    """Return an error of the server's, with a hint where it is the sandbox's doing."""
    said = messages.error_fields(error)
    code = said.get("C")
    if code in _NEEDS_NO_TRANSACTION and not in_transaction:
        hint = _RUNS_OUTSIDE
    elif code == LOCK_NOT_AVAILABLE and "lock timeout" in said.get("M", ""):
        hint = _LOCKED
    else:
        return error
    return error[:-1] + b"H" + hint.encode() + b"\0\0"
