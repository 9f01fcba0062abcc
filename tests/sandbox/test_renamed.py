"""A driver may call its insides otherwise tomorrow. A write then works, or fails: none gets out."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psycopg2
import pytest

from lifekit.embedded import Server

from ..drivers.private_names import NAMES

pytestmark = [pytest.mark.proof, pytest.mark.timeout(300)]
_ROOT = Path(__file__).parents[2]


PACKAGES = ("aiopg", "asyncpg", "psycopg", "psycopg_pool", "sqlalchemy")
CLIENTS = {"psycopg": "psycopg_pool"}
"""What is run for each, where that has another name."""
_PRIVATE = re.compile(r"\b_[a-z][a-z0-9_]+\b")


def _sources(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _listed() -> list[tuple[str, str]]:
    """The names that test mode touches, each with its package; that of psycopg2 is written in C."""
    found = {(each.owner.partition(".")[0], each.name) for each in NAMES if each.in_tests}
    return sorted(each for each in found if each[0] in PACKAGES)


def _others(package: str) -> set[str]:
    """The private names of a package that test mode does not touch."""
    found = {
        name for file in _sources(package).rglob("*.py") for name in _PRIVATE.findall(file.read_text())
    }
    return found - {name for _, name in _listed()}


def _some() -> list[tuple[str, str]]:
    many = int(os.environ.get("LIFEKIT_RENAMED", "5"))
    return [
        (package, name)
        for package in PACKAGES
        for name in random.Random(package).sample(sorted(_others(package)), many)
    ]


@pytest.mark.parametrize(("package", "name"), _listed())
def test_no_write_gets_out_where_a_name_is_another(
    postgres: Server, tmp_path: Path, package: str, name: str
) -> None:
    _check(postgres, tmp_path, package, {name})


@pytest.mark.parametrize(("package", "name"), _some())
def test_no_write_gets_out_where_a_name_that_lifekit_does_not_know_is_another(
    postgres: Server, tmp_path: Path, package: str, name: str
) -> None:
    _check(postgres, tmp_path, package, {name})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_write_gets_out_where_all_other_names_are_others(
    postgres: Server, tmp_path: Path, package: str
) -> None:
    _check(postgres, tmp_path, package, _others(package))


def _check(postgres: Server, folder: Path, package: str, names: set[str]) -> None:
    """Write with a package in which these are called otherwise, and see that nothing lasts."""
    shutil.copytree(_sources(package), folder / package)
    changed = 0
    for file in (folder / package).rglob("*.py"):
        text = file.read_text()
        other = _PRIVATE.sub(
            lambda found: f"{found[0]}_of_tomorrow" if found[0] in names else found[0], text
        )
        if other != text:
            file.write_text(other)
            changed += 1
    assert changed
    client = CLIENTS.get(package, package)
    past = psycopg2.connect(postgres.url)
    past.autocommit = True
    with past.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS renamed; CREATE TABLE renamed (i int)")
        told = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.sandbox.renamed", client, postgres.url],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(_ROOT)])},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=200,
        )
        cursor.execute("SELECT count(*) FROM renamed")
        left = cursor.fetchone()
        cursor.execute("DROP TABLE renamed")
    past.close()
    assert left == (0,)
    assert "ESCAPED" not in told.stdout
    assert re.search("^(worked|refused)", told.stdout), told.stderr
    print(package, *([*names] if len(names) == 1 else [len(names), "names"]), told.stdout)
