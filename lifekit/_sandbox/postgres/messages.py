"""PostgreSQL's protocol, version 3: bytes in, messages out, and back. No socket, no clock.

Whatever the bytes are, this module cuts them into messages or raises `ProtocolError`. It copies no
message that it only passes over, and holds back no more than the one that has not arrived as a whole.
See https://www.postgresql.org/docs/current/protocol-message-formats.html for the formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from struct import Struct, pack, unpack_from
from typing import Final


class ProtocolError(Exception):
    """What came is no message of the protocol. The connection that it came from is to be closed."""


class Frontend:
    """The kinds of messages that a client sends, each by its first byte."""

    BIND: Final = ord("B")
    CLOSE: Final = ord("C")
    COPY_DATA: Final = ord("d")
    COPY_DONE: Final = ord("c")
    COPY_FAIL: Final = ord("f")
    DESCRIBE: Final = ord("D")
    EXECUTE: Final = ord("E")
    FLUSH: Final = ord("H")
    FUNCTION_CALL: Final = ord("F")
    PARSE: Final = ord("P")
    PASSWORD: Final = ord("p")
    """The answer to any question of the login."""
    QUERY: Final = ord("Q")
    SYNC: Final = ord("S")
    TERMINATE: Final = ord("X")

    ALL: Final = frozenset(b"BCdcfDEHFPpQSX")


class Backend:
    """The kinds of messages that a server sends, each by its first byte."""

    AUTHENTICATION: Final = ord("R")
    BIND_COMPLETE: Final = ord("2")
    CLOSE_COMPLETE: Final = ord("3")
    COMMAND_COMPLETE: Final = ord("C")
    COPY_BOTH: Final = ord("W")
    COPY_DATA: Final = ord("d")
    COPY_DONE: Final = ord("c")
    COPY_IN: Final = ord("G")
    COPY_OUT: Final = ord("H")
    DATA_ROW: Final = ord("D")
    EMPTY_QUERY: Final = ord("I")
    ERROR: Final = ord("E")
    FUNCTION_CALL: Final = ord("V")
    KEY_DATA: Final = ord("K")
    NEGOTIATE: Final = ord("v")
    NOTICE: Final = ord("N")
    NOTIFICATION: Final = ord("A")
    NO_DATA: Final = ord("n")
    PARAMETER_DESCRIPTION: Final = ord("t")
    PARAMETER_STATUS: Final = ord("S")
    PARSE_COMPLETE: Final = ord("1")
    PORTAL_SUSPENDED: Final = ord("s")
    READY: Final = ord("Z")
    ROW_DESCRIPTION: Final = ord("T")

    ALL: Final = frozenset(b"R23CWdcGHDIEVKvNAntS1sZT")
    COMPLETE: Final = frozenset(b"123CIsEV")
    """Each answers one message of the client's as a whole."""
    UNASKED: Final = frozenset(b"NAS")
    """May come at any time, between the parts of any answer."""


HEADER: Final = 5
"""Bytes before the body: the kind, and the length of all but the kind."""
LONGEST: Final = 0x3FFF_FFFF
"""Bytes of the longest message that PostgreSQL itself takes."""
_header = Struct(">BI").unpack_from


# -- messages from bytes --------------------------------------------------------------------------


