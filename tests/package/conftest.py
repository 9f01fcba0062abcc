"""What is built once, and the environments it is installed in."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from .environments import ROOT, CommandError, Environment, run


@pytest.fixture(scope="session")
def tracked() -> list[str]:
    """The files of the repository: what git ignores is not among them."""
    try:
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    except (CommandError, FileNotFoundError) as error:
        pytest.skip(f"it is built from what git tracks: {error}")
    return sorted(name for name in set(listed.split("\0")) if name and (ROOT / name).is_file())


@pytest.fixture(scope="session")
def sources(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of these files, and of nothing else."""
    copy = tmp_path_factory.mktemp("sources") / "lifekit"
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def built(sources: Path) -> Path:
    """The directory with a wheel and an sdist, as `make build` builds them."""
    options = ("--installer", "uv", "--outdir", sources / "dist")
    run(sys.executable, "-m", "build", *options, cwd=sources)
    return sources / "dist"


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    """The wheel, which was built from the sdist."""
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def sdist(built: Path) -> Path:
    """The sdist."""
    (found,) = built.glob("*.tar.gz")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel, what it needs, and no extra."""
    environment = Environment.made(tmp_path_factory.mktemp("installed") / "environment")
    environment.install(wheel)
    return environment
