"""LISTEN and NOTIFY in a block, in which no commit ever comes at which PostgreSQL would deliver.

PostgreSQL tells of each LISTEN, UNLISTEN and NOTIFY that it runs, in a debug message with the channel,
where `trace_notify` is on. The payload is in the statement's text, which is the client's or, inside of
functions, in the context of that message. What pg_notify() is given stands nowhere; so a function of
that name is found before PostgreSQL's own, and runs a NOTIFY. It numbers them by a setting, which
PostgreSQL takes back together with what a function does and catches.

All of that is done in a block's own transaction, from when somebody listens. Clients don't see it: what
may read or change `search_path` or `client_min_messages` is run without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from struct import pack
from typing import Final

from .messages import Backend, message
from .settings import literal
from .sql import Script, Statement, Verb, read, unqualified

COVERED: Final = frozenset({"search_path", "client_min_messages"})
"""The settings that are not a client's own while the session listens in."""
COUNTER: Final = "lifekit.notified"
"""The setting with the number of the last notification that nothing has undone."""
SHOWN: Final = "notice"
"""Up to where messages are shown, if nobody says otherwise."""
CHANNELS: Final = """SELECT pg_catalog.pg_backend_pid(), pg_catalog.json_agg(c)
FROM pg_catalog.pg_listening_channels() AS c"""
"""The query for the number of a real connection's process, and for what it listens to."""

_LISTENS = re.compile(r"\blisten\b", re.IGNORECASE)
_SEES = re.compile(
    r"search_path|client_min_messages|current_schemas|pg_settings|\b(?:show|reset)\s+all\b"
    r"|\bset\s+(?:(?:local|session)\s+)?schema\b",
    re.IGNORECASE,
)
_SEES_LEVEL = re.compile(r"client_min_messages|pg_settings|\ball\b", re.IGNORECASE)
_SEES_CHANNELS = re.compile(r"pg_listening_channels", re.IGNORECASE)
_NESTED = frozenset({Verb.SAVEPOINT, Verb.RELEASE, Verb.ROLLBACK_TO})
_RANKS = {"DEBUG": 0, "LOG": 1, "INFO": 9, "NOTICE": 2, "WARNING": 3}
_TRACE = re.compile(
    r"Async_(?:Notify\((?P<sent>.*)\)|(?P<what>Listen|Unlisten)\((?P<channel>.*),\d+\)|UnlistenAll\(\d+\))",
    re.DOTALL,
)
_NUMBER = re.compile(r" --lifekit (\d+)")
_IN_FUNCTION = re.compile(r"""[^"«»„“]*["«»„“]\s*(notify\b.*)""", re.IGNORECASE | re.DOTALL)
"""A context whose innermost statement is a NOTIFY, in the quotes of whatever language."""


# -- texts ----------------------------------------------------------------------------------------


def listens(text: str) -> bool:
    """Return whether a text may listen to something."""
    return read(text).session and _LISTENS.search(text) is not None


def sees(text: str) -> bool:
    """Return whether a text may read or change what is covered."""
    return _SEES.search(text) is not None


def sees_level(text: str) -> bool:
    """Return whether that may be `client_min_messages`."""
    return _SEES_LEVEL.search(text) is not None


def sees_channels(text: str) -> bool:
    """Return whether a text asks to what its connection listens."""
    return _SEES_CHANNELS.search(text) is not None


def stands_alone(text: str) -> bool:
    """Return whether nothing may be sent together with a text, for what it undoes or sees."""
    return sees(text) or any(each.verb in _NESTED for each in read(text).statements)


def has_parts(script: Script) -> bool:
    """Return whether something in a script stands alone, so that it is run in parts."""
    return len(script.statements) > 1 and any(stands_alone(each.text) for each in script.statements)


def found(text: bytes) -> bytes:
    """Return a text that calls pg_notify() by that name alone, so that the session's own is found."""
    if b"pg_notify" not in text:
        return text
    decoded = unqualified(text.decode("utf-8", "surrogateescape"), "PG_CATALOG", "PG_NOTIFY")
    return decoded.encode("utf-8", "surrogateescape")


def notifies(texts: Iterable[str]) -> Iterator[Statement]:
    """Yield the NOTIFY statements that are not inside of functions."""
    for text in texts:
        yield from (each for each in read(text).statements if each.verb is Verb.NOTIFY)


# -- what PostgreSQL tells ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """A LISTEN, an UNLISTEN or a NOTIFY that has run."""

    verb: Verb
    channel: str | None
    """None for all of them."""
    payload: str | None = None
    """None where it is not known."""
    number: int | None = None
    """That of a call of pg_notify()."""
    origin: str = ""
    """Where it was, if not in what the client said."""


