"""Arguments checked at the public border, against their annotations: kinds, ranges and names, one line each.

A bool is no number, and a whole-valued float is no whole number. A scalar of numpy or torch is the number that it holds.
"""

import collections.abc
import functools
import inspect
import math
import os
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rep_plugin.errors import ArgumentError, ArgumentTypeError, did_you_mean

Function = TypeVar("Function", bound=Callable)
NUMBERS = {int: "whole number", float: "number"}
NOUNS = {
    bool: ("True or False", "bools"),
    str: ("a string", "strings"),
    dict: ("a dict", "dicts"),
    type(None): ("None",),
}
LONG, MOST_BITS = 80, 1024  # letters of a value in a message; of an integer, bits


class Misfit(Exception):
    """A value does not fit: ``(where, value, what was expected, right kind)``; ``where`` is '' or '[1]'."""


@dataclass(frozen=True)
class In:
    """An interval, ends as mathematics writes them: ``In("[0, 1)")``. Without one a number must be finite."""

    text: str

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, float) and math.isnan(value):
            return self.text == "[-inf, inf]"  # whatever a result may be
        (low, high), (left, right) = self.ends, (self.text[0], self.text[-1])
        return (low <= value if left == "[" else low < value) and (value <= high if right == "]" else value < high)

    def __str__(self) -> str:
        low, high = self.text[1:-1].split(", ")
        if high != "inf":
            return f" in {self.text}"
        return "" if "inf" in low else f" {'>=' if self.text[0] == '[' else '>'} {low}"


FINITE = In("(-inf, inf)")


@dataclass(frozen=True)
class OneOf:
    """One of these names."""

    names: Iterable[str]

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))

    def __contains__(self, value: Any) -> bool:
        return value in self.names

    def __str__(self) -> str:
        if len(self.names) == 1:
            return repr(self.names[0])
        return f"one of {', '.join(sorted(name or repr(name) for name in self.names))}"


@dataclass(frozen=True)
class Dims:
    """A floating point tensor of these axes: ``Dims("(N, C, H, W)")``. One name is one size, in all arguments of a call.

    ``I / groups`` is the size I divided by the argument ``groups``. With ``below``, a tensor of int64 indices below the
    product of these sizes, or arguments.
    """

    axes: str
    below: str | None = None

    def __contains__(self, value: Any) -> bool:
        if value.ndim != len(self.names) or self.below is None:
            sizes = zip(self.names, value.shape)
            is_full = all(size or name == "N" for name, size in sizes)  # a batch may be empty
            return value.ndim == len(self.names) and value.is_floating_point() and is_full
        return str(value.dtype) == "torch.int64" and not value.is_meta and not bool((value < 0).any())

    @functools.cached_property
    def names(self) -> list[str]:
        return [axis.strip() for axis in self.axes[1:-1].split(",") if axis.strip()]

    def misfit(self, tensor: Any, sizes: dict[str, Any], given: collections.abc.Mapping[str, Any]) -> str:
        """Return what does not fit the other arguments, '' for nothing; ``sizes`` gets the axes of new names."""
        if sizes.setdefault("device", tensor.device) != tensor.device:
            return f"on {sizes['device']}"
        for axis, size in zip(self.names, tensor.shape):
            name, _, divisor = axis.partition(" / ")
            if (parts := given.get(divisor, 1)) != 1 and tensor.shape[0] % parts:
                return f"with {self.names[0]} a multiple of {divisor} = {parts}"
            if not (divisor and divisor not in given) and sizes.setdefault(name, size * parts) != size * parts:
                return f"with {axis} = {sizes[name] // parts}"
        factors = [sizes.get(name, given.get(name)) for name in (self.below or "").split()]
        if factors and None not in factors and tensor.numel() and int(tensor.max()) >= math.prod(factors):
            return f"none above {math.prod(factors) - 1}"
        return ""

    def __str__(self) -> str:
        return f"a float tensor {self.axes}" if self.below is None else f"int64 indices {self.axes}, none below 0"


