"""Environments of their own, which uv makes in a moment."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
_SECONDS = 300


class CommandError(Exception):
    """A command failed; says what it said."""


def run(*command: str | Path, cwd: Path | None = None, seconds: int = _SECONDS) -> str:
    """Run a command without the caller's own Python settings; return what it wrote."""
    dropped = ("PYTHON", "PYTEST_", "VIRTUAL_ENV", "PG", "DATABASE_URL", "REDIS_URL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**kept, **_index()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        raise CommandError(
            f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}"
        )
    return done.stdout


@functools.cache
def _index() -> dict[str, str]:
    """Tell uv, which reads no pip.conf, where pip installs from."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    named = dict(re.findall(r"^(.*)\.index-url='(.*)'$", said, re.MULTILINE))
    url = next((named[place] for place in (":env:", "site", "user", "global") if place in named), None)
    return {} if url is None or "UV_DEFAULT_INDEX" in os.environ else {"UV_DEFAULT_INDEX": url}


def uv(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run uv, the one beside this Python or else on the path."""
    beside = Path(sys.executable).with_name("uv")
    program = beside if beside.exists() else shutil.which("uv")
    if program is None:
        raise CommandError("uv is not installed: pip install uv")
    return run(program, "--quiet", "--no-progress", "--no-python-downloads", *arguments, cwd=cwd)


@dataclass(frozen=True)
class Environment:
    """A directory with a Python and what was installed there."""

    path: Path

    @classmethod
    def made(cls, path: Path, python: str | Path = sys.executable) -> Environment:
        """Make an empty one at *path*, in place of what is there."""
        uv("venv", "--clear", "--python", python, path)
        return cls(path)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where its packages are."""
        (found,) = self.path.glob("lib/python3*/site-packages")
        return found

    def install(self, *arguments: str | Path, constraints: Path | None = CONSTRAINTS) -> None:
        """Install what pip's *arguments* name, in the versions of *constraints* or else the newest."""
        options = ("--constraints", constraints) if constraints else ()
        uv("pip", "install", "--python", self.python, *options, *arguments)

    def frozen(self) -> list[str]:
        """Return what is installed, as constraints name it."""
        said = uv("pip", "freeze", "--python", self.python, "--exclude-editable")
        return said.splitlines()

    def run(self, *arguments: str | Path) -> str:
        """Run its Python, which sees nothing but what is installed there."""
        return run(self.python, "-I", "-W", "error", *arguments, cwd=self.path)
