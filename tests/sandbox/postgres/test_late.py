"""A server that answers late: each client gets its own answers, whenever blocks begin and end."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from lifekit._sandbox.postgres import messages
from lifekit._sandbox.postgres.hub import Hub
from lifekit._sandbox.postgres.messages import Backend, Frontend, Startup
from lifekit._sandbox.postgres.real import Relay
from lifekit._sandbox.postgres.virtual import VirtualConnection

from ...depth import TIMES

USERS = 3
READY = b"Z\0\0\0\5"
WORD = re.compile(rb"\w+")


class Server:
    """One connection to a server that does as it is told, and says so when it is asked to."""

    def __init__(self) -> None:
        self.closed = False
        self.said = b""
        """What it has said and nobody has heard yet."""
        self._frames = messages.Frames(Frontend.ALL)
        self._has_begun = False
        self._status = "I"
        self._prepared: dict[bytes, bytes] = {}
        self._bound: dict[bytes, bytes] = {}

    def write(self, data: bytes) -> None:
        assert not self.closed
        if not self._has_begun:
            self._has_begun = True
            self.said += messages.message(Backend.AUTHENTICATION, b"\0\0\0\0") + messages.READY["I"]
            return
        data, found = self._frames.feed(data)
        for kind, begin, end in found:
            self.said += self._answer(kind, data[begin + messages.HEADER : end])

    def close(self) -> None:
        self.closed = True

    def _answer(self, kind: int, body: bytes) -> bytes:
        match kind:
            case Frontend.PARSE:
                parsed = messages.Parse.read(body)
                self._prepared[parsed.name] = parsed.text
                return messages.PARSE_COMPLETE
            case Frontend.BIND:
                bound = messages.Bind.read(body)
                self._bound[bound.portal] = self._prepared[bound.statement]
                return messages.BIND_COMPLETE
            case Frontend.EXECUTE:
                return self._run(self._bound[messages.read_execute(body)[0]])
            case Frontend.QUERY:
                return self._run(messages.read_query(body)) + messages.READY[self._status]
            case Frontend.CLOSE:
                return messages.CLOSE_COMPLETE
            case Frontend.SYNC:
                return messages.READY[self._status]
            case _:
                assert kind == Frontend.TERMINATE
                return b""

    def _run(self, text: bytes) -> bytes:
        found = WORD.search(text)
        assert found is not None
        verb = found[0].decode()
        if "ROLLBACK TO" not in text.decode():
            self._status = {"BEGIN": "T", "COMMIT": "I", "ROLLBACK": "I"}.get(verb, self._status)
        row = b"\0\1" + len(text).to_bytes(4, "big") + text
        rows = messages.message(Backend.DATA_ROW, row) if verb == "SELECT" else b""
        return rows + messages.complete(verb)


class User:
    """Who asks one thing after the other, and hears no more than the answer to that."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.closed = False
        self.relay: Relay | None = None
        self.server = Server()
        self.asked: bytes | None = None
        """To what it has had no answer yet."""
        self.status = "I"
        self._heard: list[bytes] = []
        self._frames = messages.Frames(Backend.ALL)
        self.client = world.hub.new_client(self)
        self._number = 0

    def write(self, data: bytes) -> None:
        data, found = self._frames.feed(data)
        for kind, begin, end in found:
            body = data[begin + messages.HEADER : end]
            if kind == Backend.DATA_ROW:
                self._heard.append(body[6:])
            elif kind == Backend.ERROR:
                self._heard.append(b"an error")
            elif kind == Backend.READY:
                self.status = body.decode()
                heard, self._heard = self._heard, []
                asked, self.asked = self.asked, None
                assert asked is not None, "an answer to nothing"
                wanted = [asked] if asked.startswith(b"SELECT") else []
                assert heard in (wanted, [b"an error"])

    def close(self) -> None:
        self.closed = True

    def log_in(self) -> None:
        self.asked = b"to be let in"
        self._say(messages.startup({b"user": b"ann"}))

    def ask(self, verb: bytes) -> None:
        if self.closed or self.asked is not None:
            return
        if verb == b"BEGIN":
            verb = {"I": verb, "T": b"COMMIT", "E": b"ROLLBACK"}[self.status]
        self._number += 1
        self.asked = b"%b %d" % (verb, self._number) if verb == b"SELECT" else verb
        self._say(messages.message(Frontend.QUERY, self.asked + b"\0"))

    def _say(self, data: bytes) -> None:
        self.client.receive(data)
        self._world.hub.flush()

    def leave(self) -> None:
        self.client.close()
        self._world.hub.flush()

    def hears(self, most: int) -> bool:
        """Have its connection to the server give at most so many bytes; return whether it did.

        Where that is none, it gives the rest of one answer.
        """
        most = most or self.server.said.find(READY) + len(READY) + 1
        data, self.server.said = self.server.said[:most], self.server.said[most:]
        if not data or self.server.closed or self.relay is None:
            return False
        self.relay.receive(data)
        self._world.hub.flush()
        return True


