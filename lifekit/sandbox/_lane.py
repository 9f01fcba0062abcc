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
    ACTIVE_TRANSACTION,
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

_LOCAL = re.compile(r"""\bset\s+local\s+"?([\w.]+)|\bset_config\s*\(\s*'([\w.]+)'""", re.IGNORECASE)


class Lane(Holder):
    """One of the application's connections."""

    def __init__(self, shared: Shared, package: str) -> None:
        super().__init__(package)
        self.shared = shared
        self.in_transaction = False
        self.read_only = False
        self.used = False  # since the transaction began
        self.doubtful = False  # whether the transaction still works
        self.touched_session = False
        self._settings: dict[str, str] = {}  # as they were before the transaction set them for itself
        self.closed = False

    def must_wait(self) -> bool:
        """Return whether its next statement can't run at once."""
        return self.shared.busy_for(self)

    def unique_name(self) -> str:
        """Return a name for a statement that has none, which the end of the block deallocates."""
        return self.shared.unique_name()

    def goes_directly(self, text: str) -> bool:
        """Return whether there is nothing more to a statement than sending it."""
        if self.in_transaction and read(text).simple:
            self.used = True
            self.shared.acts += 1
            return True
        return False

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
        if script.session:
            self.touched_session = True
        if script.schema:
            shared.schema_changed()
        if self.in_transaction:
            self.used = True
            shared.acts += 1
            try:
                if script.local:
                    await self._remember_settings(script)
                return await send()
            except BaseException:
                self.doubtful = True
                raise
        await shared.turn(self)
        try:
            await shared.clean_savepoint()
            shared.savepoint = Savepoint.UNDONE
            try:
                result = await send()
            except Exception as error:
                shared.refuse_what_needs_no_transaction(error)
                raise
            shared.savepoint = Savepoint.KEPT
            if await shared.defers():
                await shared.check_deferred()
            return result
        finally:
            shared.leave(self)

    async def _remember_settings(self, script: Script) -> None:
        # Their end is that of the real transaction; the application's is earlier.
        for statement in script.statements:
            for names in _LOCAL.findall(statement.text):
                name = "".join(names).lower()
                if name not in self._settings:
                    self._settings[name] = await self.shared.setting(name)

    async def _restore_settings(self) -> None:
        settings, self._settings = self._settings, {}
        if settings:
            pairs = settings.items()
            calls = [f"set_config({literal(name)}, {literal(old)}, true)" for name, old in pairs]
            await self.shared.control(f"SELECT {', '.join(calls)}")

    async def prepare(self, send: Callable[[], Awaitable[T]]) -> T:
        """Have a statement parsed: it may fail as if it ran, and does nothing."""
        if self.in_transaction:
            try:
                return await send()
            except BaseException:
                self.doubtful = True
                raise
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
        if self.in_transaction:
            return await send()
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
            return tag
        await self.shared.turn(self)
        try:
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
            self.read_only = bool(modes and modes.read_only)
            if self.read_only:
                await self.shared.control("SET TRANSACTION READ ONLY")
        except BaseException:
            self.shared.leave(self)
            raise
        self.in_transaction = True
        self.used = self.doubtful = False
        self._settings.clear()
        self.is_used_here()
        return tag

    async def commit(self, *, chain: bool = False) -> str:
        """End the transaction as a commit does, and return the command tag."""
        if not self.in_transaction:
            return "COMMIT"
        shared = self.shared
        if not await self._works():
            return await self.rollback(chain=chain)
        if self.read_only:  # it has nothing to keep, and only a rollback takes back READ ONLY
            shared.savepoint = Savepoint.UNDONE
        else:
            shared.savepoint = Savepoint.KEPT
            try:
                if await shared.defers():
                    await shared.check_deferred()
                await self._restore_settings()
            except BaseException:
                await self._end(chain=False)
                raise
        await self._end(chain=chain)
        return "COMMIT"

    async def rollback(self, *, chain: bool = False) -> str:
        """Undo the transaction, and return the command tag."""
        if self.in_transaction:
            self.shared.savepoint = Savepoint.UNDONE
            await self._end(chain=chain)
        return "ROLLBACK"

    def abandon(self) -> None:
        """Undo the transaction of a connection that was closed."""
        self.closed = True
        if self.in_transaction:
            self.shared.savepoint = Savepoint.UNDONE
            self.in_transaction = False
            self.shared.leave(self)

    async def _end(self, *, chain: bool) -> None:
        if chain:
            await self.shared.clean_savepoint()
            self.shared.savepoint = Savepoint.UNDONE
            self.used = self.doubtful = False
            if self.read_only:
                await self.shared.control("SET TRANSACTION READ ONLY")
            return
        self.in_transaction = False
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
        if self.in_transaction:
            if statement.isolation is not None and self.used:
                self.doubtful = True
                raise self.shared.wire.error(
                    ACTIVE_TRANSACTION,
                    "SET TRANSACTION ISOLATION LEVEL must be called before any query",
                )
            if statement.read_only is not None:
                await self.shared.control(
                    f"SET TRANSACTION READ {'ONLY' if statement.read_only else 'WRITE'}"
                )
                self.read_only = statement.read_only and not self.used
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
        if (statement.name or "").startswith("lifekit_"):
            raise SandboxUnsupportedError(
                f"a savepoint of the application can't be called {statement.name!r}: the sandbox's own "
                "are. Give it another name."
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
