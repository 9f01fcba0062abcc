"""Transaction control, answered as PostgreSQL does, without PostgreSQL."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NoReturn

from . import names
from .messages import Parse, complete, error, warning
from .sql import Script, Statement, Verb, read

FAILED: Final = "25P02"
NO_TRANSACTION: Final = "25P01"
ACTIVE_TRANSACTION: Final = "25001"
UNSUPPORTED: Final = "0A000"
ALONE: Final = '@pytest.mark.lifekit(isolation="none"), on a database of its own'
READ_COMMITTED: Final = "read committed"
RESET: Final = b"SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;"
"""What asyncpg's pool says of each connection that comes back, as of asyncpg 0.32."""
RESET_DONE: Final = b"".join(map(complete, ("SELECT 1", "CLOSE CURSOR ALL", "UNLISTEN", "RESET")))

_NESTED: Final = {
    Verb.SAVEPOINT: "SAVEPOINT",
    Verb.RELEASE: "RELEASE SAVEPOINT",
    Verb.ROLLBACK_TO: "ROLLBACK TO SAVEPOINT",
}
"""What goes to the server in a transaction, and is an error elsewhere."""
_CHANGES: Final = frozenset({Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK, Verb.SET_TRANSACTION})
_REFUSED: Final = {Verb.TWO_PHASE: "PREPARE TRANSACTION, COMMIT PREPARED and ROLLBACK PREPARED"}


class Failure(Exception):
    """What the gateway refuses, as PostgreSQL tells it."""

    def __init__(
        self, code: str, text: str, detail: str = "", hint: str = "", source: str = ""
    ) -> None:
        """*code* is the SQLSTATE, *source* the function of PostgreSQL's that would say so."""
        super().__init__(text)
        self.message = error(code, text, detail=detail, hint=hint, source=source)
        """The message for the client."""


class Ends(Enum):
    """How a transaction ended."""

    COMMITTED = auto()
    UNDONE = auto()


@dataclass(slots=True)
class Transaction:
    """The transaction that a client believes it is in."""

    is_open: bool = False
    failed: bool = False
    used: bool = False  # something of it has reached the server
    wrote: bool = False
    has_savepoints: bool = False
    has_portals: bool = False  # of which rows are still to come
    isolation: str | None = None
    read_only: bool = False
    was_read_only: bool = False  # the one before
    default_isolation: str | None = None
    reads_by_default: bool = False

    @property
    def status(self) -> str:
        """As a ReadyForQuery tells it."""
        return ("E" if self.failed else "T") if self.is_open else "I"

    @property
    def parks(self) -> bool:
        """Whether another client may have the session, and nobody can tell afterwards.

        READ COMMITTED sees with each statement what was committed before it; a failed transaction has
        let go of all that it had.
        """
        if not self.used:
            return True
        if self.has_portals or self.has_savepoints:
            return False
        if self.failed:
            return True
        return not self.wrote and self.isolation not in ("repeatable read", "serializable")


Local = Statement | names.Forgets
"""What may be answered here."""


def control_of(prepared: Parse) -> Local | None:
    """Return the one statement of what is prepared, where it may be answered here."""
    text = prepared.text.decode("utf-8", "surrogateescape")
    script = read(text)
    if script.plain and script.session:
        return names.forgets(text)
    if len(script.statements) != 1:
        return None
    statement = script.statements[0]
    if script.plain and script.session:
        return names.forgets(statement.text)
    known = statement.verb in _CHANGES or statement.verb in _REFUSED or statement.verb in _NESTED
    return statement if known else None


def is_local(control: Local, transaction: Transaction) -> bool:
    """Return whether that is answered here."""
    if isinstance(control, names.Forgets):
        return True
    if control.verb in _NESTED:
        return not transaction.is_open
    return control.verb in _CHANGES or control.verb in _REFUSED


def has_local(script: Script, transaction: Transaction) -> bool:
    """Return whether a part of a script is answered here."""
    return any(is_local(each, transaction) or each.verb is Verb.BEGIN for each in script.statements)


