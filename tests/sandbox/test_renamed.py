"""A driver may call its insides otherwise tomorrow. A write then works, or fails: none gets out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psycopg2
import pytest

from lifekit.embedded import Server

from ..drivers.private_names import NAMES, Private

pytestmark = [pytest.mark.proof, pytest.mark.timeout(300)]
_ROOT = Path(__file__).parents[2]


def _cases() -> list[Private]:
    seen = {(each.owner.partition(".")[0], each.name): each for each in NAMES if each.in_tests}
    return [seen[key] for key in sorted(seen)]


@pytest.mark.parametrize(
    "case", _cases(), ids=lambda case: f"{case.owner.partition('.')[0]}-{case.name}"
)
def test_no_write_gets_out_where_a_name_is_another(
    postgres: Server, tmp_path: Path, case: Private
) -> None:
    package = case.owner.partition(".")[0]
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, tmp_path / package)
    changed = 0
    for file in (tmp_path / package).rglob("*.py"):
        text = file.read_text()
        if (other := re.sub(rf"\b{case.name}\b", f"{case.name}_of_tomorrow", text)) != text:
            file.write_text(other)
            changed += 1
    assert changed
    past = psycopg2.connect(postgres.url)
    past.autocommit = True
    with past.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS renamed; CREATE TABLE renamed (i int)")
        told = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.sandbox.renamed", package, postgres.url],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(_ROOT)])},
            cwd=tmp_path,
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
    print(case.name, told.stdout)
