"""No bytes, from a client or a server, break the gateway: it answers, or it closes that connection."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifekit._sandbox.postgres import messages
from lifekit._sandbox.postgres.hub import Hub
from lifekit._sandbox.postgres.messages import Backend, Frontend, ProtocolError, Startup
from lifekit._sandbox.postgres.real import Relay
from lifekit._sandbox.postgres.virtual import VirtualConnection

from ...depth import TIMES

ERROR = messages.error("42601", "no")


class Socket:
    """The end of a connection that the gateway writes to."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.sent += data

    def close(self) -> None:
        self.closed = True


class Server(Socket):
    """One that answers as PostgreSQL might, as the numbers say that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._frames = messages.Frames(Frontend.ALL)
        self._skips = False
        self._copies = False

    def answers(self, luck: int) -> bytes:
        """Return what it says to all that it was sent; it fails at one in *luck*."""
        if self.sent.startswith(b"\0\0\0\x12"):  # the login
            del self.sent[:18]
        data, found = self._frames.feed(bytes(self.sent))
        self.sent.clear()
        said = b""
        for at, (kind, begin, end) in enumerate(found):
            said += self._answer(kind, data[begin + 5 : end], fails=at % luck == luck - 1)
        return said

    def _answer(self, kind: int, body: bytes, *, fails: bool) -> bytes:
        if self._copies:
            if kind == Frontend.COPY_DATA:
                return b""
            self._copies = kind not in (Frontend.COPY_DONE, Frontend.COPY_FAIL)
            return messages.complete("COPY 1")
        if kind == Frontend.SYNC:
            self._skips = False
            return messages.READY["E" if fails else "T"]
        if self._skips or kind in (Frontend.FLUSH, Frontend.TERMINATE, *b"dcf"):
            return b""
        if fails:
            self._skips = kind != Frontend.QUERY
            return ERROR + (b"" if self._skips else messages.READY["E"])
        if kind == Frontend.QUERY:
            row = messages.message(Backend.DATA_ROW, b"\0\1\0\0\0\1x") if b"SELECT" in body else b""
            self._copies = b"COPY" in body
            if self._copies:
                return messages.message(Backend.COPY_IN, b"\0\0\0")
            end = "I" if b"ROLLBACK;" in body else "T"
            return row + messages.complete("SELECT 1") + messages.READY[end]
        return {
            Frontend.PARSE: messages.PARSE_COMPLETE,
            Frontend.BIND: messages.BIND_COMPLETE,
            Frontend.CLOSE: messages.CLOSE_COMPLETE,
            Frontend.DESCRIBE: messages.NO_DATA,
        }.get(kind, messages.complete("SELECT 1"))


class Timer:
    """One that never rings by itself."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def cancel(self) -> None:
        self.call = int  # type: ignore[assignment]