def is_shown(fields: dict[str, str], level: str) -> bool:
    """Return whether who asked for messages from *level* on gets this one."""
    least = 0 if level.startswith("debug") else _RANKS.get(level.upper(), 4)
    return _RANKS.get(fields.get("V", ""), 9) >= least


def traced(fields: dict[str, str], said: Iterator[Statement]) -> Event | None:
    """Return what a notice tells of; *said* are the client's own NOTIFY statements that may be next."""
    match = _TRACE.fullmatch(fields.get("M", ""))
    if match is None or fields.get("V") != "DEBUG":
        return None
    if match["sent"] is not None:
        return _notified(match["sent"], fields.get("W", ""), said)
    return Event(Verb.LISTEN if match["what"] == "Listen" else Verb.UNLISTEN, match["channel"])


def _notified(channel: str, context: str, said: Iterator[Statement]) -> Event:
    unknown = Event(Verb.NOTIFY, channel, origin=context)
    if not context:
        found = next(said, None)
    elif (match := _IN_FUNCTION.match(context)) is not None:
        # What follows it, from the quote that ends it on, is read as the beginning of a name.
        found = next(iter(read(match[1]).statements))
    else:
        found = None
    if found is None or found.verb is not Verb.NOTIFY or found.name != channel:
        return unknown
    number = _NUMBER.search(context) if context else None
    return replace(unknown, payload=found.payload or "", number=int(number[1]) if number else None)


# -- what a transaction has done ------------------------------------------------------------------


class Pending:
    """What a client's transaction has listened to and sent, which comes true at its commit."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._marks: list[tuple[str | None, int]] = []  # savepoints, and how many events came before

    def add(self, event: Event) -> None:
        """Take note of what has run."""
        if event.number is not None:
            self.settle(event.number - 1)
        self.events.append(event)

    def settle(self, number: int) -> None:
        """Forget what was undone inside of functions: only calls up to that number have stayed."""
        stays = [(each.number or 0) <= number for each in self.events]
        self._marks = [(name, sum(stays[:events])) for name, events in self._marks]
        self.events = [each for each, does in zip(self.events, stays, strict=True) if does]

    def note(self, statement: Statement) -> None:
        """Take note of a statement that is about to run: savepoints undo what came after them."""
        if statement.verb not in _NESTED:
            return
        if statement.verb is Verb.SAVEPOINT:
            self._marks.append((statement.name, len(self.events)))
            return
        while self._marks:
            name, events = self._marks.pop()
            if name != statement.name:
                continue
            if statement.verb is Verb.ROLLBACK_TO:
                self._marks.append((name, events))
                del self.events[events:]
            return

    def clear(self) -> None:
        """Forget everything, for the transaction is over."""
        self.events.clear()
        self._marks.clear()

    @property
    def is_numbered(self) -> bool:
        """Whether some of it may have been undone inside of functions."""
        return any(each.number is not None for each in self.events)

    def without_numbers(self) -> None:
        """Take note that counting begins anew."""
        self.events = [replace(each, number=None) for each in self.events]

    def listening(self, channels: Set[str]) -> set[str]:
        """Return what who has listened to *channels* listens to from now on."""
        found = set(channels)
        for each in self.events:
            if each.verb is Verb.LISTEN and each.channel is not None:
                found.add(each.channel)
            elif each.verb is Verb.UNLISTEN:
                found -= {each.channel} if each.channel is not None else set(found)
        return found

    @property
    def sent(self) -> list[Event]:
        """The notifications."""
        return [each for each in self.events if each.verb is Verb.NOTIFY]


class Ear:
    """What a client in a block listens to."""

    def __init__(self, channels: Iterable[str], send: Callable[[bytes], object]) -> None:
        """It has listened to *channels* since before; *send* sends to the client."""
        self.channels, self._send = set(channels), send
        self._heard: list[bytes] = []
        self._before = set(self.channels)
        self._marks: dict[int, set[str]] = {}  # of blocks around the innermost one, by their depth

    def mark(self, depth: int) -> None:
        """Note to what it listens, for a block begins inside of the one that it is in."""
        self._marks[depth] = set(self.channels)

    def back(self, depth: int) -> None:
        """Listen to what it did before the block inside of *depth*."""
        self.channels = self._marks.pop(depth + 1, self._before)

    def hear(self, channel: str, notification: bytes, *, at_once: bool) -> None:
        """Take a notification; the client gets it *at_once*, or when its transaction is over."""
        if channel not in self.channels:
            return
        if at_once:
            self._send(notification)
        else:
            self._heard.append(notification)

    def tell(self) -> None:
        """Send what the client has not got yet."""
        for notification in self._heard:
            self._send(notification)
        self._heard.clear()


def notification(number: int, event: Event) -> bytes:
    """Return what delivers a notification; *number* is that of the connection which sent it."""
    told = f"{event.channel}\0{event.payload}\0".encode("utf-8", "surrogateescape")
    return message(Backend.NOTIFICATION, pack(">i", number) + told)


def channels_in(answer: str | None) -> set[str]:
    """Return what `CHANNELS` has found last."""
    return set(json.loads(answer)) if answer else set()


# -- what is done on the session --------------------------------------------------------------------


class Capture:
    """How a session gets to know what is sent."""

    def __init__(self, schema: str) -> None:
        """*schema* is a name that nobody else has."""
        self.schema = schema
        self.is_wanted = self.is_installed = False
        """Whether somebody listens in the block, and whether the session has what that takes."""
        self.install = _INSTALL.replace("SCHEMA_", schema)
        """Makes the functions, where the role may."""
        suffix = f", {schema}, pg_catalog"
        self.cover = _COVER.format(suffix=literal(suffix), level=_LEVEL)
        """Lets them be found, and PostgreSQL tell; gives what the client's `client_min_messages` is."""
        path = f"replace(current_setting('search_path'), {literal(suffix)}, '')"
        self._path = f"SELECT set_config('search_path', {path}, false)"
        self._views = {"search_path": path, "client_min_messages": _LEVEL}

    @property
    def views(self) -> dict[str, str]:
        """Return the expressions for what is covered, as the client has it."""
        return self._views if self.is_wanted else {}

    def uncover(self, *, level: bool) -> str:
        """Return what gives `search_path` back, and `client_min_messages` if *level*."""
        return self._path + (_UNCOVER_LEVEL if level else "")


