"""The tutorial: its steps, performed as they are written, print what it shows."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?(?: hl_lines="([^"]+)")?\n(.*?)^```$', re.M | re.S)
INCLUDE = re.compile(r'^--8<-- "([^"]+)"$', re.M)


@dataclass
class Block:
    """One fenced block of the page, what it includes filled in."""

    line: int
    language: str
    title: str
    marked: set[int]
    text: str


def _blocks() -> list[Block]:
    page = PAGE.read_text("utf-8")
    blocks = [
        Block(
            line=page[: found.start()].count("\n") + 1,
            language=found[1],
            title=found[2] or "",
            marked={n for each in (found[3] or "").split() for n in _numbers(each)},
            text=_filled_in(found[4]),
        )
        for found in BLOCK.finditer(page)
    ]
    assert page.count("\n```") == 2 * len(blocks)
    return blocks


def _numbers(lines: str) -> range:
    first, _, last = lines.partition("-")
    return range(int(first), int(last or first) + 1)


def _filled_in(text: str) -> str:
    return INCLUDE.sub(lambda found: (ROOT / found[1]).read_text("utf-8").rstrip("\n"), text)


# -- a reader ----------------------------------------------------------------------------------


class Reader:
    """Does what the page says, in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: subprocess.Popen[str] | None = None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = str(listener.getsockname()[1])
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON"))}
        # As in a terminal: a line is seen when it is printed, and 80 columns wide. Plugins that the
        # reader does not have take their time.
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "80",
            "PYTEST_ADDOPTS": "-p no:hypothesispytest -p no:xdist -p no:timeout",
        }

    def run(self, commands: str, until: str) -> str:
        """Type commands, and return what is printed: to their end, or up to a server's last line."""
        if self.server is not None and not commands.startswith("curl "):
            self.press_ctrl_c()
        commands = commands.replace(":8000", f":{self.port}").replace("curl ", "curl -sS ")
        # The reader has no uvloop, which says of a refused connection less.
        options = f"--port {self.port} --loop asyncio"
        process = subprocess.Popen(
            ["sh", "-c", commands.replace("uvicorn ", f"uvicorn {options} ")],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        if "CTRL+C" not in until:
            return self._shown(process.communicate()[0])
        self.server, output = process, ""
        while "CTRL+C" not in output:
            line = process.stdout.readline()
            assert line, output
            output += line
        return self._shown(output)

    def press_ctrl_c(self) -> str:
        """Interrupt what runs in the first terminal, and return what it still prints."""
        assert self.server is not None
        server, self.server = self.server, None
        os.killpg(server.pid, signal.SIGINT)
        return self._shown(server.communicate()[0])

    def leave(self) -> None:
        """End what a failed step left running."""
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.communicate()

    def _shown(self, output: str) -> str:
        return output.replace(f":{self.port}", ":8000")


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[list[Reader]]:
    """Two readers, each with an empty folder."""
    if shutil.which("curl") is None:
        pytest.skip("the page asks for curl")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    readers = [Reader(tmp_path / "one"), Reader(tmp_path / "two")]
    yield readers
    for reader in readers:
        reader.leave()


def _comparable(output: str) -> list[str]:
    """Return the lines of *output* without what differs from run to run."""
    output = re.sub(r'^INFO: +\S+ - "(?:GET|POST) .*\n', "", output, flags=re.M)  # at each request
    output = re.sub(r"\d+\.\d+( ?s)\b", r"#\1", output)
    output = re.sub(r"process \[\d+\]|Errno \d+", "#", output)
    output = re.sub(r"={3,}", "===", output)
    output = re.sub(r"│[ ░█]*│", lambda bar: "█" if "█" in bar[0] else "░", output)
    picture = re.compile(r"(?:^  \w+ +[░█] # s\n)+", re.M)  # whose order is that of microseconds
    output = picture.sub(lambda found: "".join(sorted(found[0].splitlines(True))), output)
    return output.splitlines()


def _matches(shown: list[str], printed: list[str]) -> bool:
    """Tell whether they are the same, where a line of three dots is any number of lines."""
    parts = [r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in shown]
    return re.fullmatch("".join(parts), "".join(f"{line}\n" for line in printed)) is not None


def _perform(reader: Reader, blocks: list[Block]) -> None:
    printed: str | None = None
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language == "sh":
            until = following.text if following and following.language == "text" else ""
            printed = reader.run(block.text, until)
        elif block.language == "text":
            if block.title == "after Ctrl-C":
                printed = reader.press_ctrl_c()
            assert printed is not None
            assert "sesame" not in printed
            shown = _comparable(block.text)
            assert _matches(shown, _comparable(printed)), f"tutorial.md:{block.line}:\n{printed}"
        else:
            (reader.folder / block.title).write_text(block.text, "utf-8")
    if reader.server is not None:
        reader.press_ctrl_c()


@pytest.mark.long
def test_every_command_prints_what_the_page_shows(readers: list[Reader]) -> None:
    blocks = [block for block in _blocks() if "pip install" not in block.text]
    # To save time, one reader runs the application, while another, who has typed it, tests it.
    half = [block.title for block in blocks].index("pytest.ini")
    typed = [block for block in blocks[:half] if block.title.endswith(".py")]
    with ThreadPoolExecutor() as both:
        list(both.map(_perform, readers, [blocks[:half], typed + blocks[half:]]))


# -- what it marks -----------------------------------------------------------------------------


def test_the_marked_lines_are_those_that_are_new() -> None:
    python = [block for block in _blocks() if block.language == "python"]
    replaced = [(old, new) for old, new in combinations(python, 2) if old.title == new.title]
    assert [new.title for _, new in replaced] == ["resources.py", "main.py"]
    for old, new in replaced:
        before, lines = old.text.splitlines(), new.text.splitlines()
        steps = SequenceMatcher(None, before, lines, autojunk=False).get_opcodes()
        changed = {n + 1 for kind, *_, a, b in steps if kind != "equal" for n in range(a, b)}
        assert {n for n in changed if lines[n - 1]} == {n for n in new.marked if lines[n - 1]}


# -- what it installs --------------------------------------------------------------------------


def test_what_it_installs_is_what_its_files_import() -> None:
    [others, own] = re.findall(r"^pip install (.+)$", PAGE.read_text("utf-8"), re.M)
    [(wheel, listed)] = re.findall(r'^"\.\./([^[]+)\[([\w,]+)\]"$', own)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert wheel == f"lifekit-{project['version']}-py3-none-any.whl"
    extras = set(listed.split(","))
    assert extras <= set(project["optional-dependencies"])

    files = [block for block in _blocks() if block.language == "python"]
    imported = {name for block in files for name in _imported(block.text)}
    typed = {block.title.removesuffix(".py") for block in files}
    brought = {"lifekit", *extras, *others.split(), "pydantic"}  # FastAPI brings pydantic
    assert imported - typed - sys.stdlib_module_names <= brought


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