class World:
    """A gateway without a loop: two clients, whose server says whatever the test has it say."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []
        self.relays: dict[VirtualConnection, Relay] = {}
        self.servers: dict[VirtualConnection, Server] = {}
        self.hub = Hub(self)
        self.opened = 0  # blocks that are to be ended
        self.clients = [self.hub.new_client(Socket()) for _ in range(2)]

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(call))
        return self.timers[-1]

    def ring(self) -> None:
        timers, self.timers = self.timers, []
        for timer in timers:
            timer.call()

    def encrypt(self, client: VirtualConnection) -> None:
        client.send(b"N")

    def gone(self, client: VirtualConnection) -> None:
        pass

    def explain(self, waiting: int, holding: int) -> tuple[str, bool]:
        return "", False

    def cancel(self, key: bytes, ended: Callable[[], None]) -> None:
        ended()

    def connect(self, client: VirtualConnection, first: Startup) -> None:
        server = self.servers[client] = Server()
        relay = self.relays[client] = Relay(client, None, server.write, server.close, self.cancel)
        client.connected(relay, first)

    def log_in(self) -> None:
        for client in self.clients:
            client.receive(messages.startup({b"user": b"ann"}))
            self.answer(
                client, messages.message(Backend.AUTHENTICATION, b"\0\0\0\0") + messages.READY["I"]
            )

    def say(self, client: VirtualConnection, data: bytes) -> None:
        if not client.closed:
            client.receive(data)
            self.hub.flush()

    def answer(self, client: VirtualConnection, data: bytes) -> None:
        relay, server = self.relays.get(client), self.servers.get(client)
        if relay is None or server is None or server.closed:
            return
        try:
            relay.receive(data)
        except ProtocolError:
            server.close()
            self.hub.lost(client, relay)
        self.hub.flush()

    def serve(self, luck: int) -> None:
        """Have both servers answer until neither has anything to say."""
        for _ in range(20):
            for client, server in self.servers.items():
                if server.sent and not server.closed:
                    self.answer(client, server.answers(luck))

    def begin(self) -> None:
        if not self.hub.is_turning and self.opened < 3:
            self.opened += 1
            self.hub.begin()

    def end(self) -> None:
        if self.opened:
            self.opened -= 1
            self.hub.end(lambda wrong: None)


def frontend(kind: int, body: bytes) -> bytes:
    return messages.message(kind, body)


texts: st.SearchStrategy[bytes] = st.sampled_from(
    [
        b"SELECT 1",
        b"BEGIN",
        b"COMMIT",
        b"ROLLBACK AND CHAIN",
        b"SAVEPOINT s",
        b"ROLLBACK TO s",
        b"INSERT INTO t VALUES (1)",
        b"BEGIN; SELECT 1; COMMIT; SELECT 2",
        b"SET LOCAL work_mem = 1",
        b"SET work_mem = 1",
        b"RESET ALL",
        b"DEALLOCATE ALL",
        b"DISCARD ALL",
        b"PREPARE x AS SELECT 1",
        b"COPY t FROM STDIN",
        b"CREATE TABLE t (i int)",
        b"SELECT '\xff\xfe",
        b"",
    ]
)
SYNC = messages.SYNC
Bytes = st.SearchStrategy[bytes]
Step = tuple[str, int, bytes]


def query(text: bytes) -> bytes:
    return frontend(Frontend.QUERY, text + b"\0")


def parse(name: bytes, text: bytes) -> bytes:
    return messages.Parse(name, text, b"\0\0").encode()


def bind(portal: bytes, name: bytes) -> bytes:
    return messages.Bind(portal, name, b"\0\0\0\0\0\0").encode(portal, name)


def execute(portal: bytes, rows: int) -> bytes:
    return messages.execute(portal, pack(">i", rows))


def unit(name: bytes, text: bytes, ends: bytes) -> bytes:
    return parse(name, text) + bind(b"", name) + execute(b"", 0) + ends


def succeeds(times: int) -> bytes:
    return messages.complete("x") * times + messages.READY["T"]


a_name: Bytes = st.sampled_from([b"", b"a", b"b\xff"])
queries: Bytes = st.builds(query, texts)
noise: list[Bytes] = [st.binary(max_size=20)]
said: Bytes = st.one_of(
    queries,
    st.builds(parse, a_name, texts),
    st.builds(bind, a_name, a_name),
    st.builds(messages.describe, st.sampled_from(b"SP"), a_name),
    st.builds(execute, a_name, st.integers(0, 2)),
    st.builds(messages.close, st.sampled_from([b"S", b"P"]), a_name),
    st.builds(frontend, st.sampled_from(b"SSSSHdcfX"), st.just(b"")),
    st.builds(frontend, st.sampled_from(sorted(Frontend.ALL)), st.binary(max_size=12)),
    *noise,
)
ends: Bytes = st.sampled_from([SYNC, SYNC, b"", messages.message(Frontend.FLUSH)])
whole: Bytes = st.one_of(queries, st.builds(unit, a_name, texts, ends))
known: Bytes = st.sampled_from(
    [
        *messages.READY.values(),
        ERROR,
        messages.complete("SELECT 1"),
        messages.PARSE_COMPLETE,
        messages.BIND_COMPLETE,
        messages.message(Backend.COPY_IN, b"\0\0\0"),
        messages.message(Backend.DATA_ROW, b"\0\1\0\0\0\1x"),
        messages.message(Backend.PARAMETER_STATUS, b"a\0b\0"),
    ]
)
answers: Bytes = st.one_of(
    known,
    st.builds(succeeds, st.integers(1, 12)),
    st.builds(frontend, st.sampled_from(sorted(Backend.ALL)), st.binary(max_size=12)),
    *noise,
)
who = st.integers(0, 1)
nothing: Bytes = st.just(b"")
saying: st.SearchStrategy[Step] = st.tuples(st.just("say"), who, whole)
serving: st.SearchStrategy[Step] = st.tuples(st.just("serve"), st.integers(2, 30), nothing)
others: list[st.SearchStrategy[Step]] = [
    st.tuples(st.just("say"), who, said),
    st.tuples(st.just("answer"), who, answers),
    st.tuples(st.sampled_from(["begin", "end", "ring", "lose", "cancel"]), who, nothing),
]
steps: st.SearchStrategy[list[Step]] = st.lists(
    st.one_of(saying, saying, serving, serving, *others), max_size=40
)
many = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


def run(told: list[Step]) -> None:
    """Do what is told, and close everything."""
    world = World()
    world.log_in()
    world.begin()
    for what, number, data in told:
        client = world.clients[number % 2]
        match what:
            case "serve":
                world.serve(number)
            case "say":
                world.say(client, data)
            case "answer":
                world.answer(client, data)
            case "begin":
                world.begin()
            case "end":
                world.end()
            case "ring":
                world.ring()
            case "cancel":
                world.hub.cancel(messages.CancelRequest(client.number, client.secret))
            case _:
                if client in world.relays and not world.servers[client].closed:
                    world.servers[client].close()
                    world.hub.lost(client, world.relays[client])
    for client in world.clients:
        client.close()
        if client in world.relays:
            world.servers[client].close()
            world.hub.lost(client, world.relays[client])
    for _ in range(4):
        world.end()
        world.ring()
    assert not world.hub.clients
    assert not world.hub.is_open
    assert not world.hub.is_turning


@settings(many, max_examples=150, derandomize=True)
@given(steps)
def test_whatever_is_said_the_gateway_stands(told: list[Step]) -> None:
    run(told)


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(many, max_examples=1000 * TIMES, derandomize=True)
@given(steps)
def test_whatever_is_said_at_length_the_gateway_stands(told: list[Step]) -> None:
    run(told)