@dataclass(frozen=True)
class That:
    """Whatever ``test`` is true of, in the words of a message."""

    test: Callable[[Any], bool]
    text: str

    def __contains__(self, value: Any) -> bool:
        return self.test(value)

    def __str__(self) -> str:
        return self.text


Count = Annotated[int, In("[1, inf)")]
Channels = Annotated[int, In("[1, 65536]")]  # larger ones are a slip, and would fill the memory
Side = Annotated[int, In("[1, 1024]")]  # of a window, in pixels
Classes = Annotated[int, In("[0, 1048576]")]  # 0: no classifier
Shape = Annotated[collections.abc.Sequence[Count], That(lambda shape: len(shape) > 1, "a shape (N, C, ...)")]
Seed = Annotated[int, In("[0, 4294967295]")]
Size = Side | tuple[Side, Side]
Pixels = Annotated[int, In("[0, 1024]")]
Padding = Pixels | tuple[Pixels, Pixels]
Share = Annotated[float, In("(0, 1)")]
Fraction = Annotated[float, In("[0, 1)")]
Positive = Annotated[float, In("(0, inf)")]
NotNegative = Annotated[float, In("[0, inf)")]
Strength = Annotated[float, In("[0, 1000]")]  # of a pull on weights: more than that only diverges
Anything = Annotated[float, In("[-inf, inf]")]  # a result: NaN too
Name = Annotated[str, That(lambda text: bool(text) and "\0" not in text, "a string that is not empty")]


def checked(target: Function) -> Function:
    """Check what a function, or a class when it is built, is given, before anything is done with it.

    Args:
        target: with annotations; ``Annotated[int, In("[1, 8]")]`` and the like say more than the kind.

    Returns:
        The same, which raises ArgumentError and ArgumentTypeError in one line that names argument, value and expectation.

    Example:
        >>> from rep_plugin.arguments import Count, checked
        >>> @checked
        ... def repeat(word: str, times: Count = 1) -> str:
        ...     return word * times
        >>> repeat("ab", 2)
        'abab'
        >>> repeat("ab", times=0)
        Traceback (most recent call last):
        rep_plugin.errors.ArgumentError: times must be a whole number >= 1, got 0
    """
    if isinstance(target, type):
        target.__init__ = _guard(target.__init__, target.__name__)  # type: ignore[misc]
        return target
    return _guard(target, target.__name__)


def check(name: str, value: Any, hint: Any) -> Any:
    """Return a value that fits an annotation, scalars as Python's own.

    Args:
        name: of the argument, for the message.
        value: to be checked.
        hint: the annotation.

    Returns:
        The value.

    Raises:
        ArgumentError: it is out of its range; or ArgumentTypeError, of another kind.

    Example:
        >>> from rep_plugin.arguments import Share, check
        >>> check("share", 0.5, Share)
        0.5
    """
    try:
        return _fit(value, hint)
    except Misfit as misfit:
        where, wrong, expected, right_kind = misfit.args
        kind = ArgumentError if right_kind else ArgumentTypeError
        raise kind(f"{name}{where} must be {expected}, got {shown(wrong)}{_hint(wrong, hint, where)}") from None


class _Shown(reprlib.Repr):
    """One line of a value, however large it is and however deep it nests; of objects the class."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, LONG, LONG, LONG
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 20

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > MOST_BITS:
            return f"an integer of {value.bit_length():,} bits"
        return super().repr_int(value, level)

    def repr_instance(self, value: Any, level: int) -> str:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            place = f" on {value.device}" if getattr(value, "is_meta", False) else ""
            return f"a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}{place}"
        if isinstance(value, type):
            return f"the class {value.__name__}"
        if isinstance(value, (str, bytes, bool, float, complex, type(None))):
            return super().repr_instance(value, level)
        for kind in (dict, list, tuple, set, int):
            if isinstance(value, kind):
                return getattr(self, f"repr_{kind.__name__}")(value, level)
        return f"a {type(value).__name__}"


def shown(value: Any) -> str:
    """Return a value as a message shows it: one line, and not a long one."""
    text = " ".join(_Shown().repr(value).split())
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotation.

    Args:
        value: the value.
        hint: the annotation; a bool is no int, an int is a float.

    Returns:
        Whether it is.

    Example:
        >>> fits({"conv": [1, 2]}, dict[str, tuple[int, ...]]), fits({"conv": 3}, dict[str, tuple[int, ...]])
        (True, False)
    """
    with suppress(Misfit):
        _fit(value, hint)
        return True
    return False


