"""docs/OPTIONS.md, written from the options themselves.

python -m sdxl_ambient.option_table docs/OPTIONS.md
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.provenance import atomic

HEAD = """# Options of train_sdxl_ambient.py

Each is a flag (`--name value`) and a key of the YAML file given with `--config_file`; flags win. An unknown key is an
error that names the nearest valid one. `python -m sdxl_ambient.latents` takes those of the first two tables and
`--output_dir`. Written by `python -m sdxl_ambient.option_table docs/OPTIONS.md`.
"""


def groups(cls=TrainOptions) -> list[tuple[str, list[dataclasses.Field]]]:
    """Title and own fields of every class that the options are made of, in the order of the help."""
    found, seen = [], set()
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part) and part is not cls:
            own = [f for f in dataclasses.fields(part) if f.name not in seen]
            seen.update(f.name for f in own)
            found.append((part.__doc__.strip(), own))
    return found


def row(field: dataclasses.Field) -> str:
    """One line of a table: the flag, its default and its help."""
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    shown = ", ".join(default) if isinstance(default, list) else default
    shown = "none" if shown in (None, "") else str(shown).lower() if isinstance(shown, bool) else shown
    choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
    return f"| `--{field.name}` | {shown} | {field.metadata['help']}{choices} |"


def page() -> str:
    """The whole of docs/OPTIONS.md."""
    parts = [HEAD]
    for title, own in groups():
        parts.append("\n".join([f"## {title}", "", "| option | default | what |", "|---|---|---|", *map(row, own)]) + "\n")
    return "\n".join(parts)


def write(module: str, make: Callable[[], str], argv: list[str] | None) -> int:
    """The command line of a module that writes one text to a file. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print(f"usage: python -m sdxl_ambient.{module} FILE", file=sys.stderr)
        return 2
    with atomic(Path(argv[0])) as temporary:
        temporary.write_text(make(), encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    return write("option_table", page, argv)


if __name__ == "__main__":
    raise SystemExit(main())
