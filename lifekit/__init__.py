"""Async resources that open in order, close in order, and are replaceable in tests."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import asgi as asgi
    from . import drivers as drivers
    from . import embedded as embedded
    from . import events as events
    from . import testing as testing
    from ._core.drivers import Driver
    from ._core.errors import (
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
        UnavailableError,
        WrongLoopError,
    )
    from ._core.health import Health
    from ._core.leading import Leadership, exclusive, leadership
    from ._core.lifespan import Lifespan
    from ._core.registry import Registry
    from ._core.resource import Resource
    from ._core.stopping import Stopping, stopping
    from ._core.worker import Worker

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
    "UnavailableError",
    "Worker",
    "WrongLoopError",
    "exclusive",
    "leadership",
    "stopping",
]

_PARTS = {"asgi", "drivers", "embedded", "events", "testing"}
_HOMES = {
    "Driver": "drivers",
    "Health": "health",
    "Leadership": "leading",
    "Lifespan": "lifespan",
    "Registry": "registry",
    "Resource": "resource",
    "Stopping": "stopping",
    "Worker": "worker",
    "exclusive": "leading",
    "leadership": "leading",
    "stopping": "stopping",
}


def __getattr__(name: str) -> Any:
    # When it is asked for: pytest loads the plugin, and with it this package, in every run.
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}._core.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
