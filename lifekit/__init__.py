"""Async resources that open in order, close in order, and are replaceable in tests."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import asgi as asgi
    from . import drivers as drivers
    from . import embedded as embedded
    from . import events as events
    from . import testing as testing
    from ._errors import (
        CrashError,
        DeadlineError,
        DeclarationError,
        LifekitError,
        NotOpenError,
        OverrideError,
        SandboxBusyError,
        SandboxError,
        SandboxEscapedError,
        SandboxUnsupportedError,
        ShutdownError,
        StartupError,
        WrongLoopError,
    )
    from ._health import Health
    from ._leading import Leadership, exclusive, leadership
    from ._lifespan import Lifespan
    from ._registry import Registry
    from ._resource import Resource
    from ._stopping import Stopping, stopping
    from ._worker import Worker
    from .drivers import Driver

__all__ = [
    "CrashError",
    "DeadlineError",
    "DeclarationError",
    "Driver",
    "Health",
    "Leadership",
    "LifekitError",
    "Lifespan",
    "NotOpenError",
    "OverrideError",
    "Registry",
    "Resource",
    "SandboxBusyError",
    "SandboxError",
    "SandboxEscapedError",
    "SandboxUnsupportedError",
    "ShutdownError",
    "StartupError",
    "Stopping",
    "Worker",
    "WrongLoopError",
    "exclusive",
    "leadership",
    "stopping",
]

_PARTS = {"asgi", "drivers", "embedded", "events", "testing"}
_HOMES = {
    "Driver": "drivers",
    "Health": "_health",
    "Leadership": "_leading",
    "Lifespan": "_lifespan",
    "Registry": "_registry",
    "Resource": "_resource",
    "Stopping": "_stopping",
    "Worker": "_worker",
    "exclusive": "_leading",
    "leadership": "_leading",
    "stopping": "_stopping",
}


def __getattr__(name: str) -> Any:
    # When it is asked for: pytest loads the plugin, and with it this package, in every run.
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, '_errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