def _guard(function: Function, name: str) -> Function:
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not hints:
            hints.update(_hints(function))
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            made = args[0] if function.__name__ == "__init__" else None
            raise ArgumentTypeError(_misuse(name, signature, kwargs, error, type(made))) from None
        bound.apply_defaults()
        for argument, value in bound.arguments.items():
            hint = hints.get(argument, Any)
            kind = signature.parameters[argument].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[argument] = {key: check(key, one, hint) for key, one in value.items()}
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[argument] = tuple(check(f"{argument}[{i}]", one, hint) for i, one in enumerate(value))
            elif value is not signature.parameters[argument].default:
                bound.arguments[argument] = check(argument, value, hint)
        try:
            _require_one_size(bound.arguments, hints, "{}")
        except Misfit as misfit:
            where, wrong, expected, _ = misfit.args
            raise ArgumentError(f"{where} must be {expected}, got {shown(wrong)}") from None
        return function(*bound.args, **bound.kwargs)

    return guarded  # type: ignore[return-value]


def _require_one_size(given: collections.abc.Mapping[str, Any], hints: collections.abc.Mapping, where: str) -> None:
    """Axes of one name are of one size, in all tensors of a call or of a record."""
    sizes: dict[str, Any] = {}
    for name, value in given.items():
        for one in _flat(hints.get(name, Any)) if hasattr(value, "shape") else ():
            for rule in get_args(one)[1:] if get_origin(one) is Annotated else ():
                if isinstance(rule, Dims) and value in rule and (wrong := rule.misfit(value, sizes, given)):
                    raise Misfit(where.format(name), value, f"{rule} {wrong}", True)


def _hints(function: Callable) -> dict[str, Any]:
    """Annotations by argument; names that only type checkers import are taken for anything."""
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:
        return {name: hint for name, hint in function.__annotations__.items() if not isinstance(hint, str)}


def _misuse(name: str, signature: inspect.Signature, kwargs: dict, error: TypeError, kind: type) -> str:
    """What is said of a call that does not fit; an argument of a class may be its parents'."""
    known = dict.fromkeys(signature.parameters)
    for one in kind.__mro__ if kind is not type(None) else ():
        if one.__module__.startswith("rep_plugin.") and "__init__" in vars(one):
            name, known = kind.__name__, known | dict.fromkeys(inspect.signature(one).parameters)
    known = [
        one
        for one in known
        if one not in ("self", "args", "kwargs") and not one.endswith(("_args", "options", "pooling"))
    ]
    for word in kwargs:
        if word not in known:
            return f"{name} takes no {word!r}" + (did_you_mean(word, known) or f", expected {', '.join(known)}")
    return f"{name}: {error}"


def _fit(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint in (Any, object, inspect.Parameter.empty) or isinstance(hint, (str, TypeVar)) or "ForwardRef" in repr(hint):
        return value
    if origin is Annotated:
        return _fit_rules(value, args[0], args[1:])
    if origin in (Union, types.UnionType):
        return _fit_union(value, hint, args)
    if origin is Literal:
        if isinstance(value, (str, int)) and value in args:
            return value
        raise Misfit("", value, f"one of {', '.join(map(repr, args))}", isinstance(value, type(args[0])))
    if hint in NUMBERS:
        return _fit_rules(value, hint, (FINITE,))
    if origin in (collections.abc.Callable, collections.abc.Hashable) or hint is Callable:
        return _require(callable(value), value, hint)
    if hint in (bool, str):
        value = _plain(value) if hint is bool else value
        return _require(isinstance(value, hint), value, hint)
    if hint is None or hint is type(None):
        return _require(value is None, value, type(None))
    if hint is BinaryIO:
        return _require(hasattr(value, "read"), value, hint)
    if origin is tuple:
        return _fit_tuple(value, hint, args)
    if hint is collections.abc.Mapping or (isinstance(origin, type) and issubclass(origin, collections.abc.Mapping)):
        return _fit_mapping(value, hint, args)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return _fit_iterable(value, hint, origin, args)
    if origin is type:
        return _require(isinstance(value, type), value, hint)
    kind = origin or hint
    if not isinstance(kind, type):
        return value
    _require(isinstance(value, kind) or _is_device(value, kind), value, kind)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):  # a named tuple is a record of arguments
        hints = get_type_hints(kind, include_extras=True)
        for name, inner in hints.items():
            _fit_inner(getattr(value, name), inner, f".{name}")
        _require_one_size(value._asdict(), hints, ".{}")
    return value


