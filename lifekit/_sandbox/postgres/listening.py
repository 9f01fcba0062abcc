"""What one client's transactions listen to and send: known while they run, done at their commits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from . import notifications
from .control import ALONE, UNSUPPORTED, Failure
from .messages import error_fields
from .notifications import Event, Pending
from .sql import Statement

if TYPE_CHECKING:
    from .conversation import Conversation  # whose transactions those are
    from .session import Session  # by which those listen

_Steps = Generator[None, None, None]
Ask = Callable[[str, int], Generator[None, None, list[str | None]]]
"""What runs a query of the gateway's own, and returns its last row, of so many columns."""

_HINT: Final = (
    "Functions have to call pg_notify() by that name alone, without a search_path of their own; rules "
    "and functions in SQL can't run NOTIFY; and the role has to have the right to CREATE schemas in "
    f"the database. Or run the test without a sandbox: {ALONE}."
)


class Listening:
    """That of one client in a block."""

    def __init__(self, conversation: Conversation, session: Session, ask: Ask) -> None:
        """*ask* asks the session, in the client's turn."""
        self._conversation, self._session, self._ask = conversation, session, ask
        self.pending = Pending()
        self._said: Iterator[Statement] = iter(())  # the NOTIFY statements that the server is at
        self._is_uncovered = False
        self._level: str | None = None  # of messages, as the transaction has set it

    def is_at(self, texts: Iterable[str]) -> None:
        """Take note of what the server gets now."""
        self._said = notifications.notifies(texts)

    def before(self, texts: Iterable[str]) -> _Steps:
        """Let texts that ask for what is covered, or for their client's channels, find it."""
        text = "\n".join(texts)
        if notifications.sees_channels(text):
            yield from self._ask(notifications.telling(self._conversation.ear.channels), 1)
        if notifications.sees(text):
            yield from self.uncover(level=notifications.sees_level(text))

    def after(self) -> _Steps:
        """Cover again what was not."""
        if self._is_uncovered:
            self._is_uncovered = False
            row = yield from self._ask(self._session.capture.cover, 4)
            self._level = row[0]

    def uncover(self, *, level: bool = True) -> _Steps:
        """Give `search_path` back as the client has it, and `client_min_messages` if *level*."""
        self._is_uncovered = True
        yield from self._ask(self._session.capture.uncover(level=level), 1 + level)

    def noticed(self, body: bytes, level: str | None) -> bool:
        """Take note of what a notice tells; return whether the client gets it.

        *level* is the client's `client_min_messages`, as far as it is known.
        """
        fields = error_fields(body, "surrogateescape")
        event = notifications.traced(fields, self._said)
        if event is not None:
            self.pending.add(event)
            return False
        return notifications.is_shown(fields, self._level or level or notifications.SHOWN)

    def publish(self) -> Failure | None:
        """Do what PostgreSQL does at a commit with what was listened to and sent.

        Return why not, where what was sent is not known, and somebody waits for it.
        """
        if not self.pending.events:
            return None
        client, ear = self._conversation.client, self._conversation.ear
        channels = self.pending.listening(ear.channels)
        sent = {(each.channel or "", each.payload): each for each in self.pending.sent}
        for (channel, payload), event in sent.items():
            if payload is None and (channel in channels or client.hub.is_heard(client, channel)):
                return _not_delivered(event)
        ear.channels = channels
        for (channel, payload), event in sent.items():
            if payload is not None:
                client.hub.deliver(client, channel, notifications.notification(client.number, event))
        return None

    def clear(self) -> None:
        """Forget everything, for the transaction is over."""
        self.pending.clear()
        self._level = None
        self._is_uncovered = False


def _not_delivered(event: Event) -> Failure:
    by = event.origin.replace("\n", ", ") or "a statement of the client's"
    return Failure(
        UNSUPPORTED,
        f"lifekit's sandbox: what was sent to the channel \"{event.channel}\" can't be delivered",
        f"Somebody listens there, and its payload is not known. It was sent by: {by}",
        _HINT,
    )
