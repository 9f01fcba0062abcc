"""What lifekit knows about kinds of values: a module for each package, imported when one shows up."""

from lifekit._core.drivers import Driver, Gateway, Sandbox, Tls, find, loaded, register

__all__ = ["Driver", "Gateway", "Sandbox", "Tls", "find", "loaded", "register"]
