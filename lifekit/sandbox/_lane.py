"""One of the connections that an application sees: its transactions, in terms of the savepoint."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import groupby
from typing import TypeVar

from lifekit._errors import SandboxUnsupportedError

from ._holders import ALONE, Holder
from ._shared import (
    FAILED_TRANSACTION,
    NO_TRANSACTION,
    SYNTAX_ERROR,
    Savepoint,
    Shared,
    literal,
    sqlstate,
)
from ._sql import PLAIN, Script, Statement, Verb, read

T = TypeVar("T")

_READ_COMMITTED = "read committed"
_SETTING = re.compile(
    r"""\bset\s+(?:(?P<local>local)\s+|session\s+(?!auth))?
    (?:(?P<word>role|session\s+authorization|time\s+zone|schema|names)\b
    |"?(?P<set>[\w.]+)"?\s*(?:=|\bto\b))
    |\bset_config\s*\(\s*(?:e?'(?P<called>[\w.]+)'(?P<rest>.*)|(?P<unknown>.))""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_FOR_THE_SESSION = re.compile(r",\s*(?:false|'(?:f|false|0|no|off)')(?:::\w+)?\s*\)", re.IGNORECASE)
_WORDS = {
    "session authorization": "session_authorization",
    "time zone": "timezone",
    "schema": "search_path",
    "names": "client_encoding",
}
_DEFAULTS = re.compile(
    r"\bdefault_transaction_|\bsession\s+characteristics\b|\bstandard_conforming_strings\b",
    re.IGNORECASE,
)
_LIMIT = re.compile(r"\b(?:reset|discard)\s+all\b|transaction\w*_timeout\b", re.IGNORECASE)
_ALL_STATEMENTS = re.compile(r"\s*deallocate\s+(?:prepare\s+)?all\b", re.IGNORECASE)
_STATEMENTS = re.compile(r"\s*(?:prepare|deallocate|discard)\b", re.IGNORECASE)


class Lane(Holder):
    """One of the application's connections."""

    def __init__(self, shared: Shared, package: str) -> None:
        super().__init__(package)
        self.shared = shared
        self.in_transaction: bool = False
        self.read_only: bool = False
        self.used: bool = False  # since the transaction began
        self.doubtful: bool = False  # whether the transaction still works
        self.holding: bool = False  # whether the transaction has the connection: it may have lent it
        self.wrote: bool = False  # or may have, since the transaction began
        self.active: bool = False  # whether a statement of the transaction is under way
        self.touched_session: bool = False
        self.has_cursors: bool = False  # that end with the transaction
        self._isolation = _READ_COMMITTED
        self._settings: dict[str, str] = {}  # as they were before the transaction set them for itself
        self.closed: bool = False

    def must_wait(self) -> bool:
        """Return whether its next statement can't run at once."""
        return self.shared.busy_for(self)

    def goes_directly(self, text: str) -> bool:
        """Return whether there is nothing more to a statement than sending it."""
        script = read(text)
        if self.holding and script.simple:
            self.used = self.active = True
            if not script.reads:
                self.keeps_hold()
            self.shared.acts += 1
            return True
        return False

    def lends(self) -> bool:
        """Return whether its transaction needs nothing of the connection until its next statement."""
        return self.holding and not (self.wrote or self.active or self.doubtful)

    def keeps_hold(self) -> None:
        """Note that its transaction may have written, and lends nothing until it ends."""
        self.wrote = self.shared.wrote = True

    def rests(self) -> None:
        """Note that no statement is under way."""
        self.active = False
        if self.shared.waiting:
            self.shared.rests(self)

    async def regain(self) -> None:
        """Have the connection again, if the transaction lent it."""
        # Each statement of a READ COMMITTED transaction sees what others have committed before it.
        if self.in_transaction and not self.holding:
            await self.shared.turn(self)
            try:
                await self.shared.clean_savepoint()
            except BaseException:
                self.shared.leave(self)
                raise
            self.shared.savepoint = Savepoint.UNDONE
            self.holding = True

    async def run(self, text: str, send: Callable[[], Awaitable[T]], answer: Callable[[str], T]) -> T:
        """Run what one message says.

        Args:
            text: The SQL that is sent.
            send: Sends it over the real connection.
            answer: Makes what *send* would return of the command tag, where nothing is sent.
        """
        script = read(text)
        if script.plain:
            return await self._plain(script, send)
        if len(script.statements) == 1:
            return await self._controlling(script, script.statements[0], send, answer)
        raise SandboxUnsupportedError(
            "this text has transaction control among other statements, and the sandbox takes them one "
            "by one: send each by itself, or use the driver's own calls for transactions.\n"
            f"  {_shortened(text)}"
        )

    async def run_script(self, text: str, send: Callable[[str], Awaitable[str]]) -> str:
        """Run a message that may hold several statements; *send* sends one text and gives its tag."""
        script = read(text)
        if script.plain or len(script.statements) == 1:
            return await self.run(text, lambda: send(text), str)
        self._refuse_mixed(script, text)
        tag, before = "", self.in_transaction
        for several in _messages(script):
            try:
                tag = await self.run(several, partial(send, several), str)
            except Exception as error:
                # In production a message with an error of syntax has no effect at all.
                if sqlstate(error) == SYNTAX_ERROR and not before:
                    await self.rollback()
                raise
        return tag

    def _refuse_mixed(self, script: Script, text: str) -> None:
        # Outside of BEGIN and COMMIT several statements of one message are one transaction, too, and
        # control in their midst splits it in ways that nobody means.
        inside = self.in_transaction
        for statement in script.statements:
            if statement.verb is Verb.BEGIN:
                inside = True
            elif statement.verb in {Verb.COMMIT, Verb.ROLLBACK}:
                inside = statement.chain
            elif not inside:
                raise SandboxUnsupportedError(
                    "this text begins or ends a transaction and has statements outside of it, which "
                    "the sandbox does not take apart: send them by themselves.\n"
                    f"  {_shortened(text)}"
                )

    async def _plain(self, script: Script, send: Callable[[], Awaitable[T]]) -> T:
        shared = self.shared
        shared.wrote = shared.wrote or not script.reads
        if script.session:
            self._touch_session(script)
        if script.schema:
            shared.schema_changed()
        if self.in_transaction:
            await self.regain()
            self.used = self.used or bool(script.statements)
            self.active = True
            self.wrote = self.wrote or not script.reads
            shared.acts += 1
            try:
                await self._remember_settings(script)
                result = await send()
                await self._keep_limits(script)
                return result
            except BaseException as error:
                self.doubtful = True
                shared.explain(error, in_transaction=True)
                raise
            finally:
                self.rests()
        self._refuse_without_transaction(script)
        await shared.turn(self)
        try:
            await shared.clean_savepoint()
            shared.savepoint = Savepoint.UNDONE
            try:
                await self._remember_settings(script)
                result = await send()
                await self._keep_limits(script)
            except Exception as error:
                shared.explain(error, in_transaction=False)
                raise
            if script.reads:
                shared.savepoint = Savepoint.CLEAN
            else:
                shared.savepoint = Savepoint.KEPT
                await self._commit_kept()
            return result
        finally:
            self._settings.clear()
            shared.leave(self)

    async def _keep_limits(self, script: Script) -> None:
        # The real transaction outlives the application's, and must not be ended for that.
        if script.session and any(_LIMIT.search(statement.text) for statement in script.statements):
            await self.shared.set_limits()

    def _touch_session(self, script: Script) -> None:
        self.touched_session = True
        for statement in script.statements:
            if _DEFAULTS.search(statement.text):
                raise SandboxUnsupportedError(_UNSUPPORTED_DEFAULTS)
            if _ALL_STATEMENTS.match(statement.text):
                raise SandboxUnsupportedError(_UNSUPPORTED_DEALLOCATE)
            self.has_cursors |= statement.needs_transaction == "DECLARE CURSOR"
            if _STATEMENTS.match(statement.text):
                self.shared.dirty = True

    async def _commit_kept(self) -> None:
        settings, self._settings = self._settings, {}
        pairs = settings.items()
        calls = [f"set_config({literal(name)}, {literal(old)}, true)" for name, old in pairs]
        restore = f"SELECT {', '.join(calls)}" if calls else ""
        if await self.shared.defers():
            await self.shared.check_deferred(restore)
        elif restore:
            await self.shared.control(restore)

    async def _remember_settings(self, script: Script) -> None:
        # What is set for a transaction ends with the real one, which is later than the application's.
        if not (script.local or (script.session and self._settings)):
            return
        for statement in script.statements:
            for match in _SETTING.finditer(statement.text):
                await self._remember_setting(match)

    async def _remember_setting(self, match: re.Match[str]) -> None:
        if match["unknown"]:
            raise SandboxUnsupportedError(_UNSUPPORTED_SETTING)
        word = " ".join((match["word"] or "").lower().split())
        name = _WORDS.get(word, word) or (match["set"] or match["called"]).lower()
        called_for_all = match["called"] and _FOR_THE_SESSION.search(match["rest"])
        if match["local"] or (match["called"] and not called_for_all):
            if name not in self._settings:
                self._settings[name] = await self.shared.setting(name)
        else:  # for the session, which wins
            self._settings.pop(name, None)

    def _refuse_without_transaction(self, script: Script) -> None:
        if len(script.statements) == 1:  # else they are a transaction together
            what = script.statements[0].needs_transaction
            if what is not None:
                raise self.shared.wire.error(
                    NO_TRANSACTION, f"{what} can only be used in transaction blocks"
                )

    async def prepare(self, send: Callable[[], Awaitable[T]]) -> T:
        """Have a statement parsed: it may fail as if it ran, and does nothing."""
        if self.in_transaction:
            await self.regain()
            self.active = True
            try:
                return await send()
            except BaseException:
                self.doubtful = True
                raise
            finally:
                self.rests()
        await self.shared.turn(self)
        try:
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
            result = await send()
            self.shared.savepoint = Savepoint.CLEAN
            return result
        finally:
            self.shared.leave(self)

    async def aside(self, send: Callable[[], Awaitable[T]]) -> T:
        """Do what has nothing to do with transactions, when nobody else uses the connection."""
        if self.holding:
            self.active = True
            try:
                return await send()
            finally:
                self.rests()
        await self.shared.turn(self)
        try:
            return await send()
        finally:
            self.shared.leave(self)

    # -- transactions ------------------------------------------------------------------------------

    async def _controlling(
        self,
        script: Script,
        statement: Statement,
        send: Callable[[], Awaitable[T]],
        answer: Callable[[str], T],
    ) -> T:
        match statement.verb:
            case Verb.BEGIN:
                return answer(await self.begin(statement))
            case Verb.COMMIT:
                return answer(await self.commit(chain=statement.chain))
            case Verb.ROLLBACK:
                return answer(await self.rollback(chain=statement.chain))
            case Verb.SET_TRANSACTION:
                return answer(await self._set_transaction(statement))
            case Verb.SET_CONSTRAINTS:
                if not self.in_transaction:
                    return answer("SET CONSTRAINTS")  # with a warning that it does nothing
                self.shared.deferrable = True
            case Verb.SAVEPOINT | Verb.RELEASE | Verb.ROLLBACK_TO:
                self._refuse_savepoint(statement)
            case Verb.LISTEN | Verb.TWO_PHASE:
                raise SandboxUnsupportedError(_UNSUPPORTED[statement.verb])
            case _:
                pass
        return await self._plain(script, send)

    async def begin(self, modes: Statement | None = None) -> str:
        """Begin a transaction, and have the connection alone until it ends."""
        tag = "START TRANSACTION" if modes and modes.text.lstrip()[:1] in "sS" else "BEGIN"
        if self.in_transaction:
            if self.doubtful:
                await self.shared.control("SELECT")  # raises if the transaction has failed
            if modes is not None and (modes.isolation or modes.read_only is not None):
                await self._set_transaction(modes)
            return tag
        await self.shared.turn(self)
        try:
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
            self.read_only = bool(modes and modes.read_only)
            self._isolation = (modes and modes.isolation) or _READ_COMMITTED
            if self.read_only:
                await self.shared.control("SET TRANSACTION READ ONLY")
        except BaseException:
            self.shared.leave(self)
            raise
        self.in_transaction = self.holding = True
        self.used = self.doubtful = False
        # Where it keeps to one snapshot, nobody may change anything meanwhile.
        self.wrote = self.read_only or self._isolation in ("repeatable read", "serializable")
        self._settings.clear()
        self.has_cursors = False
        self.is_used_here()
        self.rests()
        return tag

    async def commit(self, *, chain: bool = False) -> str:
        """End the transaction as a commit does, and return the command tag."""
        if not self.in_transaction:
            self._refuse_chain("COMMIT", chain)
            return "COMMIT"
        if not self.holding:  # it did nothing
            self._end_what_it_lent(chain=chain)
            return "COMMIT"
        shared = self.shared
        if not await self._works():
            return await self.rollback(chain=chain)
        if self.read_only:  # it has nothing to keep, and only a rollback takes back READ ONLY
            shared.savepoint = Savepoint.UNDONE
        else:
            shared.savepoint = Savepoint.KEPT
            try:
                if self.has_cursors:
                    await shared.close_cursors()
                await self._commit_kept()
            except BaseException:
                await self._end(chain=False)
                raise
        await self._end(chain=chain)
        return "COMMIT"

    async def rollback(self, *, chain: bool = False) -> str:
        """Undo the transaction, and return the command tag."""
        if self.holding:
            self.shared.savepoint = Savepoint.UNDONE
            await self._end(chain=chain)
        elif self.in_transaction:
            self._end_what_it_lent(chain=chain)
        else:
            self._refuse_chain("ROLLBACK", chain)
        return "ROLLBACK"

    def _refuse_chain(self, what: str, chain: bool) -> None:
        if chain:
            raise self.shared.wire.error(
                NO_TRANSACTION, f"{what} AND CHAIN can only be used in transaction blocks"
            )

    def abandon(self) -> None:
        """Undo the transaction of a connection that was closed."""
        self.closed = True
        if self.holding:
            self.shared.savepoint = Savepoint.UNDONE
        self.in_transaction = self.holding = False
        self.shared.leave(self)

    def _end_what_it_lent(self, *, chain: bool) -> None:
        self.in_transaction = chain
        self.used = False

    async def _end(self, *, chain: bool) -> None:
        if chain:
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
            self.used = self.doubtful = False
            if self.read_only:
                await self.shared.control("SET TRANSACTION READ ONLY")
            return
        self.in_transaction = self.holding = False
        self.shared.leave(self)

    async def _works(self) -> bool:
        if self.doubtful:
            try:
                await self.shared.control("SELECT")
            except Exception as error:
                if sqlstate(error) != FAILED_TRANSACTION:
                    raise
                return False
        return True

    async def _set_transaction(self, statement: Statement) -> str:
        if not self.in_transaction:
            return "SET"  # with a warning that it does nothing
        await self.regain()
        self.wrote = True
        if self.doubtful:
            await self.shared.control("SELECT")  # raises if the transaction has failed
        if statement.isolation not in (None, self._isolation):
            if self.used:
                self.doubtful = True
                # Whatever was asked for, this fails as it does, and as it would.
                await self.shared.control("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            self._isolation = statement.isolation or _READ_COMMITTED
        if statement.read_only and self.used and not self.read_only:
            raise SandboxUnsupportedError(
                "in the sandbox a transaction becomes READ ONLY before its first statement, not after: "
                "only a rollback takes that back. Begin it so: BEGIN READ ONLY."
            )
        if statement.read_only is False and self.read_only and not self.used:
            self.read_only = False  # only a rollback takes READ ONLY back, and there is nothing to lose
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
        elif statement.read_only is not None:
            try:
                mode = "ONLY" if statement.read_only else "WRITE"
                await self.shared.control(f"SET TRANSACTION READ {mode}")
            except BaseException:
                self.doubtful = True
                raise
            self.read_only = self.read_only or statement.read_only
        return "SET"

    def _refuse_savepoint(self, statement: Statement) -> None:
        if not self.in_transaction:
            what = {
                Verb.SAVEPOINT: "SAVEPOINT",
                Verb.RELEASE: "RELEASE SAVEPOINT",
                Verb.ROLLBACK_TO: "ROLLBACK TO SAVEPOINT",
            }[statement.verb]
            raise self.shared.wire.error(
                NO_TRANSACTION, f"{what} can only be used in transaction blocks"
            )


def _messages(script: Script) -> Iterator[str]:
    """Yield its statements: those that control a transaction alone, the others together."""
    for plain, several in groupby(script.statements, lambda each: each.verb in PLAIN):
        texts = [each.text for each in several]
        yield from [";\n".join(texts)] if plain else texts


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) < 120 else f"{line[:117]}..."


_UNSUPPORTED = {
    Verb.LISTEN: (
        "LISTEN can't work in the sandbox: PostgreSQL delivers notifications when a transaction "
        "commits, and here none does. Call what handles the notification directly, or run the test "
        f"without a sandbox: {ALONE}."
    ),
    Verb.TWO_PHASE: (
        "a prepared transaction outlives its connection, and so it would the sandbox. Run the test "
        f"without one: {ALONE}."
    ),
}

_UNSUPPORTED_DEALLOCATE = (
    "DEALLOCATE ALL would take the prepared statements of the application's other connections as well, "
    f"which in the sandbox are one. Deallocate by name, or run the test without a sandbox: {ALONE}."
)
_UNSUPPORTED_SETTING = (
    "set_config() with a name that is not in the text: the sandbox can't tell what to take back when "
    "the application's transaction ends, sooner than the real one. Write the name as a constant: "
    "set_config('app.user', $1, true)."
)
_UNSUPPORTED_DEFAULTS = (
    "how transactions begin by default, and how strings are written, can't be changed in the sandbox, "
    "which has begun its own and reads what is sent. Say it where a transaction begins, or run the "
    f"test without a sandbox: {ALONE}."
)
