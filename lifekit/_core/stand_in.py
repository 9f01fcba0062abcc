"""Errors made by others, without their secrets.

An error whose text can be changed is changed. Where that can't be, because its class builds the text
by itself, because its arguments are no texts, or because it is immutable, a stand-in takes its place:
an instance of a subclass that has the same names, shows the text without the secret, and else is what
the original is. So `except`, `isinstance` and attributes go on working. ``original`` is the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any, cast

from lifekit._util.redact import redact
from lifekit._util.secrets import cleaner

from .errors import name_of, notes_of, text_of

MOST, LONGEST = 20_000, 50_000
"""How many linked errors are looked at, and how much of a text is shown."""

_ERROR: Any = vars(BaseException)
_GROUP: Any = vars(BaseExceptionGroup)
_ARGS: Any = _ERROR["args"]
_PLAIN = {
    BaseException.__str__,
    BaseException.__repr__,
    BaseExceptionGroup.__str__,
    BaseExceptionGroup.__repr__,
}
_SHOWN: dict[type, tuple[str, ...]] = {  # beside its args
    OSError: ("errno", "strerror", "filename", "filename2"),
    SyntaxError: ("msg", "filename", "text", "print_file_and_line"),
    ImportError: ("msg",),
    UnicodeError: ("reason",),
    SystemExit: ("code",),
}
Clean = Callable[[str], str]


def redact_error(error: BaseException, *about: object) -> BaseException:
    """Return *error* without secrets in what it, its causes and the errors it holds show.

    Whoever prints the traceback of a failed start prints the driver's own words, DSN and all. What
    *about* names, such as the value that was being opened, tells more secrets. It is the same object,
    unless it must be a stand-in.
    """
    try:
        return _redacted(error, about)
    except Exception as broken:  # in doubt nothing is shown
        return _stand_in(
            error, _Shows(f"message unavailable: {name_of(broken)}", f"<{name_of(error)}>")
        )


def _redacted(error: BaseException, about: Sequence[object]) -> BaseException:
    errors = list(_linked(error))
    clean = cleaner(errors, about)
    done: dict[int, BaseException] = {}
    left = list(errors)
    while left:  # the members of a group come before it
        each = left[-1]
        waiting = [member for member in _members(each) if id(member) not in done]
        if waiting and id(each) not in done:
            left += waiting
            continue
        left.pop()
        if id(each) not in done:
            done[id(each)] = _clean_or_stand_in(
                each, clean, [done[id(held)] for held in _members(each)]
            )
    for each in errors:
        for name in ("__cause__", "__context__"):
            _link(done[id(each)], each, name, done)
    return done[id(error)]


def _linked(error: BaseException) -> Iterator[BaseException]:
    left, seen = [error], set[int]()
    while left and len(seen) < MOST:
        each = left.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            links = (_ERROR["__cause__"].__get__(each), _ERROR["__context__"].__get__(each))
            left += [link for link in (*links, *_members(each)) if link is not None]


def _members(error: BaseException) -> Sequence[BaseException]:
    return _GROUP["exceptions"].__get__(error) if _is_group(error) else ()


def _link(
    target: BaseException, source: BaseException, name: str, done: dict[int, BaseException]
) -> None:
    link: Any = _ERROR[name].__get__(source)
    new = done.get(id(link), link)
    if target is not source or new is not link:
        suppresses = _ERROR["__suppress_context__"].__get__(source)
        _ERROR[name].__set__(target, new)
        _ERROR["__suppress_context__"].__set__(target, suppresses)  # which a cause changes


def _clean_or_stand_in(
    error: BaseException, clean: Clean, members: Sequence[BaseException]
) -> BaseException:
    same = all(new is old for new, old in zip(members, _members(error), strict=True))
    if same and _is_as_it_seems(error):
        if _is_clean(error, clean):
            return error
        args, shown = _ARGS.__get__(error), _shown(error)
        with suppress(Exception):  # a class that forbids it
            _change(error, clean)
        if _is_clean(error, clean):
            return error
        with suppress(Exception):  # the original stays as it was
            _ARGS.__set__(error, args)
            for name, value in shown:
                setattr(error, name, value)
    shows = _Shows(
        None if _has_plain(error, "__str__") else _cleaned(text_of(error), clean),
        None if _has_plain(error, "__repr__") else _cleaned(text_of(error, repr), clean),
        ()
        if _is_group(error)
        else tuple(_clean_argument(each, clean) for each in _ARGS.__get__(error)),
        clean,
    )
    return _stand_in(error, shows, [_cleaned(note, clean) for note in notes_of(error)], members)


def _is_as_it_seems(error: BaseException) -> bool:
    # What prints it reads these by their names, which its class may have taken for something else.
    names = {"__cause__": _ERROR, "__context__": _ERROR}
    if _is_group(error):
        names["exceptions"] = _GROUP
    try:
        for name in ("__notes__", "__traceback__", "__suppress_context__", "__class__"):
            getattr(error, name, None)
        return all(getattr(error, name) is own[name].__get__(error) for name, own in names.items())
    except BaseException:
        return False


def _is_clean(error: BaseException, clean: Clean) -> bool:
    texts = [*notes_of(error), *(value for _, value in _shown(error))]
    for name, shows in (("__str__", str), ("__repr__", repr)):
        if (
            name == "__repr__"
            and type(error).__repr__ is BaseException.__repr__
            and not _ARGS.__get__(error)
        ):
            continue  # its name alone
        if _has_plain(error, name):
            texts.append(_GROUP["message"].__get__(error))
        else:
            texts.append(text_of(error, shows))
    if _is_group(error):
        texts += [text_of(each, repr) for each in _ARGS.__get__(error)[2:]]
    return all(len(text) <= LONGEST and clean(text) == text for text in texts)


def _is_group(error: BaseException) -> bool:
    return issubclass(type(error), BaseExceptionGroup)


def _has_plain(error: BaseException, name: str) -> bool:
    # A group then shows its message and its members, which are looked at by themselves.
    return _is_group(error) and getattr(type(error), name) in _PLAIN


def _shown(error: BaseException) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for kind, names in _SHOWN.items():
        for name in names if issubclass(type(error), kind) else ():
            with suppress(Exception):
                if type(value := getattr(error, name)) is str:
                    found.append((name, value))
    return found


def _change(error: BaseException, clean: Clean) -> None:
    if (notes := notes_of(error)) != (cleaned := [clean(note) for note in notes]):
        error.__notes__ = cleaned
    for name, value in _shown(error):
        setattr(error, name, clean(value))
    if not _is_group(error):
        args = _ARGS.__get__(error)
        _ARGS.__set__(error, tuple(clean(each) if type(each) is str else each for each in args))


def _clean_argument(value: Any, clean: Clean) -> Any:
    if type(value) is str:
        return _cleaned(value, clean)
    shown = text_of(value, repr)
    cleaned = _cleaned(shown, clean)
    return value if cleaned == shown else cleaned


def _cleaned(text: str, clean: Clean) -> str:
    if len(text) <= LONGEST:
        return clean(text)
    return f"{clean(text[:LONGEST])[:-1000]}…"  # where a secret may have been cut in two


# -- stand-ins -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shows:
    """What a stand-in shows in place of the original; None for what a group makes of its members."""

    text: str | None
    repr: str | None
    args: tuple[Any, ...] = ()
    clean: Clean = redact

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shows, (self.text, self.repr, self.args)


class _StandIn:
    """What all stand-ins are. Each has a class of its own, which holds the original."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Keep it from the original's class, which may count its subclasses."""

    @property
    def original(self) -> BaseException:
        """The error in whose place this one stands: its text holds a secret."""
        return _held_by(self)[0]

    def __str__(self) -> str:
        text = _held_by(self)[1].text
        return _GROUP["__str__"](self) if text is None else text

    def __repr__(self) -> str:
        shown = _held_by(self)[1].repr
        if shown is not None:
            return shown
        group = cast("BaseExceptionGroup[BaseException]", self)
        held = text_of([*group.exceptions], repr)
        return f"{name_of(group)}({group.message!r}, {held})"

    def __getattribute__(self, name: str) -> Any:
        # All but what prints and raises it is the original's, its texts redacted.
        if name == "__notes__":
            return _noted(self)
        if (own := _own(self).get(name)) is not None:
            return own.__get__(self, type(self))
        original, shows = _held_by(self)
        if name == "__class__":
            return type(original)
        value = getattr(original, name)
        return shows.clean(value) if type(value) is str else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__notes__":
            _DICT.__get__(self)[name] = value
        elif (own := _own(self).get(name)) is not None:
            own.__set__(self, value)
        else:
            setattr(_held_by(self)[0], name, value)

    def derive(self, excs: Sequence[BaseException], /) -> BaseException:
        """Return a stand-in for a part of the group."""
        return _stand_in(*_held_by(self), (), excs)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        error = cast("BaseException", self)
        return _stand_in, (*_held_by(self), notes_of(error), _members(error))


