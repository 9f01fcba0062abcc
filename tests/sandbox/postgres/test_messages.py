"""Bytes are cut into messages, and messages are read, as PostgreSQL's documentation has them."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifekit._sandbox.postgres import messages
from lifekit._sandbox.postgres.messages import (
    Backend,
    Bind,
    CancelRequest,
    EncryptionRequest,
    Frames,
    Frontend,
    Parse,
    ProtocolError,
    Startup,
)

KINDS = sorted(Frontend.ALL)
some_messages = st.lists(st.tuples(st.sampled_from(KINDS), st.binary(max_size=40)), max_size=8)


def cut(frames: Frames, pieces: list[bytes]) -> list[tuple[int, bytes]]:
    """Return the kinds and bodies of what is found in pieces that come one after the other."""
    found: list[tuple[int, bytes]] = []
    for piece in pieces:
        data, places = frames.feed(piece)
        found += [(kind, data[begin + 5 : end]) for kind, begin, end in places]
    return found


@given(some_messages, st.lists(st.integers(0, 400), max_size=10))
def test_however_bytes_arrive_the_messages_are_the_same(
    sent: list[tuple[int, bytes]], places: list[int]
) -> None:
    data = b"".join(messages.message(kind, body) for kind, body in sent)
    edges = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    pieces = [data[begin:end] for begin, end in pairwise(edges)]
    frames = Frames(Frontend.ALL)

    assert cut(frames, pieces) == sent
    assert frames.held == 0


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_are_messages_or_an_error_and_no_more_than_they_are_is_held(
    pieces: list[bytes],
) -> None:
    frames = Frames(Backend.ALL)
    try:
        cut(frames, pieces)
    except ProtocolError:
        return
    assert frames.held <= sum(map(len, pieces))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\0\4", "unknown kind b'\\\\x00'"),
        (b"q\0\0\0\4", "unknown kind b'q'"),
        (b"Q\0\0\0\3", "claims 3 bytes"),
        (b"Q\xff\xff\xff\xff", "claims 4294967295 bytes"),
        (b"Q\x40\0\0\0", "claims 1073741824 bytes"),
    ],
)
def test_what_is_no_message_is_refused_at_its_header(data: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        Frames(Frontend.ALL).feed(data)


def first(code: int, body: bytes = b"", size: int | None = None) -> bytes:
    """Return the message that begins a connection, which may lie about its size."""
    return pack(">ii", len(body) + 8 if size is None else size, code) + body


@pytest.mark.parametrize(
    ("code", "body", "read"),
    [
        (80877103, b"", EncryptionRequest()),
        (80877104, b"", EncryptionRequest()),
        (80877102, b"\0\0\0\7abcd", CancelRequest(7, b"abcd")),
        (196608, b"user\0ann\0\0", Startup(0, {b"user": b"ann"})),
        (196610, b"user\0ann\0database\0\0\0", Startup(2, {b"user": b"ann", b"database": b""})),
    ],
)
def test_a_connection_begins_with(code: int, body: bytes, read: object) -> None:
    data = first(code, body)
    for end in range(len(data)):
        assert messages.read_startup(data[:end]) is None
    assert messages.read_startup(data + b"more") == (read, b"more")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "claims 1195725856 bytes"),
        (first(196608, size=7), "claims 7 bytes"),
        (first(196608, size=10_001), "claims 10001 bytes"),
        (first(131072, b"\0"), "version 2"),
        (first(196608, b"user\0ann\0"), "no end"),
        (first(196608, b"user\0\0"), "no end"),
        (first(196608, b"\0"), "without a user"),
        (first(196608, b"a\0b\0\0"), "without a user"),
        (first(80877102, b"\0\0"), "without number and secret"),
    ],
)
def test_a_connection_does_not_begin_with(data: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        messages.read_startup(data)


@given(st.binary(max_size=80))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    for reads in (
        Parse.read,
        Bind.read,
        messages.read_target,
        messages.read_execute,
        messages.read_query,
        messages.read_startup,
    ):
        with suppress(ProtocolError):
            reads(body)


def test_what_is_read_is_written_again_under_other_names() -> None:
    parse = Parse.read(b"name\0SELECT $1\0\0\1\0\0\0\x17")
    assert parse == Parse(b"name", b"SELECT $1", b"\0\1\0\0\0\x17")
    assert parse.encode(b"other") == b"P\0\0\0\x1aother\0SELECT $1\0\0\1\0\0\0\x17"
    bind = Bind.read(b"portal\0name\0\0\0\0\1\0\0\0\0\0\0")
    assert bind == Bind(b"portal", b"name", b"\0\0\0\1\0\0\0\0\0\0")
    assert bind.encode(b"", b"s") == b"B\0\0\0\x11\0s\0\0\0\0\1\0\0\0\0\0\0"
    assert messages.read_target(b"Sname\0") == (ord("S"), b"name")
    assert messages.read_execute(b"p\0\0\0\0\5") == (b"p", b"\0\0\0\5")


def test_errors_are_written_and_read() -> None:
    written = messages.error("42601", "no\0thing", detail="a detail")
    assert written[:1] == b"E"
    fields = {"S": "ERROR", "V": "ERROR", "C": "42601", "M": "no thing", "D": "a detail"}
    assert messages.error_fields(written[5:]) == fields


def test_a_login_does_not_offer_what_needs_tls_from_end_to_end() -> None:
    offered = b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"
    assert messages.without_channel_binding(offered) == b"\0\0\0\x0aSCRAM-SHA-256\0\0"
    assert messages.without_channel_binding(b"\0\0\0\0") == b"\0\0\0\0"