def _require(fits: bool, value: Any, hint: Any) -> Any:
    if not fits:
        raise Misfit("", value, describe(hint), False)
    return value


def _plain(value: Any) -> Any:
    """The Python number of a scalar of numpy or torch; everything else as it is."""
    is_scalar = hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0 and not getattr(value, "is_meta", False)
    return value.item() if is_scalar else value


def _with_rules(hint: Any, rules: tuple) -> Any:
    parts: Any = (hint, *rules)
    return Annotated[parts]


def _fit_rules(value: Any, hint: Any, rules: tuple) -> Any:
    try:
        fitting = _fit_number(value, hint) if hint in NUMBERS else _fit(value, hint)
    except Misfit as misfit:
        if misfit.args[0]:
            raise
        raise Misfit("", value, describe(_with_rules(hint, rules)), False) from None
    if any(fitting not in rule for rule in rules if isinstance(rule, (In, OneOf, Dims, That))):
        raise Misfit("", value, describe(_with_rules(hint, rules)), True)
    return fitting


def _fit_number(value: Any, hint: Any) -> Any:
    value = _plain(value)
    kinds = (int,) if hint is int else (int, float)
    _require(isinstance(value, kinds) and not isinstance(value, bool), value, hint)
    _require(not isinstance(value, int) or hint is float or abs(value) < 2**63, value, hint)
    if hint is float and isinstance(value, int) and abs(value) >= 2**31:  # torch takes no larger whole numbers
        _require(abs(value) < 2**1023, value, hint)
        return float(value)
    return value


def _fit_union(value: Any, hint: Any, members: tuple) -> Any:
    deepest = None
    if isinstance(value, str):  # a device's name is no other string
        members = tuple(one for one in members if one is not str or not any(map(_is_device_kind, members)))
    for member in members:
        try:
            fitting = _fit(value, member)
        except Misfit as misfit:
            if deepest is None or (bool(misfit.args[0]), misfit.args[3]) > (bool(deepest.args[0]), deepest.args[3]):
                deepest = misfit
        else:
            if isinstance(value, str) and _is_path(members) and (not value or "\0" in value):
                raise Misfit("", value, "a path", True)
            return fitting
    if deepest is not None and deepest.args[0]:
        raise deepest
    raise Misfit("", value, describe(hint), deepest is not None and deepest.args[3])


def _fit_inner(value: Any, hint: Any, where: str) -> Any:
    try:
        return _fit(value, hint)
    except Misfit as misfit:
        inner, wrong, expected, right_kind = misfit.args
        raise Misfit(f"{where}{inner}", wrong, expected, right_kind) from None


def _fit_tuple(value: Any, hint: Any, args: tuple) -> tuple:
    _require(isinstance(value, (tuple, list)), value, hint)
    if args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise Misfit("", value, describe(hint), True)
        fitting = tuple(_fit_inner(one, inner, f"[{i}]") for i, (one, inner) in enumerate(zip(value, args)))
        _require_one_size(dict(enumerate(fitting)), dict(enumerate(args)), "[{}]")
        return fitting
    return tuple(_fit_inner(one, args[0], f"[{i}]") for i, one in enumerate(value))


