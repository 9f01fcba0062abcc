"""Imports each module of lifekit, and prints what those that can't be imported lack."""

import importlib
import pkgutil

import lifekit

for found in pkgutil.walk_packages(lifekit.__path__, "lifekit."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        print(found.name, error.name)
for name in lifekit.__all__:
    getattr(lifekit, name)