class Frames:
    """Cuts the bytes of one direction of one connection into messages."""

    def __init__(self, kinds: frozenset[int], unlisted: frozenset[int] = frozenset()) -> None:
        """*kinds* are those that may come; *unlisted* are those of which there may be thousands."""
        self._kinds, self._unlisted = kinds, unlisted
        self._rest = bytearray()
        self._wanted = HEADER  # bytes of the rest that make it worth a look

    @property
    def held(self) -> int:
        """Bytes of a message that has not arrived as a whole."""
        return len(self._rest)

    def feed(self, data: bytes) -> tuple[bytes, list[tuple[int, int, int]]]:
        """Return the bytes that are whole messages, and for each its kind, beginning and end in them.

        What is unlisted is among the bytes only.

        Raises:
            ProtocolError: The kind is unknown, or the length can't be.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return b"", []
            data = bytes(self._rest)
            self._rest.clear()
        found: list[tuple[int, int, int]] = []
        at, size, kinds, unlisted = 0, len(data), self._kinds, self._unlisted
        last = size - HEADER
        self._wanted = HEADER
        while at <= last:
            kind, length = _header(data, at)
            end = at + 1 + length
            if end <= size and length >= 4:
                if kind in unlisted:
                    at = end
                    continue
                if kind in kinds:
                    found.append((kind, at, end))
                    at = end
                    continue
            if kind not in kinds:
                raise ProtocolError(f"a message of the unknown kind {bytes([kind])!r}")
            if not 4 <= length <= LONGEST:
                raise ProtocolError(f"a message {bytes([kind])!r} that claims {length} bytes")
            self._wanted = end - at
            break
        if at < size:
            self._rest += data[at:]
            data = data[:at]
        return data, found


def _until_nul(body: bytes, at: int, what: str) -> tuple[bytes, int]:
    end = body.find(0, at)
    if end < 0:
        raise ProtocolError(f"{what} has no end")
    return body[at:end], end + 1


@dataclass(frozen=True, slots=True)
class Parse:
    """A statement to prepare; *types* are the bytes that say those of its parameters."""

    name: bytes
    text: bytes
    types: bytes

    @classmethod
    def read(cls, body: bytes) -> Parse:
        """Read a body.

        Raises:
            ProtocolError: It is none of this kind.
        """
        name, at = _until_nul(body, 0, "the name in a Parse")
        text, at = _until_nul(body, at, "the statement in a Parse")
        types = body[at:]
        if len(types) < 2 or len(types) != 2 + 4 * int.from_bytes(types[:2], "big"):
            raise ProtocolError("a Parse whose parameter types do not fit its length")
        return cls(name, text, types)

    def encode(self, name: bytes | None = None) -> bytes:
        """Return the whole message, with another *name* for the statement."""
        own = self.name if name is None else name
        return message(Frontend.PARSE, own + b"\0" + self.text + b"\0" + self.types)


@dataclass(frozen=True, slots=True)
class Bind:
    """A prepared statement to bind to a portal; *values* are the bytes of all behind the names."""

    portal: bytes
    statement: bytes
    values: bytes

    @classmethod
    def read(cls, body: bytes) -> Bind:
        """Read a body.

        Raises:
            ProtocolError: It is none of this kind.
        """
        portal, at = _until_nul(body, 0, "the portal in a Bind")
        statement, at = _until_nul(body, at, "the statement in a Bind")
        return cls(portal, statement, body[at:])

    def encode(self, portal: bytes, statement: bytes) -> bytes:
        """Return the whole message, with other names."""
        return message(Frontend.BIND, portal + b"\0" + statement + b"\0" + self.values)


def read_target(body: bytes) -> tuple[int, bytes]:
    """Return what a Describe or a Close is about: ``ord("S")`` or ``ord("P")``, and its name.

    Raises:
        ProtocolError: It is neither a statement nor a portal.
    """
    if body[:1] not in (b"S", b"P"):
        raise ProtocolError("a Describe or Close of neither a statement nor a portal")
    name, end = _until_nul(body, 1, "the name in a Describe or Close")
    if end != len(body):
        raise ProtocolError("a Describe or Close that goes on after its name")
    return body[0], name


def read_execute(body: bytes) -> tuple[bytes, bytes]:
    """Return the portal of an Execute, and the four bytes that say how many rows are wanted.

    Raises:
        ProtocolError: It is no such body.
    """
    portal, at = _until_nul(body, 0, "the portal in an Execute")
    if len(body) - at != 4:
        raise ProtocolError("an Execute without a number of rows")
    return portal, body[at:]


def read_query(body: bytes) -> bytes:
    """Return the text of a Query.

    Raises:
        ProtocolError: It has no end, or goes on after it.
    """
    text, end = _until_nul(body, 0, "the text of a Query")
    if end != len(body):
        raise ProtocolError("a Query that goes on after its text")
    return text


def error_fields(body: bytes, errors: str = "replace") -> dict[str, str]:
    """Return the fields of an error or notice: ``C`` is its SQLSTATE, ``M`` its text.

    *errors* is what becomes of bytes that are no UTF-8.
    """
    fields = (field for field in body.split(b"\0") if field)
    return {chr(field[0]): field[1:].decode("utf-8", errors) for field in fields}


# -- how a connection begins ----------------------------------------------------------------------

_LONGEST_STARTUP: Final = 10_000
_CANCEL: Final = 80877102
_SSL: Final = 80877103
_GSS: Final = 80877104
VERSION: Final = 3 << 16
"""3.0: what is said to clients that ask for more, and to servers."""


@dataclass(frozen=True, slots=True)
class Startup:
    """A client asks for a session. *options* are what it sets, ``user`` and ``database`` among them."""

    minor: int
    options: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class EncryptionRequest:
    """A client asks for TLS or GSS before it says anything else."""


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """A client asks to end what the session of this number and secret does."""

    number: int
    secret: bytes


def read_startup(data: bytes) -> tuple[Startup | EncryptionRequest | CancelRequest, bytes] | None:
    """Return the first thing that a client says and the bytes behind it, or None until it is all there.

    Raises:
        ProtocolError: It is nothing that begins a connection.
    """
    if len(data) < 8:
        return None
    length, code = unpack_from(">iI", data)
    if not 8 <= length <= _LONGEST_STARTUP:
        raise ProtocolError(f"the first message claims {length} bytes")
    if len(data) < length:
        return None
    body, rest = data[8:length], data[length:]
    if code in (_SSL, _GSS):
        return EncryptionRequest(), rest
    if code == _CANCEL:
        if len(body) < 8:
            raise ProtocolError("a request to cancel without number and secret")
        return CancelRequest(int.from_bytes(body[:4], "big", signed=True), body[4:]), rest
    if code >> 16 != 3:
        raise ProtocolError(f"version {code >> 16} of the protocol")
    fields = body.split(b"\0")
    # Names and values in turns, then an empty name, and nothing behind its end.
    if len(fields) < 2 or len(fields) % 2 or fields[-2:] != [b"", b""]:
        raise ProtocolError("options of a session that have no end")
    options = dict(zip(fields[:-2:2], fields[1:-2:2], strict=True))
    if b"" in options or b"user" not in options:
        raise ProtocolError("options of a session without a user")
    return Startup(code & 0xFFFF, options), rest


def startup(options: Mapping[bytes, bytes]) -> bytes:
    """Return the message that asks a server for a session."""
    fields = b"".join(name + b"\0" + value + b"\0" for name, value in options.items()) + b"\0"
    return pack(">ii", len(fields) + 8, VERSION) + fields


SSL_REQUEST: Final = pack(">ii", 8, _SSL)
"""The message that asks a server for encryption, which it answers with one byte."""


def cancel_request(key: bytes) -> bytes:
    """Return the message that cancels what the session of that key data does."""
    return pack(">ii", len(key) + 8, _CANCEL) + key


# -- messages to bytes ----------------------------------------------------------------------------


def message(kind: int, body: bytes = b"") -> bytes:
    """Return one message."""
    return b"%c%b%b" % (kind, (len(body) + 4).to_bytes(4, "big"), body)


def query(text: bytes) -> bytes:
    """Return a Query."""
    return message(Frontend.QUERY, text + b"\0")


def close(what: bytes, name: bytes) -> bytes:
    """Return a Close of a statement, ``b"S"``, or of a portal, ``b"P"``."""
    return message(Frontend.CLOSE, what + name + b"\0")


def describe(what: int, name: bytes) -> bytes:
    """Return a Describe of a statement or a portal."""
    return message(Frontend.DESCRIBE, bytes([what]) + name + b"\0")


def execute(portal: bytes, rows: bytes = b"\0\0\0\0") -> bytes:
    """Return an Execute."""
    return message(Frontend.EXECUTE, portal + b"\0" + rows)


def run_prepared(name: bytes) -> bytes:
    """Return Bind and Execute of a prepared statement without parameters: two answers."""
    return message(Frontend.BIND, b"\0" + name + b"\0\0\0\0\0\0\0") + execute(b"")


SYNC: Final = message(Frontend.SYNC)
TERMINATE: Final = message(Frontend.TERMINATE)
PARSE_COMPLETE: Final = message(Backend.PARSE_COMPLETE)
BIND_COMPLETE: Final = message(Backend.BIND_COMPLETE)
CLOSE_COMPLETE: Final = message(Backend.CLOSE_COMPLETE)
NO_DATA: Final = message(Backend.NO_DATA)
NO_PARAMETERS: Final = message(Backend.PARAMETER_DESCRIPTION, b"\0\0")
READY: Final = {status: message(Backend.READY, status.encode()) for status in "ITE"}
"""By the state of the transaction: none, open, failed."""


def complete(tag: str) -> bytes:
    """Return the end of a command's answer."""
    return message(Backend.COMMAND_COMPLETE, tag.encode() + b"\0")


