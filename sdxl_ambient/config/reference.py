"""Pages that are written from the options themselves: docs/OPTIONS.md and configs/template.yaml."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import yaml

from sdxl_ambient.config.parser import default_of, groups
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.provenance import atomic

TABLE_HEAD = """# Options of train_sdxl_ambient.py

Each is a flag (`--name value`) and a key of the YAML file given with `--config_file`; flags win. An unknown key is an
error that names the nearest valid one. `python -m sdxl_ambient.latents` takes those of the first two tables and
`--output_dir`. Written by `python -m sdxl_ambient.option_table docs/OPTIONS.md`.

*On resume* says what another value does with `--resume_from_checkpoint`. *same*: it is refused, with both values. *applied*:
it counts from there on, and is named in the first lines. *free*: it changes no weight.
"""
TEMPLATE_HEAD = """# Every option of train_sdxl_ambient.py with its default, to copy and uncomment.
#   accelerate launch train_sdxl_ambient.py --config_file configs/template.yaml \\
#     --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
#     --train_data_dir my_images --output_dir runs/mine
# Expected: nothing is set here, so a run is one with the defaults. Not measured here.
# Written by python -m sdxl_ambient.option_template configs/template.yaml.
"""
WIDTH = 120


def _described(field: dataclasses.Field) -> str:
    """Help text and choices."""
    choices = f" ({', '.join(map(str, field.metadata['choices']))})" if field.metadata["choices"] else ""
    return f"{field.metadata['help']}{choices}"


def _row(field: dataclasses.Field) -> str:
    """One line of a table: the flag, its default and its help."""
    default = default_of(field)
    shown = ", ".join(default) if isinstance(default, list) else default
    shown = "none" if shown in (None, "") else str(shown).lower() if isinstance(shown, bool) else shown
    return f"| `--{field.name}` | {shown} | {field.metadata['resume']} | {_described(field)} |"


def option_table() -> str:
    """The whole of docs/OPTIONS.md."""
    parts = [TABLE_HEAD]
    for title, own in groups(TrainOptions):
        parts.append(
            "\n".join([f"## {title}", "", "| option | default | on resume | what |", "|---|---|---|---|", *map(_row, own)])
            + "\n"
        )
    return "\n".join(parts)


def _entry(field: dataclasses.Field) -> str:
    """Two or more lines: the help as a comment, and ``#name: default`` without a space, to tell them apart."""
    described = textwrap.wrap(_described(field), WIDTH - 2, break_on_hyphens=False)
    return "\n".join([*(f"# {line}" for line in described), f"#{field.name}: {_in_yaml(default_of(field))}"])


def _in_yaml(value) -> str:
    """A default as our YAML reader takes it: none for None, a list in brackets, texts quoted where they must be."""
    if value is None:
        return "none"
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).removesuffix("...\n").strip()


def option_template() -> str:
    """The whole of configs/template.yaml."""
    parts = [TEMPLATE_HEAD]
    for title, own in groups(TrainOptions):
        parts.append("\n\n".join([f"# == {title} ==", *map(_entry, own)]) + "\n")
    return "\n".join(parts)


def write_page(module: str, make: Callable[[], str], argv: list[str] | None) -> int:
    """The command line of a module that writes one text to a file. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    help_asked = argv in (["-h"], ["--help"])
    if len(argv) != 1 or help_asked:
        print(f"usage: python -m sdxl_ambient.{module} FILE", file=sys.stdout if help_asked else sys.stderr)
        return 0 if help_asked else 2
    with atomic(Path(argv[0])) as temporary:
        temporary.write_text(make(), encoding="utf-8")
    return 0