_OWN = {name: own for name, own in {**_ERROR, **vars(_StandIn)}.items() if hasattr(own, "__get__")}
_OWN_OF_GROUPS = {**_OWN, **_GROUP, **vars(_StandIn)}
_DICT = _ERROR["__dict__"]
del _OWN["derive"]


def _own(stand_in: object) -> dict[str, Any]:
    return _OWN_OF_GROUPS if issubclass(type(stand_in), BaseExceptionGroup) else _OWN


def _noted(stand_in: object) -> Any:
    try:
        return _DICT.__get__(stand_in)["__notes__"]
    except KeyError:
        raise AttributeError("__notes__") from None


def _held_by(stand_in: object) -> tuple[BaseException, _Shows]:
    found: tuple[BaseException, _Shows] = type.__getattribute__(type(stand_in), "_held")
    return found


def _stand_in(
    original: BaseException,
    shows: _Shows,
    notes: Sequence[str] = (),
    members: Sequence[BaseException] = (),
) -> BaseException:
    while issubclass(type(original), _StandIn):
        original = _held_by(original)[0]
    if not members:
        members = _members(original)
    for base in type(original).__mro__:
        # A class that is final, or can't be instantiated so, has its base in its place.
        with suppress(Exception):
            stand_in = _made(base, original, shows, members)
            break
    else:
        raise AssertionError
    if notes:
        stand_in.__notes__ = [*notes]
    _ERROR["__traceback__"].__set__(stand_in, _ERROR["__traceback__"].__get__(original))
    return stand_in


def _made(
    base: type, original: BaseException, shows: _Shows, members: Sequence[BaseException]
) -> BaseException:
    kind = type(original)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    # Not by calling the metaclass, nor the class, which may do anything.
    own = type.__new__(
        type(base), kind.__name__, (_StandIn, base), {**names, "_held": (original, shows)}
    )
    new = next(
        found
        for each in own.__mro__
        if isinstance(found := vars(each).get("__new__"), BuiltinFunctionType)
    )
    if issubclass(base, BaseExceptionGroup):
        message = shows.clean(_GROUP["message"].__get__(original))
        made: BaseException = new(own, message, [*members])
    else:
        made = new(own)
        _ARGS.__set__(made, shows.args)
    return made
