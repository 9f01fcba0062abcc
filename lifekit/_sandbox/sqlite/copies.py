"""Private copies of SQLite's databases. A block has one of each database that is opened in it.

The databases themselves are read alone. A file is copied when the block first connects to it, under a
lock that SQLite's own writers respect, with what its write-ahead log holds.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote
from weakref import WeakKeyDictionary

from lifekit._core.block import Block
from lifekit._core.errors import SandboxUnsupportedError

_numbers = itertools.count(1)
_copies: WeakKeyDictionary[object, Copies] = WeakKeyDictionary()
"""By gateway, of which each lifespan has one."""
_MMAP = 2_000_000_000
_IN_MEMORY, _ROOM = "/dev/shm", 256 * 2**20


class Place(NamedTuple):
    """Where a database is, as `sqlite3.connect` is told."""

    path: str
    """Of a file; or the name of a database in memory; '' where each connection has its own."""
    is_file: bool
    query: str | None = None
    """What follows the path in a URI, None where it is none."""

    def at(self, path: str) -> str:
        """Return the same with another path, or name."""
        if self.query is None:
            return path
        if self.is_file:
            return f"file:{quote(path)}?{self.query}"
        is_memdb = dict(parse_qsl(self.query)).get("vfs") == "memdb"
        return f"file:{'/' if is_memdb else ''}{path}?{self.query}{'' if is_memdb else '&mode=memory'}"


def place_of(database: Any, uri: bool = False) -> Place:
    """Return what the arguments of `sqlite3.connect` mean."""
    text = os.fsdecode(database)
    if not (uri and text.startswith("file:")):
        return Place("", False) if text in ("", ":memory:") else Place(os.path.realpath(text), True)
    name, _, query = text[5:].partition("#")[0].partition("?")
    if name.startswith("//"):  # and a host: none, or this one
        name = "/" + name[2:].partition("/")[2]
    name, options = unquote(name), dict(parse_qsl(query))
    is_memdb = options.get("vfs") == "memdb"
    if not (is_memdb or options.get("mode") == "memory" or name in ("", ":memory:")):
        return Place(os.path.realpath(name), True, query)
    is_shared = name.startswith("/") if is_memdb else bool(name) and options.get("cache") == "shared"
    return Place(name if is_shared else "", False, query)


class _File:
    """A file that is copied, and what it held when it was last read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._source: sqlite3.Connection | None = None
        self._found: tuple[int, int] | None = None
        self._version, self._content = -1, b""

    def content(self) -> bytes:
        """Return all that is committed, which is read anew where somebody has written since."""
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            self.close()
            return b""
        if self._found != (stat.st_dev, stat.st_ino):
            self.close()
            self._found = (stat.st_dev, stat.st_ino)
        if self._source is None:
            self._source = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._source.execute(f"PRAGMA mmap_size = {_MMAP}")
        source = self._source
        source.execute("BEGIN")
        try:
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()  # takes the lock
            [version] = source.execute("PRAGMA data_version").fetchone()
            if version != self._version:
                [pages] = source.execute("PRAGMA page_count").fetchone()
                self._content = source.serialize() if pages else b""
                self._version = version
        finally:
            source.execute("COMMIT")
        return self._content

    def close(self) -> None:
        """Let go of it."""
        if self._source is not None:
            self._source.close()
        self._source, self._found, self._version, self._content = None, None, -1, b""