def telling(channels: Set[str]) -> str:
    """Return what lets pg_listening_channels() tell of *channels*."""
    told = literal(json.dumps(sorted(channels), ensure_ascii=False))
    return f"SELECT set_config('lifekit.channels', {told}, false)"


_INSTALL = f"""DO $lifekit$ DECLARE role text := current_setting('role'); BEGIN
PERFORM set_config('role', 'none', false);
CREATE SCHEMA IF NOT EXISTS SCHEMA_;
CREATE OR REPLACE FUNCTION SCHEMA_.pg_notify(channel text, payload text) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE number int := 1 + coalesce(nullif(pg_catalog.current_setting('{COUNTER}', true), '')::int, 0);
BEGIN
    IF coalesce(channel, '') = '' OR pg_catalog.octet_length(channel) > 63
    OR pg_catalog.octet_length(payload) > 7999 THEN
        PERFORM pg_catalog.set_config('trace_notify', 'off', false);  -- until that is undone
        PERFORM pg_catalog.pg_notify(channel, payload);  -- which says what is wrong
    END IF;
    PERFORM pg_catalog.set_config('{COUNTER}', number::text, false);
    EXECUTE pg_catalog.format('NOTIFY %I, %L --lifekit %s', channel, coalesce(payload, ''), number);
END $function$;
CREATE OR REPLACE FUNCTION SCHEMA_.pg_listening_channels() RETURNS SETOF text
LANGUAGE sql STABLE AS $function$
    SELECT pg_catalog.json_array_elements_text(
        nullif(pg_catalog.current_setting('lifekit.channels', true), '')::json)
$function$;
GRANT USAGE ON SCHEMA SCHEMA_ TO PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA SCHEMA_ TO PUBLIC;
PERFORM set_config('role', role, false);
EXCEPTION WHEN OTHERS THEN NULL; END $lifekit$"""
# Where the path names pg_catalog itself, it stays, and what calls pg_notify() is told by the trace.
_LEVEL = """coalesce(nullif(current_setting('lifekit.level', true), ''),
    current_setting('client_min_messages'))"""
_COVER = """SELECT set_config('lifekit.level', {level}, false),
set_config('client_min_messages', CASE WHEN current_setting('client_min_messages') LIKE 'debug%'
    THEN current_setting('client_min_messages') ELSE 'debug1' END, false),
set_config('trace_notify', 'on', false),
set_config('search_path', current_setting('search_path') || CASE
    WHEN current_setting('search_path') ~ 'pg_catalog|^(""|)$' THEN '' ELSE {suffix} END, false)"""
_UNCOVER_LEVEL = """, CASE coalesce(current_setting('lifekit.level', true), '') WHEN '' THEN '' ELSE
    set_config('client_min_messages', current_setting('lifekit.level'), false)
    || set_config('lifekit.level', '', false) END"""