def _fields(severity: str, code: str, text: str, more: Iterable[tuple[str, str]]) -> bytes:
    fields = [("S", severity), ("V", severity), ("C", code), ("M", text), *more]
    told = [letter + value.replace("\0", " ") + "\0" for letter, value in fields if value]
    return "".join(told).encode("utf-8", "replace") + b"\0"


def error(
    code: str,
    text: str,
    *,
    detail: str = "",
    hint: str = "",
    source: str = "",
    severity: str = "ERROR",
) -> bytes:
    """Return an error; *code* is its SQLSTATE, *source* the function that raises it."""
    more = [("D", detail), ("H", hint), ("R", source)]
    return message(Backend.ERROR, _fields(severity, code, text, more))


def warning(code: str, text: str) -> bytes:
    """Return a notice with the severity of a warning."""
    return message(Backend.NOTICE, _fields("WARNING", code, text, ()))


def key_data(number: int, secret: bytes) -> bytes:
    """Return what a client needs to cancel."""
    return message(Backend.KEY_DATA, pack(">i", number) + secret)


NEGOTIATE: Final = message(Backend.NEGOTIATE, pack(">ii", VERSION, 0))
"""The answer to a client that asks for a later minor version."""


def without_channel_binding(body: bytes) -> bytes:
    """Return what a server asks for at a login, less the mechanisms that need TLS end to end.

    A client that stands on a plain socket before the gateway can't do those.
    """
    if body[:4] != b"\0\0\0\x0a":  # not a choice of mechanisms
        return body
    names = [name for name in body[4:].split(b"\0") if name and not name.endswith(b"-PLUS")]
    return body[:4] + b"".join(name + b"\0" for name in names) + b"\0"
