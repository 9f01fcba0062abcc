"""Async resources that open in order, close in order, and are replaceable in tests."""

from ._errors import (
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
from ._lifespan import Lifespan
from ._registry import Registry
from ._resource import Resource
from .drivers import Driver

__all__ = [
    "DeadlineError",
    "DeclarationError",
    "Driver",
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
    "WrongLoopError",
]
