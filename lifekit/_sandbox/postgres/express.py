"""The usual case by the short way: one statement that asks for no more than to be run.

Most of what an application says in a block is a prepared statement that is run, or a Query of one
statement, when the session is free for it. Nothing of that has to be seen to but the savepoint, so that
it is sent at once, and its answer ends it. All else takes the long way, which is the conversation's.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from .messages import Frontend
from .sql import Statement, Verb, read

if TYPE_CHECKING:
    from .conversation import Conversation  # whose short way it is

_CONTROLS = frozenset({Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK})
_RUN = [Frontend.BIND, Frontend.EXECUTE, Frontend.SYNC]
_ALL_ROWS = b"\0\0\0\0"
_LONG = 10_000
_SPECIAL = re.compile(
    "advisory|cursor|config|notif|listen|copy|constraints|search_path|client_min|schema|pg_settings|show",
    re.IGNORECASE,
)
"""What is in a text of which more than the answer may come."""


@lru_cache(maxsize=4096)
def _usual(text: bytes) -> bool | Statement | None:
    """Return whether a text surely does nothing but read; or the statement that begins or ends a
    transaction; None where the long way has to see to it.
    """
    decoded = text.decode("utf-8", "surrogateescape")
    script = read(decoded)
    if len(script.statements) != 1 or _SPECIAL.search(decoded) is not None:
        return None
    [statement] = script.statements
    if statement.verb in _CONTROLS and not (statement.chain or statement.read_only is not None):
        return statement
    is_plain = statement.verb is Verb.PLAIN and statement.needs_transaction is None
    return script.reads if is_plain and script.simple else None


def takes(conversation: Conversation, data: bytes, found: list[tuple[int, int, int]]) -> bool:
    """Send what a client says at once, where that is all there is to it; return whether it was."""
    if not conversation.is_free:
        return False
    if len(found) == 1:
        return found[0][0] == Frontend.QUERY and _query(conversation, data)
    if [kind for kind, _, _ in found] != _RUN:
        return False
    _, bind, execute = found[0]
    _, _, sync = found[1]
    if data[bind + 5] or data[execute + 5]:  # not the unnamed portal
        return False
    name_ends = data.find(0, bind + 6, execute)
    name = data[bind + 6 : name_ends]
    client = conversation.client
    prepared, known = client.prepared.get(name), client.known.get(name)
    if prepared is None or known is None or conversation.session.may_differ:
        return False
    reads = _usual(prepared.text)
    if not isinstance(reads, bool) or not conversation.carrier.goes_at_once(only_reads=reads):
        return False
    body = b"\0%b%b" % (known, data[name_ends:execute])
    sent = b"B%b%b%b" % ((len(body) + 4).to_bytes(4, "big"), body, data[execute:])
    is_whole = data[execute + 6 : sync] == _ALL_ROWS
    conversation.hurries(prepared.text, is_whole=is_whole)
    conversation.carrier.hurry(sent, conversation.has_hurried, only_reads=reads, simple=False)
    return True


def _query(conversation: Conversation, data: bytes) -> bool:
    if len(data) > _LONG:
        return False
    reads = _usual(data[5:-1])
    if isinstance(reads, Statement):
        return conversation.controls_at_once(reads)
    if reads is None or not conversation.carrier.goes_at_once(only_reads=reads):
        return False
    conversation.hurries(None, is_whole=True)
    conversation.carrier.hurry(data, conversation.has_hurried, only_reads=reads, simple=True)
    return True