class Timer:
    """One that rings when it is told to."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class World:
    """A gateway without a loop, and users of it."""

    def __init__(self) -> None:
        self.hub = Hub(self)
        self.timers: list[tuple[float, Timer]] = []
        self.opened = 0
        self.users = [User(self) for _ in range(USERS)]

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        self.timers.append((seconds, timer))
        return timer

    def ring(self, most: float) -> bool:
        """Have the timers ring that are set for at most so many seconds; return whether any did."""
        due = [timer for seconds, timer in self.timers if seconds <= most]
        self.timers = [each for each in self.timers if each[0] > most]
        has_rung = False
        for timer in due:
            call, timer.call = timer.call, None
            if call is not None:
                call()
                has_rung = True
        self.hub.flush()
        return has_rung

    def encrypt(self, client: VirtualConnection) -> None:
        raise NotImplementedError

    def gone(self, client: VirtualConnection) -> None:
        pass

    def explain(self, waiting: int, holding: int) -> tuple[str, bool]:
        return "", False

    def connect(self, client: VirtualConnection, first: Startup) -> None:
        [user] = [each for each in self.users if each.client is client]
        server = user.server
        relay = Relay(client, None, server.write, server.close, lambda _, ended: ended())
        user.relay = relay
        client.connected(relay, first)

    def begin(self) -> None:
        if self.opened < 2 and not self.hub.is_turning:
            self.opened += 1
            self.hub.begin()

    def end(self) -> None:
        if self.opened:
            self.opened -= 1
            self.hub.end(lambda wrong: None)

    def settle(self) -> None:
        """Have all say what they have to say."""
        while any(user.hears(1 << 20) for user in self.users) or self.ring(0.0):
            pass


Step = tuple[str, int, Any]
"""What happens, to whom, and how."""
VERBS = [b"SELECT", b"SELECT", b"INSERT", b"BEGIN"]
OFTEN = {
    "ask": 20,
    "ask and hear": 15,
    "hear": 25,
    "begin": 11,
    "end": 11,
    "turn": 12,
    "leave": 2,
    "ring": 4,
}


def story(seed: int) -> list[Step]:
    """Return what happens, in order."""
    chance = random.Random(seed)
    whats = chance.choices(list(OFTEN), list(OFTEN.values()), k=chance.randint(6, 30))
    hows: dict[str, list[Any]] = {"hear": [0, 0, 0, 7, 10_000], "ask": VERBS, "ask and hear": VERBS}
    return [(what, chance.randrange(USERS), chance.choice(hows.get(what, [0]))) for what in whats]


def run(told: list[Step]) -> None:
    """Do what is told, then end the block, and have everybody ask once more."""
    world = World()
    for user in world.users:
        user.log_in()
        user.hears(10_000)
    for what, number, how in told:
        user = world.users[number]
        match what:
            case "ask":
                user.ask(how)
            case "hear":
                user.hears(how)
            case "ask and hear":
                user.ask(how)
                world.settle()
            case "turn":
                world.end()
                world.begin()
            case "leave":
                user.leave()
            case "ring":
                world.ring(0.0)
            case "begin":
                world.begin()
            case _:
                world.end()
    world.settle()
    while world.opened or world.hub.is_turning:
        world.end()
        world.settle()
        while world.ring(60.0):  # who is in the midst of a transaction is cut off
            world.settle()
    for user in world.users:
        assert user.closed or user.asked is None
        user.ask(b"SELECT")
    world.settle()
    for user in world.users:
        assert user.closed or (user.asked is None and user.relay is not None)
        assert user.relay is None or user.relay.lent is None


def run_all(seeds: Iterable[int]) -> None:
    for seed in seeds:
        told = story(seed)
        try:
            run(told)
        except AssertionError as error:
            error.add_note(f"story {seed}: {told}")
            raise


def test_however_late_the_server_answers_everybody_gets_what_is_theirs() -> None:
    run_all(range(2_000))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_however_late_it_answers_at_length() -> None:
    run_all(range(2_000, 2_000 + 15_000 * TIMES))
