"""A project of its own, in which a test runs pytest with lifekit's plugin."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

# What runs of pytest in this process import and forget again; some of it can't be imported twice.
for _name in ("fastapi", "httpx2", "lifekit.testing._pytest", "pytest_asyncio", "starlette.testclient"):
    importlib.import_module(_name)
for _name in ("trio", "uvloop"):
    importlib.import_module(_name)

ROOT = Path(__file__).parents[3]
ASYNCIO = ("-p", "pytest_asyncio.plugin", "-W", "ignore:The configuration option:Warning")
ANYIO = ("-p", "anyio.pytest_plugin")
MEMORY = "tests.testing.plugin_cases.memory:app"
SHOP = "tests.testing.plugin_cases.shop:app"
_OPTIONS = ("-p", "lifekit.pytest_plugin", "--strict-markers", "-W", "error")
HINT = (
    r"The application was opened (\d+) times, once for each event loop of (\S+)'s, which took (\S+) s\."
)
"""How a run says what many event loops cost."""


class Inner:
    """A project of its own, and runs of pytest in it."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pytester = pytester
        self.told_file = pytester.path / "told"
        monkeypatch.setenv("TOLD", str(self.told_file))
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
        self.ini()

    def ini(self, app: str | None = MEMORY, **lines: str) -> None:
        """Write the ini file."""
        known = {"lifekit_app": app, **lines}
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in known.items() if value)
        self.pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\n{text}")

    def run(self, *args: str, **files: str) -> pytest.RunResult:
        """Run pytest in this process over *files*."""
        self.pytester.makepyfile(**files)
        self.told_file.write_text("")
        return self.pytester.runpytest_inprocess(*_OPTIONS, *args)

    def run_apart(self, *args: str, **files: str) -> pytest.RunResult:
        """Run pytest in a process of its own over *files*."""
        self.pytester.makepyfile(**files)
        return self.pytester.runpytest_subprocess(*_OPTIONS, *args)

    def told(self) -> list[str]:
        """Return what the application wrote down since."""
        return self.told_file.read_text().splitlines()