def answer(statement: Statement, transaction: Transaction) -> tuple[bytes, Ends | None]:
    """Change the transaction; return the answer, and how the one before ended.

    Raises:
        Failure: PostgreSQL, or the sandbox, refuses it.
    """
    verb = statement.verb
    if verb in _REFUSED:
        text = f"lifekit's sandbox does not support {_REFUSED[verb]}"
        raise Failure(UNSUPPORTED, text, hint=f"Run the test without a sandbox: {ALONE}.")
    if verb in _NESTED:
        _refuse_outside(_NESTED[verb])
    if verb is Verb.BEGIN:
        return _begin(statement, transaction), None
    if verb is Verb.SET_TRANSACTION:
        return _set(statement, transaction), None
    return _end(statement, transaction)


def _refuse_outside(what: str) -> NoReturn:
    raise Failure(NO_TRANSACTION, f"{what} can only be used in transaction blocks")


def _refuse_failed(transaction: Transaction) -> None:
    if transaction.failed:
        text = "current transaction is aborted, commands ignored until end of transaction block"
        raise Failure(FAILED, text)


def _begin(statement: Statement, transaction: Transaction) -> bytes:
    tag = "START TRANSACTION" if statement.text.lstrip()[:1] in "sS" else "BEGIN"
    _refuse_failed(transaction)
    if transaction.is_open:
        told = warning(ACTIVE_TRANSACTION, "there is already a transaction in progress")
        try:
            _modes(statement, transaction)
        except Failure as failure:
            failure.message = told + failure.message
            raise
        return told + complete(tag)
    _open(transaction)
    transaction.isolation = transaction.default_isolation
    transaction.read_only = transaction.reads_by_default
    _modes(statement, transaction)
    return complete(tag)


def _open(transaction: Transaction) -> None:
    transaction.is_open, transaction.failed, transaction.used = True, False, False
    transaction.has_savepoints = transaction.has_portals = False


def _modes(statement: Statement, transaction: Transaction) -> None:
    isolation, read_only = statement.isolation, statement.read_only
    if isolation is not None and isolation != (transaction.isolation or READ_COMMITTED):
        if transaction.has_savepoints:
            text = "SET TRANSACTION ISOLATION LEVEL must not be called in a subtransaction"
            raise Failure(ACTIVE_TRANSACTION, text)
        if transaction.used:
            text = "SET TRANSACTION ISOLATION LEVEL must be called before any query"
            raise Failure(ACTIVE_TRANSACTION, text)
        transaction.isolation = isolation
    if read_only is False and transaction.read_only and transaction.used:
        text = "transaction read-write mode must be set before any query"
        raise Failure(ACTIVE_TRANSACTION, text)
    if read_only is not None:
        transaction.read_only = read_only


def _set(statement: Statement, transaction: Transaction) -> bytes:
    _refuse_failed(transaction)
    if not transaction.is_open:
        told = warning(NO_TRANSACTION, "SET TRANSACTION can only be used in transaction blocks")
        return told + complete("SET")
    _modes(statement, transaction)
    return complete("SET")


def _end(statement: Statement, transaction: Transaction) -> tuple[bytes, Ends | None]:
    asked = "COMMIT" if statement.verb is Verb.COMMIT else "ROLLBACK"
    if not transaction.is_open:
        if statement.chain:
            _refuse_outside(f"{asked} AND CHAIN")
        return warning(NO_TRANSACTION, "there is no transaction in progress") + complete(asked), None
    tag = "ROLLBACK" if transaction.failed else asked
    transaction.was_read_only = transaction.read_only
    if statement.chain:
        _open(transaction)  # with the modes of the one before
    else:
        transaction.is_open = transaction.failed = transaction.used = False
        transaction.has_savepoints = transaction.has_portals = False
        transaction.isolation, transaction.read_only = None, False
    return complete(tag), Ends.COMMITTED if tag == "COMMIT" else Ends.UNDONE