def _fit_mapping(value: Any, hint: Any, args: tuple) -> Any:
    _require(isinstance(value, collections.abc.Mapping), value, hint)
    if not args:
        return value
    for key in value:
        _require(fits(key, args[0]), value, hint)
    fitting = {key: _fit_inner(one, args[1], f"[{shown(key)}]") for key, one in value.items()}
    return value if all(fitting[key] is one for key, one in value.items()) else fitting


def _fit_iterable(value: Any, hint: Any, origin: type, args: tuple) -> Any:
    is_other = isinstance(value, (str, bytes, collections.abc.Mapping)) or (args and hasattr(value, "dtype"))
    _require(isinstance(value, origin) and not is_other, value, hint)
    if not isinstance(value, (collections.abc.Sequence, collections.abc.Set)) or not args:
        return value  # an iterator is read once
    fitting = [_fit_inner(one, args[0], f"[{i}]") for i, one in enumerate(value)]
    is_same = all(one is old for one, old in zip(fitting, value))
    return value if is_same else tuple(fitting) if type(value) is tuple else fitting


def _is_device(value: Any, kind: type) -> bool:
    """A device may be given by its name."""
    if not _is_device_kind(kind) or not isinstance(value, str):
        return False
    with suppress(RuntimeError):
        kind(value)
        return True
    return False


def _is_device_kind(kind: Any) -> bool:
    return (getattr(kind, "__module__", ""), getattr(kind, "__name__", "")) == ("torch", "device")


def _is_path(members: tuple) -> bool:
    return any(isinstance(one, type) and issubclass(one, os.PathLike) for one in members)


def describe(hint: Any, many: bool = False) -> str:
    """Return an annotation in the words of a message.

    Args:
        hint: the annotation.
        many: in the plural.

    Returns:
        The words.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rule = args[1]
        if args[0] in NUMBERS and isinstance(rule, In):
            return f"{describe(args[0], many)}{rule}"
        if isinstance(rule, (OneOf, That)) and many:
            return f"values, each {rule}"
        return str(rule)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_members(args, many)))
    if hint in NUMBERS:
        return f"{NUMBERS[hint]}s" if many else f"a {NUMBERS[hint]}"
    if hint in NOUNS:
        return NOUNS[hint][-1 if many else 0]
    if origin is tuple and args[-1] is not Ellipsis:
        return f"{len(args)} {describe(args[0], True)}"
    if hint is collections.abc.Mapping or (isinstance(origin, type) and issubclass(origin, collections.abc.Mapping)):
        return f"a dict of {describe(args[0], True)} and {describe(args[1], True)}" if args else NOUNS[dict][many]
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return f"a list of {describe(args[0], True)}" if args else "a list"
    if origin is collections.abc.Callable or hint is Callable:
        return "functions" if many else "a function"
    if hint in (Any, object) or not isinstance(origin or hint, type):
        return "values" if many else "a value"
    if hint is BinaryIO:
        return "an open file"
    name = {"Tensor": "tensor", "Module": "torch.nn.Module"}.get((origin or hint).__name__, (origin or hint).__name__)
    return f"{name}s" if many else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _kind(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _members(members: tuple, many: bool) -> Iterator[str]:
    numbers = set(map(_kind, members))
    for one in sorted(members, key=lambda one: one is type(None)):
        if _is_path(members) and (one is str or _is_path((one,))):
            yield "paths" if many else "a path"
        elif not (one is int and float in numbers):
            yield describe(one, many)


def _hint(value: Any, hint: Any, where: str) -> str:
    """What to write instead, where that is clear."""
    for one in _flat(hint):
        if get_origin(one) is Annotated and isinstance(value, str):
            for rule in get_args(one)[1:]:
                if isinstance(rule, OneOf):
                    return did_you_mean(value, rule.names)
        is_list = get_origin(one) in (collections.abc.Sequence, collections.abc.Iterable)
        if is_list and isinstance(value, str) and not where:
            return f": write [{value!r:.40}]" if str in map(_kind, get_args(one)) else ""
    return ""


def _flat(hint: Any) -> Iterator[Any]:
    """An annotation, and those inside it."""
    yield hint
    for one in get_args(hint):
        if get_origin(hint) is not Annotated:
            yield from _flat(one)
