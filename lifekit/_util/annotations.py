"""What annotations tell of a value: the class that a factory makes, what a method gives."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import types
import typing
from collections import abc
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from typing import Any, Final, Self, TypeVar, cast

ITSELF: Final = cast("object", Self)
UNKNOWN: Final[object] = Any
"""Stands for a type that no annotation tells: what comes of it can do anything."""

AWAITED: set[object] = {abc.Awaitable, abc.Coroutine}
ITERATED: set[object] = {abc.AsyncGenerator, abc.AsyncIterator, abc.AsyncIterable}
YIELDED: set[object] = {abc.Generator, abc.Iterator, *ITERATED}
ENTERED: dict[object, str] = {
    AbstractAsyncContextManager: "__aenter__",
    AbstractContextManager: "__enter__",
}


class Unclear(Exception):
    """The annotation of a factory names no one class."""


def annotations_of(thing: Any) -> Mapping[str, Any]:
    """Return the annotations of a function or a class; as text what names something undefined.

    Python 3.14 evaluates annotations when they are asked for, so that a name which is imported for
    type checkers only would be a NameError there.
    """
    if not callable(thing):
        return {}
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        found = inspect.get_annotations(thing, format=Format.FORWARDREF)
        if any(map(_is_undefined, found.values())):
            texts = inspect.get_annotations(thing, format=Format.STRING)
            found.update((name, texts[name]) for name in found if _is_undefined(found[name]))
        return found
    return inspect.get_annotations(thing)


def _is_undefined(annotation: object) -> bool:
    # The parameters of a Callable are a list.
    listed = isinstance(annotation, list)
    parts = cast("list[object]", annotation) if listed else typing.get_args(annotation)
    return isinstance(annotation, typing.ForwardRef) or any(map(_is_undefined, parts))


def value_type(factory: Any) -> type:
    """Return the class of the value that *factory* says it makes.

    Raises:
        Unclear: It does not say, or not one class.
    """
    while isinstance(factory, functools.partial):
        factory = factory.func
    if isinstance(factory, type):
        annotation: object = factory
    else:
        function = inspect.unwrap(factory if inspect.isroutine(factory) else type(factory).__call__)
        raw = annotations_of(function).get("return", inspect.Parameter.empty)
        if raw is inspect.Parameter.empty:
            raise Unclear("has no return annotation")
        try:
            annotation = resolve(raw, function.__globals__)
        except Exception as error:
            why = f"is annotated {raw!r}, which can't be resolved at run time ({error}). Import it"
            raise Unclear(f"{why} outside `if TYPE_CHECKING:`") from None
    told = annotation
    while (origin := typing.get_origin(annotation)) in {*AWAITED, *YIELDED, *ENTERED}:
        arguments = typing.get_args(annotation)
        annotation = arguments[-1 if origin is abc.Coroutine else 0]
        if origin in YIELDED:
            break
    else:
        for enter in ENTERED.values():
            entered = entered_as(annotation, enter)
            if entered is not UNKNOWN and entered is not None:
                annotation = entered
                break
    kind = class_of(annotation, None)
    if not isinstance(kind, type) or kind is UNKNOWN:
        raise Unclear(f"is annotated {told!r}, which is no one class")
    return kind


def is_parameter(annotation: object, enter: str) -> bool:
    """Return whether what ``as`` gives is the annotation's own parameter."""
    origin: Any = typing.get_origin(annotation)
    told = return_of(getattr(origin, enter, None), origin) if isinstance(origin, type) else None
    return isinstance(told, TypeVar) and told in getattr(origin, "__parameters__", ())


def entered_as(annotation: object, enter: str) -> object:
    """Return the annotation of what ``as`` gives, UNKNOWN if it can't be told."""
    kind: Any = typing.get_origin(annotation) or annotation
    function = getattr(kind, enter, None) if isinstance(kind, type) else None
    if function is None:
        return UNKNOWN
    if is_parameter(annotation, enter):
        told = return_of(function, kind)
        parameters: tuple[object, ...] = cast("Any", kind).__parameters__
        return typing.get_args(annotation)[parameters.index(told)]
    entered = class_of(return_of(function, kind), kind)
    return annotation if entered is ITSELF else entered


def return_of(function: Any, owner: type | None) -> object:
    """Return what a function, found in *owner*, is annotated to return, or UNKNOWN."""
    function = inspect.unwrap(function)
    raw = annotations_of(function).get("return", UNKNOWN)
    return resolve_if_possible(raw, getattr(function, "__globals__", {}), owner)


def resolve_if_possible(raw: object, names: Mapping[str, Any], owner: type | None) -> object:
    """Return an annotation as an object, or UNKNOWN."""
    with suppress(Exception):  # a name that only type checkers can resolve
        return resolve(raw, names, {owner.__name__: owner} if owner is not None else {})
    return UNKNOWN


def resolve(raw: object, names: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> object:
    """Return an annotation as an object; raise as `typing.get_type_hints` does."""
    names = {**names, **{name: names.get(name, kind) for name, kind in (own or {}).items()}}

    def probe() -> None: ...

    def read(annotation: object) -> object:
        probe.__annotations__ = {"return": annotation}
        return typing.get_type_hints(probe, names)["return"]

    try:
        return read(raw)
    except Exception:
        if not isinstance(raw, str):
            raise
        bare = _Bare(names).visit(ast.parse(raw, mode="eval"))
        return read(ast.unparse(bare))


class _Bare(ast.NodeTransformer):
    # `Pool[Record]` is legal to type checkers with stubs where Pool takes no subscript.
    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        node.slice = self.visit(node.slice)
        try:
            eval(ast.unparse(node), dict(self._names))
        except Exception:
            kind = eval(ast.unparse(node.value), dict(self._names))
            wraps = (typing.get_origin(kind) or kind) in {*AWAITED, *YIELDED, *ENTERED}
            return node if wraps else node.value  # without its parameter it would tell something else
        return node


def class_of(annotation: object, owner: type | None) -> object:
    """Return a class, None, ITSELF, or UNKNOWN."""
    if annotation is None or annotation is types.NoneType:
        return None
    origin: Any = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in {typing.ClassVar, typing.Final}:
        return class_of(arguments[0], owner)
    if origin in {typing.Union, types.UnionType}:
        known = [each for each in arguments if each is not types.NoneType]
        return class_of(known[0], owner) if owner is not None and len(known) == 1 else UNKNOWN
    if isinstance(annotation, TypeVar) and owner is not None:
        bound: Any = annotation.__bound__
        if isinstance(bound, typing.ForwardRef):
            # What the variable's own module imports for type checkers only, its user's imports.
            names = vars(sys.modules[annotation.__module__]) | vars(sys.modules[owner.__module__])
            bound = resolve_if_possible(bound.__forward_arg__, names, owner)
        limit: Any = UNKNOWN if bound is None else class_of(bound, owner)
        return ITSELF if limit in owner.__mro__ else cast("object", limit)
    if annotation is ITSELF:
        return ITSELF
    kind: Any = origin or annotation
    return kind if inspect.isclass(kind) and kind is not type else UNKNOWN
