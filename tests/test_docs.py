"""What README, documentation and docstrings show is so: their code runs, or is that of tested files."""

from __future__ import annotations

import ast
import re
import subprocess
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from shortener import resources

from lifekit import Registry, Worker, testing

from .pages import DOCS, PAGES, ROOT, blocks, name

README = ROOT / "README.md"
EXAMPLES = DOCS / "examples"
LONGEST = 10
"""Lines that code on a page may have beside imports, unless it is included from a file."""

INCLUDED = re.compile(r'--8<-- "([\w./]+\.py)(?::(\w+))?"')
QUOTED = re.compile(r'title="([\w.]+)"|^# (\w+\.py)')
SOURCES = {
    path.name: path.read_text("utf-8")
    for path in (
        *(EXAMPLES / "shortener").glob("*.py"),
        *(EXAMPLES / "tests").glob("*.py"),
        ROOT / "tests/test_example.py",
    )
}
"""What is quoted, in parts and without what lies between."""


def _lines(text: str) -> list[str]:
    """Return the lines of code that are neither empty nor imports."""
    imports = re.compile(r"(from \S+ )?import ")
    return [line for line in text.splitlines() if line.strip() and not imports.match(line)]


def _chunks(text: str) -> list[str]:
    return [chunk.strip("\n") for chunk in re.split(r"\n{2,}", textwrap.dedent(text))]


def _included(text: str) -> list[tuple[Path, str | None]]:
    """Return the files that a block includes, with the sections: all of it or nothing."""
    found = [INCLUDED.fullmatch(line) for line in text.splitlines()]
    return [(ROOT / each[1], each[2]) for each in found if each is not None and all(found)]


# -- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_on_a_page_is_included_or_quoted_or_short_and_runs(page: Path) -> None:
    """The README alone, which can't include anything, quotes at length."""
    text = page.read_text("utf-8")
    found = list(blocks(text, "python"))
    assert len(re.findall(r"(```|~~~) *(py|\{ *\.py)", text)) == len(found)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for header, code in found:
        quoted = QUOTED.search(header) or QUOTED.match(code)
        if _included(code):
            continue
        assert "--8<--" not in code, code
        assert len(_lines(code)) <= LONGEST or page == README, code
        if quoted is not None and (quoted[1] or quoted[2]) in SOURCES:
            _is_quoted(code, SOURCES[quoted[1] or quoted[2]])
        else:
            exec(compile(code, page.name, "exec"), namespace)


def _is_quoted(code: str, source: str) -> None:
    position = 0
    for chunk in _chunks(re.sub(r"\A# .*\n", "", code)):
        found = [source.find(each, position) for each in (chunk, textwrap.indent(chunk, "    "))]
        position = max(found)
        assert position >= 0, f"not there, or not in this order:\n{chunk}"


def _all_included() -> list[tuple[Path, str | None]]:
    texts = [code for page in PAGES for _, code in blocks(page.read_text("utf-8"), "python")]
    return sorted({each for text in texts for each in _included(text)}, key=str)


@pytest.mark.parametrize(
    ("file", "section"), _all_included(), ids=lambda each: each and getattr(each, "stem", each)
)
def test_what_is_included_is_there_and_of_a_file_that_a_test_runs(
    file: Path, section: str | None
) -> None:
    """Which names it: as a module, or as a file in its folder."""
    source = file.read_text("utf-8")
    if section is not None:
        start, end = (source.find(f"--8<-- [{each}:{section}]") for each in ("start", "end"))
        assert 0 <= start < end
    assert EXAMPLES in file.parents
    parts = file.relative_to(EXAMPLES).with_suffix("").parts
    assert [test for test in _tests() if all(re.search(rf"\b{part}\b", test) for part in parts)]


@cache
def _tests() -> list[str]:
    """Return the tests, and what they include of the pages that they follow."""
    found: list[str] = []
    for path in (*(ROOT / "tests").glob("test_*.py"), *EXAMPLES.rglob("test_*.py")):
        text = f"{path}\n{path.read_text('utf-8')}"
        pages = [page.read_text("utf-8") for page in PAGES if f'"{page.name}"' in text]
        found.append("\n".join([text, *pages]) if path.name != Path(__file__).name else "")
    return found


def test_each_picture_in_the_readme_shows_the_whole_example() -> None:
    text = README.read_text("utf-8")
    pictures = re.findall(r"^(?:start|stop) of .*\n((?:  \w+ +│.*\n)+)", text, re.MULTILINE)
    assert pictures != []
    declared = resources.registry.plan().resources
    names = sorted(each.name for each in declared if not isinstance(each, Worker))
    for picture in pictures:
        assert sorted(re.findall(r"^  (\w+)", picture, re.MULTILINE)) == names


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) < 150


# -- docstrings ------------------------------------------------------------------------------------


BLOCK = re.compile(r"::\n\n((?:    .*\n|\n)+)")
SECTION = re.compile(r"^(?:Args|Raises|Returns|Yields):\n(?:    .*\n)+", re.M)


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each docstring of the package."""
    for path in sorted((ROOT / "lifekit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None:
                    yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}", f"{text}\n"


DOCSTRINGS = [(where, code) for where, text in _docstrings() for code in BLOCK.findall(text)]


def test_all_code_of_docstrings_is_found() -> None:
    """It is what is indented below a ``::``; nothing else is indented, or marked in another way."""
    assert "lifekit/embedded.py:" in dict(DOCSTRINGS)
    for where, text in _docstrings():
        assert not re.search(r"```|>>> |^    [\w@#]", SECTION.sub("", BLOCK.sub("", text)), re.M), where


@pytest.mark.parametrize(("where", "code"), DOCSTRINGS, ids=[where for where, _ in DOCSTRINGS])
def test_the_code_of_a_docstring_runs(where: str, code: str) -> None:
    namespace = {
        **vars(resources),
        "mock": testing.mock,
        "cursor": testing.mock(resources.reports).acquire.return_value.cursor.return_value,
        "registry": Registry(),
    }
    exec(compile(f"import os\n{textwrap.dedent(code)}", where, "exec"), namespace)


# -- the repository --------------------------------------------------------------------------------

HOME = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")


def test_no_file_names_a_directory_of_the_machine_it_was_written_on() -> None:
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("git does not know this directory")
    paths = [ROOT / name for name in listed.stdout.split("\0")]
    texts = {each: each.read_text("utf-8", errors="replace") for each in paths if each.is_file()}
    assert README in texts
    named = [path.name for path, text in texts.items() if HOME.search(text) or str(ROOT) in text]
    assert named == []
