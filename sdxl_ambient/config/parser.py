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
import types
import typing
from pathlib import Path

import yaml

from sdxl_ambient.errors import OptionError


def option(
    default=None,
    help: str = "",
    *,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    metavar: str | None = None,
):
    """A dataclass field that carries its help text and its allowed values (``above`` is an exclusive minimum)."""
    metadata = dict(help=help, choices=choices, minimum=minimum, maximum=maximum, above=above, metavar=metavar)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class _Type:
    """What a field holds: ``base`` is str, int, float or bool; ``many`` a list of them; ``optional`` allows None."""

    base: type
    many: bool
    optional: bool

    @classmethod
    def of(cls, annotation) -> _Type:
        optional = many = False
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
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
        return str(value)
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


def _unknown(name: str, known, where: str) -> OptionError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return OptionError(f"{where}: unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


class _Parser(argparse.ArgumentParser):
    """Raises OptionError where argparse would print its usage and exit."""

    def error(self, message):
        raise OptionError(message)


def _parser(cls, prog: str | None, description: str | None) -> _Parser:
    parser = _Parser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_file", metavar="YAML", help="options from a file; flags override it")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = _Type.of(hints[field.name])
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        text = field.metadata.get("help", "")
        if field.metadata.get("choices"):
            text += f" (one of: {', '.join(map(str, field.metadata['choices']))})"
        if default not in (None, False, []):
            text += f" [default: {default}]"
        keywords = dict(dest=field.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        if kind.base is bool:
            keywords.update(nargs="?", const=True, metavar="true|false")
        else:
            metavar = field.metadata.get("metavar") or {str: "TEXT", int: "INT", float: "FLOAT"}[kind.base]
            keywords.update(metavar=metavar, **({"nargs": "+"} if kind.many else {}))
        parser.add_argument(f"--{field.name}", **keywords)
    return parser


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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        raise OptionError(f"--config_file: {str(path)!r} is not valid YAML: {first}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"--config_file: {str(path)!r} must hold 'option: value' lines, not {type(values).__name__}")
    return values


def build_options(cls, values: dict, where: str = "options"):
    """Make ``cls`` from a mapping, with every key and value checked. Raises OptionError."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    converted = {}
    for name, value in values.items():
        if name not in fields:
            raise _unknown(str(name), fields, where)
        converted[name] = _convert(name, value, _Type.of(hints[name]))
        _check(name, converted[name], fields[name].metadata)
    options = cls(**converted)
    if hasattr(options, "validate"):
        options.validate()
    return options


def load_options(cls, argv: list[str] | None = None, *, prog: str | None = None, description: str | None = None):
    """Dataclass ``cls`` from ``--config_file`` and flags. ``cls.validate()``, if there, checks options against each other.

    Raises:
        OptionError: unknown, malformed, out-of-range or contradictory options.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(cls, prog, description)
    names = ["config_file", *(f.name for f in dataclasses.fields(cls))]
    hints, given = typing.get_type_hints(cls), set()
    for token in argv:
        name = token[2:].split("=", 1)[0]
        if token.startswith("--") and name in given:
            # For a single value the last flag wins, as everywhere; of a list the earlier values would be lost.
            raise OptionError(f"--{name}: given twice; give all its values after one --{name}")
        if token.startswith("--") and name in hints and _Type.of(hints[name]).many:
            given.add(name)
        if token.startswith("--") and name and name not in names and name != "help":
            raise _unknown(name, names, "command line")
    flags = vars(parser.parse_args(argv))
    path = flags.pop("config_file", None)
    values = read_yaml(path) if path else {}
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise _unknown(str(name), known, str(path))
    return build_options(cls, {**values, **flags})


def parse_options(cls, argv: list[str] | None = None, *, prog: str | None = None, description: str | None = None):
    """:func:`load_options` for entry points: a wrong option prints its one line to stderr and exits with code 2."""
    try:
        return load_options(cls, argv, prog=prog, description=description)
    except OptionError as error:
        print(f"{prog or Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
