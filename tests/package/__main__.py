"""Run the tests where they must pass too; arguments of pytest's may follow.

python -m tests.package pythons     on each supported Python that is installed
python -m tests.package lowest      with the oldest versions that the package allows
python -m tests.package newest      with the newest versions of all, whatever constraints.txt says
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from .environments import CONSTRAINTS, ROOT, CommandError, Environment, run, uv

PLACE = ROOT / "build"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_THE_NEW = [
    *("tests/benchmarks", "tests/package", "tests/test_docs.py", "tests/test_site.py"),
    *("tests/test_example.py", "tests/test_tutorial.py", "tests/test_how_to.py"),
    *(
        "tests/test_error_index.py",
        "tests/test_explanations.py",
        "tests/test_reference.py",
        "tests/test_driver_messages.py",
    ),
    *("tests/pains", "tests/test_typing.py"),
]
"""What the pages say, and what others do without lifekit: that of the new versions."""
NOT_IN_THE_OLD = {
    "tests/sandbox/test_redis.py::test_channels_are_apart_and_have_their_own_names": "ssubscribe()",
    "tests/sandbox/test_sqlalchemy.py::test_a_connection_from_before_the_block_is_in_it": (
        "rollback() on a connection that is closed: SQLAlchemy 2.0 stumbles on it"
    ),
    "tests/sandbox/test_asyncpg.py::test_the_real_connection_killed_in_a_statement_of_a_transaction": (
        "a connection cut off in a transaction, given back: asyncpg before 0.32 loses its place"
    ),
    "tests/sandbox/test_asyncpg_stateful.py::test_an_application_sees_the_same_as_in_production": (
        "without a sandbox a statement after a cancelled one now and then raises CancelledError"
    ),
    "tests/sandbox/test_redis_stateful.py::test_every_command[streams]": (
        "a reply of XINFO with names, by which the test knows times"
    ),
    "tests/testing/test_client.py::"
    "test_the_sync_client_is_starlettes_with_websockets_and_streams": "a TestClient that streams",
}
"""What the old versions of other packages lack."""
TIED = {"asyncpg-stubs", "fastapi", "httpcore2", "psycopg-binary"}
"""Development tools whose version depends on that of what the package allows."""


def supported() -> list[str]:
    """Return the Pythons that the package is made for, the oldest first."""
    named = " ".join(PROJECT["classifiers"])
    return re.findall(r"Python :: (3\.\d+)", named)


def interpreter(version: str) -> Path | None:
    """Return a Python of that version, from the path or pyenv's."""
    program = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    newest = max(pyenv.glob(f"{version}.*"), key=lambda path: _numbers(path.name), default=None)
    found = shutil.which(program)
    paths = [Path(found)] if found else []
    for path in [*paths, *([newest / "bin" / program] if newest else [])]:
        try:  # what pyenv has on the path may be a stand-in that only says where the real one is
            return Path(run(path, "-c", "import sys; print(sys.executable)").strip())
        except (CommandError, OSError):
            continue
    return None


def tested(environment: Environment, arguments: Sequence[str]) -> bool:
    """Run the tests of the working tree there."""
    cache = f"cache_dir={environment.path / 'pytest'}"
    command = ["-m", "pytest", "-n", "2", "--dist", "worksteal", "-q", "-o", cache, *arguments]
    return subprocess.run([environment.python, *command], cwd=ROOT, check=False).returncode == 0


def on_each_python(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Run them on each, and say how it went."""
    for version in supported():
        python = interpreter(version)
        if python is None:
            yield f"Python {version}", "not installed, skipped"
            continue
        environment = Environment.made(PLACE / f"python{version}", python)
        environment.install("--editable", f"{ROOT}[dev]")
        print(f"-- {python}", flush=True)
        yield f"Python {version}", "passed" if tested(environment, arguments) else "failed"


def with_the_lowest(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Run them with the oldest that pyproject.toml allows, on the oldest Python."""
    extras = [name for name in PROJECT["optional-dependencies"] if name != "dev"]
    asked = [*PROJECT["dependencies"]]
    asked += [line for name in extras for line in PROJECT["optional-dependencies"][name]]
    direct = {_name(line) for line in asked}
    oldest = supported()[0]
    python = interpreter(oldest)
    if python is None:
        yield "the lowest versions", f"Python {oldest} is not installed, skipped"
        return
    pins, constraints = PLACE / "lowest.txt", PLACE / "with-lowest.txt"
    PLACE.mkdir(exist_ok=True)
    options = ("--resolution", "lowest-direct", "--no-header", "--no-annotate", "--python", python)
    named = (option for name in extras for option in ("--extra", name))
    uv("pip", "compile", *options, *named, ROOT / "pyproject.toml", "--output-file", pins)
    low = [line for line in pins.read_text().splitlines() if _name(line) in direct]
    new = [line for line in CONSTRAINTS.read_text().splitlines() if _name(line) not in direct | TIED]
    constraints.write_text("\n".join([*low, *new, ""]))
    environment = Environment.made(PLACE / "lowest", python)
    environment.install("--editable", f"{ROOT}[dev]", constraints=constraints)
    print(f"-- {python} with {', '.join(low)}", flush=True)
    ignored = [f"--ignore={each}" for each in OF_THE_NEW]
    ignored += [f"--deselect={each}" for each in NOT_IN_THE_OLD]
    yield "the lowest versions", "passed" if tested(environment, [*ignored, *arguments]) else "failed"


def with_the_newest(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Run them with the newest that can be had, on the newest Python that is installed."""
    python = next(filter(None, map(interpreter, reversed(supported()))), None)
    if python is None:
        yield "the newest versions", "no supported Python is installed, skipped"
        return
    environment = Environment.made(PLACE / "newest", python)
    environment.install("--editable", f"{ROOT}[dev]", constraints=None)
    pinned = {_pin(line) for line in CONSTRAINTS.read_text().splitlines()}
    newer = [line for line in environment.frozen() if _pin(line) not in pinned]
    print(f"-- {python} with {', '.join(newer) or 'what constraints.txt has'}", flush=True)
    yield "the newest versions", "passed" if tested(environment, arguments) else "failed"


def _numbers(text: str) -> list[int]:
    return [*map(int, re.findall(r"\d+", text))]


def _name(requirement: str) -> str:
    """Return the package's name, as all write it who compare names."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _pin(line: str) -> tuple[str, str]:
    return _name(line), line.partition("==")[2]


def main(kind: str = "", *arguments: str) -> int:
    """Run, say how it went, and return the exit status."""
    kinds = {"pythons": on_each_python, "lowest": with_the_lowest, "newest": with_the_newest}
    if kind not in kinds:
        print(__doc__, file=sys.stderr)
        return 2
    outcomes = list(kinds[kind](arguments))
    for what, outcome in outcomes:
        print(f"{what}: {outcome}")
    ran = [outcome for _, outcome in outcomes if "skipped" not in outcome]
    return int(not ran or "failed" in ran)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
