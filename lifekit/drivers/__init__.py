"""What lifekit knows about kinds of values: a module for each package, imported when one shows up."""

from lifekit._core.drivers import Driver, Gateway, Lock, Sandbox, Tls, find, loaded, register

__all__ = ["Driver", "Gateway", "Lock", "Sandbox", "Tls", "find", "loaded", "register"]
