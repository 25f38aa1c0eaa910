"""Typed options: a dataclass is the single source of names, types, defaults, ranges and help.

Values come from the dataclass, then from a YAML file (``--config_file``), then from flags; a later source wins. Every key
is checked before anything is loaded, and a wrong one raises :class:`OptionError` with one line that names the option, the
value and what is allowed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
import typing
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import yaml

from sdxl_ambient.config.migration import answer
from sdxl_ambient.errors import OptionError, one_line, print_error
from sdxl_ambient.provenance import is_utf8

T = TypeVar("T")
# What an option does when training goes on from a checkpoint: another value is refused; it counts, and is named in the first
# lines; or it may be anything, since it changes no weight.
SAME, APPLIED, FREE = "same", "applied", "free"


def option(
    default=None,
    help: str = "",
    *,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    metavar: str | None = None,
    resume: str = SAME,
) -> Any:
    """A dataclass field that carries its help text and its allowed values (``above`` is an exclusive minimum).

    ``resume``: of options of training, what another value does on resume: SAME, APPLIED or FREE.
    """
    metadata = {
        "help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "above": above, "metavar": metavar,
        "resume": resume,
    }  # fmt: skip
    return _field(default, metadata)


def redeclare(cls: type, name: str, default=dataclasses.MISSING) -> Any:
    """The option ``name`` of ``cls`` once more: for a class with few of its options, another order or another default.

    Help text and allowed values stay, so that an option says the same wherever it is.
    """
    field = _fields(cls)[name]
    if default is dataclasses.MISSING:
        default = default_of(field)
    return _field(default, {**field.metadata, "redeclared": True})


def _field(default, metadata: dict) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _types(cls: type) -> dict[str, _Type]:
    hints = typing.get_type_hints(cls)
    return {name: _Type.of(hints[name], default_of(field)) for name, field in _fields(cls).items()}


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field):
    """An option's default."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def groups(cls: type) -> list[tuple[str, list[dataclasses.Field]]]:
    """The options of ``cls`` by subject: title and fields of each class that it is made of, in the order of its fields.

    The title is the first line of the class's docstring; classes of one title share a group.
    """
    left, found = _fields(cls), {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            own = [left.pop(field.name) for field in dataclasses.fields(part) if field.name in left]
            if own:
                found.setdefault(_title(part), []).extend(own)
    return list(found.items())


def _title(cls: type) -> str:
    text = cls.__doc__ or ""
    if text.startswith(f"{cls.__name__}("):  # what the dataclass decorator writes where there is no docstring
        return "Options"
    return text.strip().splitlines()[0]


@dataclasses.dataclass(frozen=True)
class _Type:
    """What a field holds: ``base`` is str, int, float or bool; ``many`` a list of them; ``optional`` allows None.

    A field may have no None in its annotation and None as its default: ``validate()`` then sees to it that a value is given.
    """

    base: type
    many: bool
    optional: bool

    @classmethod
    def of(cls, annotation, default) -> _Type:
        optional, many = default is None, False
        if typing.get_origin(annotation) in (typing.Union, UnionType):
            (annotation,) = [a for a in typing.get_args(annotation) if a is not type(None)]
            optional = True
        if typing.get_origin(annotation) is list:
            (annotation,) = typing.get_args(annotation)
            many = True
        if annotation not in (str, int, float, bool):
            raise TypeError(f"an option can not hold {annotation}")
        return cls(annotation, many, optional)


def _scalar(name: str, value, base: type):
    """Convert one YAML or command-line value, refusing what would lose information (3.5 as int, "yes" as float)."""
    wrong = OptionError(f"--{name}: {value!r} is not {_type_name(base)}")
    if base is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1", "on"):
            return True
        if str(value).lower() in ("false", "no", "0", "off"):
            return False
        raise wrong
    if isinstance(value, bool) or isinstance(value, (list, dict)):
        raise wrong
    if base is str:
        # Bytes of the command line that are not UTF-8 come as such halves; no record could hold them.
        if not is_utf8(text := str(value)):
            raise OptionError(f"--{name}: {text!a} is not UTF-8")
        return text
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise wrong from None
    if base is float:
        return number
    if not math.isfinite(number) or number != int(number):
        raise wrong
    return int(number)


def _type_name(base: type) -> str:
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[base]


def _convert(name: str, value, kind: _Type):
    if value is None or (kind.optional and isinstance(value, str) and value.lower() in ("none", "null")):
        if kind.optional:
            return None
        raise OptionError(f"--{name}: a value is required, {_type_name(kind.base)}")
    if kind.many:
        return [_scalar(name, v, kind.base) for v in (value if isinstance(value, list) else [value])]
    return _scalar(name, value, kind.base)


def _check(name: str, value, metadata) -> None:
    for v in value if isinstance(value, list) else [value]:
        if v is None:
            continue
        if metadata.get("choices") and v not in metadata["choices"]:
            raise OptionError(f"--{name}: {v!r} is not one of {', '.join(map(str, metadata['choices']))}")
        if isinstance(v, float) and not math.isfinite(v):
            raise OptionError(f"--{name}: {v} is not finite")
        low, high, above = metadata.get("minimum"), metadata.get("maximum"), metadata.get("above")
        if low is not None and v < low:
            raise OptionError(f"--{name}: {v} is below the smallest allowed value, {low}")
        if above is not None and v <= above:
            raise OptionError(f"--{name}: {v} is not above {above}")
        if high is not None and v > high:
            raise OptionError(f"--{name}: {v} is above the largest allowed value, {high}")


def checked(cls: type, name: str, value: Any) -> Any:
    """One option's value, converted as a flag's or a file's is. Raises OptionError."""
    return _checked(name, value, _types(cls)[name], _fields(cls)[name])


def _checked(name: str, value: Any, kind: _Type, field: dataclasses.Field) -> Any:
    value = _convert(name, value, kind)
    _check(name, value, field.metadata)
    return value


def _unknown(names: list[str], known, source: str) -> OptionError:
    """All unknown options at once: what another trainer's is here, else the nearest name."""
    return OptionError(f"{source}: {'; '.join(_why_unknown(name, known) for name in names)}")


def _why_unknown(name: str, known) -> str:
    if (found := answer(name, known)) is not None:
        return found
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


class _Parser(argparse.ArgumentParser):
    """Raises OptionError where argparse would print its usage and exit."""

    def error(self, message):
        raise OptionError(message)


def _parser(cls: type, prog: str | None, description: str | None) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config_file YAML] [--option VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config_file", metavar="YAML", help="options from a file; flags override it")
    types = _types(cls)
    for title, fields in groups(cls):
        group = parser.add_argument_group(title)
        for field in fields:
            _add(group, field, types[field.name], resumed="resume_from_checkpoint" in types)
    return parser


def _add(group: argparse._ArgumentGroup, field: dataclasses.Field, kind: _Type, resumed: bool) -> None:
    keywords: dict[str, Any] = {}
    if kind.base is bool:
        keywords.update(nargs="?", const=True, metavar="true|false")
    else:
        keywords["metavar"] = field.metadata.get("metavar") or {str: "TEXT", int: "INT", float: "FLOAT"}[kind.base]
    if kind.many:
        keywords["nargs"] = "+"
    text = _help_of(field).replace("%", "%%") + (f" [on resume: {field.metadata['resume']}]" if resumed else "")
    group.add_argument(f"--{field.name}", dest=field.name, default=argparse.SUPPRESS, help=text, **keywords)


def _help_of(field: dataclasses.Field) -> str:
    """Help text, choices and default. Where the text itself says what none stands for, it is not said again."""
    text, default = field.metadata["help"], default_of(field)
    explained = default in (None, []) and any(word in text for word in ("default", "without"))
    if field.metadata["choices"]:
        text += f" (one of: {', '.join(map(str, field.metadata['choices']))})"
    return text if explained else f"{text} [default: {_shown_default(default)}]"


def _shown_default(default) -> str:
    """A default as a flag's value: none, true, false, the values of a list side by side."""
    if default in (None, []):
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


class _Yaml(yaml.SafeLoader):
    """YAML as 1.2 reads it: ``mixed_precision: no`` is the text "no", since no, yes, on and off are not booleans there; and
    a key that is given twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict:
    """Read a YAML mapping. A missing, unreadable or non-mapping file is an OptionError."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Yaml)
    except OSError as error:
        raise OptionError(f"--config_file: can not read {str(path)!r}: {error.strerror}") from None
    except RecursionError:
        raise OptionError(f"--config_file: {str(path)!r} is not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise OptionError(f"--config_file: {str(path)!r} is not valid YAML: {one_line(error, most=None)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"--config_file: {str(path)!r} must hold 'option: value' lines, not {type(values).__name__}")
    return values


def build_options(cls: type[T], values: dict, source: str = "options") -> T:
    """Make ``cls`` from a mapping, with every key and value checked. Raises OptionError."""
    types, known = _types(cls), _fields(cls)
    if unknown := [str(name) for name in values if name not in known]:
        raise _unknown(unknown, known, source)
    converted = {name: _checked(name, value, types[name], known[name]) for name, value in values.items()}
    options = cls(**converted)
    if validate := getattr(options, "validate", None):
        validate()
    return options


def load_options(
    cls: type[T], argv: list[str] | None = None, *, prog: str | None = None, description: str | None = None
) -> T:
    """Dataclass ``cls`` from ``--config_file`` and flags. ``cls.validate()``, if there, checks options against each other.

    Raises:
        OptionError: unknown, malformed, out-of-range or contradictory options.
    """
    argv = sys.argv[1:] if argv is None else argv
    _check_flags(cls, argv)
    flags = vars(_parser(cls, prog, description).parse_args(argv))
    path = flags.pop("config_file", None)
    values, known = read_yaml(path) if path else {}, _fields(cls)
    if unknown := [str(name) for name in values if name not in known]:
        raise _unknown(unknown, known, str(path))
    return build_options(cls, {**values, **flags})


def _check_flags(cls: type, argv: list[str]) -> None:
    """Refuse a flag that isn't there, and a list that is given twice."""
    types, given, unknown = _types(cls), set(), dict[str, None]()
    names = ["config_file", *types]
    for token in argv:
        name = token[2:].split("=", 1)[0]
        if token.startswith("--") and name in given:
            # For a single value the last flag wins, as everywhere; of a list the earlier values would be lost.
            raise OptionError(f"--{name}: given twice; give all its values after one --{name}")
        if token.startswith("--") and name in types and types[name].many:
            given.add(name)
        if token.startswith("--") and name and name not in names and name != "help":
            unknown[name] = None
    if unknown:
        raise _unknown(list(unknown), names, "command line")


def parse_options(
    cls: type[T], argv: list[str] | None = None, *, prog: str | None = None, description: str | None = None
) -> T:
    """:func:`load_options` for entry points: a wrong option prints its one line to stderr and exits with code 2."""
    try:
        return load_options(cls, argv, prog=prog, description=description)
    except OptionError as error:
        print_error(prog or Path(sys.argv[0]).name, error)
        raise SystemExit(2) from None