class Layer:
    """The copies of one block."""

    def __init__(self, copies: Copies, block: Block | None) -> None:
        self.block = block
        self.users = 0
        self._copies = copies
        self._number = next(_numbers)
        self._folder: str | None = None
        self.files: dict[str, _File] = {}
        self.shared: dict[str, sqlite3.Connection] = {}

    def copy_of(self, place: Place) -> str:
        """Return what `sqlite3.connect` is to be told instead, of a place that has a path or a name."""
        with self._copies.lock:
            if place.is_file:
                return place.at(self._copy_of_file(place.path))
            return self._copy_in_memory(place)

    def _copy_of_file(self, path: str) -> str:
        if path not in self.files:
            content = self._copies.below(self, path).content()
            if self._folder is None:
                self._folder = tempfile.mkdtemp(prefix="lifekit-sqlite-", dir=_fast_place(len(content)))
            folder = os.path.join(self._folder, str(len(self.files)))
            os.mkdir(folder)
            copy = os.path.join(folder, os.path.basename(path))
            if content:
                with open(copy, "xb") as file:
                    file.write(content)
            self.files[path] = _File(copy)
        return self.files[path].path

    def _copy_in_memory(self, place: Place) -> str:
        name = f"lifekit-{self._number}-{place.path.lstrip('/')}"
        if name not in self.shared:
            made = sqlite3.connect(place.at(name), uri=True, check_same_thread=False)
            self.shared[name] = made
            below = self._copies.name_below(self, place)
            with closing(sqlite3.connect(below, uri=True)) as source:
                source.backup(made)
        return place.at(name)

    def copy_in_memory_of(self, place: Place) -> str | None:
        """Return what it is called in this layer, if anything."""
        name = f"lifekit-{self._number}-{place.path.lstrip('/')}"
        return place.at(name) if name in self.shared else None

    def close(self) -> None:
        """Throw all of it away."""
        for file in self.files.values():
            file.close()
        for anchor in self.shared.values():
            anchor.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Copies:
    """Those of one lifespan: of its blocks, each inside the one before."""

    def __init__(self) -> None:
        self.lock: threading.RLock = threading.RLock()
        self._layers: list[Layer] = []
        self._files: dict[str, _File] = {}
        self._users = 0

    def share(self) -> None:
        """Note that one more value works on them."""
        self._users += 1

    def enter(self, block: Block | None) -> Layer:
        """Return the layer of a block, in which one more value is now."""
        with self.lock:
            layer = next((each for each in self._layers if each.block is block), None)
            if layer is None:
                layer = Layer(self, block)
                self._layers.append(layer)
            layer.users += 1
            return layer

    def leave(self, layer: Layer) -> None:
        """Throw it away, with the last value that is in it."""
        with self.lock:
            layer.users -= 1
            if not layer.users:
                self._layers.remove(layer)
                layer.close()

    def _lower(self, layer: Layer) -> list[Layer]:
        return self._layers[: self._layers.index(layer)][::-1]

    def below(self, layer: Layer, path: str) -> _File:
        """Return what a layer's copy of a file is made of."""
        for each in self._lower(layer):
            if path in each.files:
                return each.files[path]
        return self._files.setdefault(path, _File(path))

    def name_below(self, layer: Layer, place: Place) -> str:
        """Return what a layer's copy of a named database in memory is made of."""
        names = (each.copy_in_memory_of(place) for each in self._lower(layer))
        return next((name for name in names if name is not None), place.at(place.path.lstrip("/")))

    def close(self) -> None:
        """Let go of the files, with the last value that works on them."""
        with self.lock, suppress(sqlite3.Error):
            self._users -= 1
            while not self._users and self._files:
                self._files.popitem()[1].close()


def _fast_place(size: int) -> str | None:
    """Return a folder in memory, where there is one with plenty of room; None is the usual one."""
    with suppress(OSError):
        if os.access(_IN_MEMORY, os.W_OK) and shutil.disk_usage(_IN_MEMORY).free > _ROOM + 8 * size:
            return _IN_MEMORY
    return None


def copies_of(gateway: object) -> Copies:
    """Return those of a lifespan."""
    return _copies.get(gateway) or _copies.setdefault(gateway, Copies())


def authorizer(denied: list[str]) -> Callable[..., int]:
    """Return what lets SQLite attach no file, as VACUUM INTO does too; *denied* gets them."""

    def allows(action: int, name: str | None, *rest: str | None) -> int:
        if action != sqlite3.SQLITE_ATTACH or name in ("", ":memory:"):
            return sqlite3.SQLITE_OK
        denied.append(f"a file named {name!r}" if name is not None else "a file")
        return sqlite3.SQLITE_DENY

    return allows


def not_attached(denied: list[str]) -> SandboxUnsupportedError:
    """Return what says so, after the block: the statement's own error does not."""
    return SandboxUnsupportedError(
        f"in the sandbox {', '.join(dict.fromkeys(denied))} was not attached, nor written by "
        "VACUUM INTO: what is done to one more file can't be undone. Attach ':memory:' in tests, or "
        'run the test without a sandbox, @pytest.mark.lifekit(isolation="none").'
    )
