"""The same work on each library: one file for each, written as its own documentation does."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

FLOOR = "nothing"
CONTESTANTS = {
    FLOOR: ("on_nothing", "fastapi"),
    "by hand": ("by_hand", "fastapi"),
    "lifekit": ("on_lifekit", "lifekit"),
    "svcs": ("on_svcs", "svcs"),
    "dishka": ("on_dishka", "dishka"),
    "wireup": ("on_wireup", "wireup"),
    "wireup, plain routes": ("on_wireup_plain", "wireup"),
    "dependency-injector": ("on_dependency_injector", "dependency_injector"),
    "that-depends": ("on_that_depends", "that_depends"),
}
"""By name: the module here, and the package that it needs."""


def load(name: str) -> ModuleType | None:
    """Return a contestant's module, or None where its package is not installed."""
    module, package = CONTESTANTS[name]
    if find_spec(package) is None:
        return None
    return import_module(f".{module}", __name__)
