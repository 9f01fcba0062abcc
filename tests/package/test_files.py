"""What the wheel and the sdist consist of."""

from __future__ import annotations

import re
import tarfile
from email import message_from_string
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

from .environments import ROOT, Environment, uv

pytestmark = [pytest.mark.package, pytest.mark.timeout(300)]

LINK = re.compile(r"\[([^\]]+)\]\(([^)]*)\)")
LEFT_OUT = {".ci/run", ".gitignore"}


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """What the wheel says of itself."""
    with ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(files.read(name).decode())


def test_the_wheel_holds_the_package_and_what_is_said_of_it(wheel: Path, tracked: list[str]) -> None:
    """No test, no page, no junk; py.typed and the license are there."""
    with ZipFile(wheel) as files:
        names = set(files.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == {name for name in tracked if name.startswith("lifekit/")}
    assert "lifekit/py.typed" in names
    said = {name.partition("/")[2] for name in about}
    assert said == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_the_sdist_holds_all_that_its_tests_need(sdist: Path, tracked: list[str]) -> None:
    """It is the repository without what serves the repository alone."""
    with tarfile.open(sdist) as files:
        names = {member.name.partition("/")[2] for member in files.getmembers()}
    assert names - {"PKG-INFO", *LEFT_OUT} == {*tracked} - LEFT_OUT


def test_the_sdist_installs_the_files_of_the_wheel(
    sdist: Path, installed: Environment, tmp_path: Path
) -> None:
    """To the byte."""
    other = Environment.made(tmp_path / "environment")
    other.install("--no-deps", sdist)

    def contents(environment: Environment) -> dict[str, bytes]:
        found = sorted(environment.packages.glob("lifekit*/**/*"))
        written = {"direct_url.json", "uv_build.json", "uv_cache.json", "RECORD"}  # by who installs
        return {
            str(path.relative_to(environment.packages)): path.read_bytes()
            for path in found
            if path.is_file() and path.suffix != ".pyc" and path.name not in written
        }

    assert contents(other)
    assert contents(other) == contents(installed)


def test_the_description_has_the_text_of_the_readme_and_no_dead_link(metadata: Message) -> None:
    """A link to a file of the repository would lead nowhere on PyPI: its text stays."""
    readme = (ROOT / "README.md").read_text()
    description = str(metadata.get_payload())
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert LINK.sub(r"\1", description).split() == LINK.sub(r"\1", readme).split()
    assert [url for _, url in LINK.findall(description) if not url.startswith("https://")] == []


def test_pypi_takes_it(wheel: Path, sdist: Path) -> None:
    """Its own check of the description and the metadata."""
    uv("tool", "run", "twine", "check", "--strict", wheel, sdist)


def test_each_extra_is_said(metadata: Message) -> None:
    """Those that users may name, and dev."""
    extras = set(metadata.get_all("Provides-Extra", []))
    drivers = {"asyncpg", "aiopg", "psycopg", "redis", "sqlalchemy", "httpx", "httpx2", "trio"}
    assert extras == {*drivers, "embedded", "dev"}
