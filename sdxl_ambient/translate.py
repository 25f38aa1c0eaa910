"""Another trainer's command or configuration as our YAML, with what has no counterpart here and why.

    python -m sdxl_ambient.translate 'accelerate launch sdxl_train_network.py --network_dim 16 …' > mine.yaml
    python -m sdxl_ambient.translate kohya.toml --output mine.yaml

Reads commands of diffusers' SDXL examples and of kohya's sd-scripts, and kohya's TOML files. The YAML holds what is the same
or has another name here. What isn't here stands below it as comments, with the reason, as docs/MIGRATING.md has it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

from sdxl_ambient.config.migration import SCRIPTS, find, plain
from sdxl_ambient.config.parser import checked
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import OptionError, run_command
from sdxl_ambient.provenance import atomic
from sdxl_ambient.texts import read_text


@dataclass
class Translation:
    """Our options, what to know of them, and what isn't here: (flag, reason)."""

    script: str
    values: dict[str, Any]
    notes: list[tuple[str, str]]
    left: list[tuple[str, str]]

    def yaml(self) -> str:
        """The configuration file, for ``--config_file``."""
        lines = [f"# From {self.script}. accelerate launch train_sdxl_ambient.py --config_file THIS"]
        lines += [f"# {flag}: {note}" for flag, note in self.notes]
        if self.values:
            lines.append(yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True, width=1000).strip())
        if self.left:
            lines.append("# Not here:")
        return "\n".join([*lines, *(f"# {flag}: {reason}" for flag, reason in self.left)]) + "\n"


def translate(given: Sequence[str]) -> Translation:
    """A command in one text or in words, or the path of a TOML file.

    Raises:
        OptionError: no command of a script that is known, or a file that can't be read.
    """
    words = shlex.split(given[0]) if len(given) == 1 else list(given)
    if len(words) == 1 and words[0].endswith(".toml"):
        return _translated("kohya", f"{Path(words[0]).name}", list(_of_toml(Path(words[0]))))
    script = next((word for word in words if Path(word).name in SCRIPTS), None)
    if script is None:
        raise OptionError(f"COMMAND: it names none of {', '.join(SCRIPTS)}, and no .toml file")
    name = Path(script).name
    flags = list(_flags(words[words.index(script) + 1 :]))
    for file in [str(value) for flag, value in flags if flag in ("config_file", "dataset_config") and value]:
        path = Path(file) if Path(file).suffix else Path(file + ".toml")
        flags = [*_of_toml(path), *((f, v) for f, v in flags if f not in ("config_file", "dataset_config"))]
    translation = _translated(SCRIPTS[name][0], name, flags)
    if SCRIPTS[name][1] == "F":
        translation.values.setdefault("finetune", "full")
    return translation


def _flags(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Name and value of each flag: True for one without a value, a list for one with several."""
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("--"):
            raise OptionError(f"COMMAND: {word!r} belongs to no flag")
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while not equals and i < len(words) and not words[i].startswith("--"):
            values.append(words[i])
            i += 1
        yield name.replace("-", "_"), True if not values else values[0] if len(values) == 1 else values


def _of_toml(path: Path) -> Iterator[tuple[str, Any]]:
    """All keys of a TOML file, those of its tables too; of several data sets each stands for itself."""
    if tomllib is None:
        raise OptionError("COMMAND: a TOML file needs Python 3.11; give the command with its flags")
    try:
        content = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise OptionError(f"COMMAND: {str(path)!r} is no TOML file: {error}") from None
    yield from _keys(content)


def _keys(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _keys(value)
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            for one in value:
                yield from _keys(one)
        else:
            yield name, value


def _translated(peer: str, script: str, flags: Sequence[tuple[str, Any]]) -> Translation:
    done = Translation(script, {}, [], [])
    ours = {field.name for field in fields(TrainOptions)}
    for name, value in flags:
        if value is False:
            continue  # how a TOML file says that a flag isn't given
        row, shown = find(name, peer), f"--{name}" if value is True else f"--{name} {_shown(value)}"
        if row is None:
            done.left.append((shown, f"no flag of {script} that is known"))
        elif row.here is None or row.here not in ours:
            instead = f"--{row.here}; " if row.here else ""
            done.left.append((shown, instead + (plain(row.note) or "another command")))
        elif row.here in done.values:
            done.left.append((shown, f"--{row.here} is given already, as {_shown(done.values[row.here])}"))
        else:
            _take(done, row.here, value, shown, plain(row.note))
    return done


def _take(done: Translation, here: str, value: Any, shown: str, note: str) -> None:
    """Keep a value that our option can have, in small letters if need be."""
    tries = [value, value.lower(), _side(value)] if isinstance(value, str) else [value]
    problem = ""
    for one in tries:
        try:
            done.values[here] = checked(TrainOptions, here, one)
        except OptionError as error:
            problem = problem or str(error)
            continue
        if note:
            done.notes.append((shown, note))
        return
    done.left.append((shown, problem + (f" ({note})" if note else "")))


def _side(value: str) -> str:
    """One side of a square that is given by two: 1024,1024."""
    sides = [side.strip() for side in value.split(",")]
    return sides[0] if len(set(sides)) == 1 else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sdxl_ambient.translate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="a command in quotes, or a .toml file")
    parser.add_argument("--output", type=Path, metavar="YAML", help="file to write [default: the screen]")
    options = parser.parse_args(argv)
    return run_command("sdxl_ambient.translate", lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    translation = translate(options.command)
    if options.output is None:
        print(translation.yaml(), end="")
        return
    if options.output.exists():
        raise OptionError(f"--output: {str(options.output)!r} is there already; nothing is overwritten")
    with atomic(options.output) as temporary:
        temporary.write_text(translation.yaml(), encoding="utf-8")
    counts = f"{len(translation.values)} options in {options.output}, {len(translation.left)} are not here"
    print(counts, file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
