"""Factories and handles fit by their types, for users of mypy and of pyright, both strict."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

SAMPLES = Path(__file__).with_name("typing")
MARK = "# error"

Checker = Callable[[Path], tuple[list[str], str]]


@dataclass(frozen=True)
class Finding:
    """An error that a type checker reports."""

    file: str
    line: int
    text: str


def mypy(workdir: Path) -> tuple[list[str], str]:
    """Return mypy's command line, and a pattern of the lines that it prints for errors."""
    options = ["--strict", "--config-file=", "--hide-error-context", "--no-color-output"]
    cache = f"--cache-dir={workdir / 'mypy'}"
    pattern = r"^(?:.*[/\\])?(\w+\.py):(\d+): error: (.*)$"
    return [sys.executable, "-m", "mypy", *options, cache, str(SAMPLES)], pattern


def pyright(workdir: Path) -> tuple[list[str], str]:
    """Return pyright's command line, and a pattern of the lines that it prints for errors."""
    project = workdir / "pyrightconfig.json"
    samples = os.path.relpath(SAMPLES, workdir)  # it takes no absolute one
    project.write_text(json.dumps({"include": [samples], "typeCheckingMode": "strict"}))
    options = ["--pythonpath", sys.executable, "--project", str(project)]
    pattern = r"^\s*(?:.*[/\\])?(\w+\.py):(\d+):\d+ - error: (.*)$"
    return [sys.executable, "-m", "pyright", *options], pattern


@pytest.fixture(scope="module")
def reports(pytestconfig: pytest.Config) -> dict[str, list[Finding]]:
    """What each checker says of the samples; both run at once, and once for all tests."""
    assert pytestconfig.cache is not None
    workdir = pytestconfig.cache.mkdir("typing")
    quiet = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}

    def check(checker: Checker) -> list[Finding]:
        command, pattern = checker(workdir)
        done = subprocess.run(command, cwd=workdir, env=quiet, text=True, capture_output=True)
        # 1 says that there are errors, as bad.py has; anything else that it did not get so far
        assert done.returncode == 1, done.stdout + done.stderr
        matches = re.finditer(pattern, done.stdout, re.MULTILINE)
        return [Finding(match[1], int(match[2]), match[3]) for match in matches]

    with ThreadPoolExecutor() as threads:
        return dict(zip(["mypy", "pyright"], threads.map(check, [mypy, pyright]), strict=True))


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_what_fits_has_no_errors_and_every_handle_its_type(
    reports: dict[str, list[Finding]], checker: str
) -> None:
    assert [finding for finding in reports[checker] if finding.file == "good.py"] == []


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_what_does_not_fit_is_an_error_on_its_line_and_on_no_other(
    reports: dict[str, list[Finding]], checker: str
) -> None:
    lines = (SAMPLES / "bad.py").read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith(MARK)}
    assert len(marked) > 30
    assert {finding.line for finding in reports[checker] if finding.file == "bad.py"} == marked
